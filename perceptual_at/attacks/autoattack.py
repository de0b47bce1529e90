"""AutoAttack: an ensemble of attacks without parameters to choose, and the stamp that says what was run."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._progress import Bar
from perceptual_at.attacks import official
from perceptual_at.attacks.apgd import ApgdOptions, apgd
from perceptual_at.attacks.fab import FabOptions, fab
from perceptual_at.attacks.protocol import VERSIONS, Composition, Options, Protocol, composition_of
from perceptual_at.attacks.square import SquareOptions, square
from perceptual_at.attacks.surrogate import SurrogateOptions, surrogate_pgd
from perceptual_at.attacks.targets import check_batch, dlr, loss_of, margin
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.divergences import cross_entropy
from perceptual_at.threats import L1, L2, Linf, Threat, as_ball, as_released, budgets, check_threat, norm_name, select
from perceptual_at.victims import FastModel, Lane, Model, ModelMode, Terms, Victim, check_values, inspection, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "surrogate")
_STREAMS = 6  # between the numbers of an attack and of the same one again: so many there were before the surrogate
_Attack = Callable[[Tensor, Tensor, Tensor], Verdict]
"""Of inputs, labels, and which rows of the batch these are."""
Version = Literal["standard", "plus", "rand", "thorough"] | Sequence[str | tuple[str, Options]]


@dataclasses.dataclass(frozen=True, eq=False)
class AutoAttackVerdict(Verdict):
    """A `Verdict` that says which attack broke each sample, under which protocol.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.75], [0.375], [0.125]]), torch.tensor([0, 0, 0])
        >>> verdict = auto_attack(model, x, labels, Linf(0.25), version=["apgd-ce"], verdict=True)
        >>> verdict.success, verdict.attack
        (tensor([False,  True,  True]), tensor([-1,  0, -1]))
        >>> verdict.robust_after
        {'clean': 0.6666666666666666, 'apgd-ce': 0.3333333333333333}
        >>> verdict.protocol.name
        'custom: apgd-ce, Linf(eps=0.25)'
    """

    attack: Tensor
    """Place in `protocol.attacks` of the attack that broke the sample; -1 where none did or none was needed."""
    protocol: Protocol
    """What was run, and what the result may be called."""
    warnings: tuple[str, ...]
    """Signs that the numbers may be too good; empty when there are none."""

    @property
    def robust_after(self) -> dict[str, float]:
        """Share of samples that are still robust after each attack, in their order."""
        right = ~(self.success & (self.attack < 0))
        right = right if self.undefined is None else right & ~self.undefined
        shares = {"clean": _share(right)}
        for place, name in enumerate(self.protocol.attacks):
            right = right & (self.attack != place)
            shares[name] = _share(right)
        return shares


class AutoAttackOptions(TypedDict, total=False):
    """What `auto_attack` can be given besides model, inputs, labels, threat and `verdict`."""

    version: Version
    backend: Literal["native", "pyautoattack"]
    batch_size: int
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    progress: bool
    generator: _random.Generator | None


@overload
def auto_attack(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[AutoAttackOptions]",
) -> Tensor: ...
@overload
def auto_attack(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[True],
    **options: "Unpack[AutoAttackOptions]",
) -> AutoAttackVerdict: ...
@overload
def auto_attack(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: bool,
    **options: "Unpack[AutoAttackOptions]",
) -> Tensor | AutoAttackVerdict: ...
def auto_attack(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    version: Version = "standard",
    backend: Literal["native", "pyautoattack"] = "native",
    batch_size: int = 250,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    progress: bool = False,
    verdict: bool = False,
    generator: _random.Generator | None = None,
) -> Tensor | AutoAttackVerdict:
    """Adversarial inputs by an ensemble of strong attacks, each on the samples that withstood those before.

    `"standard"` is APGD on cross entropy, APGD on the targeted DLR loss, targeted FAB and Square, with the published
    budgets (100 steps, 9 target classes, 5000 queries); `"plus"` adds APGD on DLR and untargeted FAB, with five
    restarts; `"rand"`, for random models, is APGD on both losses averaged over 20 passes. In L1, `"standard"` runs APGD
    on cross entropy five times and the targeted one towards 5 classes, both from larger budgets. `"thorough"` is none
    of the published versions: it is `"standard"` and then `surrogate_pgd` on what is left.

    A sample counts as broken when one attack found a point inside ball and box that the model misclassifies; clean
    mistakes are broken to begin with.

    With two or three classes the DLR losses are not both defined: the margin, and the difference to the target, take
    their place. With fewer than ten classes all wrong ones are targets. The protocol says so.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`, at least two classes.
        x: clean inputs, shape `(B, C, H, W)` (any other shape without Square), inside the bounds of the threat model.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2` or `L1`.
        version: `"standard"`, `"plus"`, `"rand"`, `"thorough"`, or attacks in the order to run them: names, or pairs of
            a name and options that differ from the published ones, such as `("square", {"queries": 1000})`. Names:
            `"apgd-ce"`, `"apgd-dlr"`, `"apgd-t"`, `"fab"`, `"fab-t"`, `"square"`, `"surrogate"`.
        backend: `"native"`, or `"pyautoattack"` to run the official code (extra `autoattack`).
        batch_size: samples attacked at a time. Verdicts do not depend on it, up to the rounding of the model.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: search on a copy of the model that costs less; see `Lane`. Every success is confirmed by the model itself.
        validate: check once that inputs are finite and inside the bounds, and labels in range.
        progress: show a progress bar, when tqdm is installed.
        verdict: return an `AutoAttackVerdict`.
        generator: where random numbers come from: a `SampleGenerator` for numbers of each sample's own, or a
            `torch.Generator` that seeds one.

    Returns:
        Adversarial inputs, shape and dtype of `x`; robust samples as they came. With `verdict`, an
        `AutoAttackVerdict` with them.

    Raises:
        TypeError: if an argument is of the wrong kind, or the threat is none of the three.
        ValueError: if an argument is out of range, an attack unknown, or the model returns no logits.
        ImportError: if the official code is asked for and not installed.

    Source:
        Croce and Hein 2020; versions and budgets: the official code, release 0.1.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.75], [0.375]]), torch.tensor([0, 0])
        >>> x_adv = auto_attack(model, x, labels, Linf(0.25), version=["apgd-ce"])
        >>> x_adv[0], model(x_adv).argmax(dim=1)  # the first is out of reach and stays
        (tensor([0.7500]), tensor([0, 1]))
    """
    _check_call(x, threat, version, backend, batch_size, lane)
    _check.flag("auto_attack", progress=progress, verdict=verdict)
    terms = Terms(model_mode=model_mode, lane=lane, validate=validate)
    with opened("auto_attack", model, x, labels, threat, terms) as victim:
        x, labels = victim.x, victim.labels
        numbers = _random.per_sample_generator("auto_attack", generator, x)
        search = Search(x, labels)
        everyone = torch.arange(len(x), device=x.device)
        losses = _losses(version)
        for _, loss in losses:
            check_batch("auto_attack", loss, labels)
        if not isinstance(version, str):  # each attack looks at its options when it is called, also on no samples
            for attack in _native(victim.model, _composition(version, threat, 2), threat, numbers, 2):
                attack(x[:0], labels[:0], everyone[:0])
        classes = _clean(victim, search, x, torch.split(everyone, batch_size), losses)
        composition = _composition(version, threat, classes)
        notes = _notes(composition, classes, victim.model)
        first = everyone[:batch_size]
        by_gradient = any(name != "square" for name, _ in composition)
        warnings = inspection.suspicions(
            victim.without_lane(), x[first], labels[first], select(threat, first),
            {"cross entropy": cross_entropy, "margin": margin} if by_gradient else {}, averages=version == "rand",
        ) if len(x) else []  # fmt: skip
        if backend == "native":
            attacks = _native(victim.model, composition, threat, numbers, classes)
        else:
            attacks, heard = official.attacks(victim, composition, threat, numbers, classes)
            notes = (*notes, official.NOTE)
        protocol = Protocol(threat, classes, composition, backend, notes)
        broken_by, found = _in_turn(search, x, attacks, protocol, batch_size=batch_size, progress=progress)
        warnings.extend(found)
        if backend == "pyautoattack":
            warnings.extend(heard)
    if not verdict:
        return search.x_adv
    return AutoAttackVerdict(
        search.x_adv, search.success, search.step, search.gradients, search.forwards, broken_by, protocol,
        tuple(dict.fromkeys(filter(None, warnings))), undefined=search.undefined & ~search.success,
    )  # fmt: skip


def _in_turn(
    search: Search, x: Tensor, attacks: Sequence[_Attack], protocol: Protocol, *, batch_size: int, progress: bool
) -> tuple[Tensor, list[str]]:
    """Run the attacks, each on what is left; gives which of them broke each sample, and what Square's success says."""
    broken_by, right, warnings = torch.full_like(search.step, -1), len(search.remaining()), list[str]()
    for place, (name, attack) in enumerate(zip(protocol.attacks, attacks, strict=True)):
        remaining = search.remaining()
        if not len(remaining):
            break
        with Bar(f"auto_attack: {name}", total=len(remaining), shown=progress) as bar:
            for at in torch.split(remaining, batch_size):
                found = attack(x[at], search.labels[at], at)
                _enter(search, at, found)
                broken_by[at[found.success]] = place
                bar.advance(len(at), robust=f"{_share(~(search.success | search.undefined)):.2%}")
        if name == "square" and place:
            broken = len(remaining) - len(search.remaining())
            warnings.append(inspection.square_alone(broken, right, protocol.composition[place][1]["queries"]))
    return broken_by, warnings


