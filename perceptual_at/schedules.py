"""Schedules that torch's learning-rate schedulers do not have. For steps at epochs take `MultiStepLR`.

All are functions of the progress of training and of nothing else, so a run that goes on after a kill asks again.
"""

import math

from perceptual_at import _check


def rebat_learning_rate(
    progress: float,
    *,
    peak: float = 0.1,
    factor: float = 1.5,
    milestones: tuple[float, float] = (100, 150),
) -> float:
    r"""The learning rate of ReBAT at a point of training: two mild drops, each by `factor`.

    `peak` before the first milestone, `peak / factor` before the second, `peak / factor ** 2` after. ReBAT
    asks once per iteration, with the progress at its end: `epoch + (iteration + 1) / iterations_per_epoch`.

    Args:
        progress: epochs done, with a fractional part.
        peak: the rate at the start.
        factor: what each drop divides by: 1.5 (ReBAT, RPAT++, RAAT#), 1.7 (with its stronger attack), 4 (with
            CutMix on WideResNet-34-10).
        milestones: the two points of progress where the rate drops.

    Returns:
        The learning rate.

    Raises:
        ValueError: if `progress` is negative, `peak` not positive, `factor` below 1, or the milestones are
            not two in order.

    Source:
        PKU-ML/ReBAT (Wang et al. 2023), `--lr-schedule piecewise`.

    Examples:
        >>> [round(rebat_learning_rate(t), 4) for t in (0, 100, 150)]
        [0.1, 0.0667, 0.0444]

        With torch's scheduler, stepped after every iteration of `n` in an epoch:

        >>> import torch
        >>> optimizer, n = torch.optim.SGD([torch.zeros(1)], lr=0.1), 390
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(
        ...     optimizer, lambda step: rebat_learning_rate((step + 1) / n, peak=1.0)
        ... )
    """
    _check.number("rebat_learning_rate", "peak", peak, above=0)
    return peak / _division("rebat_learning_rate", progress, factor, milestones)


def rebat_weight(progress: float, *, factor: float = 1.5, milestones: tuple[float, float] = (100, 150)) -> float:
    """The weight of ReBAT's regulariser that grows as its learning rate falls: `(peak / rate - 1) / 2`.

    An option of ReBAT's code (`--use-reg-schedule`); by default its weight is constant.

    Args:
        progress: epochs done, with a fractional part.
        factor: what each drop of the learning rate divides by.
        milestones: the two points of progress where the rate drops.

    Returns:
        The weight: 0 before the first milestone.

    Raises:
        ValueError: as `rebat_learning_rate`.

    Source:
        PKU-ML/ReBAT (Wang et al. 2023), `--reg-schedule dependent`.

    Examples:
        >>> [rebat_weight(t) for t in (0, 100, 150)]
        [0.0, 0.25, 0.625]
    """
    return (_division("rebat_weight", progress, factor, milestones) - 1) / 2


def triangular_learning_rate(progress: float, *, total: float, peak: float = 0.2, peak_at: float = 0.5) -> float:
    r"""Up from 0 to `peak` and down to 0 in straight lines: the schedule of single-step training.

    The momentum stays what the optimiser says. The released codes of FGSM-RS, Free-AT and N-FGSM use torch's
    `CyclicLR`, which by default also moves SGD's momentum from 0.9 down to 0.8 and back.

    Args:
        progress: how far training is, in any unit; the released codes ask once per step, with the steps done.
        total: the end, in the same unit.
        peak: the highest rate.
        peak_at: where it is reached, as a share of `total`: 0.5 (FGSM-RS, N-FGSM on CIFAR-10), 0.4 (GradAlign).

    Returns:
        The learning rate; 0 beyond the end.

    Raises:
        ValueError: if `progress` is negative, `total` or `peak` not positive, or `peak_at` outside (0, 1).

    Source:
        Wong et al. 2020, released code.

    Examples:
        >>> [triangular_learning_rate(t, total=30) for t in (0, 7.5, 15, 30)]
        [0.0, 0.1, 0.2, 0.0]
    """
    name = "triangular_learning_rate"
    _check.number(name, "progress", progress, at_least=0)
    _check.number(name, "total", total, above=0)
    _check.number(name, "peak", peak, above=0)
    _check.number(name, "peak_at", peak_at, above=0, below=1)
    done = progress / total
    return peak * max(0.0, min(done / peak_at, (1 - done) / (1 - peak_at)))


