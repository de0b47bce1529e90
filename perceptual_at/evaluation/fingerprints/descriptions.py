"""Settings, models and code as short texts: equal for equal ones, also in another process.

What a value holds, and what its code refers to, is followed to the end of the user's own files; of packages that are
installed the names are enough. Each value is looked at once, so that the work is proportional to what there is.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import numbers
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from perceptual_at._values import entries_of
from perceptual_at.victims.finding import bare

_PLAIN = (str, bytes, numbers.Number, type(None), enum.Enum, PurePath, torch.dtype, torch.device, range, slice)
_WRAPPED = (property, staticmethod, classmethod, functools.cached_property)
_CODE = (types.FunctionType, functools.partial, type, nn.Module, Tensor, *_WRAPPED)
_KNOWN = frozenset({"perceptual_at", "torch", "torchvision", "numpy", "einops", "builtins", *sys.stdlib_module_names})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_UNSAID = frozenset({"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__slots__"})
_BYSTANDERS = frozenset({
    "_thread", "asyncio", "concurrent", "contextvars", "io", "_io", "logging", "loguru", "multiprocessing", "queue",
    "random", "_random", "rich", "socket", "structlog", "subprocess", "threading", "tqdm", "wandb", "weakref",
    "_weakref", "_weakrefset",
})  # fmt: skip
"""Packages whose objects code speaks to, waits for or draws from: what they are at the moment is no setting."""
_MOST = 100_000  # values in one description; a loop that would take minutes ends there
_LONGEST = 10_000  # characters of a text before its hash says as much


class Opaque(ValueError):
    """Something whose state cannot be read, so that two of them cannot be told apart."""


def describe(value: Any) -> str:
    """A text that says what a setting is: equal for equal settings, also in another process.

    Args:
        value: an attack or one of its arguments.

    Returns:
        For partial functions the call, for functions the name (with a hash of code, defaults and what they hold or
        refer to for those from outside this library), for tensors a hash, for objects their class and a hash of
        its code and of their state. Loggers, locks, random generators and their like are known by their kind.

    Raises:
        Opaque: if the state of something cannot be read, or there is no end to it.

    Examples:
        >>> describe(functools.partial(pgd, threat=Linf(8 / 255), steps=20))
        'pgd(threat=Linf(eps=8/255), steps=20)'
    """
    return _or_opaque(_described, value, _Path())


def describe_or_reason(value: Any) -> tuple[str, str]:
    """The description and an empty text, or, where there is none, the name of the class and the reason."""
    try:
        return describe(value), ""
    except Opaque as error:
        return type(value).__qualname__, str(error)


def describe_model(model: Any) -> str:
    """The same of what is attacked, less what changes while it runs and what its outputs tell anyway.

    Counters, caches and registries among the globals of its code, what the code itself rebinds, and plain attributes
    of modules and classes are left out.

    Args:
        model: a module or any callable.

    Returns:
        For modules a hash of structure, code, weights, buffers and hooks; otherwise as `describe`.

    Raises:
        Opaque: as `describe`.
    """
    path = _Path(of_model=True)
    return _or_opaque(_module if isinstance(model, nn.Module) else _described, model, path)


def hashed(*parts: bytes) -> str:
    """Hash of some parts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"


def bytes_of(tensor: Tensor) -> bytes:
    """Dtype, shape and entries, whatever the layout."""
    if is_lazy(tensor):
        raise Opaque("a parameter waits for a first batch")
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.is_meta or not tensor.numel():
        return head
    held: Any = tensor
    if is_traceable_wrapper_subclass(held):  # its numbers are those of the tensors inside
        names, _ = held.__tensor_flatten__()
        inner = (getattr(held, name) for name in names)  # beside tensors, where they lie
        return head + hashed(*(bytes_of(one) for one in inner if isinstance(one, Tensor))).encode()
    try:
        plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        plain = plain.dequantize() if plain.is_quantized else plain
        return head + entries_of(plain)
    except RuntimeError as error:  # what has no memory of its own, or none of a known layout
        raise Opaque(f"the entries of a tensor of {tensor.layout} cannot be read") from error


