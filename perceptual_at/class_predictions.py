"""The mean prediction of each class, which IKL weighs pairs of classes by: tensors in, tensors out."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import divisor, without_autocast
from perceptual_at.divergences import log_distribution


def class_table(sums: Tensor, previous: Tensor | None = None) -> Tensor:
    """The mean prediction of each class, from the sums over an epoch.

    Args:
        sums: row c is the sum of the predictions of samples of class c, `(K, K)`; see `add_class_predictions`.
        previous: the table so far; its rows stay for classes that no sample was seen of. None takes even rows.

    Returns:
        A table `(K, K)` whose rows sum to 1.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if `sums` is not square, or the shapes differ.

    Source:
        Cui et al. 2024 (IKL), released code.

    Examples:
        >>> class_table(torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
        tensor([[0.7500, 0.2500],
                [0.5000, 0.5000]])
    """
    _check.class_table("class_table", "sums", sums)
    kept = torch.full_like(sums, 1 / sums.shape[0]) if previous is None else previous
    _check.same_shape("class_table", sums=sums, previous=kept)
    total = sums.sum(dim=1, keepdim=True)
    return torch.where(total > 0, sums / divisor(total), kept)


def add_class_predictions(sums: Tensor, logits: Tensor, labels: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Sums of predictions by class, with those of a batch added.

    Over several processes, sum the sums (`all_reduce`) before `class_table`.

    Args:
        sums: `(K, K)`, zeros at the start of an epoch; left as they are.
        logits: shape `(B, K)`, the clean ones of the training step; taken without their history. Samples with NaN
            predict nothing and are left out.
        labels: class indices `(B,)`.
        temperature: divides the logits; 4 in the first version of the released code, 1 with `gamma` below 1.

    Returns:
        New sums.

    Raises:
        TypeError: if logits are no floating-point tensor, or `labels` no integers.
        ValueError: if shapes or devices differ, `temperature` is not positive, or labels in CPU memory are out of
            range.

    Source:
        Cui et al. 2024 (IKL), released code.

    Examples:
        >>> add_class_predictions(torch.zeros(2, 2), torch.zeros(3, 2), torch.tensor([0, 0, 1]))
        tensor([[1.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    name = "add_class_predictions"
    _check.class_table(name, "sums", sums)
    _check.logits(name, logits=logits)
    _check.number(name, "temperature", temperature, above=0.0)
    if logits.shape[1] != sums.shape[0]:
        raise ValueError(
            f"{name}: `sums` is of {sums.shape[0]} classes but `logits` has {logits.shape[1]}; start with "
            f"torch.zeros({logits.shape[1]}, {logits.shape[1]})."
        )
    _check.labels(name, labels, classes=logits.shape[1], logits=logits)
    predictions = log_distribution(logits.detach().to(sums.dtype), temperature).exp().nan_to_num(nan=0.0)
    of_class = torch.zeros_like(predictions).scatter(1, labels.long()[:, None], 1.0)
    with without_autocast(sums):
        return sums + of_class.T @ predictions  # unlike `index_add` the same bits every time, on GPUs too
