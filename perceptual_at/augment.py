"""Random changes of images that keep their classes: crops, flips, AutoAugment, CutMix, two views.

Of two kinds, for two places:

- Functions of a batch, for the training loop (`random_crop_flip`, `cutout`, `cutmix`): they draw anew for
  every image, run on the device the batch is on, and draw from a `generator`.
- Transforms of one image, for data sets (`standard`, `auto_augment`), composed of torchvision's. Do not give
  them batches: torchvision's transforms draw once per call, so that a batch would share one crop.

In the worker processes of a `DataLoader` leave `generator` out: each has a copy of it, in the same state at every pass.

Images stay in [0, 1]; labels keep their meaning. Flips are wrong for digits and letters: `flip=False`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from perceptual_at import _check, _random
from perceptual_at._extras import extra


@overload
def random_crop_flip(
    x: Tensor,
    *,
    padding: int = ...,
    padding_mode: Literal["constant", "reflect"] = ...,
    flip: bool = ...,
    labels: None = ...,
    generator: torch.Generator | None = ...,
) -> Tensor: ...
@overload
def random_crop_flip(
    x: Tensor,
    *,
    padding: int = ...,
    padding_mode: Literal["constant", "reflect"] = ...,
    flip: bool = ...,
    labels: Tensor,
    generator: torch.Generator | None = ...,
) -> tuple[Tensor, Tensor]: ...
def random_crop_flip(
    x: Tensor,
    *,
    padding: int = 4,
    padding_mode: Literal["constant", "reflect"] = "constant",
    flip: bool = True,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each image of a batch shifted by up to `padding` pixels and mirrored or not, drawn for each by itself.

    The same as padding by `padding`, cropping back to the old size at a random place and mirroring every
    second image on average, which is how the papers augment.

    Args:
        x: images `(B, C, H, W)` of any dtype.
        padding: how many pixels to shift at most, in each direction; 0 shifts nothing.
        padding_mode: what is seen beyond the edge: `"constant"` is black (RPAT, RAAT, Consistency-AT),
            `"reflect"` the mirrored image (ReBAT, RPAT++, RAAT#).
        flip: mirror left and right with probability one half.
        labels: one per pixel, `(B, H, W)`, which move with their images; -100, no label, beyond a black edge.
        generator: what draws, on the device of `x`; torch's global generator if absent.

    Returns:
        New images of the shape and dtype of `x`, and with `labels` a pair of these and the new labels, int64. Gradients
        flow back to the pixels shown.

    Raises:
        TypeError: if `x` is no tensor, `padding` no integer, or `generator` no generator.
        ValueError: if `x` is not of shape `(B, C, H, W)`, `padding` is negative, or no smaller than the
            image where that is reflected; if labels are of another size, or something is on another device.

    Examples:
        >>> x = torch.rand(8, 3, 32, 32)
        >>> views = random_crop_flip(x), random_crop_flip(x)
        >>> views[0].shape
        torch.Size([8, 3, 32, 32])
        >>> images, marks = random_crop_flip(x, labels=torch.zeros(8, 32, 32, dtype=torch.long))
        >>> marks.shape
        torch.Size([8, 32, 32])
    """
    home = _check_images("random_crop_flip", x, generator)
    _check.flag("random_crop_flip", flip=flip)
    batch, _, height, width = x.shape
    if labels is not None:
        labels = _check.indices("random_crop_flip", labels, read=False, x=x)  # int64: bytes cannot hold -100
    _check_padding("random_crop_flip", padding, padding_mode, min(height, width))
    padding = int(padding)

    def places(size: int) -> Tensor:
        """Which row (or column) of each image is shown at each place, `(B, size)`; may lie outside."""
        shift = torch.randint(-padding, padding + 1, (batch, 1), generator=generator, device=home).to(x.device)
        return torch.arange(size, device=x.device) + shift

    rows, columns = places(height), places(width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator, device=home).to(x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if padding_mode == "reflect":
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
        shown = _pick(x, rows, columns)
        return shown if labels is None else (shown, _pick(labels.unsqueeze(1), rows, columns).squeeze(1))
    inside = _both((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    shown = _pick(x, rows, columns)
    shown = torch.where(inside, shown, torch.zeros_like(shown))
    if labels is None:
        return shown
    return shown, _pick(labels.unsqueeze(1), rows, columns).masked_fill(~inside, _check.NO_LABEL).squeeze(1)


def cutout(x: Tensor, *, length: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Each image of a batch with a black square, drawn for each by itself (DeVries and Taylor 2017).

    The middle of the square is any pixel; what reaches over the edge is cut off.

    Args:
        x: images `(B, C, H, W)` of any dtype.
        length: side of the square in pixels, rounded down to an even number; half the image's height if
            absent, as in Consistency-AT. One pixel covers nothing.
        generator: what draws, on the device of `x`; torch's global generator if absent.

    Returns:
        New images of the shape and dtype of `x`.

    Raises:
        TypeError: if `x` is no tensor, `length` no integer, or `generator` no generator.
        ValueError: if `x` is not of shape `(B, C, H, W)`, `length` not positive, or the generator on another
            device.

    Examples:
        >>> x = cutout(torch.ones(1, 1, 8, 8), length=2)
        >>> bool(x.sum() >= 8 * 8 - 2 * 2)
        True
    """
    home = _check_images("cutout", x, generator)
    batch, _, height, width = x.shape
    if length is None:
        length = max(height // 2, 1)
    _check.count("cutout", "length", length)

    def covered(size: int) -> Tensor:
        middle = torch.randint(0, size, (batch, 1), generator=generator, device=home).to(x.device)
        place = torch.arange(size, device=x.device)
        return (place >= middle - length // 2) & (place < middle + length // 2)

    return torch.where(_both(covered(height), covered(width)), torch.zeros_like(x), x)


def cutmix(
    x: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Images with a box from another image of the batch, and labels in proportion (Yun et al. 2019).

    Runs torchvision's `CutMix`: one box per batch, its share of the image drawn from
    Beta(`alpha`, `alpha`), filled from the image before it in the batch (so shuffle the batch).

    Args:
        x: images `(B, C, H, W)`.
        labels: integer classes `(B,)`.
        num_classes: number of classes K.
        alpha: parameter of the Beta distribution; ReBAT and RPAT++ use 1.
        generator: what draws, on the CPU; torch's global generator if absent.

    Returns:
        `(x, soft_labels)`: new images, and probabilities `(B, K)`, which `cross_entropy` takes as they are.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `x` is no tensor, or labels are not integers.
        ValueError: if shapes do not fit, labels are out of range, `alpha` is not positive, or the generator is not on
            the CPU.

    Examples:
        >>> x, soft_labels = cutmix(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 1]), num_classes=3)
        >>> soft_labels.sum(dim=1)
        tensor([1., 1., 1., 1.])
    """
    _check_images("cutmix", x, None)
    _check.count("cutmix", "num_classes", num_classes)
    _check.labels("cutmix", labels, classes=num_classes, x=x)
    _check.number("cutmix", "alpha", alpha, above=0)
    _random.on_cpu("cutmix", generator)
    with torch.device("cpu"):  # where it keeps what it draws from
        mix = _torchvision("cutmix").CutMix(alpha=float(alpha), num_classes=num_classes)
    mixed, soft_labels = seeded(mix, generator)(x, labels.long())
    return mixed, soft_labels


def standard(
    size: int,
    *,
    padding: int = 4,
    padding_mode: Literal["constant", "reflect"] = "constant",
    flip: bool = True,
) -> Callable[[Any], Tensor]:
    """The papers' augmentation as a transform of one image: pad, crop at random, mirror or not.

    `--augment_type base` in the code of Consistency-AT, RPAT and RAAT. `random_crop_flip` does the same
    to a batch, faster.

    Args:
        size: side of the image in pixels.
        padding: pixels added on each side before cropping.
        padding_mode: `"constant"` adds black (RPAT, RAAT, Consistency-AT), `"reflect"` mirrors (ReBAT,
            RPAT++, RAAT#).
        flip: mirror left and right with probability one half.

    Returns:
        A transform from an image (PIL, or a tensor `(C, H, W)`, uint8 or in [0, 1]) to a float tensor in [0,
        1]. It draws from torch's global random state; see `seeded`.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `size` or `padding` is no integer.
        ValueError: if the padding mode is unknown, `size` not positive, `padding` negative, or no smaller than
            the image where that is reflected.

    Examples:
        >>> standard(32)(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """
    v2 = _torchvision("standard")
    steps = [v2.PILToTensor(), *_crop_flip("standard", size, padding, padding_mode, flip)]
    return cast("Callable[[Any], Tensor]", v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)]))


def auto_augment(
    size: int,
    *,
    padding: int = 4,
    padding_mode: Literal["constant", "reflect"] = "constant",
    flip: bool = True,
) -> Callable[[Any], Tensor]:
    """AutoAugment for CIFAR as a transform of one image: crop, flip, a drawn policy, cutout.

    `--augment_type autoaug` in the code of Consistency-AT (Cubuk et al. 2019, with torchvision's table of the
    25 policies): grey is seen beyond the edges of turned images, and the cutout's side is half the image's.
    Its `autoaug_sche` is `standard` for the first half of the epochs and this for the second.

    Args:
        size: side of the image in pixels.
        padding: pixels added on each side before cropping.
        padding_mode: `"constant"` adds black, `"reflect"` mirrors.
        flip: mirror left and right with probability one half.

    Returns:
        A transform from an image (PIL, or a tensor `(C, H, W)`, uint8 or in [0, 1]) to a float tensor in [0,
        1], in steps of 1/255. It draws from torch's global random state; see `seeded`.

    Raises:
        ImportError: if torchvision is not installed.
        TypeError: if `size` or `padding` is no integer.
        ValueError: if the padding mode is unknown, `size` not positive, `padding` negative, or no smaller than
            the image where that is reflected.

    Examples:
        >>> auto_augment(32)(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """
    v2 = _torchvision("auto_augment")
    steps = [v2.PILToTensor(), *_crop_flip("auto_augment", size, padding, padding_mode, flip)]
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    as_bytes, as_floats = v2.ToDtype(torch.uint8, scale=True), v2.ToDtype(torch.float32, scale=True)
    return cast("Callable[[Any], Tensor]", v2.Compose([*steps, as_bytes, policy, as_floats, _cutout_of_one_image]))


class TwoViews:
    """Two independent draws of one transform from the same input: what Consistency-AT and RAAT train on.

    Works for transforms of one image, inside a data set, and for functions of a batch, inside a loop.

    Args:
        transform: any function that draws: `standard(32)`, `functools.partial(random_crop_flip,
            generator=g)`.

    Examples:
        >>> x1, x2 = TwoViews(random_crop_flip)(torch.rand(8, 3, 32, 32))
        >>> torch.equal(x1, x2)
        False
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        _check.called("TwoViews", transform=transform)
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Any, Any]:
        """Draw both views."""
        return self.transform(image), self.transform(image)

    def __repr__(self) -> str:
        return f"TwoViews({self.transform!r})"


def seeded(transform: Callable[..., Any], generator: torch.Generator | None) -> Callable[..., Any]:
    """A transform that draws from a generator of its own, leaving torch's global random state alone.

    torchvision's transforms know no generator. In the worker processes of a `DataLoader` none is needed:
    there the global random state follows from the loader's `generator`. One that is given all the same comes to each
    worker as a copy, in the same state at every pass; its numbers are then joined with the worker's own seed.

    Args:
        transform: a function that draws from torch's global random state on the CPU.
        generator: what to draw from, on the CPU; absent, the transform is returned as it is.

    Returns:
        A function of the same arguments.

    Raises:
        TypeError: if `transform` cannot be called or `generator` is no generator.
        ValueError: if the generator is not on the CPU.

    Examples:
        >>> image = torch.rand(3, 32, 32)
        >>> first = seeded(standard(32), torch.Generator().manual_seed(0))(image)
        >>> again = seeded(standard(32), torch.Generator().manual_seed(0))(image)
        >>> torch.equal(first, again)
        True
    """
    _check.called("seeded", transform=transform)
    _random.on_cpu("seeded", generator)
    if generator is None:
        return transform

    return functools.partial(_drawn, transform, generator, os.getpid())


def _drawn(transform: Callable[..., Any], generator: torch.Generator, home: int, *inputs: Any) -> Any:
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    worker = get_worker_info()
    if worker is not None and os.getpid() != home:  # a copy: without its seed all workers and passes would be alike
        seed = (seed + worker.seed) % 2**63
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # where it draws, whatever torch's default device
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which reseeds GPUs too
        return transform(*inputs)


def _check_images(function: str, x: Tensor, generator: torch.Generator | None) -> torch.device:
    """Require a batch of images, and a generator for its device; gives where to draw."""
    _check.tensor(function, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{function}: `x` must be images of shape (B, C, H, W), got {tuple(x.shape)}.")
    if generator is None:
        return x.device
    return _random.source(function, generator, x.device).device


def _pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The given rows `(B, H)` and columns `(B, W)` of each image."""
    picked = torch.take_along_dim(x, rows[:, None, :, None], dim=2)
    return torch.take_along_dim(picked, columns[:, None, None, :], dim=3)


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    """The mask `(B, 1, H, W)` of the pixels in both a marked row and a marked column."""
    return rows[:, None, :, None] & columns[:, None, None, :]


def _cutout_of_one_image(image: Tensor) -> Tensor:
    return cutout(image.unsqueeze(0)).squeeze(0)


def _check_padding(function: str, padding: int, padding_mode: str, size: int) -> None:
    """Require a padding that the image has pixels for."""
    _check.choice(function, "padding_mode", padding_mode, ("constant", "reflect"))
    _check.integer(function, "padding", padding)
    if not 0 <= padding < 2**31 or (padding_mode == "reflect" and padding >= size):
        most = f", and below {size} to be reflected" if padding_mode == "reflect" else ""
        raise ValueError(f"{function}: `padding` must be at least 0{most}, got {padding}.")


def _crop_flip(function: str, size: int, padding: int, padding_mode: str, flip: bool) -> list[Any]:
    v2 = _torchvision(function)
    _check.count(function, "size", size)
    _check.flag(function, flip=flip)
    _check_padding(function, padding, padding_mode, size)
    crop = v2.RandomCrop(int(size), padding=int(padding) or None, padding_mode=padding_mode)
    return [crop, v2.RandomHorizontalFlip()] if flip else [crop]


def _torchvision(function: str) -> Any:
    """The transforms of torchvision, or a message that says where to get them."""
    return extra(function, "torchvision.transforms.v2", why="for this augmentation")
