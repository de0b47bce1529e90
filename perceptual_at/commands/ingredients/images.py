"""Images by the names of the command line: read, told apart from others, served in batches."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from perceptual_at import data
from perceptual_at.commands.options.settings import Data
from perceptual_at.commands.options.words import option
from perceptual_at.data import ImageFiles, TensorImages

Images = TensorImages | ImageFiles

ON_DISK = ("folder", "tars")


def images_of(chosen: Data, split: str) -> Images:
    """The images of one split, `train` or `test`, or another where the files have one (npz, folder, tars)."""
    _check(chosen)
    if chosen.data not in ("npz", *ON_DISK) and split not in ("train", "test"):
        raise ValueError(f"--split must be train or test with --data {chosen.data}, got {split!r}.")
    if chosen.data in ON_DISK:
        return _on_disk(chosen, split)
    if chosen.data == "random":
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return TensorImages(pixels, torch.randint(0, 10, (64,), generator=generator))
    if chosen.data == "digits":
        if split != "train":
            return TensorImages(*data.digits("test"))
        rest, more = data.digits("train"), data.digits("validation")
        return TensorImages(torch.cat([rest[0], more[0]]), torch.cat([rest[1], more[1]]))
    if chosen.data in ("cifar10", "cifar100"):
        read = data.cifar10 if chosen.data == "cifar10" else data.cifar100
        return read(chosen.root, "train" if split == "train" else "test", download=chosen.download)
    if chosen.data == "tiny_imagenet":
        return data.tiny_imagenet(chosen.root, "train" if split == "train" else "test")
    return data.npz_images(chosen.root, split, layout=chosen.layout)


def _on_disk(chosen: Data, split: str) -> Images:
    sides = chosen.size if len(chosen.size) == 2 else chosen.size * 2
    size: tuple[int, int] | None = (sides[0], sides[1]) if sides else None
    options: dict[str, Any] = {"grey": chosen.grey, "skip_damaged": chosen.skip_damaged}
    if chosen.data == "tars":
        return data.stream_tars(chosen.root, split, size=size or 224, **options)
    if chosen.stream:
        return data.stream_folder(chosen.root, split, size=size or 224, **options)
    return data.image_folder(chosen.root, split, size=size, **options)


def _check(chosen: Data) -> None:
    """Refuse options without effect."""
    plain = Data()
    for name, kinds in {
        "stream": ("folder",), "size": ON_DISK, "grey": ON_DISK, "skip_damaged": ON_DISK, "layout": ("npz",),
        "download": ("cifar10", "cifar100"),
    }.items():  # fmt: skip
        if getattr(chosen, name) != getattr(plain, name) and chosen.data not in kinds:
            raise ValueError(f"{option(name)} has no effect with --data {chosen.data}.")
    if chosen.augment == "resized_crop" and not chosen.streams:
        raise ValueError("--augment resized_crop is for streamed images (--data tars, or folder with --stream).")


def shape_of(images: Images) -> tuple[int, int, int]:
    """Shape of one image, `(C, H, W)`."""
    channels, height, width = images.shape if isinstance(images, ImageFiles) else images.images.shape[1:]
    return channels, height, width


def fingerprint(images: Images) -> str:
    """SHA-256 of images and labels; of names, places and labels where images stay on the disk."""
    if isinstance(images, ImageFiles):
        return images.fingerprint()
    digest = hashlib.sha256()
    for tensor in (images.images, images.labels):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Batches ----------------------------------------------------------------------------------------------------------


def as_floats(x: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]."""
    return x.float().div(255) if x.dtype == torch.uint8 else x


def batches(images: Images, rows: Sequence[Tensor], *, workers: int, pinned: bool = False) -> Iterator[tuple[Any, Any]]:
    """Images in [0, 1] and labels of the given rows, one batch after the other."""
    if isinstance(images, TensorImages):
        yield from (images[batch] for batch in rows)
        return
    for x, labels in loaded(images, rows, workers, pinned):
        yield as_floats(x), labels


def loaded(images: Dataset[Any], rows: Sequence[Tensor], workers: int, pinned: bool) -> DataLoader[Any]:
    """A loader of given batches; its own generator, so that nothing is drawn from the global random state."""
    return DataLoader(
        images, batch_sampler=[batch.tolist() for batch in rows], num_workers=min(workers, len(rows)),
        pin_memory=pinned, generator=torch.Generator(), worker_init_fn=_alone,
    )  # fmt: skip


def _alone(worker: int) -> None:  # noqa: ARG001
    """One thread per worker: they are as many as there are."""
    if get_worker_info() is not None:
        torch.set_num_threads(1)
