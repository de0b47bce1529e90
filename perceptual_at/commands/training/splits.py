"""The images of a run: to train on, to select on, to test on, each part compared with the others."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from perceptual_at import data
from perceptual_at.commands.ingredients.images import Images, as_floats, fingerprint, images_of, shape_of
from perceptual_at.commands.ingredients.networks import Task
from perceptual_at.commands.options.settings import Network, Settings
from perceptual_at.data import TensorImages
from perceptual_at.data.archives import arrays_in

MANY = 10_000
"""So many classes are no slip in the numbering, even where a few images only try a run out."""


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
    if settings.evaluation.select_on == "test":
        return Splits(everything, test, test, classes, shape, extra)
    amount = settings.evaluation.held_out
    if amount is None:
        amount = min(1000, max(1, len(everything) // 10))
    try:
        train, held_out = _held_out(everything, amount, settings.running.seed)
    except ValueError as error:
        raise ValueError(f"--held-out: {error}") from error
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
    if classes > max(len(train), MANY):
        raise ValueError(
            f"the part 'train' has the label {classes - 1} and {len(train)} images, fewer than one for each of "
            f"{classes} classes; number the classes from 0 without gaps."
        )
    if int(test.labels.max()) >= classes:
        raise ValueError(
            f"the test has the label {int(test.labels.max())}, but training has the classes 0 to {classes - 1} only."
        )
    return classes


def _extra(path: Path, shape: tuple[int, int, int], classes: int) -> TensorImages:
    """The second source of images; without labels all are -1 until the first network labels them."""
    names, _ = arrays_in("--extra", path, ())
    if "x_train" not in names:
        raise ValueError(f"--extra: `{path}` cannot be read as an archive with x_train; it holds {', '.join(names)}.")
    if "y_train" in names:
        found = data.npz_images(path, "train")
    else:
        _, (pixels,) = arrays_in("--extra", path, ("x_train",))
        images = _channels_first(pixels.float() if pixels.is_floating_point() else pixels, shape)
        found = TensorImages(images, torch.full((len(images),), -1))
    if tuple(found.images.shape[1:]) != shape:
        raise ValueError(f"--extra: images have shape {tuple(found.images.shape[1:])}, those of --data {shape}.")
    if not len(found):
        raise ValueError(f"--extra: `{path}` holds no image.")
    if int(found.labels.max()) >= classes:
        raise ValueError(f"--extra has the label {int(found.labels.max())}, but --data has {classes} classes.")
    return found


def _channels_first(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images as `(N, C, H, W)`, as those that they go with."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    if images.ndim == 4 and images.shape[3] == shape[0] and tuple(images.shape[1:]) != shape:
        return images.permute(0, 3, 1, 2).contiguous()
    return images


def task_of(parts: Splits, chosen: Network) -> Task:
    """What the network of a run has to fit; only statistics need more images than a trial, and all are decoded."""
    return Task(parts.shape[0], parts.classes, parts.sample() if chosen.normalize == "own" else parts.sample(2))
