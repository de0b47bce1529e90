"""Argument checks with one message form: function, argument, what came, what was wanted.

They read metadata only (shapes, dtypes, devices, Python numbers), so nothing here waits for a device,
with one exception: labels that already lie in CPU memory are compared with the number of classes.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn


def tensor(function: str, name: str, value: Any) -> None:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: `{name}` must be a torch.Tensor, got {type(value).__name__}.")


def module(function: str, value: Any) -> None:
    """Require a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{function}: `model` must be a torch.nn.Module, got {type(value).__name__}.")


def floating(function: str, **tensors: Tensor) -> None:
    """Require tensors of a floating dtype with a batch dimension."""
    for name, value in tensors.items():
        tensor(function, name, value)
        if not value.is_floating_point():
            hint = " Scale images to [0, 1] first, e.g. `x.float() / 255`." if value.dtype == torch.uint8 else ""
            raise TypeError(f"{function}: `{name}` must be a floating-point tensor, got {value.dtype}.{hint}")
        if value.ndim < 1:
            raise ValueError(f"{function}: `{name}` must have a batch dimension, got a scalar tensor.")


def same_shape(function: str, **tensors: Tensor) -> None:
    """Require floating tensors of one shape and on one device; the first is the reference."""
    floating(function, **tensors)
    (first, reference), *others = tensors.items()
    for name, value in others:
        if value.shape != reference.shape:
            raise ValueError(
                f"{function}: `{name}` has shape {tuple(value.shape)} but `{first}` has shape "
                f"{tuple(reference.shape)}; the two must be equal."
            )
        same_device(function, name, value.device, first, reference.device)


def same_device(function: str, name: str, device: torch.device, other_name: str, other_device: torch.device) -> None:
    """Require that two things live on one device."""
    if device != other_device:
        raise ValueError(
            f"{function}: `{name}` is on {device} but `{other_name}` is on {other_device}; "
            "move both to the same device."
        )


def logits(function: str, **tensors: Tensor) -> None:
    """Require logits `(B, K)` of one shape with at least two classes."""
    same_shape(function, **tensors)
    name, value = next(iter(tensors.items()))
    if value.ndim != 2 or value.shape[1] < 2:
        raise ValueError(
            f"{function}: `{name}` must be logits of shape (B, K) with K >= 2 classes, got shape {tuple(value.shape)}."
        )


def labels(function: str, value: Tensor, *, classes: int | None = None, name: str = "labels", **like: Tensor) -> None:
    """Require integer class indices `(B,)` for the one tensor `like`, named as the caller knows it, on its device.

    With `classes`, also require them in range where that can be read without waiting.
    """
    ((other_name, other),) = like.items()
    batch = other.shape[0]
    tensor(function, name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"{function}: `{name}` must be integer class indices of shape ({batch},), got {value.dtype} of "
            f"shape {tuple(value.shape)}."
        )
    if value.shape != (batch,):
        raise ValueError(
            f"{function}: `{name}` must be integer class indices of shape ({batch},), got shape {tuple(value.shape)}."
        )
    same_device(function, name, value.device, other_name, other.device)
    if classes is None or batch == 0 or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        low, high = (int(extreme) for extreme in torch.aminmax(value))
    except RuntimeError:  # inside vmap, or traced: the values cannot be read
        return
    label_range(function, low, high, classes)


def targets(function: str, value: Tensor, **like: Tensor) -> None:
    """Require class indices `(B,)` or class probabilities `(B, K)` for the one tensor `like`, on its device."""
    ((other_name, other),) = like.items()
    tensor(function, "labels", value)
    if not (value.ndim == 2 and value.is_floating_point()):
        labels(function, value, classes=None, name="labels", **like)
        return
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{function}: `labels` has {value.shape[0]} rows but `{other_name}` has {other.shape[0]} samples."
        )
    same_device(function, "labels", value.device, other_name, other.device)


def label_range(function: str, low: int, high: int, classes: int, *, name: str = "labels") -> None:
    """Require labels in `[0, classes)`, given their extremes."""
    if low < 0 or high >= classes:
        raise ValueError(
            f"{function}: `{name}` must lie in [0, {classes - 1}] for {classes} classes, got values from {low} "
            f"to {high}."
        )


def mask(function: str, name: str, value: Tensor, **like: Tensor) -> None:
    """Require a boolean mask `(B,)` for the one tensor `like`, on its device."""
    ((other_name, other),) = like.items()
    batch = other.shape[0]
    tensor(function, name, value)
    if value.dtype != torch.bool or value.shape != (batch,):
        raise ValueError(
            f"{function}: `{name}` must be a boolean mask of shape ({batch},), got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )
    same_device(function, name, value.device, other_name, other.device)


def choice(function: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Require one of a few words."""
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{function}: `{name}` must be one of {words}, got {value!r}.")


def number(
    function: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Require a finite number inside an interval (open ends: `above`, `below`).

    Numbers of Python and NumPy and tensors without dimensions are numbers. What cannot be read without waiting, a
    tensor on a device or one that is being traced, is taken as it is.
    """
    if not is_number(value):
        raise TypeError(f"{function}: `{name}` must be a number, got {_shown(value)}.")
    left = f"({above}" if above is not None else f"[{at_least}" if at_least is not None else "(-inf"
    right = f"{below})" if below is not None else f"{at_most}]" if at_most is not None else "inf)"
    if (read := _read(value)) is None:
        return
    inside = (
        -math.inf < read < math.inf  # comparisons, which a traced number answers too
        and (above is None or read > above)
        and (at_least is None or read >= at_least)
        and (below is None or read < below)
        and (at_most is None or read <= at_most)
    )
    if not inside:
        raise ValueError(f"{function}: `{name}` must lie in {left}, {right}, got {read!r}.")


def count(function: str, name: str, value: Any, *, at_least: int = 1, at_most: int | None = None) -> None:
    """Require a whole number, of Python, NumPy or a tensor without dimensions, in a range."""
    integer(function, name, value)
    read = _read(value)
    if read is None:
        return
    if read < at_least or (at_most is not None and read > at_most):
        wanted = f"at least {at_least}" if at_most is None else f"in [{at_least}, {at_most}]"
        raise ValueError(f"{function}: `{name}` must be {wanted}, got {int(read)}.")


def integer(function: str, name: str, value: Any) -> None:
    """Require a whole number of any kind: of Python, NumPy, or a tensor of integers without dimensions."""
    whole = isinstance(value, numbers.Integral | torch.SymInt) or (
        isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    )
    if not (whole and is_number(value)):
        raise TypeError(f"{function}: `{name}` must be an integer, got {_shown(value)}.")


def is_number(value: Any) -> bool:
    """Whether something is one real number; truth values are none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _read(value: Any) -> Any:
    """The number, for comparing; None where reading it would wait or cannot be done."""
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return value
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        try:
            return value.item()
        except RuntimeError:  # inside vmap, or traced
            return None
    try:
        return float(value)
    except OverflowError:  # beyond all floats
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"
