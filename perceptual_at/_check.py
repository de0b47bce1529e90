"""Argument checks with one message form: function, argument, what came, what was wanted.

They read metadata only (shapes, dtypes, devices, Python numbers), so nothing here waits for a device,
with one exception: labels that already lie in CPU memory are compared with the number of classes.
"""

import contextlib
import functools
import inspect
import itertools
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NO_LABEL = -100
"""A label of this value at a place of a dense output is none: the place does not count. torch's `ignore_index`."""


def tensor(function: str, name: str, value: Any) -> None:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: `{name}` must be a torch.Tensor, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise TypeError(f"{function}: `{name}` must be a dense tensor, got {value.layout}; call `.to_dense()` first.")
    if value.is_nested:
        raise TypeError(f"{function}: `{name}` must be a tensor of one shape, got a nested one; pad it first.")


def flag(function: str, **values: Any) -> None:
    """Require truth values, which a text or a number in their place is not."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: `{name}` must be True or False, got {_shown(value)}.")


def path(function: str, name: str, value: Any) -> None:
    """Require the name of a file or a folder."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{function}: `{name}` must be a path, got {_shown(value)}.")


def text(function: str, **values: Any) -> None:
    """Require words."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{function}: `{name}` must be a word, got {_shown(value)}.")


def function_of_one(function: str, name: str, value: Any, what: str) -> None:
    """Require a function of something, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{function}: `{name}` must be a function of {what}, got {_shown(value)}.")


def module(function: str, value: Any) -> None:
    """Require a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{function}: `model` must be a torch.nn.Module, got {type(value).__name__}.")


def model(function: str, value: Any, *, name: str = "model") -> None:
    """Require something that turns inputs into outputs: a module with a forward pass, or any other function."""
    called(function, **{name: value})
    if isinstance(value, type):
        raise TypeError(
            f"{function}: `{name}` must be a model, got the class {value.__name__}; make one of it first, "
            f"{value.__name__}(...)."
        )
    forward = getattr(value, "forward", None) if type(value).__call__ is nn.Module.__call__ else None
    if getattr(forward, "__func__", None) is nn.Module.forward:
        raise TypeError(f"{function}: `{name}` must have a forward pass, and {type(value).__name__} has none.")


def initialised(function: str, tensors: Mapping[str, Any]) -> None:
    """Refuse parameters and buffers, by name, that have no shape before a first batch."""
    for name, value in tensors.items():
        if is_lazy(value):
            raise ValueError(
                f"{function}: the model's {name!r} is not initialised yet; run the model on one batch first."
            )


def called(function: str, **values: Any) -> None:
    """Require what can be called."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{function}: `{name}` must be callable, got {type(value).__name__}.")


def floating(function: str, **tensors: Tensor) -> None:
    """Require tensors of a floating dtype with a batch dimension."""
    for name, value in tensors.items():
        tensor(function, name, value)
        if not value.is_floating_point():
            hint = " Scale images to [0, 1] first, e.g. `x.float() / 255`." if value.dtype == torch.uint8 else ""
            raise TypeError(f"{function}: `{name}` must be a floating-point tensor, got {value.dtype}.{hint}")
        if value.dtype.itemsize < 2:
            raise TypeError(f"{function}: `{name}` must have sixteen bits at least, got {value.dtype}.")
        if value.ndim < 1:
            raise ValueError(f"{function}: `{name}` must have a batch dimension, got a scalar tensor.")


def loader(function: str, value: Any) -> Iterable[Any]:
    """Require something that gives batches; what has them by number alone gives as many as its length says."""
    if isinstance(value, Iterable):
        return value
    if not hasattr(value, "__getitem__"):  # the older way to be gone through, which ends with an IndexError
        raise TypeError(f"{function}: `loader` must give batches (x, labels), got {type(value).__name__}.")
    return itertools.islice(value, len(value)) if hasattr(value, "__len__") else value


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
    """Require logits `(B, K)`, or dense ones `(B, K, *S)`, of one shape with at least two classes."""
    same_shape(function, **tensors)
    name, value = next(iter(tensors.items()))
    if value.ndim < 2 or value.shape[1] < 2:
        one = value.ndim >= 2 and value.shape[1] == 1
        hint = " One logit z for two classes is the pair [0, z]: `torch.cat([torch.zeros_like(z), z], dim=1)`."
        raise ValueError(
            f"{function}: `{name}` must be logits of shape (B, K), or (B, K, *places), with K >= 2 classes, got shape "
            f"{tuple(value.shape)}.{hint if one else ''}"
        )