class _Path:
    """Where a description has got to: what it stands within, and what it has described."""

    def __init__(
        self, within: tuple[int, ...] = (), texts: dict[int, tuple[Any, str]] | None = None, *, of_model: bool = False
    ) -> None:
        self.within, self.of_model = within, of_model
        self.texts = {} if texts is None else texts

    def holds(self, value: Any) -> bool:
        """Whether the description stands within this value."""
        return id(value) in self.within

    def inside(self, value: Any) -> "_Path":
        """One level deeper."""
        return _Path((*self.within, id(value)), self.texts, of_model=self.of_model)

    def once(self, value: Any, describe_it: Callable[[Any, "_Path"], str]) -> str:
        """The text of a value, which many others may refer to; the value is kept, so that its id stays its own."""
        if id(value) not in self.texts:
            if len(self.texts) >= _MOST:
                raise Opaque(f"it holds or refers to more than {_MOST:,} things")
            text = describe_it(value, self)
            short = text if len(text) <= _LONGEST else f"{type(value).__name__} {hashed(text.encode())}"
            self.texts[id(value)] = value, short
        return self.texts[id(value)][1]


def _or_opaque(describe_it: Callable[[Any, _Path], str], value: Any, path: _Path) -> str:
    try:
        return describe_it(value, path)
    except RecursionError as error:
        raise Opaque(f"what a {type(value).__qualname__} holds is nested too deep") from error


def _described(value: Any, path: _Path) -> str:
    """The text of a value that stands within some others, which may hold themselves."""
    if isinstance(value, _PLAIN):
        return _without_addresses(repr(value))
    if path.holds(value):
        return f"<{type(value).__name__} again>"
    return path.once(value, _text)


def _text(value: Any, path: _Path) -> str:
    part = functools.partial(_described, path=path.inside(value))
    if isinstance(value, functools.partial):
        given = [part(one) for one in value.args]
        given += [f"{name}={part(one)}" for name, one in value.keywords.items()]
        return f"{part(value.func)}({', '.join(given)})"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {hashed(bytes_of(value))}"
    if isinstance(value, torch.Generator):
        return f"Generator(seed={value.initial_seed()})"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {_module(value, path.inside(value))}"
    if isinstance(value, weakref.ReferenceType):
        return f"weakref {part(value())}"
    if _is_bystander(value):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{part(key)}: {part(one)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        held = ", ".join(part(one) for one in value)
        return f"[{held}]" if isinstance(value, list) else f"({held})"
    if isinstance(value, set | frozenset):  # in an order that is the same in every process
        return "{" + ", ".join(sorted(part(one) for one in value)) + "}"
    return _code_or_object(value, path)


def _is_bystander(value: Any) -> bool:
    modules = [kind.__module__ for kind in type(value).__mro__]
    return any(module.partition(".")[0] in _BYSTANDERS or module.startswith("numpy.random") for module in modules)


def _code_or_object(value: Any, path: _Path) -> str:
    part = functools.partial(_described, path=path.inside(value))
    if inspect.ismethod(value):
        return f"{part(value.__self__)}.{value.__name__} {part(value.__func__)}"
    if inspect.isfunction(value):
        return _function(value, path)
    if isinstance(value, type):
        return _class(value, path)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if inspect.isbuiltin(value) or inspect.isroutine(value):
        wrapped = getattr(value, "__wrapped__", None)  # by lru_cache, which is no function
        owner = getattr(value, "__self__", None) if wrapped is None else wrapped
        own = "" if owner is None or isinstance(owner, types.ModuleType) else f"{part(owner)}."
        return f"{own}{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__name__)}"
    if isinstance(value, _WRAPPED):
        inner = [getattr(value, name, None) for name in ("fget", "fset", "__func__", "func")]
        return f"{type(value).__name__}({', '.join(part(one) for one in inner if one is not None)})"
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # arrays, whose text leaves entries out
        return f"array{value.shape} {value.dtype} {hashed(value.tobytes())}"
    if dataclasses.is_dataclass(value) and _of_library(type(value)):  # a repr may leave tensors out
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return repr(value) + "".join(f" {part(one)}" for one in fields if isinstance(one, Tensor))
    state = _state(value, path.inside(value))
    return f"{type(value).__qualname__} {hashed(path.once(type(value), _class).encode(), state.encode())}"


def _state(value: Any, path: _Path) -> str:
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
        return _described(
            account if isinstance(account, str) else [*account[1:3], *map(list, filter(None, account[3:5]))], path
        )
    call = inspect.getattr_static(type(value), "__call__", None)
    if path.of_model and inspect.isfunction(call):
        held = {name: one for name, one in held.items() if name not in _rebound(call.__code__)}
    return _described(held, path)


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
    return module.partition(".")[0] in _KNOWN - {"__main__"} or not _INSTALLED.isdisjoint(PurePath(place).parts)


def _function(function: Any, path: _Path) -> str:
    if (function.__module__ or "").startswith("perceptual_at."):
        own = _held_by_function(function, path) if "<locals>" in function.__qualname__ else []
        texts = [_described(one, path.inside(function)) for one in own]
        return f"{function.__name__}{' ' + hashed(*(text.encode() for text in texts)) if texts else ''}"
    name = f"{function.__module__}.{function.__qualname__}"
    if _of_library(function) and "<locals>" not in function.__qualname__:
        return name
    held = (*_held_by_function(function, path), *_globals(function, path))
    texts = [_described(one, path.inside(function)) for one in held]
    return f"{name} {hashed(_code(function.__code__).encode(), *(text.encode() for text in texts))}"


def _held_by_function(function: Any, path: _Path) -> list[Any]:
    """Defaults and closure."""
    code = function.__code__
    rebound = _rebound(code) if path.of_model else ()
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = [cell.cell_contents for name, cell in cells if name not in rebound and cell != types.CellType()]
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *closure]


