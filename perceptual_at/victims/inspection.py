"""Signs that a model makes attacks fail without being robust, as values; what they mean is for the caller to say."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _random
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, select
from perceptual_at.victims.door import Victim

TINY = 1e-12
"""Gradients whose largest entry is below this have lost the digits that tell their direction."""


def gives_probabilities(logits: Tensor) -> bool:
    """Whether every row is a probability distribution already."""
    nearly = 1e-5
    inside = bool((logits > -nearly).all()) and bool((logits < 1 + nearly).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < nearly).all())


def passes_differ(victim: Victim, x: Tensor, *, passes: int = 5) -> float:
    """Largest distance between the logits of equal passes, in units of their length; 0 for the same each time."""
    first, *others = (victim.logits(x) for _ in range(passes))
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
            model(x.clone())
    finally:
        sys.setprofile(before)
    return bool(seen)


def zero_gradients(victim: Victim, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> Tensor:
    """Samples whose gradient is zero in every entry, boolean `(B,)`."""
    return (rows(victim.gradient(x, labels, loss).grad) == 0).all(dim=1)


def gradient_sizes(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, loss: PerSampleLoss = cross_entropy
) -> Tensor:
    """Largest entry of each sample's input gradient, `(B,)`: 0 where there is none, NaN where it is undefined.

    Scaled from the logits on, so that half precision does not make it vanish on its way.
    """
    with torch.inference_mode(False), torch.enable_grad():
        own = x.detach().clone().requires_grad_()
        raw = model(own.clone())
        if not raw.requires_grad:
            return raw.new_zeros(len(x), dtype=wide(raw))
        logits = raw.detach().to(wide(raw)).requires_grad_()
        (slope,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
        steepest = rows(slope).abs().amax(dim=1)
        unit = slope / per_sample(torch.where(steepest > 0, steepest, torch.ones_like(steepest)), slope)
        gradient = torch.autograd.grad(raw, own, unit.to(raw.dtype), allow_unused=True, materialize_grads=True)[0]
        return rows(gradient).abs().amax(dim=1).to(steepest) * steepest


def constant_outputs(model: Callable[[Tensor], Tensor], x: Tensor, threat: Threat, *, points: int = 4) -> Tensor:
    """Samples whose outputs are the same everywhere in the ball as far as random points and corners show, `(B,)`.

    Where outputs do not change there is nothing to follow, and nothing to find.
    """
    constant = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if not len(x):
        return constant
    numbers = _random.SampleGenerator(0, torch.arange(len(x), device=x.device))
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone()
        first = model(x.clone())
        digits = torch.finfo(first.dtype).eps * (1 + rows(first).abs().amax(dim=1))
        for number in range(points):
            drawn = numbers.fork(number)
            far = x + 1e3 * drawn.signs(tuple(x.shape)).to(x)
            for point in (threat.random_start(x, generator=drawn), threat.project(far, x)):
                difference = rows(model(point.to(x.dtype).clone()) - first).abs().amax(dim=1)
                constant = constant & (difference <= 4 * digits)
    return constant


def lost_gradients(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    threat: Threat | None = None,
    loss: PerSampleLoss = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Samples whose gradient is zero or undefined, and samples where it is tiny, two masks `(B,)`.

    Samples whose outputs are constant in the ball are in neither.
    """
    sizes = gradient_sizes(model, x, labels, loss)
    zero, tiny = (sizes == 0) | sizes.isnan(), (sizes > 0) & (sizes < TINY)
    suspects = zero | tiny
    if threat is not None and bool(suspects.any()):
        at = places(suspects)
        varies = torch.zeros_like(suspects)
        varies[at] = ~constant_outputs(model, x[at], select(threat, at))
        zero, tiny = zero & varies, tiny & varies
    return zero, tiny
