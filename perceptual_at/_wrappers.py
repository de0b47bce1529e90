"""Modules inside the wrappers that training puts around them."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
