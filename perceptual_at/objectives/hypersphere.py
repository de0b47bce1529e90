"""Hypersphere embedding: the bases with an angular margin in the training loss."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.attacks import kl_to
from perceptual_at.divergences import kl_divergence
from perceptual_at.losses import hypersphere_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    beta_on,
    check_indices,
    finish,
    forward,
    gaussian_start,
    one_batch,
    predictions,
)


def hypersphere(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    base: Literal["pgd_at", "trades"] = "pgd_at",
    scale: float = 15.0,
    margin: float = 0.2,
    beta: float | None = None,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""HE: cross entropy of scaled cosines with a margin, on adversarial inputs or in TRADES.

    $$ \mathrm{CE}\big(f(x_{\mathrm{adv}}) - s m \mathbf 1_y, y\big) \qquad\text{or}\qquad
       \mathrm{CE}\big(f(x) - s m \mathbf 1_y, y\big) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big) $$

    The network ends in a `models.CosineLinear` of the same scale; `models.with_cosine_logits` makes one of another. The
    attack knows of no margin. Passes: those of the base.

    Args:
        model: maps inputs to scaled cosines; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: as for the base.
        base: `"pgd_at"` or `"trades"`. (HE on ALP: `alp` on such a network, margin 0.)
        scale: $s$, that of the network: 10 (PGD-AT) or 15 (TRADES) in the released scripts.
        margin: $m$, in units of the cosine.
        beta: weight of the KL on TRADES, 6 if left out; refused on PGD-AT.
        noise: standard deviation of the Gaussian start around `x`, on both as released.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `margin_cross_entropy` and, on TRADES, `kl`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown, or a number is out of range.

    Source:
        Pang et al. 2020 (HE), and its released code.

    Examples:
        >>> from perceptual_at.models import CosineLinear
        >>> model, x, labels = CosineLinear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> list(objectives.hypersphere(model, (x,), labels, attack, base="trades")[1])
        ['margin_cross_entropy', 'kl']
    """
    _check.choice("hypersphere", "base", base, ("pgd_at", "trades"))
    beta = beta_on("hypersphere", base, beta, usual=6.0)
    _check.number("hypersphere", "scale", scale, above=0.0)
    _check.number("hypersphere", "margin", margin, at_least=0.0)
    x, labels = one_batch("hypersphere", model, views, labels)
    check_indices("hypersphere", labels)
    start = gaussian_start("hypersphere", x, noise, generator)
    if base == "pgd_at":
        x_adv = attacked("hypersphere", attack, model, x, labels, start=start)
        ce = hypersphere_loss(forward(model, x_adv), labels, scale=scale, margin=margin)
        return finish(ce, margin_cross_entropy=ce)
    (reference,) = predictions(model, x)
    x_adv = attacked("hypersphere", attack, model, x, labels, loss=kl_to(reference), start=start)
    clean, adv = forward(model, x), forward(model, x_adv)
    ce = hypersphere_loss(clean, labels, scale=scale, margin=margin)
    kl = kl_divergence(clean, adv, mask=labelled(labels)).mean()
    return finish(ce + beta * kl, margin_cross_entropy=ce, kl=kl)
