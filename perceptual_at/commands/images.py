"""The images of a run: read, compared with each other, split, told apart from others, served in batches."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from perceptual_at import data
from perceptual_at.augment import seeded
from perceptual_at.commands.rates import rows_of_epoch, stream
from perceptual_at.commands.settings import Data, Settings
from perceptual_at.commands.steps import two_views
from perceptual_at.commands.words import option
from perceptual_at.data import ImageFiles, TensorImages

Images = TensorImages | ImageFiles

ON_DISK = ("folder", "tars")


def images_of(chosen: Data, split: str) -> Images:
    """The images of one split, `train` or `test`."""
    _check(chosen)
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
    streamed = chosen.data == "tars" or chosen.stream
    if chosen.augment == "resized_crop" and not streamed:
        raise ValueError("--augment resized_crop is for streamed images (--data tars, or folder with --stream).")


# Splits -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Splits:
    """Images to train on, to select on, and to test on, of the same classes and shape."""

    train: Images
    select: Images
    test: Images
    classes: int
    shape: tuple[int, int, int]
    extra: TensorImages | None = None

    def sizes(self) -> dict[str, int]:
        """How many images each part has."""
        return {"train": len(self.train), "select": len(self.select), "test": len(self.test)} | (
            {} if self.extra is None else {"extra": len(self.extra)}
        )

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each part, to notice that a run goes on with other images."""
        parts = {"train": self.train, "select": self.select, "test": self.test}
        return {
            name: fingerprint(part) for name, part in (parts | ({"extra": self.extra} if self.extra else {})).items()
        }

    def sample(self, most: int = 256) -> Tensor:
        """Training images in [0, 1], evenly spread from the first to the last."""
        rows = torch.linspace(0, len(self.train) - 1, max(2, min(len(self.train), most))).long().tolist()
        return torch.stack([as_floats(self.train[row][0]) for row in rows])


