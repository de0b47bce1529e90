"""Clean and robust accuracy of a model over a loader, kept per sample."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._progress import Bar
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.freeze import Model, check_lane, frozen
from perceptual_at.attacks.inspection import gives_probabilities
from perceptual_at.attacks.lanes import Lane
from perceptual_at.attacks.protocol import versions
from perceptual_at.attacks.queries import classified
from perceptual_at.evaluation.checks import Check, largest_difference
from perceptual_at.evaluation.fingerprints import data_fingerprint, model_fingerprint, sample_fingerprints
from perceptual_at.evaluation.masking import sanity_checks
from perceptual_at.evaluation.plans import Plan, threat_of
from perceptual_at.evaluation.records import CLEAN, Record
from perceptual_at.evaluation.report import RESERVED, Cost, Evaluation
from perceptual_at.evaluation.statistics import binomial_tail
from perceptual_at.objectives.passes import Attack

CHECKED_SAMPLES = 256
"""How many samples, from the first batches on, `checks=True` looks at."""


def evaluate(
    model: Model,
    loader: Iterable[tuple[Tensor, ...]],
    attacks: Mapping[str, Attack],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    seed: int = 0,
    cascade: bool = False,
    repeats: int = 1,
    checks: bool = False,
    classes: Sequence[str] | None = None,
    lane: Lane | None = None,
    record: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Clean accuracy and robust accuracy against each attack.

    The model runs in eval mode and is left as found. Attacks get only samples that are right without attack, so
    nothing is spent on decided ones. What an attack returns is judged anew, whatever the attack says of it: a
    sample is robust if the model is right on exactly that input; logits with NaN are not right.

    Attacks that take a `generator` and were given none get one per sample, made of the seed, the sample's index and
    the attack's number. Their verdicts then do not depend on batch size, order or the number of processes, up to
    the rounding of the model's own kernels.

    Args:
        model: maps inputs to logits.
        loader: batches `(x, labels)` or `(x, labels, index)`, inputs inside the bounds of the threat model. The index
            identifies each sample; without one, samples are numbered as they come.
        attacks: by name, functions `(model, x, labels)` that give `x_adv` or a `Verdict`, for example
            `{"pgd20": functools.partial(pgd, threat=Linf(8 / 255), steps=20)}`. Empty gives clean accuracy.
        device: where to run; None means where the model's parameters are (the CPU for other callables).
        progress: show a progress bar with the accuracies so far, when tqdm is installed.
        seed: of the noise of the attacks.
        cascade: leave out samples that an earlier attack has broken. Cheaper, and the worst case is the same, but
            the column of an attack then counts the samples that withstood it and all before it.
        repeats: how often each point is judged if the model is found to be random; see `Evaluation.repeated`.
            A deterministic model is judged once.
        checks: run `sanity_checks` on the first 256 samples, with the threat of the first attack that has one.
        classes: names of the classes for the report; None numbers them.
        lane: run the attacks on a copy of the model that costs less; see `Lane`. All verdicts are of the model itself.
        record: file that takes the verdicts of every finished batch. A later call with the same model, data and
            settings continues where it stopped, also after a kill; others are refused.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: if an attack is not callable or a batch no pair or triple of tensors.
        ValueError: if an attack changes the shape of its inputs or returns NaN, inputs or clean logits have NaN, an
            index comes twice, the loader is empty, a name is one of the report's own, or `record` belongs to another
            evaluation.
        OSError: if `record` cannot be written; before any work.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> batch = torch.tensor([[0.875], [0.375]]), torch.tensor([0, 0])
        >>> result = evaluate(model, [batch], {"fgsm": functools.partial(fgsm, threat=Linf(0.25))}, progress=False)
        >>> result.clean_accuracy, result.robust_accuracy["fgsm"]
        (1.0, 0.5)
        >>> print(result)
        clean 100.00, fgsm 50.00, worst_case 50.00, mean 75.00, nrr 66.67 (%, n=2)
    """
    _check_call(model, attacks, seed, repeats)
    plans = [Plan(number, name, attack) for number, (name, attack) in enumerate(attacks.items())]
    threat = threat_of(attacks) if checks else None
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else torch.device("cpu")
    settings = {f"attack {plan.name!r}": plan.call for plan in plans}
    settings |= {"attacks": ", ".join(attacks), "seed": str(seed), "cascade": str(cascade), "repeats": str(repeats)}
    if lane is not None:
        check_lane("evaluate", model, "eval", lane)
        settings["lane"] = str(lane)
    fingerprint, software = model_fingerprint(model), versions()
    with frozen(model) as f, frozen(f, lane=lane) as fast, Record(record, fingerprint, settings, software) as known:
        run = _Run(f, fast, plans, known, classes, seed=seed, cascade=cascade, repeats=repeats)
        first: list[tuple[Tensor, Tensor]] = []
        batches = len(loader) if isinstance(loader, Sized) else None
        with Bar("evaluate", total=batches, shown=progress, unit="batch") as bar:
            for batch in loader:
                x, labels, index = _batch(batch, len(run.order))
                if not index:
                    continue
                run.number(index)
                fingerprints = sample_fingerprints(x, labels)
                known.check_data(index, fingerprints)
                x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                run.judge(x, labels, index, fingerprints)
                if checks and sum(len(rest) for _, rest in first) < CHECKED_SAMPLES:
                    first.append((x, labels))
                clean, robust = run.so_far()
                bar.advance(clean=clean, robust=robust)
        if not run.order:
            raise ValueError("evaluate: `loader` gave no sample.")
        found: tuple[Check, ...] = ()
        if threat is not None:
            x, labels = (torch.cat(parts)[:CHECKED_SAMPLES] for parts in zip(*first, strict=True))
            found = sanity_checks(f, x, labels, threat, seed=seed)
    provenance = {"model": fingerprint, "data": run.data(), **settings, "versions": software, "device": str(device)}
    return run.result(found, provenance)


