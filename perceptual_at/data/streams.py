"""Images that stay on the disk: read and decoded when they are asked for, from class folders or tar archives."""

import hashlib
import io
import json
import operator
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from perceptual_at import _check
from perceptual_at._values import entries_of
from perceptual_at.data.decoding import SUFFIXES, Size, checked_size, decode
from perceptual_at.data.listing import class_files, same_classes
from perceptual_at.data.tensors import check_classes


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Encoded images with labels, decoded one by one when they are asked for: any number of them in little memory.

    Made by `stream_folder` and `stream_tars`. A `DataLoader` with workers decodes in parallel, in any order, also the
    same one again; what is held per image is its name and place, some forty bytes.

    Args:
        paths: the files that hold images.
        labels: classes `(N,)`.
        size: side of the images that are served, or height and width: shorter sides are scaled to it, longer ones
            cropped around the middle.
        classes: their names.
        grey: serve one channel instead of three.
        places: for archives, which of `paths` each image is in, at which byte, and how long: three integers `(N, 3)`.

    Raises:
        TypeError: if a path, `labels` or `places` are of another type, or `size` is no integer.
        ValueError: if shapes do not fit, or labels are out of range.

    Examples:
        >>> files = ImageFiles(["a.png", "b.png"], torch.tensor([0, 1]), size=32, classes=["cat", "dog"])
        >>> len(files), files.shape, files.labels.tolist()
        (2, (3, 32, 32), [0, 1])
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        labels: Tensor,
        *,
        size: Size,
        classes: Sequence[str] | None = None,
        grey: bool = False,
        places: Tensor | None = None,
    ) -> None:
        _check.tensor("ImageFiles", "labels", labels)
        size = checked_size("ImageFiles", size)
        _check.flag("ImageFiles", grey=grey)
        if isinstance(paths, str | Tensor) or not isinstance(paths, Iterable):
            raise TypeError(f"ImageFiles: `paths` must hold the names of files, got {type(paths).__name__}.")
        encoded = [_encoded(path) for path in paths]
        # One buffer and its offsets: a list of texts would cost several times as much, and be copied by workers.
        self._names = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
        self._ends = torch.tensor([len(name) for name in encoded], dtype=torch.long, device="cpu").cumsum(0)
        self._places = None if places is None else _checked_places(places, len(encoded))
        held = len(encoded) if places is None else len(places)
        if labels.shape != (held,):
            raise ValueError(f"ImageFiles: `labels` must be of shape ({held},), got {tuple(labels.shape)}.")
        labels = _check.labels("ImageFiles", labels, labels=labels)
        check_classes("ImageFiles", classes, labels)
        self.labels, self.size, self.grey = labels, size, grey
        self.classes = None if classes is None else tuple(classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(C, H, W)`."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return (1 if self.grey else 3, height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = self._row(index)
        source, named = self._source(index)
        return decode("ImageFiles", source, named, size=self.size, grey=self.grey), int(self.labels[index])

    def whole(self, index: int) -> Tensor:
        """An image in its own size, uint8 `(C, H, W)`, for transforms that choose what to crop."""
        source, named = self._source(index)
        return decode("ImageFiles", source, named, size=None, grey=self.grey)

    def name(self, index: int) -> str:
        """Where an image is."""
        return self._source(index, opened=False)[1]

    def without(self, rows: Sequence[int]) -> "ImageFiles":
        """The same images but for those rows."""
        keep = torch.ones(len(self), dtype=torch.bool, device="cpu")
        keep[list(rows)] = False
        return self.rows(keep.nonzero().flatten())

    def rows(self, index: Tensor) -> "ImageFiles":
        """The images of some rows, in that order; a mask of them counts as their numbers."""
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        places = self._places
        names = range(len(self._ends)) if places is not None else index.tolist()
        return ImageFiles(
            (self._path(row) for row in names), self.labels[index], size=self.size, classes=self.classes,
            grey=self.grey, places=None if places is None else places[index],
        )  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 over names, places and labels: notices that other files are read, not that one was rewritten.

        Names count from the folder that holds all files, so that it may be moved, or named from another place.
        """
        digest = hashlib.sha256(json.dumps([list(self.shape), self.classes]).encode())
        for name in _below([self._path(row) for row in range(len(self._ends))]):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        for tensor in (self.labels, *([] if self._places is None else [self._places])):
            digest.update(entries_of(tensor))
        return digest.hexdigest()

    def _path(self, row: int) -> str:
        begin = int(self._ends[row - 1]) if row else 0
        return bytes(self._names[begin : int(self._ends[row])].tolist()).decode("utf-8", "surrogateescape")

    def _row(self, index: Any) -> int:
        """The number of an image, counted from the first."""
        try:
            row = operator.index(index)  # also of NumPy, and tensors without dimensions
        except TypeError as error:
            raise TypeError(
                f"ImageFiles: an index must be an integer, got {type(index).__name__}; `rows(...)` takes several."
            ) from error
        if not -len(self) <= row < len(self):
            raise IndexError(f"ImageFiles: index {index} is out of range for {len(self)} images.")
        return row % len(self)

    def _source(self, index: int, *, opened: bool = True) -> tuple[Path | IO[bytes], str]:
        """What to decode, and what to call it."""
        index = self._row(index)
        if self._places is None:
            path = self._path(index)
            return Path(path), path
        shard, offset, length = self._places[index].tolist()
        path = self._path(shard)
        if not opened:
            return io.BytesIO(), f"{path}:{offset}"
        with Path(path).open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length)), f"{path} at byte {offset}"

    def __repr__(self) -> str:
        return f"ImageFiles({len(self)} images served as {self.shape})"


def _below(names: list[str]) -> Iterator[str]:
    """The names of files without the folders that all of them are in."""
    try:
        above = os.path.commonpath([min(names), max(names)]) if names else ""  # which stand for all between them
    except ValueError:  # some count from the root and some from the working folder
        above = ""
    for name in names:
        yield name[len(above) :].replace(os.sep, "/").lstrip("/") or Path(name).name


def _encoded(path: Any) -> bytes:
    _check.path("ImageFiles", "paths", path)
    return str(path).encode("utf-8", "surrogateescape")


def _checked_places(places: Any, files: int) -> Tensor:
    """Require a file, a first byte and a length for each image."""
    _check.tensor("ImageFiles", "places", places)
    if places.dtype != torch.int64 or places.ndim != 2 or places.shape[1] != 3:
        raise ValueError(
            f"ImageFiles: `places` must be int64 of shape (N, 3), got {places.dtype} of shape {tuple(places.shape)}."
        )
    if len(places) and not (0 <= int(places[:, 0].min()) <= int(places[:, 0].max()) < files):
        raise ValueError(f"ImageFiles: `places` must name one of {files} `paths` for each image.")
    found: Tensor = places
    return found


def _checked(function: str, root: Any, split: Any, size: Any, **flags: Any) -> Size:
    """The size, and everything else that a function of folders or archives is given looked at."""
    _check.path(function, "root", root)
    _check.text(function, split=split)
    _check.flag(function, **flags)
    return checked_size(function, size)


def stream_folder(
    root: str | Path, split: str = "train", *, size: Size, grey: bool = False, skip_damaged: bool = False
) -> ImageFiles:
    """Images in folders named after their classes, `root/split/class/**/image`, which stay on the disk.

    Args:
        root: the folder that holds one folder per split.
        split: the name of a folder in `root`. Classes must be those of `train` where that exists.
        size: side of the images that are served, or height and width: shorter sides are scaled to it, longer ones
            cropped around the middle.
        grey: serve one channel instead of three.
        skip_damaged: decode every image once, now, and leave out those that cannot be read, with a warning that counts
            and names them. Otherwise the first of them ends what reads it, with its name.

    Returns:
        The images.

    Raises:
        FileNotFoundError: if the folder is missing or holds no class folders, or a class has no image.
        TypeError: if `root` is no path or `size` no integer.
        ValueError: if splits have different classes.
        ImportError: if `skip_damaged`, and Pillow is not installed.
    """
    size = _checked("stream_folder", root, split, size, grey=grey, skip_damaged=skip_damaged)
    root = Path(root).expanduser()
    samples, classes = class_files("stream_folder", root / split)
    same_classes("stream_folder", root, split, classes)
    labels = torch.tensor([label for _, label in samples], device="cpu")
    files = ImageFiles((path for path, _ in samples), labels, size=size, classes=classes, grey=grey)
    return _readable("stream_folder", files) if skip_damaged else files


def stream_tars(
    root: str | Path, split: str = "train", *, size: Size, grey: bool = False, skip_damaged: bool = False
) -> ImageFiles:
    """Images in tar archives as WebDataset writes them, which stay on the disk.

    Archives are `root/split*.tar` or `root/split/*.tar`. An image `key.jpg` is of the class that the member `key.cls`
    holds as a number, or of the class that the folder in its name says where no archive has such members. Archives are
    listed once and then read at any place, so they must not be compressed.

    Args:
        root: the folder of the archives.
        split: how their names begin, or the folder they are in.
        size: side of the images that are served, or height and width: shorter sides are scaled to it, longer ones
            cropped around the middle.
        grey: serve one channel instead of three.
        skip_damaged: decode every image once, now, and leave out those that cannot be read, with a warning that counts
            and names them. Otherwise the first of them ends what reads it, with its name.

    Returns:
        The images, in the order of archives and members.

    Raises:
        FileNotFoundError: if there are no archives, or no images in them.
        TypeError: if `root` is no path or `size` no integer.
        ValueError: if one is damaged or compressed, a class is missing or no number, or names repeat.
        ImportError: if `skip_damaged`, and Pillow is not installed.
    """
    size = _checked("stream_tars", root, split, size, grey=grey, skip_damaged=skip_damaged)
    root = Path(root).expanduser()
    shards = sorted([*root.glob(f"{split}*.tar"), *(root / split).glob("*.tar")])
    if not shards:
        raise FileNotFoundError(f"stream_tars: there are no archives `{root}/{split}*.tar` or `{root}/{split}/*.tar`.")
    for path in shards:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"stream_tars: `{path}` is no regular file.")
    places: list[tuple[int, int, int]] = []
    folders: list[str] = []
    numbers: list[int | None] = []
    for shard, path in enumerate(shards):
        for name, offset, length, number in _members(path):
            places.append((shard, offset, length))
            folders.append(name.partition("/")[0] if "/" in name else "")
            numbers.append(number)
    if not places:
        raise FileNotFoundError(f"stream_tars: there are no images in {', '.join(map(str, shards[:3]))}.")
    labels, classes = _labelled(shards, folders, numbers)
    files = ImageFiles(shards, labels, size=size, classes=classes, grey=grey, places=torch.tensor(places, device="cpu"))
    return _readable("stream_tars", files) if skip_damaged else files


def _members(path: Path) -> list[tuple[str, int, int, int | None]]:
    """Name, first byte, length and class number of every image in an archive."""
    images: dict[str, tuple[str, int, int]] = {}
    numbers: dict[str, int] = {}
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                key, dot, suffix = name.rpartition(".")
                if not member.isfile() or Path(name).name.startswith("."):
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends inside {name!r}")
                if f".{suffix.lower()}" in SUFFIXES:
                    if key in images:
                        raise ValueError(f"stream_tars: `{path}` holds two images of the name {key!r}.")
                    images[key] = (name, member.offset_data, member.size)
                elif suffix == "cls" and dot:
                    held = archive.extractfile(member)
                    text = b"" if held is None else held.read(32)
                    try:
                        numbers[key] = int(text)
                    except ValueError as error:
                        raise ValueError(
                            f"stream_tars: {name!r} in `{path}` must hold the number of a class, got {text[:20]!r}."
                        ) from error
    except tarfile.TarError as error:
        raise ValueError(
            f"stream_tars: `{path}` cannot be read as a plain tar archive ({error}). If it is compressed, unpack that; "
            "if it is damaged, copy it again."
        ) from error
    return [(*image, numbers.get(key)) for key, image in images.items()]


def _labelled(shards: list[Path], folders: list[str], numbers: list[int | None]) -> tuple[Tensor, list[str] | None]:
    """Labels of all images, and the classes' names where folders give them."""
    given = [number for number in numbers if number is not None]
    if not given:
        if "" in folders:
            raise ValueError(f"stream_tars: images in `{shards[0].parent}` have neither members `.cls` nor folders.")
        classes = sorted(set(folders))
        index = {name: number for number, name in enumerate(classes)}
        return torch.tensor([index[folder] for folder in folders], device="cpu"), classes
    if len(given) < len(numbers):
        raise ValueError(f"stream_tars: {len(numbers) - len(given)} images in `{shards[0].parent}` have no `.cls`.")
    if min(given) < 0:
        raise ValueError(f"stream_tars: `{shards[0].parent}` holds the class {min(given)}; classes start at 0.")
    return torch.tensor(given, device="cpu"), None


def _problem(files: ImageFiles, row: int) -> str:
    """Why an image cannot be decoded; empty where it can."""
    try:
        files.whole(row)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return ""


def _readable(function: str, files: ImageFiles) -> ImageFiles:
    """The images that can be decoded, and a warning about the others."""
    problems = {row: problem for row in range(len(files)) if (problem := _problem(files, row))}
    if not problems:
        return files
    damaged, first = list(problems), next(iter(problems.values()))
    if len(damaged) == len(files):
        raise ValueError(f"{function}: none of {len(files)} images can be read; the first: {first}")
    named = ", ".join(files.name(row) for row in damaged[:20])
    warnings.warn(
        f"{function}: left out {len(damaged)} of {len(files)} images that cannot be read: {named}"
        f"{', ...' if len(damaged) > 20 else ''}. The first: {first}",
        stacklevel=3,
    )
    return files.without(damaged)
