"""What tells one model, one sample, one attack from another, as short texts."""

import ctypes
import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at._wrappers import bare


def model_fingerprint(model: Any) -> str:
    """Hash of a model: of its structure, weights and buffers if it is a module.

    Wrappers for distributed training and compilation are looked through. Of any other callable the code and
    what it holds is hashed.

    Args:
        model: a module or any callable.

    Returns:
        `"sha256:"` and 16 hexadecimal digits.

    Examples:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> model_fingerprint(a) == model_fingerprint(b)
        False
        >>> _ = b.load_state_dict(a.state_dict())
        >>> model_fingerprint(a) == model_fingerprint(b)
        True
    """
    if not isinstance(model, nn.Module):
        return _hash(describe(model).encode())
    module = bare(model)
    parts = [f"{type(module).__module__}.{type(module).__qualname__}\n{_without_addresses(repr(module))}".encode()]
    for name, value in sorted(module.state_dict().items()):
        parts += [name.encode(), _bytes(value) if isinstance(value, Tensor) else repr(value).encode()]
    return _hash(*parts)


def sample_fingerprints(x: Tensor, labels: Tensor) -> list[str]:
    """Hash of each sample: of its input and its label.

    Args:
        x: inputs, shape `(B, ...)`.
        labels: class indices `(B,)`.

    Returns:
        `B` texts of 16 hexadecimal digits.

    Examples:
        >>> first, second, third = sample_fingerprints(torch.tensor([[0.5], [0.5], [0.5]]), torch.tensor([0, 1, 0]))
        >>> first == second, first == third
        (False, True)
    """
    own = x.detach().cpu()
    pairs = zip(own, labels.tolist(), strict=True)
    return [_hash(_bytes(one), str(label).encode()).removeprefix("sha256:") for one, label in pairs]


def data_fingerprint(samples: Sequence[str]) -> str:
    """Hash of a data set, from those of its samples in order; how it was cut into batches does not matter."""
    return _hash(*(sample.encode() for sample in samples))


def describe(value: Any) -> str:
    """A text that says what a setting is: equal for equal settings, also in another process.

    Args:
        value: an attack or one of its arguments.

    Returns:
        For partial functions the call, for functions the name (with a hash of the code for those from outside this
        library), for tensors a hash, for others their `repr` without addresses.

    Examples:
        >>> describe(functools.partial(pgd, threat=Linf(8 / 255), steps=20))
        'pgd(threat=Linf(eps=8/255), steps=20)'
    """
    return _described(value, ())


def _described(value: Any, within: tuple[Any, ...]) -> str:
    """The text of a value that stands within some functions, which may hold themselves."""
    part = functools.partial(_described, within=within)
    if isinstance(value, functools.partial):
        given = [part(one) for one in value.args]
        given += [f"{name}={part(one)}" for name, one in value.keywords.items()]
        return f"{part(value.func)}({', '.join(given)})"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {_hash(_bytes(value))}"
    if isinstance(value, torch.Generator):
        return f"Generator(seed={value.initial_seed()})"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {model_fingerprint(value)}"
    if inspect.ismethod(value):
        return f"{part(value.__self__)}.{value.__name__}"
    if inspect.isfunction(value):
        return _function(value, within)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {part(one)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        held = ", ".join(part(one) for one in value)
        return f"[{held}]" if isinstance(value, list) else f"({held})"
    if isinstance(value, set | frozenset):  # in an order that is the same in every process
        return "{" + ", ".join(sorted(part(one) for one in value)) + "}"
    text = _without_addresses(repr(value))
    if dataclasses.is_dataclass(value):  # a repr may leave tensors out
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        text += "".join(f" {part(one)}" for one in fields if isinstance(one, Tensor))
    return text


def _function(function: Any, within: tuple[Any, ...]) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__.startswith("perceptual_at."):
        return str(function.__name__)
    if function in within:
        return name
    closure = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *closure]
    texts = [_described(one, (*within, function)) for one in held]
    return f"{name} {_hash(_code(function.__code__).encode(), *(text.encode() for text in texts))}"


def _code(code: Any) -> str:
    """Instructions, names and constants; functions inside are constants too."""
    constants = [_code(one) if inspect.iscode(one) else _described(one, ()) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _bytes(tensor: Tensor) -> bytes:
    own = tensor.detach().cpu().contiguous()
    head = f"{own.dtype} {tuple(own.shape)}".encode()
    return head + ctypes.string_at(own.data_ptr(), own.numel() * own.element_size()) if own.numel() else head


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"
