"""Everything that wants an accelerator, in one go of at most ten minutes; every step has a limit and leaves a record.

    python benchmarks/device_check.py                # on the accelerator that torch finds
    python benchmarks/device_check.py --miniature    # on the tests' stand-in device, to see that the script works

The steps: the part of the test suite that runs on any device, the lanes beside the plain attack, compiled ones too;
training steps with CUDA graphs and compiled, and AutoAttack; and with `--root` one run of the evidence at width 64. A
step that fails or runs out of time does not end the others. What each did is in `device_check.json`, the records of
those that have one beside it.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import ROOT, provenance, write


class Part(NamedTuple):
    """A step of the check."""

    command: tuple[str, ...]
    """Words after the interpreter."""
    seconds: int
    """How long it may take."""


def parts(device: str, out: Path, *, miniature: bool, root: Path | None) -> dict[str, Part]:
    """The steps in their order; what tells most comes first. Their limits add up to ten minutes."""
    size = ("--quick", "--rounds", "1") if miniature else ("--rounds", "3", "--compile")

    def script(name: str, *words: str, seconds: int) -> Part:
        record = ("--device", device, *size, "--out", str(out / f"{name}_on_{device}.json"))
        return Part((__file__, "--run", name, *words, *record), seconds)

    steps = {
        "tests": Part(
            ("-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/second_device/contract.py"), 150
        ),
        "lanes": script("attack_passes", *(() if miniature else ("--settings", "64x128")), seconds=100),
        "training": script("gpu_training", seconds=200),
    }
    if root is not None:
        where = ("--quick",) if miniature else ("--set", "width=64", "--set", "epochs_all=1")
        words = (
            "run",
            "--root",
            str(root),
            "--only",
            "all/pgd_at/0",
            *where,
            "--work",
            str(out / "work"),
            "--record",
            str(out / f"evidence_on_{device}.json"),
        )
        steps["evidence"] = Part((__file__, "--run", "cifar10_evidence", *words, "--device", device), 150)  # goes on
    return steps


def done(part: Part, device: str) -> dict[str, Any]:
    """What became of a step: how it ended, how long it took, its last lines."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PERCEPTUAL_AT_DEVICE": device}
    try:
        run = subprocess.run(
            [sys.executable, *part.command], cwd=ROOT, env=environment, timeout=part.seconds, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        ended, said = run.returncode, run.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = "out of time"
    took = round(time.perf_counter() - began, 1)
    return {"ended": ended, "seconds": took, "limit_s": part.seconds, "last_lines": said.strip().splitlines()[-12:]}


def run_script(name: str, words: Sequence[str]) -> None:
    """A benchmark in this process, on the stand-in device where that is asked for."""
    sys.path.insert(0, str(ROOT))
    if "stand_in" in words:
        importlib.import_module("tests.second_device").load()
    importlib.import_module(name).main(words)


def accelerator() -> str:
    """The device that torch finds; the stand-in is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        raise SystemExit("device_check: no accelerator here; --miniature runs on the tests' stand-in device.")
    return str(found.type)


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--run"]:
        run_script(words[1], words[2:])
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--miniature", action="store_true", help="on the stand-in device of the tests")
    options.add_argument("--root", type=Path, help="CIFAR-10 as folders, for the run of the evidence")
    options.add_argument("--only", nargs="+", help="some of the steps")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the records")
    chosen = options.parse_args(words)
    device = "stand_in" if chosen.miniature else accelerator()
    chosen.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, part in parts(device, chosen.out, miniature=chosen.miniature, root=chosen.root).items():
        if chosen.only and name not in chosen.only:
            continue
        found[name] = done(part, device)
        print(name, found[name]["ended"], found[name]["seconds"], "s", flush=True)
        record = {"device": device, "miniature": chosen.miniature, **provenance("cpu"), "steps": found}
        write(chosen.out / "device_check.json", record)  # after every step: the machine may go


if __name__ == "__main__":
    main()
