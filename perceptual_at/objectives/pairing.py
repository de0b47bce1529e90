"""Logit pairing: ALP in its three forms, and the two methods called CLP."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at.divergences import cross_entropy
from perceptual_at.losses import logit_pairing_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    check_views,
    finish,
    forward,
    one_batch,
)
from perceptual_at.soft_labels import smoothed


def alp(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    weight: float = 0.5,
    supervise: Literal["both", "adversarial"] = "both",
    space: Literal["logits", "probabilities"] = "logits",
    smoothing: float = 0.0,
    joint: bool = False,
) -> Result:
    r"""ALP: cross entropy on clean and adversarial inputs, whose logits should agree.

    $$ \tfrac12 \mathrm{CE}(f(x), y) + \tfrac12 \mathrm{CE}(f(x_{\mathrm{adv}}), y)
       + \lambda\, \tfrac1K \|f(x) - f(x_{\mathrm{adv}})\|^2 $$

    - Kannan et al.: `joint=True, smoothing=0.1`, with an attack towards the least likely class.
    - In the released code of HE: the defaults, with an untargeted attack.
    - In Table 1 of MART: `supervise="adversarial", space="probabilities"`.

    Passes: the attack, one forward each of `x` and `x_adv`, or one of both together.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        weight: $\lambda$; 0.5 in Kannan's and in HE's code.
        supervise: the cross entropy of `"both"` inputs, or that of the `"adversarial"` ones alone.
        space: compare `"logits"`, as a mean over classes (Kannan et al., and HE's ALP), or `"probabilities"`, as a sum
            over classes (MART's Table 1).
        smoothing: of the labels in the cross entropy, spread over all classes.
        joint: run `x` and `x_adv` as one batch, which mixes batch norm's statistics.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `pairing`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown, or a number is out of range.

    Source:
        Kannan et al. 2018, and its released code; Pang et al. 2020 (HE), released code; Wang et al. 2020 (MART).

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = objectives.alp(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> torch.allclose(loss, terms["cross_entropy"] + 0.5 * terms["pairing"])
        True
    """
    _check.flag("alp", joint=joint)
    _check.number("alp", "weight", weight, at_least=0.0)
    _check.choice("alp", "supervise", supervise, ("both", "adversarial"))
    _check.choice("alp", "space", space, ("logits", "probabilities"))
    _check.number("alp", "smoothing", smoothing, at_least=0.0, at_most=1.0)
    x, labels = one_batch("alp", model, views, labels)
    check_indices("alp", labels)
    x_adv = attacked("alp", attack, model, x, labels)
    clean, adv = forward(model, torch.cat([x, x_adv])).chunk(2) if joint else (forward(model, x), forward(model, x_adv))
    target = smoothed("alp", labels, clean.shape[1], smoothing, dtype=clean.dtype) if smoothing else labels
    ce = cross_entropy(adv, target).mean()
    if supervise == "both":
        ce = (cross_entropy(clean, target).mean() + ce) / 2
    pairing = logit_pairing_loss(clean, adv, space=space)
    return finish(ce + weight * pairing, cross_entropy=ce, pairing=pairing)


def clp(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack | None,
    *,
    pairs: Literal["images", "attacked"],
    weight: float = 0.5,
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> Result:
    r"""CLP, of which there are two: say which.

    $$ \mathrm{CE}(f(x), y) + \lambda\,\tfrac1K \|f(x_i) - f(x_j)\|^2
       \qquad\text{or}\qquad \mathrm{CE}(f(x), y) + \lambda \|p(x) - p(x_{\mathrm{adv}})\|^2 $$

    - `pairs="images"`, Kannan et al.: the first half of the batch is paired with the second, whatever the labels, and
      all inputs carry Gaussian noise. No attack runs. One forward, of all.
    - `pairs="attacked"`, what Table 1 of MART calls CLP: clean and adversarial probabilities. Passes: the attack, one
      forward each of `x` and `x_adv`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`; not called for `"images"`, where it may be None.
        pairs: what is paired.
        weight: $\lambda$. Kannan et al. use other values for each data set; 0.5 is our default.
        noise: standard deviation of the noise on the inputs for `"images"`, which are not clipped; 0.5 if left out, as
            in the paper on MNIST. Refused for `"attacked"`.
        generator: source of the noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `pairing`.

    Raises:
        TypeError: if `views` is no tuple, `attack` is needed and not callable, or `labels` no class indices.
        ValueError: if shapes do not fit, a word is unknown, a number is out of range, or a batch has no two halves.

    Source:
        Kannan et al. 2018 (no code was found); Wang et al. 2020 (MART), Table 1.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> list(objectives.clp(model, (x,), labels, None, pairs="images")[1])
        ['cross_entropy', 'pairing']
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> list(objectives.clp(model, (x,), labels, attack, pairs="attacked")[1])
        ['cross_entropy', 'pairing']
    """
    _check.choice("clp", "pairs", pairs, ("images", "attacked"))
    _check.number("clp", "weight", weight, at_least=0.0)
    if pairs == "attacked" and noise is not None:
        raise ValueError(f"clp: `noise`={noise!r} has no effect with pairs='attacked'.")
    noise = 0.5 if noise is None else noise
    _check.number("clp", "noise", noise, at_least=0.0)
    check_views("clp", model, views, labels, expected=(1, 2))
    x, labels = one_batch("clp", model, views, labels)
    check_indices("clp", labels)
    generator = _random.source("clp", generator, x.device)
    if pairs == "images":
        if x.shape[0] < 2:
            raise ValueError(f"clp: `views` must hold at least two images to pair, got {x.shape[0]}.")
        drawn = torch.randn(x.shape, generator=generator, device=generator.device)
        clean = forward(model, x + noise * drawn.to(x))
        half = x.shape[0] // 2
        pairing = logit_pairing_loss(clean[:half], clean[half : 2 * half])
    else:
        if attack is None:
            raise TypeError("clp: `attack` must be a function (model, x, labels) -> x_adv for 'attacked', got None.")
        x_adv = attacked("clp", attack, model, x, labels)
        clean = forward(model, x)
        pairing = logit_pairing_loss(clean, forward(model, x_adv), space="probabilities")
    ce = cross_entropy(clean, labels).mean()
    return finish(ce + weight * pairing, cross_entropy=ce, pairing=pairing)
