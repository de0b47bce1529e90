"""Checks of what an attack is given: metadata at every call, values with one wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide
from perceptual_at.threats import Threat, check_excess, check_threat, excess


def check_arguments(
    function: str,
    model: Any,
    x: Tensor,
    labels: Tensor,
    threat: Any,
    loss: Any,
    start: Any = "random",
    restarts: Any = 1,
    *,
    targets: Any = None,
    verdict: Any = False,
) -> None:
    """Require arguments of the right kind, shape and device; reads no values."""
    if not callable(model):
        raise TypeError(f"{function}: `model` must be callable, got {type(model).__name__}.")
    if not callable(loss):
        raise TypeError(f"{function}: `loss` must be a function (logits, labels) -> (B,), got {type(loss).__name__}.")
    _check.floating(function, x=x)
    check_threat(function, threat)
    if targets is None and not verdict:
        _check.targets(function, labels, x=x)
    else:  # success is a matter of classes
        _check.labels(function, labels, x=x)
    if targets is not None:
        _check.labels(function, targets, name="targets", x=x)
    if isinstance(start, Tensor):
        _check.same_shape(function, x=x, start=start)
    else:
        _check.choice(function, "start", start, ("random", "clean"))
    _check.count(function, "restarts", restarts)
    if restarts > 1 and not (isinstance(start, str) and start == "random"):
        raise ValueError(
            f"{function}: `restarts`={restarts} has no effect with a fixed start; pass start='random' or drop it."
        )


def check_values(
    function: str, x: Tensor, labels: Tensor, threat: Threat, start: str | Tensor
) -> tuple[int, int] | None:
    """Require finite inputs inside the bounds; give the extremes of the class indices."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not x.numel() or capturing or torch.compiler.is_compiling():
        return None
    read = [*torch.aminmax(x), *torch.aminmax(labels), *(torch.aminmax(start) if isinstance(start, Tensor) else ())]
    read = [excess(threat, x), *read]
    beyond, low, high, first, last, *start_range = torch.stack([value.to(wide(x)) for value in read]).tolist()
    for name, extremes in (("x", (low, high)), ("start", start_range)):
        if not all(math.isfinite(value) for value in extremes):
            raise ValueError(f"{function}: `{name}` contains NaN or infinite values.")
    check_excess(function, threat, x, beyond)
    return None if labels.is_floating_point() else (int(first), int(last))


def plain(value: Tensor) -> Tensor:
    """The tensor without its history; a copy where autograd could not save it."""
    return value.clone() if value.is_inference() else value.detach()
