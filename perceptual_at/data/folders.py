"""Images on disk, read into memory: class folders, and Tiny-ImageNet's own layout."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at.data.decoding import Size, checked_size, decode
from perceptual_at.data.listing import Sample, class_files, same_classes
from perceptual_at.data.tensors import TensorImages, check_transform


def image_folder(
    root: str | Path,
    split: str = "train",
    *,
    size: Size | None = None,
    grey: bool = False,
    skip_damaged: bool = False,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """Images in folders named after their classes: `root/split/class/**/image`.

    Every image is decoded once and held in memory as uint8 RGB (60,000 of 32 x 32: 184 MB; 100,000 of 64 x
    64: 1.2 GB). For more than fits, take `stream_folder`. Grey and palette images become colour images, EXIF's
    orientation is applied, an opaque alpha channel is dropped, of the pictures in a camera's JPEG the first is taken;
    what eight bits of RGB cannot hold (16-bit and floating-point pixels, transparency, CMYK, several frames) is
    refused. Hidden entries, links that lead back, pipes and files with other suffixes are left out, with a warning
    that counts and names them.

    Args:
        root: the folder that holds one folder per split.
        split: the name of a folder in `root`, such as `"train"`, `"test"` or `"val"`. Classes are numbered in
            the order of their names, and must be those of `train` where that exists.
        size: side length in pixels, or height and width: shorter sides are scaled to it, longer ones cropped around
            the middle. Left out, all images must have one size, and are taken as they are.
        grey: hold one channel instead of three.
        skip_damaged: leave out images that cannot be read, with a warning that counts and names them.
        transform: a function of one image, giving an image (or a tuple of images: two views).

    Returns:
        Images held as uint8 `(N, 3, H, W)`, or `(N, 1, H, W)`, served in [0, 1], with labels and class names.

    Raises:
        FileNotFoundError: if the folder is missing or holds no class folders, or a class has no image.
        TypeError: if `root` is no path, `size` no integer, or `transform` no function.
        ValueError: if splits have different classes, images differ in size, or an image cannot be read.
        ImportError: if Pillow is not installed.
    """
    _check.path("image_folder", "root", root)
    _check.text("image_folder", split=split)
    _check.flag("image_folder", grey=grey, skip_damaged=skip_damaged)
    check_transform("image_folder", transform)
    if size is not None:
        size = checked_size("image_folder", size)
    root = Path(root).expanduser()
    samples, classes = class_files("image_folder", root / split)
    same_classes("image_folder", root, split, classes)
    return _decoded("image_folder", samples, classes, size, transform, grey=grey, skip_damaged=skip_damaged)


def tiny_imagenet(
    root: str | Path,
    split: Literal["train", "test"] = "train",
    *,
    transform: Callable[[Tensor], Any] | None = None,
    classes: int = 200,
    images_per_class: int | None = None,
) -> TensorImages:
    """Tiny-ImageNet: 100,000 training and 10,000 test images of 64 x 64 colour pixels in 200 classes.

    Read as it is unpacked, with no file moved: `train/<wnid>/images/*.JPEG`, and `val/images` with
    `val_annotations.txt`. A folder whose `val` has been sorted into classes (`val/<wnid>/...`) is read as
    well. Labels number the classes in the order of their WordNet identifiers, as `ImageFolder` does.

    Args:
        root: the folder `tiny-imagenet-200`, or the one that holds it.
        split: `"train"`, or `"test"`: the labelled images in `val`, which the papers test on (the labels of
            the data set's own test images are not public). Split a validation set off the training images
            with `hold_out`.
        transform: a function of one image, giving an image (or a tuple of images: two views).
        classes: how many classes there have to be.
        images_per_class: how many images each class has to have; 500 for training and 50 for the test if left
            out.

    Returns:
        Images held as uint8 `(N, 3, 64, 64)` (1.2 GB for training), served in [0, 1], with labels and class
        names (WordNet identifiers).

    Raises:
        FileNotFoundError: if the folder or a part of it is missing; the message says what to put where.
        TypeError: if `root` is no path, a count no integer, or `transform` no function.
        ValueError: if `split` is unknown, classes or counts are not as expected, or an image cannot be read.
        ImportError: if Pillow is not installed.
    """
    _check.path("tiny_imagenet", "root", root)
    _check.choice("tiny_imagenet", "split", split, ("train", "test"))
    check_transform("tiny_imagenet", transform)
    _check.count("tiny_imagenet", "classes", classes)
    if images_per_class is None:
        images_per_class = 500 if split == "train" else 50
    _check.count("tiny_imagenet", "images_per_class", images_per_class)
    root = Path(root).expanduser()
    if not (root / "train").is_dir() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    part = root / ("train" if split == "train" else "val")
    if not part.is_dir():
        raise FileNotFoundError(
            f"tiny_imagenet: `root` {str(root)!r} holds no folder `{part.name}`. Unpack "
            "`tiny-imagenet-200.zip` (from http://cs231n.stanford.edu/tiny-imagenet-200.zip) and give the "
            "folder `tiny-imagenet-200` in it."
        )
    if split == "test" and {entry.name for entry in part.iterdir() if entry.is_dir()} == {"images"}:
        samples, names = _annotated(part)
    else:
        samples, names = class_files("tiny_imagenet", part, known=(".txt",))
    _check_counts(part, samples, names, classes, images_per_class)
    if split == "test" and (root / "train").is_dir():
        trained = {folder.name for folder in (root / "train").iterdir() if folder.is_dir()}
        if trained != set(names):
            raise ValueError(
                f"tiny_imagenet: the classes of `{part}` are not those of `{root / 'train'}` "
                f"({len(trained ^ set(names))} differ), so labels would not mean the same. Unpack the "
                "archive again."
            )
    return _decoded("tiny_imagenet", samples, names, None, transform)


def _annotated(part: Path) -> tuple[list[Sample], list[str]]:
    """The images of `val/images` with the classes that `val_annotations.txt` gives them."""
    path = part / "val_annotations.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"tiny_imagenet: `{part}` holds `images` but no `val_annotations.txt`, so nothing tells the "
            "images' classes. Put the file back from the archive `tiny-imagenet-200.zip`."
        )
    labelled: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if not line.strip():
            continue
        if len(fields) < 2:
            raise ValueError(
                f"tiny_imagenet: line {number} of `{path}` must hold a file name and a class separated by a "
                f"tab, got {line[:60]!r}. Put the file back from the archive `tiny-imagenet-200.zip`."
            )
        labelled[fields[0]] = fields[1]
    present = {image.name for image in (part / "images").iterdir() if image.suffix.lower() in (".jpeg", ".jpg")}
    if present != set(labelled):
        lost, extra = sorted(set(labelled) - present), sorted(present - set(labelled))
        raise ValueError(
            f"tiny_imagenet: `{path.name}` and the folder `images` in `{part}` do not agree: {len(lost)} "
            f"images are missing, {len(extra)} have no class (such as {(lost + extra)[0]!r}). Unpack the "
            "archive again."
        )
    names = sorted(set(labelled.values()))
    number_of = {name: index for index, name in enumerate(names)}
    return [(part / "images" / image, number_of[labelled[image]]) for image in sorted(labelled)], names


def _check_counts(
    part: Path, samples: Sequence[Sample], names: Sequence[str], classes: int, images_per_class: int
) -> None:
    if len(names) != classes:
        hint = (
            " The validation images seem to lie in one folder: put `val_annotations.txt` next to it."
            if len(names) == 1
            else ""
        )
        raise ValueError(
            f"tiny_imagenet: `{part}` holds {len(names)} classes, expected {classes}.{hint} Unpack the "
            "archive `tiny-imagenet-200.zip` again, or give `classes=` if this is a part of it on purpose."
        )
    counts = torch.bincount(torch.tensor([label for _, label in samples], device="cpu"), minlength=classes)
    for name, found in zip(names, counts.tolist(), strict=True):
        if found != images_per_class:
            raise ValueError(
                f"tiny_imagenet: class {name!r} in `{part}` has {found} images, expected "
                f"{images_per_class}. Unpack the archive `tiny-imagenet-200.zip` again, or give "
                "`images_per_class=` if this is a part of it on purpose."
            )


def _decoded(
    function: str,
    samples: Sequence[Sample],
    classes: Sequence[str],
    size: Size | None,
    transform: Callable[[Tensor], Any] | None,
    *,
    grey: bool = False,
    skip_damaged: bool = False,
) -> TensorImages:
    """Read all images into one tensor."""
    images: Tensor | None = None
    kept: list[int] = []
    damaged: list[tuple[Path, str]] = []
    for path, label in samples:
        try:
            image = decode(function, path, str(path), size=size, grey=grey)
        except ValueError as error:
            if not skip_damaged:
                raise
            damaged.append((path, str(error)))
            continue
        if images is None:
            images, first = torch.empty(len(samples), *image.shape, dtype=torch.uint8, device="cpu"), path
        if image.shape != images.shape[1:]:
            advice = "Give one `size=` for all." if function == "image_folder" else "One does not belong here."
            raise ValueError(
                f"{function}: images differ in size: `{path}` has {image.shape[1]} x {image.shape[2]} "
                f"pixels, `{first}` has {images.shape[2]} x {images.shape[3]}. {advice}"
            )
        images[len(kept)] = image
        kept.append(label)
    if images is None:
        raise FileNotFoundError(f"{function}: there are no images to read{f'; {damaged[0][1]}' if damaged else ''}.")
    if damaged:
        named = ", ".join(str(path) for path, _ in damaged[:20])
        warnings.warn(
            f"{function}: left out {len(damaged)} of {len(samples)} images that cannot be read: {named}"
            f"{', ...' if len(damaged) > 20 else ''}.",
            stacklevel=3,
        )
    return TensorImages(images[: len(kept)], torch.tensor(kept, device="cpu"), transform=transform, classes=classes)
