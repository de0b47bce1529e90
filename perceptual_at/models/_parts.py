"""Pieces that all networks share."""

from typing import Any, TypeVar

from torch import Tensor, nn

from perceptual_at import _check


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size (up to its stride)."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def pool() -> nn.Sequential:
    """The mean over all places, `(B, C, H, W)` to `(B, C)`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


Wrapper = TypeVar("Wrapper", bound=nn.Module)


def in_mode_of(model: nn.Module, wrapper: Wrapper) -> Wrapper:
    """A module around a network, in its mode. Not by `train()`, which would also switch layers frozen by hand."""
    wrapper.training = model.training
    return wrapper


def check_logits(function: str, output: Any) -> Tensor:
    """Require that a network gave a tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{function}: `model` must return a tensor, got {type(output).__name__}; take it out with "
            "perceptual_at.models.logits_of."
        )
    return output


def check_sizes(function: str, **sizes: int) -> None:
    """Require positive integers, and at least two classes."""
    for name, value in sizes.items():
        _check.count(function, name, value)
        if name == "num_classes" and value < 2:
            raise ValueError(f"{function}: `num_classes` must be at least 2, got {value}.")
