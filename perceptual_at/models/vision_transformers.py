"""A vision transformer for small images, without batch norm."""

from collections import OrderedDict
from typing import Literal

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at import _check
from perceptual_at.models._parts import check_sizes


class VisionTransformer(nn.Module):
    """A DeiT-like transformer: patches as tokens, blocks of attention and a perceptron, the mean of the tokens.

    It has layer norm only: nothing depends on who shares the batch, and train and eval mode differ by drop-path alone.
    Attention is `scaled_dot_product_attention`. Weights start from a truncated normal of standard deviation 0.02, as
    DeiT's. Other image sizes than `image_size` get its positions by interpolation.

    Args:
        depth: number of blocks.
        width: length of a token.
        heads: attention heads; they divide `width`.
        num_classes: number of classes, at least 2.
        patch_size: side of the patches in pixels.
        image_size: side of the images that positions are learnt for, a multiple of `patch_size`.
        in_channels: 3 for colour, 1 for grey.
        drop_path: probability with which the last block leaves a sample out in train mode; earlier blocks less, in
            proportion to their depth.

    Shape:
        `(B, in_channels, H, W)` in [0, 1] to logits `(B, num_classes)`.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, there is one class only, sizes do not divide, or `drop_path` is outside
            [0, 1).

    Source:
        Touvron et al. 2021 (DeiT), with the mean of the tokens in place of a class token; drop-path: Huang et al. 2016.

    Examples:
        >>> VisionTransformer(2, 24, 3)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    perception_layers: dict[Literal["logits", "second_to_last", "third_to_last"], str]

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        *,
        num_classes: int = 10,
        patch_size: int = 4,
        image_size: int = 32,
        in_channels: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        name = "VisionTransformer"
        check_sizes(name, depth=depth, width=width, heads=heads, num_classes=num_classes, patch_size=patch_size)
        check_sizes(name, image_size=image_size, in_channels=in_channels)
        _check.number(name, "drop_path", drop_path, at_least=0.0, below=1.0)
        for of, large, by, small in (
            ("width", width, "heads", heads), ("image_size", image_size, "patch_size", patch_size),
        ):  # fmt: skip
            if large % small:
                raise ValueError(f"{name}: `{of}`={large} must be a multiple of `{by}`={small}.")
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        side = image_size // patch_size
        self.positions = nn.Parameter(torch.empty(1, width, side, side))
        drops = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, heads, drop) for drop in drops))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pool = MeanOfTokens()
        self.head = nn.Linear(width, num_classes)
        # Table 5 by block: what the classifier reads, and what the last block but one gives.
        before = f"blocks.{depth - 2}" if depth > 1 else "patches"
        self.perception_layers = {"logits": "head", "second_to_last": "pool", "third_to_last": before}
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        tokens = _with_positions(self.patches(x), self.positions).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.pool(self.norm(self.blocks(tokens))))
        return logits


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = (("fc1", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("fc2", nn.Linear(4 * width, width)))
        self.perceptron = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens `(B, N, width)`, changed."""
        tokens = tokens + self.drop_path(self.attention(self.norm1(tokens)))
        changed: Tensor = tokens + self.drop_path(self.perceptron(self.norm2(tokens)))
        return changed


class Attention(nn.Module):
    """Every token looks at every other, in several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mixed tokens `(B, N, width)`."""
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class DropPath(nn.Module):
    """In train mode, leaves out a branch for some samples, and scales it up for the others."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Return the branch; in eval mode as it is."""
        if not self.training or self.probability == 0:
            return branch
        stays = torch.full_like(branch[:, :1, :1], 1.0 - self.probability)
        return branch * torch.bernoulli(stays) / (1.0 - self.probability)

    def extra_repr(self) -> str:
        """Show the probability when the model is printed."""
        return f"{self.probability:g}"


class MeanOfTokens(nn.Module):
    """The mean over all tokens, `(B, N, C)` to `(B, C)`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean."""
        return tokens.mean(dim=1)


@torch.fx.wrap  # one node of a traced graph: the size decides
def _with_positions(patches: Tensor, positions: Tensor) -> Tensor:
    if patches.shape[-2:] == positions.shape[-2:]:
        return patches + positions
    return patches + functional.interpolate(positions, size=patches.shape[-2:], mode="bicubic", antialias=False)


def vit_small(
    num_classes: int = 10, *, width: int = 384, image_size: int = 32, in_channels: int = 3, drop_path: float = 0.1
) -> VisionTransformer:
    """A ViT of DeiT-Small's shape on patches of 4 x 4 pixels: 12 blocks, 6 heads, 21.34 million parameters.

    Args:
        num_classes: number of classes, at least 2.
        width: length of a token, a multiple of 6; 384 is DeiT-Small's.
        image_size: side of the images, a multiple of 4.
        in_channels: 3 for colour, 1 for grey.
        drop_path: probability with which the last block leaves a sample out in train mode; earlier blocks less, in
            proportion to their depth.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, there is one class only, sizes do not divide, or `drop_path` is outside
            [0, 1).

    Examples:
        >>> sum(parameter.numel() for parameter in vit_small(width=6).parameters())
        6880
    """
    name = "vit_small"
    check_sizes(name, num_classes=num_classes, width=width, image_size=image_size, in_channels=in_channels)
    _check.number(name, "drop_path", drop_path, at_least=0.0, below=1.0)
    for argument, side, part in (("width", width, 6), ("image_size", image_size, 4)):
        if side % part:
            raise ValueError(f"{name}: `{argument}` must be a multiple of {part}, got {side}.")
    return VisionTransformer(
        12, width, 6, num_classes=num_classes, image_size=image_size, in_channels=in_channels, drop_path=drop_path
    )
