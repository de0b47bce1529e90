"""SCORE: squared distances between probabilities in place of cross entropy and KL."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._places import known, labelled, over_places
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import log_distribution, square_of_logs


def brier_loss(logits: Tensor, labels: Tensor, *, slack: float = 0.0, reduction: Reduction = "mean") -> Tensor:
    r"""Squared distance of the predicted probabilities from the labels: the Brier score.

    $$ \ell = \max\Big(0,\ \sum_k (p_k - t_k)^2 - b\Big) $$

    Bounded, and minimal where $p$ is the true probability. On adversarial inputs it is SCORE's PGD-AT.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label, or class probabilities of the shape of the
            logits, such as `smooth_labels` gives.
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
    labels = _labels(name, labels, logits)
    per_sample = over_places(_beyond(_brier(logits, labels), slack), labelled(labels))
    return reduce(name, per_sample.to(logits.dtype), reduction)


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
        clean_logits: $f(x)$, shape `(B, K)`, or dense `(B, K, *S)`.
        adv_logits: $f(x_{\mathrm{adv}})$, the same shape.
        labels: class indices `(B,)` or `(B, *S)`, where -100 is no label, or class probabilities of the shape of the
            logits, such as `smooth_labels` gives.
        beta: weight of the second sum, at least 0; 4 with generated images, 6 without.
        slack: $b$, how much of the distance costs nothing; see `perceptual_at.soft_labels.score_slack`.
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
    check_score(name, beta, slack, slack_on)
    given = clean_logits, adv_logits
    clean, adv = (logits.to(wide(*given)) for logits in given)
    labels = _labels(name, labels, clean_logits)
    wrong, moved = _brier(clean, labels), square_of_logs(log_distribution(adv), log_distribution(clean))
    of_sum, of_moved = (slack, 0.0) if slack_on == "sum" else (0.0, slack)
    per_place = _beyond(wrong + beta * _beyond(moved, of_moved), of_sum)
    per_sample = over_places(per_place, labelled(labels))
    return reduce(name, per_sample.to(common(*given)), reduction)


def check_score(function: str, beta: float, slack: float, slack_on: str) -> None:
    """Require options in their ranges."""
    _check.number(function, "beta", beta, at_least=0.0)
    _check.number(function, "slack", slack, at_least=0.0)
    _check.choice(function, "slack_on", slack_on, ("sum", "robust"))


def _labels(function: str, labels: Tensor, logits: Tensor) -> Tensor:
    """Class indices or probabilities that fit the logits."""
    _check.logits(function, logits=logits)
    return _check.soft_labels(function, labels, logits=logits)


def _brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of probabilities from labels at each place, `(B, *S)`, in float32 or wider."""
    probabilities = logits.to(wide(logits)).softmax(dim=1)
    if not labels.is_floating_point():
        labels = torch.zeros_like(probabilities).scatter(1, known(labels).unsqueeze(1), 1.0)
    return (probabilities - labels.to(probabilities.dtype)).square().sum(dim=1)


def _beyond(value: Tensor, slack: float) -> Tensor:
    return torch.relu(value - slack) if slack else value
