"""CIFAR-10 and CIFAR-100 in memory, from torchvision's layout."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._extras import extra
from perceptual_at.data.tensors import TensorImages, check_transform

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
"""Mean of each channel over CIFAR-10's training images, as ReBAT normalises (CIFAR-100 too)."""
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
"""Standard deviation of each channel over CIFAR-10's training images, as ReBAT normalises (CIFAR-100 too)."""


def cifar10(
    root: str | Path,
    split: Literal["train", "test"] = "train",
    *,
    download: bool = False,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 colour pixels in 10 classes.

    Args:
        root: the folder that holds, or is to hold, `cifar-10-batches-py`.
        split: `"train"` or `"test"`. Split a validation set off the training images with `hold_out`.
        download: fetch and unpack the data set (170 MB) if it is not there.
        transform: a function of one image, giving an image (or a tuple of images: two views).

    Returns:
        Images held as uint8 `(N, 3, 32, 32)`, served in [0, 1], with labels and class names.

    Raises:
        FileNotFoundError: if it is not there and was not asked for, or could not be fetched; the message says
            what to put where.
        TypeError: if `root` is no path, or `transform` no function.
        ValueError: if `split` is unknown, or a file is damaged or another data set's (checked by MD5).
        ImportError: if torchvision is not installed.
    """
    return _cifar("cifar10", "CIFAR10", root, split, download, transform)


def cifar100(
    root: str | Path,
    split: Literal["train", "test"] = "train",
    *,
    download: bool = False,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 colour pixels in 100 classes.

    Args:
        root: the folder that holds, or is to hold, `cifar-100-python`.
        split: `"train"` or `"test"`. Split a validation set off the training images with `hold_out`.
        download: fetch and unpack the data set (169 MB) if it is not there.
        transform: a function of one image, giving an image (or a tuple of images: two views).

    Returns:
        Images held as uint8 `(N, 3, 32, 32)`, served in [0, 1], with labels and class names.

    Raises:
        FileNotFoundError: if it is not there and was not asked for, or could not be fetched; the message says
            what to put where.
        TypeError: if `root` is no path, or `transform` no function.
        ValueError: if `split` is unknown, or a file is damaged or another data set's (checked by MD5).
        ImportError: if torchvision is not installed.
    """
    return _cifar("cifar100", "CIFAR100", root, split, download, transform)


def _cifar(
    function: str,
    name: str,
    root: str | Path,
    split: str,
    download: bool,
    transform: Callable[[Tensor], Any] | None,
) -> TensorImages:
    _check.path(function, "root", root)
    _check.choice(function, "split", split, ("train", "test"))
    _check.flag(function, download=download)
    check_transform(function, transform)
    datasets = extra(function, "torchvision.datasets", why="to read this data set")
    kind = getattr(datasets, name)
    root = Path(root).expanduser()
    folder = root / kind.base_folder
    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    where = (
        f"Put the folder `{kind.base_folder}` with the files {', '.join(file for file, _ in files)} into "
        f"`{root}`, or put `{kind.filename}` (MD5 {kind.tgz_md5}, from "
        "https://www.cs.toronto.edu/~kriz/cifar.html) there and call with `download=True` (of a command: "
        "`--download`), which then only unpacks it."
    )
    if not download and not folder.is_dir():
        raise FileNotFoundError(
            f"{function}: `root` {str(root)!r} holds no folder `{kind.base_folder}`. {where} With an "
            "internet connection, `download=True` fetches it."
        )
    if not download:
        _check_files(function, folder, files, where)
    try:
        with warnings.catch_warnings():
            # The files were pickled by a NumPy of long ago; new ones warn about how its types are spelled.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            stored = kind(root, train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{function}: the data set could not be fetched or unpacked into `{root}` ({error}). {where}"
        ) from error
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, torch.tensor(stored.targets, device="cpu"), transform=transform, classes=stored.classes)


def _check_files(function: str, folder: Path, files: list[list[str]], where: str) -> None:
    """Require every file, unchanged; also keeps foreign files from being unpickled."""
    for name, md5 in files:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{function}: `{path}` is missing. {where}")
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(
                f"{function}: `{path}` is damaged, or belongs to another data set: its MD5 is {found}, not "
                f"{md5}. Remove it and start again. {where}"
            )
