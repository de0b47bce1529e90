"""Normalisation as a layer of the model."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.models._parts import in_mode_of


@torch.fx.wrap  # one node of a traced graph, so that the check survives tracing
def _standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if x.ndim < 3 or x.shape[-3] != mean.shape[0]:
        raise ValueError(
            f"Normalize: `x` must be images of shape (B, {mean.shape[0]}, H, W), because `mean` holds "
            f"{mean.shape[0]} channels; got shape {tuple(x.shape)}."
        )
    return (x - mean) / std


class Normalize(nn.Module):
    """A layer that shifts and scales each channel: `(x - mean) / std`.

    Put it in front of a network, so that images stay in [0, 1] everywhere else: budgets, attacks and
    interpolations are then in pixel units. `mean` and `std` are buffers: they move with the model and are
    saved in its state dict.

    Args:
        mean: one number per channel, in the units of the input.
        std: one positive number per channel.

    Shape:
        Input and output `(B, C, H, W)` (or `(C, H, W)`), with `C` numbers in `mean` and in `std`.

    Raises:
        TypeError: if `mean` or `std` does not hold numbers.
        ValueError: if they differ in length, are not finite, or a `std` is not positive; at the call, if the
            images have another number of channels.

    Examples:
        >>> layer = Normalize(mean=(0.5,), std=(0.25,))
        >>> layer(torch.tensor([[[[0.5, 1.0]]]]))
        tensor([[[[0., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        super().__init__()
        for name, column in zip(("mean", "std"), _channel_columns("Normalize", mean, std), strict=True):
            self.register_buffer(name, column)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised images."""
        return _standardize(x, self.mean, self.std)

    def extra_repr(self) -> str:
        """Show the numbers when the model is printed."""
        return ", ".join(
            f"{name}=({', '.join(f'{number:.4g}' for number in value.flatten().tolist())})"
            for name, value in (("mean", self.mean), ("std", self.std))
        )


def _channel_columns(
    function: str, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as fresh tensors `(C, 1, 1)`, refused where they make no sense."""
    columns = _channel_column(function, "mean", mean), _channel_column(function, "std", std)
    for name, column in zip(("mean", "std"), columns, strict=True):
        if not bool(torch.isfinite(column).all()) or (name == "std" and bool((column <= 0).any())):
            wanted = "positive and finite" if name == "std" else "finite"
            raise ValueError(f"{function}: `{name}` must be {wanted}, got {column.flatten().tolist()}.")
    if columns[0].shape != columns[1].shape:
        raise ValueError(
            f"{function}: `mean` holds {columns[0].shape[0]} channels but `std` holds {columns[1].shape[0]}; "
            "give one number per channel in both."
        )
    return columns


def _channel_column(function: str, name: str, value: Sequence[float] | Tensor) -> Tensor:
    """Turn one number per channel into a fresh tensor `(C, 1, 1)`."""
    try:
        numbers = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{function}: `{name}` must hold one number per channel, got {value!r}.") from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{function}: `{name}` must hold one number per channel, got {numbers.dtype}.")
    if not numbers.is_floating_point():
        numbers = numbers.to(torch.get_default_dtype())
    if numbers.ndim == 3 and numbers.shape[1:] == (1, 1):
        numbers = numbers.flatten()
    if numbers.ndim != 1 or numbers.numel() == 0:
        raise ValueError(
            f"{function}: `{name}` must hold one number per channel, such as `(0.5,)` for grey images, got "
            f"shape {tuple(numbers.shape)}."
        )
    return numbers.clone().view(-1, 1, 1)


def normalized(model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> nn.Sequential:
    """A model that takes images in [0, 1], made of one that expects them normalised.

    Args:
        model: a network for normalised images `(B, C, H, W)`.
        mean: one number per channel.
        std: one positive number per channel.

    Returns:
        `nn.Sequential` with the layers `normalize` and `model` (the given one, not a copy, in the mode it is
        in), the first on the device and in the floating dtype of the model's parameters.

    Raises:
        TypeError: if `model` is no module; otherwise as `Normalize`.
        ValueError: as `Normalize`.

    Examples:
        >>> from perceptual_at.models import DigitsCNN
        >>> model = normalized(DigitsCNN(width=4), mean=(0.3,), std=(0.4,))
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check.module("normalized", model)
    layer = Normalize(*_channel_columns("normalized", mean, std))
    reference = next(model.parameters(), None)
    if reference is not None:
        layer = layer.to(reference.device, reference.dtype if reference.is_floating_point() else None)
    return in_mode_of(model, nn.Sequential(OrderedDict(normalize=in_mode_of(model, layer), model=model)))