def labels(function: str, value: Tensor, *, classes: int | None = None, name: str = "labels", **like: Tensor) -> Tensor:
    """Require integer class indices `(B,)` for the one tensor `like`, named as the caller knows it, on its device.

    With `classes`, also require them in range where that can be read without waiting. Gives them as int64.
    """
    ((other_name, other),) = like.items()
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape == (*other.shape[:1], *other.shape[2:]):
        raise ValueError(
            f"{function}: `{name}` must be integer class indices of shape ({other.shape[0]},), got dense ones of shape "
            f"{tuple(value.shape)}, for which it is not defined."
        )
    value = _indices(function, name, value, other.shape[:1], other_name, other.device)
    if classes is not None and _readable(value):
        _in_range(function, name, value, classes)
    return value


def indices(function: str, value: Tensor, *, name: str = "labels", read: bool = True, **logits: Tensor) -> Tensor:
    """Require class indices `(B, *S)` for the one tensor of logits `(B, K, *S)`; gives them as int64.

    With places, `NO_LABEL` is allowed. Values are looked at only if `read`, and where that does not wait.
    """
    ((other_name, other),) = logits.items()
    value = _indices(function, name, value, (other.shape[0], *other.shape[2:]), other_name, other.device)
    if read and _readable(value):
        _in_range(function, name, value, other.shape[1])
    return value


def soft_labels(function: str, value: Tensor, *, read: bool = True, **logits: Tensor) -> Tensor:
    """Require class indices `(B, *S)` or class probabilities `(B, K, *S)` for logits `(B, K, *S)`.

    Gives indices as int64, probabilities as they are. Values are looked at as in `indices`.
    """
    ((other_name, other),) = logits.items()
    tensor(function, "labels", value)
    if not value.is_floating_point():
        return indices(function, value, read=read, **{other_name: other})  # type: ignore[arg-type]  # a tensor's name
    if value.shape != other.shape:
        raise (TypeError if value.ndim != other.ndim else ValueError)(
            f"{function}: `labels` must be integer class indices of shape {(other.shape[0], *other.shape[2:])} or "
            f"class probabilities of shape {tuple(other.shape)}, got {value.dtype} of shape {tuple(value.shape)}."
        )
    same_device(function, "labels", value.device, other_name, other.device)
    if read:
        readable_probabilities(function, value)
    return value


def readable_probabilities(function: str, value: Tensor) -> None:
    """Require floating labels to be probabilities where their values can be looked at without waiting."""
    if value.is_floating_point() and _readable(value):
        with contextlib.suppress(RuntimeError):  # inside vmap, or traced: the values cannot be read
            probabilities(function, value)


def class_table(function: str, name: str, value: Tensor, hint: str = "start with torch.zeros(K, K)") -> None:
    """Require a row of predictions for each class."""
    floating(function, **{name: value})
    if value.ndim != 2 or value.shape[0] != value.shape[1]:
        raise ValueError(
            f"{function}: `{name}` must hold the predictions of each class, of shape (K, K), got shape "
            f"{tuple(value.shape)}; {hint}."
        )


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


def row_labels(function: str, value: Tensor, *, classes: bool = True, name: str = "labels", **like: Tensor) -> None:
    """Require labels with a row per sample of the one tensor `like`, on its device; the outputs will tell the rest.

    With `classes` they are indices or probabilities, so no truth values, and floating ones have a dimension of classes.
    """
    ((other_name, other),) = like.items()
    batch = other.shape[0]
    tensor(function, name, value)
    soft = value.is_floating_point()
    if classes and (value.is_complex() or value.dtype == torch.bool or (soft and value.ndim < 2)):
        raise TypeError(
            f"{function}: `{name}` must be integer class indices of shape ({batch},) or class probabilities, got "
            f"{value.dtype} of shape {tuple(value.shape)}."
        )
    if value.shape[:1] != other.shape[:1]:
        raise ValueError(
            f"{function}: `{name}` has {len(value) if value.ndim else 'no'} rows but `{other_name}` has {batch} "
            f"samples; class indices are of shape ({batch},), got shape {tuple(value.shape)}."
        )
    same_device(function, name, value.device, other_name, other.device)


