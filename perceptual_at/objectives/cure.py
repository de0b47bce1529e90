"""CURE: TRADES held to its own averaged network, with gradients in which only what matters moves."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._differentiation import by_grad, uncompiled
from perceptual_at._places import labelled
from perceptual_at.averaging import Weights, check_average
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.gradient_revision import check_shares, revise
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    check_indices,
    finish,
    forward,
    kl_attacked,
    one_batch,
    predictions,
)
from perceptual_at.victims.finding import bare


def cure(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights | None,
    beta: float = 5.0,
    weight: float = 1.0,
    teacher_mode: Literal["eval", "as_is"] = "as_is",
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""CURE's loss: TRADES, and predictions that stay with the averaged network's, clean and under attack.

    $$ \mathrm{CE}(f(x), y) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big) + \gamma \big(
       \mathrm{KL}(\bar p(x) \,\|\, p(x)) + \mathrm{KL}(\bar p(x_{\mathrm{adv}}) \,\|\, p(x_{\mathrm{adv}})) \big) $$

    The averaged network is held fixed. It is the caller's: with probability 0.2 a step,
    `ema_update(average, model, decay=min(1 - 1 / (step + 1), 0.999), buffers="keep")`. The other half of the method is
    `cure_gradients`. Passes: the attack, one forward of `x` for its reference, one each of `x` and `x_adv`, each
    followed by one of the averaged network without gradients.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`.
        average: averaged weights; None leaves the last term out.
        beta: weight of the KL: 5 in the released code, 1 in the paper, which writes none.
        weight: $\gamma$.
        teacher_mode: mode of the averaged network: `"as_is"` runs it in the model's, as released, which in train mode
            moves the running statistics in `average`.
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, `kl` and, with an average, `averaged_kl`, the sum of two.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes or names do not fit, or a number is out of range.

    Source:
        Gowda et al. 2024 (CURE), Eq. 4 and 8, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> loss, terms = objectives.cure(model, (x,), labels, attack, average=snapshot(model))
        >>> list(terms), bool(terms["averaged_kl"] < 1e-6)  # the average is still the model
        (['cross_entropy', 'kl', 'averaged_kl'], True)
    """
    options: dict[str, Any] = {"average": average, "beta": beta, "weight": weight, "teacher_mode": teacher_mode}
    loss, terms = _terms("cure", model, views, labels, attack, noise=noise, generator=generator, **options)
    return finish(loss, **terms)


def cure_gradients(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights | None,
    beta: float = 5.0,
    weight: float = 1.0,
    teacher_mode: Literal["eval", "as_is"] = "as_is",
    noise: float = 0.001,
    generator: torch.Generator | None = None,
    share: float = 0.3,
    natural_weight: float = 0.1,
    robust_weight: float = 0.9,
    layers: Callable[[int, str], bool] | None = None,
) -> Result:
    r"""CURE's step: the loss's gradient, revised and added to each parameter's `.grad`, in place of `backward`.

    The natural gradient is that of the clean cross entropy, the robust one that of the KL. Passes: those of `cure`, and
    three backward instead of one.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`.
        average: averaged weights; None leaves the last term out.
        beta: weight of the KL: 5 in the released code, 1 in the paper, which writes none.
        weight: $\gamma$.
        teacher_mode: mode of the averaged network: `"as_is"` runs it in the model's, as released, which in train mode
            moves the running statistics in `average`.
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.
        share: of each tensor's entries that goes, in [0, 1): 0.3 for CURE's ResNet-18, 0.5 for its WideResNet-34-10.
            The code's option is a fraction too, though its README writes 30.
        natural_weight: $a$, how much the clean gradient counts: 0.1, 0.3 for the paper's WideResNet-34-10.
        robust_weight: $b$, how much the other counts: $1 - a$ in the paper.
        layers: which tensors are revised, `(position, name) -> bool`; None takes those with "conv1" in their names, the
            network's first parameter excepted. Where no name has it nothing is revised.

    Returns:
        `(loss, terms)` as `cure`, both detached; the gradients are where the optimiser looks for them.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes or names do not fit, or a number is out of range.

    Source:
        Gowda et al. 2024 (CURE), Eq. 5 to 8, and its released code, `rgp_soft`.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, _ = cure_gradients(
        ...     model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)), average=None, share=0.5,
        ...     layers=lambda position, name: name == "weight",
        ... )
        >>> int((model.weight.grad == 0).sum()), loss.requires_grad
        (3, False)
    """
    check_shares("cure_gradients", share, natural_weight, robust_weight, layers)
    options: dict[str, Any] = {"average": average, "beta": beta, "weight": weight, "teacher_mode": teacher_mode}
    options |= {"again": True, "noise": noise, "generator": generator}
    loss, terms = _terms("cure_gradients", model, views, labels, attack, **options)
    trained = {name: value for name, value in bare(model).named_parameters() if value.requires_grad}
    if not trained:
        raise ValueError("cure_gradients: `model` has no parameter that requires a gradient.")
    natural, robust, total = (
        _by_name(value, trained, keep=value is not loss) for value in (terms["cross_entropy"], terms["kl"], loss)
    )
    revised = revise(
        total, natural, robust, share=share, natural_weight=natural_weight, robust_weight=robust_weight, layers=layers
    )
    for name, parameter in trained.items():
        parameter.grad = revised[name] if parameter.grad is None else parameter.grad + revised[name]
    return finish(loss.detach(), **terms)


def _terms(
    function: str,
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Any,
    beta: Any,
    weight: Any,
    teacher_mode: Any,
    again: bool = False,
    **noise: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, with gradients, for `again` such that can be taken more than once.

    `noise` and its `generator` make the start of the attack.
    """
    _check.number(function, "beta", beta, at_least=0.0)
    _check.number(function, "weight", weight, at_least=0.0)
    _check.choice(function, "teacher_mode", teacher_mode, ("eval", "as_is"))
    check_average(function, average, model)
    x, labels = one_batch(function, model, views, labels)
    check_indices(function, labels)
    x_adv = kl_attacked(function, attack, model, x, labels, **noise)
    counted = labelled(labels)
    stable: list[Tensor] = []
    logits = []
    for inputs in (x, x_adv):
        with uncompiled() if again else contextlib.nullcontext():
            logits.append(forward(model, inputs))
        if average is not None:
            (teacher,) = predictions(model, inputs, weights=average, as_is=teacher_mode == "as_is")
            stable.append(kl_divergence(teacher, logits[-1], mask=counted).mean())
    clean, adv = logits
    ce, kl = cross_entropy(clean, labels).mean(), kl_divergence(clean, adv, mask=counted).mean()
    if not stable:
        return ce + beta * kl, {"cross_entropy": ce, "kl": kl}
    averaged = stable[0] + stable[1]
    return ce + beta * kl + weight * averaged, {"cross_entropy": ce, "kl": kl, "averaged_kl": averaged}


def _by_name(value: Tensor, trained: dict[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
    """Gradients of a value, zero where it does not depend on a parameter."""
    with by_grad("cure_gradients", "parameters"):
        found = torch.autograd.grad(value, list(trained.values()), retain_graph=keep, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for (name, parameter), gradient in zip(trained.items(), found, strict=True)
    }