class _Run:
    """The verdicts of the batches so far; those already on record are not asked for again."""

    def __init__(
        self,
        model: Model,
        fast: Model,
        plans: Sequence[Plan],
        known: Record,
        classes: Sequence[str] | None,
        *,
        seed: int,
        cascade: bool,
        repeats: int,
    ) -> None:
        self.model, self.fast, self.plans, self.known, self.classes = model, fast, plans, known, classes
        self.seed, self.cascade, self.repeats = seed, cascade, repeats
        self.traits: _Traits | None = None
        self.order: list[int] = []
        self.standing: dict[int, str] = {}  # right in all points judged so far, one digit per repeat

    def number(self, index: Sequence[int]) -> None:
        """Note the samples of a batch, each of which may come once."""
        twice = next((sample for sample in index if sample in self.standing), None)
        if twice is not None or len(set(index)) < len(index):
            raise ValueError(f"evaluate: `loader` gave {'an index' if twice is None else f'the index {twice}'} twice.")
        self.order.extend(index)

    def judge(self, x: Tensor, labels: Tensor, index: Sequence[int], fingerprints: Sequence[str]) -> None:
        """All verdicts of one batch."""
        self._judge_clean(x, labels, index, fingerprints)
        clean = self.known.column(CLEAN).right
        self.standing |= {sample: clean[sample] for sample in index}
        for plan in self.plans:
            open_verdicts = self.standing if self.cascade else clean
            active = [place for place, sample in enumerate(index) if "1" in open_verdicts[sample]]
            self._judge_attack(plan, x, labels, index, active)
            right = self.known.column(plan.name).right
            self.standing |= {index[place]: _both(self.standing[index[place]], right[index[place]]) for place in active}

    def so_far(self) -> tuple[str, str]:
        """Running accuracies for the progress bar."""
        clean = self.known.column(CLEAN).right
        counts = (sum("0" not in verdicts[sample] for sample in self.order) for verdicts in (clean, self.standing))
        clean_share, robust_share = (f"{count / len(self.order):.2%}" for count in counts)
        return clean_share, robust_share

    def data(self) -> str:
        """Fingerprint of the data, the same for every order that kept the indices."""
        return data_fingerprint([self.known.data[sample] for sample in sorted(self.order)])

    def result(self, checks: tuple[Check, ...], provenance: Mapping[str, Any]) -> Evaluation:
        """The report."""
        assert self.traits is not None
        clean = self._passes(CLEAN)
        passes, before = {CLEAN: clean}, clean
        for plan in self.plans:
            passes[plan.name] = self._passes(plan.name) & (before if self.cascade else clean)
            before = passes[plan.name]
        masks = {name: verdicts.all(dim=0) for name, verdicts in passes.items()}
        attacks = {
            plan.name: {
                "call": plan.call,
                "judged": plan.point,
                "protocol": self.known.column(plan.name).protocol,
                "broken_by": dict(self.known.column(plan.name).parts),
            }
            for plan in self.plans
        }
        return Evaluation(
            masks.pop(CLEAN),
            masks,
            labels=torch.tensor([self.known.labels[sample] for sample in self.order]),
            index=torch.tensor(self.order),
            classes=tuple(self.classes or (str(number) for number in range(self.traits.classes))),
            costs={plan.name: self._cost(plan.name) for plan in self.plans},
            repeated=passes if len(clean) > 1 else {},
            cascade=self.cascade,
            warnings=tuple(self._warnings(passes[CLEAN][0])),
            checks=checks,
            attacks=attacks,
            provenance=provenance,
        )

    def _judge_clean(self, x: Tensor, labels: Tensor, index: Sequence[int], fingerprints: Sequence[str]) -> None:
        lacking = self.known.lacking(CLEAN, index)
        if not lacking and self.traits is not None:
            return
        logits = [_logits(self.model, x, labels) for _ in range(self.repeats if self.traits else 2)]
        if self.traits is None:
            self.traits = _Traits.seen(*logits)
            if self.classes is not None and len(self.classes) != self.traits.classes:
                raise ValueError(f"evaluate: `classes` must hold {self.traits.classes} names, got {len(self.classes)}.")
            self.repeats = self.repeats if self.traits.difference else 1
            logits += [_logits(self.model, x, labels) for _ in range(self.repeats - 2)]
        undefined = int(torch.stack(logits).isnan().any(dim=2).any(dim=0).sum())
        if undefined:
            raise ValueError(f"evaluate: the model gives NaN for {undefined} of {len(x)} clean inputs of a batch.")
        if not lacking:
            return
        right = _digits([classified(z, labels) for z in logits[: self.repeats]])
        of_label = labels.tolist()
        self.known.add(
            CLEAN, [index[place] for place in lacking], [right[place] for place in lacking],
            data=[fingerprints[place] for place in lacking], labels=[of_label[place] for place in lacking],
        )  # fmt: skip

    def _judge_attack(self, plan: Plan, x: Tensor, labels: Tensor, index: Sequence[int], active: Sequence[int]) -> None:
        todo = [place for place in active if index[place] not in self.known.column(plan.name).right]
        if not todo:
            return
        began = time.perf_counter()
        samples, rows = [index[place] for place in todo], torch.tensor(todo, device=x.device)
        x_adv, verdict = plan.run(self.fast, x[rows], labels[rows], SampleGenerator(self.seed, samples))
        logits = [_logits(self.model, x_adv, labels[rows]) for _ in range(self.repeats)]
        right = [classified(z, labels[rows]) for z in logits]
        protocol = getattr(verdict, "protocol", None)
        self.known.add(
            plan.name, samples, _digits(right),
            gradients=None if verdict is None else verdict.gradients.tolist(),
            forwards=None if verdict is None else verdict.forwards.tolist(),
            seconds=time.perf_counter() - began,
            undefined=int(torch.stack(logits).isnan().any(dim=2).any(dim=0).sum()),
            unconfirmed=0 if verdict is None or len(right) > 1 else int((verdict.success & right[0]).sum()),
            warnings=list(getattr(verdict, "warnings", ())),
            protocol=None if protocol is None else protocol.to_dict(),
            parts={} if protocol is None else _parts(verdict, protocol),
        )  # fmt: skip

    def _passes(self, name: str) -> Tensor:
        """Verdicts of every repeat, boolean `(repeats, n)`; wrong where the attack was not needed."""
        right = self.known.column(name).right
        digits = [right.get(sample, "0" * self.repeats) for sample in self.order]
        return torch.tensor([[digit == "1" for digit in one] for one in digits]).T

    def _cost(self, name: str) -> Cost:
        column = self.known.column(name)
        spent = [sum(of.get(sample, 0) for sample in self.order) for of in (column.gradients, column.forwards)]
        gradients, forwards = spent if column.gradients else (None, None)
        return Cost(column.seconds, gradients, forwards)

    def _warnings(self, correct: Tensor) -> Iterator[str]:
        assert self.traits is not None
        yield from self.traits.warnings(int(correct.sum()), len(correct), self.repeats)
        for plan in self.plans:
            column = self.known.column(plan.name)
            if column.undefined:
                yield f"{plan.name}: logits with NaN at {column.undefined} adversarial inputs; counted as wrong"
            if column.unconfirmed:
                yield (
                    f"{plan.name}: {column.unconfirmed} successes it reported are none for the model; counted as robust"
                )
            yield from (f"{plan.name}: {text}" for text in column.warnings)
        if self.known.begun_with != versions():
            yield f"begun with other versions: {dict(self.known.begun_with)}"


