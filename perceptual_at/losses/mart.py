"""MART: misclassification-aware adversarial training, as one loss and as its two terms."""

import math

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import doubt, known, labelled, over_places
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import cross_entropy, kl_of_logs, log_distribution


def mart_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 6.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Boosted cross entropy on adversarial inputs plus `beta` times the weighted KL.

    $$ \ell = \mathrm{BCE}(f(x_{\mathrm{adv}}), y)
              + \beta\, \mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big)\,(1 - p_y(x)) $$

    The sum of `boosted_cross_entropy` and `beta` times `weighted_kl_loss`; nothing is detached.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label; the loss runs over the labelled places.
        beta: weight of the KL term, at least 0. MART's own ResNet-18 script uses 5; RPAT and RAAT use 6.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensors, or `labels` no integers.
        ValueError: if shapes or devices differ, `beta` is negative, or labels in CPU memory are out of range.

    Source:
        Wang et al. 2020, Eq. 11.

    Examples:
        >>> even, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> mart_loss(even, even, labels)  # log 2 + log 2 + 6 * 0
        tensor(1.3863)
        >>> bool(mart_loss(torch.tensor([[100.0, 0.0]]), even, labels) == mart_loss(even, even, labels))
        True
    """
    _check.number("mart_loss", "beta", beta, at_least=0.0)
    _check.logits("mart_loss", clean_logits=clean_logits, adv_logits=adv_logits)
    labels = _check.indices("mart_loss", labels, clean_logits=clean_logits)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    boosted = boosted_cross_entropy(adv, labels, reduction="none")
    weighted = weighted_kl_loss(clean, adv, labels, reduction="none")
    return reduce("mart_loss", (boosted + beta * weighted).to(common(*given)), reduction)


def boosted_cross_entropy(adv_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Cross entropy plus a margin term that pushes the strongest wrong class down.

    $$ \mathrm{BCE} = -\log p_y - \log\big(1 - \max_{k \ne y} p_k\big) $$

    Between once and twice the cross entropy, and twice for two classes. The margin term is computed as
    $\mathrm{logsumexp}(z) - \mathrm{logsumexp}(z_{\ne k})$. The released code writes
    $-\log(1.0001 - p_k + 10^{-12})$: its value is smaller by $\log(1 + 10^{-4} / (1 - p_k))$, at most 0.01 up
    to $p_k = 0.99$, and cannot exceed 9.21.

    Args:
        adv_logits: $f(x_{\mathrm{adv}})$, shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label; the loss runs over the labelled places.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are out of range.

    Source:
        Wang et al. 2020 (MART), Eq. 7; a term of RAAT++ too.

    Examples:
        >>> boosted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # 2 log 2
        tensor(1.3863)
        >>> boosted_cross_entropy(torch.tensor([[100.0, 0.0]]), torch.tensor([0]))
        tensor(0.)
    """
    name = "boosted_cross_entropy"
    _check.logits(name, adv_logits=adv_logits)
    labels = _check.indices(name, labels, adv_logits=adv_logits)
    logits = adv_logits.to(wide(adv_logits))
    index = known(labels).unsqueeze(1)
    wrong = logits.scatter(1, index, -math.inf).argmax(dim=1, keepdim=True)
    wrong = torch.where(wrong == index, (index + 1) % logits.shape[1], wrong)  # all others may be masked
    margin = logits.logsumexp(dim=1) - logits.scatter(1, wrong, -math.inf).logsumexp(dim=1)
    per_sample = cross_entropy(logits, labels) + over_places(margin, labelled(labels))
    return reduce(name, per_sample.to(adv_logits.dtype), reduction)


def weighted_kl_loss(
    clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""How much the attack moves the prediction, counted more where the clean prediction is unsure.

    $$ \mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big)\,(1 - p_y(x)) $$

    The weight gets a gradient too. The released code's constants (1e-12 inside the logarithm, 1.0000001 in
    the weight) change the value by about 1e-7 times the KL.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label; the loss runs over the labelled places.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensors, or `labels` no integers.
        ValueError: if shapes or devices differ, or labels in CPU memory are out of range.

    Source:
        Wang et al. 2020 (MART), Eq. 10; a term of RAAT++ too (RAAT, Table 4).

    Examples:
        >>> even, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> weighted_kl_loss(even, even, labels)
        tensor(0.)
        >>> weighted_kl_loss(torch.tensor([[0.0, 100.0]]), even, labels)  # log 2, surely wrong: weight 1
        tensor(0.6931)
    """
    name = "weighted_kl_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    labels = _check.indices(name, labels, clean_logits=clean_logits)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    unsure = doubt(clean, labels)
    weighted = kl_of_logs(log_distribution(clean), log_distribution(adv)) * unsure
    return reduce(name, over_places(weighted, labelled(labels)).to(common(*given)), reduction)
