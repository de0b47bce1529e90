"""Weights on disk: safetensors with a checksum; read, also from torch's files, without executing anything."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from perceptual_at import _check
from perceptual_at._extras import extra
from perceptual_at._files import check_file, written_whole
from perceptual_at._values import entries_of
from perceptual_at.averaging import Weights
from perceptual_at.victims.finding import bare

__all__ = ["Loaded", "load_weights", "read_weights", "save_weights", "weights_checksum", "written_whole"]

PREFIXES = ("module.", "_orig_mod.")
"""What distributed wrappers and `torch.compile` put before a name, or into it where they wrap a part."""


class Loaded(NamedTuple):
    """What `load_weights` did not use."""

    ignored: list[str]
    """Names in the file that the model has no tensor of that shape for."""
    missing: list[str]
    """Names of the model that the file has no tensor of that shape for; these keep their values."""


def save_weights(path: str | os.PathLike[str], weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Weights as a safetensors file that holds its own checksum; the file is whole or not there.

    Args:
        path: where to write, usually `....safetensors`. What stood there stays until the new file is whole.
        weights: a model (also compiled or wrapped for distributed training), or tensors by name as from
            `snapshot`.

    Returns:
        The checksum: SHA-256 over names, dtypes, shapes and bytes of the tensors.

    Raises:
        TypeError: if `weights` is neither a module nor tensors by name, or `path` no path.
        ValueError: if tensors hold no values of their own (meta device, DTensor, quantised weights).
        OSError: if `path` is something other than a file, or cannot be written.
        ImportError: if safetensors, or NumPy that it writes with, is not installed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checksum = save_weights(f"{folder}/model.safetensors", nn.Linear(2, 1))
        >>> len(checksum)
        64
    """
    check_file("save_weights", "path", path)
    tensors = _tensors("save_weights", weights)
    save_file = _safetensors("save_weights").save_file
    extra("save_weights", "numpy", why="by safetensors, to write weights,")
    checksum = weights_checksum(tensors)
    with written_whole(path) as beside:
        try:
            save_file(tensors, beside, metadata={"format": "pt", "sha256": checksum})
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # whose place has moved
                raise
            raise OSError(f"save_weights: `{os.fspath(path)}` could not be written: {error}") from error
    return checksum


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> Loaded:
    """Put the weights of a file into a model, after every check has passed.

    Names are compared without what wrappers put into them (`module.`, `_orig_mod.`), on both sides. Where none is the
    same then, neither is what one side has before its names: the `model.` of Lightning, or of `models.normalized`.
    Nothing in the file is executed: files of torch are read with `weights_only=True`.

    Args:
        model: where to; its device and dtypes stay.
        path: a safetensors file, by `save_weights` or another program, whose checksum is verified if it has one; or
            a file of `torch.save` that holds tensors by name, also under a name such as `"state_dict"`, or the only
            one that does.
        strict: require that names and shapes of file and model are the same. False uses what fits by name and
            shape: weights of a network with another last layer, say.

    Returns:
        `Loaded(ignored, missing)`: what was left aside; two empty lists if `strict`. A tensor of another shape is in
        both.

    Raises:
        TypeError: if `model` is no module, `path` no path, or `strict` not True or False.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no whole file of weights (the message says what it looks like), its checksum is wrong,
            names or shapes differ and `strict`, or nothing fits; or if the model's tensors hold no values of their own
            (meta device, DTensor).
        ImportError: if safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_weights(f"{folder}/a.safetensors", {"module.bias": torch.ones(1), "mu": torch.ones(3)})
        ...     load_weights(nn.Linear(2, 1), f"{folder}/a.safetensors", strict=False)
        Loaded(ignored=['mu'], missing=['weight'])
    """
    _check.module("load_weights", model)
    _check.flag("load_weights", strict=strict)
    own = bare(model).state_dict()
    _check_held("load_weights", own)
    stored = _named_as(own, _stored("load_weights", path), path)
    fitting = [name for name in own if name in stored and stored[name].shape == own[name].shape]
    ignored, missing = sorted(stored.keys() - set(fitting)), sorted(own.keys() - set(fitting))
    if strict and ignored == missing and ignored:
        name = ignored[0]
        raise ValueError(
            f"load_weights: {name!r} has shape {tuple(stored[name].shape)} in `{path}` but {tuple(own[name].shape)} in "
            "the model; another width or number of classes? `strict=False` takes what fits."
        )
    if strict and (ignored or missing):
        raise ValueError(
            f"load_weights: `{path}` does not belong to this model: {_named('missing in the file', missing)}, "
            f"{_named('unknown to the model', ignored)}. `strict=False` takes what fits by name."
        )
    if not fitting:
        raise ValueError(
            f"load_weights: no name in `{path}` fits this model; it has {_named('names like', list(own))}, the file "
            f"{_named('names like', list(stored))}."
        )
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(stored[name])
    return Loaded(ignored, missing)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """The tensors of a file of weights by name, without wrappers' prefixes, checked as in `load_weights`.

    Args:
        path: the file.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        TypeError: if `path` is no path.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no whole file of weights, its checksum is wrong, or two names differ in prefixes only.
        ImportError: if safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_weights(f"{folder}/a.safetensors", {"module._orig_mod.bias": torch.ones(1)})
        ...     read_weights(f"{folder}/a.safetensors")
        {'bias': tensor([1.])}
    """
    return _renamed("read_weights", path, _stored("read_weights", path), _without_prefixes)


