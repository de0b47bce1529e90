"""Labels that are probabilities: what cross entropy, and attacks on it, take in place of class indices."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide

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


def rectified_labels(teacher_logits: Tensor, labels: Tensor, *, temperature: float = 2.5, trust: float = 0.7) -> Tensor:
    r"""Class probabilities between the label and a teacher's softened prediction: more of it where that is right.

    $$ t = l\, q + (1 - l)\, e_y, \qquad l = \mathrm{clip}\big(\lambda - (\max_k q_k - q_y),\ 0,\ 1\big), \qquad
       q = \mathrm{softmax}(z_{\mathrm{teacher}} / T) $$

    A teacher that puts another class far ahead is not followed at all. In ADR the teacher is the averaged network at
    the clean input, and the attack ascends the loss of these labels too.

    Args:
        teacher_logits: shape `(B, K)`; held fixed.
        labels: class indices, shape `(B,)`.
        temperature: $T$.
        trust: $\lambda$, the teacher's share where it is right, in [0, 1].

    Returns:
        Class probabilities `(B, K)`, in the dtype of the logits, without a gradient.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if shapes do not fit, labels in CPU memory are out of range, or a number is.

    Source:
        Wu et al. 2024 (ADR), Eq. 3 to 5, and its released code.

    Examples:
        >>> rectified_labels(torch.zeros(1, 2), torch.tensor([0]), trust=0.5)  # half of (1/2, 1/2)
        tensor([[0.7500, 0.2500]])
        >>> rectified_labels(torch.tensor([[0.0, 100.0]]), torch.tensor([0]), temperature=1.0)  # surely wrong
        tensor([[1., 0.]])
    """
    name = "rectified_labels"
    _check.logits(name, teacher_logits=teacher_logits)
    _check.labels(name, labels, classes=teacher_logits.shape[1], teacher_logits=teacher_logits)
    _check.number(name, "temperature", temperature, above=0.0)
    _check.number(name, "trust", trust, at_least=0.0, at_most=1.0)
    index = labels.long()[:, None]
    predicted = (teacher_logits.detach().to(wide(teacher_logits)) / temperature).softmax(dim=1)
    ahead = predicted.amax(dim=1, keepdim=True) - predicted.gather(1, index)
    share = (trust - ahead).clamp(0.0, 1.0)
    rectified = share * predicted
    return rectified.scatter_add(1, index, 1 - share).to(teacher_logits.dtype)


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
    _check.dtype(function, "dtype", dtype)
    smoothing, classes = float(smoothing), int(classes)
    others = smoothing / (classes if over == "all" else classes - 1)
    right = 1 - smoothing + (others if over == "all" else 0.0)
    spread = torch.full((labels.shape[0], classes), others, device=labels.device, dtype=dtype)
    return spread.scatter(1, labels.long()[:, None], right)


def check_classes(function: str, classes: int) -> None:
    """Require a number of classes."""
    _check.count(function, "classes", classes, at_least=2, at_most=2**31)
