"""SOVR's term: every class against the rest."""

from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import known, labelled, over_places
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import wide


def one_vs_rest_loss(adv_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Sum over classes of the binary cross entropy of "this class or not". A documented variant.

    $$ \ell = \log(1 + e^{-z_y}) + \sum_{k \ne y} \log(1 + e^{z_k}) $$

    Unlike cross entropy it pushes every wrong logit down by itself, and changes when all logits are shifted. The
    formula is the usual one-vs-rest loss; nobody has checked it against SOVR's paper, of which only the abstract could
    be read.

    Args:
        adv_logits: $f(x_{\mathrm{adv}})$, shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are out of range.

    Source:
        Kanai et al. 2023 (SOVR), abstract only.

    Examples:
        >>> one_vs_rest_loss(torch.zeros(1, 2), torch.tensor([0]))  # 2 log 2
        tensor(1.3863)
        >>> one_vs_rest_loss(torch.tensor([[200.0, 50.0]]), torch.tensor([0]))  # both say "this class"
        tensor(50.)
    """
    name = "one_vs_rest_loss"
    _check.logits(name, adv_logits=adv_logits)
    labels = _check.indices(name, labels, adv_logits=adv_logits)
    logits = adv_logits.to(wide(adv_logits))
    index = known(labels).unsqueeze(1)
    right = functional.softplus(-logits.gather(1, index)).squeeze(1)
    wrong = functional.softplus(logits).scatter(1, index, 0.0).sum(dim=1)
    per_sample = over_places(right + wrong, labelled(labels))
    return reduce(name, per_sample.to(adv_logits.dtype), reduction)