def probabilities(function: str, value: Tensor, *, name: str = "labels") -> None:
    """Require labels `(B, K, *S)` that are distributions over the classes; reads three numbers."""
    if not value.numel():
        return
    sums = value.double().sum(dim=1) if value.device.type != "mps" else value.float().sum(dim=1)
    low, least, most = torch.stack([value.min().to(sums.dtype), *torch.aminmax(sums)]).tolist()
    rounding = max(1e-3, 4 * torch.finfo(value.dtype).eps * math.sqrt(value.shape[1]))
    if not (low >= 0 and abs(least - 1) <= rounding and abs(most - 1) <= rounding):
        got = f"a smallest entry of {low:.4g} and sums from {least:.4g} to {most:.4g}"
        raise ValueError(
            f"{function}: `{name}` of a floating dtype must be class probabilities, at least 0 and of sum 1 over the "
            f"classes, got {got}. Labels of another kind (several classes at once, numbers) need a `loss` of your own."
        )


Function = TypeVar("Function", bound=Callable[..., Any])


def names_labels(function: Function) -> Function:
    """For a loss that attacks call in every step, and that does not look at labels: name those that are no classes.

    Only once torch has failed on them.
    """

    @functools.wraps(function)
    def call(logits: Any, labels: Any, *others: Any, **options: Any) -> Any:
        try:
            return function(logits, labels, *others, **options)
        except (IndexError, RuntimeError):
            for name, value in {"labels": labels, **dict(zip(("targets",), others, strict=False)), **options}.items():
                if name in ("labels", "targets"):
                    indices(function.__name__, value, name=name, logits=logits)
            raise

    return call  # type: ignore[return-value]  # with the signature of what it wraps


def dtype(function: str, name: str, value: Any) -> None:
    """Require a floating dtype, or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{function}: `{name}` must be a dtype such as torch.float32, or None, got {_shown(value)}.")


def _indices(
    function: str, name: str, value: Tensor, shape: tuple[int, ...], other_name: str, device: torch.device
) -> Tensor:
    wanted = f"must be integer class indices of shape {tuple(shape)}"
    tensor(function, name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{function}: `{name}` {wanted}, got {value.dtype} of shape {tuple(value.shape)}.")
    if value.shape != shape:
        raise ValueError(f"{function}: `{name}` {wanted}, got shape {tuple(value.shape)}.{way_to(shape, value, name)}")
    same_device(function, name, value.device, other_name, device)
    return value.long()


def way_to(shape: Sequence[int], value: Tensor, name: str) -> str:
    """How class indices come to the shape that is wanted, where their own tells what happened."""
    if value.shape == (shape[0], 1, *shape[1:]):
        return f" `{name}.squeeze(1)` has it."
    if value.ndim == len(shape) > 1 and len(value) == shape[0]:
        return " Let the model resize its logits to the labels, for example by torch.nn.functional.interpolate."
    if value.ndim == len(shape) + 1 and len(value) == shape[0] and value.shape[2:] == shape[1:]:
        return f" Of one-hot ones, `{name}.argmax(dim=1)` has it."
    return ""


def _readable(value: Tensor) -> bool:
    """Whether values can be looked at without waiting."""
    return value.numel() > 0 and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_range(function: str, name: str, value: Tensor, classes: int) -> None:
    """Require indices in range; those of places may be `NO_LABEL`."""
    try:
        known = value if value.ndim == 1 else value.where(value != NO_LABEL, value.new_zeros(()))
        low, high = (int(extreme) for extreme in torch.aminmax(known))
    except RuntimeError:  # inside vmap, or traced: the values cannot be read
        return
    label_range(function, low, high, classes, name=name)


def label_range(function: str, low: int, high: int, classes: int, *, name: str = "labels") -> None:
    """Require labels in `[0, classes)`, given their extremes."""
    if low < 0 or high >= classes:
        hint = " Classes are counted from 0." if low >= 1 and high == classes else ""
        if low == -1 or high == 255:  # what other libraries call so
            hint = f" In dense labels, {NO_LABEL} is no label."
        raise ValueError(
            f"{function}: `{name}` must lie in [0, {classes - 1}] for {classes} classes, got values from {low} "
            f"to {high}.{hint}"
        )


def mask(function: str, name: str, value: Tensor, *, places: tuple[int, ...] = (), **like: Tensor) -> None:
    """Require a boolean mask `(B,)`, or `(B, *places)`, for the one tensor `like`, on its device."""
    ((other_name, other),) = like.items()
    tensor(function, name, value)
    shapes = {tuple(other.shape[:1]), (*other.shape[:1], *places)}
    if value.dtype != torch.bool or tuple(value.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in sorted(shapes, key=len))
        raise ValueError(
            f"{function}: `{name}` must be a boolean mask of shape {wanted}, got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )
    same_device(function, name, value.device, other_name, other.device)


def attack(function: str, what: str, value: Any, *options: str) -> None:
    """Require a function of a model, inputs and labels that can be given the options and asks for nothing else."""
    if not callable(value):
        raise TypeError(
            f"{function}: {what} must be a function (model, x, labels) -> x_adv, got {type(value).__name__}."
        )
    if error := unbound(value, *options):
        given = ", ".join(["model", "x", "labels", *(f"{option}=..." for option in options)])
        raise TypeError(
            f"{function}: {what} cannot be called as attack({given}): {error}. Bind what else it needs, for example "
            "functools.partial(pgd, threat=Linf(8 / 255))."
        )


def unbound(value: Any, *options: str) -> TypeError | None:
    """What is missing or too much if something of three arguments, as an attack has, is called with some options."""
    try:
        inspect.signature(value).bind(None, None, None, **dict.fromkeys(options))
    except ValueError:  # of what has no signature
        return None
    except TypeError as error:
        return error
    return None


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

    Floats and integers of Python and NumPy and tensors without dimensions are numbers. What cannot be read without
    waiting, a tensor on a device or one that is being traced, is taken as it is.
    """
    if not is_number(value):
        exact = isinstance(value, numbers.Number) and hasattr(value, "__float__") and not isinstance(value, bool)
        hint = ", which tensors cannot be multiplied with; give float(...) of it" if exact else ""
        raise TypeError(f"{function}: `{name}` must be a number, got {_shown(value)}{hint}.")
    left = f"({above}" if above is not None else f"[{at_least}" if at_least is not None else "(-inf"
    right = f"{below})" if below is not None else f"{at_most}]" if at_most is not None else "inf)"
    if (read := _read(value)) is None:
        return
    inside = (
        not (isinstance(value, int) and abs(value) >= 2**63)  # which tensors cannot hold
        and -math.inf < read < math.inf  # comparisons, which a traced number answers too
        and (above is None or read > above)
        and (at_least is None or read >= at_least)
        and (below is None or read < below)
        and (at_most is None or read <= at_most)
    )
    if not inside:
        raise ValueError(f"{function}: `{name}` must lie in {left}, {right}, got {read!r}.")


