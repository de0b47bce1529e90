"""Checks of what an attack is given: metadata at every call, values with one wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide
from perceptual_at.threats import L1, L2, Linf, Threat


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
    if isinstance(threat, type) or not isinstance(threat, Threat):
        given = threat.__name__ if isinstance(threat, type) else repr(threat)
        raise TypeError(f"{function}: `threat` must be a threat model such as Linf(8 / 255), got {given}.")
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


def check_ball(function: str, threat: Any) -> None:
    """Require `Linf`, `L2` or `L1` itself."""
    if type(threat) not in (Linf, L2, L1):
        raise TypeError(f"{function}: `threat` must be Linf, L2 or L1, got {threat!r}; there is no form for others.")


def check_values(
    function: str, x: Tensor, labels: Tensor, threat: Threat, start: str | Tensor
) -> tuple[int, int] | None:
    """Require finite inputs inside the bounds; give the extremes of the class indices."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not x.numel() or capturing or torch.compiler.is_compiling():
        return None
    read = [*torch.aminmax(x), *torch.aminmax(labels), *(torch.aminmax(start) if isinstance(start, Tensor) else ())]
    low, high, first, last, *start_range = torch.stack([value.to(wide(x)) for value in read]).tolist()
    for name, extremes in (("x", (low, high)), ("start", start_range)):
        if not all(math.isfinite(value) for value in extremes):
            raise ValueError(f"{function}: `{name}` contains NaN or infinite values.")
    bounds = getattr(threat, "bounds", (-math.inf, math.inf))
    tolerance = torch.finfo(x.dtype).eps * max([1.0, *(abs(bound) for bound in bounds if math.isfinite(bound))])
    if low < bounds[0] - tolerance or high > bounds[1] + tolerance:
        raise ValueError(
            f"{function}: `x` must lie in the bounds {list(bounds)} of the threat model, got values from {low:.4g} to "
            f"{high:.4g}. Inputs that were normalised must not be: put the normalisation into the model "
            "(perceptual_at.models.Normalize), or give the threat model other `bounds`."
        )
    return None if labels.is_floating_point() else (int(first), int(last))


def budget(function: str, threat: Any) -> float | Tensor:
    """The `eps` of a threat, for a step size that was left open."""
    eps = getattr(threat, "eps", None)
    if eps is None:
        raise ValueError(f"{function}: a step size must be given, because {type(threat).__name__} has no `eps`.")
    return eps if isinstance(eps, Tensor) else float(eps)


def budgets(function: str, threat: Any, x: Tensor) -> Tensor:
    """The `eps` of each sample, shape `(B,)`, in the dtype to compute in."""
    eps = budget(function, threat)
    if not isinstance(eps, Tensor):
        return x.new_full((x.shape[0],), eps, dtype=wide(x))
    if len(eps) != x.shape[0]:
        raise ValueError(
            f"{function}: `threat` has {len(eps)} values of `eps` but `x` has {x.shape[0]} samples; there must "
            "be one for each, or one number for all."
        )
    return eps.to(x.device, wide(x))


def plain(value: Tensor) -> Tensor:
    """The tensor without its history; a copy where autograd could not save it."""
    return value.clone() if value.is_inference() else value.detach()
