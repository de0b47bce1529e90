"""Attacks of several strengths on the same samples: the stronger must break what the weaker breaks.

Where a check compares attacks, it looks at the samples that one of them breaks and the other does not. If the
stronger were at least as strong, each of these would be its own with probability one half or more; the check fails
when the binomial chance of what was seen is below `level`. An honest model thus fails each of them with a probability
of at most `level`, whatever the number of samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.freeze import Model, frozen
from perceptual_at.attacks.gradient import pgd
from perceptual_at.attacks.queries import misclassified
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
    with_gradient,
)
from perceptual_at.evaluation.statistics import binomial_tail
from perceptual_at.objectives.passes import Attack
from perceptual_at.threats import L1, L2, Linf, Threat, select

_STRONGER = (
    "report the strongest of several attacks (more steps and restarts, `margin` and `dlr` losses, black-box, transfer) "
    "and look for operations without a gradient, saturation and randomness in the model"
)


def sanity_checks(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    black_box: Attack | None = None,
    transfer_from: Model | None = None,
    level: float = 0.01,
    seed: int = 0,
) -> tuple[Check, ...]:
    """All checks of this module on some samples, cheap ones first.

    The model runs in eval mode, but for the check of its modes, and is left as found. It costs about `40 * steps`
    gradients per sample, and the queries of the black-box attack.

    Args:
        model: maps inputs to logits.
        x: clean inputs, shape `(B, ...)`; a hundred or more, for the comparisons to have something to compare.
        labels: class indices `(B,)`.
        threat: the threat model of the evaluation.
        steps: of the weaker attack in every comparison.
        black_box: attack without gradients, `(model, x, labels) -> x_adv`; None means `square` with 500 queries, and
            for other threats than `Linf`, `L2` and `L1` no such check.
        transfer_from: another model for the same data, whose adversarial inputs are tried on this one; None leaves
            that check out.
        level: largest probability with which an honest model fails one of the comparisons.
        seed: of the noise of the attacks.

    Returns:
        A tuple of `Check`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if there is no sample or shapes do not fit.

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
    _check.floating("sanity_checks", x=x)
    _check.labels("sanity_checks", labels, x=x)
    if not len(x):
        raise ValueError("sanity_checks: `x` holds no sample.")
    if not isinstance(threat, Threat) or isinstance(threat, type):
        raise TypeError(f"sanity_checks: `threat` must be a threat model such as Linf(8 / 255), got {threat!r}.")
    _check.count("sanity_checks", "steps", steps)
    _check.number("sanity_checks", "level", level, above=0.0, below=1.0)
    return tuple(_all_checks(model, x, labels, threat, steps, black_box, transfer_from, level, seed))


def _all_checks(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    black_box: Attack | None,
    transfer_from: Model | None,
    level: float,
    seed: int,
) -> Iterator[Check]:
    yield check_modes(model)
    inputs = check_inputs(x, threat)
    yield inputs
    yield check_normalization(model, x)
    with frozen(model) as f:
        yield check_deterministic(f, x)
        yield check_batches(f, x)
        yield check_gradients(f, x, labels)
        if not inputs.passed:  # attacks refuse such inputs
            return
        right = ~_broken(f, x, labels)
        if not bool(right.any()):
            return
        x, labels, threat = x[right], labels[right], select(threat, right)
        attacks = functools.partial(_Attacks, with_gradient(f), x, labels, seed=seed)
        compare = functools.partial(check_stronger, level=level)
        base = attacks(threat).broken(steps)
        longer = attacks(threat).broken(5 * steps)
        yield compare("more_steps", longer, base, names=(f"PGD-{5 * steps}", f"PGD-{steps}"))
        restarted = attacks(threat).broken(steps, restarts=5)
        yield compare("restarts", restarted, base, names=("five restarts", "one start"))
        wider = attacks(_doubled(threat)).broken(steps)
        yield compare("larger_eps", wider, base, names=("twice the budget", "the budget"))
        yield check_whole_box(f, x, labels, threat, steps=5 * steps, level=level, seed=seed)
        white = base | longer | restarted | attacks(threat).broken(5 * steps, loss=margin)
        black_box = black_box or _square(threat, seed)
        if black_box is not None:
            black = _broken(f, _points(black_box(f, x, labels)), labels)
            yield compare("black_box", white, black, names=("white-box attacks", "an attack without gradients"))
        if transfer_from is not None:
            with frozen(transfer_from) as source:
                points = _Attacks(with_gradient(source), x, labels, threat, seed=seed).points(5 * steps)
            moved = _broken(f, points, labels)
            yield compare("transfer", white, moved, names=("white-box attacks", "attacks on another model"))