class _Traits(NamedTuple):
    """What two passes over the first batch say about the model."""

    classes: int
    probabilities: bool
    difference: float
    """Largest difference of the two, 0 within rounding."""

    @classmethod
    def seen(cls, first: Tensor, second: Tensor) -> "_Traits":
        """Of the logits of both passes."""
        return cls(first.shape[1], gives_probabilities(first), largest_difference(first, second))

    def warnings(self, right: int, n: int, repeats: int) -> Iterator[str]:
        """What the report should say."""
        if binomial_tail(right, n, Fraction(1, self.classes)) > 0.05:
            yield (
                f"clean accuracy {100 * right / n:.2f} % on {n} samples cannot be told from chance "
                f"({100 / self.classes:.2f} %): labels or preprocessing look wrong"
            )
        if self.probabilities:
            yield "the model returns probabilities, not logits: attacks on them are weak; drop its softmax"
        if self.difference and repeats == 1:
            yield (
                f"the model is random (two passes differ by {self.difference:.2g}): verdicts are of one pass each; "
                "use `repeats`, and attacks that average over passes"
            )
        if self.difference and repeats > 1:
            yield (
                f"the model is random (two passes differ by {self.difference:.2g}): a sample counts as right if it is "
                f"in all of {repeats} passes"
            )