def one_cycle_learning_rate(
    step: int, *, steps: int, peak: float = 0.2, warmup: float = 0.025, start: float | None = None
) -> float:
    r"""Half a cosine up to `peak` and half a cosine down to nearly 0: the schedule of training with generated images.

    The rates are those of torch's `OneCycleLR` with `pct_start=warmup`, step by step. That scheduler also cycles the
    momentum between 0.95 and 0.85 unless told `cycle_momentum=False`, so that a momentum of 0.9 is never used as set;
    here the momentum stays what the optimiser says.

    Args:
        step: which step, counted from 0. The released code of DM-Improves-AT steps once per epoch, so its "steps" are
            epochs.
        steps: how many steps there are.
        peak: the highest rate.
        warmup: share of the steps on the way up.
        start: the first rate; `peak / 25` if left out. The last one is a ten-thousandth of it.

    Returns:
        The learning rate.

    Raises:
        TypeError: if `steps` is no integer.
        ValueError: if `step` is not among the steps, `peak` or `start` is not positive, or `warmup` is outside (0, 1).

    Source:
        Wang et al. 2023 (DM-Improves-AT), released code, `cosinew`; Smith and Topin 2018 for the idea.

    Examples:
        >>> [round(one_cycle_learning_rate(t, steps=400), 4) for t in (0, 9, 399)]
        [0.008, 0.2, 0.0]
    """
    name = "one_cycle_learning_rate"
    _check.count(name, "steps", steps)
    _check.number(name, "step", step, at_least=0, at_most=steps - 1)
    _check.number(name, "peak", peak, above=0)
    _check.number(name, "warmup", warmup, above=0, below=1)
    first = peak / 25 if start is None else start
    _check.number(name, "start", first, above=0)
    top = warmup * steps - 1  # where the way up ends; with few steps before the first one
    if step <= top:
        return _cosine(first, peak, step / top if top > 0 else 1.0)
    left = steps - 1 - top
    return _cosine(peak, first / 10_000, min(1.0, (step - top) / left) if left > 0 else 1.0)


def ramped_decay(step: int, *, decay: float = 0.995, warmup: int = 0) -> float:
    r"""The decay of averaged weights that starts small and grows: early weights leave the average soon.

    $$ d_t = \min\Big( d,\ \frac{1 + t}{10 + t} \Big), \qquad t = \text{steps after the warm-up} $$

    and 0, a copy of the model, before. 0.995 is reached 1790 steps after the warm-up.

    Args:
        step: optimiser steps done.
        decay: the decay in the end, in [0, 1].
        warmup: steps during which the average is the model: 2.5 % of all in the released code.

    Returns:
        The number to pass to `ema_update` as `decay`.

    Raises:
        ValueError: if a number is negative, or `decay` outside [0, 1].

    Source:
        Wang et al. 2023 (DM-Improves-AT) and Pang et al. 2022 (SCORE), released codes; after Gowal et al. 2020.

    Examples:
        >>> [ramped_decay(step, warmup=10) for step in (9, 10, 100_000)]
        [0.0, 0.1, 0.995]
    """
    _check.number("ramped_decay", "step", step, at_least=0)
    _check.number("ramped_decay", "decay", decay, at_least=0, at_most=1)
    _check.number("ramped_decay", "warmup", warmup, at_least=0)
    after = step - warmup
    return 0.0 if after < 0 else min(decay, (1 + after) / (10 + after))


