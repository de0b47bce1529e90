"""PIAT's term: the directions of clean and adversarial logits should agree."""

from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import doubt, labelled, over_places
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import directions, without_absent


def normalized_error_loss(
    clean_logits: Tensor, adv_logits: Tensor, *, labels: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared distance of two logit vectors of length one ("NMSE"). A documented variant.

    $$ \ell = \Big\| \frac{f(x)}{\|f(x)\|} - \frac{f(x_{\mathrm{adv}})}{\|f(x_{\mathrm{adv}})\|} \Big\|^2
       \quad\text{or, with labels,}\quad (1 - p_y(x))\,\ell $$

    Twice the `cosine_distance`. With labels a sample counts more where its clean prediction is unsure, and the weight
    has a gradient. The formula is that of another library's re-implementation; the paper's own code could not be read.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label; given, each sample, or place, is weighted by
            $1 - p_y(x)$.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, in [0, 4], a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensors, or `labels` no integers.
        ValueError: if shapes or devices differ, or labels in CPU memory are out of range.

    Source:
        He et al. 2023 and Liu et al. 2025 (PIAT), abstracts; formula from a third-party re-implementation.

    Examples:
        >>> normalized_error_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0]]))
        tensor(0.)
        >>> normalized_error_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[-5.0, 0.0]]))
        tensor(4.)
    """
    name = "normalized_error_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    (one, other), _ = without_absent(clean, adv)
    error = (directions(one) - directions(other)).square().sum(dim=1)
    if labels is not None:
        labels = _check.indices(name, labels, clean_logits=clean_logits)
        error = over_places(error * doubt(clean, labels), labelled(labels))
    return reduce(name, error.to(common(*given)), reduction)
