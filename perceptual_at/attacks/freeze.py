"""Borrow a model for an attack and give it back as it was."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._wrappers import unwrapped
from perceptual_at.attacks.lanes import Lane
from perceptual_at.attacks.twins import FastModel

Model = Callable[..., Tensor]
ModelMode = Literal["eval", "as_is"]


@contextlib.contextmanager
def frozen(model: Model, *, model_mode: ModelMode = "eval", lane: Lane | None = None) -> Iterator[Model]:
    """The callable to attack: eval mode, parameters that need no gradient, both undone afterwards.

    Every module's `training` flag and every parameter's `requires_grad` is restored, also after an
    exception. Wrappers for distributed training are looked through, because an attack has no gradients to
    exchange. A callable that is no module is handed back as it is.

    Args:
        model: a module (also compiled or wrapped for distributed training) or any callable.
        model_mode: `"eval"`, or `"as_is"` to leave the modes of the modules alone. A batch norm that is in train
            mode then uses and updates its statistics in every attack step, as ReBAT's released code does.
        lane: run a copy of the module that costs less instead, with the module's present weights; see `Lane`. The
            module itself is `exact` of what is given, and `notes` says what of the lane could not be had.

    Yields:
        The callable.

    Raises:
        TypeError: if `model` is not callable, or no module and `lane` is given.
        ValueError: if `model_mode` is unknown, or a lane is asked for with `model_mode="as_is"`, on top of another
            lane, or for a module that cannot be copied.

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
    _check.choice("frozen", "model_mode", model_mode, ("eval", "as_is"))
    check_lane("frozen", model, model_mode, lane)
    if isinstance(model, FastModel) or not isinstance(model, nn.Module):
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
        yield module if lane is None else FastModel(module, lane)
    finally:
        for part, training in modes:
            part.training = training
        for parameter in parameters:
            parameter.requires_grad_(True)


def check_lane(function: str, model: Model, model_mode: ModelMode, lane: Any) -> None:
    """Refuse a lane that cannot be had."""
    if isinstance(model, FastModel):
        if lane is not None:
            raise ValueError(f"{function}: `model` runs in {model.lane} already, so it cannot take `lane`={lane}.")
        if model_mode == "as_is":
            raise ValueError(
                f"{function}: `model` runs in a lane, which is always in eval mode, not model_mode='as_is'."
            )
    if lane is None:
        return
    if not isinstance(lane, Lane):
        raise TypeError(f"{function}: `lane` must be a Lane or None, got {lane!r}.")
    if model_mode == "as_is":
        raise ValueError(f"{function}: a `lane` is always in eval mode; it cannot be had with model_mode='as_is'.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: `lane` needs a torch.nn.Module to copy, got {type(model).__name__}.")