def _native(
    model: Model, composition: Composition, threat: Linf | L2 | L1, numbers: _random.SampleGenerator, classes: int
) -> list[_Attack]:
    """The attacks of a composition."""
    threat = as_released(threat)
    functions: dict[str, Callable[..., Any]] = {
        "apgd-ce": functools.partial(apgd, loss=cross_entropy),
        "apgd-dlr": functools.partial(apgd, loss=dlr if classes > 3 else margin),
        "apgd-t": apgd,
        "fab": fab,
        "fab-t": fab,
        "square": square,
        "surrogate": surrogate_pgd,
    }
    attacks: list[_Attack] = []
    seen = collections.Counter[str]()
    for name, options in composition:
        drawn = numbers.fork(NAMES.index(name) + _STREAMS * seen[name])  # the same numbers in any company
        seen[name] += 1
        attacks.append(functools.partial(_called, functions[name], model, threat, drawn, options))
    return attacks


def _called(
    function: Callable[..., Any],
    model: Model,
    threat: Threat,
    numbers: _random.SampleGenerator,
    options: Options,
    x: Tensor,
    labels: Tensor,
    at: Tensor,
) -> Verdict:
    mode: ModelMode = "eval" if isinstance(model, FastModel) else "as_is"
    if "loss" in options:
        options = {**options, "loss": loss_of(options["loss"], at)}
    try:
        found: Verdict = function(
            model, x, labels, select(threat, at), model_mode=mode, validate=False, verdict=True,
            generator=numbers.take(at), **options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:  # which shall speak of the function that was called, not of a part of it
        part = f"{getattr(function, 'func', function).__name__}: "
        if not str(error).startswith(part):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"auto_attack: {str(error).removeprefix(part)}") from error
    return found


