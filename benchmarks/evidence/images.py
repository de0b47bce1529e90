"""The images: decoded once into one file, and split the same way for every arm and seed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evidence.design import Design
from perceptual_at._files import written_whole
from perceptual_at.data import TensorImages, hold_out, image_folder, npz_images

SPLITS = ("train", "test")


class Images(NamedTuple):
    """Images of one regime, as uint8."""

    train: TensorImages
    held_out: TensorImages
    test: TensorImages
    exact: TensorImages | None
    """The same test images before JPEG, as far as they are at hand."""


def decoded(root: Path, cache: Path) -> Path:
    """The images of a folder `SPLIT/CLASS/IMAGE` in one archive, written at the first call."""
    if not cache.exists():
        parts = {split: image_folder(root, split) for split in SPLITS}
        arrays = {f"x_{split}": part.images.numpy() for split, part in parts.items()}
        arrays |= {f"y_{split}": part.labels.numpy() for split, part in parts.items()}
        with written_whole(cache) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)
    return cache


def split(cache: Path, exact: Path | None, design: Design, regime: str) -> Images:
    """What a run sees. Held-out images and the small training set do not depend on the run's seed."""
    train, held_out = hold_out(npz_images(cache, "train"), design.held_out)
    if regime == "small":
        _, train = hold_out(train, design.small)
    test = npz_images(cache, "test")
    return Images(train, held_out, test, None if exact is None else npz_images(exact, "test"))


def stratified(images: TensorImages, count: int) -> Tensor:
    """Indices of so many images, the classes in proportion, in the order of the data."""
    index = torch.arange(len(images))
    if count >= len(images):
        return index
    _, (chosen, _) = hold_out((index, images.labels), count)
    return chosen


def batches(images: TensorImages, index: Tensor | None = None, *, size: int = 250, device: str = "cpu"):
    """Triples of images in [0, 1], labels and indices."""
    index = torch.arange(len(images)) if index is None else index
    for rows in index.split(size):
        x, labels = images[rows]
        yield x.to(device), labels.to(device), rows
