"""The verdicts of an evaluation as batches come: who is judged when, by which attack, and what is kept of it."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceptual_at._random import undisturbed
from perceptual_at._rounding import accumulator
from perceptual_at._shapes import places
from perceptual_at.evaluation.checks import outputs_differ
from perceptual_at.evaluation.fingerprints import probe, witness
from perceptual_at.evaluation.ledger import CLEAN, INSPECTED, Entry, Growing, worse
from perceptual_at.evaluation.plans import Plan, first_threat
from perceptual_at.evaluation.records import Record
from perceptual_at.metrics import Judged, Score, judge
from perceptual_at.victims import Model, asked, first_gradients
from perceptual_at.victims.inspection import TINY, gives_probabilities, lost_gradients
from perceptual_at.victims.terms import FAILURES, explain_rows

PROBE = "probe"
"""Column of the samples by which a model is known again."""
_PROBED = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Some samples."""

    x: Tensor
    labels: Tensor
    index: Tensor
    """What identifies them, on the CPU."""
    places: Tensor
    """Where they stand in the ledger, on the CPU."""

    def take(self, rows: Tensor) -> "Batch":
        """Some of them, by a mask or rows on the CPU."""
        if rows.dtype == torch.bool:
            if bool(rows.all()):
                return self
            rows = places(rows)
        there = rows.to(self.x.device)
        return Batch(self.x[there], self.labels[there], self.index[rows], self.places[rows])