def weights_checksum(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, whatever their order, device or memory layout.

    Args:
        weights: a model, or tensors by name.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if `weights` is neither a module nor tensors by name.
        ValueError: if tensors hold no values of their own (meta device, DTensor, quantised weights).

    Examples:
        >>> weights_checksum({"a": torch.zeros(2)}) == weights_checksum({"a": torch.zeros(2)})
        True
        >>> weights_checksum({"a": torch.zeros(2)}) == weights_checksum({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(_tensors("weights_checksum", weights).items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(entries_of(value))
    return digest.hexdigest()


def _stored(function: str, path: str | os.PathLike[str]) -> Weights:
    """The tensors of a file by the names they have there."""
    _check.path(function, "path", path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file `{path}`.")
    raw = path.read_bytes()
    return _unpickled(function, path, raw) if _is_of_torch(raw) else _loaded(function, path, raw)


def _renamed(function: str, path: Any, stored: Weights, short: Callable[[str], str]) -> Weights:
    """Tensors by shorter names, each of which must be there once."""
    renamed: Weights = {}
    for name, value in stored.items():
        if short(name) in renamed:
            raise ValueError(f"{function}: `{path}` holds {short(name)!r} twice, under different prefixes.")
        renamed[short(name)] = value
    return renamed


def _named_as(own: Weights, stored: Weights, path: Any) -> Weights:
    """The tensors of a file by the names that a model has for them."""
    if own.keys() <= stored.keys():
        return stored
    stored = _renamed("load_weights", path, stored, _without_wrappers)
    names = {_without_wrappers(name): name for name in own}
    if len(names) < len(own):  # a part called `module` beside what it wraps
        names = {name: name for name in own}
    if names.keys().isdisjoint(stored):
        longer = {name: short for short, name in _behind(stored, names).items()}
        shorter = _behind(names, stored)
        if max(len(longer), len(shorter)) < 0.5 * min(len(names), len(stored)):
            return stored  # another network, of which some names end alike
        stored = {(longer if len(longer) >= len(shorter) else shorter).get(name, name): stored[name] for name in stored}
    return {names.get(name, name): value for name, value in stored.items()}


def _behind(longer: Iterable[str], shorter: Container[str]) -> dict[str, str]:
    """Of names that are others behind a prefix: those by the commonest prefix, by the others."""
    found: dict[str, dict[str, str]] = {}
    for name in longer:
        for place, sign in enumerate(name, start=1):
            if sign == "." and name[place:] in shorter:
                found.setdefault(name[:place], {})[name[place:]] = name
    return max(found.values(), key=len, default={})


def _loaded(function: str, path: Path, raw: bytes) -> Weights:
    """The tensors of a safetensors file, with the checksum that it states."""
    metadata = _header(function, path, raw).get("__metadata__") or {}
    load = _safetensors(function).load
    try:
        stored: Weights = load(raw)
    except Exception as error:  # safetensors raises an exception of its own, whose place has moved
        raise ValueError(f"{function}: `{path}` is damaged: {error}. Copy or download it again.") from error
    expected = metadata.get("sha256") if isinstance(metadata, dict) else None
    if expected is not None and weights_checksum(stored) != expected:
        raise ValueError(
            f"{function}: the tensors in `{path}` do not have the checksum that the file states; it was changed or "
            "damaged. Copy or download it again."
        )
    return stored


def _is_of_torch(raw: bytes) -> bool:
    """Whether a file begins as those of `torch.save`."""
    return raw.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", raw) is not None


def _unpickled(function: str, path: Path, raw: bytes) -> Weights:
    """The tensors in a file of `torch.save`, read without executing anything."""
    try:
        held: Any = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise many kinds
        raise ValueError(
            f"{function}: `{path}` is a pickle, as torch.save writes, holding more than plain tensors, or is damaged "
            f"({_refused(error)}). Reading it otherwise can run code: if you "
            "trust it, load it yourself and save the state dict with `save_weights`."
        ) from error
    for name in ("state_dict", "model_state_dict", "model", "net", "network", "ema"):
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
            break
    if isinstance(held, Mapping):
        alone = [tensors for tensors in (_of_names(part) for part in held.values()) if tensors]
        if tensors := _of_names(held) or (alone[0] if len(alone) == 1 else {}):
            return tensors
    found = f"the names {', '.join(map(str, list(held)[:6]))}" if isinstance(held, Mapping) else type(held).__name__
    raise ValueError(f"{function}: `{path}` holds no tensors by name, but {found}. Save the state dict alone.")


def _refused(error: Exception) -> str:
    """What torch would not read, or the first line of what it says."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds {found[1]}" if found else (str(error).splitlines() or [type(error).__name__])[0]


def _of_names(held: Any) -> Weights:
    """The tensors that something holds by names; none if it holds some by anything else."""
    tensors = {name: one for name, one in held.items() if isinstance(one, Tensor)} if isinstance(held, Mapping) else {}
    return tensors if all(isinstance(name, str) for name in tensors) else {}


def _check_held(function: str, named: Mapping[str, Any]) -> None:
    """Refuse tensors, by name, that do not hold their values themselves."""
    _check.initialised(function, named)
    for name, value in named.items():
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{function}: {name!r} is shared out over processes ({type(value).__name__}). On all of them together, "
                "gather weights with torch.distributed.checkpoint.state_dict.get_model_state_dict before they are "
                "saved, and give what `read_weights` reads to set_model_state_dict, both with full_state_dict=True."
            )
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{function}: {name!r} is on the meta device, where tensors have no values; give the model a device "
                "with `model.to_empty(device=...)` first."
            )


def _tensors(function: str, weights: Any) -> Weights:
    """Tensors by name, on the CPU, contiguous and each with memory of its own."""
    named = bare(weights).state_dict() if isinstance(weights, nn.Module) else weights
    wanted = f"{function}: `weights` must be a module or tensors by name, got {type(weights).__name__}"
    if not isinstance(named, Mapping):
        raise TypeError(f"{wanted}.")
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{wanted} with {name!r}, which is {type(value).__name__}.")
        _check.tensor(function, f"weights[{name!r}]", value)
    _check_held(function, named)
    for name, value in named.items():
        if value.is_quantized or is_traceable_wrapper_subclass(value):
            raise ValueError(
                f"{function}: {name!r} is a {type(value).__name__} of {value.dtype}; safetensors knows neither "
                "composed nor quantised tensors. Save them by torch.save, or before they are quantised."
            )
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in named.items()}


def _without_wrappers(name: str) -> str:
    """A name without what wrappers put into it, also into the names of parts."""
    *places, last = name.split(".")
    return ".".join((*(place for place in places if f"{place}." not in PREFIXES), last))


def _without_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5]) or 'nothing'}{more}"


def _header(function: str, path: Path, raw: bytes) -> dict[str, Any]:
    """The header of a safetensors file, which has to be as long as the header says."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or raw[8:9] != b"{":
        raise ValueError(f"{function}: `{path}` is no safetensors file: it looks like {_looks_like(raw)}.")
    cut = f"{function}: `{path}` is cut off: it has {len(raw)} bytes, "
    if len(raw) < 8 + size:
        raise ValueError(f"{cut}its header alone {8 + size}. Copy or download it again.")
    try:
        header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        end = 8 + size + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{function}: the header of `{path}` is damaged. Copy or download it again.") from error
    if len(raw) < end:
        raise ValueError(f"{cut}its header says {end}. Copy or download it again.")
    return header


def _looks_like(raw: bytes) -> str:
    """What a file that holds no weights seems to be."""
    start = raw[:512].lstrip().lower()
    if not start:
        return "an empty file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page, perhaps the message of a failed download. Download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer. Fetch the file it stands for with `git lfs pull`"
    if raw.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "a compressed archive. Unpack it first"
    if raw.startswith(b"\x89HDF"):
        return "an HDF5 file"
    return f"something else, beginning with {raw[:8]!r}"


def _safetensors(function: str) -> Any:
    return extra(function, "safetensors.torch", why="to read and write weights")
