"""What tells one model, one sample, one attack from another, as short texts."""

import ctypes
import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import numbers
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from perceptual_at._values import tensors_of
from perceptual_at.victims.finding import bare

_PLAIN = (str, bytes, numbers.Number, type(None), enum.Enum, PurePath, torch.dtype, torch.device, range, slice)
_KNOWN = frozenset({"perceptual_at", "torch", "torchvision", "numpy", "einops", "builtins", *sys.stdlib_module_names})
_UNSAID = frozenset({"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__slots__"})


class Opaque(ValueError):
    """Something whose state cannot be read, so that two of them cannot be told apart."""


def model_fingerprint(model: Any) -> str:
    """Hash of a model: of its structure, code, weights, buffers and hooks if it is a module.

    Wrappers for distributed training and compilation are looked through. Of any other callable the code and
    what it holds is hashed. Plain attributes of modules are not: what they change shows in the outputs.

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
    return _module(model, _Path()) if isinstance(model, nn.Module) else _hash(describe(model).encode())


def sample_fingerprints(x: Tensor, labels: Tensor) -> list[str]:
    """Hash of each sample: of its input and its label.

    Args:
        x: inputs, shape `(B, ...)`.
        labels: what belongs to them, shape `(B, ...)`.

    Returns:
        `B` texts of 16 hexadecimal digits.

    Examples:
        >>> first, second, third = sample_fingerprints(torch.tensor([[0.5], [0.5], [0.5]]), torch.tensor([0, 1, 0]))
        >>> first == second, first == third
        (False, True)
    """
    own = x.detach().cpu()
    texts = (str(label).encode() for label in labels.tolist()) if labels.ndim == 1 else map(_bytes, labels)
    return [_hash(_bytes(one), text).removeprefix("sha256:") for one, text in zip(own, texts, strict=True)]


def witness(outputs: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Two numbers of each sample's outputs by which a model is known again, and how far rounding may move them.

    Args:
        outputs: what a model returned: a tensor, or a dictionary or sequence of them.
        batch: number of samples.

    Returns:
        Inner products with two fixed vectors and their tolerances, each `(batch, 2)` in float64 on the CPU.

    Examples:
        >>> found, tolerance = witness(torch.tensor([[1.0, 2.0]]), 1)
        >>> other, _ = witness(torch.tensor([[1.0, 2.1]]), 1)
        >>> bool(((found - other).abs() > tolerance).all())
        True
    """
    parts = tensors_of(outputs)
    rows = [one.detach().reshape(batch, -1).double().cpu() for one in parts if one.ndim and len(one) == batch]
    flat = torch.cat(rows, dim=1) if rows else torch.zeros(batch, 0, dtype=torch.float64, device="cpu")
    angles = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64, device="cpu")
    kinds = [torch.finfo(one.dtype).eps for one in parts if one.is_floating_point()]
    size = flat.abs().sum(dim=1, keepdim=True).nan_to_num(nan=0.0)
    tolerance = math.sqrt(max(kinds, default=0.0)) * size.clamp_min(1e-30)
    return torch.stack([flat @ angles.cos(), flat @ angles.sin()], dim=1), tolerance.expand(-1, 2)