def numbers_of(function: str, name: str, value: Any, **interval: float) -> tuple[float, ...]:
    """Require numbers inside an interval as in `number`, in a sequence, an array or a tensor; gives plain ones."""
    if isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) != 1:
        raise TypeError(f"{function}: `{name}` must be a sequence of numbers, got {_shown(value)}.")
    found = tuple(value.tolist() if isinstance(value, Tensor) else value)
    for one in found:
        number(function, name, one, **interval)
    return tuple(map(float, found))


def is_sequence(value: Any) -> bool:
    """Whether something is a tuple, a list, or what stands for one where settings are read from files; no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def names(function: str, name: str, value: Any) -> None:
    """Require a list of texts, which one text is not."""
    if not is_sequence(value) or not all(isinstance(one, str) for one in value):
        got = type(value).__name__
        if isinstance(value, Sequence) and not isinstance(value, str):
            got += f" of {', '.join(dict.fromkeys(type(one).__name__ for one in value))}"
        raise TypeError(f"{function}: `{name}` must be a list of names, got {got}.")


def count(function: str, name: str, value: Any, *, at_least: int = 1, at_most: int | None = None) -> None:
    """Require a whole number, of Python, NumPy or a tensor without dimensions, in a range."""
    integer(function, name, value)
    read = _read(value)
    if read is None:
        return
    if read < at_least or read >= 2**63 or (at_most is not None and read > at_most):
        most = 2**63 - 1 if at_most is None and read >= 2**63 else at_most
        wanted = f"at least {at_least}" if most is None else f"in [{at_least}, {most}]"
        raise ValueError(f"{function}: `{name}` must be {wanted}, got {int(read)}.")


def integer(function: str, name: str, value: Any) -> None:
    """Require a whole number of any kind: of Python, NumPy, or a tensor of integers without dimensions."""
    whole = isinstance(value, numbers.Integral | torch.SymInt) or (
        isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    )
    if not (whole and is_number(value)):
        raise TypeError(f"{function}: `{name}` must be an integer, got {_shown(value)}.")


def is_number(value: Any) -> bool:
    """Whether something is one real number that tensors can be multiplied with: no fraction, and no truth value."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    if isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):
        return False
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


def came(value: Any) -> str:
    """What came where a tensor of some shape was wanted: its shape, or what else it is."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"
