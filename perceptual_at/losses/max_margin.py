"""MMA's loss: points at the decision boundary for samples that are right, clean inputs for the others."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import cross_entropy, soft_logit_margin


def max_margin_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    margins: Tensor,
    largest: float,
    clean_weight: float = 1 / 3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross entropy at each sample's own distance from the decision boundary, plus some of the clean one.

    $$ \ell = c\,\mathrm{CE}(f(x), y) + (1 - c) \begin{cases}
       [d < d_{\max}]\,\mathrm{CE}(f(x_d), y) & s(f(x), y) < 0 \\ \mathrm{CE}(f(x), y) & \text{else,} \end{cases} $$

    with $s$ the `soft_logit_margin`, $d$ the sample's margin and $x_d$ the point at that distance. A sample that is
    right and further than $d_{\max}$ from the boundary has its clean share alone. Margins have no gradient.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`.
        adv_logits: $f(x_d)$, the same shape; rows of samples that are not right are not used.
        labels: class indices `(B,)`.
        margins: $d$, shape `(B,)`, as from `attacks.find_margins`.
        largest: $d_{\max}$, in the units of `margins`.
        clean_weight: $c$ in [0, 1]; 1/3 in MMA's code, 0 is its variant OMMA.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits or margins are no floating-point tensors, or `labels` no integers.
        ValueError: if shapes or devices differ, labels in CPU memory are out of range, or a number is.

    Source:
        Ding et al. 2020 (MMA), Eq. 8 and 12, and its released code.

    Examples:
        >>> right, even = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2)
        >>> max_margin_loss(right, even, torch.tensor([0]), margins=torch.tensor([0.1]), largest=0.2)  # 2/3 log 2
        tensor(0.4621)
        >>> max_margin_loss(right, even, torch.tensor([0]), margins=torch.tensor([0.3]), largest=0.2)
        tensor(0.)
    """
    name = "max_margin_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    _check.labels(name, labels, classes=clean_logits.shape[1], clean_logits=clean_logits)
    check_margins(name, margins, largest, clean_weight, clean_logits=clean_logits)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    plain, beyond = cross_entropy(clean, labels), cross_entropy(adv, labels)
    right = soft_logit_margin(clean.detach(), labels) < 0
    beyond = torch.where(margins < largest, beyond, torch.zeros_like(beyond))
    per_sample = clean_weight * plain + (1 - clean_weight) * torch.where(right, beyond, plain)
    return reduce(name, per_sample.to(common(*given)), reduction)


def check_margins(function: str, margins: Tensor, largest: float, clean_weight: float, **like: Tensor) -> None:
    """Require one margin per sample of the one tensor `like`, and numbers in range."""
    ((other_name, other),) = like.items()
    _check.floating(function, margins=margins)
    if margins.shape != other.shape[:1]:
        raise ValueError(
            f"{function}: `margins` must be of shape ({other.shape[0]},), one per sample, got shape "
            f"{tuple(margins.shape)}; from a memory take the batch's rows, margins[index]."
        )
    _check.same_device(function, "margins", margins.device, other_name, other.device)
    _check.number(function, "largest", largest, above=0.0)
    _check.number(function, "clean_weight", clean_weight, at_least=0.0, at_most=1.0)
