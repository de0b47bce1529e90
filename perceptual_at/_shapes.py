"""Samples as rows, and values per sample shaped to meet them."""

import math

import torch
from torch import Tensor

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types of labels of which older torch cannot take some."""


def rows(value: Tensor) -> Tensor:
    """One row per sample, `(B, N)`; also for samples without entries or without dimensions."""
    return value.reshape(value.shape[0], math.prod(value.shape[1:]))


def places(mask: Tensor) -> Tensor:
    """Rows where a mask holds; waits for the device."""
    return mask.nonzero().squeeze(1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Values `(n,)` shaped to broadcast along the first dimension of `like`, such as one per sample."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def lacks_variance(error: Exception) -> bool:
    """Whether a batch norm in train mode refused a batch that gives it a single value per channel."""
    return "more than 1 value per channel" in str(error)
