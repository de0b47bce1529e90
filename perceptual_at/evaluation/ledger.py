"""What an evaluation knows of each sample: tensors that grow, one entry per sample."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CLEAN = "clean"
INSPECTED = "inspected"


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One finished batch of an attack, or of the clean inputs; `(b,)` each, on the CPU."""

    name: str
    """Of the attack, `"clean"`, or `"inspected"` for what was looked up about survivors."""
    index: tuple[int, ...]
    scores: Tensor
    """`(b, repeats)`, boolean or in [0, 1]."""
    gradients: Tensor | None = None
    forwards: Tensor | None = None
    flags: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Boolean facts by name: `"undefined"`, `"tied"`, `"unmoved"`, `"outside"`, `"unconfirmed"`, ..."""
    part: Tensor | None = None
    """Which attack of an ensemble broke the sample, -1 for none."""
    seconds: float = 0.0
    farthest: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How far the farthest of the adversarial inputs is from its clean one, by norm."""
    warnings: tuple[str, ...] = ()
    protocol: Mapping[str, Any] | None = None
    samples: tuple[str, ...] = ()
    """Fingerprints of the samples; of clean entries only."""
    labels: Tensor | None = None
    """Classes; of clean entries only."""
    witness: Tensor | None = None
    """Two numbers `(b, 2)` that tell the model's clean outputs from another's; of clean entries only."""

    def take(self, rows: Sequence[int]) -> "Entry":
        """Some of the samples."""
        places = torch.tensor(rows, device="cpu")
        tensors: dict[str, Any] = {
            name: value[places] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(
            self,
            index=tuple(self.index[row] for row in rows),
            samples=tuple(self.samples[row] for row in rows) if self.samples else (),
            flags={name: mask[places] for name, mask in self.flags.items()},
            **tensors,
        )


class Growing:
    """A tensor with an entry per place, which grows; entries that were never put are 0."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def put(self, places: Tensor, values: Tensor) -> None:
        """Set the entries of some places."""
        held = values.new_zeros((0, *values.shape[1:])) if self.values is None else self.values
        dtype = torch.promote_types(held.dtype, values.dtype)  # scores may have been boolean in some batches only
        held, values = held.to(dtype), values.to(dtype)
        needed = int(places.max()) + 1 if len(places) else 0
        if needed > len(held):  # at least doubled, so that all growth together costs as much as the last
            room = held.new_zeros((max(needed, 2 * len(held)), *held.shape[1:]))
            room[: len(held)] = held
            held = room
        held[places] = values
        self.values = held

    def get(self, places: Tensor) -> Tensor | None:
        """The entries of some places; None if nothing was ever put."""
        if self.values is None:
            return None
        inside = places < len(self.values)
        if bool(inside.all()):
            return self.values[places]
        found = self.values.new_zeros((len(places), *self.values.shape[1:]))
        found[inside] = self.values[places[inside]]
        return found


class Column:
    """What is known of one attack, or of the clean inputs. Entries are addressed by a sample's place in the ledger."""

    def __init__(self) -> None:
        self.values: dict[str, Growing] = {}
        self.seconds = 0.0
        self.farthest: dict[str, float] = {}
        self.warnings: dict[str, None] = {}
        self.protocol: Mapping[str, Any] | None = None

    def add(self, places: Tensor, entry: Entry) -> None:
        """Take in a batch."""
        given = {"known": torch.ones(len(places), dtype=torch.bool, device="cpu"), **entry.flags} | {
            name: getattr(entry, name) for name in ("scores", "gradients", "forwards", "part", "labels", "witness")
        }
        for name, values in given.items():
            if values is not None:
                self.values.setdefault(name, Growing()).put(places, values)
        self.seconds += entry.seconds
        self.farthest |= {norm: max(size, self.farthest.get(norm, 0.0)) for norm, size in entry.farthest.items()}
        self.warnings |= dict.fromkeys(entry.warnings)
        self.protocol = entry.protocol or self.protocol

    def get(self, name: str, places: Tensor) -> Tensor | None:
        """Values of some samples, 0 where there are none; None if no batch had any."""
        return self.values[name].get(places) if name in self.values else None

    def flag(self, name: str, places: Tensor) -> Tensor:
        """A fact about some samples, false where nothing says so; `"known"` for whether they have a verdict."""
        found = self.get(name, places)
        return torch.zeros(len(places), dtype=torch.bool, device="cpu") if found is None else found.bool()


class Ledger:
    """Columns by name, and the place of each sample in them."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.place: dict[int, int] = {}
        self.samples: dict[int, str] = {}

    def column(self, name: str) -> Column:
        """What is known of an attack, or of `"clean"`."""
        return self.columns.setdefault(name, Column())

    def places(self, index: Sequence[int]) -> Tensor:
        """Places of samples, new ones for those that were never seen."""
        return torch.tensor(
            [self.place.setdefault(sample, len(self.place)) for sample in index], dtype=torch.long, device="cpu"
        )

    def add(self, entry: Entry) -> None:
        """Take in a finished batch."""
        self.column(entry.name).add(self.places(entry.index), entry)
        self.samples.update(zip(entry.index, entry.samples, strict=False))


def worse(a: Tensor, b: Tensor) -> Tensor:
    """The worse of two verdicts of each sample: right and wrong stay so, scores are compared as numbers."""
    return a & b if a.dtype == b.dtype == torch.bool else torch.minimum(a.double(), b.double())
