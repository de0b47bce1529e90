"""Modules that need more than flags when they are lent: what else is switched for an attack, and how it goes back."""

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def ordinary(model: nn.Module) -> nn.Module:
    """A copy of a module with tensors that were made in inference mode, which autograd cannot save."""
    with torch.inference_mode(False), contextlib.suppress(Exception):  # what cannot be copied fails in its own words
        return copy.deepcopy(model)
    return model


def trains_itself(part: nn.Module) -> bool:
    """Whether a module has a `train` of the user's own, which may do more than to set flags: choose a branch, merge."""
    own = vars(part).get("train", getattr(type(part), "train", None))
    return (getattr(own, "__module__", None) or "torch").split(".")[0] != "torch"


def switch_back(part: nn.Module, mode: bool) -> None:
    """Let a module switch by its own `train`, whose flags others may still need as they are."""
    flags = [(inner, inner.training) for inner in part.modules() if hasattr(inner, "training")]
    try:
        part.train(mode)
    finally:
        for inner, flag in flags:
            inner.training = flag


UNUSUAL = (DistributedDataParallel, nn.RNNBase)


def unusual(part: nn.Module, evaluating: bool) -> list[tuple[Any, str, Any]]:
    """What else has to be changed of parts that are attacked in a way of their own."""
    if isinstance(part, DistributedDataParallel):  # inside of something; an attack has no gradients to exchange
        return [(part, "require_backward_grad_sync", False), (part, "require_forward_param_sync", False)]
    if evaluating and _on_cudnn(part):
        # cuDNN has no backward pass of recurrent layers in eval mode. Without dropout both modes compute the same.
        return [(part, "dropout", 0.0), (part, "training", True)]
    return []


def _on_cudnn(part: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in part.parameters())


def in_eval_mode(parts: list[nn.Module]) -> None:
    """Eval mode for all parts that can be switched."""
    for part in parts:
        if "train" not in vars(part):
            part.training = False
