"""TRADES: accuracy on clean inputs plus stability of the prediction under attack."""

from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import cross_entropy, kl_divergence


def trades_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Clean cross entropy plus `beta` times how much the attack moves the prediction.

    $$ \ell = \mathrm{CE}(f(x), y) + \beta\, \mathrm{KL}\big( p(x) \,\|\, p(x_{\mathrm{adv}}) \big),
       \qquad p = \mathrm{softmax} \circ f $$

    Gradients flow through both sides of the KL. The adversarial input is meant to maximise the KL term:
    attack with `kl_to(clean_logits)` from a start beside `x`, where its gradient is zero.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label, or class probabilities of the shape of the
            logits. Both terms run over the labelled places.
        beta: weight of the KL term, at least 0.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensors, or `labels` of another kind.
        ValueError: if shapes or devices differ, `beta` is negative, or labels in CPU memory are out of range.

    Source:
        Zhang et al. 2019, Eq. 5.

    Examples:
        >>> even, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> trades_loss(even, even, labels)  # log 2 + 6 * 0
        tensor(0.6931)
        >>> sure = torch.tensor([[100.0, 0.0]])
        >>> trades_loss(sure, even, labels, beta=2.0)  # 0 + 2 log 2
        tensor(1.3863)
    """
    _check.logits("trades_loss", clean_logits=clean_logits, adv_logits=adv_logits)
    labels = _check.soft_labels("trades_loss", labels, clean_logits=clean_logits)
    _check.number("trades_loss", "beta", beta, at_least=0.0)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    per_sample = cross_entropy(clean, labels) + beta * kl_divergence(clean, adv, mask=labelled(labels))
    return reduce("trades_loss", per_sample.to(common(*given)), reduction)
