"""Modules that need more than flags when they are lent: what else is switched for an attack, and how it goes back."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


def ordinary(model: nn.Module) -> nn.Module:
    """A copy of a module with tensors that were made in inference mode, which autograd cannot save."""
    with torch.inference_mode(False), contextlib.suppress(Exception):  # what cannot be copied fails in its own words
        return copy.deepcopy(model)
    return model


def trains_itself(part: nn.Module) -> bool:
    """Whether a module has a `train` of its own, which may do more than to set flags: choose a branch, merge."""
    own = getattr(type(part), "train", None)
    return "train" in vars(part) or (getattr(own, "__module__", None) or "torch").split(".")[0] != "torch"


def look(part: nn.Module) -> Any:
    """What a switch to another mode would change in a module with a `train` of its own, which may leave its flag alone.

    Of a graph its code: the exports that quantization trains are rewritten, and say that they train in either mode.
    """
    if isinstance(part, fx.GraphModule):
        return part.training, part.code
    return {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}


def switch_back(part: nn.Module, mode: bool) -> None:
    """Let a module switch by its own `train`, whose flags others may still need as they are."""
    flags = [(inner, inner.training) for inner in part.modules() if hasattr(inner, "training")]
    try:
        part.train(mode)
    finally:
        for inner, flag in flags:
            inner.training = flag


class KeptBuffer:
    """A buffer of a module, to be put back: a pass in eval mode may move what the user's own modules hold there."""

    def __init__(self, part: nn.Module, name: str) -> None:
        self.part, self.name = part, name
        self.tensor: Any = getattr(part, name)
        with torch.inference_mode(False), torch.no_grad():  # what may become the buffer's own
            self.copy = self.tensor.detach().clone()

    def put_back(self) -> None:
        """The same tensor, with what it held."""
        with torch.no_grad():  # not seen by graphs that need it, whose values it does not change
            if self.tensor.shape == self.copy.shape:
                self.tensor.data.copy_(self.copy)
            else:  # an observer of quantization-aware training is without entries before its first pass
                self.tensor.data = self.copy
        setattr(self.part, self.name, self.tensor)


def movable(part: nn.Module) -> list[str]:
    """Buffers of a module of the user's own, or of a part of an export, which a pass in eval mode may move."""
    held = ((name, value) for name, value in part._buffers.items() if value is not None)
    return [name for name, value in held if not (is_lazy(value) or value.is_inference())]


def computed(part: nn.Module) -> list[str]:
    """Weights that hooks compute anew before each pass (pruning, the older weight norms), with a history to go on."""
    return [name for name, value in vars(part).items() if isinstance(value, Tensor)]


def take_cache() -> dict[Any, Any]:
    """Parametrized weights that `torch.nn.utils.parametrize.cached` holds, out of the way of passes with others."""
    cache, parametrize._cache = parametrize._cache, {}
    return cache


def put_back_cache(cache: dict[Any, Any]) -> None:
    """Let the weights be used that were computed before, while the block lasts that holds them."""
    if parametrize._cache_enabled:
        parametrize._cache = cache


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
