"""Residual networks for small images: the papers' ResNet-18, its bottleneck sibling, PreActResNet-18."""

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from perceptual_at import _check
from perceptual_at.models._parts import check_sizes, convolution, pool


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them, activation last (He et al. 2015, Fig. 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, activated."""
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class BottleneckBlock(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution, four times narrower inside (He et al. 2015, Fig. 5 right)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = convolution(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = convolution(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = convolution(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, activated."""
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each after its norm and activation (He et al. 2016, Fig. 4e).

    The shortcut is the untouched input; where the size changes, a 1 x 1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, not activated."""
        activated = relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(activated)))) + around
        return out


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The shortcut of an activation-last block: nothing, or a 1 x 1 convolution with batch norm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


_BLOCKS: dict[str, tuple[type[nn.Module], int]] = {
    "basic": (BasicBlock, 1),
    "bottleneck": (BottleneckBlock, 4),
    "preactivation": (PreActivationBlock, 1),
}


class ResNet(nn.Module):
    """A residual network with a 3 x 3 stem and four stages, for images of about 32 x 32 pixels.

    Stages have 1, 2, 4 and 8 times `width` channels (four times that outside bottlenecks); the last three
    halve the image. Weights start as torch's layers do, as in the papers' code. Parameters are named as in
    the common CIFAR implementations (`conv1`, `bn1`, `layer1.0.conv1`, ..., `shortcut`, `linear`; for
    pre-activation `bn` before the pool), so that weights trained with those load.

    Args:
        block: `"basic"`, `"bottleneck"` or `"preactivation"`.
        depths: blocks in each of the four stages.
        num_classes: number of classes, at least 2.
        width: channels of the stem.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 to halve the image at once, as the papers' code does for the 64 x 64 images of
            Tiny-ImageNet.

    Shape:
        `(B, in_channels, H, W)` in [0, 1] to logits `(B, num_classes)`.

    Raises:
        TypeError: if a size is no integer, or `depths` no sequence.
        ValueError: if a size is not positive, there is one class only, the block is unknown, or there are not four
            depths.

    Examples:
        >>> import torch
        >>> ResNet("basic", (1, 1, 1, 1), width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    perception_layers: ClassVar[dict[str, str]] = {
        "logits": "linear",
        "second_to_last": "pool",
        "third_to_last": "layer3",
    }

    def __init__(
        self,
        block: Literal["basic", "bottleneck", "preactivation"],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        _check.choice("ResNet", "block", block, tuple(_BLOCKS))
        check_sizes(
            "ResNet",
            num_classes=num_classes,
            width=width,
            in_channels=in_channels,
            stem_stride=stem_stride,
        )
        if not _check.is_sequence(depths) or len(depths) != 4:
            raise (ValueError if _check.is_sequence(depths) else TypeError)(
                f"ResNet: `depths` must hold four numbers, one per stage, got {depths!r}."
            )
        for depth in depths:
            _check.count("ResNet", "depths", depth)
        kind, expansion = _BLOCKS[block]
        sizes = [width, *(expansion * width * factor for factor in (1, 2, 4, 8))]

        def stage(index: int) -> nn.Sequential:
            inputs, outputs = sizes[index - 1 : index + 1]
            first = kind(inputs, outputs, 1 if index == 1 else 2)
            return nn.Sequential(first, *(kind(outputs, outputs, 1) for _ in range(depths[index - 1] - 1)))

        self.conv1 = convolution(in_channels, width, 3, stem_stride)
        # A pre-activation network norms before the pool, the others after the stem.
        self.bn1 = None if block == "preactivation" else nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = stage(1), stage(2), stage(3), stage(4)
        self.bn = nn.BatchNorm2d(sizes[-1]) if block == "preactivation" else None
        self.pool = pool()
        self.linear = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out = self.conv1(x)
        if self.bn1 is not None:
            out = relu(self.bn1(out))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.bn is not None:
            out = relu(self.bn(out))
        logits: Tensor = self.linear(self.pool(out))
        return logits


def resnet18(num_classes: int = 10, *, width: int = 64, in_channels: int = 3, stem_stride: int = 1) -> ResNet:
    """ResNet-18 for small images: 20 convolutions in basic blocks, 11.17 million parameters for 10 classes.

    What the papers call ResNet-18 in their tables; what their code built is `resnet26_bottleneck`.

    Args:
        num_classes: number of classes, at least 2.
        width: channels of the stem; 64 is the published network.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 as the papers' code takes for Tiny-ImageNet's 64 x 64 images (the papers' text
            does not mention it); the stages then see and cost the same as on 32 x 32 images.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet18().parameters())
        11173962
    """
    check_sizes("resnet18", num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride)
    return ResNet(
        "basic",
        (2, 2, 2, 2),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        stem_stride=stem_stride,
    )


def resnet26_bottleneck(
    num_classes: int = 10, *, width: int = 64, in_channels: int = 3, stem_stride: int = 1
) -> ResNet:
    """The network that the papers' released code trains as "ResNet-18": bottleneck blocks, 2 in each stage.

    29 convolutions (26 layers on the longest path), 13.96 million parameters for 10 classes. Take it to
    reproduce numbers published for "ResNet-18" (RPAT, RAAT), and `resnet18` to compare with everybody else's.

    Args:
        num_classes: number of classes, at least 2.
        width: channels of the stem; 64 is the published network.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 as the papers' code takes for Tiny-ImageNet's 64 x 64 images.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet26_bottleneck().parameters())
        13958986
    """
    check_sizes(
        "resnet26_bottleneck", num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride
    )
    return ResNet(
        "bottleneck",
        (2, 2, 2, 2),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        stem_stride=stem_stride,
    )


def preact_resnet18(num_classes: int = 10, *, width: int = 64, in_channels: int = 3, stem_stride: int = 1) -> ResNet:
    """PreActResNet-18 for small images: norm and activation before each convolution.

    11.17 million parameters for 10 classes. The network of ReBAT, RPAT++ and RAAT#, with a last batch norm
    before the pool (He et al. 2016).

    Args:
        num_classes: number of classes, at least 2.
        width: channels of the stem; 64 is the published network.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: 1, or 2 to halve larger images at once.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or there is one class only.

    Examples:
        >>> sum(parameter.numel() for parameter in preact_resnet18().parameters())
        11172170
    """
    check_sizes(
        "preact_resnet18", num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride
    )
    return ResNet(
        "preactivation",
        (2, 2, 2, 2),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        stem_stride=stem_stride,
    )
