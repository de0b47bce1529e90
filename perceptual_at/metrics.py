"""Numbers to report: what counts as right, accuracy, the two summaries of the accuracy-robustness trade-off."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._check import NO_LABEL as NO_LABEL
from perceptual_at._places import labelled, over_places, right
from perceptual_at._rounding import divisor
from perceptual_at._shapes import rows
from perceptual_at._values import tensors_of

Share = TypeVar("Share", float, Tensor)

Score = Callable[[Any, Tensor], Tensor]
"""`(outputs, labels) -> (B,)`: boolean for right and wrong, else in [0, 1], 1 for as right as can be."""


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Share of samples whose largest logit is that of their label; of dense logits, the mean of `pixel_accuracy`.

    Args:
        logits: shape `(B, K)` or `(B, K, *S)`.
        labels: class indices, shape `(B,)` or `(B, *S)`.

    Returns:
        A scalar tensor, a fraction in [0, 1]; 0 for an empty batch.

    Raises:
        TypeError: if `labels` are no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are outside `[0, K)`.

    Examples:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
        >>> accuracy(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        tensor(1.)
    """
    correct = _shares("accuracy", logits, labels)
    return correct.sum() / max(1, correct.shape[0])


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Share of a sample's labelled places whose largest logit is that of their label: a score for `evaluate`.

    Args:
        logits: shape `(B, K, *S)`; of `(B, K)` a sample is right, 1, or wrong, 0.
        labels: class indices, shape `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B,)`, in [0, 1]; 0 for a sample without labels. Logits with NaN are wrong.

    Raises:
        TypeError: if `labels` are no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are outside `[0, K)`.

    Examples:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])  # one sample, two classes, three places
        >>> pixel_accuracy(logits, torch.tensor([[0, 0, -100]]))
        tensor([0.5000])
        >>> pixel_accuracy(logits, torch.tensor([[0, 1, 1]]))
        tensor([1.])
    """
    return _shares("pixel_accuracy", logits, labels)


def _shares(function: str, logits: Tensor, labels: Tensor) -> Tensor:
    _check.logits(function, logits=logits)
    labels = _check.indices(function, labels, logits=logits)
    return over_places(right(logits, labels).float(), labelled(labels))


def confusion_counts(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How often each class is taken for each, for every sample: add them up over a data set for `mean_iou`.

    Args:
        logits: shape `(B, K, *S)`, or `(B, K)`.
        labels: class indices, shape `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B, K, K)`, int64: entry `[i, k, j]` counts the places of sample i that are of class k and taken for j.
        Logits with NaN are taken for another class than the label's.

    Raises:
        TypeError: if `labels` are no integers.
        ValueError: if shapes do not fit, or labels in CPU memory are outside `[0, K)`.

    Examples:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
        >>> confusion_counts(logits, torch.tensor([[0, 0, 1]]))
        tensor([[[1, 1],
                 [0, 1]]])
    """
    _check.logits("confusion_counts", logits=logits)
    labels = rows(_check.indices("confusion_counts", labels, logits=logits))
    classes, taken, undefined = logits.shape[1], rows(logits.argmax(dim=1)), rows(logits.isnan().any(dim=1))
    taken = torch.where(undefined & (taken == labels), (labels + 1) % classes, taken)
    pairs = labels.clamp_min(0) * classes + taken
    counts = torch.zeros(len(labels), classes * classes, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, pairs, (labels != NO_LABEL).long())
    return counts.view(-1, classes, classes)


def mean_iou(counts: Tensor) -> Tensor:
    r"""Mean over classes of intersection over union of what is of a class and what is taken for it.

    $$ \mathrm{mIoU} = \frac1{|C|} \sum_{k \in C} \frac{n_{kk}}{\sum_j n_{kj} + \sum_j n_{jk} - n_{kk}} $$

    C are the classes that occur among labels or predictions.

    Args:
        counts: shape `(K, K)`, or `(..., K, K)`: classes by labels (rows) and predictions, as from `confusion_counts`.

    Returns:
        A scalar, or shape `(...)`, in [0, 1]; 0 where nothing was counted.

    Raises:
        ValueError: if the last two dimensions differ.

    Examples:
        >>> mean_iou(torch.tensor([[1, 1], [0, 1]]))  # 1 of 2 for both classes
        tensor(0.5000)
        >>> mean_iou(torch.tensor([[3, 0, 0], [0, 1, 0], [0, 0, 0]]))  # the third class does not occur
        tensor(1.)
    """
    _check.tensor("mean_iou", "counts", counts)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"mean_iou: `counts` must be of shape (K, K) or (..., K, K), got {tuple(counts.shape)}.")
    shared = counts.diagonal(dim1=-2, dim2=-1)
    union = counts.sum(dim=-1) + counts.sum(dim=-2) - shared
    present = union > 0
    ratios = torch.where(present, shared / union.clamp_min(1), torch.zeros_like(shared, dtype=torch.float32))
    return ratios.sum(dim=-1) / present.sum(dim=-1).clamp_min(1)


