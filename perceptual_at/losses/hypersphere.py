"""Hypersphere embedding: logits are cosines, and the right class must win by an angular margin."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import known
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import wide
from perceptual_at.divergences import cross_entropy


def hypersphere_loss(
    logits: Tensor, labels: Tensor, *, scale: float = 15.0, margin: float = 0.2, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross entropy of scaled cosines, of which the right one counts `margin` less.

    $$ \ell = \mathrm{CE}\big( z - s\, m\, \mathbf 1_y,\ y \big), \qquad z_k = s \cos\angle(w_k, f) $$

    The logits are those of a network whose last layer is a `perceptual_at.models.CosineLinear` of the same `scale`.
    Attack, KL and evaluation take them as they are; the margin belongs to the training loss alone.

    Args:
        logits: scaled cosines $z$, shape `(B, K)`, or dense `(B, K, *S)`, in $[-s, s]$.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label.
        scale: $s$, the one in the network.
        margin: $m$, in units of the cosine.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if shapes or devices differ, `scale` is not positive, `margin` negative, or labels in CPU memory
            are out of range.

    Source:
        Pang et al. 2020 (HE); defaults of the released code.

    Examples:
        >>> hypersphere_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), scale=2.0, margin=1.0)  # log 2
        tensor(0.6931)
        >>> hypersphere_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), margin=0.0)
        tensor(0.6931)
    """
    name = "hypersphere_loss"
    _check.logits(name, logits=logits)
    labels = _check.indices(name, labels, logits=logits)
    _check.number(name, "scale", scale, above=0.0)
    _check.number(name, "margin", margin, at_least=0.0)
    wider = logits.to(wide(logits))
    right = torch.zeros_like(wider).scatter(1, known(labels).unsqueeze(1), 1.0)
    return reduce(name, cross_entropy(wider - scale * margin * right, labels).to(logits.dtype), reduction)
