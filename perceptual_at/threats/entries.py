"""Budgets and bounds: numbers, or tensors that broadcast over the inputs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import HOST, cast_toward, round_down, wide
from perceptual_at._shapes import per_sample

Entries = float | Tensor
Bounds = tuple[Entries, Entries]


def checked_eps(name: str, eps: Any) -> Entries:
    """A budget as it is kept: a number, or a tensor of its own with one dimension at least."""
    if isinstance(eps, Tensor):
        eps = _own(name, "eps", eps)
    if not isinstance(eps, Tensor):
        _check.number(name, "eps", eps, at_least=0.0)
        return eps if type(eps) in (int, float) else float(eps)  # NumPy's would spoil the repr
    if not bool((eps.isfinite() & (eps >= 0)).all()):
        raise ValueError(f"{name}: every `eps` must be positive and finite, or 0, got {eps}.")
    return eps


def checked_bounds(name: str, bounds: Any) -> Bounds:
    """Bounds as they are kept."""
    if not _check.is_sequence(bounds) or len(bounds) != 2:
        raise TypeError(f"{name}: `bounds` must be a pair (low, high), got {bounds!r}.")
    low, high = (_own(name, "bounds", one) if isinstance(one, Tensor) else one for one in bounds)
    for one in (low, high):
        if not isinstance(one, Tensor):
            _check_bound(name, one, bounds)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (one if isinstance(one, Tensor) else float(one) for one in (low, high))
        if not bool((_difference(low, high) >= 0).all()):  # where they are equal, nothing moves
            raise ValueError(f"{name}: `bounds` must be (low, high) with low <= high everywhere, got {bounds!r}.")
        return low, high
    if not low < high:
        raise ValueError(f"{name}: `bounds` must be numbers (low, high) with low < high, got {bounds!r}.")
    return float(low), float(high)


def width(bounds: Bounds) -> float:
    """Largest distance between the bounds of an entry."""
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return float(_difference(low, high).amax())
    return high - low


def coarseness(*values: Any) -> float:
    """Share of themselves by which the coarsest of some numbers may be rounded; a few digits of float32 at least."""
    half = any(getattr(one, "itemsize", 8) <= 2 for one in values)  # of tensors and of NumPy's numbers
    return torch.finfo(torch.bfloat16).eps if half else 1e-6


def exceeds(eps: float, bounds: Bounds, rounding: float) -> bool:
    """Whether a budget is larger than the box, by more than the rounding of budget and bounds."""
    return eps > width(bounds) * (1 + rounding) + rounding * largest_finite(bounds)


def largest_finite(bounds: Bounds) -> float:
    """Largest absolute value of bounds; 0 for those that are infinite."""
    sizes = [float(one.abs().amax()) if isinstance(one, Tensor) else abs(one) for one in bounds]
    return max(size if math.isfinite(size) else 0.0 for size in sizes)


def over(name: str, argument: str, value: Tensor, x: Tensor) -> Tensor:
    """A tensor shaped to broadcast over `x`, on its device."""
    if value.ndim == 1:
        if len(value) != x.shape[0]:
            raise ValueError(
                f"{name}: `{argument}` has {len(value)} values but `x` has {x.shape[0]} samples; there must be one "
                "for each, or one number for all."
            )
        value = per_sample(value, x)
    elif value.ndim != x.ndim or any(own not in (1, size) for own, size in zip(value.shape, x.shape, strict=True)):
        hint = ""
        if value.ndim < x.ndim and all(o in (1, s) for o, s in zip(value.shape[::-1], x.shape[::-1], strict=False)):
            hint = f" Did you mean {(*[1] * (x.ndim - value.ndim), *value.shape)}?"
        raise ValueError(
            f"{name}: `{argument}` of shape {tuple(value.shape)} must have as many dimensions as `x` of shape "
            f"{tuple(x.shape)}, each of the same size or 1; or be a number, or one for each sample.{hint}"
        )
    return value.to(x.device)


def box_over(name: str, bounds: Bounds, x: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """The bounds, rounded inwards to numbers of the dtype of `x`; tensors in the dtype to compute in."""
    low, high = bounds
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return -round_down(-low, x.dtype), round_down(high, x.dtype)
    low = _inward(name, low, x, math.inf) if isinstance(low, Tensor) else -round_down(-low, x.dtype)
    high = _inward(name, high, x, -math.inf) if isinstance(high, Tensor) else round_down(high, x.dtype)
    return torch.as_tensor(low, dtype=wide(x), device=x.device), torch.as_tensor(high, dtype=wide(x), device=x.device)


def clamped(value: Tensor, low: Entries, high: Entries) -> Tensor:
    """A tensor inside bounds, which are both numbers or both tensors."""
    return value.clamp(low, high)  # type: ignore[arg-type]  # torch has a form for each, and none for either


def per_row(value: Entries) -> bool:
    """Whether each sample of a batch has values of its own."""
    return isinstance(value, Tensor) and (value.ndim == 1 or value.shape[0] != 1)


def multipliable(bound: Entries, like: Tensor) -> Entries:
    """A bound that zero can be multiplied with, in the dtype of a tensor."""
    largest = torch.finfo(like.dtype).max / 4
    if isinstance(bound, Tensor):
        return bound.to(like.dtype).clamp(-largest, largest)
    return min(max(bound, -largest), largest)


def rows_taken(value: Entries, rows: Tensor) -> Entries:
    """The values that belong to some samples of a batch, by index or mask."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) and per_row(value) else value


