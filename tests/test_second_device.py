"""Attacks, objectives, evaluation and training on a device that is not the CPU, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import second_device

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(second_device.missing() is not None, reason=f"{second_device.missing()} to compile a device with")
def test_what_holds_on_any_device():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/second_device/contract.py",
    ]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
