"""The demo's table, plot and sentence, from runs small enough for a test."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(*nrrs):
    return [{"clean": 90.0, "pgd20": 50.0, "mean": 70.0, "nrr": value} for value in nrrs]


def test_the_sentence_calls_noise_noise(demo):
    runs = {"PGD-AT": scores(60.0, 62.0, 61.0), "RAAT": scores(61.0, 61.0, 61.5)}
    assert "inside the noise" in demo.verdict(runs, "RAAT")


def test_the_sentence_says_better_and_worse(demo):
    runs = {"PGD-AT": scores(60.0, 62.0, 61.0), "up": scores(63.0, 65.1, 64.0), "down": scores(57.0, 59.1, 58.0)}
    assert "+3.03 points over 3 seeds, better beyond the noise" in demo.verdict(runs, "up")
    assert "-2.97 points over 3 seeds, worse beyond the noise" in demo.verdict(runs, "down")


def test_one_seed_is_too_few_to_tell(demo):
    assert "too few runs" in demo.verdict({"PGD-AT": scores(60.0), "RAAT": scores(70.0)}, "RAAT")


def test_the_table_has_mean_and_deviation(demo):
    text = demo.table_text({"PGD-AT": scores(60.0, 62.0)})
    assert "61.00 ± 1.41" in text
    assert "CLEAN" in text.splitlines()[0]


@pytest.mark.slow
def test_the_demo_writes_table_and_plot(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(DEMO), "--seeds", "1", "--epochs", "1", "--workers", "1", "--out", str(tmp_path)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    result = json.loads((tmp_path / "table.json").read_text())
    assert set(result["runs"]) == {"standard", "PGD-AT", "PGD-AT+RPAT", "RAAT"}
    assert all(set(run) == {"clean", "pgd20", "mean", "nrr"} for runs in result["runs"].values() for run in runs)
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    assert "PGD-AT+RPAT against PGD-AT" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "trade_off.png"]
