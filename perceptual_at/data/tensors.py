"""Images held as one tensor: a data set that serves single samples and whole batches, and how to split it."""

import numbers
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from perceptual_at import _check, _random
from perceptual_at._shapes import UNSIGNED


class TensorImages(Dataset[Any]):
    """Images and labels in memory, served as float images in [0, 1].

    Stored as uint8, 60,000 CIFAR images take 184 MB and are decoded once, not once per epoch.

    - `dataset[5]` is one sample: image `(C, H, W)` and label, for an ordinary `DataLoader`.
    - `dataset[2:7]`, `dataset[[3, 1]]` and `dataset[mask]` are batches: `(B, C, H, W)` and `(B,)`;
      `dataset[:]` is everything. This is what `loader` uses.

    The `transform` is one of single images (as torchvision's): it receives the stored image `(C, H, W)`
    (uint8 where that is stored) and is called once for every image, also when a batch is asked for. To
    augment whole batches on the device of the model, leave it out and call
    `perceptual_at.augment.random_crop_flip` in the loop.

    Args:
        images: `(N, C, H, W)`, uint8, or floating point in [0, 1].
        labels: integer classes `(N,)`.
        transform: a function of one image, giving an image (or a tuple of images: two views).
        classes: the names of the classes, by label.

    Raises:
        TypeError: if images or labels are of another type, or `transform` is no function.
        ValueError: if shapes do not fit, or floating-point images leave [0, 1].

    Examples:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> dataset = TensorImages(images, torch.tensor([0, 1, 1]))
        >>> x, labels = dataset[1:]
        >>> x.shape, x.dtype, labels
        (torch.Size([2, 1, 8, 8]), torch.float32, tensor([1, 1]))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        transform: Callable[[Tensor], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        check_transform("TensorImages", transform)
        _check.tensor("TensorImages", "images", images)
        if images.ndim != 4:
            raise ValueError(
                f"TensorImages: `images` must have shape (N, C, H, W), got {tuple(images.shape)}. A single "
                "image needs `images.unsqueeze(0)`, grey images `images.unsqueeze(1)`."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"TensorImages: `images` must be uint8 or floating point, got {images.dtype}.")
        labels = _check.labels("TensorImages", labels, images=images)
        if images.is_floating_point() and images.numel():
            low, high = (float(extreme) for extreme in torch.aminmax(images))
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"TensorImages: floating-point `images` must lie in [0, 1], got values from {low:.4g} to "
                    f"{high:.4g}. Divide pixel values by 255; leave normalisation to the model "
                    "(perceptual_at.models.Normalize)."
                )
        check_classes("TensorImages", classes, labels)
        self.images = images
        self.labels = labels
        self.transform = transform
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Any:
        if isinstance(index, int | numbers.Integral):  # of NumPy too
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"TensorImages: index {index} is out of range for {len(self)} images.")
            return self._served(self.images[index]), int(self.labels[index])
        if not isinstance(index, (slice, Tensor)):  # an empty list has no integer type
            index = torch.as_tensor(index, device="cpu") if len(index) else slice(0)
        images, labels = self.images[index], self.labels[index]
        if images.ndim == 3:  # a tensor that holds one index
            return self._served(images), int(labels)
        if self.transform is None:
            return _unit_range(images), labels
        return default_collate([self._served(image) for image in images]), labels

    def _served(self, image: Tensor) -> Any:
        return _unit_range(image if self.transform is None else self.transform(image))

    def with_transform(self, transform: Callable[[Tensor], Any] | None) -> "TensorImages":
        """The same images (not copied) under another transform."""
        return TensorImages(self.images, self.labels, transform=transform, classes=self.classes)

    def __repr__(self) -> str:
        kind = str(self.images.dtype).removeprefix("torch.")
        return f"TensorImages({len(self)} images {tuple(self.images.shape[1:])}, {kind})"


def check_transform(function: str, transform: Any) -> None:
    """Require a function of one image, or None."""
    _check.function_of_one(function, "transform", transform, "one image")


def check_classes(function: str, classes: Any, labels: Tensor) -> None:
    """Require a name for every label, or None."""
    if classes is None:
        return
    _check.names(function, "classes", classes)
    if labels.numel():
        _check.label_range(function, int(labels.min()), int(labels.max()), len(classes))


def _unit_range(images: Any) -> Any:
    """Turn uint8 images, also inside tuples, into float32 in [0, 1]."""
    if isinstance(images, Tensor):
        return images.float().div(255) if images.dtype == torch.uint8 else images
    if isinstance(images, (tuple, list)):
        return tuple(_unit_range(image) for image in images)
    raise TypeError(
        f"TensorImages: `transform` must give tensors, got {type(images).__name__}. End a PIL transform with "
        "torchvision.transforms.v2.ToImage()."
    )


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A `DataLoader` that fetches each batch by one indexing of the data set.

    For `TensorImages` (or a `Subset` of one) and `TensorDataset` this is many times faster than collecting
    samples one by one. Other map-style data sets (`ConcatDataset`, `ImageFiles`, torchvision's) are asked for one
    sample after the other; for those that decode images take `DataLoader` itself, with workers.

    Args:
        dataset: a map-style data set.
        batch_size: samples per batch.
        shuffle: a new order in each pass.
        drop_last: leave out a last batch that is not full.
        generator: what draws the orders, on the CPU; torch's global generator if absent.

    Returns:
        An iterable of `(x, labels)`, with `len` batches. Where batches are indexed, `.dataset.dataset` is `dataset`.

    Raises:
        TypeError: if `dataset` is no map-style data set, or another argument of another type.
        ValueError: if `batch_size` is not positive, `generator` has no effect, or an empty data set is to be shuffled.

    Examples:
        >>> data = TensorImages(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> [len(labels) for x, labels in loader(data, 2)]
        [2, 2, 1]
    """
    given: Any = dataset
    if isinstance(given, tuple | IterableDataset) or not _is_indexed(given):
        hint = " Of a pair of tensors make one with TensorImages or TensorDataset." if isinstance(given, tuple) else ""
        raise TypeError(
            f"loader: `dataset` must be a map-style data set with a length, got {type(given).__name__}.{hint}"
        )
    _check.count("loader", "batch_size", batch_size)
    _check.flag("loader", shuffle=shuffle, drop_last=drop_last)
    _random.on_cpu("loader", generator)
    if generator is not None and not shuffle:
        raise ValueError("loader: `generator` has no effect without `shuffle=True`; leave it out.")
    size = cast("Sized", dataset)
    if shuffle and not len(size):
        raise ValueError("loader: `dataset` is empty; there is nothing to shuffle.")
    sampler = _Shuffled(size, generator=generator) if shuffle else SequentialSampler(size)
    batches = BatchSampler(sampler, int(batch_size), drop_last)
    # At every pass DataLoader draws a seed for workers (there are none): not from the global random state.
    own = torch.Generator() if generator is None else generator
    if not _takes_lists(dataset):
        return _Loader(dataset, batch_sampler=batches, generator=own)
    # Not `sampler=batches, batch_size=None`: what rebuilds loaders for several devices would lose the batches.
    return _Loader(_WholeBatches(dataset), batch_sampler=batches, collate_fn=_as_it_is, generator=own)


