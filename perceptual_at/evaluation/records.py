"""Verdicts in files: those of an evaluation that may be killed, line by line, and the finished report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from perceptual_at._files import check_file, written_whole
from perceptual_at.evaluation.ledger import CLEAN, Entry, Ledger

_FORMAT = "perceptual_at evaluation record, version 2"
_REPORT = "perceptual_at evaluation, version 2"
_OLD_REPORT = "perceptual_at evaluation, version 1"
_ANY_FORMAT = b'{"format":"perceptual_at evaluation record, version '


class Record:
    """A ledger of verdicts, with a file or without.

    With a path, every finished batch of an attack is one line of JSON, written and synchronised before the next one
    starts. A line that a kill tore apart is dropped when the file is opened again; the first line names model and
    settings, and a file of others is refused. Clean lines hold two numbers of each sample's outputs, by which a model
    is known even where its settings look the same.

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
        self.ledger = Ledger()
        self.begun_with: Mapping[str, str] = versions
        self.file: int | None = None
        self.path = "" if path is None else os.fspath(path)
        if path is None:
            return
        check_file("evaluate", "record", path)
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

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self.file is not None

    def check_data(self, index: Sequence[int], fingerprints: Sequence[str]) -> None:
        """Refuse samples that are not the ones recorded under their index."""
        samples = self.ledger.samples
        for sample, found in zip(index, fingerprints, strict=True):
            if samples.get(sample, found) != found:
                raise ValueError(
                    f"evaluate: `record` {self.path!r} belongs to other data: sample {sample} was "
                    f"{samples[sample]} and is {found}. Give the loader's samples their index, or start another "
                    "file."
                )

    def check_witness(self, name: str, index: Sequence[int], found: Tensor, tolerance: Tensor) -> None:
        """Refuse a model whose outputs are not those that were recorded, beyond rounding."""
        places = self.ledger.places(index)
        held = self.ledger.column(name).get("witness", places)
        if held is None:
            return
        differs = ((held - found).abs() > tolerance) | (held.isnan() != found.isnan())
        other = differs.any(dim=1) & self.ledger.column(name).flag("known", places)
        if bool(other.any()):
            sample = index[int(other.to(torch.uint8).argmax())]
            raise ValueError(
                f"evaluate: `record` {self.path!r} belongs to another model: its outputs or gradients differ from "
                f"those recorded for {int(other.sum())} of {len(index)} samples, such as {sample}. Start another file."
            )

    def add(self, entry: Entry) -> None:
        """Take in a finished batch, and write it."""
        self.ledger.add(entry)
        self._write(_to_line(entry))

    def _resume(self, header: Mapping[str, Any]) -> None:
        """Take in what the file holds, or start it."""
        assert self.file is not None
        lines, end = _whole_lines(self.path, _read(self.file))
        if lines:
            _compare(self.path, lines[0], header)
            self.begun_with = lines[0]["versions"]
        os.ftruncate(self.file, end)  # what follows was torn
        for number, line in enumerate(lines[1:], start=2):
            self.ledger.add(_from_line(self.path, number, line))
        if not lines:
            self._write(header)
            _synchronise_folder(Path(self.path).parent)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        text = memoryview((json.dumps(line, separators=(",", ":")) + "\n").encode())
        try:
            while text:
                text = text[os.write(self.file, text) :]
            os.fsync(self.file)
        except OSError as error:  # which does not know the name
            raise OSError(error.errno, f"evaluate: `record`: {error.strerror}", self.path) from error