def _enter(search: Search, at: Tensor, found: Verdict) -> None:
    """Take over what one attack found."""
    search.record(at, found.x_adv, found.success, 0)
    search.step[at] = torch.where(found.success, found.step, search.step[at])
    if found.undefined is not None:
        search.undefined[at] |= found.undefined
    search.gradients[at] += found.gradients
    search.forwards[at] += found.forwards


def _clean(
    victim: Victim, search: Search, x: Tensor, batches: Sequence[Tensor], losses: Sequence[tuple[str, Any]]
) -> int:
    """Note clean mistakes, and what the losses of all attacks give for them; gives the number of classes."""
    classes = 2
    for at in batches:
        if not len(at):
            break
        logits = victim.logits(x[at])
        search.spend(at, forwards=1)
        search.judge(at, x[at], logits, 0)
        for name, loss in losses:
            given = (logits.clone(), search.labels[at], (search.labels[at] + 1) % logits.shape[1])
            values = loss_of(loss, at)(*given[: 3 if name == "apgd-t" else 2])
            check_values("auto_attack", values, len(at))
        classes = logits.shape[1]
    return classes


def _check_call(
    x: Tensor, threat: Linf | L2 | L1, version: Version, backend: str, batch_size: int, lane: Lane | None
) -> None:
    """Require options that go together, before the first pass: some attacks come hours later."""
    check_threat("auto_attack", threat)
    as_ball("auto_attack", threat)
    _check.floating("auto_attack", x=x)
    budgets("auto_attack", threat, x)
    _check_version(version)
    _check.choice("auto_attack", "backend", backend, ("native", "pyautoattack"))
    _check.count("auto_attack", "batch_size", batch_size)
    if backend != "native" and lane is not None:
        raise ValueError(f"auto_attack: `lane` has no effect with backend={backend!r}, which judges by what it runs.")
    if backend != "native" and "surrogate" in _names(version):
        raise ValueError(f"auto_attack: backend={backend!r} has no 'surrogate' attack, which is our own.")
    if x.ndim != 4 and "square" in _names(version):
        raise ValueError(
            f"auto_attack: `x` must be images of shape (B, C, H, W) for Square, got {x.ndim} dimensions; reshape "
            "them in front of the model, or give `version` a list without 'square'."
        )
    if backend != "native":
        official.check(_composition(version, threat, 2), threat, x)