def cosine_between(step: int, *, steps: int, start: float, end: float) -> float:
    r"""A number that goes from `start` towards `end` along half a cosine.

    $$ e + \tfrac12 (s - e) \big(1 + \cos(\pi i / N)\big) $$

    With `step` counted from 0 to `steps - 1`, as ADR does for its temperature and trust, the end is not quite reached.

    Args:
        step: $i$, steps done.
        steps: $N$, steps of the whole training: epochs times batches.
        start: value at step 0.
        end: value at step N.

    Returns:
        The value.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if `step` is negative or beyond `steps`.

    Source:
        Wu et al. 2024 (ADR), released code.

    Examples:
        >>> [round(cosine_between(i, steps=4, start=2.5, end=2.0), 4) for i in range(4)]
        [2.5, 2.4268, 2.25, 2.0732]
        >>> cosine_between(4, steps=4, start=2.5, end=2.0)
        2.0
    """
    _check.count("cosine_between", "steps", steps)
    _check.number("cosine_between", "step", step, at_least=0, at_most=steps)
    _check.number("cosine_between", "start", start)
    _check.number("cosine_between", "end", end)
    return _cosine(start, end, step / steps)


def te_weight(epoch: float, *, peak: float = 300.0, start: float = 90, length: float = 60) -> float:
    r"""The weight of TE's term, which grows along a Gaussian ramp once its memory begins.

    $$ w\, e^{-5 (1 - u)^2}, \qquad u = (\text{epoch} - \text{start}) / \text{length} $$

    0 before the start, the peak after its end.

    Args:
        epoch: counted from 0.
        peak: $w$.
        start: epoch at which the ensembles begin.
        length: epochs of the ramp.

    Returns:
        The weight.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if a number is out of range.

    Source:
        Dong et al. 2022 (TE), released code.

    Examples:
        >>> [round(te_weight(epoch), 4) for epoch in (89, 90, 120, 150)]
        [0.0, 2.0214, 85.9514, 300.0]
        >>> te_weight(10, peak=1.0, start=0, length=10)
        1.0
    """
    _check.number("te_weight", "epoch", epoch, at_least=0)
    _check.number("te_weight", "peak", peak, at_least=0)
    _check.number("te_weight", "start", start, at_least=0)
    _check.number("te_weight", "length", length, above=0)
    if epoch < start:
        return 0.0
    return peak * math.exp(-5 * (1 - min((epoch - start) / length, 1.0)) ** 2)


def piat_decay(epoch: int, *, largest: float = 0.99, offset: float = 10) -> float:
    r"""How far PIAT goes back towards the weights of an epoch's start, at its end. A documented variant.

    $$ \min\Big( w_{\max}, \frac{e + 1}{e + c} \Big) $$

    That of another library's re-implementation, which nobody has checked against the paper or its code.

    Args:
        epoch: $e$, counted from 0 after the warm-up.
        largest: $w_{\max}$.
        offset: $c$.

    Returns:
        The share of the epoch's first weights, a `decay` for `ema_update`.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if a number is out of range.

    Source:
        He et al. 2023 and Liu et al. 2025 (PIAT), from a third-party re-implementation.

    Examples:
        >>> [piat_decay(epoch) for epoch in (0, 5, 5000)]
        [0.1, 0.4, 0.99]
        >>> piat_decay(1, offset=3)
        0.5
    """
    _check.number("piat_decay", "epoch", epoch, at_least=0)
    _check.number("piat_decay", "largest", largest, at_least=0.0, at_most=1.0)
    _check.number("piat_decay", "offset", offset, at_least=1)
    return min(largest, (epoch + 1) / (epoch + offset))


def _cosine(first: float, last: float, done: float) -> float:
    """Half a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def _division(function: str, progress: float, factor: float, milestones: tuple[float, float]) -> float:
    """By how much the learning rate is divided so far."""
    _check.number(function, "progress", progress, at_least=0)
    _check.number(function, "factor", factor, at_least=1)
    if not _check.is_sequence(milestones) or len(milestones) != 2:
        raise (ValueError if _check.is_sequence(milestones) else TypeError)(
            f"{function}: `milestones` must hold two points of progress, got {milestones!r}."
        )
    for milestone in milestones:
        _check.number(function, "milestones", milestone, at_least=0)
    if milestones[0] > milestones[1]:
        raise ValueError(f"{function}: `milestones` must be in order, got {milestones!r}.")
    return float(factor ** sum(progress >= milestone for milestone in milestones))