def splits(settings: Settings) -> Splits:
    """All images of a run, each part compared with the others.

    Raises:
        ValueError: if parts differ in shape or classes, or nothing would be left to train on.
    """
    everything, test = images_of(settings.data, "train"), images_of(settings.data, "test")
    shape = shape_of(everything)
    if shape_of(test) != shape:
        raise ValueError(f"images for training have shape {shape}, for the test {shape_of(test)}; they must be equal.")
    classes = _classes(everything, test)
    extra = None if settings.data.extra is None else _extra(settings.data.extra, shape, classes)
    share = int(settings.data.extra_share * settings.optimisation.batch)
    if extra is not None and not 0 < share < settings.optimisation.batch:
        raise ValueError(
            f"--extra-share {settings.data.extra_share:g} takes {share} of a batch of {settings.optimisation.batch} "
            "from --extra; both sources need at least one."
        )
    if extra is None and settings.data.extra_share != Data.extra_share:
        raise ValueError("--extra-share has no effect without --extra.")
    if settings.evaluation.select_on == "test":
        return Splits(everything, test, test, classes, shape, extra)
    amount = settings.evaluation.held_out
    if amount is None:
        amount = min(1000, max(1, len(everything) // 10))
    train, held_out = _held_out(everything, amount, settings.running.seed)
    return Splits(train, held_out, test, classes, shape, extra)


def _held_out(images: Images, amount: float, seed: int) -> tuple[Images, Images]:
    if isinstance(images, TensorImages):
        return data.hold_out(images, amount, seed=seed)
    rows = torch.arange(len(images))
    (rest, _), (held, _) = data.hold_out((rows, images.labels), amount, seed=seed)
    return images.rows(rest), images.rows(held)


def _classes(train: Images, test: Images) -> int:
    """How many classes there are; labels of the test beyond those of training are refused."""
    if train.classes is not None and test.classes is not None and train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"classes for training and for the test differ: {', '.join(differing[:6])}.")
    for name, part in (("train", train), ("test", test)):
        if not len(part):
            raise ValueError(f"there are no images in the part {name!r}.")
        if int(part.labels.min()) < 0:
            raise ValueError(f"the part {name!r} has the label {int(part.labels.min())}; classes start at 0.")
    classes = int(train.labels.max()) + 1 if train.classes is None else len(train.classes)
    if classes < 2:
        raise ValueError("there must be at least two classes to train on.")
    if int(test.labels.max()) >= classes:
        raise ValueError(
            f"the test has the label {int(test.labels.max())}, but training has the classes 0 to {classes - 1} only."
        )
    return classes


def _extra(path: Path, shape: tuple[int, int, int], classes: int) -> TensorImages:
    """The second source of images; without labels all are -1 until the first network labels them."""
    import numpy as np

    if not path.is_file():
        raise ValueError(f"--extra: there is no file `{path}`.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            labelled = "y_train" in archive.files
            unlabelled = None if labelled else torch.from_numpy(archive["x_train"])
    except Exception as error:  # NumPy and zipfile raise a dozen kinds
        raise ValueError(f"--extra: `{path}` cannot be read as an archive with x_train ({error}).") from error
    if unlabelled is None:
        found = data.npz_images(path, "train")
    else:
        if unlabelled.ndim == 4 and unlabelled.shape[3] == shape[0] and tuple(unlabelled.shape[1:]) != shape:
            unlabelled = unlabelled.permute(0, 3, 1, 2).contiguous()
        found = TensorImages(unlabelled, torch.zeros(len(unlabelled), dtype=torch.long))
        found.labels = found.labels - 1
    if tuple(found.images.shape[1:]) != shape:
        raise ValueError(f"--extra: images have shape {tuple(found.images.shape[1:])}, those of --data {shape}.")
    if not len(found):
        raise ValueError(f"--extra: `{path}` holds no image.")
    if int(found.labels.max()) >= classes:
        raise ValueError(f"--extra has the label {int(found.labels.max())}, but --data has {classes} classes.")
    return found


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
    for x, labels in _loaded(images, rows, workers, pinned):
        yield as_floats(x), labels


def training_batches(
    settings: Settings, parts: Splits, rows: Sequence[Tensor], *, epoch: int, pinned: bool
) -> Iterator[tuple[Tensor | tuple[Tensor, ...], Tensor]]:
    """What a process trains on in the rest of an epoch: batches, or tuples of views where the images came as such."""
    train, chosen = parts.train, settings.data
    own, others = ([batch[batch < len(train)] for batch in rows], [batch[batch >= len(train)] for batch in rows])
    cropped = isinstance(train, ImageFiles) and chosen.augment in (None, "resized_crop")
    views = 1 + two_views(settings.method)

    def served(images: Images, rows: Sequence[Tensor], draws: str, workers: int) -> Iterator[tuple[Any, Any]]:
        if not cropped:
            yield from batches(images, rows, workers=workers, pinned=pinned)
            return
        seen = Views(images, seed=settings.running.seed, draws=f"{draws} {epoch}", views=views, flip=chosen.flip)
        for x, labels in _loaded(seen, rows, workers, pinned):
            yield tuple(as_floats(view) for view in x), labels

    source = served(train, own, "views", chosen.workers)
    if parts.extra is None:
        yield from source
        return
    more = served(parts.extra, [batch - len(train) for batch in others], "views of the second source", 0)
    for (x, labels), (x_more, labels_more) in zip(source, more, strict=True):
        joined = tuple(torch.cat(pair) for pair in zip(x, x_more, strict=True)) if cropped else torch.cat([x, x_more])
        yield joined, torch.cat([labels, labels_more])


def rows_of(parts: Splits, settings: Settings, epoch: int) -> list[Tensor]:
    """The joint batches of an epoch, the same in every process.

    Where there is a second source, a share of each is drawn from it, whose rows are counted on from the first's.
    """
    seed, size, real = settings.running.seed, settings.optimisation.batch, len(parts.train)
    if parts.extra is None:
        return rows_of_epoch(seed, real, size, epoch)
    draw = stream(seed, "extra", epoch)
    mixed = data.mixed_rows(
        real,
        len(parts.extra),
        batch_size=size,
        fraction=settings.data.extra_share,
        batches=real // size,
        generator=draw,
    )
    together = [torch.cat([own, more + real]) for own, more in mixed]
    return [batch[torch.randperm(size, generator=draw)] for batch in together]  # so that every process gets of both


def _loaded(images: Dataset[Any], rows: Sequence[Tensor], workers: int, pinned: bool) -> DataLoader[Any]:
    """A loader of given batches; its own generator, so that nothing is drawn from the global random state."""
    return DataLoader(
        images, batch_sampler=[batch.tolist() for batch in rows], num_workers=min(workers, len(rows)),
        pin_memory=pinned, generator=torch.Generator(), worker_init_fn=_alone,
    )  # fmt: skip


def _alone(worker: int) -> None:  # noqa: ARG001
    """One thread per worker: they are as many as there are."""
    if get_worker_info() is not None:
        torch.set_num_threads(1)


class Views(Dataset[Any]):
    """Random crops of images, scaled and mirrored, which depend on seed, draws (which name the epoch) and row alone.

    So a run that goes on in the middle of an epoch sees what it would have seen, with any number of workers.
    """

    def __init__(self, images: Images, *, seed: int, draws: str, views: int, flip: bool) -> None:
        self.images, self.seed, self.draws, self.views, self.flip = images, seed, draws, views, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[tuple[Tensor, ...], int]:
        image = self.images.whole(row) if isinstance(self.images, ImageFiles) else self.images.images[row]
        transform = _cropping(shape_of(self.images)[1:], self.flip)
        draw = stream(self.seed, self.draws, row)
        views = tuple(seeded(transform, draw)(image) for _ in range(self.views))
        return views, int(self.images.labels[row])


@functools.cache
def _cropping(size: tuple[int, int], flip: bool) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError("--augment resized_crop needs torchvision; run `pip install torchvision`.") from error
    crop = v2.RandomResizedCrop(size, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop
