"""State that survives a kill at any moment: written beside, checked, moved into place; the last two are kept."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
KEPT = 2


class NoWholeState(RuntimeError):
    """There are states, but none of them is whole."""


def path_of(folder: Path, step: int) -> Path:
    """Where the state after that many steps lies."""
    return folder / f"step-{step:09d}"


@contextlib.contextmanager
def written(folder: Path, step: int, *, leader: bool = True, meet: Any = lambda: None) -> Iterator[Path]:
    """A folder to write one state into; it gets its name when all of it is on the disk.

    Several processes enter together: `leader` is true in one of them, `meet` waits for all. What was saved
    before stays until then, whatever goes wrong.
    """
    final = path_of(folder, step)
    beside = folder / f".{final.name}"
    if leader:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    meet()
    try:
        yield beside
        meet()
        if leader:
            _seal(beside)
            if final.exists():  # a damaged one: whole ones are not written twice
                shutil.rmtree(final)
            beside.rename(final)
            _sync(folder)
    except BaseException:
        if leader:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if leader:
        for old in _named(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    meet()


def newest_whole(folder: Path) -> Path | None:
    """The newest state that is exactly as it was written; None where none was ever finished."""
    for beside in _named(folder, "."):
        shutil.rmtree(beside, ignore_errors=True)
    found = _named(folder)[::-1]
    damaged = []
    for state in found:
        problem = _problem(state)
        if problem is None:
            return state
        damaged.append(f"{state.name}: {problem}")
    if damaged:
        raise NoWholeState(
            f"no state in `{folder}` is whole ({'; '.join(damaged)}). Restore one of them from a copy, or remove the "
            "folder to start again."
        )
    return None


def newest_name(folder: Path) -> str | None:
    """The name of the newest state that has one, whole or not."""
    found = _named(folder)
    return found[-1].name if found else None


def _named(folder: Path, before: str = "") -> list[Path]:
    """Folders whose names this module writes, in the order of their steps; others are not touched."""
    pattern = re.compile(re.escape(before) + r"step-\d{9}")
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir())


def _seal(state: Path) -> None:
    """Write down what the state consists of, with everything on the disk."""
    sums = {file.name: _sha256(file) for file in sorted(state.iterdir())}
    manifest = state / MANIFEST
    manifest.write_text(json.dumps(sums, indent=1))
    for file in (*(state / name for name in sums), manifest, state):
        _sync(file)


def _problem(state: Path) -> str | None:
    """What is wrong with a state, if anything."""
    try:
        sums = json.loads((state / MANIFEST).read_text())
        if not sums:
            return f"`{MANIFEST}` names no file"
        for name, expected in sums.items():
            if _sha256(state / name) != expected:
                return f"`{name}` was changed or cut off"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and keeps their names itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