def same_entries(a: Any, b: Any) -> bool:
    """Whether two fields of a threat model are equal."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_entries(*pair) for pair in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def plain_entries(value: Any) -> Any:
    """The same as numbers and nested sequences: hashable as tuples."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist())
    return tuple(plain_entries(one) for one in value) if isinstance(value, tuple) else value


def entries_text(value: Entries, *, in_255ths: bool = False) -> str:
    """A number as it would be written, also as a fraction of 255; few values of a tensor with its shape."""
    if not isinstance(value, Tensor):
        return _fraction(value, torch.float64) if in_255ths else repr(value)
    if value.ndim == 1:
        return f"<{len(value)} values>"
    shape = "x".join(map(str, value.shape))
    few = value.numel() <= 4
    shown: Sequence[float] = (value.flatten() if few else torch.stack(value.aminmax())).tolist()
    texts = [_fraction(one, value.dtype) if in_255ths else f"{one:.6g}" for one in shown]
    return f"<{shape}: {', '.join(texts)}>" if few else f"<{shape} values from {' to '.join(texts)}>"


def _own(name: str, argument: str, value: Tensor) -> Entries:
    """A copy that nobody else can write to; a number of a tensor without dimensions."""
    if not value.is_floating_point():
        raise TypeError(f"{name}: `{argument}` must be a number or floating-point numbers, got {value.dtype}.")
    return value.detach().clone() if value.ndim else float(value)


def _difference(low: Entries, high: Entries) -> Tensor:
    """How far bounds are apart, where one may be per sample and the other broadcast."""
    low, high = (
        one.double() if isinstance(one, Tensor) else torch.tensor(one, dtype=torch.float64, device=HOST)
        for one in (low, high)
    )
    most = max(low.ndim, high.ndim)
    low, high = (per_sample(one, low.new_empty((1,) * most)) if one.ndim == 1 else one for one in (low, high))
    return high - low


def _check_bound(name: str, bound: Any, bounds: Any) -> None:
    if getattr(bound, "ndim", 0):
        raise TypeError(f"{name}: `bounds` must be numbers or tensors, got {type(bound).__name__}; torch.as_tensor it.")
    if not _check.is_number(bound):
        raise ValueError(f"{name}: `bounds` must be numbers (low, high) with low < high, got {bounds!r}.")


def _inward(name: str, bound: Tensor, x: Tensor, inside: float) -> Tensor:
    """A bound over `x`, rounded towards `inside`."""
    value = over(name, "bounds", bound, x)
    value = value.to(wide(value))
    return cast_toward(value, torch.full_like(value, inside, dtype=x.dtype)).to(wide(x))


def _fraction(value: float, dtype: torch.dtype) -> str:
    """A number, in 255ths where it is a whole number of them."""
    steps = round(value * 255) if math.isfinite(value) else 0
    if steps and steps % 255 and float(torch.tensor(steps / 255, dtype=dtype, device=HOST)) == value:
        return f"{steps}/255"
    return repr(value) if dtype == torch.float64 else f"{value:.6g}"
