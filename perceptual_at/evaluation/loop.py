"""Clean and robust accuracy of a model over a loader, kept per sample."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._progress import Bar
from perceptual_at._random import undisturbed
from perceptual_at._shapes import UNSIGNED
from perceptual_at.attacks.protocol import versions
from perceptual_at.evaluation.checks import Check
from perceptual_at.evaluation.fingerprints import data_fingerprint, model_fingerprint, sample_fingerprints
from perceptual_at.evaluation.fingerprints.descriptions import Opaque, describe_or_reason
from perceptual_at.evaluation.ledger import CLEAN, INSPECTED, Column, worse
from perceptual_at.evaluation.masking import sanity_checks
from perceptual_at.evaluation.plans import Plan, first_threat
from perceptual_at.evaluation.records import Record
from perceptual_at.evaluation.report import Cost, Evaluation, check_name
from perceptual_at.evaluation.run import PROBE, Batch, Measurement, Rules
from perceptual_at.evaluation.statistics import binomial_tail
from perceptual_at.metrics import Score, check_labels
from perceptual_at.objectives.passes import Attack
from perceptual_at.victims import Lane, Model, check_lane, in_step, lent, modules_of

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
    score: Score | None = None,
    lane: Lane | None = None,
    record: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Clean accuracy and robust accuracy against each attack.

    The model runs in eval mode and is left as found. Attacks get only samples that are right without attack, so
    nothing is spent on decided ones, in batches that are filled up again to the size of the loader's. What an attack
    returns is judged anew, whatever the attack says of it: a sample is robust if the model is right on exactly that
    input; outputs with NaN are not right. A warning counts inputs beyond the threat that an attack was given, and the
    report says how far each attack moved them.

    Attacks that take a `generator` and were given none get one per sample, made of the seed, the sample's index and
    the attack's number. Their verdicts then do not depend on batch size, order or the number of processes, up to
    the rounding of the model's own kernels. What belongs to samples goes with them: a threat's `eps` of shape `(n,)`,
    and tensors `targets`, `start` and `step_size` of an attack made by `functools.partial`, hold one entry per sample
    of the data, in the order of their indices; an attack of your own that takes `index=None` is told which it has.

    Args:
        model: maps inputs to logits `(B, K)`, or dense ones `(B, K, *S)`; with `score`, to anything.
        loader: batches `(x, labels)` or `(x, labels, index)`, inputs inside the bounds of the threat model. The index
            identifies each sample; without one, samples are numbered as they come.
        attacks: by name, functions `(model, x, labels)` that give `x_adv` or a `Verdict`, for example
            `{"pgd20": functools.partial(pgd, threat=Linf(8 / 255), steps=20)}`. Empty gives clean accuracy.
        device: where to run; None means where the model's parameters are; where none are found, the batch stays.
        progress: show a progress bar with the accuracies so far, when tqdm is installed.
        seed: of the noise of the attacks.
        cascade: leave out samples that an earlier attack has broken. Cheaper, and the worst case is the same, but
            the column of an attack then counts the samples that withstood it and all before it.
        repeats: how often each point is judged if the model is found to be random; see `Evaluation.repeated`.
            A deterministic model is judged once.
        checks: run `sanity_checks` on the first 256 samples, with the threat of the first attack that has one.
        classes: names of the classes for the report; None numbers them.
        score: what counts as right, `(outputs, labels) -> (B,)`: boolean, or in [0, 1]. None is 0/1 correctness for
            classes, and the share of right places for dense labels. Samples of score 0 are not attacked.
        lane: run the attacks on a copy of the model that costs less; see `Lane`. All verdicts are of the model itself.
        record: file that takes the verdicts of every finished batch. A later call with the same model, data and
            settings continues where it stopped, also after a kill; others are refused.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: if an attack is not callable or a batch no pair or triple of tensors.
        ValueError: if an attack changes the shape of its inputs or returns NaN, inputs or clean outputs have NaN, a
            label is out of range, an index comes twice, the loader is empty, a name is one of the report's own, options
            do not go together, or `record` belongs to another evaluation or cannot tell an attack from another.
        OSError: if `record` cannot be written; before any work.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> batch = torch.tensor([[0.875], [0.375]]), torch.tensor([0, 0])
        >>> result = evaluate(model, [batch], {"fgsm": functools.partial(fgsm, threat=Linf(0.25))}, progress=False)
        >>> result.clean_accuracy, result.robust_accuracy["fgsm"]
        (1.0, 0.5)
        >>> print(result)
        clean 100.00, fgsm 50.00, worst_case 50.00, mean 75.00, nrr 66.67 (%, n=2)
        >>> near = lambda outputs, labels: 1 - (outputs[:, 0] - labels).abs()  # a regression, scored by its error
        >>> evaluate(model, [(batch[0], torch.tensor([1.0, 0.375]))], {}, score=near, progress=False).clean_accuracy
        0.9375
    """
    _check_call(model, attacks, seed, repeats, score)
    batches = _check.loader("evaluate", loader)
    _check.flag("evaluate", progress=progress, cascade=cascade, checks=checks)
    _check_places(device, classes, record)
    plans = [Plan(number, name, attack) for number, (name, attack) in enumerate(attacks.items())]
    _check_together(plans, checks=checks, classes=classes, score=score)
    settings = Rules(int(seed), cascade, int(repeats), score)
    if lane is not None:
        check_lane("evaluate", model, "eval", lane)
    device = _home(model) if device is None else device
    texts, fingerprint = _identity(model, plans, settings, lane, strict=record is not None)
    software = versions()
    with (
        lent("evaluate", model) as borrowed, in_step(borrowed) as f, lent("evaluate", f, lane=lane) as fast,
        Record(record, fingerprint, texts, software) as known,
    ):  # fmt: skip
        run = Measurement(f, fast, plans, known, settings)
        first: list[Batch] = []
        with Bar("evaluate", total=_length(loader), shown=progress, unit="batch") as bar:
            for given in batches:
                x, labels, index = _batch(given, len(run.order))
                if not index:
                    continue
                if score is None:
                    check_labels("evaluate", labels, len(x))
                fingerprints = sample_fingerprints(x, labels)
                places = run.number(index, fingerprints)
                if device is not None:
                    x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                if labels.dtype in UNSIGNED:
                    labels = labels.long()
                batch = Batch(x, labels, torch.tensor(index, device="cpu"), places)
                if run.traits is None:
                    run.rehearse(batch)
                run.judge_clean(batch, fingerprints)
                _check_classes(classes, run)
                run.attack(batch)
                if checks and sum(len(part.index) for part in first) < CHECKED_SAMPLES:
                    first.append(batch)
                clean, robust = run.so_far()
                bar.advance(clean=clean, robust=robust)
            run.finish()
            if run.order:
                bar.advance(0, **dict(zip(("clean", "robust"), run.so_far(), strict=True)))
        if not run.order:
            raise ValueError("evaluate: `loader` gave no sample; a generator or an iterator gives its batches once.")
        found = _checks(f, plans, first, run) if checks else ()
    data = data_fingerprint([known.ledger.samples[sample] for sample in sorted(run.order)])
    place = str(device) if device is not None else str(x.device)
    provenance = {"model": fingerprint, "data": data, **texts, "versions": software, "device": place}
    return _report(run, found, provenance, classes)


