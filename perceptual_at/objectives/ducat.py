"""DUCAT: every class has a dummy, which may take what clean and adversarial inputs do not agree on."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import boosted_cross_entropy, consistency_loss, dummy_class_loss, weighted_kl_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    finish,
    forward,
    gaussian_start,
    kl_attacked,
    one_batch,
    only_on,
    source_of_noise,
)


def ducat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    base: Literal["pgd_at", "trades", "mart", "consistency_at"] = "pgd_at",
    clean_share: float = 0.25,
    adv_share: float = 1.0,
    adv_weight: float = 1.0,
    dummies: bool = True,
    beta: float = 6.0,
    consistency_weight: float = 1.0,
    consistency_temperature: float = 0.5,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""DUCAT: a base whose cross entropy is shared between each class and its dummy, on clean and adversarial inputs.

    $$ \tfrac12 \big( \mathrm{CE}(f(x), (1 - w) e_y + w\, e_{y+K}) + a\,\mathrm{CE}(f(x_{\mathrm{adv}}),
       (1 - w') e_y + w' e_{y+K}) \big) + \ldots $$

    and what else the base has: on TRADES $\beta\,\mathrm{KL}$, on MART the margin term and $\beta$ times the weighted
    KL, on Consistency-AT the consistency term, all on 2K outputs. Clean and adversarial inputs go through the network
    in one batch, as released, so that batch norm mixes their statistics. The attack sees the 2K outputs; evaluate with
    `models.fold_classes`.

    Passes: the attack, on TRADES one of `x` for its reference, one forward of both inputs together, and then on TRADES
    one each of `x_adv` and `x`, on MART one of `x_adv` before and one of `x` after. Without dummies: one of `x_adv`,
    and the base's others.

    Args:
        model: maps inputs to `(B, 2 K)` logits, the classes and then their dummies.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images (needed by Consistency-AT).
        labels: class indices `(B,)`, below K.
        attack: `(model, x, labels) -> x_adv`, on TRADES and MART as these call it.
        base: whose cross entropy is replaced.
        clean_share: $w$, the dummy's share at clean inputs.
        adv_share: $w'$, the dummy's share at adversarial inputs.
        adv_weight: $a$, on PGD-AT only: the released code has it nowhere else.
        dummies: False before epoch 105 of 130: cross entropy of `x_adv` and the right classes, on TRADES too.
        beta: weight of the KL, on TRADES and MART.
        consistency_weight: weight of the consistency term, on Consistency-AT only.
        consistency_temperature: its temperature.
        noise: standard deviation of the Gaussian start around `x`, on TRADES and MART.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the term `cross_entropy`, and the base's others.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if the model has no 2 K outputs, shapes do not fit, a word is unknown or a number is out of range.

    Source:
        Wang et al. 2024 (DUCAT), and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 6), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])  # three classes
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> list(objectives.ducat(model, (x,), labels, attack)[1])
        ['cross_entropy']
        >>> loss, terms = objectives.ducat(model, (x,), labels, attack, base="trades")
        >>> torch.allclose(loss, terms["cross_entropy"] + 6 * terms["kl"])
        True
    """
    _check.flag("ducat", dummies=dummies)
    _check.choice("ducat", "base", base, ("pgd_at", "trades", "mart", "consistency_at"))
    for name, value in (("beta", beta), ("consistency_weight", consistency_weight), ("adv_weight", adv_weight)):
        _check.number("ducat", name, value, at_least=0.0)
    for name, value in (("clean_share", clean_share), ("adv_share", adv_share)):
        _check.number("ducat", name, value, at_least=0.0, at_most=1.0)
    _check.number("ducat", "consistency_temperature", consistency_temperature, above=0.0)
    only_on("ducat", "pgd_at", base, adv_weight=(adv_weight, 1.0))
    only_on(
        "ducat", "consistency_at", base,
        consistency_weight=(consistency_weight, 1.0), consistency_temperature=(consistency_temperature, 0.5),
    )  # fmt: skip
    x, labels = one_batch("ducat", model, views, labels, expected=(2,) if base == "consistency_at" else (1, 2))
    check_indices("ducat", labels)
    source_of_noise("ducat", noise, generator, x)
    if base == "trades":
        x_adv = kl_attacked("ducat", attack, model, x, labels, noise, generator)
    elif base == "mart":
        x_adv = attacked("ducat", attack, model, x, labels, start=gaussian_start("ducat", x, noise, generator))
    else:
        x_adv = attacked("ducat", attack, model, x, labels)

    def supervised() -> tuple[Tensor, Tensor]:
        """The cross entropy, and the adversarial logits of its pass."""
        if not dummies:
            logits = forward(model, x_adv)
            return cross_entropy(logits, labels).mean(), logits
        clean, adv = forward(model, torch.cat([x, x_adv])).chunk(2)
        own = dummy_class_loss(clean, labels, share=clean_share)
        attacked_ = dummy_class_loss(adv, labels, share=adv_share)
        return (own + adv_weight * attacked_) / 2, adv

    if base == "mart":
        clean_first = forward(model, x) if not dummies else None  # MART's order without dummies, as released
        adv = forward(model, x_adv)
        ce = supervised()[0] if dummies else cross_entropy(adv, labels).mean()
        clean = forward(model, x) if clean_first is None else clean_first
        pushed = boosted_cross_entropy(adv, labels) - cross_entropy(adv, labels).mean()
        kl = weighted_kl_loss(clean, adv, labels)
        return finish(ce + pushed + beta * kl, cross_entropy=ce, margin=pushed, weighted_kl=kl)
    ce, adv = supervised()
    if base == "trades":
        adv, clean = forward(model, x_adv), forward(model, x)
        kl = kl_divergence(clean, adv, mask=labelled(labels)).mean()
        return finish(ce + beta * kl, cross_entropy=ce, kl=kl)
    if base == "consistency_at":
        js = consistency_loss(*adv.chunk(2), temperature=consistency_temperature)
        return finish(ce + consistency_weight * js, cross_entropy=ce, consistency=js)
    return finish(ce, cross_entropy=ce)