def _globals(function: Any, path: _Path) -> Iterator[Any]:
    """What a function refers to by name in its module; of a model's, what is code or cannot change."""
    rebound = _rebound(function.__code__) if path.of_model else ()
    for name in sorted(_names(function.__code__) - set(rebound)):
        if name in function.__globals__:
            value = function.__globals__[name]
            yield name
            yield value if not path.of_model or isinstance(value, (*_PLAIN, *_CODE, tuple)) else type(value).__name__


def _names(code: Any) -> set[str]:
    inner = [_names(one) for one in code.co_consts if inspect.iscode(one)]
    return set(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def _rebound(code: types.CodeType) -> frozenset[str]:
    """Names that code gives new values: globals, variables of the function around it, attributes."""
    stores = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")
    own = {one.argval for one in dis.get_instructions(code) if one.opname in stores}
    return frozenset(own).union(*(_rebound(one) for one in code.co_consts if inspect.iscode(one)))


def _class(kind: type, path: _Path) -> str:
    """Name of a class, and its code where that is the user's."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _of_library(kind) or path.holds(kind):
        return name
    inside = path.inside(kind)
    own = [
        f"{key}={_described(one, inside)}"
        for key, one in sorted(vars(kind).items())
        if key not in _UNSAID
        and (isinstance(one, property) or not inspect.isdatadescriptor(one))
        and (not path.of_model or isinstance(one, _CODE))
    ]
    bases = ", ".join(inside.once(base, _class) for base in kind.__bases__)
    return f"{name} {hashed(*(text.encode() for text in own))}({bases})"


def _module(module: nn.Module, path: _Path) -> str:
    """Hash of structure, code, weights, buffers and hooks; where no outputs tell them, of plain attributes too."""
    module = bare(module)
    parts = [_without_addresses(repr(module)).encode()]
    for name, part in module.named_modules():
        parts.append(f"{name} {path.once(type(part), _class)}".encode())
        replaced = vars(part).get("forward")
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values(), *part._backward_hooks.values()]
        parts += [_described(one, path).encode() for one in (replaced, *hooks) if one is not None]
        if not path.of_model:
            parts.append(_described(_plain_attributes(part), path).encode())
    tensors = {**module.state_dict(), **dict(module.named_buffers())}
    for name, value in sorted(tensors.items()):
        parts += [name.encode(), bytes_of(value) if isinstance(value, Tensor) else _described(value, path).encode()]
    return hashed(*parts)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Those that are no parts; private ones and the mode are what passes leave behind."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, _PLAIN) and name != "training" and not name.startswith("_")
    }


def _code(code: Any) -> str:
    """Instructions, names and constants; functions inside are constants too."""
    constants = [_code(one) if inspect.iscode(one) else _described(one, _Path()) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
