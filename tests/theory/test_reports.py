"""The two reports of the theory run on small inputs and say what they measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from perceptual_at.models import DigitsCNN

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch):
    """Import an example and call its `main` with these arguments."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def main(name, *arguments, **constants):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()

    return main


@pytest.mark.slow
def test_the_theory_report_reads_checkpoints_and_writes_its_numbers_and_pictures(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    for name in ("PGD-AT", "other"):
        torch.manual_seed(len(name))
        torch.save(DigitsCNN(width=4).state_dict(), tmp_path / f"{name}.pt")
    checkpoints = [f"--checkpoint={name}={tmp_path / name}.pt" for name in ("PGD-AT", "other")]
    run("theory_report", *checkpoints, "--images", 4, "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["models"]) == {"PGD-AT", "other"}
    for measured in report["models"].values():
        assert measured["hessian_is_vacuous"] is True
        assert measured["steepest"] <= measured["lipschitz_bound"]
        assert 0 < measured["share_of_step"] <= 1
        assert set(measured["residual"]) == {"layer1", "layer2", "layer3", "linear"}
        assert max(measured["largest_residual"]) >= max(measured["residual"]["linear"])
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "other: the largest residual is" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gaussian_report_finds_the_exponent(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run("gaussian_model", "--runs", 5, "--out", tmp_path, DIMENSIONS=(100, 1_000, 3_000), COPIES_AT=1_000)
    result = json.loads((tmp_path / "gaussian_model.json").read_text())
    assert result["slope"] == pytest.approx(0.49, abs=0.08)
    assert result["gap_limit"] == pytest.approx(0.9973, abs=1e-4)
    assert result["copies"][-1]["simulated"] > 0.9
    assert (tmp_path / "gaussian_model.png").stat().st_size > 10_000
    assert "fitted exponent" in capsys.readouterr().out
