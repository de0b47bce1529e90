"""DKL, IKL, GKL: the two halves of TRADES' KL, weighed apart."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.class_predictions import add_class_predictions
from perceptual_at.divergences import cross_entropy
from perceptual_at.losses import soft_cross_entropy_loss, weighted_mse_loss
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    check_indices,
    finish,
    forward,
    gaussian_start,
    one_batch,
    predictions,
)


def ikl(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    table: Tensor | None,
    sums: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 4.0,
    beta: float = 20.0,
    gamma: float = 1.0,
    detach_adv: bool = False,
    attack_squared: bool = True,
    noise: float = 0.001,
    generator: torch.Generator | None = None,
) -> Result:
    r"""IKL: clean cross entropy, soft cross entropy of the adversarial prediction, and the squared gaps of logits.

    $$ \mathrm{CE}(f(x), y) + \alpha\,\mathrm{SCE}(x, x_{\mathrm{adv}}) + \beta\,\mathrm{wMSE}(x, x_{\mathrm{adv}}) $$

    DKL is `table=None, detach_adv=True`; with $\alpha = \beta$ it then has the gradients of TRADES. GKL is a `gamma`
    below 1. The attack is called with `loss=` the sum of both terms, and with a start beside `x`. Passes: those of
    TRADES.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`.
        table: mean prediction of each class, `(K, K)`, from `class_predictions.class_table` once an epoch; even rows in
            the first. None weighs by each sample's own prediction.
        sums: `(K, K)`; the predictions of this step are **added in place**, for the next `class_table`.
        temperature: of those predictions.
        alpha: weight of the soft cross entropy.
        beta: weight of the squared term.
        gamma: exponent of the weights. With another one than 1 samples weigh as much as $(\sum_k w_k)^2$, and the mean
            is the sum over the batch divided by the sum of those weights, as released.
        detach_adv: hold the adversarial logits fixed.
        attack_squared: the attack ascends both terms; False for the soft cross entropy alone, as the first version of
            the released code does on CIFAR-10.
        noise: standard deviation of the Gaussian start around `x`.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `cross_entropy`, `soft_cross_entropy` and `weighted_mse`.

    Raises:
        TypeError: if `views` is no tuple, `attack` not callable, or `labels` no class indices.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Cui et al. 2024 (DKL, IKL), and the released code of its two versions.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack, sums = functools.partial(pgd, threat=Linf(0.1)), torch.zeros(3, 3)
        >>> loss, terms = objectives.ikl(model, (x,), labels, attack, table=torch.full((3, 3), 1 / 3), sums=sums)
        >>> list(terms), bool(sums.sum().round() == 4)
        (['cross_entropy', 'soft_cross_entropy', 'weighted_mse'], True)
    """
    _check.flag("ikl", detach_adv=detach_adv, attack_squared=attack_squared)
    _check.number("ikl", "alpha", alpha, at_least=0.0)
    _check.number("ikl", "beta", beta, at_least=0.0)
    _check.number("ikl", "gamma", gamma, at_least=0.0, at_most=1.0)
    _check.number("ikl", "temperature", temperature, above=0.0)
    if sums is not None:
        _check.class_table("ikl", "sums", sums)
    x, labels = one_batch("ikl", model, views, labels)
    check_indices("ikl", labels)
    weights = None if table is None else _rows("ikl", table, labels)
    (reference,) = predictions(model, x)

    def farther(logits: Tensor, _: Tensor) -> Tensor:
        value = soft_cross_entropy_loss(reference, logits, reduction="none")
        if not attack_squared:
            return value
        own = reference.softmax(dim=1) if weights is None else weights
        return value + weighted_mse_loss(reference, logits, class_weights=own, gamma=gamma, reduction="none")

    start = gaussian_start("ikl", x, noise, generator)
    x_adv = attacked("ikl", attack, model, x, labels, loss=farther, start=start)
    clean, adv = forward(model, x), forward(model, x_adv)
    ce, soft = cross_entropy(clean, labels).mean(), soft_cross_entropy_loss(clean, adv)
    squared = weighted_mse_loss(clean, adv, class_weights=weights, gamma=gamma, detach_adv=detach_adv)
    if sums is not None:
        sums.copy_(add_class_predictions(sums, clean, labels, temperature=temperature))
    return finish(ce + alpha * soft + beta * squared, cross_entropy=ce, soft_cross_entropy=soft, weighted_mse=squared)


def _rows(function: str, table: Tensor, labels: Tensor) -> Tensor:
    """The rows of the table for these labels."""
    _check.class_table(function, "table", table, "start with torch.full((K, K), 1 / K)")
    _check.labels(function, labels, classes=table.shape[0], labels=labels)
    _check.same_device(function, "table", table.device, "labels", labels.device)
    return table.detach()[labels.long()]
