"""The two learners that adversarial training is compared with: standard training, and training on random noise."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at.divergences import cross_entropy
from perceptual_at.objectives.passes import Attack, Result, finish, forward, one_batch
from perceptual_at.threats import Threat, check_threat


def standard(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack | None,  # noqa: ARG001
) -> Result:
    r"""Standard training: cross entropy on clean inputs.

    $$ \mathrm{CE}(f(x), y) $$

    Passes: one forward of `x`.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)`.
        attack: not called; None will do.

    Returns:
        `(loss, terms)` with the term `cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple.
        ValueError: if shapes do not fit.

    Source:
        RPAT, Fig. 2 ("Standard").

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = standard(model, (x,), labels, None)
        >>> torch.allclose(loss, nn.functional.cross_entropy(model(x), labels))
        True
    """
    x, labels = one_batch("standard", model, views, labels)
    _check.readable_probabilities("standard", labels)
    ce = cross_entropy(forward(model, x), labels).mean()
    return finish(ce, cross_entropy=ce)


def random_noise(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack | None,  # noqa: ARG001
    *,
    threat: Threat,
    generator: torch.Generator | None = None,
) -> Result:
    r"""Training on random noise: cross entropy on a random point of the threat model around each input.

    $$ \mathrm{CE}(f(x + \delta), y), \qquad \delta \sim \mathcal{U}(\mathcal{B}_\epsilon) $$

    Passes: one forward of the noisy inputs.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)`.
        attack: not called; None will do.
        threat: what the noise may be; it is drawn as the random start of an attack.
        generator: source of the noise.

    Returns:
        `(loss, terms)` with the term `cross_entropy`.

    Raises:
        TypeError: if `views` is no tuple or `threat` no threat model.
        ValueError: if shapes do not fit.

    Source:
        RPAT, Fig. 2 ("Random").

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = random_noise(model, (x,), labels, None, threat=Linf(0.1))
        >>> list(terms), loss.requires_grad
        (['cross_entropy'], True)
    """
    check_threat("random_noise", threat)
    x, labels = one_batch("random_noise", model, views, labels)
    _check.readable_probabilities("random_noise", labels)
    generator = _random.source("random_noise", generator, x.device)
    ce = cross_entropy(forward(model, threat.random_start(x, generator=generator)), labels).mean()
    return finish(ce, cross_entropy=ce)
