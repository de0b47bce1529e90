"""Signs that a model makes attacks fail without being robust, as values; what they mean is for the caller to say."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from perceptual_at._shapes import rows
from perceptual_at.attacks.queries import Queries
from perceptual_at.divergences import PerSampleLoss


def gives_probabilities(logits: Tensor) -> bool:
    """Whether every row is a probability distribution already."""
    nearly = 1e-5
    inside = bool((logits > -nearly).all()) and bool((logits < 1 + nearly).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < nearly).all())


def passes_differ(queries: Queries, x: Tensor, labels: Tensor, *, passes: int = 5) -> float:
    """Largest distance between the logits of equal passes, in units of their length; 0 for the same each time."""
    first, *others = (queries.logits(x, labels) for _ in range(passes))
    distances = torch.linalg.vector_norm(torch.stack(others) - first, dim=2)
    return float((distances / (torch.linalg.vector_norm(first, dim=1) + 1e-10)).amax())


def takes_gradients(model: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether the model computes gradients of its own in a forward pass, as defences that adapt to an input do."""
    seen = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG001
        code = frame.f_code
        if event == "call" and code.co_name in ("grad", "backward") and "autograd" in code.co_filename:
            seen.append(code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            model(x)
    finally:
        sys.setprofile(before)
    return bool(seen)


def zero_gradients(queries: Queries, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> Tensor:
    """Samples whose gradient is zero in every entry, boolean `(B,)`."""
    return (rows(queries.gradient(x, labels, loss).grad) == 0).all(dim=1)
