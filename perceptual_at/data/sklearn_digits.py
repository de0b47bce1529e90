"""Real handwritten digits that come with scikit-learn: no download."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._extras import extra
from perceptual_at.data.tensors import hold_out

TEST_IMAGES, VALIDATION_IMAGES = 360, 180


def digits(split: Literal["train", "validation", "test", "all"] = "train", *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Handwritten digits, 8 x 8 grey pixels: the 1,797 images that scikit-learn brings along.

    Split into 1,257 for training, 180 for validation and 360 for the test, each with the same share of
    every class. The three never overlap for one seed; keep the seed when comparing methods.

    Args:
        split: `"train"`, `"validation"`, `"test"`, or `"all"` 1,797 in the data set's own order.
        seed: which split; of no use to `"all"`.

    Returns:
        `(x, labels)`: float32 `(N, 1, 8, 8)` in [0, 1] (17 grey levels, 1/16 apart), and int64 `(N,)`.

    Raises:
        ImportError: if scikit-learn is not installed.
        TypeError: if `seed` is no integer.
        ValueError: if `split` is unknown, or `seed` comes with `"all"`.

    Examples:
        >>> x, labels = digits("test")
        >>> x.shape, labels.shape
        (torch.Size([360, 1, 8, 8]), torch.Size([360]))
    """
    _check.choice("digits", "split", split, ("train", "validation", "test", "all"))
    _random.of_seed("digits", seed)
    if split == "all" and seed != 0:
        raise ValueError(f"digits: `seed`={seed} has no effect with `split`='all'; leave it out.")
    raw = extra("digits", "sklearn.datasets", why="for its images").load_digits()
    x = torch.from_numpy(raw.images).to(torch.float32).div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    if split == "all":
        return x, labels
    rest, test = hold_out((x, labels), TEST_IMAGES, seed=seed)
    if split == "test":
        return test
    train, validation = hold_out(rest, VALIDATION_IMAGES, seed=seed)
    return train if split == "train" else validation
