"""LBGAT: a standard model that learns along guides of the robust one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.attacks import kl_to
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import logit_pairing_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    finish,
    forward,
    gaussian_start,
    one_batch,
    predictions,
)


def lbgat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    teacher: Callable[[Tensor], Tensor],
    beta: float = 0.0,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""LBGAT: the adversarial logits follow those of a second model, which learns from the labels.

    $$ \tfrac1K \|f(x_{\mathrm{adv}}) - g(x)\|^2 + \mathrm{CE}(g(x), y)
       + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big) $$

    **Nothing is detached**, so the first term moves the teacher $g$ too: give the optimiser the parameters of both. The
    model itself never sees a label. The attack is TRADES', also for $\beta = 0$. Passes: the attack, one forward of `x`
    for its reference, one each of `x_adv` and `x` (left out for $\beta = 0$) and one of the teacher, in that order.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`.
        teacher: maps clean inputs to logits of the same classes; in train mode in the released code. Part of a run's
            state, as the model is.
        beta: weight of the KL: 0 ("LBGAT0") or 6 ("LBGAT6").
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `guidance`, `cross_entropy` (of the teacher) and, unless `beta` is 0, `kl`.

    Raises:
        TypeError: if `teacher` is not callable, `views` no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a number is out of range, or the teacher is the model itself.

    Source:
        Cui et al. 2021 (LBGAT), and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> teacher, attack = nn.Linear(2, 3), functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = objectives.lbgat(model, (x,), labels, attack, teacher=teacher)
        >>> loss.backward()
        >>> list(terms), teacher.weight.grad is not None
        (['guidance', 'cross_entropy'], True)
    """
    _check.number("lbgat", "beta", beta, at_least=0.0)
    _check_teacher(teacher, model)
    x, labels = one_batch("lbgat", model, views, labels)
    check_indices("lbgat", labels)
    (reference,) = predictions(model, x)
    start = gaussian_start("lbgat", x, noise, generator)
    x_adv = attacked("lbgat", attack, model, x, labels, loss=kl_to(reference), start=start)
    adv = forward(model, x_adv)
    clean = forward(model, x) if beta > 0 else None
    guiding = forward(teacher, x, name="teacher")
    guidance, ce = logit_pairing_loss(adv, guiding), cross_entropy(guiding, labels).mean()
    if clean is None:
        return finish(guidance + ce, guidance=guidance, cross_entropy=ce)
    kl = kl_divergence(clean, adv, mask=labelled(labels)).mean()
    return finish(guidance + ce + beta * kl, guidance=guidance, cross_entropy=ce, kl=kl)


def _check_teacher(teacher: Any, model: nn.Module) -> None:
    if not callable(teacher):
        raise TypeError(
            "lbgat: `teacher` must be a second model that maps clean inputs to logits and is trained along, got "
            f"{type(teacher).__name__}."
        )
    if teacher is model:
        raise ValueError("lbgat: `teacher` is the model itself; it must be a second one, trained along.")