def write_report(path: str | os.PathLike[str], derived: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Write the fields of an evaluation, and numbers that follow from them for who reads without this library."""
    check_file("Evaluation.to_json", "path", path)
    own = dict(fields)
    for name in ("robust", "suspicious", "repeated"):
        own[name] = {key: _plain(values) for key, values in own[name].items()}
    own["correct"] = _plain(own["correct"])
    for name in ("labels", "index"):
        own[name] = None if own[name] is None else own[name].tolist()
    verdicts = {"clean": own.pop("correct"), **own.pop("robust")}
    content = {"format": _REPORT, **derived, "verdicts": verdicts, **own}
    try:
        text = json.dumps(content, indent=1)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Evaluation.to_json: `attacks` and `provenance` must hold what JSON can: {error}.") from error
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of an evaluation that `write_report` wrote; masks and scores are tensors.

    Raises:
        ValueError: if the file is of another kind, or damaged.
    """
    check_file("Evaluation.from_json", "path", path)
    place = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Evaluation.from_json: {place!r} is no JSON file: {error}.") from error
    if not isinstance(content, dict) or content.get("format") not in (_REPORT, _OLD_REPORT):
        raise ValueError(f"Evaluation.from_json: {place!r} was not written by Evaluation.to_json.")
    try:
        verdicts = {name: _from_plain(values) for name, values in content["verdicts"].items()}
        fields = {"correct": verdicts.pop("clean"), "robust": verdicts}
        for name in ("suspicious", "repeated"):
            fields[name] = {key: _from_plain(values) for key, values in content.get(name, {}).items()}
        for name in ("labels", "index"):
            fields[name] = (
                None if content[name] is None else torch.tensor(content[name], dtype=torch.long, device="cpu")
            )
        names = ("classes", "costs", "cascade", "warnings", "checks", "attacks", "provenance")
        return fields | {name: content[name] for name in names}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"Evaluation.from_json: {place!r} is damaged: {error!r}.") from error


def _to_line(entry: Entry) -> dict[str, Any]:
    """An entry as JSON; truth values are digits."""
    line: dict[str, Any] = {"name": entry.name, "index": entry.index, "scores": _plain(entry.scores.T)}
    for name in ("gradients", "forwards", "part", "labels", "witness"):
        if (values := getattr(entry, name)) is not None:
            line[name] = _plain(values)
    if entry.flags:
        line["flags"] = {name: _plain(values) for name, values in entry.flags.items()}
    for name in ("seconds", "farthest", "warnings", "protocol", "samples"):
        if value := getattr(entry, name):
            line[name] = value
    return line


def _from_line(path: str, number: int, line: Any) -> Entry:
    try:
        return _entry(line)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise ValueError(f"evaluate: `record` {path!r} is damaged in line {number}.") from error


def _entry(line: Mapping[str, Any]) -> Entry:
    tensors: dict[str, Any] = {
        name: torch.tensor(line[name], dtype=torch.float64 if name == "witness" else torch.int64, device="cpu")
        for name in ("gradients", "forwards", "part", "labels", "witness")
        if name in line
    }
    more: dict[str, Any] = {name: line[name] for name in ("seconds", "farthest", "protocol") if name in line}
    entry = Entry(
        line["name"], tuple(line["index"]), _from_plain(line["scores"]).T,
        flags={name: _from_plain(values) for name, values in line.get("flags", {}).items()},
        warnings=tuple(line.get("warnings", ())), samples=tuple(line.get("samples", ())), **tensors, **more,
    )  # fmt: skip
    sizes = {len(one) for one in (entry.scores, *tensors.values(), *entry.flags.values())}
    if sizes != {len(entry.index)} or len(entry.samples) != (len(entry.index) if entry.name == CLEAN else 0):
        raise ValueError
    return entry


def _plain(values: Tensor) -> Any:
    if values.dtype != torch.bool:
        return values.tolist()
    if values.ndim == 1:
        return "".join("01"[value] for value in values.tolist())
    return [_plain(row) for row in values]


def _from_plain(values: Any) -> Tensor:
    if isinstance(values, str):
        return torch.tensor([digit == "1" for digit in values], dtype=torch.bool, device="cpu")
    if values and isinstance(values[0], str):
        return torch.stack([_from_plain(row) for row in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


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
        if content.startswith(_ANY_FORMAT):
            version = content[len(_ANY_FORMAT) :].partition(b'"')[0].decode(errors="replace")
            raise ValueError(
                f"evaluate: `record` {path!r} is of version {version} of the format, and this is version 2, which "
                "knows models better. Finish it with the release that began it, or start another file."
            )
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
