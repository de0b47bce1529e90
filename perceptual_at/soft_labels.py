"""Labels that are probabilities: what cross entropy, and attacks on it, take in place of class indices."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check

Spread = Literal["all", "others"]


def smooth_labels(
    labels: Tensor,
    classes: int,
    *,
    smoothing: float = 0.1,
    over: Spread = "all",
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Class probabilities that leave some of the certainty to other classes.

    $$ t_k = (1 - s) [k = y] + s / K \qquad\text{or}\qquad t_k = (1 - s) [k = y] + s / (K - 1)\, [k \ne y] $$

    Both are called label smoothing with the same $s$. The first (`over="all"`) is torch's and that of training with
    generated images; the second (`"others"`) that of Bag of Tricks, SCORE and DAJAT, where $s$ is what the right class
    lacks. `"all"` with $s$ is `"others"` with $s (K - 1) / K$.

    In the released codes the attack ascends the loss of the plain labels: smooth what the loss gets, not what the
    attack gets.

    Args:
        labels: class indices, shape `(B,)`.
        classes: number of classes $K$.
        smoothing: $s$ in [0, 1].
        over: which classes share $s$.
        dtype: of the result; torch's default dtype if left out.

    Returns:
        Class probabilities `(B, K)`, on the device of `labels`.

    Raises:
        TypeError: if `labels` are no class indices or `classes` is no integer.
        ValueError: if `smoothing` is outside [0, 1], there are fewer than two classes, a word is unknown, or labels
            in CPU memory are out of range.

    Source:
        Szegedy et al. 2016 (`"all"`); Pang et al. 2021 (Bag of Tricks), released code (`"others"`).

    Examples:
        >>> smooth_labels(torch.tensor([0]), 4, smoothing=0.5)
        tensor([[0.6250, 0.1250, 0.1250, 0.1250]])
        >>> smooth_labels(torch.tensor([0]), 3, smoothing=0.5, over="others")
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    name = "smooth_labels"
    _check.tensor(name, "labels", labels)
    if labels.ndim != 1:
        raise ValueError(
            f"{name}: `labels` must be integer class indices of shape (B,), got shape {tuple(labels.shape)}."
        )
    check_classes(name, classes)
    _check.number(name, "smoothing", smoothing, at_least=0.0, at_most=1.0)
    _check.choice(name, "over", over, ("all", "others"))
    return smoothed(name, labels, classes, smoothing, over, dtype)


def score_slack(classes: int, share: float) -> float:
    r"""Squared distance of a label from a prediction that gives away a share of its probability evenly.

    $$ b = \frac{c^2 K}{K - 1} $$

    Args:
        classes: number of classes $K$.
        share: what the right class lacks, $c$ in [0, 1]: 0.4 for SCORE's PGD-AT, 0.3 for its TRADES.

    Returns:
        The number to pass as `slack`.

    Raises:
        TypeError: if `classes` is no integer or `share` no number.
        ValueError: if there are fewer than two classes, or `share` is outside [0, 1].

    Source:
        Pang et al. 2022 (SCORE), released code.

    Examples:
        >>> round(score_slack(10, 0.3), 6)
        0.1
        >>> score_slack(2, 1.0)
        2.0
    """
    check_classes("score_slack", classes)
    _check.number("score_slack", "share", share, at_least=0.0, at_most=1.0)
    return share**2 * classes / (classes - 1)


def smoothed(
    function: str,
    labels: Tensor,
    classes: int,
    smoothing: float,
    over: Spread = "all",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The probabilities, with labels checked on behalf of `function`."""
    _check.labels(function, labels, classes=classes, labels=labels)
    others = smoothing / (classes if over == "all" else classes - 1)
    right = 1 - smoothing + (others if over == "all" else 0.0)
    spread = torch.full((labels.shape[0], classes), others, device=labels.device, dtype=dtype)
    return spread.scatter(1, labels.long()[:, None], right)


def check_classes(function: str, classes: int) -> None:
    """Require a number of classes."""
    _check.count(function, "classes", classes)
    if classes < 2:
        raise ValueError(f"{function}: `classes` must be at least 2, got {classes}.")