def _length(loader: Any) -> int | None:
    """How many batches a loader says that it has: for the progress bar alone, so its errors are none of ours."""
    with contextlib.suppress(Exception):
        return length_hint(loader) or None
    return None


def _home(model: Model) -> torch.device | None:
    """Where a model's parameters are; None where it has none, or none that are anywhere."""
    parameters = (parameter for module in modules_of(model) for parameter in module.parameters())
    return next((parameter.device for parameter in parameters if not parameter.is_meta), None)


def _identity(
    model: Model, plans: Sequence[Plan], settings: Rules, lane: Lane | None, *, strict: bool
) -> tuple[dict[str, str], str]:
    """Texts of the settings and the model's fingerprint; with `strict`, refuses what these cannot tell from another."""
    texts = {f"attack {plan.name!r}": plan.call for plan in plans} | {"attacks": ", ".join(plan.name for plan in plans)}
    texts |= settings.texts() | ({} if lane is None else {"lane": str(lane)})
    unknown = {f"attack {plan.name!r}": plan.opaque for plan in plans}
    if settings.score is not None:
        texts["score"], unknown["score"] = describe_or_reason(settings.score)
    try:
        fingerprint = model_fingerprint(model)
    except Opaque as error:
        fingerprint, unknown["model"] = f"a {type(model).__qualname__} of unknown state", str(error)
    found = "; ".join(f"{name}: {reason}" for name, reason in unknown.items() if reason)
    if strict and found:
        raise ValueError(
            f"evaluate: `record` cannot tell this evaluation from another ({found}). Give these objects plain "
            "attributes or `__reduce__`, or go without `record`."
        )
    return texts, fingerprint


