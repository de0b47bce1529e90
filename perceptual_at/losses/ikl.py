"""The two halves of the KL divergence, apart: decoupled (DKL) and improved (IKL, GKL)."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import log_distribution, times_log


def soft_cross_entropy_loss(clean_logits: Tensor, adv_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Cross entropy of the adversarial prediction from the clean one, which is held fixed.

    $$ \ell = -\sum_k \mathrm{sg}[p_k(x)] \log p_k(x_{\mathrm{adv}}) $$

    Its gradient is that of $\mathrm{KL}(p(x) \,\|\, p(x_{\mathrm{adv}}))$ in the adversarial logits; none flows into
    the clean ones.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`; detached inside.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        Cui et al. 2024 (DKL).

    Examples:
        >>> soft_cross_entropy_loss(torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2))  # log 2
        tensor(0.6931)
        >>> soft_cross_entropy_loss(torch.zeros(1, 2), torch.zeros(1, 2))  # also log 2: the entropy stays in it
        tensor(0.6931)
    """
    name = "soft_cross_entropy_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    per_sample = -times_log(clean.detach().softmax(dim=1), log_distribution(adv)).sum(dim=1)
    return reduce(name, per_sample.to(common(*given)), reduction)


def weighted_mse_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    *,
    class_weights: Tensor | None = None,
    gamma: float = 1.0,
    detach_adv: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How much the attack changes the differences between logits, weighted by pairs of classes.

    $$ \ell = \tfrac14 \sum_{j,k} w_j w_k \big( (z_j - z_k) - (z^{\mathrm{adv}}_j - z^{\mathrm{adv}}_k) \big)^2 $$

    With $w$ summing to 1 it is half the variance of $z - z^{\mathrm{adv}}$ under $w$, and is computed so.

    - DKL: `class_weights=None`, `detach_adv=True`: with `soft_cross_entropy_loss` it has exactly the gradients of
      the KL.
    - IKL: `class_weights=table[labels]`, the mean prediction of the sample's class, and gradients into both.
    - GKL: the same with `gamma` below 1.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        class_weights: $s$ with $w_k = s_k^\gamma$, shape `(B, K)`, at least 0; taken without its history. None
            takes the clean prediction of each sample, held fixed.
        gamma: exponent of the weights. With another one than 1 samples weigh as much as $(\sum_k w_k)^2$, and the
            mean is the sum over the batch divided by the sum of those weights, as released.
        detach_adv: hold the adversarial logits fixed.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, or `gamma` is outside [0, 1].

    Source:
        Cui et al. 2024 (DKL, IKL); `gamma` from the code of its later version (GKL).

    Examples:
        >>> even = torch.full((1, 2), 0.5)
        >>> weighted_mse_loss(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), class_weights=even)  # 1/4 * 2 * 1/4 * 4
        tensor(0.5000)
        >>> weighted_mse_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[7.0, 5.0]]), class_weights=even)
        tensor(0.)
    """
    name = "weighted_mse_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    _check.number(name, "gamma", gamma, at_least=0.0, at_most=1.0)
    _check.flag(name, detach_adv=detach_adv)
    if class_weights is not None:
        _check.same_shape(name, clean_logits=clean_logits, class_weights=class_weights)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    weights = clean.softmax(dim=1) if class_weights is None else class_weights.to(clean.dtype)
    weights = weights.detach() if gamma == 1.0 else weights.detach() ** gamma
    total = weights.sum(dim=1, keepdim=True)
    change = clean - (adv.detach() if detach_adv else adv)
    change = torch.where(weights == 0, torch.zeros_like(change), change)  # of masked classes, -inf on both sides
    mean = (weights * change).sum(dim=1, keepdim=True) / total
    per_sample = (total * weights * (change - mean).square()).sum(dim=1) / 2
    if gamma != 1.0:
        per_sample = per_sample / total.square().mean()
    return reduce(name, per_sample.to(common(*given)), reduction)
