"""Networks with two outputs per class, as networks with one: what DUCAT is evaluated through."""

from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.divergences import log_sum
from perceptual_at.models._parts import check_logits, in_mode_of

Rule = Literal["max", "sum"]


class FoldedClasses(nn.Module):
    """A network of 2K outputs, counted as K classes; made by `fold_classes`. The network is its layer `model`."""

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.model, self.rule = model, rule

    def forward(self, x: Tensor) -> Tensor:
        """Logits of K classes."""
        logits = check_logits("fold_classes", self.model(x))
        if logits.ndim < 2 or logits.shape[1] % 2 or logits.shape[1] < 4:
            raise ValueError(
                f"fold_classes: the model must have two outputs per class, (B, 2 K), got shape {tuple(logits.shape)}."
            )
        own, dummy = logits.chunk(2, dim=1)
        return torch.maximum(own, dummy) if self.rule == "max" else log_sum(own, dummy)

    def extra_repr(self) -> str:
        """Show the rule when the model is printed."""
        return f"rule={self.rule!r}"


def fold_classes(model: nn.Module, *, rule: Rule = "max") -> nn.Module:
    r"""A network with K classes, made of one with K classes and K dummies: output $k + K$ counts as class $k$.

    $$ \max(z_k, z_{k+K}) \qquad\text{or}\qquad \log(e^{z_k} + e^{z_{k+K}}) $$

    It is a module around the given one, not a copy: attacks and `evaluate` see K classes, gradients included, and can
    freeze it and switch its mode. With `"max"` the prediction is the released code's, the largest of the 2K outputs
    with K subtracted from dummies; with `"sum"` the class's two probabilities are added, which is smooth.

    Args:
        model: a network of 2K outputs.
        rule: `"max"` or `"sum"`.

    Returns:
        A module from inputs to logits `(B, K)`, in the mode the model is in.

    Raises:
        TypeError: if `model` is no module; at the call, if it returns no tensor.
        ValueError: if `rule` is unknown; at the call, if the number of outputs is odd or below 4.

    Source:
        Wang et al. 2024 (DUCAT), and its released code.

    Examples:
        >>> network = nn.Linear(1, 4)
        >>> with torch.no_grad():
        ...     _ = network.weight.zero_(), network.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 5.0]))
        >>> from perceptual_at.models import fold_classes
        >>> fold_classes(network)(torch.zeros(1, 1)).tolist()
        [[1.0, 5.0]]
        >>> fold_classes(network.eval()).training
        False
    """
    _check.module("fold_classes", model)
    _check.choice("fold_classes", "rule", rule, ("max", "sum"))
    return in_mode_of(model, FoldedClasses(model, rule))
