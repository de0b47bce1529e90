"""Borrow a model for an attack and give it back as it was."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from perceptual_at import _check

Model = Callable[..., Tensor]
ModelMode = Literal["eval", "keep"]


@contextlib.contextmanager
def frozen(model: Model, *, model_mode: ModelMode = "eval") -> Iterator[Model]:
    """The callable to attack: eval mode, parameters that need no gradient, both undone afterwards.

    Every module's `training` flag and every parameter's `requires_grad` is restored, also after an
    exception. Wrappers for distributed training are looked through, because an attack has no gradients to
    exchange. A callable that is no module is handed back as it is.

    Args:
        model: a module (also compiled or wrapped for distributed training) or any callable.
        model_mode: `"eval"`, or `"keep"` to leave the modes of the modules alone. A batch norm that is in train
            mode then uses and updates its statistics in every attack step, as ReBAT's released code does.

    Yields:
        The callable.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: if `model_mode` is unknown.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with frozen(model) as f:
        ...     f.training, any(p.requires_grad for p in f.parameters())
        (False, False)
        >>> model.training, all(p.requires_grad for p in model.parameters())
        (True, True)
    """
    if not callable(model):
        raise TypeError(f"frozen: `model` must be callable, got {type(model).__name__}.")
    _check.choice("frozen", "model_mode", model_mode, ("eval", "keep"))
    if not isinstance(model, nn.Module):
        yield model
        return
    module = unwrapped(model)
    modes = [(part, part.training) for part in module.modules()]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        if model_mode == "eval":
            module.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield module
    finally:
        for part, training in modes:
            part.training = training
        for parameter in parameters:
            parameter.requires_grad_(True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a wrapper for distributed training; a compiled module stays compiled."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def bare(model: nn.Module) -> nn.Module:
    """The user's own module, without distributed or compiled wrappers: its names carry no prefix."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