def mean_score(clean: Share, robust: Share) -> Share:
    r"""Arithmetic mean of clean and robust accuracy ("Mean" in the papers' tables).

    Args:
        clean: clean accuracy, a number or tensor, at least 0.
        robust: robust accuracy in the same unit.

    Returns:
        $(c + r) / 2$, in the unit of the arguments.

    Raises:
        TypeError: if an argument is neither a number nor a tensor.
        ValueError: if a number is negative or not finite.

    Source:
        RPAT, Sec. 5.1; RAAT, Sec. 5.2.

    Examples:
        >>> mean_score(80.0, 50.0)
        65.0
        >>> mean_score(0.8, 0.0)
        0.4
    """
    _check_scores("mean_score", clean, robust)
    return clean / 2 + robust / 2


def nrr(clean: Share, robust: Share) -> Share:
    r"""Natural-robustness ratio (NRR): harmonic mean of clean and robust accuracy.

    $$ \mathrm{NRR} = \frac{2\,c\,r}{c + r} $$

    Lies between the smaller of the two and their mean, and is 0 when either is. Computed as
    $\min(c, r) \cdot 2\max(c, r) / (c + r)$, which keeps that order in floating point too.

    Args:
        clean: clean accuracy, a number or tensor, at least 0.
        robust: robust accuracy in the same unit.

    Returns:
        NRR in the unit of the arguments; 0 when both are 0.

    Raises:
        TypeError: if an argument is neither a number nor a tensor.
        ValueError: if a number is negative or not finite.

    Source:
        Gowda et al. 2024, as used in RPAT, Sec. 5.1 and RAAT, Sec. 5.3.

    Examples:
        >>> nrr(90.0, 45.0)
        60.0
        >>> nrr(0.0, 0.0)
        0.0
    """
    _check_scores("nrr", clean, robust)
    mean = mean_score(clean, robust)
    if isinstance(mean, Tensor):
        c, r = (torch.as_tensor(score, dtype=mean.dtype, device=mean.device) for score in (clean, robust))
        low, high = torch.minimum(c, r), torch.maximum(c, r)
        return torch.minimum(low * (high / divisor(mean)), mean)
    low_number, high_number = sorted((clean, robust))
    return min(low_number * (high_number / mean), mean) if mean > 0 else 0.0


def _check_scores(function: str, clean: float | Tensor, robust: float | Tensor) -> None:
    for name, value in (("clean", clean), ("robust", robust)):
        if not isinstance(value, Tensor):
            _check.number(function, name, value, at_least=0.0)


class Judged(NamedTuple):
    """What a score says of each sample of a batch, `(B,)` each."""

    score: Tensor
    """Boolean for classes, else in [0, 1]; 0 where the outputs are not defined."""
    undefined: Tensor
    """Outputs or score with NaN."""
    tied: Tensor
    """Classes whose two largest logits are equal: being right is a matter of their order."""


