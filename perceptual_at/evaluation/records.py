"""Verdicts per sample, kept in memory and, line by line, in a file that survives a kill."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CLEAN = "clean"
_FORMAT = "perceptual_at evaluation record, version 1"


@dataclasses.dataclass
class Column:
    """What is known of one attack, or of the clean inputs."""

    right: dict[int, str] = dataclasses.field(default_factory=dict)
    """By the sample's index, one `0` or `1` per repeat."""
    gradients: dict[int, int] = dataclasses.field(default_factory=dict)
    forwards: dict[int, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    undefined: int = 0
    """Logits with NaN at the points the attack returned."""
    unconfirmed: int = 0
    """Successes that the attack reported and the model did not confirm."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    parts: Counter[str] = dataclasses.field(default_factory=Counter)
    """Samples that each attack of an ensemble broke."""
    protocol: Mapping[str, Any] | None = None


class Record:
    """The verdicts of one evaluation, kept per attack and sample.

    With a path, every finished batch of an attack is one line of JSON, written and synchronised before the next one
    starts. A line that a kill tore apart is dropped when the file is opened again; the first line names model and
    settings, and a file of others is refused.

    Args:
        path: file to continue or to start; None keeps the verdicts in memory only.
        model: fingerprint of the model.
        settings: what else must be the same to go on: texts by name.
        versions: of the software, for information.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if it is no such record, is damaged, or belongs to another model or other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        model: str,
        settings: Mapping[str, str],
        versions: Mapping[str, str],
    ) -> None:
        self.columns: dict[str, Column] = {}
        self.data: dict[int, str] = {}
        self.labels: dict[int, int] = {}
        self.begun_with: Mapping[str, str] = versions
        self.file: int | None = None
        self.path = "" if path is None else os.fspath(path)
        if path is None:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._resume({"format": _FORMAT, "model": model, "settings": settings, "versions": versions})
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def lacking(self, name: str, index: Sequence[int]) -> list[int]:
        """Places in `index` of the samples without a verdict."""
        known = self.column(name).right
        return [place for place, sample in enumerate(index) if sample not in known]

    def column(self, name: str) -> Column:
        """What is known of an attack, or of `"clean"`."""
        return self.columns.setdefault(name, Column())

    def check_data(self, index: Sequence[int], fingerprints: Sequence[str]) -> None:
        """Refuse samples that are not the ones recorded under their index."""
        for sample, found in zip(index, fingerprints, strict=True):
            if self.data.get(sample, found) != found:
                raise ValueError(
                    f"evaluate: `record` {self.path!r} belongs to other data: sample {sample} was "
                    f"{self.data[sample]} and is {found}. Give the loader's samples their index, or start another "
                    "file."
                )

    def add(self, name: str, index: Sequence[int], right: Sequence[str], **more: Any) -> None:
        """Take in the verdicts of a finished batch, and write them."""
        line = {"name": name, "index": list(index), "right": list(right), **more}
        self._take(line)
        self._write(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        column, index = self.column(line["name"]), line["index"]
        column.right.update(zip(index, line["right"], strict=True))
        if line["name"] == CLEAN:
            self.data.update(zip(index, line["data"], strict=True))
            self.labels.update(zip(index, line["labels"], strict=True))
            return
        for queries in ("gradients", "forwards"):
            if line[queries] is not None:
                getattr(column, queries).update(zip(index, line[queries], strict=True))
        column.seconds += line["seconds"]
        column.undefined += line["undefined"]
        column.unconfirmed += line["unconfirmed"]
        column.warnings += [text for text in line["warnings"] if text not in column.warnings]
        column.parts.update(line["parts"])
        column.protocol = line["protocol"] or column.protocol

    def _resume(self, header: Mapping[str, Any]) -> None:
        """Take in what the file holds, or start it."""
        assert self.file is not None
        lines, end = _whole_lines(self.path, _read(self.file))
        if lines:
            _compare(self.path, lines[0], header)
            self.begun_with = lines[0]["versions"]
        os.ftruncate(self.file, end)  # what follows was torn
        for line in lines[1:]:
            self._take(line)
        if not lines:
            self._write(header)
            _synchronise_folder(Path(self.path).parent)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        text = memoryview((json.dumps(line, separators=(",", ":")) + "\n").encode())
        while text:
            text = text[os.write(self.file, text) :]
        os.fsync(self.file)


def _read(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 2**20):
        parts.append(part)
    return b"".join(parts)


def _whole_lines(path: str, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file and where the last whole one ends."""
    start = f'{{"format":"{_FORMAT}"'.encode()
    if not content.startswith(start[: len(content)]):  # a file of someone else's is left alone
        raise ValueError(f"evaluate: `record` {path!r} is no record of an evaluation of this version.")
    *complete, torn = content.split(b"\n")
    lines: list[dict[str, Any]] = []
    try:
        lines.extend(map(json.loads, complete))
    except ValueError as error:
        raise ValueError(f"evaluate: `record` {path!r} is damaged in line {len(lines) + 1}.") from error
    return lines, len(content) - len(torn)


def _compare(path: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    was, now = ({"model": header["model"], **header["settings"]} for header in (recorded, wanted))
    differing = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if differing:
        found = "; ".join(f"{name} was {was.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in differing)
        raise ValueError(f"evaluate: `record` {path!r} belongs to another evaluation: {found}. Start another file.")


def _synchronise_folder(folder: Path) -> None:
    """Make a new file's name last, where folders can be synchronised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
