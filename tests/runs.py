"""Real processes of `perceptual-at`, and what their runs leave behind, for the tests that start them."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perceptual_at.checkpoints import read_weights, weights_checksum

ROOT = Path(__file__).parent.parent


class Runner:
    """The processes of train_runner.py."""

    def __init__(self, folder):
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ROOT / "tests/train_runner.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, argv, **order):
        self.log.unlink(missing_ok=True)
        order = {"argv": [str(word) for word in argv], "log": str(self.log), **order}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())
        return self.pids

    def ended(self):
        """Whether the answer to the last order is there."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def statuses(self, patience=600):
        """How the processes of the last order ended; they are killed if they do not."""
        if not select.select([self.process.stdout], [], [], patience)[0]:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self.process.stdout.readline()
            pytest.fail(f"the run has not ended in {patience} s: {self.log.read_text()}")
        return json.loads(self.process.stdout.readline())

    def run(self, argv, **order):
        """Run to the end; gives what was printed."""
        self.start(argv, **order)
        statuses = self.statuses()
        printed = self.log.read_text()
        assert not any(statuses), printed
        return printed

    def refused(self, argv, **order):
        """Run to a message; gives it."""
        self.start(argv, **order)
        statuses = self.statuses()
        printed = self.log.read_text()
        assert any(os.waitstatus_to_exitcode(status) == 1 for status in statuses), printed
        assert "Traceback" not in printed
        return printed


def started(tmp_path_factory):
    """A runner, which ends with the tests that use it; to be made a fixture."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.process.stdin.close()
    runner.process.wait(timeout=120)
    runner.process.stdout.close()


def remains(out):
    """What a run has left, without times: weights, log, result, and all of the last state."""
    from perceptual_at.commands.options.settings import FREE

    result = json.loads((out / "result.json").read_text())
    state = sorted((out / "states").glob("step-*"))[-1]
    facts = json.loads((state / "run.json").read_text())
    whole = state / "optimizer.bin"  # absent where every process keeps its part
    optimizer = torch.load(whole, weights_only=True) if whole.exists() else {"state": {}, "param_groups": [{"lr": 0}]}
    return {
        "final": weights_checksum(read_weights(out / "final.safetensors")),
        "best": weights_checksum(read_weights(out / "best.safetensors")),
        "log": [without_times(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()],
        "result": {name: result[name] for name in ("best", "final", "selected_on", "images")},
        "settings": {name: value for name, value in result["settings"].items() if name not in FREE},
        "state": (state.name, facts["epoch"], facts["batch"], [without_times(entry) for entry in facts["log"]]),
        "files": {
            file.name: file.read_bytes()  # that of the best weights has two texts in no fixed order
            for file in state.glob("*.safetensors")
            if file.name != "best.safetensors"
        },
        "optimizer": [value["momentum_buffer"].tolist() for value in optimizer["state"].values()],
        "rate": optimizer["param_groups"][0]["lr"],
    }


def without_times(entry):
    timed = ("seconds", "epoch_seconds", "remaining_seconds", "images_per_second")
    return {name: value for name, value in entry.items() if name not in timed}


def assert_same(out, reference):
    found, wanted = remains(out), remains(reference)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def newest(out):
    """After how many steps the last state was saved."""
    return max((int(state.name[-9:]) for state in (out / "states").glob("step-*")), default=0)
