"""PIAT: clean cross entropy, and logits that point the same way under attack."""

from collections.abc import Sequence

from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.divergences import cross_entropy
from perceptual_at.losses import normalized_error_loss
from perceptual_at.objectives.passes import Attack, Result, attacked, check_indices, finish, forward, one_batch


def piat(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    weight: float = 4.0,
    weighted: bool = True,
) -> Result:
    r"""PIAT's loss: clean cross entropy and the normalised error of the logits under attack. A documented variant.

    $$ \mathrm{CE}(f(x), y) + \lambda\, (1 - p_y(x))\, \Big\| \frac{f(x)}{\|f(x)\|} -
       \frac{f(x_{\mathrm{adv}})}{\|f(x_{\mathrm{adv}})\|} \Big\|^2 $$

    The formula is that of another library's re-implementation, which nobody has checked against the paper or its code.
    The other half of the method is the caller's: at the end of each epoch the weights go back towards those of its
    start, `ema_update(start, model, decay=schedules.piat_decay(epoch))`. Nothing is detached. Passes: the attack, one
    forward each of `x` and `x_adv`, in that order.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`.
        weight: $\lambda$.
        weighted: whether $1 - p_y(x)$ weighs the samples; False is the other candidate.

    Returns:
        `(loss, terms)` with the terms `cross_entropy` and `normalized_error`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        He et al. 2023 and Liu et al. 2025 (PIAT), abstracts; formula from a third-party re-implementation.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = objectives.piat(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> torch.allclose(loss, terms["cross_entropy"] + 4 * terms["normalized_error"])
        True
    """
    _check.flag("piat", weighted=weighted)
    _check.number("piat", "weight", weight, at_least=0.0)
    x, labels = one_batch("piat", model, views, labels)
    check_indices("piat", labels)
    x_adv = attacked("piat", attack, model, x, labels)
    clean, adv = forward(model, x), forward(model, x_adv)
    ce = cross_entropy(clean, labels).mean()
    error = normalized_error_loss(clean, adv, labels=labels if weighted else None)
    return finish(ce + weight * error, cross_entropy=ce, normalized_error=error)
