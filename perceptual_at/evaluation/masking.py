"""Attacks of several strengths on the same samples: the stronger must break what the weaker breaks."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import SampleGenerator
from perceptual_at._shapes import rows
from perceptual_at.attacks.pgd import pgd
from perceptual_at.attacks.square import square
from perceptual_at.attacks.targets import margin
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.evaluation.checks import (
    MASKING,
    Check,
    check_batches,
    check_deterministic,
    check_gradients,
    check_inputs,
    check_modes,
    check_normalization,
    check_probabilities,
    check_ties,
    with_gradient,
)
from perceptual_at.evaluation.statistics import binomial_tail
from perceptual_at.evaluation.strength import STRONGER, check_alone, check_losses, check_stronger
from perceptual_at.metrics import check_outputs
from perceptual_at.objectives.passes import Attack
from perceptual_at.threats import L1, L2, Linf, Threat, as_ball, check_threat, is_ball, select, whole_box
from perceptual_at.victims import Model, asked, in_step, lent, misclassified
from perceptual_at.victims.inspection import far_and_wide


def sanity_checks(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    queries: int = 5000,
    black_box: Attack | None = None,
    transfer_from: Model | None = None,
    level: float = 0.01,
    seed: int = 0,
) -> tuple[Check, ...]:
    """All checks of this module on some samples, cheap ones first.

    The model runs in eval mode, but for the check of its modes, and is left as found. It costs about `30 * steps`
    gradients per sample, and `queries` forward passes for each that the black-box attack does not break. A check whose
    premise does not hold for this model or threat says so and decides nothing; one that ends with an error is a failed
    one. Samples for which the model gives NaN are one too, and the other checks are of the rest.

    Args:
        model: maps inputs to logits `(B, K)`, or dense ones `(B, K, *S)` for the checks without attacks.
        x: clean inputs, shape `(B, ...)`; a hundred or more, for the comparisons to have something to compare.
        labels: class indices `(B,)`, or dense `(B, *S)`.
        threat: the threat model of the evaluation.
        steps: of the weaker attack in every comparison.
        queries: of the black-box attack of the library. Some masked models resist hundreds and not thousands.
        black_box: attack without gradients, `(model, x, labels) -> x_adv`; None means `square`, and for threats other
            than `Linf`, `L2` and `L1` no such check.
        transfer_from: another model for the same data, whose adversarial inputs are tried on this one; None leaves
            that check out.
        level: largest probability with which an honest model fails each of the comparisons, of which there are seven.
        seed: of the noise of the attacks.

    Returns:
        A tuple of `Check`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the model does not return a tensor of logits.
        ValueError: if there is no sample, shapes do not fit, or labels are out of range.

    Source:
        Athalye et al. 2018, Sec. 3.1; Carlini et al. 2019, Sec. 5.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.75], [0.375], [0.125]]), torch.tensor([0, 0, 1])
        >>> noise = functools.partial(pgd, threat=Linf(0.25), steps=1, step_size=1e-6)  # asks for next to nothing
        >>> [check.name for check in sanity_checks(model, x, labels, Linf(0.25), black_box=noise) if not check.passed]
        []
        >>> rounded = lambda x: model((4 * x).round() / 4)
        >>> [check.name for check in sanity_checks(rounded, x, labels, Linf(0.25), black_box=noise) if not check.passed]
        ['gradients', 'whole_box']
    """
    _check_call(model, x, labels, threat, steps, queries, black_box, transfer_from, level, seed)
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = x.detach().clone(), labels.detach().clone()
        found = [_guarded("modes", check_modes, model), _guarded("inputs", check_inputs, x, threat)]
        found.append(_guarded("normalization", check_normalization, model, x, threat=threat))
        with lent("sanity_checks", model) as borrowed, in_step(borrowed) as f:
            outputs = _outputs(f, x)
            check_outputs("sanity_checks", outputs, labels, others="other tasks are for `evaluate` with a `score`")
            labels = labels.long()
            defined = ~rows(outputs).isnan().any(dim=1)
            if not bool(defined.all()):
                found.append(_check_defined(defined))
                if not bool(defined.any()):
                    return tuple(found)
                x, labels, outputs, threat = x[defined], labels[defined], outputs[defined], select(threat, defined)
            found.append(_guarded("deterministic", check_deterministic, f, x))
            found.append(_guarded("batches", check_batches, f, x))
            found.append(_guarded("probabilities", check_probabilities, f, x))
            found.append(_guarded("ties", check_ties, f, x, level=level))
            found.append(_guarded("gradients", check_gradients, f, x, labels, threat=threat, level=level))
            if not found[1].passed:  # attacks refuse such inputs
                return tuple(found)
            if labels.ndim > 1:
                return (*found, Check.without_premise("attacks", "the comparisons of attacks are about classes"))
            if getattr(threat, "eps", None) is None:
                reason = f"the comparisons of attacks need a step size, and {type(threat).__name__} has no `eps`"
                return (*found, Check.without_premise("attacks", reason))
            right = ~misclassified(outputs, labels)
            if not bool(right.any()):
                return tuple(found)
            sample = _Sample(f, x[right], labels[right], select(threat, right), steps=steps, level=level, seed=seed)
            found.extend(sample.checks(queries, black_box, transfer_from))
    return tuple(found)


class _Sample:
    """Samples that a model gets right, and attacks of several strengths on them."""

    def __init__(
        self, model: Model, x: Tensor, labels: Tensor, threat: Threat, *, steps: int, level: float, seed: int
    ) -> None:
        self.model, self.x, self.labels, self.threat = model, x, labels, threat
        self.steps, self.level, self.seed = steps, level, seed

    def checks(self, queries: int, black_box: Attack | None, transfer_from: Model | None) -> Iterator[Check]:
        """The comparisons of attacks."""
        steps, attacks = self.steps, self._attacks(self.model, self.threat)
        compare = functools.partial(check_stronger, level=self.level)
        broken: dict[str, Tensor | Exception] = {"base": _or_error(lambda: attacks.broken(steps))}
        for name, strong, names in (
            ("more_steps", lambda: attacks.broken(5 * steps), (f"PGD-{5 * steps}", f"PGD-{steps}")),
            ("restarts", lambda: attacks.broken(steps, restarts=5), ("five restarts", "one start")),
            ("larger_eps", self._wider, ("twice the budget", "the budget")),
        ):
            broken[name] = _or_error(strong)
            yield _comparison(compare, name, broken[name], broken["base"], names)
        broken["margin"] = _or_error(lambda: attacks.broken(5 * steps, loss=margin))
        entropy, difference = broken["more_steps"], broken["margin"]
        yield _guarded(
            "losses", lambda: check_losses(_mask(entropy), _mask(difference), level=self.level, steps=5 * steps)
        )
        yield _guarded(
            "whole_box", check_whole_box, self.model, self.x, self.labels, self.threat,
            steps=5 * steps, level=self.level, seed=self.seed,
        )  # fmt: skip
        del broken["larger_eps"]
        worked = [one for one in broken.values() if isinstance(one, Tensor)]
        if not worked:  # said above, for each
            return
        white = torch.stack(worked).any(dim=0)
        own, name = black_box or self._square(queries), "an attack without gradients"
        if own is not None:
            if black_box is None:
                name = f"Square with {queries} queries"
            yield _guarded("black_box", lambda: check_alone(
                "black_box", white, self._by(own), names=("white-box attacks", name), level=self.level))  # fmt: skip
        if transfer_from is not None:
            yield _guarded("transfer", lambda: check_alone(
                "transfer", white, self._moved(transfer_from),
                names=("white-box attacks", "attacks on another model"), level=self.level))  # fmt: skip

    def _attacks(self, model: Model, threat: Threat) -> "_Attacks":
        return _Attacks(with_gradient(model), self.x, self.labels, threat, seed=self.seed)

    def _wider(self) -> Tensor:
        return self._attacks(self.model, self.threat.scaled(2.0)).broken(self.steps)

    def _by(self, attack: Attack) -> Tensor:
        found = _points(attack(self.model, self.x.clone(), self.labels.clone()))  # which an attack may write to
        _check.same_shape("sanity_checks", x=self.x, **{"black_box(model, x, labels)": found})
        return _broken(self.model, found, self.labels)

    def _moved(self, source: Model) -> Tensor:
        with lent("sanity_checks", source) as borrowed, in_step(borrowed) as g:
            points = self._attacks(g, self.threat).points(5 * self.steps)
        return _broken(self.model, points, self.labels)

    def _square(self, queries: int) -> Attack | None:
        """The black-box attack of the library, where it knows the norm."""
        if not is_ball(self.threat):
            return None
        shape, threat = self.x.shape, as_ball("sanity_checks", self.threat)

        def attack(model: Model, x: Tensor, labels: Tensor) -> Tensor:
            noise = SampleGenerator(self.seed, torch.arange(len(x), device="cpu"))
            image = x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)
            found: Tensor = square(
                lambda images: model(images.reshape(-1, *shape[1:])),
                image,
                labels,
                threat if x.ndim == 4 else _in_one_row(threat, x),
                queries=queries,
                generator=noise,
            )
            return found.reshape(x.shape)

        return attack


def _in_one_row(threat: Linf | L2 | L1, x: Tensor) -> Linf | L2 | L1:
    """The same ball for inputs that are laid out as images of one row."""

    def laid_out(entries: Any) -> Any:
        over_entries = isinstance(entries, Tensor) and entries.ndim > 1
        return entries.expand_as(x).reshape(len(x), 1, 1, -1) if over_entries else entries

    low, high = threat.bounds
    return dataclasses.replace(threat, eps=laid_out(threat.eps), bounds=(laid_out(low), laid_out(high)))


def check_whole_box(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, steps: int = 50, level: float = 0.01, seed: int = 0
) -> Check:
    """An attack that may change everything breaks everything: with the budget of the whole box, about 0 % remain.

    Left out are threats that cannot reach every point, patches and masks, and models that give one class to all inputs
    and to a few dozen points of the box: nothing shows that there is another. About 0 % is 1 %: the check fails when as
    many samples remain as would with a chance below `level` if each did with a probability of 1 %. PGD runs on the
    cross entropy and on the margin.

    Args:
        model: maps inputs to logits.
        x: clean inputs that the model gets right.
        labels: class indices.
        threat: a threat model; it is scaled until it reaches every point of the box.
        steps: of PGD.
        level: largest probability with which an honest model fails.
        seed: of the noise of the attacks.

    Returns:
        A `Check`; its value is the share of samples that remain.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.875], [0.375]]), torch.tensor([0, 0])
        >>> check_whole_box(model, x, labels, Linf(0.03)).value
        0.0
        >>> check_whole_box(lambda x: model(x.detach()), x, labels, Linf(0.03)).passed
        False
    """
    everything = whole_box(threat, x)
    if not _reaches(everything, x):
        return Check.without_premise("whole_box", "no budget of this threat reaches every point of the box")
    if not _knows_two_classes(model, x, everything, seed):
        return Check.without_premise("whole_box", "the model gives one class to all inputs and points of the box tried")
    attacks = _Attacks(with_gradient(model), x, labels, everything, seed=seed)
    left = int((~(attacks.broken(steps) | attacks.broken(steps, loss=margin))).sum())
    passed = binomial_tail(left, len(x), Fraction(1, 100)) >= level
    return Check(
        "whole_box", passed, left / len(x),
        f"{left} of {len(x)} samples withstand an attack that may change everything; at most 1 % should",
        "" if passed else MASKING,
        "" if passed else STRONGER,
    )  # fmt: skip


class _Attacks:
    """PGD of several strengths on the same samples."""

    def __init__(self, model: Model, x: Tensor, labels: Tensor, threat: Threat, *, seed: int) -> None:
        self.model, self.x, self.labels, self.threat = model, x, labels, threat
        self.noise = SampleGenerator(seed, torch.arange(len(x), device="cpu"))

    def points(self, steps: int, *, restart: int = 0, loss: PerSampleLoss = cross_entropy) -> Tensor:
        """Adversarial inputs."""
        noise = self.noise.fork(restart)
        return _points(
            pgd(self.model, self.x, self.labels, self.threat, steps=steps, loss=loss, keep="best", generator=noise)
        )

    def broken(self, steps: int, *, restarts: int = 1, loss: PerSampleLoss = cross_entropy) -> Tensor:
        """Which samples break."""
        points = (self.points(steps, restart=restart, loss=loss) for restart in range(restarts))
        return torch.stack([_broken(self.model, one, self.labels) for one in points]).any(dim=0)


def _reaches(threat: Threat, x: Tensor) -> bool:
    """Whether a threat holds points on the other side of the box in every entry at once."""
    low, high = (
        torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        for bound in getattr(threat, "bounds", (float(x.min()), float(x.max())))
    )
    # Where the box is infinite, far out will do, which half precision still holds.
    across = torch.where(x - low > high - x, low.clamp_min(-1e4), high.clamp_max(1e4)).to(x.dtype)
    reached = threat.project(across, x)
    return bool(((reached - across).abs() <= 1e-3 * (across - x).abs()).all())


def _knows_two_classes(model: Model, x: Tensor, everything: Threat, seed: int) -> bool:
    """Whether the model gives different classes to the inputs, or to points of the box: then all can be broken."""
    noise = SampleGenerator(seed, torch.arange(len(x), device=x.device))
    points = itertools.chain([x], *(far_and_wide(x, everything, noise.fork(number)) for number in range(3)))
    classes = (_outputs(model, point.to(x.dtype)).argmax(dim=1) for point in points)
    first = None
    for found in classes:
        first = found[:1] if first is None else first
        if bool((found != first).any()):
            return True
    return False


def _points(found: Tensor | Verdict) -> Tensor:
    return found.x_adv if isinstance(found, Verdict) else found


def _broken(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    return misclassified(_outputs(model, x), labels)


def _outputs(model: Model, x: Tensor) -> Any:
    with torch.no_grad():
        return asked("sanity_checks", model, x)


def _check_defined(defined: Tensor) -> Check:
    """Outputs with NaN, of which the other checks know nothing to say."""
    count = int((~defined).sum())
    return Check(
        "outputs", False, count / len(defined), f"the model gives NaN for {count} of {len(defined)} inputs",
        "a division by zero, the logarithm of a negative number or an overflow in the model",
        "find the first layer that gives NaN; the other checks are of the other samples alone",
    )  # fmt: skip


def _guarded(name: str, check: Callable[..., Check], *arguments: Any, **options: Any) -> Check:
    """A check; what ends it is its result."""
    try:
        return check(*arguments, **options)
    except Exception as error:
        return Check.stopped(name, error)


def _or_error(attack: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return attack()
    except Exception as error:  # raised again by the checks that need the attack, and by no other
        return error


def _mask(found: Tensor | Exception) -> Tensor:
    if isinstance(found, Exception):
        raise found
    return found


def _comparison(
    compare: Callable[..., Check],
    name: str,
    strong: Tensor | Exception,
    weak: Tensor | Exception,
    names: tuple[str, str],
) -> Check:
    return _guarded(name, lambda: compare(name, _mask(strong), _mask(weak), names=names))


def _check_call(
    model: Any, x: Any, labels: Any, threat: Any, steps: Any, queries: Any, black_box: Any, transfer_from: Any,
    level: Any, seed: Any,
) -> None:  # fmt: skip
    _check.model("sanity_checks", model)
    if transfer_from is not None:
        _check.model("sanity_checks", transfer_from, name="transfer_from")
    if black_box is not None:
        _check.attack("sanity_checks", "`black_box`", black_box)
    _check.floating("sanity_checks", x=x)
    _check.tensor("sanity_checks", "labels", labels)
    if labels.ndim < 2:
        _check.labels("sanity_checks", labels, x=x)
    if not len(x):
        raise ValueError("sanity_checks: `x` holds no sample.")
    check_threat("sanity_checks", threat)
    _check.count("sanity_checks", "steps", steps)
    _check.count("sanity_checks", "queries", queries)
    _check.number("sanity_checks", "level", level, above=0.0, below=1.0)
    _check.integer("sanity_checks", "seed", seed)
