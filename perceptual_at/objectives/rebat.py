"""ReBAT, and RPAT++ on it: regularisers whose targets come from averaged weights."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.averaging import Weights, check_average
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.losses import robust_perception_kl_loss
from perceptual_at.objectives.passes import Attack, Result, attacked, finish, forward, one_batch, predictions
from perceptual_at.paths import interpolate


def rebat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights | None,
    beta: float = 1.0,
    teacher_mode: Literal["eval", "as_is"] = "eval",
) -> Result:
    r"""ReBAT: cross entropy on adversarial inputs, whose prediction should stay with the averaged model's.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y)
       + \beta\,\mathrm{KL}\big(\bar p(x_{\mathrm{adv}}) \,\|\, p(x_{\mathrm{adv}})\big) $$

    Passes: the attack, one forward of `x_adv`, and one of the averaged model without gradients.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` (CutMix) if the attack takes them.
        attack: `(model, x, labels) -> x_adv`. The released code attacks in train mode: `model_mode="as_is"`.
        average: averaged weights; None leaves the term out, as before epoch 105 of 200 in the released code.
        beta: weight of the KL term; 1, or 2 with CutMix.
        teacher_mode: mode of the averaged model: `"eval"`, or `"as_is"` to run it in the model's own mode. In train
            mode that takes batch statistics and moves the running statistics in `average`, which is what the
            released code does during the first epoch with the term.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and, with an average, `averaged_kl`.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if shapes or names do not fit, or a number is out of range.

    Source:
        Wang et al. 2023 (ReBAT); the direction of the KL is that of the released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = rebat(model, (x,), labels, attack, average=snapshot(model))
        >>> terms["averaged_kl"]  # the average is still the model
        tensor(0.)
    """
    uses_average = _uses_average("rebat", average, beta, teacher_mode, model)
    x, labels = one_batch("rebat", model, views, labels)
    x_adv = attacked("rebat", attack, model, x, labels)
    adv = forward(model, x_adv)
    ce = cross_entropy(adv, labels).mean()
    if not uses_average:
        return finish(ce, cross_entropy=ce)
    (teacher,) = predictions(model, x_adv, weights=average, as_is=teacher_mode == "as_is")
    kl = kl_divergence(teacher, adv, mask=labelled(labels)).mean()
    return finish(ce + beta * kl, cross_entropy=ce, averaged_kl=kl)


def rpat_plus_plus(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights | None,
    beta: float = 1.0,
    alpha: float = 0.5,
    teacher_mode: Literal["eval", "as_is"] = "eval",
) -> Result:
    r"""RPAT++: cross entropy plus robust perception announced by the averaged model.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y) + \beta\,\mathrm{KL}\big(
       \mathrm{softmax}(\bar f(x_\alpha) - (1 - \alpha) \bar f(x)) \,\big\|\,
       \mathrm{softmax}(\alpha f(x_{\mathrm{adv}})) \big) $$

    The term takes the place of ReBAT's. Passes: the attack, one forward of `x_adv`, and two of the averaged
    model without gradients.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` (CutMix) if the attack takes them.
        attack: `(model, x, labels) -> x_adv`; the variant "$" of Table 6 passes one with 10/255 and 12 steps.
        average: averaged weights; None leaves the term out, as before epoch 105 of 200 in the released code.
        beta: weight of the term.
        alpha: place of the middle on the path; it multiplies the perturbation.
        teacher_mode: mode of the averaged model: `"eval"`, or `"as_is"` to run it in the model's own mode. In train
            mode that takes batch statistics and moves the running statistics in `average`, which is what the released
            code does during the first epoch with the term.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and, with an average, `robust_perception_kl`.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if shapes or names do not fit, or a number is out of range.

    Source:
        RPAT, Sec. 5.3, Tables 3, 4 and 6; formula and start (epoch 105 of 200) from the released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = rpat_plus_plus(model, (x,), labels, attack, average=snapshot(model))
        >>> list(terms), bool(terms["robust_perception_kl"] < 1e-6)  # a linear model is on the chord
        (['cross_entropy', 'robust_perception_kl'], True)
        >>> list(rpat_plus_plus(model, (x,), labels, attack, average=None)[1])
        ['cross_entropy']
    """
    uses_average = _uses_average("rpat_plus_plus", average, beta, teacher_mode, model)
    _check.number("rpat_plus_plus", "alpha", alpha, above=0.0, at_most=1.0)
    x, labels = one_batch("rpat_plus_plus", model, views, labels)
    x_adv = attacked("rpat_plus_plus", attack, model, x, labels)
    adv = forward(model, x_adv)
    ce = cross_entropy(adv, labels).mean()
    if not uses_average:
        return finish(ce, cross_entropy=ce)
    mid_x = interpolate(x, x_adv, alpha)
    clean, mid = predictions(model, x, mid_x, weights=average, as_is=teacher_mode == "as_is")
    kl = robust_perception_kl_loss(clean, mid, adv, alpha=alpha)
    return finish(ce + beta * kl, cross_entropy=ce, robust_perception_kl=kl)


def _uses_average(function: str, average: Weights | None, beta: float, teacher_mode: str, model: nn.Module) -> bool:
    """Whether the term is in the loss; what it depends on is checked in any case."""
    _check.number(function, "beta", beta, at_least=0.0)
    _check.choice(function, "teacher_mode", teacher_mode, ("eval", "as_is"))
    check_average(function, average, model)
    return average is not None and beta > 0
