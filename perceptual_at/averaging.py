"""Averaged weights as plain dicts: state in, state out."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perceptual_at import _check
from perceptual_at._shapes import lacks_variance
from perceptual_at.victims.finding import bare
from perceptual_at.victims.switching import computed, put_back_cache, take_cache

Weights = dict[str, Tensor]


def snapshot(model: nn.Module, *, dtype: torch.dtype | None = None) -> Weights:
    """Copy of a model's parameters and buffers, detached.

    Args:
        model: any module; the names carry no prefix of `torch.compile` or of distributed wrappers.
        dtype: of the floating tensors; None keeps each tensor's own. Averages of a sixteen-bit model need
            `torch.float32`: in sixteen bits most of their steps are rounded away.

    Returns:
        Name to tensor, as in `state_dict()`.

    Raises:
        TypeError: if `model` is no module or `dtype` no floating dtype.
        ValueError: if the model has parameters that wait for a first batch (`nn.LazyLinear`).

    Examples:
        >>> sorted(snapshot(nn.Linear(2, 1)))
        ['bias', 'weight']
        >>> snapshot(nn.Linear(2, 1))["weight"].requires_grad
        False
    """
    _check.module("snapshot", model)
    _check.dtype("snapshot", "dtype", dtype)
    with torch.inference_mode(False):  # where the copies could not move later
        return {
            name: value.detach().to(dtype if value.is_floating_point() else None, copy=True)
            for name, value in _tensors("snapshot", model).items()
        }


def ema_update(
    average: Weights, model: nn.Module, *, decay: float, buffers: Literal["average", "copy", "keep"] = "average"
) -> Weights:
    r"""Move averaged weights a little towards a model's: an exponential moving average.

    $$ \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta $$

    for parameters and for floating buffers such as batch norm's running mean and variance; integer buffers are copied.
    Call it after the optimiser's step. Called at the end of an epoch with the weights from its start it is PIAT's
    interpolation.

    Args:
        average: weights from `snapshot` or the last update; left untouched.
        model: the model in training.
        decay: $d$ in [0, 1]; 0 copies the model, 0.999 is usual.
        buffers: `"average"` running statistics like parameters (ReBAT, WA, ADR, PIAT), `"copy"` the model's (training
            with generated images), or `"keep"` the average's own (CURE, whose average runs in train mode).

    Returns:
        New averaged weights.

    Raises:
        TypeError: if `model` is no module or `average` no dict of tensors.
        ValueError: if names, shapes or devices differ, `decay` is outside [0, 1], or `buffers` is unknown.

    Source:
        ReBAT (Wang et al. 2023), released code: running statistics are averaged like parameters.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> average = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
        >>> _ = nn.init.ones_(model.weight)
        >>> ema_update(average, model, decay=0.75)["weight"]
        tensor([[0.2500]])
        >>> torch.equal(ema_update(average, model, decay=0.0)["weight"], model.weight)
        True
    """
    _check.module("ema_update", model)
    _check.number("ema_update", "decay", decay, at_least=0.0, at_most=1.0)
    _check.choice("ema_update", "buffers", buffers, ("average", "copy", "keep"))
    return _moved("ema_update", average, model, 1.0 - decay, buffers)


def swa_update(average: Weights, model: nn.Module, *, count: int) -> Weights:
    r"""Take one more model into an average in which all count alike: stochastic weight averaging.

    $$ \bar\theta \leftarrow \bar\theta + \frac{\theta - \bar\theta}{n + 1} $$

    for parameters; buffers stay as they are in the average. Batch norm's statistics do not belong to the averaged
    weights then: `refresh_batch_norm` before they are used.

    Args:
        average: weights from `snapshot` or the last update; left untouched.
        model: the model in training, usually at the end of an epoch.
        count: $n$, how many models are in the average already; 0 takes the model's parameters.

    Returns:
        New averaged weights.

    Raises:
        TypeError: if `model` is no module, `average` no dict of tensors or `count` no integer.
        ValueError: if names, shapes or devices differ, or `count` is negative.

    Source:
        Izmailov et al. 2018 (SWA); KD+SWA (Chen et al. 2021), released code.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> average = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
        >>> _ = nn.init.ones_(model.weight)
        >>> swa_update(average, model, count=3)["weight"]
        tensor([[0.2500]])
        >>> torch.equal(swa_update(average, model, count=0)["weight"], model.weight)
        True
    """
    _check.module("swa_update", model)
    _check.count("swa_update", "count", count, at_least=0)
    return _moved("swa_update", average, model, 1.0 / (count + 1), "keep")


def refresh_batch_norm(model: nn.Module, weights: Weights, batches: Iterable[Tensor | Sequence[Any]]) -> Weights:
    """Batch norm's running statistics estimated again for other weights, over one pass of clean images.

    Each batch counts by its size, `momentum = b / (n + b)` after n images, so that the result is the mean over all of
    them, and not over the last few as in training. The model itself is not touched: its modes, momenta and buffers are
    as before. Like training, the pass runs in train mode without gradients; dropout draws.

    Args:
        model: the module the weights are of.
        weights: averaged weights, as from `swa_update`; left untouched.
        batches: images, or tuples and lists whose first entry is the images, on the device of the weights.

    Returns:
        New weights, with new running means and variances.

    Raises:
        TypeError: if `model` is no module, `weights` no dict of tensors, or `batches` no batches.
        ValueError: if names are missing or unknown, shapes differ, there is no batch, or one whose images have no
            variance, as a single image may.

    Source:
        Izmailov et al. 2018 (SWA), Sec. 3.2; KD+SWA (Chen et al. 2021), released code.

    Examples:
        >>> model = nn.BatchNorm1d(1)
        >>> refreshed = refresh_batch_norm(model, snapshot(model), [torch.tensor([[0.0], [2.0]]), torch.ones(2, 1)])
        >>> refreshed["running_mean"], model.running_mean
        (tensor([1.]), tensor([0.]))
    """
    function = "refresh_batch_norm"
    _check.module(function, model)
    own = bare(model)
    _check_weights(function, "weights", weights, _tensors(function, own))
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{function}: `batches` must hold one batch after the other, as a loader does, got "
            f"{type(batches).__name__}; a single one goes into a list, `[x]`."
        )
    with torch.inference_mode(False):
        refreshed = {key: value.clone() for key, value in weights.items()}
    norms = {
        key: part
        for key, part in own.named_modules(remove_duplicate=False)
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    }
    if not norms:
        return refreshed
    for key in norms:
        prefix = f"{key}." if key else ""
        refreshed[f"{prefix}running_mean"].zero_()
        refreshed[f"{prefix}running_var"].fill_(1.0)
    seen = 0
    with _in_train_mode(own, norms.values()):
        for batch in batches:
            x = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{function}: `batches` must hold images, or tuples that begin with them, got "
                    f"{type(batch).__name__}."
                )
            if not len(x):
                continue
            for norm in norms.values():
                norm.momentum = x.shape[0] / (seen + x.shape[0])
            try:
                with torch.no_grad():
                    call_with(own, refreshed, x)
            except ValueError as error:
                if not lacks_variance(error):
                    raise
                raise ValueError(
                    f"{function}: `batches` has one of shape {tuple(x.shape)}, in which a batch norm sees a single "
                    "value per channel, without a variance; leave it out (`drop_last=True`) or take another batch size."
                ) from error
            seen += x.shape[0]
    if not seen:
        raise ValueError(f"{function}: `batches` is empty; give the training images once, for example a loader.")
    return refreshed


@contextlib.contextmanager
def _in_train_mode(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Train mode, with momenta of batch norms that may be set; modes and momenta are as before afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        model.train()
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for part, mode in modes:
            part.training = mode


def call_with(model: nn.Module, weights: Weights, *args: Tensor) -> Tensor:
    """Output of a model run with other weights; the model itself is not touched.

    The model's present mode counts: with batch norm in train mode the call uses batch statistics and moves the
    running statistics *in the dict*, under all of their names. Call an averaged model in eval mode, for example
    inside `frozen(model)`.

    Args:
        model: any module.
        weights: parameters and buffers by name, as from `snapshot`, cast to the dtypes of the model's own. Of a tensor
            that the model holds under several names, the first name's counts.
        *args: what the model takes.

    Returns:
        What the model returns.

    Raises:
        TypeError: if `model` is no module, or scripted, or `weights` no dict of tensors.
        ValueError: if names are missing or unknown, shapes differ, or running statistics would move inside a transform
            of torch.func.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> call_with(model, {"weight": torch.tensor([[3.0]])}, torch.tensor([[2.0]]))
        tensor([[6.]])
        >>> with frozen(model) as f:
        ...     call_with(f, {"weight": torch.tensor([[3.0]])}, torch.tensor([[0.5]]))
        tensor([[1.5000]])
    """
    _check.module("call_with", model)
    inner, own = bare(model), _tensors("call_with", model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise TypeError("call_with: a scripted `model` runs with its own weights alone; give what it was made of.")
    _check_weights("call_with", "weights", weights, own)
    # Tied weights come from the first of their names. A module that is used twice is named once: torch would put its
    # weights back in the order of the names, and so leave the other weights in the model.
    first: dict[int, str] = {}
    used: Weights = {}
    for place, part in inner.named_modules():
        for key, value in (*part._parameters.items(), *part._buffers.items()):
            name = f"{place}.{key}" if place else key
            if value is not None and name in own:
                used[name] = weights[first.setdefault(id(value), name)].to(value.dtype)
    moving = _moving(inner, weights, used, first)
    cache = take_cache()  # weights that were computed from the model's own
    hooked = [part for part in inner.modules() if part._forward_pre_hooks]
    made = [(part, name, vars(part)[name]) for part in hooked for name in computed(part)]
    try:
        output: Tensor = torch.func.functional_call(inner, used, args, tie_weights=False)
    except RuntimeError as error:
        if re.search("in.place", str(error)) and (norms := _with_statistics(inner)):
            raise ValueError(
                f"call_with: `model` has {norms} in train mode, whose running statistics cannot move inside a "
                "transform of torch.func (grad, vmap, ...); call it in eval mode, for example inside `frozen(model)`."
            ) from error
        raise
    finally:
        put_back_cache(cache)
        for part, name, tensor in made:
            setattr(part, name, tensor)
    with torch.no_grad():
        for held, ran, before in moving:
            held.copy_(torch.where(ran == before, held, ran.to(held.dtype)))  # what stayed keeps all of its digits
    return output


def _with_statistics(inner: nn.Module) -> str:
    """The kinds of modules whose running statistics a pass would move."""
    parts = (part for part in inner.modules() if part.training and part._buffers.get("running_mean") is not None)
    return ", ".join(dict.fromkeys(type(part).__name__ for part in parts))


def _moving(
    inner: nn.Module, weights: Weights, used: Weights, first: Mapping[int, str]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Buffers of the dict that train mode would move unseen, with what runs in their place and a copy of that.

    What runs is a copy of another dtype, or is in the dict under the first of several names.
    """
    found = []
    for place, part in inner.named_modules(remove_duplicate=False):
        for key, value in part._buffers.items() if part.training else ():
            name = f"{place}.{key}" if place else key
            if value is not None and name in weights and (ran := used[first[id(value)]]) is not weights[name]:
                found.append((weights[name], ran, ran.clone()))
    return found


