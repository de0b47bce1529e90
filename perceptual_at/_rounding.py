"""Rounding that never leaves a set: the arithmetic behind "inside the ball exactly"."""

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""Where tables are computed that go to the inputs' device: not every device has float64."""


def wide(*tensors: Tensor) -> torch.dtype:
    """Dtype to compute in: one that holds the tensors, and float32 at least."""
    if len(tensors) == 1 and tensors[0].dtype in (torch.float32, torch.float64):
        return tensors[0].dtype  # without asking torch, for whom that is an operation
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def common(*tensors: Tensor) -> torch.dtype:
    """Dtype of a result: one that holds the tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Products of matrices in their own dtype, also under autocast; some devices, as the meta device, have none."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def accumulator(tensor: Tensor) -> torch.dtype:
    """Dtype for sums over a sample: float64, except on devices without it."""
    kind = tensor.device.type
    if kind in ("cpu", "cuda"):  # without a question, which a compiled graph could not ask
        return torch.float64
    return torch.float64 if has_float64(kind) else torch.float32


@functools.cache
def has_float64(kind: str) -> bool:
    """Whether devices of this type compute in float64; MPS does not."""
    try:
        torch.empty(0, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def divisor(size: Tensor) -> Tensor:
    """A size to divide by: 1 where it is 0, so that what is zero stays zero."""
    return torch.where(size > 0, size, torch.ones_like(size))


def leveled(slope: Tensor) -> Tensor:
    """Slopes of logits `(B, ...)`, scaled for each sample so that the largest entry is 1.

    Attacks follow a gradient's direction, so each sample may be given a slope of its own.
    """
    return slope / divisor(slope.abs().amax(dim=tuple(range(1, slope.ndim)), keepdim=True))


def round_down(value: float, dtype: torch.dtype) -> float:
    """Largest number of `dtype` that is not above `value`."""
    if value == 0 or math.isinf(value):
        return value
    info = torch.finfo(dtype)
    _, exponent = math.frexp(value)
    spacing = max(info.eps * 2.0 ** (exponent - 1), info.smallest_normal * info.eps)
    return math.floor(value / spacing) * spacing


def add_inward(x: Tensor, delta: Tensor) -> Tensor:
    """`x + delta`, rounded so that the result is never further from `x` than `delta`."""
    total = x + delta
    back = total - x
    error = (x - (total - back)) + (delta - back)  # exact rounding error of the sum (Knuth's TwoSum)
    overshoots = (error.sign() * delta.sign()).clamp(max=0)  # -1 or 0; on CPUs much faster than choosing by a mask
    plain = total.detach()  # older torch has no derivative of `nextafter`, in no mode; that of a step is 0
    step = plain - torch.nextafter(plain, x.detach())
    return torch.addcmul(total, step, overshoots)  # a product without rounding


def cast_toward(value: Tensor, x: Tensor) -> Tensor:
    """`value` in the dtype of `x`, rounded towards `x` wherever rounding would move it away."""
    if value.dtype == x.dtype:
        return value
    rounded = value.to(x.dtype)
    center, back = x.to(value.dtype), rounded.to(value.dtype)
    beyond = torch.where(value > center, back > value, back < value)
    return torch.where(beyond, _neighbour(rounded, x), rounded)


def _neighbour(value: Tensor, target: Tensor) -> Tensor:
    """Next number of the dtype from `value` towards `target`."""
    if value.dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            stepped = torch.nextafter(value, target)
        # The derivative is that of `value`, which older torch does not know.
        return stepped + (value - value.detach()).nan_to_num() if value.requires_grad else stepped
    # Sixteen-bit floats are sign and magnitude: neighbours differ by one in their bits. Zero is its own case.
    bits = value.view(torch.int16)
    upwards = target > value
    away_from_zero = torch.where(value > 0, upwards, ~upwards)
    stepped = torch.where(away_from_zero, bits + 1, bits - 1)
    smallest = torch.where(upwards, torch.full_like(bits, 1), torch.full_like(bits, -32767))
    return torch.where(value == 0, smallest, stepped).view(value.dtype)
