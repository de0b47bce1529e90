"""Images on disk, read into memory: class folders, Tiny-ImageNet's own layout, NumPy archives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._extras import extra
from perceptual_at.data.tensors import TensorImages

_Sample = tuple[Path, int]


def image_folder(
    root: str | Path,
    split: str = "train",
    *,
    size: int | None = None,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """Images in folders named after their classes: `root/split/class/**/image`.

    Every image is decoded once and held in memory as uint8 RGB (60,000 of 32 x 32: 184 MB; 100,000 of 64 x
    64: 1.2 GB). For more than fits, use `torchvision.datasets.ImageFolder` itself.

    Args:
        root: the folder that holds one folder per split.
        split: the name of a folder in `root`, such as `"train"`, `"test"` or `"val"`. Classes are numbered in
            the order of their names, and must be those of `train` where that exists.
        size: side length in pixels: shorter sides are scaled to it, longer ones cropped around the middle.
            Left out, all images must have one size, and are taken as they are.
        transform: see `TensorImages`.

    Returns:
        Images held as uint8 `(N, 3, H, W)`, served in [0, 1], with labels and class names.

    Raises:
        FileNotFoundError: if the folder is missing or holds no class folders, or a class has no image.
        ValueError: if splits have different classes, images differ in size, or an image cannot be read.
        ImportError: if torchvision is not installed.
    """
    root = Path(root).expanduser()
    samples, classes = _listed("image_folder", root / split)
    if split != "train" and (root / "train").is_dir():
        _, expected = _listed("image_folder", root / "train")
        if classes != expected:
            differing = sorted(set(classes) ^ set(expected))
            raise ValueError(
                f"image_folder: `{root / split}` has {len(classes)} classes but `{root / 'train'}` has "
                f"{len(expected)}, so labels would not mean the same; differing: {', '.join(differing[:5])}"
                f"{', ...' if len(differing) > 5 else ''}. Both need the same class folders."
            )
    return _decoded("image_folder", samples, classes, size, transform)


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
        transform: see `TensorImages`.
        classes: how many classes there have to be.
        images_per_class: how many images each class has to have; 500 for training and 50 for the test if left
            out.

    Returns:
        Images held as uint8 `(N, 3, 64, 64)` (1.2 GB for training), served in [0, 1], with labels and class
        names (WordNet identifiers).

    Raises:
        FileNotFoundError: if the folder or a part of it is missing; the message says what to put where.
        ValueError: if classes or counts are not as expected, or an image cannot be read.
        ImportError: if torchvision is not installed.
    """
    _check.choice("tiny_imagenet", "split", split, ("train", "test"))
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
        samples, names = _listed("tiny_imagenet", part)
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


def _annotated(part: Path) -> tuple[list[_Sample], list[str]]:
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
    part: Path, samples: Sequence[_Sample], names: Sequence[str], classes: int, images_per_class: int
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
    counts = torch.bincount(torch.tensor([label for _, label in samples]), minlength=classes)
    for name, found in zip(names, counts.tolist(), strict=True):
        if found != images_per_class:
            raise ValueError(
                f"tiny_imagenet: class {name!r} in `{part}` has {found} images, expected "
                f"{images_per_class}. Unpack the archive `tiny-imagenet-200.zip` again, or give "
                "`images_per_class=` if this is a part of it on purpose."
            )


def npz_images(
    path: str | Path,
    split: str = "train",
    *,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """Images in a NumPy archive with the arrays `x_train`, `y_train`, `x_test`, `y_test`.

    Args:
        path: the `.npz` file. Nothing in it is unpickled.
        split: what follows `x_` and `y_` in the names of the arrays.
        transform: see `TensorImages`.

    Returns:
        Images held as they are stored: uint8, or floating point in [0, 1]; `(N, C, H, W)`, or `(N, H, W, C)`
        and `(N, H, W)`, which are brought into that form. Served in [0, 1], with labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, lacks an array, or the arrays do not fit.
    """
    import numpy as np

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"npz_images: there is no file `{path}`.")
    keys = (f"x_{split}", f"y_{split}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            arrays = [archive[key] for key in keys if key in names]
    except Exception as error:  # NumPy and zipfile raise a dozen kinds
        raise ValueError(
            f"npz_images: `{path}` cannot be read as an archive of plain NumPy arrays ({error}); is it damaged?"
        ) from error
    if len(arrays) != 2:
        raise ValueError(
            f"npz_images: `{path}` must hold the arrays {keys[0]!r} and {keys[1]!r} for `split` {split!r}; it "
            f"holds {', '.join(map(repr, names))}."
        )
    images, labels = map(torch.from_numpy, arrays)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, labels, transform=transform)


def _listed(function: str, folder: Path) -> tuple[list[_Sample], list[str]]:
    """Images and their labels, by torchvision's rules for class folders."""
    ImageFolder = extra(function, "torchvision.datasets", why="to read image folders").ImageFolder
    if not folder.is_dir():
        there = sorted(entry.name for entry in folder.parent.iterdir()) if folder.parent.is_dir() else []
        found = f"it holds {', '.join(map(repr, there[:8]))}" if there else "it is empty or missing"
        raise FileNotFoundError(
            f"{function}: there is no folder {folder.name!r} in `{folder.parent}` ({found}). Wanted is "
            f"`{folder}/<class>/<image>`."
        )
    try:
        listed = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{function}: `{folder}` is no folder of class folders with images ({error}). Wanted is "
            f"`{folder}/<class>/<image>`."
        ) from error
    return [(Path(path), label) for path, label in listed.samples], list(listed.classes)


def _decoded(
    function: str,
    samples: Sequence[_Sample],
    classes: Sequence[str],
    size: int | None,
    transform: Callable[[Tensor], Any] | None,
) -> TensorImages:
    """Read all images into one tensor."""
    if size is not None:
        _check.count(function, "size", size)
    images: Tensor | None = None
    for index, (path, _) in enumerate(samples):
        image = _read(function, path, size)
        if images is None:
            images = torch.empty(len(samples), *image.shape, dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            advice = "Give one `size=` for all." if function == "image_folder" else "One does not belong here."
            raise ValueError(
                f"{function}: images differ in size: `{path}` has {image.shape[1]} x {image.shape[2]} "
                f"pixels, `{samples[0][0]}` has {images.shape[2]} x {images.shape[3]}. {advice}"
            )
        images[index] = image
    if images is None:
        raise FileNotFoundError(f"{function}: there are no images to read.")
    labels = torch.tensor([label for _, label in samples])
    return TensorImages(images, labels, transform=transform, classes=classes)


def _read(function: str, path: Path, size: int | None) -> Tensor:
    """One image, uint8 `(3, H, W)`."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{function}: `{path}` cannot be read as an image ({error}); it is damaged or incomplete. "
            "Restore or remove it."
        ) from error
    if size is not None and image.size != (size, size):
        image = functional.center_crop(functional.resize(image, [size]), [size, size])
    return functional.pil_to_tensor(image)  # type: ignore[no-any-return]
