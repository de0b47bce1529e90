"""What other networks say about an adversarial input: HAT's helper labels, KD+SWA's two teachers."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import distillation_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    finish,
    forward,
    kl_attacked,
    one_batch,
    predictions,
)


def hat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    helper: nn.Module,
    reach: float = 2.0,
    base: Literal["pgd_at", "trades"] = "trades",
    beta: float = 2.5,
    weight: float = 0.5,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""HAT: beyond the adversarial input the network should say what a standard-trained one says at it.

    $$ \mathrm{CE}(f(x), y) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big)
       + \gamma\,\mathrm{CE}\big(f(x + h (x_{\mathrm{adv}} - x)), \hat y\big) $$

    with $\hat y$ the helper's prediction at $x_{\mathrm{adv}}$; on PGD-AT the KL is replaced by
    $\mathrm{CE}(f(x_{\mathrm{adv}}), y)$. The extrapolated input is not clipped to the box. Nothing is detached.
    Passes: the base's (on PGD-AT one of `x` and one of `x_adv`), one forward of the extrapolated input, and one of the
    helper without gradients.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`, on TRADES with `loss=` and `start=`.
        helper: a network trained without attacks, run in eval mode; other than `model`.
        reach: $h$, how far the extrapolated input lies: 2 in the released parser.
        base: `"trades"` (TRADES-HAT) or `"pgd_at"` (AT-HAT).
        beta: weight of the second term.
        weight: $\gamma$.
        noise: standard deviation of the Gaussian start around `x`, on TRADES.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, `kl` or `adv_cross_entropy`, and `helper_cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, `labels` no class indices, or `helper` no network.
        ValueError: if shapes do not fit, a word is unknown or a number is out of range.

    Source:
        Rade and Moosavi-Dezfooli 2022 (HAT), Eq. 3, and its released code.

    Examples:
        >>> model, helper, x, labels = nn.Linear(2, 3), nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = objectives.hat(model, (x,), labels, attack, helper=helper)
        >>> total = terms["cross_entropy"] + 2.5 * terms["kl"] + 0.5 * terms["helper_cross_entropy"]
        >>> torch.allclose(loss, total)
        True
    """
    _check.choice("hat", "base", base, ("pgd_at", "trades"))
    _check_teacher("hat", "helper", helper, "a network trained without attacks")
    for name, value in (("reach", reach), ("beta", beta), ("weight", weight)):
        _check.number("hat", name, value, at_least=0.0)
    x, labels = one_batch("hat", model, views, labels)
    check_indices("hat", labels)
    if base == "trades":
        x_adv = kl_attacked("hat", attack, model, x, labels, noise, generator)
    else:
        x_adv = attacked("hat", attack, model, x, labels)
    (said,) = predictions(helper, x_adv, name="helper")
    clean, adv, beyond = forward(model, x), forward(model, x_adv), forward(model, x + reach * (x_adv - x))
    ce = cross_entropy(clean, labels).mean()
    helped = cross_entropy(beyond, said.argmax(dim=1)).mean()
    if base == "trades":
        name, stability = "kl", kl_divergence(clean, adv, mask=labelled(labels)).mean()
    else:
        name, stability = "adv_cross_entropy", cross_entropy(adv, labels).mean()
    terms = {"cross_entropy": ce, name: stability, "helper_cross_entropy": helped}
    return finish(ce + beta * stability + weight * helped, **terms)


def kd(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    standard_teacher: nn.Module,
    robust_teacher: nn.Module,
    weights: tuple[float, float, float] = (0.3, 0.1, 0.6),
    temperature: float = 2.0,
    form: Literal["cross_entropy", "kl"] = "cross_entropy",
) -> Result:
    r"""KD+SWA's loss: adversarial cross entropy, and what two teachers say at the adversarial input.

    $$ c_0\,\mathrm{CE}(f(x_{\mathrm{adv}}), y) + c_1\, \mathrm{KD}(f, f_{\mathrm{std}})(x_{\mathrm{adv}})
       + c_2\, \mathrm{KD}(f, f_{\mathrm{rob}})(x_{\mathrm{adv}}) $$

    The averaging is the caller's: `swa_update` once an epoch and `refresh_batch_norm`. Passes: the attack, one forward
    of `x_adv`, and one of each teacher without gradients.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` if the attack takes them.
        attack: `(model, x, labels) -> x_adv`. The released code attacks in train mode: `model_mode="as_is"`.
        standard_teacher: a network trained without attacks, run in eval mode.
        robust_teacher: an adversarially trained network, run in eval mode.
        weights: $c_0, c_1, c_2$.
        temperature: $T$; the factor $T^2$ keeps the gradient's size.
        form: `"cross_entropy"` (the released code of KD+SWA) or `"kl"`.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, `standard_distillation` and `robust_distillation`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or a teacher no network.
        ValueError: if shapes do not fit, a word is unknown or a number is out of range.

    Source:
        Chen et al. 2021 (KD+SWA), Eq. 3, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack, teachers = functools.partial(pgd, threat=Linf(0.1)), [nn.Linear(2, 3), nn.Linear(2, 3)]
        >>> _, terms = objectives.kd(
        ...     model, (x,), labels, attack, standard_teacher=teachers[0], robust_teacher=teachers[1]
        ... )
        >>> list(terms)
        ['cross_entropy', 'standard_distillation', 'robust_distillation']
    """
    _check_teacher("kd", "standard_teacher", standard_teacher, "a network trained without attacks")
    _check_teacher("kd", "robust_teacher", robust_teacher, "an adversarially trained network")
    if not _check.is_sequence(weights) or len(weights) != 3:
        raise ValueError(f"kd: `weights` must be three numbers, for the labels and the two teachers, got {weights!r}.")
    for value in weights:
        _check.number("kd", "weights", value, at_least=0.0)
    _check.number("kd", "temperature", temperature, above=0.0)
    _check.choice("kd", "form", form, ("cross_entropy", "kl"))
    x, labels = one_batch("kd", model, views, labels)
    x_adv = attacked("kd", attack, model, x, labels)
    adv = forward(model, x_adv)
    ce = cross_entropy(adv, labels).mean()
    standard, robust = (
        distillation_loss(adv, predictions(teacher, x_adv, name=name)[0], temperature=temperature, form=form)
        for name, teacher in (("standard_teacher", standard_teacher), ("robust_teacher", robust_teacher))
    )
    loss = weights[0] * ce + weights[1] * standard + weights[2] * robust
    return finish(loss, cross_entropy=ce, standard_distillation=standard, robust_distillation=robust)


def _check_teacher(function: str, name: str, teacher: object, what: str) -> None:
    """Require a network that can be run."""
    if not callable(teacher):
        raise TypeError(f"{function}: `{name}` must be {what}, a torch.nn.Module, got {type(teacher).__name__}.")
