"""Consistency-AT: two attacked augmentations of an image should be predicted alike."""

from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at.divergences import js_divergence


def consistency_loss(
    adv_logits_1: Tensor, adv_logits_2: Tensor, *, temperature: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    r"""How differently two attacked augmentations of the same images are predicted.

    $$ \ell = \mathrm{JS}\big( \mathrm{softmax}(f(x_1^{\mathrm{adv}}) / T),\
              \mathrm{softmax}(f(x_2^{\mathrm{adv}}) / T) \big) $$

    Symmetric; gradients flow into both. There is no factor $T^2$.

    Args:
        adv_logits_1: logits of the first attacked view, shape `(B, K)`, or dense `(B, K, *S)`, for views that show the
            same at each place; the loss runs over all places.
        adv_logits_2: logits of the second, the same shape.
        temperature: divides the logits; 0.5 sharpens both predictions.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, in [0, log 2], a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, or `temperature` is not positive.

    Source:
        Tack et al. 2022, Eq. 4.

    Examples:
        >>> consistency_loss(torch.zeros(1, 3), torch.ones(1, 3))  # both even
        tensor(0.)
        >>> consistency_loss(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))  # log 2
        tensor(0.6931)
    """
    name = "consistency_loss"
    _check.logits(name, adv_logits_1=adv_logits_1, adv_logits_2=adv_logits_2)
    _check.number(name, "temperature", temperature, above=0.0)
    return reduce(name, js_divergence(adv_logits_1, adv_logits_2, temperature=temperature), reduction)