class Queue:
    """Samples that wait until they fill a batch."""

    def __init__(self) -> None:
        self.waiting: list[Batch] = []

    def put(self, batch: Batch, size: int) -> Iterator[Batch]:
        """Add samples; gives the batches of `size` that are full, or those waiting that `batch` does not fit to."""
        if self.waiting and self._kind(self.waiting[0]) != self._kind(batch):
            yield from self.rest()
        self.waiting.append(batch)
        while sum(len(part.index) for part in self.waiting) >= size:
            whole = self._joined()
            self.waiting = (
                [whole.take(torch.arange(size, len(whole.index), device="cpu"))] if len(whole.index) > size else []
            )
            yield whole.take(torch.arange(size, device="cpu")) if self.waiting else whole

    def rest(self) -> Iterator[Batch]:
        """Those left."""
        if self.waiting:
            whole, self.waiting = self._joined(), []
            yield whole

    def _joined(self) -> Batch:
        if len(self.waiting) == 1:
            return self.waiting[0]
        names = ("x", "labels", "index", "places")
        return Batch(*(torch.cat([getattr(part, name) for part in self.waiting]) for name in names))

    @staticmethod
    def _kind(batch: Batch) -> tuple[Any, ...]:
        return batch.x.shape[1:], batch.x.dtype, batch.labels.shape[1:], batch.labels.dtype


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides the verdicts, beside model, data and attacks."""

    seed: int
    cascade: bool
    repeats: int
    score: Score | None

    def texts(self) -> dict[str, str]:
        """For the record and the report; the score, which may not be told apart, has its own."""
        return {"seed": str(self.seed), "cascade": str(self.cascade), "repeats": str(self.repeats)}


class Traits(NamedTuple):
    """What two passes over the first batch say about the model."""

    classes: int
    """How many; 0 where outputs are no logits of classes."""
    probabilities: bool
    difference: float
    """Largest difference of the two, 0 within rounding."""

    @classmethod
    def seen(cls, first: Any, second: Any, score: Score | None) -> "Traits":
        """Of the outputs of both passes."""
        difference = outputs_differ(first, second)
        if score is not None or first.ndim != 2:
            return cls(0, False, difference)
        return cls(first.shape[1], gives_probabilities(first), difference)


class Measurement:
    """The verdicts of the batches so far; those already on record are not asked for again."""

    def __init__(self, model: Model, fast: Model, plans: Sequence[Plan], known: Record, settings: Rules) -> None:
        self.model, self.fast, self.plans, self.known, self.settings = model, fast, plans, known, settings
        self.threat = first_threat(plans)
        self.traits: Traits | None = None
        self.repeats = settings.repeats
        self.size = 0
        self.order: list[int] = []
        self.seen: set[int] = set()
        self.queues = [Queue() for _ in (*plans, INSPECTED)]
        self.standing = Growing()  # scores in all points judged so far, one column per repeat
        self.clean = self.robust = 0.0  # sums of the clean scores and of the worst so far

    def number(self, index: Sequence[int], fingerprints: Sequence[str]) -> Tensor:
        """Note the samples of a batch, each of which may come once; gives their places."""
        twice = next((sample for sample in index if sample in self.seen), None)
        if twice is not None or len(set(index)) < len(index):
            raise ValueError(
                f"evaluate: `loader` gave {'an index' if twice is None else f'the index {twice}'} twice, and a sample "
                "counts once: the third entry of a batch must be the number of each sample in the data, and the "
                "sampler must not repeat any."
            )
        self.known.check_data(index, fingerprints)
        self.order.extend(index)
        self.seen.update(index)
        return self.known.ledger.places(index)

    def attack(self, batch: Batch) -> None:
        """Verdicts of the attacks for a batch that `judge_clean` has seen, as soon as their batches are full."""
        self.size = max(self.size, len(batch.index))
        scores = self._scores(CLEAN, batch.places)
        self.standing.put(batch.places, scores)
        sums = float(_worst(scores).sum())
        self.clean, self.robust = self.clean + sums, self.robust + sums
        self._give(0, batch.take(scores.any(dim=1)))

    def finish(self) -> None:
        """Judge those that still wait."""
        for stage, queue in enumerate(self.queues):
            for batch in queue.rest():
                self._run(stage, batch)

    def so_far(self) -> tuple[str, str]:
        """Running accuracies for the progress bar."""
        return f"{self.clean / len(self.order):.2%}", f"{self.robust / len(self.order):.2%}"

    def _scores(self, name: str, places: Tensor) -> Tensor:
        """Scores `(b, repeats)` that are known."""
        found = self.known.ledger.column(name).get("scores", places)
        assert found is not None
        return found

    def _give(self, stage: int, batch: Batch) -> None:
        """Hand samples to an attack, which passes on at once those it has on record."""
        if not len(batch.index):
            return
        name = self.plans[stage].name if stage < len(self.plans) else INSPECTED
        known = self.known.ledger.column(name).flag("known", batch.places)
        if bool(known.any()):
            self._settle(stage, batch.take(known))
        if not bool(known.all()):
            for full in self.queues[stage].put(batch.take(~known), self.size):
                self._run(stage, full)

    def _run(self, stage: int, batch: Batch) -> None:
        if stage < len(self.plans):
            self._judge_attack(self.plans[stage], batch)
        else:
            self._inspect(batch)
        self._settle(stage, batch)

    def _settle(self, stage: int, batch: Batch) -> None:
        """Count the verdicts of an attack, and pass the samples on."""
        if stage == len(self.plans):
            return
        before = self.standing.get(batch.places)
        assert before is not None
        after = worse(before, self._scores(self.plans[stage].name, batch.places))
        self.standing.put(batch.places, after)
        self.robust += float((_worst(after) - _worst(before)).sum())
        last = stage == len(self.plans) - 1
        self._give(stage + 1, batch.take(after.any(dim=1)) if self.settings.cascade or last else batch)

    def rehearse(self, batch: Batch) -> None:
        """Have every attack look at its options before the first pass: the last one's turn may come hours later."""
        for plan in self.plans:
            plan.rehearse(self.fast, batch.x, batch.labels, batch.index)

    def judge_clean(self, batch: Batch, fingerprints: Sequence[str]) -> None:
        """Clean verdicts of a batch."""
        known = self.known.ledger.column(CLEAN).flag("known", batch.places)
        if bool(known.all()) and self.traits is not None and not self.known.kept:
            return
        outputs = [self._outputs(batch.x) for _ in range(self.repeats if self.traits else 2)]
        judged = [judge("evaluate", one, batch.labels, self.settings.score) for one in outputs]
        if self.traits is None:
            self.traits = Traits.seen(outputs[0], outputs[1], self.settings.score)
            self.repeats = self.repeats if self.traits.difference else 1
            extra = [self._outputs(batch.x) for _ in range(self.repeats - 2)]
            judged += [judge("evaluate", one, batch.labels, self.settings.score) for one in extra]
        undefined = int(torch.stack([one.undefined for one in judged]).any(dim=0).sum())
        if undefined:
            raise ValueError(
                f"evaluate: the model gives NaN for {undefined} of {len(batch.index)} clean inputs of a batch."
            )
        index = tuple(batch.index.tolist())
        seen = self._witnessed(batch, outputs[0]) if self.known.kept and not self.traits.difference else None
        rows = places(~known).tolist()
        if not rows:
            return
        entry = Entry(
            CLEAN, index, _scores_of(judged[: self.repeats]),
            flags={"tied": judged[0].tied.cpu()}, samples=tuple(fingerprints),
            labels=batch.labels.long().cpu() if self.traits.classes and batch.labels.ndim == 1 else None,
            witness=seen,
        )  # fmt: skip
        self.known.add(entry.take(rows) if bool(known.any()) else entry)

    def _witnessed(self, batch: Batch, outputs: Any) -> Tensor:
        """What the outputs are known by; refuses a model that is not the one on record."""
        index = tuple(batch.index.tolist())
        seen, tolerance = witness(outputs, len(index))
        self.known.check_witness(CLEAN, index, seen, tolerance)
        column = self.known.ledger.column(PROBE)
        fresh = not column.values
        rows = (
            torch.arange(min(_PROBED, len(index)), device="cpu")
            if fresh
            else places(column.flag("known", batch.places))
        )
        if len(rows):
            some = batch.take(rows)
            numbers, tolerance = probe(self.model, some.x)
            index = tuple(some.index.tolist())
            self.known.check_witness(PROBE, index, numbers, tolerance)
            if fresh:
                self.known.add(
                    Entry(PROBE, index, torch.zeros(len(index), 1, dtype=torch.bool, device="cpu"), witness=numbers)
                )
        return seen

    def _inspect(self, batch: Batch) -> None:
        """Look at the gradients of those that every attack has left, unless an attack had one to start from."""
        if not self.plans or self.settings.score is not None:
            return
        columns = [self.known.ledger.column(plan.name) for plan in self.plans]
        flat, steep = (
            torch.stack([column.flag(name, batch.places) for column in columns]).any(dim=0)
            for name in ("flat", "steep")
        )
        doubtful = flat | ~steep
        flags = {name: torch.zeros_like(flat) for name in ("zero gradient", "tiny gradient")}
        warnings: tuple[str, ...] = ()
        try:
            if bool(doubtful.any()):
                some = batch.take(doubtful)
                with undisturbed(batch.x.device):
                    threat = None if self.threat is None else self.threat.threat_of(some.index)
                    found = lost_gradients(self.model, some.x, some.labels, threat)
                for name, mask in zip(flags, found, strict=True):
                    flags[name][doubtful] = mask.cpu()
        except Exception as error:  # a diagnosis never ends what it is about
            warnings = (f"gradients of robust samples could not be looked at: {type(error).__name__}: {error}",)
        scores = torch.zeros(len(batch.index), 1, dtype=torch.bool, device="cpu")
        self.known.add(Entry(INSPECTED, tuple(batch.index.tolist()), scores, flags=flags, warnings=warnings))

    def _judge_attack(self, plan: Plan, batch: Batch) -> None:
        began = time.perf_counter()
        with first_gradients() as sizes:
            try:
                x_adv, verdict = plan.run(self.fast, batch.x, batch.labels, batch.index, self.settings.seed)
            except FAILURES:
                if len(batch.index) < self.size:
                    self._outputs(batch.x)  # fails too, with the reason, if it is the model that wants whole batches
                raise
        unmoved = (x_adv == batch.x).reshape(len(batch.index), -1).all(dim=1)
        if plan.moves and bool(unmoved.any()):
            unmoved = unmoved & plan.can_move(batch.x, batch.index)
        judged = [
            judge("evaluate", self._outputs(x_adv), batch.labels, self.settings.score) for _ in range(self.repeats)
        ]
        flags = {
            "undefined": torch.stack([one.undefined for one in judged]).any(dim=0),
            "tied": judged[0].tied, "unmoved": unmoved, "outside": plan.outside(x_adv, batch.x, batch.index),
        }  # fmt: skip
        if sizes and len(sizes[0]) == len(batch.index):  # of all samples, not of a part
            flags |= {"flat": sizes[0] < TINY, "steep": sizes[0] >= TINY}
        if verdict is not None and self.repeats == 1 and judged[0].score.dtype == torch.bool:
            flags["unconfirmed"] = verdict.success & judged[0].score
        protocol = getattr(verdict, "protocol", None)
        self.known.add(
            Entry(
                plan.name, tuple(batch.index.tolist()), _scores_of(judged),
                gradients=None if verdict is None else verdict.gradients.cpu(),
                forwards=None if verdict is None else verdict.forwards.cpu(),
                flags={name: mask.cpu() for name, mask in flags.items()},
                part=None if protocol is None else verdict.attack.cpu(),  # type: ignore[union-attr]  # protocols have it
                seconds=time.perf_counter() - began,
                farthest=_farthest(x_adv, batch.x),
                warnings=tuple(getattr(verdict, "warnings", ())),
                protocol=None if protocol is None else protocol.to_dict(),
            )
        )  # fmt: skip

    def _outputs(self, x: Tensor) -> Any:
        try:
            with torch.no_grad():
                return asked("evaluate", self.model, x)
        except FAILURES as error:
            if len(x) < self.size:
                explain_rows("evaluate", "model", f"a batch of {len(x)} samples, after one of {self.size}", error)
            raise


def _farthest(x_adv: Tensor, x: Tensor) -> dict[str, float]:
    exact = accumulator(x)
    change = (x_adv.to(exact) - x.to(exact)).reshape(len(x), -1)
    sizes = {name: torch.linalg.vector_norm(change, norm, dim=1) for name, norm in (("Linf", math.inf), ("L2", 2))}
    return {name: float(size.max()) for name, size in sizes.items()}


def _scores_of(judged: Sequence[Judged]) -> Tensor:
    return torch.stack([one.score.cpu() for one in judged], dim=1)


def _worst(scores: Tensor) -> Tensor:
    """Of all repeats, as a number."""
    return scores.double().amin(dim=1)
