"""The record: one entry per run, listed from its start, never lost; several processes write it."""

import base64
import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evidence.design import Job
from perceptual_at._files import written_whole

Entry = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """What is on record."""
    if not path.exists():
        return {"runs": []}
    return json.loads(path.read_text(encoding="utf-8"))


def change(path: Path, lock: Path, how: Callable[[dict[str, Any]], None]) -> None:
    """Change the record, alone and all at once."""
    with locked(lock):
        record = read(path)
        how(record)
        with written_whole(path) as beside:
            beside.write_text(dumped(record), encoding="utf-8")


def dumped(record: dict[str, Any]) -> str:
    """JSON with a line per run, so that a run adds one line to a file's history."""
    head = {name: value for name, value in record.items() if name != "runs"}
    lines = ",\n".join(json.dumps(entry) for entry in record["runs"])
    return json.dumps({**head, "runs": []})[:-2] + "\n" + lines + "\n]}\n"


def entry_of(record: dict[str, Any], job: Job) -> Entry | None:
    """The entry of a run, if it was ever started."""
    return next((entry for entry in record["runs"] if Job(*(entry[key] for key in Job._fields)) == job), None)


def put(record: dict[str, Any], job: Job, **found: Any) -> None:
    """Add to the entry of a run, which is made if there is none; what it holds under other names stays."""
    entry = entry_of(record, job)
    if entry is None:
        entry = job._asdict()
        record["runs"].append(entry)
    entry.update(found)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else is inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do a piece of work. The claim ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def packed(verdicts: Sequence[bool]) -> str:
    """Verdicts as base64 of their bits, the first one highest, with a 1 before it."""
    number = int("1" + "".join("01"[bool(verdict)] for verdict in verdicts), 2)
    return base64.b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).decode()


def unpacked(text: str) -> list[bool]:
    """The verdicts again."""
    return [digit == "1" for digit in f"{int.from_bytes(base64.b64decode(text), 'big'):b}"[1:]]
