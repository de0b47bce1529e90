"""Schedules that torch's learning-rate schedulers do not have. For steps at epochs take `MultiStepLR`."""

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


def _division(function: str, progress: float, factor: float, milestones: tuple[float, float]) -> float:
    """By how much the learning rate is divided so far."""
    _check.number(function, "progress", progress, at_least=0)
    _check.number(function, "factor", factor, at_least=1)
    if len(milestones) != 2:
        raise ValueError(f"{function}: `milestones` must hold two points of progress, got {milestones!r}.")
    for milestone in milestones:
        _check.number(function, "milestones", milestone, at_least=0)
    if milestones[0] > milestones[1]:
        raise ValueError(f"{function}: `milestones` must be in order, got {milestones!r}.")
    return float(factor ** sum(progress >= milestone for milestone in milestones))
