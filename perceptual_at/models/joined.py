"""Networks of several inputs, as networks of one: what else belongs to a sample goes wherever it goes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.models._parts import in_mode_of


class FromJoined(nn.Module):
    """A network of several inputs that takes them in one tensor; made by `from_joined`."""

    def __init__(self, model: nn.Module, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model, self.shapes = model, [tuple(shape) for shape in shapes]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network for the parts of `x`."""
        sizes = [math.prod(shape) for shape in self.shapes]
        if x.ndim != 2 or x.shape[1] != sum(sizes):
            raise ValueError(
                f"from_joined: `x` must be of shape (B, {sum(sizes)}), as `joined` gives, got shape {tuple(x.shape)}."
            )
        parts = torch.split(x, sizes, dim=1)
        outputs: Tensor = self.model(*(part.reshape(-1, *s) for part, s in zip(parts, self.shapes, strict=True)))
        return outputs

    def extra_repr(self) -> str:
        """Show the shapes when the model is printed."""
        return f"shapes={self.shapes}"


def joined(*inputs: Tensor) -> Tensor:
    """Several inputs of the same samples side by side, `(B, N)`.

    Args:
        *inputs: floating-point tensors `(B, ...)` of one dtype; float32 holds whole numbers up to `2**24` exactly.

    Returns:
        Shape `(B, N)`, with a row per sample.

    Raises:
        TypeError: if an input is no floating-point tensor.
        ValueError: if there is none, or batches, dtypes or devices differ.

    Examples:
        >>> joined(torch.zeros(2, 1, 2, 2), torch.ones(2, 3))
        tensor([[0., 0., 0., 0., 1., 1., 1.],
                [0., 0., 0., 0., 1., 1., 1.]])
    """
    if not inputs:
        raise ValueError("joined: `inputs` must hold at least one tensor.")
    first = inputs[0]
    for place, one in enumerate(inputs):
        name = f"inputs[{place}]"
        _check.floating("joined", **{name: one})
        if len(one) != len(first) or one.dtype != first.dtype:
            raise ValueError(
                f"joined: `{name}` must be {first.dtype} of {len(first)} samples, as `inputs[0]` is, got {one.dtype} "
                f"of {len(one)}."
            )
        _check.same_device("joined", name, one.device, "inputs[0]", first.device)
    return torch.cat([one.reshape(len(one), math.prod(one.shape[1:])) for one in inputs], dim=1)


def from_joined(model: nn.Module, *shapes: Sequence[int]) -> nn.Module:
    """A network of several inputs, as one that takes what `joined` gives.

    Attacks go on with those samples that are still in play, and `evaluate` puts its batches together anew: what a
    network needs beside the image of a sample must go with it. Joined to the image, with an `eps` of 0, it does, and
    nothing moves it.

    Args:
        model: a network `(first, second, ...) -> outputs`; modes, weights and devices are shared with it.
        *shapes: of the inputs, in order, without the batch.

    Returns:
        A module that takes one tensor `(B, N)`, in the mode the model is in.

    Raises:
        TypeError: if `model` is no module or a shape holds no whole numbers.
        ValueError: if there is no shape; at the call, if `x` is not of shape `(B, N)`.

    Examples:
        >>> class Scaled(nn.Module):
        ...     def forward(self, image, scale):
        ...         return image.flatten(1) * scale
        >>> image, scale = torch.ones(2, 1, 1, 2), torch.tensor([[2.0], [3.0]])
        >>> model = from_joined(Scaled(), image.shape[1:], scale.shape[1:])
        >>> x = joined(image, scale)
        >>> model(x)
        tensor([[2., 2.],
                [3., 3.]])
        >>> eps = joined(torch.full((1, 1, 1, 2), 0.25), torch.zeros(1, 1))
        >>> pgd(model, x, torch.tensor([0, 1]), Linf(eps, bounds=(0.0, 9.0)), start="clean")  # the scale stays
        tensor([[0.7500, 1.2500, 2.0000],
                [1.2500, 0.7500, 3.0000]])
    """
    _check.module("from_joined", model)
    if not shapes:
        raise ValueError("from_joined: `shapes` must hold the shape of each input.")
    for place, shape in enumerate(shapes):
        if not _check.is_sequence(shape):
            raise TypeError(f"from_joined: `shapes[{place}]` must be a shape, got {shape!r}.")
        for size in shape:
            _check.count("from_joined", f"shapes[{place}]", size)
    return in_mode_of(model, FromJoined(model, shapes))
