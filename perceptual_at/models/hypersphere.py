"""A last layer whose logits are scaled cosines: hypersphere embedding."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at import _check


class CosineLinear(nn.Module):
    r"""Scaled cosines between the features and one direction per class: $s \cos\angle(w_k, f)$.

    The scale is part of the layer, so that a softmax of its output is the one that was trained: confidences, attacks
    and evaluations then need nothing else. (The released code of HE returns the bare cosines from its networks, and
    an attack on their cross entropy ascends a nearly uniform softmax.)

    Args:
        in_features: length of the features.
        out_features: number of classes.
        scale: $s$, 15 or 10 in the released code.

    Shape:
        `(..., in_features)` to `(..., out_features)`, in $[-s, s]$; zero features give zeros.

    Raises:
        TypeError: if a size is no integer or `scale` no number.
        ValueError: if one of them is not positive.

    Source:
        Pang et al. 2020 (HE).

    Examples:
        >>> layer = CosineLinear(2, 2, scale=10.0)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 7.0]]))
        >>> layer(torch.tensor([[0.5, 0.0]]))
        tensor([[10.,  0.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 15.0) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            _check.count("CosineLinear", name, size)
        _check.number("CosineLinear", "scale", scale, above=0.0)
        self.in_features, self.out_features, self.scale = in_features, out_features, float(scale)
        self.weight = nn.Linear(in_features, out_features, bias=False).weight

    def forward(self, features: Tensor) -> Tensor:
        """Return the scaled cosines."""
        return self.scale * functional.linear(_directions(features), _directions(self.weight))

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"


def _directions(vectors: Tensor) -> Tensor:
    """Vectors of length one; zero vectors stay, in float16 too, where torch's smallest length would be 0."""
    shortest = 1e-3 if vectors.dtype == torch.float16 else 1e-12
    none = (vectors.detach() == 0).all(dim=-1, keepdim=True)  # where torch's length has no second derivatives
    some = functional.normalize(torch.where(none, 1.0, vectors), dim=-1, eps=shortest)
    return torch.where(none, vectors / shortest, some)


def with_cosine_logits(model: nn.Module, *, scale: float = 15.0) -> nn.Module:
    """A copy of a classifier whose last linear layer gives scaled cosines.

    Args:
        model: a network that ends in an `nn.Linear`; left as it is.
        scale: $s$, 15 or 10 in the released code.

    Returns:
        The copy, in the mode and on the device of the model. The directions are those of the old weights; a bias is
        dropped.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if the model has no linear layer or only consists of one, or `scale` is not positive.

    Source:
        Pang et al. 2020 (HE).

    Examples:
        >>> from perceptual_at.models import DigitsCNN
        >>> model = with_cosine_logits(DigitsCNN(width=4), scale=10.0)
        >>> model.linear
        CosineLinear(in_features=8, out_features=10, scale=10)
        >>> bool(model(torch.rand(2, 1, 8, 8)).abs().max() <= 10)
        True
    """
    _check.module("with_cosine_logits", model)
    _check.number("with_cosine_logits", "scale", scale, above=0.0)
    copied = copy.deepcopy(model)
    linear = [name for name, part in copied.named_modules() if name and type(part) is nn.Linear]
    if not linear:
        raise ValueError(
            f"with_cosine_logits: `model` must end in an nn.Linear, but {type(model).__name__} has none; build a "
            "CosineLinear into the network instead."
        )
    home, _, name = linear[-1].rpartition(".")
    parent = copied.get_submodule(home)
    old = getattr(parent, name)
    head = CosineLinear(old.in_features, old.out_features, scale=scale).to(old.weight)
    head.weight = old.weight
    head.training = old.training
    setattr(parent, name, head)
    return copied
