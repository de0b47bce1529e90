"""Adversarial samples that count unequally: GAIRAT, MAIL, EWAT, SOVR."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import boosted_cross_entropy, one_vs_rest_loss, weighted_kl_loss
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
    predictions,
)
from perceptual_at.sample_weights import (
    StepsWithstood,
    check_geometry,
    check_sigmoid,
    entropy_weights,
    geometric_weights,
    margin_weights,
    probability_margin,
    smallest_margins,
)


def gairat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    steps: int = 10,
    kappa: Tensor | None = None,
    offset: float = -1.0,
    form: Literal["tanh", "sigmoid", "discrete"] = "tanh",
) -> Result:
    r"""GAIRAT: adversarial cross entropy, in which samples count more the fewer steps of the attack they withstand.

    $$ \tfrac1B \sum_i w_i\, \mathrm{CE}(f(x_i^{\mathrm{adv}}), y_i), \qquad w = w(\kappa) $$

    The attack is called with a loss that counts, at no pass of its own. Passes: the attack, and one forward of `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=...) -> x_adv`; a loss of its own is kept, and counted through.
        steps: number of steps of the attack, each of which asks for the loss once.
        kappa: steps withstood, one per row, where they are known already; the attack is then called as it is.
        offset: $L$; `math.inf` gives every sample the weight 1, GAIRAT's burn-in, the first half of its training. Not
            used by `"discrete"`.
        form: `"tanh"` (GAIRAT's default), `"sigmoid"` or `"discrete"`.

    Returns:
        `(loss, terms)` with the term `weighted_cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a number is out of range, or the attack did not ask for its loss `steps` times
            (restarts, `keep="best"`, a fixed answer): pass `kappa` then.

    Source:
        Zhang et al. 2021 (GAIRAT), Algorithm 2, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1), steps=5)
        >>> list(objectives.gairat(model, (x,), labels, attack, steps=5)[1])
        ['weighted_cross_entropy']
        >>> loss, _ = objectives.gairat(model, (x,), labels, lambda *_: x, kappa=torch.zeros(4))
        >>> torch.allclose(loss, nn.functional.cross_entropy(model(x), labels))  # all alike
        True
    """
    check_geometry("gairat", steps, offset, form)
    x, labels = one_batch("gairat", model, views, labels)
    check_indices("gairat", labels)
    _check.labels("gairat", labels, views=x)
    if kappa is None:
        own: Any = None
        if isinstance(attack, functools.partial):  # the steps are counted by a loss around the attack's own
            keywords = dict(attack.keywords)
            own = keywords.pop("loss", None)
            attack = functools.partial(attack.func, *attack.args, **keywords)
        before = getattr(attack, "loss", None) if getattr(attack, "answered", False) else None
        withstood = before if isinstance(before, StepsWithstood) else StepsWithstood(own or cross_entropy)
        x_adv = attacked("gairat", attack, model, x, labels, loss=withstood)
        kappa = withstood.kappa
        if kappa is None or withstood.steps != steps:
            raise ValueError(
                f"gairat: the attack asked for its loss {withstood.steps} times, which must be `steps`={steps}; set "
                "`steps` to those of the attack, or pass `kappa` for an attack whose steps are not one loss each."
            )
    else:
        _check.tensor("gairat", "kappa", kappa)
        _check.same_device("gairat", "kappa", kappa.device, "labels", labels.device)
        if kappa.shape != labels.shape:
            raise ValueError(
                f"gairat: `kappa` must have one number per row, {tuple(labels.shape)}, got {tuple(kappa.shape)}."
            )
        x_adv = attacked("gairat", attack, model, x, labels)
    per_sample = cross_entropy(forward(model, x_adv), labels)
    weights = geometric_weights(kappa.to(per_sample.dtype), steps=steps, offset=offset, form=form)
    loss = (weights * per_sample).mean()
    return finish(loss, weighted_cross_entropy=loss)


def mail(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    base: Literal["pgd_at", "trades", "mart"] = "pgd_at",
    slope: float | None = None,
    bias: float | None = None,
    margin: Literal["adversarial", "clean", "difference"] = "adversarial",
    scale: Literal["code", "batch"] = "code",
    weighted: bool = True,
    beta: float = 5.0,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""MAIL: a base's adversarial term, in which samples count more the smaller their probabilistic margin.

    $$ w\,\mathrm{CE}(f(x_{\mathrm{adv}}), y), \qquad
       \mathrm{CE}(f(x), y) + \beta\, w\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big), \qquad
       w\,\mathrm{BCE} + \beta\,\mathrm{WKL} $$

    on PGD-AT, TRADES and MART; MART's KL stays as it is. The attack is called with a start beside `x`, on TRADES with
    its KL. Passes: those of the base; on PGD-AT one more of `x` without gradients for margins that need it.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, start=...) -> x_adv`, on TRADES also `loss=`.
        base: whose term is weighted.
        slope: $\gamma$, how fast weights fall with the margin; None takes 10 on PGD-AT and 2 on the others.
        bias: $b$, the margin at which weights are half of the largest; None takes -0.5 on PGD-AT and 0 on the others.
        margin: `"adversarial"` as in the released code; `"clean"` and `"difference"` are the paper's other two, the
            last as inferred from its abstract.
        scale: `"code"` multiplies by 3, whatever the batch; `"batch"` divides by the batch's mean, so that the weights
            sum to its size, as the paper is remembered to do (unverified).
        weighted: False leaves the weights out, as before epoch 76 of 120 in the released code.
        beta: weight of the KL term, on TRADES and MART.
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, or `cross_entropy` and `kl`, or `boosted_cross_entropy` and
        `weighted_kl`, weighted where the method does so.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown or a number is out of range.

    Source:
        Wang et al. 2021 (MAIL), Eq. 7 to 10, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = objectives.mail(model, (x,), labels, attack, base="trades")
        >>> torch.allclose(loss, terms["cross_entropy"] + 5 * terms["kl"])
        True
    """
    _check.flag("mail", weighted=weighted)
    _check.choice("mail", "base", base, ("pgd_at", "trades", "mart"))
    _check.choice("mail", "margin", margin, ("adversarial", "clean", "difference"))
    _check.number("mail", "beta", beta, at_least=0.0)
    recommended = (10.0, -0.5) if base == "pgd_at" else (2.0, 0.0)
    slope, bias = recommended[0] if slope is None else slope, recommended[1] if bias is None else bias
    check_sigmoid("mail", slope, bias, scale)
    x, labels = one_batch("mail", model, views, labels)
    check_indices("mail", labels)
    if base == "trades":
        x_adv = kl_attacked("mail", attack, model, x, labels, noise, generator)
    else:
        x_adv = attacked("mail", attack, model, x, labels, start=gaussian_start("mail", x, noise, generator))
    clean = forward(model, x) if base != "pgd_at" else None
    adv = forward(model, x_adv)
    weights: Tensor | float = 1.0
    if weighted:
        seen = clean.detach() if clean is not None else None
        if margin != "adversarial" and seen is None:
            (seen,) = predictions(model, x)
        first = adv.detach() if margin == "adversarial" or seen is None else seen
        margins = probability_margin(first, labels, wrong_logits=adv.detach() if margin == "difference" else None)
        weights = margin_weights(margins, slope=slope, bias=bias, scale=scale)
    if clean is None:
        loss = (weights * cross_entropy(adv, labels)).mean()
        return finish(loss, cross_entropy=loss)
    if base == "trades":
        ce = cross_entropy(clean, labels).mean()
        kl = (weights * kl_divergence(clean, adv, mask=labelled(labels))).mean()
        return finish(ce + beta * kl, cross_entropy=ce, kl=kl)
    bce = (weights * boosted_cross_entropy(adv, labels, reduction="none")).mean()
    wkl = weighted_kl_loss(clean, adv, labels)
    return finish(bce + beta * wkl, boosted_cross_entropy=bce, weighted_kl=wkl)


def ewat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    form: Literal["one_plus", "proportional"] = "one_plus",
) -> Result:
    r"""EWAT: adversarial cross entropy, in which unsure predictions count more. A documented variant.

    $$ \tfrac1B \sum_i w_i\, \mathrm{CE}(f(x_i^{\mathrm{adv}}), y_i), \qquad
       w = 1 + H / \bar H \ \text{ or }\ H / \bar H $$

    Nobody has checked either form against the paper, of which only the abstract could be read. Passes: the attack, and
    one forward of `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        form: `"one_plus"`: one plus a sample's entropy as a share of the batch's mean; `"proportional"`: the share
            alone.

    Returns:
        `(loss, terms)` with the term `weighted_cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit or `form` is unknown.

    Source:
        Kim et al. 2021 (EWAT), abstract only.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> ewat = functools.partial(objectives.ewat, model, (x,), labels, lambda *_: x)
        >>> one_plus, proportional = ewat(form="one_plus")[0], ewat(form="proportional")[0]
        >>> torch.allclose(one_plus - proportional, nn.functional.cross_entropy(model(x), labels))
        True
    """
    _check.choice("ewat", "form", form, ("one_plus", "proportional"))
    x, labels = one_batch("ewat", model, views, labels)
    check_indices("ewat", labels)
    adv = forward(model, attacked("ewat", attack, model, x, labels))
    loss = (entropy_weights(adv, form=form) * cross_entropy(adv, labels)).mean()
    return finish(loss, weighted_cross_entropy=loss)


def sovr(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    share: float = 0.4,
    weight: float = 0.4,
) -> Result:
    r"""SOVR: one-vs-rest in place of cross entropy for the samples of smallest margin. A documented variant.

    $$ \tfrac1B \Big( \sum_{i \notin S} \mathrm{CE}(f(x_i^{\mathrm{adv}}), y_i)
       + \lambda \sum_{i \in S} \mathrm{OVR}(f(x_i^{\mathrm{adv}}), y_i) \Big) $$

    Nobody has checked the formula, the choice of S within the batch, or the two numbers against the paper, of which
    only the abstract could be read; `share` and `weight` of 0.4 are placeholders. Passes: the attack, and one forward
    of `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        share: of the batch that is in S, in [0, 1].
        weight: $\lambda$.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `one_vs_rest`, both divided by the whole batch.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Kanai et al. 2023 (SOVR), abstract only.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = objectives.sovr(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)), weight=0.5)
        >>> torch.allclose(loss, terms["cross_entropy"] + 0.5 * terms["one_vs_rest"])
        True
    """
    _check.number("sovr", "weight", weight, at_least=0.0)
    _check.number("sovr", "share", share, at_least=0.0, at_most=1.0)
    x, labels = one_batch("sovr", model, views, labels)
    check_indices("sovr", labels)
    adv = forward(model, attacked("sovr", attack, model, x, labels))
    switched = smallest_margins(adv, labels, share=share)
    nothing = adv.new_zeros(())
    ce = torch.where(switched, nothing, cross_entropy(adv, labels)).mean()
    ovr = torch.where(switched, one_vs_rest_loss(adv, labels, reduction="none"), nothing).mean()
    return finish(ce + weight * ovr, cross_entropy=ce, one_vs_rest=ovr)
