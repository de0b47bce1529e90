"""Wide residual networks (Zagoruyko and Komodakis 2016) for small images."""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import relu

from perceptual_at import _check
from perceptual_at.models._parts import check_sizes, convolution, pool


class WideBlock(nn.Module):
    """Norm, activation and 3 x 3 convolution, twice, with dropout between, and a shortcut around all.

    The shortcut is the untouched input; where the number of channels changes, a 1 x 1 convolution of the
    activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.conv2 = convolution(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.convShortcut = convolution(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, not activated."""
        activated = relu(self.bn1(x))
        around = x if self.convShortcut is None else self.convShortcut(activated)
        inner = relu(self.bn2(self.conv1(activated)))
        if self.dropout is not None:
            inner = self.dropout(inner)
        out: Tensor = self.conv2(inner) + around
        return out


class WideResNet(nn.Module):
    """A wide residual network: three stages of pre-activation blocks, `widen_factor` times as wide as usual.

    Convolutions start from the normal distribution of He et al. (variance 2 / fan-out) and the last bias from
    0, as in the common implementation and the papers' code; the rest as torch's layers do. Parameters are
    named as there (`block1.layer.0.conv1`, `convShortcut`, `fc`), so that weights trained with it load.

    Args:
        depth: 6 n + 4 for n blocks in each stage.
        widen_factor: channels of the stages over those of the stem; they have 1, 2 and 4 times that.
        num_classes: number of classes, at least 2.
        width: channels of the stem.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 to halve the image at once, as the papers' code does for the 64 x 64 images of
            Tiny-ImageNet.
        dropout: probability of dropping between the convolutions of a block; the papers use none.

    Shape:
        `(B, in_channels, H, W)` in [0, 1] to logits `(B, num_classes)`.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, there is one class only, `depth` is not of the form 6 n + 4, or `dropout`
            outside [0, 1).

    Examples:
        >>> import torch
        >>> WideResNet(10, 2, width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    perception_layers: ClassVar[dict[str, str]] = {
        "logits": "fc",
        "second_to_last": "pool",
        "third_to_last": "block2",
    }

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        *,
        num_classes: int = 10,
        width: int = 16,
        in_channels: int = 3,
        stem_stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            "WideResNet",
            depth=depth,
            widen_factor=widen_factor,
            num_classes=num_classes,
            width=width,
            in_channels=in_channels,
            stem_stride=stem_stride,
        )
        _check.number("WideResNet", "dropout", dropout, at_least=0, below=1)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"WideResNet: `depth` must be 6 n + 4 for n blocks in each stage (10, 16, 22, 28, 34, ...), "
                f"got {depth}."
            )
        blocks = (depth - 4) // 6
        sizes = [width, *(width * widen_factor * factor for factor in (1, 2, 4))]

        def stage(index: int) -> nn.Sequential:
            inputs, outputs = sizes[index - 1 : index + 1]
            first = WideBlock(inputs, outputs, 1 if index == 1 else 2, dropout)
            others = (WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1))
            return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))

        self.conv1 = convolution(in_channels, width, 3, stem_stride)
        self.block1, self.block2, self.block3 = stage(1), stage(2), stage(3)
        self.bn1 = nn.BatchNorm2d(sizes[-1])
        self.pool = pool()
        self.fc = nn.Linear(sizes[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        features = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(relu(self.bn1(features))))
        return logits


def wide_resnet28_10(
    num_classes: int = 10, *, width: int = 16, in_channels: int = 3, stem_stride: int = 1
) -> WideResNet:
    """WideResNet-28-10: 28 convolutions, 36.48 million parameters for 10 classes. RAAT's second network.

    Args:
        num_classes: number of classes, at least 2.
        width: channels of the stem; 16 is the published network.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 as the papers' code takes for Tiny-ImageNet's 64 x 64 images.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> sum(parameter.numel() for parameter in wide_resnet28_10(width=1).parameters())
        143959
    """
    check_sizes(
        "wide_resnet28_10", num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride
    )
    return WideResNet(28, 10, num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride)


def wide_resnet34_10(
    num_classes: int = 10, *, width: int = 16, in_channels: int = 3, stem_stride: int = 1
) -> WideResNet:
    """WideResNet-34-10: 34 convolutions, 46.16 million parameters for 10 classes. RPAT's second network.

    Args:
        num_classes: number of classes, at least 2.
        width: channels of the stem; 16 is the published network.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 as the papers' code takes for Tiny-ImageNet's 64 x 64 images.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> sum(parameter.numel() for parameter in wide_resnet34_10(width=1).parameters())
        182039
    """
    check_sizes(
        "wide_resnet34_10", num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride
    )
    return WideResNet(34, 10, num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride)