def judge(function: str, outputs: Any, labels: Tensor, score: Score | None = None) -> Judged:
    """Score of each sample: the caller's, else 0/1 for classes and the share of right places for dense outputs.

    Outputs with NaN are never right.

    Args:
        function: the name that errors speak of.
        outputs: what the model returned; logits `(B, K)` or `(B, K, *S)` without a `score`.
        labels: class indices `(B,)` or `(B, *S)` without a `score`.
        score: what counts as right.

    Returns:
        `Judged(score, undefined, tied)`.

    Raises:
        TypeError: if outputs or scores are no tensors.
        ValueError: if shapes do not fit, labels are out of range, or a score is outside [0, 1].

    Examples:
        >>> judge("mine", torch.tensor([[2.0, 1.0], [torch.nan, 1.0]]), torch.tensor([0, 1])).score
        tensor([ True, False])
        >>> dense = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])  # one sample, two classes, three places
        >>> judge("mine", dense, torch.tensor([[0, 0, -100]])).score
        tensor([0.5000])
    """
    batch = len(labels)
    undefined = _undefined(outputs, batch)
    nobody = torch.zeros_like(undefined)
    if score is not None:
        found = _own(function, score(outputs, labels), batch)
        undefined = undefined.to(found.device) | found.isnan()
        return Judged(found.masked_fill(undefined, 0), undefined, nobody)
    check_outputs(function, outputs, labels)
    labels = labels.long()  # which not every integer dtype can be compared with
    right = outputs.argmax(dim=1) == labels
    if labels.ndim == 1:
        top = outputs.topk(2, dim=1).values
        return Judged(right & ~undefined, undefined, top[:, 0] == top[:, 1])
    counted = (labels != NO_LABEL).flatten(1)
    right = (right & ~outputs.isnan().any(dim=1)).flatten(1) & counted
    return Judged(right.sum(dim=1) / counted.sum(dim=1).clamp_min(1), undefined, nobody)


def check_outputs(
    function: str, outputs: Any, labels: Tensor, *, others: str = "for other tasks give a `score`"
) -> None:
    """Require logits `(B, K)` or `(B, K, *S)`, K >= 2, and class indices for them that are in range; reads these.

    Errors end in what to do for other tasks.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{function}: `model` must return a tensor of logits, got {type(outputs).__name__}; take the logits out of "
            f"it in front of the call (`models.logits_of`); {others}."
        )
    check_labels(function, labels, len(outputs) if outputs.ndim else 1, others=others)
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.is_floating_point():
        hint = "one logit z for two classes is the pair [0, z], and " if outputs.shape[1:] == (1,) else ""
        raise ValueError(
            f"{function}: `model` must return logits of shape (B, K) with K >= 2 classes, got {outputs.dtype} of shape "
            f"{tuple(outputs.shape)}; {hint}{others}."
        )
    if labels.shape != (len(outputs), *outputs.shape[2:]):
        raise ValueError(
            f"{function}: `labels` must be of shape {(len(outputs), *outputs.shape[2:])} for logits of shape "
            f"{tuple(outputs.shape)}, got shape {tuple(labels.shape)}."
            f"{_check.way_to((len(outputs), *outputs.shape[2:]), labels, 'labels')}"
        )
    _check.same_device(function, "labels", labels.device, "model(x)", outputs.device)
    indices = labels.long()
    known = indices if labels.ndim == 1 else indices[indices != NO_LABEL]
    if known.numel():
        low, high = torch.stack(torch.aminmax(known)).tolist()
        _check.label_range(function, low, high, outputs.shape[1])


def check_labels(function: str, labels: Any, batch: int, *, others: str = "for other tasks give a `score`") -> None:
    """Require what can be class indices, before any logits are there to fit to."""
    _check.tensor(function, "labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{function}: `labels` must be integer class indices of shape ({batch},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; {others}."
        )


def _undefined(outputs: Any, batch: int) -> Tensor:
    """Samples with NaN in their outputs, as far as these are tensors with one row per sample."""
    found = [
        rows(one).isnan().any(dim=1)
        for one in tensors_of(outputs)
        if one.is_floating_point() and one.ndim and len(one) == batch
    ]
    if not found:
        return torch.zeros(batch, dtype=torch.bool, device="cpu")
    return torch.stack(found).any(dim=0)


def _own(function: str, found: Any, batch: int) -> Tensor:
    """What the caller's score returned, checked."""
    if not isinstance(found, Tensor) or found.shape != (batch,):
        raise (ValueError if isinstance(found, Tensor) else TypeError)(
            f"{function}: `score` must return one number per sample, a tensor of shape ({batch},), got "
            f"{_check.came(found)}."
        )
    own: Tensor = found.detach()
    if own.dtype == torch.bool:
        return own
    own = own.double() if own.dtype == torch.float64 else own.float()
    if bool(((own < 0) | (own > 1)).any()):
        raise ValueError(
            f"{function}: `score` must lie in [0, 1], got values from {float(own.min()):.4g} to "
            f"{float(own.max()):.4g}; divide it by the best there is."
        )
    return own
