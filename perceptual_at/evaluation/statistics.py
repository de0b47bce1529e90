"""How sure an accuracy is, and whether two of them differ: exact tests and intervals of counts."""

import math
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._binomial import binomial_tail as binomial_tail


class Interval(NamedTuple):
    """Both ends of a confidence interval.

    Examples:
        >>> Interval(0.25, 0.75).high
        0.75
    """

    low: float
    high: float


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    r"""Wilson's interval of a share: what accuracies agree with `successes` right ones out of `n`.

    The shares $p$ whose normal score test does not reject the count,
    $|k - n p| \le z \sqrt{n p (1 - p)}$:

    $$ \frac{k + z^2/2 \pm z \sqrt{k (n - k) / n + z^2 / 4}}{n + z^2} $$

    It never leaves [0, 1], and unlike $\hat p \pm z\,\mathrm{se}$ it does not shrink to a point at 0 or `n`.

    Args:
        successes: how many, k.
        n: out of how many, at least 1.
        confidence: how often, over many test sets, the interval should hold the true share.

    Returns:
        The ends as fractions.

    Raises:
        TypeError: if a count is no integer.
        ValueError: if `n` is below 1, `successes` not in `[0, n]`, or `confidence` not inside (0, 1).

    Source:
        Wilson 1927; recommended by Brown, Cai and DasGupta 2001.

    Examples:
        >>> low, high = wilson_interval(50, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.404 0.596'
        >>> f"{wilson_interval(0, 10).high:.2f}"  # nothing found in ten does not mean never
        '0.28'
    """
    _check.count("wilson_interval", "n", n)
    _check.count("wilson_interval", "successes", successes, at_least=0, at_most=n)
    successes, n = int(successes), int(n)
    z = _quantile("wilson_interval", confidence)
    middle = (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4) / (n + z * z)
    # Rounding must not cut off the share itself at its extremes.
    low = 0.0 if successes == 0 else middle - half
    return Interval(low, 1.0 if successes == n else middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    r"""Exact two-sided p-value that two models, judged on the same samples, are equally often right.

    Samples that both get right or both get wrong say nothing. If neither is better, each of the others is a fair
    coin, so that

    $$ p = \min\Big(1,\ 2 \sum_{k=0}^{\min(a, b)} \binom{a + b}{k} 2^{-(a + b)} \Big). $$

    Args:
        only_a: samples that only the first gets right, a.
        only_b: samples that only the second gets right, b.

    Returns:
        The p-value; 1 when there is no such sample.

    Raises:
        TypeError: if a count is no integer.
        ValueError: if a count is negative.

    Source:
        McNemar 1947, with the exact binomial distribution; Dietterich 1998 on comparing classifiers.

    Examples:
        >>> mcnemar(0, 5)  # 2 / 2^5
        0.0625
        >>> mcnemar(4, 4)
        1.0
    """
    for name, value in (("only_a", only_a), ("only_b", only_b)):
        _check.count("mcnemar", name, value, at_least=0)
    only_a, only_b = int(only_a), int(only_b)
    return min(1.0, 2 * binomial_tail(max(only_a, only_b), only_a + only_b, Fraction(1, 2)))


def paired_interval(only_a: int, only_b: int, n: int, *, confidence: float = 0.95) -> Interval:
    r"""Interval of the difference of two accuracies measured on the same `n` samples, first minus second.

    With one sample more of each kind, $\tilde a = (a + 1) / (n + 2)$ and $\tilde b = (b + 1) / (n + 2)$:

    $$ \tilde a - \tilde b \pm z \sqrt{\frac{\tilde a + \tilde b - (\tilde a - \tilde b)^2}{n + 2}} $$

    Args:
        only_a: samples that only the first gets right, a.
        only_b: samples that only the second gets right, b.
        n: samples in all, at least 1.
        confidence: how often the interval should hold the true difference.

    Returns:
        The ends as fractions in [-1, 1].

    Raises:
        TypeError: if a count is no integer.
        ValueError: if counts are negative or larger than `n` together, or `confidence` is not inside (0, 1).

    Source:
        Bonett and Price 2012.

    Examples:
        >>> low, high = paired_interval(10, 10, 100)
        >>> f"{low:.3f} {high:.3f}"  # no difference, known to about nine points
        '-0.090 0.090'
    """
    _check.count("paired_interval", "n", n)
    _check.count("paired_interval", "only_a", only_a, at_least=0, at_most=n)
    _check.count("paired_interval", "only_b", only_b, at_least=0, at_most=n - only_a)
    only_a, only_b, n = int(only_a), int(only_b), int(n)
    z = _quantile("paired_interval", confidence)
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Interval(max(-1.0, a - b - half), min(1.0, a - b + half))


def mean_interval(mean: float, std: float, n: int, *, confidence: float = 0.95) -> Interval:
    r"""Interval of the mean of scores in [0, 1], from their sample mean and deviation.

    $\bar s \pm z\, s / \sqrt n$, cut to [0, 1]; everything from 0 to 1 where a single score says nothing of its spread.

    Args:
        mean: of the scores.
        std: their sample standard deviation.
        n: how many, at least 1.
        confidence: how often, over many test sets, the interval should hold the true mean.

    Returns:
        The ends.

    Raises:
        TypeError: if `n` is no integer.
        ValueError: if `n` is below 1, `mean` outside [0, 1], `std` negative, or `confidence` not inside (0, 1).

    Examples:
        >>> low, high = mean_interval(0.5, 0.1, 100)
        >>> f"{low:.4f} {high:.4f}"
        '0.4804 0.5196'
    """
    _check.count("mean_interval", "n", n)
    _check.number("mean_interval", "mean", mean, at_least=0.0, at_most=1.0)
    z = _quantile("mean_interval", confidence)
    if n == 1 or (isinstance(std, float) and std == math.inf):
        return Interval(0.0, 1.0)
    _check.number("mean_interval", "std", std, at_least=0.0)
    mean, std = float(mean), float(std)
    half = z * std / math.sqrt(n)
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def bootstrap_interval(
    values: Tensor,
    *,
    statistic: Callable[[Tensor], Tensor] | None = None,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic over samples, by drawing the samples again: the percentiles of what comes out.

    For scores that are not right or wrong, such as pixel accuracies, or that no sample has by itself, such as mIoU.

    Args:
        values: one row per sample, `(N, ...)`, e.g. scores `(N,)` or the counts `(N, K, K)` of `confusion_counts`.
        statistic: what is computed of drawn rows, a scalar; None is their mean.
        confidence: share of the drawn values inside the interval.
        draws: how often N samples are drawn, with replacement.
        seed: of the draws.

    Returns:
        Both ends, in the unit of the statistic.

    Raises:
        TypeError: if `values` is no tensor.
        ValueError: if there are no values, or a number is out of range.

    Source:
        Efron 1979; percentile interval.

    Examples:
        >>> low, high = bootstrap_interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
        >>> bool(0.2 <= low < 0.5 < high <= 0.8)
        True
        >>> bootstrap_interval(torch.full((9,), 0.5))
        Interval(low=0.5, high=0.5)
    """
    name = "bootstrap_interval"
    _check.tensor(name, "values", values)
    _check.count(name, "draws", draws)
    _check.number(name, "confidence", confidence, above=0.0, below=1.0)
    _check.count(name, "seed", seed, at_least=-(2**63))
    if statistic is not None and not callable(statistic):
        raise TypeError(f"{name}: `statistic` must be a function of drawn rows, got {type(statistic).__name__}.")
    if statistic is None and values.ndim > 1:
        raise ValueError(
            f"{name}: `values` must be one number per sample, (N,), without a `statistic`, got shape "
            f"{tuple(values.shape)}."
        )
    if not values.ndim or not len(values):
        raise ValueError(f"{name}: `values` must hold one row per sample, got shape {tuple(values.shape)}.")
    generator = torch.Generator().manual_seed(int(seed))
    values = values.detach().cpu()
    compute = statistic or (lambda some: some.double().mean(dim=0))
    rows = (torch.randint(len(values), (len(values),), generator=generator, device="cpu") for _ in range(draws))
    drawn = torch.stack([_scalar(name, compute(values[row])) for row in rows])
    tail = (1.0 - confidence) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1.0 - tail], dtype=torch.float64, device="cpu")).tolist()
    return Interval(low, high)


def _scalar(function: str, value: Any) -> Tensor:
    """What a statistic gave, as a tensor without dimensions."""
    if not (_check.is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise TypeError(f"{function}: `statistic` must give one number, got {_check.came(value)}.")
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().reshape(())


def _quantile(function: str, confidence: float) -> float:
    _check.number(function, "confidence", confidence, above=0.0, below=1.0)
    return -statistics.NormalDist().inv_cdf((1 - confidence) / 2)  # 1 + confidence may round to 2