def _check_version(version: Any) -> None:
    if isinstance(version, str):
        if version not in VERSIONS:
            words = ", ".join(repr(word) for word in VERSIONS)
            raise ValueError(f"auto_attack: `version` must be one of {words} or a list of attacks, got {version!r}.")
        return
    if not _check.is_sequence(version) or not version:
        raise TypeError(f"auto_attack: `version` must be a name or a list of attacks, got {version!r}.")
    for entry in version:
        name = entry[0] if _check.is_sequence(entry) and len(entry) == 2 else entry
        if not isinstance(name, str) or name not in NAMES:
            words = ", ".join(repr(word) for word in NAMES)
            raise ValueError(f"auto_attack: an attack in `version` must be one of {words}, got {name!r}.")
        if not isinstance(entry, str):
            _check_entry(name, entry[1])


def _check_entry(name: str, options: Any) -> None:
    """Require options that the attack has and that are not decided by the ensemble."""
    if not isinstance(options, Mapping):
        raise TypeError(f"auto_attack: the options of {name!r} in `version` must be a dictionary, got {options!r}.")
    kinds = {"square": SquareOptions, "fab": FabOptions, "fab-t": FabOptions, "surrogate": SurrogateOptions}
    kind: Any = kinds.get(name, ApgdOptions)
    allowed = sorted(set(kind.__annotations__) - _DECIDED)
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(
                f"auto_attack: {name!r} in `version` takes the options {', '.join(allowed)}, got {option!r}."
            )
        if option in _COUNTS and (value is not None or name.endswith("-t")):
            _check.count(f"auto_attack: {name}", option, value)


_COUNTS = {"steps", "restarts", "queries", "target_classes", "probes", "eot"}
# What the ensemble gives its attacks itself.
_DECIDED = {"targets", "start", "model_mode", "lane", "validate", "generator"}


def _names(version: Version) -> tuple[str, ...]:
    if isinstance(version, str):
        return tuple(name for name, _ in composition_of(version, "Linf", 10))
    return tuple(entry if isinstance(entry, str) else entry[0] for entry in version)


def _losses(version: Version) -> list[tuple[str, Any]]:
    """The losses that were given, with the names of their attacks."""
    entries = () if isinstance(version, str) else version
    return [(entry[0], entry[1]["loss"]) for entry in entries if not isinstance(entry, str) and "loss" in entry[1]]


def _composition(version: Version, threat: Threat, classes: int) -> Composition:
    """Attacks with all their settings; those of a list are the standard version's, else those of `"plus"`."""
    norm = norm_name(threat)
    if isinstance(version, str):
        return composition_of(version, norm, classes)
    known = {**dict(composition_of("plus", norm, classes)), **dict(composition_of("thorough", norm, classes))}
    entries = ((entry, {}) if isinstance(entry, str) else entry for entry in version)
    return tuple((name, {**known[name], **options}) for name, options in entries)


def _notes(composition: Composition, classes: int, model: Model) -> tuple[str, ...]:
    """What few classes change, and what a lane does."""
    names, notes = {name for name, _ in composition}, []
    if classes < 4 and "apgd-dlr" in names:
        notes.append(f"margin in place of DLR, which {classes} classes do not define")
    if classes < 4 and "apgd-t" in names:
        notes.append(f"difference to the target in place of targeted DLR, which {classes} classes do not define")
    if classes < 10 and names & {"apgd-t", "fab-t", "surrogate"}:
        notes.append(f"at most {classes - 1} target classes, because there are no more wrong ones")
    if isinstance(model, FastModel):
        notes.append(f"searched in {model.lane}, every success confirmed by the model itself")
    return tuple(notes)


def _share(robust: Tensor) -> float:
    return int(robust.sum()) / len(robust) if len(robust) else 0.0
