"""ADR: labels that an averaged network corrects, in the loss and in the attack."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.attacks import kl_to
from perceptual_at.averaging import Weights, check_average
from perceptual_at.divergences import cross_entropy, kl_divergence
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    finish,
    forward,
    one_batch,
    predictions,
    source_of_noise,
)
from perceptual_at.soft_labels import rectified_labels


def adr(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    average: Weights,
    temperature: float = 2.5,
    trust: float = 0.7,
    base: Literal["pgd_at", "trades"] = "pgd_at",
    beta: float = 6.0,
    joint: bool = True,
    start: Literal["one_sided", "gaussian"] = "one_sided",
    reference_mode: Literal["eval", "as_is"] = "as_is",
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""ADR: PGD-AT or TRADES on labels that an averaged network's clean prediction has rectified.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), \tilde y), \qquad
       \mathrm{CE}(f(x), \tilde y) + \beta\,\mathrm{KL}\big(p(x) \,\|\, p(x_{\mathrm{adv}})\big) $$

    with $\tilde y$ of `soft_labels.rectified_labels`. On PGD-AT the attack ascends the cross entropy of the rectified
    labels too; on TRADES it ascends the KL and does not see them. The average is the caller's: `ema_update` with a
    decay of 0.995 after every step, from the first on. Temperature and trust follow `schedules.cosine_between`.

    Passes: one of the averaged network at `x` without gradients, the attack, and one forward of `x_adv`; on TRADES one
    of `x` for the attack's reference, and one forward of `x` and `x_adv`, in one batch if `joint`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: on PGD-AT `(model, x, rectified labels) -> x_adv`; on TRADES `(model, x, labels, loss=..., start=...)`.
            The released code attacks in train mode: `model_mode="as_is"`.
        average: averaged weights, run in eval mode.
        temperature: $T$, 2.5 falling to 2 on CIFAR-10.
        trust: $\lambda$, 0.7 rising to 0.95 on CIFAR-10.
        base: whose labels are rectified.
        beta: weight of the KL, on TRADES.
        joint: run `x` and `x_adv` as one batch, as released, which mixes batch norm's statistics; on TRADES.
        start: of the attack, on TRADES: `"one_sided"` adds `noise` times uniform numbers in [0, 1), as released;
            `"gaussian"` is TRADES' own.
        reference_mode: mode of the model for the attack's reference, on TRADES: `"as_is"` goes with an attack in the
            model's own mode, as released.
        noise: size of the start, on TRADES.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and, on TRADES, `kl`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, `labels` no class indices, or there is no `average`.
        ValueError: if shapes or names do not fit, a word is unknown or a number is out of range.

    Source:
        Wu et al. 2024 (ADR), Eq. 3 to 6, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> list(objectives.adr(model, (x,), labels, attack, average=snapshot(model))[1])
        ['cross_entropy']
        >>> loss, _ = objectives.adr(model, (x,), labels, lambda *_: x, average=snapshot(model), trust=0.0)
        >>> torch.allclose(loss, nn.functional.cross_entropy(model(x), labels))  # nothing is rectified
        True
    """
    _check.flag("adr", joint=joint)
    _check.choice("adr", "base", base, ("pgd_at", "trades"))
    _check.choice("adr", "start", start, ("one_sided", "gaussian"))
    _check.choice("adr", "reference_mode", reference_mode, ("eval", "as_is"))
    _check.number("adr", "beta", beta, at_least=0.0)
    _check.number("adr", "temperature", temperature, above=0.0)
    _check.number("adr", "trust", trust, at_least=0.0, at_most=1.0)
    if average is None:
        raise TypeError(
            "adr: `average` must be averaged weights, such as snapshot(model) moved by ema_update, got None."
        )
    check_average("adr", average, model)
    x, labels = one_batch("adr", model, views, labels)
    check_indices("adr", labels)
    _check.labels("adr", labels, views=x)
    generator = source_of_noise("adr", noise, generator, x)
    (teacher,) = predictions(model, x, weights=average)
    rectified = rectified_labels(teacher, labels, temperature=temperature, trust=trust)
    if base == "pgd_at":
        adv = forward(model, attacked("adr", attack, model, x, rectified))
        ce = cross_entropy(adv, rectified).mean()
        return finish(ce, cross_entropy=ce)
    options: dict[str, Any] = {}
    if not getattr(attack, "answered", False):
        (reference,) = predictions(model, x, as_is=reference_mode == "as_is")
        options = {"loss": kl_to(reference), "start": _beside(x, start, noise, generator)}
    x_adv = attacked("adr", attack, model, x, labels, **options)
    clean, adv = forward(model, torch.cat([x, x_adv])).chunk(2) if joint else (forward(model, x), forward(model, x_adv))
    ce, kl = cross_entropy(clean, rectified).mean(), kl_divergence(clean, adv).mean()
    return finish(ce + beta * kl, cross_entropy=ce, kl=kl)


def _beside(x: Tensor, start: str, noise: float, generator: torch.Generator) -> Tensor:
    """Where the attack on TRADES begins."""
    draw = torch.rand if start == "one_sided" else torch.randn
    drawn = draw(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    return x + noise * drawn.to(x.device)