def _tensors(function: str, model: nn.Module) -> Weights:
    """The model's own parameters and buffers, by their names without prefixes; tied ones under each of theirs."""
    own = bare(model).state_dict()
    _check.initialised(function, own)
    return {name: value for name, value in own.items() if isinstance(value, Tensor)}


def check_average(function: str, average: Weights | None, model: nn.Module) -> None:
    """Require averaged weights of this model, or None."""
    if average is not None:
        _check_weights(function, "average", average, _tensors(function, model))


def _check_weights(function: str, name: str, weights: Weights, own: dict[str, Tensor]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{function}: `{name}` must be a dict of tensors by name, got {type(weights).__name__}.")
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or unknown:
        raise ValueError(
            f"{function}: `{name}` does not belong to this model: missing {sorted(missing)[:5]}, unknown "
            f"{sorted(unknown)[:5]}."
        )
    for key, value in own.items():
        _check.tensor(function, f"{name}[{key!r}]", weights[key])
        if weights[key].shape != value.shape:
            raise ValueError(
                f"{function}: `{name}` has {key!r} of shape {tuple(weights[key].shape)} but the model's is of shape "
                f"{tuple(value.shape)}; they must come from the same model."
            )


def _moved(function: str, average: Weights, model: nn.Module, share: float, buffers: str) -> Weights:
    """The average, with parameters a share of the way towards the model's."""
    own = bare(model)
    current = _tensors(function, own)
    parameters = {name for name, _ in own.named_parameters(remove_duplicate=False)}
    _check_weights(function, "average", average, current)
    updated = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in current.items():
            _check.same_device(function, f"average[{name!r}]", average[name].device, "the model's", value.device)
            how = "average" if name in parameters else buffers
            if how == "keep":
                updated[name] = average[name].clone()
            elif how == "average" and value.is_floating_point():
                updated[name] = torch.lerp(average[name], value.to(average[name].dtype), share)
            else:
                updated[name] = value.clone()
    return updated
