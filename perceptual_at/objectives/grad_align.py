"""GradAlign: single-step training whose input gradients agree inside the ball."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at._attention import attention_in_parts
from perceptual_at._differentiation import by_grad, uncompiled
from perceptual_at.divergences import cross_entropy
from perceptual_at.losses import grad_align_loss
from perceptual_at.objectives.passes import Attack, Result, attacked, check_indices, finish, forward, one_batch
from perceptual_at.threats import Threat, check_threat


def grad_align(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    threat: Threat,
    weight: float = 0.2,
    generator: torch.Generator | None = None,
) -> Result:
    r"""GradAlign: adversarial cross entropy, plus how the direction of the input gradient differs inside the ball.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y) + \lambda \big( 1 - \cos(\nabla_x \mathrm{CE}(f(x), y),
       \nabla_x \mathrm{CE}(f(x + \eta), y)) \big) $$

    The first gradient is held fixed, as released; the second is differentiated again. Passes: the attack, one forward
    of `x_adv`, and one forward and input gradient each at `x` and at $x + \eta$, in the mode the model is in. An attack
    of one step from `x` could share the gradient at `x`; the loop on the page of the loss does.

    Args:
        model: maps inputs to logits, twice differentiable almost everywhere; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`; released with FGSM from `x` and a step of 1.25 budgets,
            `partial(pgd, ..., steps=1, step_size=1.25 * eps, start="clean", model_mode="as_is")`.
        threat: the ball that $\eta$ is drawn from, by its `random_start`.
        weight: $\lambda$; 0.2 at 8/255 and 2 at 16/255, in between $\exp(\epsilon \ln(10) / 8 + \ln 0.02)$ with
            $\epsilon$ in 255ths.
        generator: source of $\eta$.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `grad_align`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, `threat` no threat model, or `labels` no indices.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Andriushchenko and Flammarion 2020 (GradAlign), and its released code.

    Examples:
        >>> model, x, labels = nn.Sequential(nn.Linear(2, 3), nn.Tanh()), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1), steps=1, start="clean")
        >>> loss, terms = objectives.grad_align(model, (x,), labels, attack, threat=Linf(0.1))
        >>> loss.backward()
        >>> list(terms)
        ['cross_entropy', 'grad_align']
    """
    _check.number("grad_align", "weight", weight, at_least=0.0)
    check_threat("grad_align", threat)
    x, labels = one_batch("grad_align", model, views, labels)
    check_indices("grad_align", labels)
    generator = _random.source("grad_align", generator, x.device)
    x_adv = attacked("grad_align", attack, model, x, labels)
    ce = cross_entropy(forward(model, x_adv), labels).mean()
    beside = threat.random_start(x.detach(), generator=generator)
    here = _gradient(model, x, labels, differentiable=False)
    there = _gradient(model, beside, labels, differentiable=True)
    alignment = grad_align_loss(here, there)
    return finish(ce + weight * alignment, cross_entropy=ce, grad_align=alignment)


def _gradient(model: nn.Module, x: Tensor, labels: Tensor, *, differentiable: bool) -> Tensor:
    """Input gradient of the summed cross entropy; fused attention and compiled graphs have no second derivatives."""
    at = x.detach().requires_grad_()
    with contextlib.ExitStack() as differently:
        if differentiable:
            differently.enter_context(attention_in_parts())
            differently.enter_context(uncompiled())
        total = cross_entropy(forward(model, at), labels).sum()
    with by_grad("grad_align", "inputs"):
        return torch.autograd.grad(total, at, create_graph=differentiable)[0]