def check_stronger(
    name: str,
    strong: Tensor,
    weak: Tensor,
    *,
    names: tuple[str, str] = ("the stronger", "the weaker"),
    level: float = 0.01,
) -> Check:
    r"""The attack that should be the stronger of two is so, on the same samples.

    Of the $n$ samples that only one of them breaks, $k$ are broken by the weaker. If that were at most as likely as
    the other way round, the chance of $k$ or more is $\sum_{i \ge k} \binom{n}{i} 2^{-n}$ at most; the check fails
    when this is below `level`.

    Args:
        name: of the check.
        strong: samples that the attack with more steps, restarts, budget or knowledge breaks, boolean `(B,)`, such as
            the `success` of its `Verdict`.
        weak: samples that the other one breaks.
        names: of the two attacks, for the text.
        level: largest probability with which an honest model fails.

    Returns:
        A `Check`; its value is that chance.

    Raises:
        ValueError: if a mask is not boolean or they differ in shape.

    Examples:
        >>> strong, weak = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
        >>> check_stronger("steps", strong, weak).value  # 1 / 2^8
        0.00390625
        >>> check_stronger("steps", strong, weak).passed, check_stronger("steps", strong[:6], weak[:6]).passed
        (False, True)
    """
    _check.mask("check_stronger", "strong", strong, weak=weak)
    _check.mask("check_stronger", "weak", weak, strong=strong)
    only_weak, only_strong = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    chance = binomial_tail(only_weak, only_weak + only_strong, Fraction(1, 2))
    passed = chance >= level
    return Check(
        name, passed, chance,
        f"{names[0]} broke {int(strong.sum())} and {names[1]} {int(weak.sum())} of {len(weak)}, {only_weak} of them "
        f"alone (p = {chance:.2g})",
        "" if passed else MASKING,
        "" if passed else _STRONGER,
    )  # fmt: skip


def check_whole_box(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, steps: int = 50, level: float = 0.01, seed: int = 0
) -> Check:
    """An attack that may change everything breaks everything: with the budget of the whole box, about 0 % remain.

    About 0 % is 1 %: the check fails when as many samples remain as would with a chance below `level` if each did with
    a probability of 1 %. PGD runs on the cross entropy and on the margin.

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
    attacks = _Attacks(with_gradient(model), x, labels, _whole_box(threat, x), seed=seed)
    left = int((~(attacks.broken(steps) | attacks.broken(steps, loss=margin))).sum())
    passed = binomial_tail(left, len(x), Fraction(1, 100)) >= level
    return Check(
        "whole_box", passed, left / len(x),
        f"{left} of {len(x)} samples withstand an attack that may change everything; at most 1 % should",
        "" if passed else MASKING,
        "" if passed else _STRONGER,
    )  # fmt: skip


class _Attacks:
    """PGD of several strengths on the same samples."""

    def __init__(self, model: Model, x: Tensor, labels: Tensor, threat: Threat, *, seed: int) -> None:
        self.model, self.x, self.labels, self.threat = model, x, labels, threat
        self.noise = SampleGenerator(seed, torch.arange(len(x)))

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


def _whole_box(threat: Threat, x: Tensor) -> Threat:
    """The same kind of threat, large enough to reach every point of the box."""
    low, high = getattr(threat, "bounds", (-math.inf, math.inf))
    width = high - low if math.isfinite(high - low) else float(x.max() - x.min())
    if isinstance(threat, Linf):
        return dataclasses.replace(threat, eps=width)
    if isinstance(threat, L2 | L1):
        return dataclasses.replace(threat, eps=float(threat.norm(x.new_full((1, *x.shape[1:]), width))))
    return threat.scaled(100.0)


def _doubled(threat: Threat) -> Threat:
    """Twice the budget, up to the size of the box."""
    if isinstance(threat, Linf):
        width = threat.bounds[1] - threat.bounds[0]
        eps = (2 * threat.eps).clamp_max(width) if isinstance(threat.eps, Tensor) else min(2 * threat.eps, width)
        return dataclasses.replace(threat, eps=eps)
    return threat.scaled(2.0)


def _square(threat: Threat, seed: int) -> Callable[..., Tensor] | None:
    """The black-box attack of the library, where it knows the norm."""
    if not isinstance(threat, Linf | L2 | L1):
        return None

    def attack(model: Model, x: Tensor, labels: Tensor) -> Tensor:
        noise = SampleGenerator(seed, torch.arange(len(x)))
        image = x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)
        found = square(
            lambda images: model(images.reshape(-1, *x.shape[1:])), image, labels, threat, queries=500, generator=noise
        )
        return found.reshape(x.shape)

    return attack


def _points(found: Tensor | Verdict) -> Tensor:
    return found.x_adv if isinstance(found, Verdict) else found


def _broken(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    _check.logits("sanity_checks", **{"model(x)": logits})
    return misclassified(logits, labels)
