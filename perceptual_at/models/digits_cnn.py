"""A network small enough to be trained adversarially in seconds on a CPU."""

from typing import ClassVar

from torch import Tensor, nn

from perceptual_at.models._parts import check_sizes, convolution, pool


class DigitsCNN(nn.Module):
    """A small network for 8 x 8 grey images: three convolutions with batch norm, a pool, a linear layer.

    It has batch norm so that everything that depends on a model's mode is exercised. Weights start as torch's
    layers do. At `width=32` it has 56,554 parameters.

    Args:
        width: channels of the first convolution; the other two have twice as many, and halve the image each.
        num_classes: number of classes, at least 2.

    Shape:
        `(B, 1, H, W)` in [0, 1] to logits `(B, num_classes)`.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> import torch
        >>> DigitsCNN()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    perception_layers: ClassVar[dict[str, str]] = {
        "logits": "linear",
        "second_to_last": "pool",
        "third_to_last": "layer2",
    }

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        check_sizes("DigitsCNN", width=width, num_classes=num_classes)
        self.layer1 = _layer(1, width, stride=1)
        self.layer2 = _layer(width, 2 * width, stride=2)
        self.layer3 = _layer(2 * width, 2 * width, stride=2)
        self.pool = pool()
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        features = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(features))
        return logits


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU())