def _checks(model: Model, plans: Sequence[Plan], first: Sequence[Batch], run: Measurement) -> tuple[Check, ...]:
    """The sanity checks on the first samples; what goes wrong in them is a failed check."""
    try:
        parts = zip(*((batch.x, batch.labels, batch.index) for batch in first), strict=True)
        x, labels, index = (torch.cat(part)[:CHECKED_SAMPLES] for part in parts)
        plan = first_threat(plans)
        threat = None if plan is None else plan.threat_of(index)
        assert threat is not None
        with undisturbed(x.device):
            return sanity_checks(model, x, labels, threat, seed=run.settings.seed)
    except Exception as error:  # a diagnosis never ends what it is about
        return (Check.stopped("sanity_checks", error),)


def _report(
    run: Measurement, checks: tuple[Check, ...], provenance: Mapping[str, Any], classes: Sequence[str] | None
) -> Evaluation:
    """The report."""
    assert run.traits is not None
    ledger, places = run.known.ledger, run.known.ledger.places(run.order)
    clean = _repeats(run, CLEAN, places)
    passes, before = {CLEAN: clean}, clean
    for plan in run.plans:
        passes[plan.name] = worse(_repeats(run, plan.name, places), before if run.settings.cascade else clean)
        before = passes[plan.name]
    masks = {name: one.all(dim=0) if one.dtype == torch.bool else one.amin(dim=0) for name, one in passes.items()}
    correct = masks.pop(CLEAN)
    attacks = {
        plan.name: {
            "call": plan.call,
            "judged": plan.point,
            "protocol": ledger.column(plan.name).protocol,
            "broken_by": _parts(ledger.column(plan.name), places),
            "unmoved": int(ledger.column(plan.name).flag("unmoved", places).sum()),
            "outside": int(ledger.column(plan.name).flag("outside", places).sum()),
            "farthest": ledger.column(plan.name).farthest,
        }
        for plan in run.plans
    }
    suspicious = _suspicious(run, places, masks)
    return Evaluation(
        correct,
        masks,
        labels=ledger.column(CLEAN).get("labels", places),
        index=torch.tensor(run.order, device="cpu"),
        classes=tuple(classes or (str(number) for number in range(run.traits.classes))),
        costs={plan.name: _cost(ledger.column(plan.name), places) for plan in run.plans},
        repeated=passes if len(clean) > 1 else {},
        cascade=run.settings.cascade,
        suspicious=suspicious,
        warnings=tuple(_warnings(run, places, passes[CLEAN][0])),
        checks=checks,
        attacks=attacks,
        provenance=provenance,
    )


def _repeats(run: Measurement, name: str, places: Tensor) -> Tensor:
    """Scores of every repeat, `(repeats, n)`; 0 where the attack was not needed."""
    found = run.known.ledger.column(name).get("scores", places)
    return torch.zeros(run.repeats, len(places), dtype=torch.bool, device="cpu") if found is None else found.T


