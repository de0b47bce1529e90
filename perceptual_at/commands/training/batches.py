"""What a run trains on, epoch by epoch: batches of rows, images and their views, also from a second source."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from perceptual_at import data
from perceptual_at.augment import seeded
from perceptual_at.commands.ingredients.images import Images, as_floats, batches, loaded, shape_of
from perceptual_at.commands.options.method import two_views
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.training.rates import rows_of_epoch, stream
from perceptual_at.commands.training.splits import Splits
from perceptual_at.data import ImageFiles


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
        for x, labels in loaded(seen, rows, workers, pinned):
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
