"""Misspelt and mistyped options are errors for a type checker, right ones are not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typing"
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--no-error-summary"],
    "basedpyright": [
        str(Path(sys.executable).with_name("basedpyright")),
        "--level",
        "error",
        "--pythonpath",
        sys.executable,
    ],
}
every = pytest.mark.parametrize("checker", CHECKERS)


def lines_with_errors(checker, name):
    command = CHECKERS[checker]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{checker} is not installed")
    done = subprocess.run(
        [*command, str(FOLDER / name)], capture_output=True, text=True, check=False, cwd=FOLDER.parent
    )
    found = re.findall(rf"{name}:(\d+)(?::\d+)?(?: -)?:? error", done.stdout)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(line) for line in found}


@pytest.mark.slow
@every
def test_every_wrong_call_is_an_error(checker):
    text = (FOLDER / "wrong_calls.py").read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(text, start=1) if line.endswith("# wrong")}
    assert len(wrong) > 20
    assert lines_with_errors(checker, "wrong_calls.py") == wrong


@pytest.mark.slow
@every
def test_no_right_call_is_an_error(checker):
    assert lines_with_errors(checker, "right_calls.py") == set()
