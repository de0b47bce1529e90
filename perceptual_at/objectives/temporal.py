"""TE: predictions that stay with what was predicted before."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.attacks import kl_to
from perceptual_at.divergences import PerSampleLoss, cross_entropy, kl_divergence
from perceptual_at.losses import temporal_ensembling_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    check_views,
    finish,
    forward,
    gaussian_start,
    predictions,
    source_of_noise,
)


def te(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    targets: Tensor | None,
    weight: float = 300.0,
    base: Literal["pgd_at", "trades"] = "pgd_at",
    beta: float = 6.0,
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> Result:
    r"""TE: PGD-AT or TRADES, with predictions held to the average of the sample's earlier ones, under attack too.

    $$ \mathrm{CE}(f(x_{\mathrm{adv}}), y) + w\, \|p(x_{\mathrm{adv}}) - t\|^2 / K, \qquad
       \ell_{\mathrm{TRADES}} + w\, \|p(x) - t\|^2 / K $$

    The term is at `x_adv` on PGD-AT and at `x` on TRADES. The attack is called with the sum of the base's loss and the
    term at the attacked point. The memory is the caller's: `memories.ensemble_update` with the clean logits in eval
    mode before each step, then `memories.ensemble_targets`. Passes: those of the base.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=...) -> x_adv`, on TRADES and with `noise` also `start=`.
        targets: ensembled probabilities `(B, K)` of these samples; None leaves the term out, as before epoch 90 of 200
            in the released code.
        weight: $w$, which grows with the epochs: `schedules.te_weight`.
        base: what the term is added to.
        beta: weight of the KL, on TRADES.
        noise: standard deviation of a Gaussian start around `x`. None takes 0.001 on TRADES and leaves PGD-AT's start
            to the attack; the released code has 0.001 on PGD-AT in L2 too.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the base's terms and, with targets, `temporal_ensembling`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if there is more than one view, shapes do not fit, a word is unknown or a number is out of range.

    Source:
        Dong et al. 2022, Eq. 7 and 8, and its released code (memorization-AT).

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack, targets = functools.partial(pgd, threat=Linf(0.1)), torch.full((4, 3), 1 / 3)
        >>> loss, terms = objectives.te(model, (x,), labels, attack, targets=targets, weight=2.0)
        >>> torch.allclose(loss, terms["cross_entropy"] + 2 * terms["temporal_ensembling"])
        True
        >>> list(objectives.te(model, (x,), labels, attack, targets=None, base="trades")[1])
        ['cross_entropy', 'kl']
    """
    _check.choice("te", "base", base, ("pgd_at", "trades"))
    _check.number("te", "weight", weight, at_least=0.0)
    _check.number("te", "beta", beta, at_least=0.0)
    check_views("te", model, views, labels, expected=(1,))
    check_indices("te", labels)
    (x,) = views
    if targets is not None:
        _check.tensor("te", "targets", targets)
    held = None if targets is None else targets.detach()
    if held is not None and held.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"te: `targets` must have one row per sample, ({x.shape[0]}, K), got shape {tuple(held.shape)}; take the "
            "batch's rows of the memory with memories.ensemble_targets(ensemble, index)."
        )
    ascended: PerSampleLoss = cross_entropy
    size = 0.001 if noise is None else noise
    generator = source_of_noise("te", size, generator, x)
    if base == "trades":
        toward = kl_to(predictions(model, x)[0])
        ascended = _scaled(toward, beta) if held is not None else toward
    options: dict[str, Any] = {} if base == "pgd_at" and noise is None else {
        "start": gaussian_start("te", x, size, generator)
    }  # fmt: skip
    if base == "trades" or held is not None:
        options["loss"] = ascended if held is None else _with_term(ascended, held, weight)
    x_adv = attacked("te", attack, model, x, labels, **options)
    clean = forward(model, x) if base == "trades" else None
    adv = forward(model, x_adv)
    ce = cross_entropy(adv if clean is None else clean, labels).mean()
    loss, terms = ce, {"cross_entropy": ce}
    if clean is not None:
        terms["kl"] = kl_divergence(clean, adv, mask=labelled(labels)).mean()
        loss = loss + beta * terms["kl"]
    if held is not None:
        terms["temporal_ensembling"] = temporal_ensembling_loss(adv if clean is None else clean, held)
        loss = loss + weight * terms["temporal_ensembling"]
    return finish(loss, **terms)


def _scaled(loss: PerSampleLoss, factor: float) -> PerSampleLoss:
    return lambda logits, labels: factor * loss(logits, labels)


def _with_term(loss: PerSampleLoss, targets: Tensor, weight: float) -> PerSampleLoss:
    """A loss to attack with, plus the weighted term."""

    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels) + weight * temporal_ensembling_loss(logits, targets, reduction="none")

    return total
