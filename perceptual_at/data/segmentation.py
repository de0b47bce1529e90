"""Images with a label at every pixel: digits on a canvas, and folders of images and masks."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._check import NO_LABEL
from perceptual_at._extras import extra
from perceptual_at.data.decoding import opened, to_bytes
from perceptual_at.data.sklearn_digits import digits

BACKGROUND = 10
"""The label of a pixel of `digit_canvases` that belongs to no digit."""

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def digit_canvases(
    count: int,
    split: Literal["train", "validation", "test"] = "train",
    *,
    size: int = 24,
    per_canvas: int = 3,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Handwritten digits at random places of an empty canvas, every pixel labelled: a small task for segmentation.

    The digits are those of `digits(split)`, so canvases of two splits share none. They may overlap: a pixel belongs to
    the digit with more ink there, and to the background where none has any.

    Args:
        count: number of canvases.
        split: which digits to place.
        size: side of the canvas in pixels, at least 8, the side of a digit.
        per_canvas: digits on each canvas.
        seed: which digits go where.

    Returns:
        `(x, labels)`: float32 `(count, 1, size, size)` in [0, 1], and int64 `(count, size, size)`, 0 to 9 for the
        digits and 10 for the background.

    Raises:
        ImportError: if scikit-learn is not installed.
        TypeError: if a number is no integer.
        ValueError: if a number is too small or the split unknown.

    Examples:
        >>> x, labels = digit_canvases(5, "test")
        >>> x.shape, labels.shape, int(labels.max())
        (torch.Size([5, 1, 24, 24]), torch.Size([5, 24, 24]), 10)
    """
    _check.choice("digit_canvases", "split", split, ("train", "validation", "test"))
    for name, value in (("count", count), ("size", size), ("per_canvas", per_canvas)):
        _check.count("digit_canvases", name, value)
    if size < 8:
        raise ValueError(f"digit_canvases: `size` must be at least 8, the side of a digit, got {size}.")
    generator = _random.of_seed("digit_canvases", seed)
    pictures, classes = digits(split)
    chosen = torch.randint(len(pictures), (count, per_canvas), generator=generator, device="cpu")
    corners = torch.randint(size - 8 + 1, (count, per_canvas, 2), generator=generator, device="cpu")
    x = torch.zeros(count, 1, size, size, device="cpu")
    labels = torch.full((count, size, size), BACKGROUND, device="cpu")
    for canvas, marks, places, numbers in zip(x[:, 0], labels, corners.tolist(), chosen.tolist(), strict=True):
        for (top, left), number in zip(places, numbers, strict=True):
            part = slice(top, top + 8), slice(left, left + 8)
            inked = pictures[number, 0] > canvas[part]
            canvas[part] = torch.where(inked, pictures[number, 0], canvas[part])
            marks[part] = torch.where(inked, classes[number], marks[part])
    return x, labels


def mask_folder(
    root: str | Path, split: str = "train", *, size: int | None = None, ignored: int | None = 255
) -> tuple[Tensor, Tensor]:
    """Images and the masks beside them: `root/split/images/NAME.*` with `root/split/masks/NAME.png`.

    A mask is a PNG of class indices in up to eight bits, grey or with a palette, of the size of its image; black and
    white in one bit are 0 and 1. Images are taken or refused as `image_folder` does. Everything is read into memory.

    Args:
        root: the folder that holds one folder per split.
        split: the name of a folder in `root`.
        size: images (bilinear) and masks (nearest) are scaled to squares of this side, in pixels. Left out, all images
            must have one size.
        ignored: the index of pixels without a label, -100 in what is returned; None if there are none. 255 is usual.

    Returns:
        `(x, labels)`: float32 `(N, 3, H, W)` in [0, 1], and int64 `(N, H, W)`, in the order of the names.

    Raises:
        FileNotFoundError: if a folder is missing or empty, or an image has no mask or a mask no image.
        TypeError: if `root` is no path, or `size` or `ignored` no integer.
        ValueError: if a file cannot be read, is no mask of indices, or sizes differ.
        ImportError: if Pillow is not installed.
    """
    _check.path("mask_folder", "root", root)
    _check.text("mask_folder", split=split)
    if ignored is not None:
        _check.integer("mask_folder", "ignored", ignored)
    if size is not None:
        _check.count("mask_folder", "size", size)
    folder = Path(root).expanduser() / split
    images, masks = (_by_stem(folder / name, kinds) for name, kinds in (("images", _IMAGES), ("masks", (".png",))))
    unpaired = sorted(images.keys() ^ masks.keys())
    if unpaired:
        raise FileNotFoundError(
            f"mask_folder: {len(unpaired)} names in `{folder}` have an image or a mask but not both, such as "
            f"{unpaired[0]!r}; wanted are `images/{unpaired[0]}.*` and `masks/{unpaired[0]}.png`."
        )
    pairs = [(_image(images[name], size), _mask(masks[name], size)) for name in sorted(images)]
    height_and_width = pairs[0][0].shape[1:]
    for name, (image, mask) in zip(sorted(images), pairs, strict=True):
        if image.shape[1:] != height_and_width or mask.shape != height_and_width:
            raise ValueError(
                f"mask_folder: `{images[name]}` has {tuple(image.shape[1:])} pixels and its mask {tuple(mask.shape)}, "
                f"but the first image has {tuple(height_and_width)}; all must be equal. Give one `size=` for all."
            )
    labels = torch.stack([mask for _, mask in pairs])
    if ignored is not None:
        labels = labels.masked_fill(labels == ignored, NO_LABEL)
    return torch.stack([image for image, _ in pairs]), labels


def _by_stem(folder: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"mask_folder: there is no folder `{folder}`; wanted are `images` and `masks` in it.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in kinds or not path.is_file():
            continue
        if path.stem in found:
            raise ValueError(f"mask_folder: `{found[path.stem]}` and `{path}` have one name; which one is meant?")
        found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"mask_folder: `{folder}` holds no {' or '.join(kinds)} files.")
    return found


def _image(path: Path, size: int | None) -> Tensor:
    """Float32 `(3, H, W)` in [0, 1]."""
    from PIL import Image

    image = opened("mask_folder", path, str(path)).convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return to_bytes(image).float() / 255


def _mask(path: Path, size: int | None) -> Tensor:
    """Indices `(H, W)`, int64."""
    image_module = extra("mask_folder", "PIL.Image", why="to read images")
    try:
        with image_module.open(path) as file:
            written = str(file.tile[0][3]) if file.tile else ""
            mask = extra("mask_folder", "PIL.ImageOps", why="to read images").exif_transpose(file).copy()
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(
            f"mask_folder: `{path}` cannot be read as an image ({error}). Restore or remove it."
        ) from error
    if mask.mode not in ("L", "P", "1"):
        raise ValueError(
            f"mask_folder: `{path}` must be a mask of class indices (grey or with a palette), got mode {mask.mode!r}."
        )
    if size is not None:
        mask = mask.resize((size, size), image_module.Resampling.NEAREST)
    # Pillow spreads grey of fewer bits over all of a byte.
    step = 255 if mask.mode == "1" else {"L;2": 85, "L;4": 17}.get(written, 1)
    return to_bytes(mask.convert("L") if mask.mode == "1" else mask)[0].long() // step
