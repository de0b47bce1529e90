"""Which modules a callable runs: the only thing about a model that has to be guessed."""

import dis
import functools
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_MOST = 2000  # things to look at; what a model is wrapped in has a handful
_LONGEST = 256  # entries of a container; data sets are longer
_NOTHING = (
    torch.Tensor, torch.device, torch.dtype, torch.Generator, types.ModuleType, str, bytes, int, float, complex,
    type(None),
)  # fmt: skip


def callable_of(model: Any) -> Any:
    """What is called for a model that is no module: an exported program as the module that it makes."""
    export = sys.modules.get("torch.export")
    return model.module() if export and isinstance(model, export.ExportedProgram) else model


def modules_of(model: Any) -> list[nn.Module]:
    """The outermost modules in a callable: itself, or what its partials, closures, attributes and containers hold.

    A name that a function looks up among the globals counts if it is a module there, or something that holds one; of a
    module of Python's, such as the user's own file of models, what the function names.
    """
    if isinstance(model, nn.Module):
        return [model]
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = deque([model])
    while waiting and len(seen) < _MOST:
        thing = waiting.popleft()
        if isinstance(thing, _NOTHING) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.append(thing)
        else:
            waiting.extend(_held(thing))
    return found


def _held(thing: Any) -> Iterator[Any]:
    """What a thing that is no module holds, nearest first."""
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, types.BuiltinMethodType):
        yield thing.__self__
    elif isinstance(thing, types.FunctionType):
        yield from _held_by_function(thing)
    elif isinstance(thing, weakref.ReferenceType):
        yield thing()
    elif isinstance(thing, Mapping):
        if len(thing) <= _LONGEST:
            yield from list(thing.values())
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        if len(thing) <= _LONGEST:
            yield from list(thing)
    else:
        yield from _held_by_object(thing)


def _held_by_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if _is_foreign(function.__module__):
        return
    yield from vars(function).values()  # also what a decorator wrapped
    names = _names(function.__code__)
    for name in names.looked_up:
        thing = function.__globals__.get(name)
        if isinstance(thing, types.ModuleType) and not _is_foreign(thing.__name__):
            yield from (vars(thing).get(attribute) for attribute in names.all)
        yield thing


def _held_by_object(thing: Any) -> Iterator[Any]:
    kind = thing if isinstance(thing, type) else type(thing)
    if kind.__module__.split(".")[0] in _OPAQUE:
        return
    if thing is not kind:
        yield from list(getattr(thing, "__dict__", {}).values())
    for base in kind.__mro__:
        if _is_foreign(base.__module__):
            continue
        for name, value in list(vars(base).items()):
            if isinstance(value, types.MemberDescriptorType) and thing is not kind:  # a slot
                yield getattr(thing, name, None)
            elif name == "__call__" or isinstance(value, nn.Module | list | tuple | dict | functools.partial):
                yield value


class _Names(NamedTuple):
    """Names in code, and those of them that are looked up among the globals."""

    all: set[str]
    looked_up: set[str]


def _names(code: types.CodeType) -> _Names:
    """The names in code, and in code inside it."""
    looked_up = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = _Names(set(code.co_names), looked_up)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            names.all.update(inner.all)
            names.looked_up.update(inner.looked_up)
    return names


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_foreign(module: str | None) -> bool:
    """Whether code is of Python, torch or this library, which keep no models among their globals."""
    package = (module or "").split(".")[0]
    return package in _FOREIGN or package in sys.stdlib_module_names


_OPAQUE = {"torch", "torchvision", "numpy", "builtins"}  # data sets, optimisers, arrays: large, and nothing to run
_FOREIGN = _OPAQUE | {"einops", "perceptual_at", "accelerate", "transformers"}


def watched(function: str, model: Callable[..., Any], x: torch.Tensor, *, known: Sequence[nn.Module]) -> Any:
    """What a callable gives, with a warning if it runs modules in train mode that are not among the known ones."""
    training: list[str] = []
    parts = {id(part) for module in known for part in module.modules()}

    def watch(frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG001
        if event == "call" and frame.f_code is _CALL:
            module = frame.f_locals["self"]
            if isinstance(module, _DIFFERENT) and module.training and id(module) not in parts:
                training.append(type(module).__name__)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        output = model(x)
    finally:
        sys.setprofile(before)
    if training:
        names = ", ".join(sorted(set(training)))
        warnings.warn(
            f"{function}: `model` runs modules in train mode that could not be found in it ({names}), so their batch "
            "norms move and their dropout draws while they are attacked; pass the module itself, or something that "
            "holds it, or put it into eval mode before.",
            stacklevel=2,
        )
    return output


_CALL = nn.Module._call_impl.__code__
_DIFFERENT = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)  # in train mode


def is_sharded(parts: Sequence[nn.Module]) -> bool:
    """Whether a part is in the hands of FSDP, of its first or second version."""
    return any(_is_sharding(kind) for kind in {type(part) for part in parts})  # type: ignore[arg-type]  # which is hashable


@functools.lru_cache(maxsize=1024)
def _is_sharding(kind: type) -> bool:
    names = {base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.distributed")}
    return not names.isdisjoint(("FullyShardedDataParallel", "FSDPModule"))


def settled(parts: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """Let every pass begin as a training step does, until each of what is given has been called.

    With `use_orig_params` and nothing to shard, the parameters of FSDP's first version are views that only a backward
    pass to parameters replaces: after input gradients alone, the next step could not write to them.
    """
    handles = [(part, getattr(part, "_handle", None)) for part in parts]
    return [
        functools.partial(_release, part.register_forward_pre_hook(_settle), part)
        for part, handle in handles
        if getattr(handle, "_use_orig_params", False) and not getattr(handle, "uses_sharded_strategy", True)
    ]


def _settle(part: Any, _: Any = None) -> None:
    part._handle._use_sharded_views()


def _release(hook: Any, part: nn.Module) -> None:
    hook.remove()
    _settle(part)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a wrapper for distributed training; a compiled module stays compiled."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def bare(model: nn.Module) -> nn.Module:
    """The user's own module, without distributed or compiled wrappers: its names carry no prefix."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
