"""A small network for dense predictions: one vector of logits per pixel."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at.models._parts import check_sizes, convolution


class UNet(nn.Module):
    """A small U-Net: down twice, up twice, with the finer features beside the coarser ones on the way up.

    Two convolutions with batch norm at each level, whose channels double on the way down. At `width=8`, one input
    channel and 11 classes it has 29,867 parameters.

    Args:
        width: channels of the finest level.
        num_classes: number of classes, at least 2.
        in_channels: 3 for colour, 1 for grey.

    Shape:
        `(B, in_channels, H, W)` in [0, 1] to logits `(B, num_classes, H, W)`, for any height and width of at least 4.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Source:
        Ronneberger et al. 2015, at a fraction of its size, with padding and batch norm.

    Examples:
        >>> UNet(width=4, num_classes=3)(torch.rand(2, 1, 12, 10)).shape
        torch.Size([2, 3, 12, 10])
    """

    perception_layers: ClassVar[dict[str, str]] = {
        "logits": "head",
        "second_to_last": "up1",
        "third_to_last": "up2",
    }

    def __init__(self, width: int = 16, num_classes: int = 10, *, in_channels: int = 1) -> None:
        super().__init__()
        check_sizes("UNet", width=width, num_classes=num_classes, in_channels=in_channels)
        self.down1, self.down2 = _level(in_channels, width), _level(width, 2 * width)
        self.bottom = _level(2 * width, 4 * width)
        self.up2, self.up1 = _level(6 * width, 2 * width), _level(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        fine = self.down1(x)
        middle = self.down2(functional.max_pool2d(fine, 2))
        coarse = self.bottom(functional.max_pool2d(middle, 2))
        middle = self.up2(_beside(middle, coarse))
        logits: Tensor = self.head(self.up1(_beside(fine, middle)))
        return logits


def _beside(fine: Tensor, coarse: Tensor) -> Tensor:
    """Features of two levels at the resolution of the finer one."""
    return torch.cat([fine, functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")], dim=1)


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(),
        convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip
