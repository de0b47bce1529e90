"""The four objectives that both papers start from: PGD-AT, TRADES, MART, Consistency-AT."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import boosted_cross_entropy, consistency_loss, weighted_kl_loss
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
)


def pgd_at(model: nn.Module, views: Sequence[Tensor], labels: Tensor, attack: Attack) -> Result:
    r"""PGD-AT: cross entropy on adversarial inputs.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y) $$

    Passes: the attack, and one forward of `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` if the attack takes them.
        attack: `(model, x, labels) -> x_adv`.

    Returns:
        `(loss, terms)` with the term `cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if shapes do not fit.

    Source:
        Madry et al. 2018, Eq. 2.1.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = pgd_at(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> list(terms), loss.requires_grad
        (['cross_entropy'], True)
    """
    x, labels = one_batch("pgd_at", model, views, labels)
    adv = forward(model, attacked("pgd_at", attack, model, x, labels))
    ce = cross_entropy(adv, labels).mean()
    return finish(ce, cross_entropy=ce)


def trades(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    beta: float = 6.0,
    noise: float = 0.001,
    repeat_clean_forward: bool = False,
    generator: torch.Generator | None = None,
) -> Result:
    r"""TRADES: clean cross entropy plus how much the attack on that very term moves the prediction.

    $$ \mathrm{CE}(f(x), y) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big) $$

    The attack is called with `loss=kl_to(...)` of the clean prediction in eval mode and with a start beside
    `x`. Passes: the attack, one forward of `x` for its reference, one each of `x` and `x_adv`, in that order.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)`.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`.
        beta: weight of the KL term.
        noise: standard deviation of the Gaussian start around `x`.
        repeat_clean_forward: run `x` a second time after `x_adv` and use those logits in the KL, as the released
            code does. Without dropout the loss is the same; batch norm counts the clean batch twice.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `kl`.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Zhang et al. 2019, Eq. 5 and Algorithm 1.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = trades(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> torch.allclose(loss, terms["cross_entropy"] + 6 * terms["kl"])
        True
    """
    _check.flag("trades", repeat_clean_forward=repeat_clean_forward)
    _check.number("trades", "beta", beta, at_least=0.0)
    x, labels = one_batch("trades", model, views, labels)
    x_adv = kl_attacked("trades", attack, model, x, labels, noise, generator)
    clean, adv = forward(model, x), forward(model, x_adv)
    again = forward(model, x) if repeat_clean_forward else clean
    ce, kl = cross_entropy(clean, labels).mean(), kl_divergence(again, adv, mask=labelled(labels)).mean()
    return finish(ce + beta * kl, cross_entropy=ce, kl=kl)


def mart(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    beta: float = 6.0,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""MART: boosted cross entropy plus a KL that counts more where the clean prediction is unsure.

    $$ \mathrm{BCE}(f(x_{\mathrm{adv}}), y)
       + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big)(1 - p_y(x)) $$

    The attack is called with a start beside `x`. Passes: the attack, one forward each of `x` and `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, start=...) -> x_adv`.
        beta: weight of the KL term.
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `boosted_cross_entropy` and `weighted_kl`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Wang et al. 2020, Eq. 11.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = mart(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)), beta=5.0)
        >>> torch.allclose(loss, terms["boosted_cross_entropy"] + 5 * terms["weighted_kl"])
        True
    """
    _check.number("mart", "beta", beta, at_least=0.0)
    x, labels = one_batch("mart", model, views, labels)
    check_indices("mart", labels)
    x_adv = attacked("mart", attack, model, x, labels, start=gaussian_start("mart", x, noise, generator))
    clean, adv = forward(model, x), forward(model, x_adv)
    bce, kl = boosted_cross_entropy(adv, labels), weighted_kl_loss(clean, adv, labels)
    return finish(bce + beta * kl, boosted_cross_entropy=bce, weighted_kl=kl)


def consistency_at(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    consistency_weight: float = 1.0,
    consistency_temperature: float = 0.5,
) -> Result:
    r"""Consistency-AT: cross entropy on two attacked augmentations, which should be predicted alike.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y)
       + \lambda\,\mathrm{JS}\big(p_T(x_1^{\mathrm{adv}}), p_T(x_2^{\mathrm{adv}})\big) $$

    Passes: the attack on both views, and one forward of both.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` if the attack takes them.
        attack: `(model, x, labels) -> x_adv`.
        consistency_weight: $\lambda$.
        consistency_temperature: $T$.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `consistency`.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if there are not two views, shapes do not fit, or a number is out of range.

    Source:
        Tack et al. 2022, Eq. 5.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = consistency_at(model, (x, x.flip(1)), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> torch.allclose(loss, terms["cross_entropy"] + terms["consistency"])
        True
    """
    _check.number("consistency_at", "consistency_weight", consistency_weight, at_least=0.0)
    _check.number("consistency_at", "consistency_temperature", consistency_temperature, above=0.0)
    x, labels = one_batch("consistency_at", model, views, labels, expected=(2,))
    adv = forward(model, attacked("consistency_at", attack, model, x, labels))
    ce = cross_entropy(adv, labels).mean()
    js = consistency_loss(*adv.chunk(2), temperature=consistency_temperature)
    return finish(ce + consistency_weight * js, cross_entropy=ce, consistency=js)
