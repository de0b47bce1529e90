"""SCORE: TRADES, or PGD-AT, in squared distances between probabilities."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._places import labelled
from perceptual_at.divergences import prediction_squared_error
from perceptual_at.losses import brier_loss, score_loss
from perceptual_at.losses.score import check_score
from perceptual_at.objectives.passes import (
    Attack,
    Result,
    attacked,
    beta_on,
    finish,
    forward,
    gaussian_start,
    one_batch,
    only_on,
    predictions,
)


def score(
    model: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    attack: Attack,
    *,
    base: Literal["trades", "pgd_at"] = "trades",
    beta: float | None = None,
    slack: float = 0.0,
    slack_on: Literal["sum", "robust"] = "sum",
    noise: float = 0.001,
    adv_first: bool = False,
    generator: torch.Generator | None = None,
) -> Result:
    r"""SCORE: how far, in squared distance, the clean prediction is from the label and the attack moves it.

    $$ \sum_k (p_k(x) - t_k)^2 + \beta \sum_k (p_k(x_{\mathrm{adv}}) - p_k(x))^2
       \qquad\text{or}\qquad \sum_k (p_k(x_{\mathrm{adv}}) - t_k)^2 $$

    The attack is called with the distance it is meant to enlarge as `loss=`, on TRADES from a start beside `x`. Passes:
    on TRADES those of TRADES, on PGD-AT those of PGD-AT.

    Args:
        model: maps inputs to logits; its present mode counts.
        views: `(x,)`, or two augmentations `(x1, x2)` of the same images.
        labels: class indices `(B,)`, or class probabilities `(B, K)` if the attack takes them.
        attack: `(model, x, labels, loss=..., start=...) -> x_adv`, without a start on PGD-AT.
        base: which of the two.
        beta: weight of the second distance on TRADES, 4 if left out; 4 with generated images, 6 without. Refused on
            PGD-AT, which has no such term.
        slack: $b$, how much of the distance costs nothing; see `perceptual_at.soft_labels.score_slack`.
        slack_on: what the slack is taken from, on TRADES: the `"sum"` of a sample, or its `"robust"` distance alone,
            before `beta` (the option `--not_clip_clean` of the released code).
        noise: standard deviation of the Gaussian start around `x`, on TRADES.
        adv_first: on TRADES, run `x_adv` before `x`, as the released code without generated images does; only batch
            norm's running statistics notice.
        generator: source of the start noise.

    Returns:
        `(loss, terms)` with the terms `squared_error` and, on TRADES, `squared_distance`, both without slack.

    Raises:
        TypeError: if `views` is no tuple or `attack` not callable.
        ValueError: if shapes do not fit, a word is unknown, or a number is out of range.

    Source:
        Pang et al. 2022 (SCORE), and its released code.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss, terms = objectives.score(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)))
        >>> torch.allclose(loss, terms["squared_error"] + 4 * terms["squared_distance"])
        True
    """
    _check.flag("score", adv_first=adv_first)
    _check.choice("score", "base", base, ("trades", "pgd_at"))
    beta = beta_on("score", base, beta, usual=4.0)
    check_score("score", beta, slack, slack_on)
    only_on("score", "trades", base, slack_on=(slack_on, "sum"), adv_first=(adv_first, False))
    x, labels = one_batch("score", model, views, labels)
    if base == "pgd_at":
        x_adv = attacked("score", attack, model, x, labels, loss=_error)
        adv = forward(model, x_adv)
        loss = brier_loss(adv, labels, slack=slack)
        return finish(loss, squared_error=brier_loss(adv.detach(), labels))
    (reference,) = predictions(model, x)

    def distance(logits: Tensor, labels: Tensor) -> Tensor:
        return prediction_squared_error(logits, reference, mask=labelled(labels))

    start = gaussian_start("score", x, noise, generator)
    x_adv = attacked("score", attack, model, x, labels, loss=distance, start=start)
    if adv_first:
        adv = forward(model, x_adv)
        clean = forward(model, x)
    else:
        clean, adv = forward(model, x), forward(model, x_adv)
    loss = score_loss(clean, adv, labels, beta=beta, slack=slack, slack_on=slack_on)
    moved = prediction_squared_error(adv.detach(), clean.detach(), mask=labelled(labels)).mean()
    return finish(loss, squared_error=brier_loss(clean.detach(), labels), squared_distance=moved)


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    return brier_loss(logits, labels, reduction="none")
