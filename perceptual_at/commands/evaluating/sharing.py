"""An evaluation that several processes share: each has a record of its own samples, and the records become one."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from perceptual_at.checkpoints import written_whole


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int
    ranks: int

    def meet(self) -> None:
        """Wait until all are here."""
        if self.ranks > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def leader_first(self) -> contextlib.AbstractContextManager[Any]:
        """Let the leading process go before the others, which find what it has fetched."""
        if self.ranks == 1:
            return contextlib.nullcontext()
        from accelerate import PartialState

        first: contextlib.AbstractContextManager[Any] = PartialState().main_process_first()
        return first


@contextlib.contextmanager
def joined_processes(*, cpu: bool) -> Iterator[Processes]:
    """This process among those that `torchrun` started, if there are others."""
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if processes.ranks == 1:
        yield processes
        return
    from accelerate import PartialState

    state = PartialState(cpu=cpu or not torch.accelerator.is_available())
    yield processes
    state.destroy_process_group()


def name_of(*what: Any) -> str:
    """A name for the record of an evaluation that another one in the same folder does not have."""
    return f"record-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}.jsonl"


def part_path(whole: Path, processes: Processes) -> Path:
    """The record of this process, which begins as a copy of all that is known; all processes enter together."""
    if processes.rank == 0:
        join(whole)
    if processes.ranks == 1:
        return whole
    processes.meet()
    part = whole.with_name(f"{whole.stem}.part-{processes.rank + 1}-of-{processes.ranks}.jsonl")
    if whole.exists():
        with written_whole(part) as beside:
            beside.write_bytes(whole.read_bytes())
    processes.meet()
    return part


def join(whole: Path) -> None:
    """Take the records of all processes into one, also those of processes that were killed, and remove them.

    A last line that was torn is left out; one that several records hold counts once.

    Raises:
        ValueError: if a record belongs to another model or other settings.
    """
    parts = sorted(whole.parent.glob(f"{whole.stem}.part-*.jsonl"))
    if not parts:
        return
    head, lines = b"", dict[bytes, None]()
    for path in (whole, *parts):
        first, *rest = (path.read_bytes() if path.exists() else b"").split(b"\n")[:-1] or [b""]
        if first and head and _about(first) != _about(head):
            raise ValueError(f"`{path}` belongs to another evaluation than `{whole}`; remove one of them.")
        head = head or first
        lines |= dict.fromkeys(rest)
    if head:
        with written_whole(whole) as beside:
            beside.write_bytes(b"".join(line + b"\n" for line in (head, *lines)))
    for part in parts:
        part.unlink()


def _about(line: bytes) -> Any:
    """What the first line of a record says of model and settings; its versions may differ."""
    try:
        held = json.loads(line)
        return held["model"], held["settings"]
    except (ValueError, KeyError, TypeError):
        return line
