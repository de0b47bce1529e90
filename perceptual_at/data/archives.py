"""Images in NumPy archives."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._extras import extra
from perceptual_at.data.tensors import TensorImages, check_transform

Layout = Literal["channels_first", "channels_last"]


def npz_images(
    path: str | Path,
    split: str = "train",
    *,
    layout: Layout | None = None,
    transform: Callable[[Tensor], Any] | None = None,
) -> TensorImages:
    """Images in a NumPy archive with the arrays `x_train`, `y_train`, `x_test`, `y_test`.

    Args:
        path: the `.npz` file. Nothing in it is unpickled.
        split: what follows `x_` and `y_` in the names of the arrays.
        layout: where the channels are, `"channels_first"` or `"channels_last"`; needed only where the shape leaves it
            open, because not exactly one of the two places holds 1 or 3.
        transform: a function of one image, giving an image (or a tuple of images: two views).

    Returns:
        Images held as uint8 as they are stored, or as float32 in [0, 1] from any floating-point type; `(N, C, H, W)`,
        into which `(N, H, W, C)` and `(N, H, W)` are brought. Served in [0, 1], with labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if NumPy is not installed.
        TypeError: if the arrays hold no images and labels, `path` is no path, or `transform` no function.
        ValueError: if the file is damaged, lacks an array, the arrays do not fit, labels are negative, the layout is
            open, or bytes hold nothing but 0 and 1.
    """
    _check.path("npz_images", "path", path)
    _check.text("npz_images", split=split)
    if layout is not None:
        _check.choice("npz_images", "layout", layout, ("channels_first", "channels_last"))
    check_transform("npz_images", transform)
    path = Path(path).expanduser()
    keys = (f"x_{split}", f"y_{split}")
    names, arrays = arrays_in("npz_images", path, keys)
    if len(arrays) != 2:
        raise ValueError(
            f"npz_images: `{path}` must hold the arrays {keys[0]!r} and {keys[1]!r} for `split` {split!r}; it "
            f"holds {', '.join(map(repr, names))}."
        )
    images, labels = arrays
    images = _channels_first(path, keys[0], images, layout)
    if images.is_floating_point():
        images = images.float()
    elif images.dtype == torch.uint8 and images.numel() and int(images.max()) <= 1:
        raise ValueError(
            f"npz_images: {keys[0]!r} in `{path}` holds bytes of 0 and 1 only, which would be nearly black; store "
            "pixels as bytes up to 255, or as floating-point numbers in [0, 1]."
        )
    lowest = 0 if labels.is_floating_point() or not labels.numel() else int(labels.long().min())
    if lowest < 0:
        raise ValueError(f"npz_images: {keys[1]!r} in `{path}` holds the label {lowest}; they start at 0.")
    try:
        return TensorImages(images, labels, transform=transform)
    except (TypeError, ValueError) as error:
        raise type(error)(f"npz_images: {keys} in `{path}`: {str(error).removeprefix('TensorImages: ')}") from error


def arrays_in(function: str, path: Path, keys: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    """The names in an archive, and the wanted arrays that are among them, for `function`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if NumPy is not installed.
        ValueError: if it is damaged, or an array holds no numbers.
    """
    np = extra(function, "numpy", why="to read its archives")
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file `{path}`.")
    if not zipfile.is_zipfile(path):  # a single array, or another library's tensors, as which NumPy would read it
        raise ValueError(f"{function}: `{path}` is no archive as `numpy.savez` writes it; is it damaged?")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            arrays = [archive[key] for key in keys if key in names]
    except Exception as error:  # NumPy and zipfile raise a dozen kinds
        raise ValueError(
            f"{function}: `{path}` cannot be read as an archive of plain NumPy arrays ({error}); is it damaged, or "
            "does it hold objects?"
        ) from error
    for key, array in zip(keys, arrays, strict=False):
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            way = "; `numpy.unique(..., return_inverse=True)[1]` numbers texts" if array.dtype.kind in "US" else ""
            raise ValueError(f"{function}: {key!r} in `{path}` holds {array.dtype}, not numbers of up to 64 bits{way}.")
    native = (array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays)  # of other machines too
    return names, [torch.from_numpy(np.ascontiguousarray(array)) for array in native]


def _channels_first(path: Path, key: str, images: Tensor, layout: Layout | None) -> Tensor:
    """Images as `(N, C, H, W)`."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    if images.ndim != 4:
        return images
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if layout is None and first == last:
        raise ValueError(
            f"npz_images: {key!r} in `{path}` has shape {tuple(images.shape)}, which does not tell where the channels "
            "are; give layout='channels_first' or 'channels_last'."
        )
    if layout == "channels_last" or (layout is None and last):
        return images.permute(0, 3, 1, 2).contiguous()
    return images
