"""How many passes through a network a call makes, whoever wrote it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Passes(NamedTuple):
    """Passes, in units of one batch."""

    forward: float
    """F."""
    to_input: float
    """Bx: backward passes that reach the input."""
    to_parameters: float
    """Bp: backward passes that compute the gradients of the parameters."""


def passes(function: Callable[[], object], model: nn.Module, batch: int) -> Passes:
    """The passes of a call, seen at the network's first convolution: every image that goes through it counts.

    A backward pass shows there what it was for: the gradient of the input, that of the weights, or both.
    """
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    with _FirstConvolution(first) as seen:
        function()
    return Passes(*(round(images / batch, 4) for images in seen.images))


class _FirstConvolution(TorchDispatchMode):
    """Counts images at convolutions shaped like a network's first, also of a copy in another dtype."""

    def __init__(self, first: nn.Conv2d) -> None:
        super().__init__()
        self.shape = first.weight.shape
        self.images = [0, 0, 0]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten.convolution.default and args[1].shape == self.shape:
            self.images[0] += args[0].shape[0]
        elif operation is torch.ops.aten.convolution_backward.default and args[2].shape == self.shape:
            to_input, to_weight, _ = args[-1]
            self.images[1] += args[1].shape[0] * to_input
            self.images[2] += args[1].shape[0] * to_weight
        return operation(*args, **(kwargs or {}))