class _Loader(DataLoader[Any]):
    """A loader that draws its seeds on the CPU, where its generator is, whatever torch's default device."""

    def __iter__(self) -> Any:
        with torch.device("cpu"):
            return super().__iter__()


class _Shuffled(RandomSampler):
    """A new order in each pass, drawn on the CPU too."""

    def __iter__(self) -> Iterator[int]:
        with torch.device("cpu"):
            order = list(super().__iter__())
        return iter(order)


class _WholeBatches(Dataset[Any]):
    """A data set whose batches come by one indexing, already put together."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, rows: list[int]) -> Any:
        return self.dataset[rows]


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_indexed(data: Any) -> bool:
    """Whether something has a length and can be asked for its samples."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and getattr(data, "ndim", 1) > 0


def _takes_lists(dataset: Any) -> bool:
    """Whether indexing by a list gives a batch."""
    if isinstance(dataset, Subset):
        return _takes_lists(dataset.dataset)
    return isinstance(dataset, (TensorImages, TensorDataset))


_Data = TypeVar("_Data", bound=Dataset[Any])


@overload
def hold_out(
    data: tuple[Tensor, Tensor], amount: float, *, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...
@overload
def hold_out(data: TensorImages, amount: float, *, seed: int = 0) -> tuple[TensorImages, TensorImages]: ...
@overload
def hold_out(data: Any, amount: float, *, seed: int = 0) -> tuple[Any, Any]: ...
def hold_out(data: Any, amount: float, *, seed: int = 0) -> tuple[Any, Any]:
    """Split off a part that training does not see, with the same share of every class.

    Choosing a checkpoint on the test set makes the test set part of training: hold a validation set out of
    the training set and choose there.

    The split depends on the labels, `amount` and `seed` alone, and both parts keep the order of the data.
    Where labels are known (tensors, `TensorImages`, `TensorDataset`, torchvision data sets, subsets of
    these), every class gives its share, rounded so that the total is exact; otherwise all samples are alike.

    Args:
        data: a pair of tensors `(x, labels)` or a data set with a length.
        amount: how much to hold out: a fraction in (0, 1), or a number of samples as an integer.
        seed: which split.

    Returns:
        `(rest, held_out)`: pairs of tensors for a pair of tensors, `TensorImages` for `TensorImages` (the
        transform stays: give the held-out part `.with_transform(None)`), else `torch.utils.data.Subset`.

    Raises:
        TypeError: if `data` is neither, or `amount` or `seed` no number.
        ValueError: if nothing or everything would be held out.

    Examples:
        >>> x, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 4
        >>> (x_train, train_labels), (x_val, val_labels) = hold_out((x, labels), 0.2)
        >>> val_labels.bincount()
        tensor([5, 5, 5, 5])
    """
    size, labels = _labels_of(data)
    held = _held(amount, size)
    mask = _stratified_mask(labels, held, _random.of_seed("hold_out", seed))
    rest, kept = (~mask).nonzero().flatten(), mask.nonzero().flatten()
    return _part(data, rest), _part(data, kept)


def _part(data: Any, rows: Tensor) -> Any:
    """Some of the samples, of the kind that was given."""
    if isinstance(data, tuple):
        x, labels = data
        taken = labels.long()[rows].to(labels.dtype) if labels.dtype in UNSIGNED else labels[rows]
        return x[rows], taken
    if isinstance(data, TensorImages):
        return TensorImages(data.images[rows], data.labels[rows], transform=data.transform, classes=data.classes)
    return Subset(data, rows.tolist())


def _held(amount: Any, size: int) -> int:
    """How many of the samples an amount means."""
    if not _check.is_number(amount):
        raise TypeError(
            f"hold_out: `amount` must be a fraction (float) or a number of samples (int), got "
            f"{type(amount).__name__} {amount!r}."
        )
    amount = amount.item() if isinstance(amount, Tensor) else amount
    whole = isinstance(amount, int | numbers.Integral)
    if not whole and not 0 < amount < 1:
        raise ValueError(
            f"hold_out: a fractional `amount` must lie in (0, 1), got {amount!r}; give a number of samples "
            "as an integer."
        )
    held = int(amount) if whole else round(float(amount) * size)
    if not 0 < held < size:
        raise ValueError(
            f"hold_out: `amount` {amount!r} holds out {held} of {size} samples; both parts need at least one."
        )
    return held


def _labels_of(data: Any) -> tuple[int, Tensor]:
    """The number of samples and their labels; where labels are unknown, all samples are of one class."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(f"hold_out: `data` must be a pair `(x, labels)`, got a tuple of {len(data)}.")
        for name, value in zip(("x", "labels"), data, strict=True):
            _check.tensor("hold_out", name, value)
        return data[0].shape[0], _check.labels("hold_out", data[1], x=data[0]).cpu()
    if not _is_indexed(data):
        raise TypeError(
            f"hold_out: `data` must be a pair of tensors or a data set with a length, got {type(data).__name__}."
        )
    size, labels = len(data), _known_labels(data)
    return size, torch.zeros(size, dtype=torch.long, device="cpu") if labels is None else labels.cpu()


def _known_labels(data: Any) -> Tensor | None:
    """The labels `(N,)` of a data set, without reading its images, or None."""
    if isinstance(data, Subset):
        inner = _known_labels(data.dataset)
        return None if inner is None else inner[torch.as_tensor(list(data.indices), dtype=torch.long, device="cpu")]
    found = getattr(data, "labels", getattr(data, "targets", None))
    if found is None and isinstance(data, TensorDataset):
        found = data.tensors[-1]
    if found is None:
        return None
    labels = torch.as_tensor(found, device="cpu")
    usable = labels.ndim == 1 and labels.numel() == len(data) and not labels.is_floating_point()
    return labels.long() if usable else None


def _stratified_mask(labels: Tensor, held: int, generator: torch.Generator) -> Tensor:
    """Choose `held` of the samples, every class in proportion; largest remainders decide the rounding."""
    classes, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    quota = counts * held  # in units of 1 / N, so that the arithmetic is exact
    share, remainder = quota // labels.numel(), quota % labels.numel()
    order = remainder.argsort(descending=True, stable=True).tolist()
    order.sort(key=lambda position: int(counts[position] - share[position]) == 1)  # a class's last sample stays
    for position in order[: held - int(share.sum())]:
        share[position] += 1
    mask = torch.zeros(labels.numel(), dtype=torch.bool, device="cpu")
    for position in range(classes.numel()):
        members = (index == position).nonzero().flatten()
        order = torch.randperm(members.numel(), generator=generator, device="cpu")
        mask[members[order[: int(share[position])]]] = True
    return mask


def channel_statistics(images: Tensor | TensorImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of [0, 1]: what `Normalize` takes.

    Args:
        images: `(N, C, H, W)`, uint8 or in [0, 1], or a data set of such images (without its transform).

    Returns:
        `(mean, std)`, one number per channel each.

    Raises:
        TypeError: if `images` are neither uint8 nor floating point.
        ValueError: if they are not of shape `(N, C, H, W)`, or there are none.

    Examples:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
        ((0.5,), (0.5,))
    """
    stored = images.images if isinstance(images, TensorImages) else images
    _check.tensor("channel_statistics", "images", stored)
    if stored.ndim != 4 or stored.numel() == 0:
        raise ValueError(
            f"channel_statistics: `images` must have shape (N, C, H, W) and not be empty, got {tuple(stored.shape)}."
        )
    if stored.dtype != torch.uint8 and not stored.is_floating_point():
        raise TypeError(f"channel_statistics: `images` must be uint8 or floating point, got {stored.dtype}.")
    scale = 255.0 if stored.dtype == torch.uint8 else 1.0
    total = torch.zeros(stored.shape[1], dtype=torch.float64, device=stored.device)
    squares = torch.zeros_like(total)
    for part in torch.split(stored, 1024):  # float64 sums of a few images at a time: exact enough, and small
        values = part.double() / scale
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    mean = total / (stored.numel() // stored.shape[1])
    std = (squares / (stored.numel() // stored.shape[1]) - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
