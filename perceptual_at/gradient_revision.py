"""Gradient revision: entries of a gradient that matter little are left out of a step. CURE's half of the method."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check

__all__ = ["revise"]

Gradients = Mapping[str, Tensor]


def revise(
    gradients: Gradients,
    natural: Gradients,
    robust: Gradients,
    *,
    share: float = 0.3,
    natural_weight: float = 0.1,
    robust_weight: float = 0.9,
    form: Literal["release", "paper", "magnitude"] = "release",
    layers: Callable[[int, str], bool] | None = None,
) -> dict[str, Tensor]:
    r"""A gradient in which each layer's least important entries are zero.

    Importance of an entry, with $a$ and $b$ the two weights:

    - `"release"`: $a\, g_{\mathrm{nat}} + b\, g_{\mathrm{rob}}$ with its sign, so that strongly negative entries are
      the first to go; only in layers whose name contains "conv1", the network's first parameter excepted.
    - `"paper"`: $a\, |g_{\mathrm{nat}}| + b\, |g_{\mathrm{rob}}|$, in every layer.
    - `"magnitude"`: $|g|$ of the gradient itself, in every layer without "linear" or "fc" in its name: the code's other
      mode, in which natural and robust gradients are not used.

    Entries below the percentile of their tensor become 0. Momentum and weight decay still move the weights behind them.

    Args:
        gradients: of the total loss, by parameter name, in the order of the parameters; left untouched.
        natural: of the clean cross entropy, the same names.
        robust: in the release of the KL under attack, in the paper of the adversarial cross entropy; the same names.
        share: of each tensor's entries that goes, in [0, 1): 0.3 for CURE's ResNet-18, 0.5 for its WideResNet-34-10.
            The code's option is a fraction too, though its README writes 30.
        natural_weight: $a$, how much the clean gradient counts: 0.1, 0.3 for the paper's WideResNet-34-10. Not used by
            `"magnitude"`, nor is $b$.
        robust_weight: $b$, how much the other counts: $1 - a$ in the paper.
        form: what counts as important, and where.
        layers: which tensors are revised, `(position, name) -> bool`; None takes those of the form.

    Returns:
        New gradients, by name.

    Raises:
        TypeError: if the gradients are no tensors by name, or `layers` is no function.
        ValueError: if names or shapes differ, a number is out of range, or a weight comes with `"magnitude"`.

    Source:
        Gowda et al. 2024 (CURE), Eq. 5, and its released code, `rgp_soft` and `rgp`.

    Examples:
        >>> gradient = {"conv1.weight": torch.tensor([0.1, -3.0, 2.0, 0.5])}
        >>> revise(gradient, gradient, gradient, share=0.5, form="paper")["conv1.weight"]
        tensor([ 0., -3.,  2.,  0.])
        >>> signed = revise(gradient, gradient, gradient, share=0.5, layers=lambda position, name: True)
        >>> signed["conv1.weight"]
        tensor([0.0000, 0.0000, 2.0000, 0.5000])
    """
    check_shares("revise", share, natural_weight, robust_weight, layers)
    _check.choice("revise", "form", form, ("release", "paper", "magnitude"))
    if form == "magnitude" and (natural_weight, robust_weight) != (0.1, 0.9):
        raise ValueError("revise: `natural_weight` and `robust_weight` have no effect with form='magnitude'.")
    for what, given in (("gradients", gradients), ("natural", natural), ("robust", robust)):
        if not isinstance(given, Mapping):
            raise TypeError(f"revise: `{what}` must be tensors by parameter name, got {type(given).__name__}.")
        if given.keys() != gradients.keys():
            odd = sorted(map(str, given.keys() ^ gradients.keys()))[:5]
            raise ValueError(f"revise: `{what}` and `gradients` must have the same names, but differ in {odd}.")
    chosen = layers or _LAYERS[form]
    revised = {}
    for position, (name, gradient) in enumerate(gradients.items()):
        _check.tensor("revise", f"gradients[{name!r}]", gradient)
        for what, value in (("natural", natural[name]), ("robust", robust[name])):
            _check.tensor("revise", f"{what}[{name!r}]", value)
            if value.shape != gradient.shape:
                raise ValueError(
                    f"revise: `{what}[{name!r}]` has shape {tuple(value.shape)} but `gradients[{name!r}]` has shape "
                    f"{tuple(gradient.shape)}; the two must be equal."
                )
        if not chosen(position, name) or not gradient.numel():
            revised[name] = gradient.clone()
            continue
        if form == "magnitude":
            importance = gradient.abs()
        elif form == "paper":
            importance = natural_weight * natural[name].abs() + robust_weight * robust[name].abs()
        else:
            importance = natural_weight * natural[name] + robust_weight * robust[name]
        unimportant = importance < _percentile(importance, share)
        revised[name] = torch.where(unimportant, torch.zeros_like(gradient), gradient)
    return revised


_LAYERS: dict[str, Callable[[int, str], bool]] = {
    "release": lambda position, name: position > 0 and "conv1" in name,
    "paper": lambda position, name: True,  # noqa: ARG005
    "magnitude": lambda position, name: "linear" not in name and "fc" not in name,  # noqa: ARG005
}


def _percentile(values: Tensor, share: float) -> Tensor:
    """The value below which a share of the entries lies, interpolated; torch.quantile takes 16 million at most."""
    ordered = values.reshape(-1).sort().values
    place = share * 100 / 100 * (ordered.shape[0] - 1)  # rounded as numpy.percentile(values, 100 * share) rounds
    low = int(place)
    high = min(low + 1, ordered.shape[0] - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def check_shares(
    function: str,
    share: float,
    natural_weight: float,
    robust_weight: float,
    layers: Callable[[int, str], bool] | None,
) -> None:
    """Require the numbers of `revise` in their ranges, and a function that chooses layers."""
    _check.function_of_one(function, "layers", layers, "the position and name of a tensor")
    if isinstance(share, int | float) and not isinstance(share, bool) and share >= 1:
        raise ValueError(f"{function}: `share` must lie in [0.0, 1), got {share!r}; did you mean {share / 100:g}?")
    _check.number(function, "share", share, at_least=0.0, below=1.0)
    _check.number(function, "natural_weight", natural_weight, at_least=0.0)
    _check.number(function, "robust_weight", robust_weight, at_least=0.0)
