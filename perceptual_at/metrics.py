"""Numbers to report: accuracy and the two summaries of the accuracy-robustness trade-off."""

from typing import TypeVar

import torch
from torch import Tensor

from perceptual_at import _check

Score = TypeVar("Score", float, Tensor)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Share of samples whose largest logit is that of their label.

    Args:
        logits: shape `(B, K)`.
        labels: class indices, shape `(B,)`.

    Returns:
        A scalar tensor, a fraction in [0, 1]; 0 for an empty batch.

    Raises:
        TypeError: if `labels` are no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are outside `[0, K)`.

    Examples:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
        >>> accuracy(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        tensor(1.)
    """
    _check.logits("accuracy", logits=logits)
    _check.labels("accuracy", labels, classes=logits.shape[1], logits=logits)
    correct = (logits.argmax(dim=1) == labels).float()
    return correct.sum() / max(1, correct.shape[0])


def mean_score(clean: Score, robust: Score) -> Score:
    r"""Arithmetic mean of clean and robust accuracy ("Mean" in the papers' tables).

    Args:
        clean: clean accuracy, a number or tensor, at least 0.
        robust: robust accuracy in the same unit.

    Returns:
        $(c + r) / 2$, in the unit of the arguments.

    Raises:
        TypeError: if an argument is neither a number nor a tensor.
        ValueError: if a number is negative or not finite.

    Source:
        RPAT, Sec. 5.1; RAAT, Sec. 5.1.

    Examples:
        >>> mean_score(80.0, 50.0)
        65.0
        >>> mean_score(0.8, 0.0)
        0.4
    """
    _check_scores("mean_score", clean, robust)
    return clean / 2 + robust / 2


def nrr(clean: Score, robust: Score) -> Score:
    r"""Natural-robust ratio: harmonic mean of clean and robust accuracy.

    $$ \mathrm{NRR} = \frac{2\,c\,r}{c + r} $$

    Lies between the smaller of the two and their mean, and is 0 when either is. Computed as
    $\min(c, r) \cdot 2\max(c, r) / (c + r)$, which keeps that order in floating point too.

    Args:
        clean: clean accuracy, a number or tensor, at least 0.
        robust: robust accuracy in the same unit.

    Returns:
        NRR in the unit of the arguments; 0 when both are 0.

    Raises:
        TypeError: if an argument is neither a number nor a tensor.
        ValueError: if a number is negative or not finite.

    Source:
        Gowda et al. 2024, as used in RPAT, Sec. 5.1 and RAAT, Sec. 5.1.

    Examples:
        >>> nrr(90.0, 45.0)
        60.0
        >>> nrr(0.0, 0.0)
        0.0
    """
    _check_scores("nrr", clean, robust)
    mean = mean_score(clean, robust)
    if isinstance(mean, Tensor):
        c, r = (torch.as_tensor(score, dtype=mean.dtype, device=mean.device) for score in (clean, robust))
        low, high = torch.minimum(c, r), torch.maximum(c, r)
        total = torch.where(mean > 0, mean, torch.ones_like(mean))
        return torch.minimum(low * (high / total), mean)
    low_number, high_number = sorted((clean, robust))
    return min(low_number * (high_number / mean), mean) if mean > 0 else 0.0


def _check_scores(function: str, clean: float | Tensor, robust: float | Tensor) -> None:
    for name, value in (("clean", clean), ("robust", robust)):
        if not isinstance(value, Tensor):
            _check.number(function, name, value, at_least=0.0)