def _parts(column: Column, places: Tensor) -> dict[str, int]:
    """How many samples each attack of an ensemble broke."""
    part = column.get("part", places)
    if part is None or column.protocol is None:
        return {}
    known = column.flag("known", places)
    return {entry[0]: int(((part == number) & known).sum()) for number, entry in enumerate(column.protocol["attacks"])}


def _cost(column: Column, places: Tensor) -> Cost:
    spent = [column.get(name, places) for name in ("gradients", "forwards")]
    gradients, forwards = (None if one is None else int(one.sum()) for one in spent)
    return Cost(column.seconds, gradients, forwards)


def _suspicious(run: Measurement, places: Tensor, robust: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Robust samples that may be so for want of a good attack, and those that only Square breaks, by reason."""
    ledger, plans = run.known.ledger, run.plans
    if not plans or run.settings.score is not None:
        return {}
    left = torch.stack([robust[plan.name] > 0 for plan in plans]).all(dim=0)
    inspected = ledger.column(INSPECTED)
    tied = torch.stack([ledger.column(name).flag("tied", places) for name in (CLEAN, *(plan.name for plan in plans))])
    still = [ledger.column(plan.name).flag("unmoved", places) for plan in plans if plan.moves]
    found = {
        "zero gradient": left & inspected.flag("zero gradient", places),
        "tiny gradient": left & inspected.flag("tiny gradient", places),
        "tie": left & tied.any(dim=0),
        "not moved": left & torch.stack(still).any(dim=0) if still else torch.zeros_like(left),
    }
    by_square = torch.zeros_like(left)
    for plan in plans:
        column = ledger.column(plan.name)
        others = [robust[other.name] > 0 for other in plans if other is not plan and other.kind != "square"]
        alone = torch.stack(others).all(dim=0) if others else torch.ones_like(left)
        broken = column.flag("known", places) & ~(robust[plan.name] > 0)
        names = [entry[0] for entry in (column.protocol or {}).get("attacks", ())]
        part = column.get("part", places)
        if plan.kind == "square" and others:
            by_square |= broken & alone
        elif part is not None and "square" in names and len(names) > 1:
            by_square |= broken & alone & (part == names.index("square"))
    return {**found, "only by Square": by_square}


def _warnings(run: Measurement, places: Tensor, correct: Tensor) -> Iterator[str]:
    assert run.traits is not None
    ledger, traits = run.known.ledger, run.traits
    n, repeats = len(places), run.repeats
    if traits.classes:
        right = int(correct.sum())
        if binomial_tail(right, n, Fraction(1, traits.classes)) > 0.05:
            yield (
                f"clean accuracy {100 * right / n:.2f} % on {n} samples cannot be told from chance "
                f"({100 / traits.classes:.2f} %): labels or preprocessing look wrong"
            )
    if traits.probabilities:
        yield "the model returns probabilities, not logits: attacks on them are weak; drop its softmax"
    if traits.difference:
        yield f"the model is random (two passes differ by {traits.difference:.2g}): " + (
            "verdicts are of one pass each; use `repeats`, and attacks that average over passes"
            if repeats == 1
            else f"a sample counts as right if it is in all of {repeats} passes"
        )
    for plan in run.plans:
        column = ledger.column(plan.name)
        undefined, unconfirmed, unmoved, outside, known = (
            int(column.flag(name, places).sum()) for name in ("undefined", "unconfirmed", "unmoved", "outside", "known")
        )
        if undefined:
            yield f"{plan.name}: logits with NaN at {undefined} adversarial inputs; counted as wrong"
        if unconfirmed:
            yield f"{plan.name}: {unconfirmed} successes it reported are none for the model; counted as robust"
        if unmoved and plan.moves:
            yield (
                f"{plan.name}: {unmoved} of {known} samples came back as they were; the attack found no direction for "
                "them"
            )
        if outside:
            yield f"{plan.name}: {outside} of {known} inputs that it returned are " + (
                "outside of [0, 1], where all clean ones are: bounds that it does not keep, or perturbations alone"
                if plan.threat is None
                else "outside of its threat and judged as they are"
            )
        yield from (f"{plan.name}: {text}" for text in column.warnings)
    yield from ledger.column(INSPECTED).warnings
    if run.known.begun_with != versions():
        yield f"begun with other versions: {dict(run.known.begun_with)}"


def _check_call(model: Any, attacks: Any, seed: Any, repeats: Any, score: Any) -> None:
    _check.model("evaluate", model)
    if not isinstance(attacks, Mapping):
        raise TypeError(f"evaluate: `attacks` must map names to attacks, got {type(attacks).__name__}.")
    for name, attack in attacks.items():
        _check.attack("evaluate", f"attack {name!r}", attack)
        check_name("evaluate", name, PROBE)
    _check.integer("evaluate", "seed", seed)
    _check.count("evaluate", "repeats", repeats)
    if score is not None and not callable(score):
        raise TypeError(f"evaluate: `score` must be a function (outputs, labels) -> (B,), got {type(score).__name__}.")


def _check_together(plans: Sequence[Plan], *, checks: bool, classes: Sequence[str] | None, score: Score | None) -> None:
    """Require options that go together."""
    if score is not None and (checks or classes is not None):
        raise ValueError(
            f"evaluate: `{'checks' if checks else 'classes'}` must be left out with a `score`: outputs need not be "
            "logits of classes then."
        )
    if checks and first_threat(plans) is None:
        raise ValueError(
            "evaluate: `checks` need a threat model: give one attack as functools.partial(pgd, threat=...), or call "
            "sanity_checks."
        )


def _check_places(device: Any, classes: Any, record: Any) -> None:
    """Require where to run, what to call the classes and where to write, before any of it is needed."""
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise TypeError(f"evaluate: `device` must be a torch.device or its name, got {device!r}.") from error
    if classes is not None:
        _check.names("evaluate", "classes", classes)
    if record is not None:
        _check.path("evaluate", "record", record)


def _check_classes(classes: Sequence[str] | None, run: Measurement) -> None:
    assert run.traits is not None
    if classes is None or len(classes) == run.traits.classes:
        return
    if not run.traits.classes:
        raise ValueError("evaluate: `classes` must be left out for dense outputs: a sample has no one class.")
    raise ValueError(f"evaluate: `classes` must hold {run.traits.classes} names, got {len(classes)}.")


def _batch(batch: Any, start: int) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs, labels and index of a batch of the loader, checked."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not _is_index(batch[2:]):
        parts = batch if isinstance(batch, tuple | list) else [batch]
        got = (f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__ for one in parts)
        hint = (
            " Take them out: [(batch['image'], batch['label']) for batch in loader]."
            if isinstance(batch, Mapping)
            else ""
        )
        raise TypeError(
            "evaluate: `loader` must give pairs (x, labels) or triples (x, labels, index) of tensors, the index of "
            f"whole numbers `(B,)`, got {', '.join(got)}.{hint}"
        )
    x, labels = batch[:2]
    _check.floating("evaluate", x=x)
    _check.tensor("evaluate", "labels", labels)
    for name, value in (("labels", labels), *(("index", one) for one in batch[2:])):
        if value.ndim < 1 or len(value) != len(x):
            raise ValueError(
                f"evaluate: `{name}` must hold one entry per sample, shape ({len(x)},) or ({len(x)}, ...), got shape "
                f"{tuple(value.shape)}."
            )
    _check.same_device("evaluate", "labels", labels.device, "x", x.device)
    if not bool(x.isfinite().all()):
        raise ValueError("evaluate: `x` contains NaN or infinite values.")
    return x, labels, list(range(start, start + len(x))) if len(batch) == 2 else batch[2].tolist()


def _is_index(rest: Sequence[Any]) -> bool:
    """Whether what follows inputs and labels identifies samples: whole numbers, one for each."""
    return all(
        isinstance(one, Tensor) and one.ndim == 1 and one.dtype != torch.bool
        and not (one.is_floating_point() or one.is_complex()) for one in rest
    )  # fmt: skip
