"""RAAT: smaller perturbations at the boundary, and alignment of interpolated views (DICAR)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._check import NO_LABEL
from perceptual_at._places import labelled, over_places
from perceptual_at._places import wrong as where_wrong
from perceptual_at._reduce import masked
from perceptual_at.averaging import Weights, check_average
from perceptual_at.divergences import cross_entropy
from perceptual_at.losses import boosted_cross_entropy, weighted_kl_loss
from perceptual_at.objectives.alignment import (
    AverageOver,
    Bound,
    Boundary,
    Dicar,
    ReducePer,
    Space,
    check_mask,
    check_options,
    choose,
    composed,
    dicar_term,
    per_row,
)
from perceptual_at.objectives.combination import Base, run_base
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    check_views,
    finish,
    forward,
    gaussian_start,
    one_batch,
    predictions,
)

Misclassified = Literal["standard", "clean", "mart"]
Supervise = Literal["both", "first"]


def raat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    mix: float | None = None,
    weight: float = 1.0,
    bound: bool = True,
    eta: float | Tensor | None = None,
    reduced_attack: Attack | None = None,
    boundary: Boundary = "release",
    reduce_per: ReducePer = "sample",
    misclassified: Misclassified = "standard",
    beta: float | None = None,
    supervise: Supervise = "both",
    mask: Tensor | None = None,
    space: Space = "logits",
    temperature: float = 0.5,
    average_over: AverageOver = "selected",
) -> Result:
    r"""RAAT: cross entropy with smaller perturbations at the boundary, plus DICAR.

    $$ \mathrm{CE}(f(x_{\mathrm{sup}}), y) + \lambda\,\mathrm{DICAR}, \qquad
       x_{\mathrm{sup}} = \begin{cases} x'' & \text{at the boundary} \\ x_{\mathrm{adv}} & \text{else}
       \end{cases} $$

    The model in eval mode decides who is at the boundary and which pairs DICAR may use (both views right).
    Passes: the attack, up to three forwards without gradients for the partition, one of $x_{\mathrm{sup}}$,
    one of the mixed views of the pairs in use, one of the clean views, in that order. Picking the pairs waits
    for the device once.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images; one is enough when `weight` is 0.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        mix: DICAR's weight of view 1, drawn once per batch: `draw_beta(fold="max")` in the released code,
            `draw_beta()` in the paper. Needed unless `weight` is 0.
        weight: $\lambda$ of DICAR; 0 leaves it and its passes out (Fig. 5: BOUND only).
        bound: False gives boundary samples the full perturbation (Fig. 5: DICAR only).
        eta: size of the reduced perturbation, $x'' = x + \eta (x_{\mathrm{adv}} - x)$; 0.1 when neither it nor
            `reduced_attack` is given. A tensor gives each image its own, `(B,)`, or each row of the joined views,
            `(2B,)`; `adaptive_eta` chooses one. Its values are not checked.
        reduced_attack: makes $x''$ by an attack of its own instead (the paper's Eq. 8), for example
            `partial(pgd, threat=threat.scaled(0.1), ...)`.
        boundary: who gets $x''$. `"release"`: right on x, wrong on $x''$ and on $x_{\mathrm{adv}}$. `"definition"`:
            right on x, wrong on $x''$ (Eq. 9). `"objective"`: wrong on $x''$, whatever x (Table 4).
        reduce_per: of dense labels, what gets $x''$ where a sample's places disagree. `"sample"`: the sample, moved
            from $x_{\mathrm{adv}}$ towards $x''$ by its share of such places. `"place"`: the entries at such places,
            while the others are those of $x_{\mathrm{adv}}$.
        misclassified: the loss of samples that are wrong on x. `"standard"`: as the rule above has it. `"clean"`:
            cross entropy on x (MMA's choice). `"mart"`: cross entropy on $x_{\mathrm{adv}}$ plus `beta` times the
            weighted KL.
        beta: weight of that KL, 6 by default; refused otherwise.
        supervise: the supervised terms run over `"both"` views (released) or the `"first"`.
        mask: boolean mask `(B,)` of the pairs DICAR uses, or `(B, *S)` of their places. None, as released, means the
            pairs (or places) whose two views are both right; the paper's indicator, whether the image without
            augmentation is right, is a mask to pass.
        space: where the clean predictions are mixed: `"probabilities"` as in Eq. 15, or `"logits"` as in the released
            code.
        temperature: divides all logits that are compared; 0.5 in the released code.
        average_over: DICAR's mean is over the `"selected"` pairs (the released code) or over `"all"` pairs (the paper's
            average over n samples); `"selected_everywhere"` is the mean over the selected pairs of all processes of a
            distributed run, instead of the mean of each process's own mean.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, `dicar` and `weighted_kl` as far as they are in use.

    Raises:
        TypeError: if `mix` is missing, `views` no tuple, an attack not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown, a number is out of range, or a keyword has no effect.

    Source:
        RAAT, Sec. C.1 and C.2, Eq. 8-16, Tables 1, 4 and 5; ablations: Fig. 5.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = raat(model, (x, x.flip(1)), labels, attack, mix=0.75)
        >>> list(terms)
        ['cross_entropy', 'dicar']
        >>> list(raat(model, (x,), labels, attack, weight=0.0)[1])
        ['cross_entropy']
    """
    function = "raat"
    rule = Bound(bound, eta, reduced_attack, boundary, reduce_per)
    settings = Dicar(mix, mask, space, temperature, average_over)
    check_options(function, weight, labels, rule, settings)
    _check.choice(function, "misclassified", misclassified, ("standard", "clean", "mart"))
    _check.choice(function, "supervise", supervise, ("both", "first"))
    if beta is not None and misclassified != "mart":
        raise ValueError(f"{function}: `beta`={beta!r} has no effect with misclassified={misclassified!r}.")
    x, labels = one_batch(function, model, views, labels, expected=(2,) if weight > 0 else (1, 2))
    check_indices(function, labels)
    check_mask(function, mask, views[0], labels)
    rule = rule._replace(eta=per_row(function, eta, views))
    x_adv = attacked(function, attack, model, x, labels)
    ask_wrong = misclassified != "standard" or (weight > 0 and mask is None)
    choice = choose(function, model, x, x_adv, labels, rule, ask_wrong=ask_wrong)
    supervised = choice.supervised
    if misclassified != "standard":
        assert choice.wrong is not None
        instead = x if misclassified == "clean" else x_adv
        supervised = composed(function, choice.wrong, instead, supervised, labels, reduce_per)

    rows = slice(views[0].shape[0] if supervise == "first" else None)
    logits = forward(model, supervised[rows])
    terms = {"cross_entropy": cross_entropy(logits, labels[rows]).mean()}
    loss, clean = terms["cross_entropy"], None
    if weight > 0:
        terms["dicar"], clean = dicar_term(model, x, x_adv, labels, choice.wrong, None, settings)
        loss = loss + weight * terms["dicar"]
    if misclassified == "mart":
        assert choice.wrong is not None
        clean = forward(model, x) if clean is None else clean
        terms["weighted_kl"] = _weighted_kl_of_wrong(clean[rows], logits, labels[rows], choice.wrong[rows])
        loss = loss + (6.0 if beta is None else beta) * terms["weighted_kl"]
    return finish(loss, **terms)


def _weighted_kl_of_wrong(clean: Tensor, adv: Tensor, labels: Tensor, wrong: Tensor) -> Tensor:
    """Mean of the weighted KL, 0 where the clean prediction is right."""
    counted = labelled(labels)
    if counted is None:
        return masked(weighted_kl_loss(clean, adv, labels, reduction="none"), wrong).mean()
    over_wrong = weighted_kl_loss(clean, adv, labels.long().masked_fill(~wrong, NO_LABEL), reduction="none")
    return (over_wrong * over_places(wrong.to(adv.dtype), counted)).mean()


def raat_plus_plus(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    mix: float | None = None,
    weight: float = 1.0,
    beta: float = 6.0,
    bound: bool = True,
    eta: float | Tensor | None = None,
    reduced_attack: Attack | None = None,
    boundary: Boundary = "release",
    reduce_per: ReducePer = "sample",
    mask: Tensor | None = None,
    space: Space = "logits",
    temperature: float = 0.5,
    average_over: AverageOver = "selected",
    noise: float = 0.001,
    repeat_clean_forward: bool = False,
    generator: torch.Generator | None = None,
) -> Result:
    r"""RAAT++: RAAT with MART's boosted cross entropy and weighted KL.

    $$ \mathrm{BCE}(f(x_{\mathrm{sup}}), y) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big)(1 - p_y(x))
       + \lambda\,\mathrm{DICAR} $$

    The KL runs over all samples and over their full perturbation. The attack is called with a start beside
    `x`, as in MART. Passes: the attack, up to three forwards without gradients for the partition, one each of
    $x_{\mathrm{adv}}$, x and $x_{\mathrm{sup}}$, and one of the mixed views of the pairs in use, in that order.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images; one is enough when `weight` is 0.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, start=...) -> x_adv`.
        mix: DICAR's weight of view 1, drawn once per batch: `draw_beta(fold="max")` in the released code, `draw_beta()`
            in the paper. Needed unless `weight` is 0.
        weight: $\lambda$ of DICAR.
        beta: weight of the KL: 6 in the released code; the paper's Table 4 puts it under $\lambda = 1$.
        bound: False gives boundary samples the full perturbation (Fig. 5: DICAR only).
        eta: size of the reduced perturbation, $x'' = x + \eta (x_{\mathrm{adv}} - x)$; 0.1 when neither it nor
            `reduced_attack` is given. A tensor gives each image its own, `(B,)`, or each row of the joined views,
            `(2B,)`; `adaptive_eta` chooses one. Its values are not checked.
        reduced_attack: makes $x''$ by an attack of its own instead (the paper's Eq. 8), for example
            `partial(pgd, threat=threat.scaled(0.1), ...)`.
        boundary: who gets $x''$. `"release"`: right on x, wrong on $x''$ and on $x_{\mathrm{adv}}$. `"definition"`:
            right on x, wrong on $x''$ (Eq. 9). `"objective"`: wrong on $x''$, whatever x (Table 4).
        reduce_per: of dense labels, what gets $x''$ where a sample's places disagree. `"sample"`: the sample, moved
            from $x_{\mathrm{adv}}$ towards $x''$ by its share of such places. `"place"`: the entries at such places,
            while the others are those of $x_{\mathrm{adv}}$.
        mask: boolean mask `(B,)` of the pairs DICAR uses, or `(B, *S)` of their places. None, as released, means the
            pairs (or places) whose two views are both right; the paper's indicator, whether the image without
            augmentation is right, is a mask to pass.
        space: where the clean predictions are mixed: `"probabilities"` as in Eq. 15, or `"logits"` as in the released
            code.
        temperature: divides all logits that are compared; 0.5 in the released code.
        average_over: DICAR's mean is over the `"selected"` pairs (the released code) or over `"all"` pairs (the paper's
            average over n samples); `"selected_everywhere"` is the mean over the selected pairs of all processes of a
            distributed run, instead of the mean of each process's own mean.
        noise: standard deviation of the Gaussian start around `x`.
        repeat_clean_forward: run the clean views a second time for DICAR, as the released code does; without
            dropout only batch norm's running statistics notice.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `boosted_cross_entropy`, `weighted_kl` and `dicar`.

    Raises:
        TypeError: if `mix` is missing, `views` no tuple, an attack not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown, a number is out of range, or a keyword has no effect.

    Source:
        RAAT, Sec. C.2 and Table 4.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = raat_plus_plus(model, (x, x.flip(1)), labels, attack, mix=0.75)
        >>> list(terms)
        ['boosted_cross_entropy', 'weighted_kl', 'dicar']
    """
    function = "raat_plus_plus"
    rule = Bound(bound, eta, reduced_attack, boundary, reduce_per)
    settings = Dicar(mix, mask, space, temperature, average_over)
    check_options(function, weight, labels, rule, settings)
    _check.flag(function, repeat_clean_forward=repeat_clean_forward)
    _check.number(function, "beta", beta, at_least=0.0)
    x, labels = one_batch(function, model, views, labels, expected=(2,) if weight > 0 else (1, 2))
    check_indices(function, labels)
    check_mask(function, mask, views[0], labels)
    rule = rule._replace(eta=per_row(function, eta, views))
    start = gaussian_start(function, x, noise, generator)
    x_adv = attacked(function, attack, model, x, labels, start=start)
    ask_wrong = weight > 0 and mask is None
    choice = choose(function, model, x, x_adv, labels, rule, ask_wrong=ask_wrong)

    adv, clean = forward(model, x_adv), forward(model, x)
    terms = {
        "boosted_cross_entropy": boosted_cross_entropy(forward(model, choice.supervised) if bound else adv, labels),
        "weighted_kl": weighted_kl_loss(clean, adv, labels),
    }
    loss = terms["boosted_cross_entropy"] + beta * terms["weighted_kl"]
    if weight > 0:
        again = None if repeat_clean_forward else clean
        terms["dicar"], _ = dicar_term(model, x, x_adv, labels, choice.wrong, again, settings)
        loss = loss + weight * terms["dicar"]
    return finish(loss, **terms)


def raat_sharp(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights | None,
    mix: float | None = None,
    weight: float = 1.0,
    bound: bool = True,
    eta: float | Tensor | None = None,
    reduced_attack: Attack | None = None,
    boundary: Boundary = "release",
    reduce_per: ReducePer = "sample",
    mask: Tensor | None = None,
    space: Space = "logits",
    temperature: float = 0.5,
    average_over: AverageOver = "selected",
    teacher_mode: Literal["eval", "as_is"] = "eval",
) -> Result:
    r"""RAAT#: RAAT on ReBAT's recipe, with the averaged model deciding the partition.

    $$ \mathrm{CE}(f(x_{1,\mathrm{sup}}), y) + \lambda\,\mathrm{DICAR} $$

    Only view 1 enters the cross entropy; DICAR pairs it with view 2. Each view is attacked on its own.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images; one is enough when `weight` is 0.
        labels: class indices `(B,)`. Mixed images (CutMix) are refused: they have no single right class.
        attack: `(model, x, labels) -> x_adv`. The released code attacks in train mode: `model_mode="as_is"`.
        average: averaged weights that decide the partition; None lets the model itself decide.
        mix: DICAR's weight of view 1, drawn once per batch: `draw_beta(fold="max")` in the released code, `draw_beta()`
            in the paper. Needed unless `weight` is 0.
        weight: $\lambda$ of DICAR; 0 leaves it out, as before epoch 105 of 200 in the released code.
        bound: False gives boundary samples the full perturbation (Fig. 5: DICAR only).
        eta: size of the reduced perturbation, $x'' = x + \eta (x_{\mathrm{adv}} - x)$; 0.1 when neither it nor
            `reduced_attack` is given. A tensor gives each image its own, `(B,)`; `adaptive_eta` chooses one. Its values
            are not checked.
        reduced_attack: makes $x''$ by an attack of its own instead (the paper's Eq. 8), for example
            `partial(pgd, threat=threat.scaled(0.1), ...)`.
        boundary: who gets $x''$. `"release"`: right on x, wrong on $x''$ and on $x_{\mathrm{adv}}$. `"definition"`:
            right on x, wrong on $x''$ (Eq. 9). `"objective"`: wrong on $x''$, whatever x (Table 4).
        reduce_per: of dense labels, what gets $x''$ where a sample's places disagree. `"sample"`: the sample, moved
            from $x_{\mathrm{adv}}$ towards $x''$ by its share of such places. `"place"`: the entries at such places,
            while the others are those of $x_{\mathrm{adv}}$.
        mask: boolean mask `(B,)` of the pairs DICAR uses, or `(B, *S)` of their places. None, as released, means the
            pairs (or places) whose two views are both right; the paper's indicator, whether the image without
            augmentation is right, is a mask to pass.
        space: where the clean predictions are mixed: `"probabilities"` as in Eq. 15, or `"logits"` as in the released
            code.
        temperature: divides all logits that are compared; 0.5 in the released code.
        average_over: DICAR's mean is over the `"selected"` pairs (the released code) or over `"all"` pairs (the paper's
            average over n samples); `"selected_everywhere"` is the mean over the selected pairs of all processes of a
            distributed run, instead of the mean of each process's own mean.
        teacher_mode: mode of the averaged model: `"eval"`, or `"as_is"` to run it in the model's own mode; until the
            end of its epoch 105 the released code's partition comes from batch statistics (`"as_is"`).

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and, unless `weight` is 0, `dicar`.

    Raises:
        TypeError: if `mix` is missing, `views` no tuple, an attack not callable, or `labels` no class indices.
        ValueError: if shapes or names do not fit, a word is unknown, or a number is out of range.

    Source:
        RAAT, Sec. 5.3 and Table 3; details from the released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = raat_sharp(model, (x, x.flip(1)), labels, attack, average=snapshot(model), mix=0.75)
        >>> list(terms)
        ['cross_entropy', 'dicar']
    """
    function = "raat_sharp"
    rule = Bound(bound, eta, reduced_attack, boundary, reduce_per)
    settings = Dicar(mix, mask, space, temperature, average_over)
    check_options(function, weight, labels, rule, settings)
    _check.choice(function, "teacher_mode", teacher_mode, ("eval", "as_is"))
    check_average(function, average, model)
    check_views(function, model, views, labels, expected=(2,) if weight > 0 else (1, 2))
    check_indices(function, labels)
    check_mask(function, mask, views[0], labels)
    rule = rule._replace(eta=per_row(function, eta, views[:1]))  # each view is attacked on its own
    x, as_is = views[0], teacher_mode == "as_is"
    x_adv = attacked(function, attack, model, x, labels)
    ask_wrong = weight > 0 and mask is None
    choice = choose(function, model, x, x_adv, labels, rule, average, as_is, ask_wrong=ask_wrong)
    ce = cross_entropy(forward(model, choice.supervised), labels).mean()
    if weight == 0:
        return finish(ce, cross_entropy=ce)
    x2_adv = attacked(function, attack, model, views[1], labels)
    wrong = None
    if mask is None:
        assert choice.wrong is not None
        (clean_2,) = predictions(model, views[1], weights=average, as_is=as_is)
        wrong = torch.cat([choice.wrong, where_wrong(clean_2, labels)])
    both, both_adv, twice = (torch.cat(pair) for pair in ((x, views[1]), (x_adv, x2_adv), (labels, labels)))
    term, _ = dicar_term(model, both, both_adv, twice, wrong, None, settings)
    return finish(ce + weight * term, cross_entropy=ce, dicar=term)


def dicar(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    mix: float,
    base: Base = "pgd_at",
    weight: float = 1.0,
    mask: Tensor | None = None,
    space: Space = "logits",
    temperature: float = 0.5,
    average_over: AverageOver = "selected",
    **base_options: Any,
) -> Result:
    r"""DICAR on top of any base objective, with full perturbations everywhere.

    $$ \ell_{\mathrm{base}} + \lambda\,\mathrm{DICAR} $$

    On PGD-AT it is RAAT without the boundary rule; on the other bases it is our own combination. Passes on
    top of the base's: one forward without gradients to see which samples are right (unless `mask` says which
    pairs to use), one of the mixed views of those pairs, and one of the clean views where the base had none.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`; with a `mask`, what else the base takes.
        attack: `(model, x, labels) -> x_adv`; TRADES as the base also gives it `loss` and `start`.
        mix: DICAR's weight of view 1, drawn once per batch: `draw_beta(fold="max")` in the released code, `draw_beta()`
            in the paper.
        base: what to add the term to: an objective by name, as a function, or as a partial of one, for example
            `functools.partial(objectives.dicar, base="trades", mix=mix)` for both terms on TRADES.
        weight: $\lambda$.
        mask: boolean mask `(B,)` of the pairs DICAR uses, or `(B, *S)` of their places. None, as released, means the
            pairs (or places) whose two views are both right; the paper's indicator, whether the image without
            augmentation is right, is a mask to pass.
        space: where the clean predictions are mixed: `"probabilities"` as in Eq. 15, or `"logits"` as in the released
            code.
        temperature: divides all logits that are compared; 0.5 in the released code.
        average_over: DICAR's mean is over the `"selected"` pairs (the released code) or over `"all"` pairs (the paper's
            average over n samples); `"selected_everywhere"` is the mean over the selected pairs of all processes of a
            distributed run, instead of the mean of each process's own mean.
        **base_options: keywords of the base, e.g. `beta` for TRADES and MART.

    Returns:
        `(loss, terms)` with the base's terms and `dicar`.

    Raises:
        TypeError: if `mix` is missing, `views` no tuple, `attack` not callable, `labels` no class indices without a
            `mask`, or the base has no such option.
        ValueError: if there are not two views, shapes do not fit, or a number is out of range.

    Source:
        RAAT, Eq. 16 and Fig. 5a ("DICAR").

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> list(dicar(model, (x, x.flip(1)), labels, attack, mix=0.5, base="mart")[1])
        ['boosted_cross_entropy', 'weighted_kl', 'dicar']
    """
    settings = Dicar(mix, mask, space, temperature, average_over)
    check_options("dicar", weight, labels, None, settings)
    check_views("dicar", model, views, labels, expected=(2,))
    check_mask("dicar", mask, views[0], labels)
    if mask is None:
        check_indices("dicar", labels)
    passes = run_base("dicar", base, base_options, model, views, labels, attack, term="dicar")
    wrong = None
    if mask is None:
        (clean,) = predictions(model, passes.x)
        wrong = where_wrong(clean, passes.labels)
    own = None if passes.clean is None else passes.clean[0]
    term, _ = dicar_term(model, passes.x, passes.x_adv, passes.labels, wrong, own, settings)
    return finish(passes.loss + weight * term, **passes.terms, dicar=term)
