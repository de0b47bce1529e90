"""Which files a folder of class folders holds: images and their classes, and a word on everything left out."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from perceptual_at.data.decoding import SUFFIXES

Sample = tuple[Path, int]


def class_files(function: str, folder: Path, *, known: tuple[str, ...] = ()) -> tuple[list[Sample], list[str]]:
    """Images below `folder/<class>/` with the number of their class, in the order of names, and the classes.

    Whatever is there and no image is left out with one warning that counts it and names the first of each kind: hidden
    entries, links that lead back, links to nothing, what is no regular file (pipes, devices), other suffixes, unless
    they are `known` to belong there.

    Raises:
        FileNotFoundError: if the folder is missing or holds no class folders, or a class has no image.
    """
    if not folder.is_dir():
        there = sorted(entry.name for entry in folder.parent.iterdir()) if folder.parent.is_dir() else []
        found = f"it holds {', '.join(map(repr, there[:8]))}" if there else "it is empty, missing or no folder"
        raise FileNotFoundError(
            f"{function}: there is no folder {folder.name!r} in `{folder.parent}` ({found}). Wanted is "
            f"`{folder}/<class>/<image>`."
        )
    left_out: dict[str, list[Path]] = {}
    classes: list[str] = []
    samples: list[Sample] = []
    empty: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            left_out.setdefault("hidden", []).append(entry)
        elif entry.is_dir():
            found_here = sorted(_images(entry, (_identity(folder), _identity(entry)), known, left_out))
            empty += [] if found_here else [entry.name]
            samples += [(path, len(classes)) for path in found_here]
            classes.append(entry.name)
        elif entry.suffix.lower() not in known:
            left_out.setdefault("beside the class folders", []).append(entry)
    if not classes or empty:
        problem = f"no images in the class {empty[0]!r}" if empty else "no class folders"
        raise FileNotFoundError(
            f"{function}: `{folder}` is no folder of class folders with images ({problem}; images end in "
            f"{' '.join(SUFFIXES)}). Wanted is `{folder}/<class>/<image>`."
        )
    if left_out:
        listed = "; ".join(f"{len(paths)} {kind} (such as `{paths[0]}`)" for kind, paths in left_out.items())
        warnings.warn(
            f"{function}: left out {sum(map(len, left_out.values()))} entries of `{folder}`: {listed}.", stacklevel=3
        )
    return samples, classes


def _images(
    folder: Path, above: tuple[tuple[int, int], ...], known: tuple[str, ...], left_out: dict[str, list[Path]]
) -> Iterator[Path]:
    """The image files below a folder; `above` are the folders on the way, to notice links that lead back."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            left_out.setdefault("hidden", []).append(entry)
        elif entry.is_dir():
            if _identity(entry) in above:
                left_out.setdefault("leading back to a folder above", []).append(entry)
            else:
                yield from _images(entry, (*above, _identity(entry)), known, left_out)
        elif not entry.exists():
            left_out.setdefault("linking to nothing", []).append(entry)
        elif not entry.is_file():
            left_out.setdefault("no regular file", []).append(entry)
        elif entry.suffix.lower() in known:
            continue
        elif entry.suffix.lower() not in SUFFIXES:
            left_out.setdefault("not called an image", []).append(entry)
        else:
            yield entry


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def same_classes(function: str, root: Path, split: str, classes: list[str]) -> None:
    """Refuse a split whose classes are not those of training, where that is there: labels would mean something else."""
    part, trained = root / split, root / "train"
    if split == "train" or not trained.is_dir():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where that part is read
        _, expected = class_files(function, trained)
    if classes != expected:
        differing = sorted(set(classes) ^ set(expected))
        raise ValueError(
            f"{function}: `{part}` has {len(classes)} classes but `{trained}` has {len(expected)}, so labels would not "
            f"mean the same; differing: {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}. Both need "
            "the same class folders."
        )