def probe(model: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of other inputs, mirrored ones, and of the gradient there, `(B, 4)`; NaN for what a model cannot do.

    Two models may agree on clean inputs, and attacks find different things.
    """
    numbers = torch.full((len(x), 4), math.nan, dtype=torch.float64, device="cpu")
    tolerances = torch.zeros_like(numbers)
    flat = x.detach().reshape(len(x), -1)
    mirrored = (flat.amin(dim=1, keepdim=True) + flat.amax(dim=1, keepdim=True) - flat).reshape(x.shape)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = mirrored.clone().requires_grad_()
            outputs = model(own.clone())
            numbers[:, :2], tolerances[:, :2] = witness(outputs, len(x))
            parts = [one for one in tensors_of(outputs) if one.requires_grad]
            slopes = [
                torch.arange(one[0].numel(), device=one.device).cos().reshape(one[:1].shape).expand_as(one).to(one)
                for one in parts
            ]
            (gradient,) = torch.autograd.grad(parts, own, slopes)
            numbers[:, 2:], tolerances[:, 2:] = witness(gradient, len(x))
    except Exception:
        return numbers, tolerances  # what it can do stays the same
    return numbers, tolerances


def data_fingerprint(samples: Sequence[str]) -> str:
    """Hash of a data set, from those of its samples in order; how it was cut into batches does not matter."""
    return _hash(*(sample.encode() for sample in samples))


def describe(value: Any) -> str:
    """A text that says what a setting is: equal for equal settings, also in another process.

    Args:
        value: an attack or one of its arguments.

    Returns:
        For partial functions the call, for functions the name (with a hash of code, defaults and what they hold or
        refer to for those from outside this library), for tensors a hash, for objects their class and a hash of
        its code and of their state.

    Raises:
        Opaque: if the state of something cannot be read.

    Examples:
        >>> describe(functools.partial(pgd, threat=Linf(8 / 255), steps=20))
        'pgd(threat=Linf(eps=8/255), steps=20)'
    """
    return _described(value, _Path())


class _Path:
    """Where a description has got to: what it stands within, and the functions and classes it has described."""

    def __init__(self, within: tuple[int, ...] = (), texts: dict[int, tuple[Any, str]] | None = None) -> None:
        self.within, self.texts = within, {} if texts is None else texts

    def holds(self, value: Any) -> bool:
        """Whether the description stands within this value."""
        return id(value) in self.within

    def inside(self, value: Any) -> "_Path":
        """One level deeper."""
        return _Path((*self.within, id(value)), self.texts)

    def once(self, value: Any, describe_it: Callable[[Any, "_Path"], str]) -> str:
        """The text of a function or class, which many others may refer to."""
        if id(value) not in self.texts:
            self.texts[id(value)] = value, describe_it(value, self)
        return self.texts[id(value)][1]


def _described(value: Any, path: "_Path") -> str:
    """The text of a value that stands within some others, which may hold themselves."""
    if isinstance(value, _PLAIN):
        return _without_addresses(repr(value))
    if path.holds(value):
        return f"<{type(value).__name__} again>"
    part = functools.partial(_described, path=path.inside(value))
    if isinstance(value, functools.partial):
        given = [part(one) for one in value.args]
        given += [f"{name}={part(one)}" for name, one in value.keywords.items()]
        return f"{part(value.func)}({', '.join(given)})"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {_hash(_bytes(value))}"
    if isinstance(value, torch.Generator):
        return f"Generator(seed={value.initial_seed()})"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {_module(value, path.inside(value))}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{part(key)}: {part(one)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        held = ", ".join(part(one) for one in value)
        return f"[{held}]" if isinstance(value, list) else f"({held})"
    if isinstance(value, set | frozenset):  # in an order that is the same in every process
        return "{" + ", ".join(sorted(part(one) for one in value)) + "}"
    return _code_or_object(value, path)


def _code_or_object(value: Any, path: "_Path") -> str:
    part = functools.partial(_described, path=path.inside(value))
    if inspect.ismethod(value):
        return f"{part(value.__self__)}.{value.__name__} {part(value.__func__)}"
    if inspect.isfunction(value):
        return path.once(value, _function)
    if isinstance(value, type):
        return path.once(value, _class)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if inspect.isbuiltin(value) or inspect.isroutine(value):
        owner = getattr(value, "__self__", None)
        own = "" if owner is None or isinstance(owner, types.ModuleType) else f"{part(owner)}."
        return f"{own}{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__name__)}"
    if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
        inner = [getattr(value, name, None) for name in ("fget", "fset", "__func__", "func")]
        return f"{type(value).__name__}({', '.join(part(one) for one in inner if one is not None)})"
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # arrays, whose text leaves entries out
        return f"array{value.shape} {value.dtype} {_hash(value.tobytes())}"
    if dataclasses.is_dataclass(value) and _of_library(type(value)):  # a repr may leave tensors out
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return repr(value) + "".join(f" {part(one)}" for one in fields if isinstance(one, Tensor))
    return f"{type(value).__qualname__} {_hash(path.once(type(value), _class).encode(), _state(value, part).encode())}"


def _state(value: Any, part: Any) -> str:
    """What an object holds, in its dictionary, its slots, or by its own account."""
    held = dict(getattr(value, "__dict__", {}))
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    if not held and type(value).__init__ is not object.__init__:
        try:
            account = value.__reduce_ex__(4)
        except Exception as error:  # code of the user's own
            raise Opaque(
                f"the state of a {type(value).__module__}.{type(value).__qualname__} cannot be read"
            ) from error
        return str(
            part(account if isinstance(account, str) else [*account[1:3], *map(list, filter(None, account[3:5]))])
        )
    return str(part(held))


def _slots(kind: type) -> Sequence[str]:
    names = kind.__dict__.get("__slots__", ())
    return [names] if isinstance(names, str) else [name for name in names if not name.startswith("__")]


def _of_library(value: Any) -> bool:
    """Whether code comes from a package that is installed, and not from the user's own files."""
    module = getattr(value, "__module__", None) or ""
    if inspect.isfunction(value):
        place = value.__code__.co_filename
    else:
        place = "" if module == "__main__" else getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] in _KNOWN - {"__main__"} or "site-packages" in place


