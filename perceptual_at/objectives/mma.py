"""MMA: trained at each sample's own distance from the decision boundary."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.divergences import cross_entropy, soft_logit_margin
from perceptual_at.losses.max_margin import check_margins
from perceptual_at.objectives.passes import Attack, Result, attacked, check_indices, check_views, finish, forward


def mma(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    margins: Tensor,
    largest: float,
    clean_logits: Tensor | None = None,
    clean_weight: float = 1 / 3,
) -> Result:
    r"""MMA: cross entropy at the decision boundary for samples that are right, at the clean input for the others.

    $$ c\,\mathrm{CE}(f(x), y) + (1 - c)\, \tfrac1B \Big( \sum_{\text{right},\ d < d_{\max}} \mathrm{CE}(f(x_d), y)
       + \sum_{\text{wrong}} \mathrm{CE}(f(x), y) \Big) $$

    The search comes first: `attacks.find_margins` gives the points, the margins and what to write into the memory.

        clean = model(x)
        found = find_margins(model, x, clean, labels, pgd10, ball=Linf, before=memory[index], largest=1.05 * d_max)
        memory = memories.write(memory, index, found.margins)
        loss, terms = mma(model, (x,), labels, lambda *_: found.x_adv, margins=found.margins, largest=d_max,
                          clean_logits=clean)

    Passes: the attack, one forward of `x` unless `clean_logits` are given, and one of the points, in which the samples
    that are wrong stand with their clean input, as in the released code.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_d`, usually one that answers with the points that were found.
        margins: $d$, shape `(B,)`; they have no gradient.
        largest: $d_{\max}$: samples that are right and further from the boundary count with their clean share alone.
        clean_logits: $f(x)$, shape `(B, K)`, with gradients, where the search has run them already.
        clean_weight: $c$; 0 is OMMA.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` (clean) and `max_margin`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if there is more than one view, shapes do not fit, or a number is out of range.

    Source:
        Ding et al. 2020 (MMA), Algorithm 1, and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = objectives.mma(model, (x,), labels, lambda *_: x, margins=torch.zeros(4), largest=0.1)
        >>> torch.allclose(loss, terms["cross_entropy"] / 3 + 2 * terms["max_margin"] / 3)
        True
        >>> torch.allclose(loss, terms["cross_entropy"])  # every point is the clean input
        True
    """
    check_views("mma", model, views, labels, expected=(1,))
    check_indices("mma", labels)
    (x,) = views
    _check.labels("mma", labels, views=x)
    check_margins("mma", margins, largest, clean_weight, **{"views[0]": x})
    if clean_logits is not None:
        _check.logits("mma", clean_logits=clean_logits)
        _check.indices("mma", labels, clean_logits=clean_logits)
    points = attacked("mma", attack, model, x, labels)
    clean = forward(model, x) if clean_logits is None else clean_logits
    at_points = cross_entropy(forward(model, points), labels)
    counts = (soft_logit_margin(clean.detach(), labels) >= 0) | (margins < largest)
    ce = cross_entropy(clean, labels).mean()
    max_margin = torch.where(counts, at_points, torch.zeros_like(at_points)).mean()
    return finish(clean_weight * ce + (1 - clean_weight) * max_margin, cross_entropy=ce, max_margin=max_margin)
