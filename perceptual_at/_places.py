"""Places of dense outputs: which of them count, and how their values become one per sample.

Logits are `(B, K)`, or dense `(B, K, *S)` with labels `(B, *S)`. Without places every function here hands its
argument on, so that classification has no more to compute.
"""

import math

import torch
from torch import Tensor

from perceptual_at._check import NO_LABEL
from perceptual_at._shapes import per_sample, rows


def labelled(labels: Tensor) -> Tensor | None:
    """The places `(B, *S)` that have a label; None where all have: class indices `(B,)`, or class probabilities."""
    # As int64: in bytes, -100 is class 156.
    return None if labels.ndim == 1 or labels.is_floating_point() else labels.long() != NO_LABEL


def known(labels: Tensor) -> Tensor:
    """Class indices `(B, *S)` that can be looked up at every place: 0 where there is none."""
    return labels if labels.ndim == 1 else labels.clamp_min(0)


def over_places(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean `(B,)` of values `(B, *S)` over the places, or samples `(B,)`, that count; 0 where none does."""
    if counted is not None:
        counted = per_sample(counted, values).expand_as(values) if counted.ndim == 1 else counted
        values = torch.where(counted, values, torch.zeros_like(values))
    if values.ndim == 1:
        return values
    counts = max(1, math.prod(values.shape[1:])) if counted is None else rows(counted).sum(dim=1).clamp_min(1)
    total = rows(values).sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    return (total / counts).to(values.dtype)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one, `(B, *S)`."""
    index = known(labels).unsqueeze(1)
    return logits.scatter(1, index, -math.inf).amax(dim=1) - logits.gather(1, index).squeeze(1)


def doubt(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of all wrong classes together, 1 - p_y, `(B, *S)`."""
    # As the sum of the others, which keeps its digits when p_y is close to 1.
    return logits.softmax(dim=1).scatter(1, known(labels).unsqueeze(1), 0.0).sum(dim=1)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the largest logit is that of the label, `(B, *S)`; never where logits are NaN or there is no label."""
    return (logits.argmax(dim=1) == labels) & ~logits.amax(dim=1).isnan()


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Where there is a label and the prediction is another, or none, `(B, *S)`."""
    counted = labelled(labels)
    return ~right(logits, labels) if counted is None else counted & ~right(logits, labels)