def _function(function: Any, path: "_Path") -> str:
    if (function.__module__ or "").startswith("perceptual_at."):
        own = _held(function) if "<locals>" in function.__qualname__ else []
        texts = [_described(one, path.inside(function)) for one in own]
        return f"{function.__name__}{' ' + _hash(*(text.encode() for text in texts)) if texts else ''}"
    name = f"{function.__module__}.{function.__qualname__}"
    if _of_library(function) and "<locals>" not in function.__qualname__:
        return name
    texts = [_described(one, path.inside(function)) for one in (*_held(function), *_globals(function))]
    return f"{name} {_hash(_code(function.__code__).encode(), *(text.encode() for text in texts))}"


def _held(function: Any) -> list[Any]:
    """Defaults and closure."""
    closure = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *closure]


def _globals(function: Any) -> Iterator[Any]:
    """What a function refers to by name in its module."""
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield function.__globals__[name]


def _names(code: Any) -> set[str]:
    inner = [_names(one) for one in code.co_consts if inspect.iscode(one)]
    return set(code.co_names).union(*inner)


def _class(kind: type, path: "_Path") -> str:
    """Name of a class, and its code where that is the user's."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _of_library(kind) or path.holds(kind):
        return name
    inside = path.inside(kind)
    own = [
        f"{key}={_described(one, inside)}"
        for key, one in sorted(vars(kind).items())
        if key not in _UNSAID and (isinstance(one, property) or not inspect.isdatadescriptor(one))
    ]
    bases = ", ".join(inside.once(base, _class) for base in kind.__bases__)
    return f"{name} {_hash(*(text.encode() for text in own))}({bases})"


def _module(module: nn.Module, path: "_Path") -> str:
    """Hash of structure, code, weights, buffers and hooks."""
    module = bare(module)
    parts = [_without_addresses(repr(module)).encode()]
    for name, part in module.named_modules():
        parts.append(f"{name} {path.once(type(part), _class)}".encode())
        replaced = vars(part).get("forward")
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values(), *part._backward_hooks.values()]
        parts += [_described(one, path).encode() for one in (replaced, *hooks) if one is not None]
    tensors = {**module.state_dict(), **dict(module.named_buffers())}
    for name, value in sorted(tensors.items()):
        parts += [name.encode(), _bytes(value) if isinstance(value, Tensor) else _described(value, path).encode()]
    return _hash(*parts)


def _code(code: Any) -> str:
    """Instructions, names and constants; functions inside are constants too."""
    constants = [_code(one) if inspect.iscode(one) else _described(one, _Path()) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _bytes(tensor: Tensor) -> bytes:
    if is_lazy(tensor):
        raise Opaque("a parameter waits for a first batch")
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.is_meta or not tensor.numel():
        return head
    try:
        plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        plain = plain.dequantize() if plain.is_quantized else plain
        own = plain.cpu().resolve_conj().resolve_neg().contiguous()
        return head + ctypes.string_at(own.data_ptr(), own.numel() * own.element_size())
    except RuntimeError as error:  # what has no memory of its own, or none of a known layout
        raise Opaque(f"the entries of a tensor of {tensor.layout} cannot be read") from error


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"
