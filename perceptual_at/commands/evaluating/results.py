"""What runs and evaluations have left behind, read back: result.json and report.json."""

import json
import math
from pathlib import Path
from typing import Any

import perceptual_at as pat


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run.

    Raises:
        ValueError: if there is none, or it is damaged or of an older form.
    """
    path = folder / "result.json"
    if not folder.is_dir():
        raise ValueError(f"there is no folder `{folder}`.")
    if not path.is_file():
        going = "its run is not finished; go on with --resume" if (folder / "states").is_dir() else "no run wrote it"
        raise ValueError(f"`{folder}` holds no result.json: {going}.")
    again = "`perceptual-at train ... --resume` writes it again."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is damaged ({error}); {again}") from error
    if not isinstance(record, dict):
        raise ValueError(f"`{path}` is damaged (it holds {type(record).__name__}); {again}")
    if missing := [name for name in ("settings", "shape", "classes", "best", "final") if name not in record]:
        raise ValueError(f"`{path}` lacks {', '.join(missing)}; {again}")
    shape = record["shape"]
    fitting = {
        "settings": isinstance(record["settings"], dict),
        "shape": isinstance(shape, list) and len(shape) == 3 and all(isinstance(side, int) for side in shape),
        "classes": isinstance(record["classes"], int),
        **{name: isinstance(record[name], dict) and _are_scores(record[name].get("test"))
           for name in ("best", "final")},
    }  # fmt: skip
    if wrong := [name for name, fits in fitting.items() if not fits]:
        raise ValueError(f"`{path}` is damaged in {', '.join(wrong)}; {again}")
    return record


def _are_scores(test: Any) -> bool:
    """Whether something is the scores of a test: finite numbers by name, those of clean images among them."""
    return isinstance(test, dict) and {"n", "clean"} <= test.keys() and all(
        isinstance(score, (int, float)) and math.isfinite(score) for score in test.values()
    )  # fmt: skip


def report_at(path: Path) -> pat.Evaluation:
    """A report.json, or the one in a folder.

    Raises:
        ValueError: if it is none.
    """
    found = path / "report.json" if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"there is no report `{found}`; `perceptual-at evaluate` writes them.")
    try:
        return pat.Evaluation.from_json(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{found}` is no report of an evaluation ({error}).") from error
