"""DUCAT's term: what a network may leave to the dummy of the right class."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import wide
from perceptual_at.divergences import cross_entropy


def dummy_class_loss(logits: Tensor, labels: Tensor, *, share: float, reduction: Reduction = "mean") -> Tensor:
    r"""Cross entropy of a network with two outputs per class, part of it against the class's dummy.

    $$ \ell = -(1 - w) \log p_y - w \log p_{y + K} $$

    Output $k + K$ is the dummy of class $k$; at test time `models.fold_classes` counts it as class $k$.

    Args:
        logits: shape `(B, 2 K)`, or dense `(B, 2 K, *S)`: the classes and then their dummies.
        labels: class indices `(B,)` or `(B, *S)`, below K; -100 is no label.
        share: $w$ in [0, 1]: 0.25 at clean and 1 at adversarial inputs in DUCAT.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if there is an odd number of outputs, shapes do not fit, labels in CPU memory are out of range, or
            `share` is outside [0, 1].

    Source:
        Wang et al. 2024 (DUCAT), released code.

    Examples:
        >>> dummy_class_loss(torch.zeros(1, 4), torch.tensor([0]), share=0.25)  # log 4
        tensor(1.3863)
        >>> dummy_class_loss(torch.tensor([[0.0, 0.0, 100.0, 0.0]]), torch.tensor([0]), share=1.0)
        tensor(0.)
    """
    name = "dummy_class_loss"
    _check.logits(name, logits=logits)
    outputs = logits.shape[1]
    if outputs % 2 or outputs < 4:
        raise ValueError(
            f"{name}: `logits` must have two outputs per class, (B, 2 K), got shape {tuple(logits.shape)}."
        )
    labels = _check.indices(name, labels, logits=logits[:, : outputs // 2])
    _check.number(name, "share", share, at_least=0.0, at_most=1.0)
    widened = logits.to(wide(logits))
    dummies = torch.where(labels < 0, labels, labels + outputs // 2)
    own, dummy = cross_entropy(widened, labels), cross_entropy(widened, dummies)
    return reduce(name, ((1 - share) * own + share * dummy).to(logits.dtype), reduction)
