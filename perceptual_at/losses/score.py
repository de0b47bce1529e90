"""SCORE: squared distances between probabilities in place of cross entropy and KL."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import prediction_squared_error
from perceptual_at.soft_labels import smoothed


def brier_loss(logits: Tensor, labels: Tensor, *, slack: float = 0.0, reduction: Reduction = "mean") -> Tensor:
    r"""Squared distance of the predicted probabilities from the labels: the Brier score.

    $$ \ell = \max\Big(0,\ \sum_k (p_k - t_k)^2 - b\Big) $$

    Bounded, and minimal where $p$ is the true probability. On adversarial inputs it is SCORE's PGD-AT.

    Args:
        logits: shape `(B, K)`.
        labels: class indices `(B,)`, or class probabilities `(B, K)` such as `smooth_labels` gives.
        slack: $b$, how much of the distance costs nothing; see `perceptual_at.soft_labels.score_slack`.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, in [0, 2], a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` neither indices nor probabilities.
        ValueError: if shapes or devices differ, `slack` is negative, or labels in CPU memory are out of range.

    Source:
        Pang et al. 2022 (SCORE); `slack` from the released code.

    Examples:
        >>> even, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> brier_loss(even, labels)  # 1/4 + 1/4
        tensor(0.5000)
        >>> brier_loss(even, labels, slack=0.5)
        tensor(0.)
    """
    name = "brier_loss"
    _check.number(name, "slack", slack, at_least=0.0)
    per_sample = _brier(name, logits, labels)
    return reduce(name, _beyond(per_sample, slack).to(logits.dtype), reduction)


def score_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 4.0,
    slack: float = 0.0,
    slack_on: Literal["sum", "robust"] = "sum",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""TRADES in squared distances: how wrong the clean prediction is, and how far the attack moves it.

    $$ \ell = \max\Big(0,\ \sum_k (p_k(x) - t_k)^2
       + \beta \sum_k (p_k(x_{\mathrm{adv}}) - p_k(x))^2 - b\Big) $$

    Gradients flow through both predictions. The adversarial input is meant to maximise the second sum.

    Args:
        clean_logits: $f(x)$, shape `(B, K)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)`, or class probabilities `(B, K)` such as `smooth_labels` gives.
        beta: weight of the second sum, at least 0; 4 with generated images, 6 without.
        slack: $b$; see `perceptual_at.soft_labels.score_slack`.
        slack_on: what the slack is taken from: the `"sum"` of a sample, or its `"robust"` distance alone, before
            `beta` (the option `--not_clip_clean` of the released code).
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if logits are no floating-point tensors, or `labels` neither indices nor probabilities.
        ValueError: if shapes or devices differ, a number is negative, the word is unknown, or labels in CPU memory
            are out of range.

    Source:
        Pang et al. 2022 (SCORE); `slack` and the default of `beta` from the released code.

    Examples:
        >>> sure, even, labels = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
        >>> score_loss(sure, even, labels, beta=4.0)  # right, and moved by 1/4 + 1/4
        tensor(2.)
        >>> score_loss(sure, even, labels, beta=4.0, slack=0.5, slack_on="robust")
        tensor(0.)
    """
    name = "score_loss"
    _check.logits(name, clean_logits=clean_logits, adv_logits=adv_logits)
    _check.number(name, "beta", beta, at_least=0.0)
    _check.number(name, "slack", slack, at_least=0.0)
    _check.choice(name, "slack_on", slack_on, ("sum", "robust"))
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    wrong, moved = _brier(name, clean, labels), prediction_squared_error(adv, clean)
    of_sum, of_moved = (slack, 0.0) if slack_on == "sum" else (0.0, slack)
    per_sample = _beyond(wrong + beta * _beyond(moved, of_moved), of_sum)
    return reduce(name, per_sample.to(common(*given)), reduction)


def _brier(function: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of probabilities from labels, `(B,)`, in float32 or wider."""
    _check.logits(function, logits=logits)
    _check.targets(function, labels, logits=logits)
    probabilities = logits.to(wide(logits)).softmax(dim=1)
    target = smoothed(function, labels, logits.shape[1], 0.0) if labels.ndim == 1 else labels
    return (probabilities - target.to(probabilities.dtype)).square().sum(dim=1)


def _beyond(value: Tensor, slack: float) -> Tensor:
    return torch.relu(value - slack) if slack else value