def _check_call(model: Any, attacks: Any, seed: Any, repeats: Any) -> None:
    if not callable(model):
        raise TypeError(f"evaluate: `model` must be callable, got {type(model).__name__}.")
    if not isinstance(attacks, Mapping):
        raise TypeError(f"evaluate: `attacks` must map names to attacks, got {type(attacks).__name__}.")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(
                f"evaluate: attack {name!r} must be a function (model, x, labels) -> x_adv, got "
                f"{type(attack).__name__}."
            )
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(f"evaluate: an attack cannot be called {name!r}: that is a name of the report's own.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"evaluate: `seed` must be an integer, got {type(seed).__name__} {seed!r}.")
    _check.count("evaluate", "repeats", repeats)


def _batch(batch: Any, start: int) -> tuple[Tensor, Tensor, list[int]]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not _is_index(batch[2:]):
        raise TypeError(
            "evaluate: `loader` must give pairs (x, labels) or triples (x, labels, index) of tensors, got "
            f"{type(batch).__name__}."
        )
    x, labels = batch[:2]
    _check.floating("evaluate", x=x)
    _check.labels("evaluate", labels, x=x)
    if not bool(x.isfinite().all()):
        raise ValueError("evaluate: `x` contains NaN or infinite values.")
    if len(batch) == 2:
        return x, labels, list(range(start, start + x.shape[0]))
    _check.same_shape("evaluate", labels=labels.double(), index=batch[2].to(labels.device).double())
    return x, labels, batch[2].tolist()


def _is_index(rest: Sequence[Any]) -> bool:
    return all(isinstance(one, Tensor) and one.dtype in (torch.int32, torch.int64) for one in rest)


def _logits(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    _check.logits("evaluate", **{"model(x)": logits})
    _check.labels("evaluate", labels, x=logits)
    _check.label_range("evaluate", int(labels.min()), int(labels.max()), logits.shape[1])
    return logits


def _digits(right: Sequence[Tensor]) -> list[str]:
    """For each sample one digit per repeat."""
    columns = torch.stack(list(right), dim=1).tolist()
    return ["".join("01"[verdict] for verdict in column) for column in columns]


def _parts(verdict: Any, protocol: Any) -> dict[str, int]:
    """How many samples each attack of an ensemble broke."""
    return {name: int((verdict.attack == place).sum()) for place, name in enumerate(protocol.attacks)}


def _both(a: str, b: str) -> str:
    return "".join("01"[x == y == "1"] for x, y in zip(a, b, strict=True))
