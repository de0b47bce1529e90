"""RPAT: robust perception on top of any base objective, and on RAAT in particular."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.divergences import Criterion, Divergence
from perceptual_at.losses import robust_perception_loss
from perceptual_at.losses.robust_perception import comparison
from perceptual_at.objectives.combination import Base, logits_as_perception, resolved, run_base
from perceptual_at.objectives.passes import Attack, Perceive, Result, check_indices, check_views, finish
from perceptual_at.objectives.raat import raat
from perceptual_at.paths import interpolate


def rpat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    base: Base = "pgd_at",
    weight: float = 1.0,
    alpha: float = 0.5,
    form: Literal["quotient", "interpolation", "relative"] = "interpolation",
    criterion: Criterion | Divergence = "mse",
    temperature: float = 1.0,
    perceive: Perceive | None = None,
    **base_options: Any,
) -> Result:
    r"""RPAT: a base objective plus how unevenly perception moves from clean to adversarial.

    $$ \ell_{\mathrm{base}} + \lambda\, \ell_{\mathrm{RP}}\big(f(x), f(x + \alpha (x_{\mathrm{adv}} - x)),
       f(x_{\mathrm{adv}})\big) $$

    Passes on top of the base's: one forward each of `x_adv`, of the middle and of `x`, in that order, without those
    of `x_adv` and `x` that the base ran by themselves.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` (needed by Consistency-AT).
        labels: class indices `(B,)`, or what else the base takes.
        attack: `(model, x, labels) -> x_adv`; TRADES as the base also gives it `loss` and `start`.
        base: what to add the term to: an objective by name, as a function, or as a partial of one, for example
            `functools.partial(objectives.dicar, base="trades", mix=mix)` for both terms on TRADES.
        weight: $\lambda$; 1 in the papers. 1 with the form `"interpolation"` weighs like 1/16 with `"quotient"` at
            `alpha=0.5`.
        alpha: place of the middle on the path; it multiplies the perturbation. The rate of the released
            RPAT_Benchmarks is `1 - alpha`, that of RPAT_SOTAs is `alpha`. Draw it once per batch with `draw_beta`
            for the ablation of Fig. 4b.
        form: `"quotient"` (the paper's Eq. 3), `"interpolation"` (the released code) or `"relative"` (our own).
        criterion: $D(a, b)$: `"mse"` (mean over entries), `"kl"` for $\mathrm{KL}(b \,\|\, a)$, `"reverse_kl"` for
            $\mathrm{KL}(a \,\|\, b)$ as Eq. 3 orders them, `"js"`, `"cosine"`, or a function `(a, b) -> (B,)`. With
            places, see `perceptual_at.divergences`.
        temperature: divides what `"kl"`, `"reverse_kl"` and `"js"` compare; refused for the other criteria.
        perceive: `x -> (logits, perception)`, to regularise an inner layer's output instead of the logits (Table
            5); `perceptual_at.models.perceive_at(model, "second_to_last")` makes one.
        **base_options: keywords of the base, e.g. `beta` for TRADES and MART.

    Returns:
        `(loss, terms)` with the base's terms and `robust_perception`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or the base has no such option.
        ValueError: if shapes do not fit, a word is unknown or a number is out of range.

    Source:
        RPAT, Eq. 3; bases: Tables 1 and 2.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = rpat(model, (x,), labels, attack, base="trades", beta=4.0)
        >>> list(terms)
        ['cross_entropy', 'kl', 'robust_perception']
        >>> bool(terms["robust_perception"] < 1e-6)  # the logits of a linear model are always on the chord
        True
    """
    _check.number("rpat", "weight", weight, at_least=0.0)
    comparison("rpat", alpha, criterion, form, temperature)
    if perceive is not None and not callable(perceive):
        raise TypeError(
            "rpat: `perceive` must be a function x -> (logits, perception), such as models.perceive_at(model, layer) "
            f"makes, got {type(perceive).__name__}."
        )
    passes = run_base("rpat", base, base_options, model, views, labels, attack, perceive, term="robust_perception")
    run = perceive or logits_as_perception(model)
    adv = passes.adv or run(passes.x_adv)
    mid = run(interpolate(passes.x, passes.x_adv, alpha))
    clean = passes.clean or run(passes.x)
    evenness = robust_perception_loss(
        clean[1], mid[1], adv[1], alpha=alpha, form=form, criterion=criterion, temperature=temperature
    )
    return finish(passes.loss + weight * evenness, **passes.terms, robust_perception=evenness)


def rpat_raat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    mix: float | None,
    weight: float = 1.0,
    dicar_weight: float = 1.0,
    alpha: float = 0.5,
    form: Literal["quotient", "interpolation", "relative"] = "interpolation",
    **raat_options: Any,
) -> Result:
    r"""RPAT and RAAT in one objective: smaller perturbations at the boundary, aligned views, and even perception.

    $$ \mathrm{CE}(f(x_{\mathrm{sup}}), y) + \lambda_1\,\mathrm{DICAR} + \lambda_2\,\ell_{\mathrm{RP}} $$

    Our own combination; neither paper has it, and its page says what was measured. Robust perception looks at the whole
    path to $x_{\mathrm{adv}}$, also of the samples that are trained on less. Passes: those of `raat`, one forward each
    of $x_{\mathrm{adv}}$ and of the middle of both views, and one of the clean views where DICAR had no pair.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images; one is enough when `dicar_weight` is 0.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        mix: DICAR's weight of view 1, drawn once per batch: `draw_beta(fold="max")` in the released code, `draw_beta()`
            in the paper. None with a `dicar_weight` of 0.
        weight: $\lambda_2$ of robust perception.
        dicar_weight: $\lambda_1$ of DICAR.
        alpha: place of the middle on the path; it multiplies the perturbation. The rate of the released RPAT_Benchmarks
            is `1 - alpha`, that of RPAT_SOTAs is `alpha`. Draw it once per batch with `draw_beta` for the ablation of
            Fig. 4b.
        form: `"quotient"` (the paper's Eq. 3), `"interpolation"` (the released code) or `"relative"` (our own).
        **raat_options: other keywords of `raat`, as `temperature`, which divides DICAR's logits.

    Returns:
        `(loss, terms)` with RAAT's terms and `robust_perception`.

    Raises:
        TypeError: as `raat`.
        ValueError: as `raat` and `rpat`.

    Source:
        RPAT, Eq. 3, and RAAT, Table 4; their sum is our own.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = objectives.rpat_raat(model, (x, x.flip(1)), labels, attack, mix=0.75)
        >>> list(terms)
        ['cross_entropy', 'dicar', 'robust_perception']
    """
    _check.number("rpat_raat", "weight", weight, at_least=0.0)
    _check.number("rpat_raat", "dicar_weight", dicar_weight, at_least=0.0)
    comparison("rpat_raat", alpha, "mse", form, 1.0)
    if mix is not None:
        _check.number("rpat_raat", "mix", mix, at_least=0.0, at_most=1.0)
    check_views("rpat_raat", model, views, labels, expected=(2,) if dicar_weight > 0 else (1, 2))
    check_indices("rpat_raat", labels)
    base = functools.partial(raat, mix=mix, weight=dicar_weight)
    resolved("rpat_raat", base, raat_options)
    base = functools.partial(base, **raat_options)  # `temperature` is DICAR's, not that of robust perception
    return rpat(model, views, labels, attack, base=base, weight=weight, alpha=alpha, form=form)
