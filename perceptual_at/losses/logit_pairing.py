"""Logit pairing: two inputs should be answered alike, by squared distance."""

from typing import Literal

from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at.divergences import prediction_squared_error, squared_error


def logit_pairing_loss(
    logits_1: Tensor,
    logits_2: Tensor,
    *,
    space: Literal["logits", "probabilities"] = "logits",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How differently the two inputs of a pair are answered, by squared distance.

    $$ \ell = \tfrac1K \sum_k (z_{1,k} - z_{2,k})^2 \qquad\text{or}\qquad \ell = \sum_k (p_{1,k} - p_{2,k})^2 $$

    What the pairs are makes the method. Adversarial logit pairing (ALP) pairs a clean input with its adversarial one.
    Clean logit pairing (CLP) pairs two different clean images. The comparison of MART calls by the same names pairs
    of clean and adversarial *probabilities*. Gradients flow into both.

    Args:
        logits_1: shape `(B, K)`, or dense `(B, K, *S)`.
        logits_2: the same shape.
        space: compare `"logits"`, as a mean over classes (Kannan et al., and HE's ALP), or `"probabilities"`, as a sum
            over classes (MART's Table 1).
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, or the word is unknown.

    Source:
        Kannan et al. 2018; probabilities: Wang et al. 2020 (MART), Table 1.

    Examples:
        >>> one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> logit_pairing_loss(one, other)  # (4 + 0) / 2
        tensor(2.)
        >>> logit_pairing_loss(100 * one, -100 * one, space="probabilities")
        tensor(2.)
    """
    name = "logit_pairing_loss"
    _check.logits(name, logits_1=logits_1, logits_2=logits_2)
    _check.choice(name, "space", space, ("logits", "probabilities"))
    distance = squared_error if space == "logits" else prediction_squared_error
    return reduce(name, distance(logits_1, logits_2), reduction)
