"""The one place where per-sample values become a loss."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import over_places

Reduction = Literal["mean", "sum", "none"]


def reduce(function: str, per_sample: Tensor, reduction: Reduction) -> Tensor:
    """Reduce values `(B,)`: their mean, their sum, or themselves. The mean of no samples is 0.

    Of values at places, `(B, *S)`, a sample has their mean.
    """
    _check.choice(function, "reduction", reduction, ("mean", "sum", "none"))
    per_sample = over_places(per_sample)
    if reduction == "none":
        return per_sample
    if reduction == "sum" or per_sample.shape[0] == 0:
        return per_sample.sum()
    return per_sample.mean()


def masked(per_sample: Tensor, mask: Tensor | None) -> Tensor:
    """Set the samples outside the mask to exactly 0, with zero gradient."""
    return per_sample if mask is None else torch.where(mask, per_sample, torch.zeros_like(per_sample))
