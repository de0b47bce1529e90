"""Values that hold tensors: compared by what they hold, copied and pickled like any other."""

import ctypes
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key")
Entry = TypeVar("Entry")


def entries_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's entries, whatever its layout in memory; torch's own way to them needs NumPy.

    Raises:
        RuntimeError: if it keeps its entries in other tensors.
    """
    own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not own.numel():
        return b""
    if not own.data_ptr():
        raise RuntimeError(f"a {type(tensor).__name__} keeps its entries elsewhere")
    return ctypes.string_at(own.data_ptr(), own.numel() * own.element_size())


class Value:
    """Base of frozen dataclasses with tensors (`eq=False`): two are equal when all their fields are."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, name), getattr(other, name)) for name in _fields(self))

    def __hash__(self) -> int:
        shapes = (
            tuple(one.shape) for one in (getattr(self, name) for name in _fields(self)) if isinstance(one, Tensor)
        )
        return hash((type(self).__qualname__, *shapes))


class FrozenDict(dict[Key, Entry]):
    """A dictionary that nobody changes."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the dictionary belongs to a value that cannot be changed; make a copy with dict(...).")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def same(a: Any, b: Any) -> bool:
    """Whether two things are equal; tensors by dtype, shape and entries, NaN being equal to NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    if type(a) is type(b) and dataclasses.is_dataclass(a) and not isinstance(a, Value | type):
        return all(same(getattr(a, name), getattr(b, name)) for name in _fields(a))
    both_undefined = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return bool(both_undefined or a == b)


def tensors_of(outputs: Any, depth: int = 4) -> list[Tensor]:
    """The tensors in what a model returned: in dictionaries, sequences, dataclasses, objects, and in each other."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if depth == 0 or isinstance(outputs, nn.Module | type):
        return []
    parts: Iterable[Any]
    if isinstance(outputs, Mapping):
        parts = outputs.values()
    elif isinstance(outputs, tuple | list):
        parts = outputs
    elif dataclasses.is_dataclass(outputs):
        parts = (getattr(outputs, name) for name in _fields(outputs))
    else:
        parts = getattr(outputs, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_of(part, depth - 1)]


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    equal = a == b
    if a.is_floating_point() or a.is_complex():
        equal = equal | (a.isnan() & b.isnan())
    return bool(torch.all(equal))


def _fields(value: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(value))
