"""What a method remembers of each sample: tables with one row per sample of the data set, as plain tensors.

Rows are found by the sample's number in its data set, not by its place in a batch. A table goes in, a new one comes
out; saved with `torch.save` it goes on as it was. With several processes, `gathered` brings the rows of all of them
together first, so that every process writes the same table.
"""

import torch
from torch import Tensor, distributed

from perceptual_at import _check
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample


def ensemble_update(ensemble: Tensor, index: Tensor, logits: Tensor, *, momentum: float = 0.9) -> Tensor:
    r"""Move the ensembled predictions of some samples towards their present ones: temporal ensembling.

    $$ s_i \leftarrow \mu\, s_i + (1 - \mu)\, p(x_i) $$

    Start from zeros, `torch.zeros(samples, classes)`, and update at each visit with the logits of the clean input in
    eval mode, which TE does from epoch 90 of 200 on. The logits are held fixed.

    Args:
        ensemble: $s$, shape `(N, K)`, or dense `(N, K, *S)`; left untouched.
        index: numbers of the batch's samples in the data set, integers `(B,)`. Rows with the same number count with
            their mean.
        logits: shape `(B, K)`, or dense `(B, K, *S)`. Where they are NaN nothing is updated.
        momentum: $\mu$ in [0, 1).

    Returns:
        A new table, in the dtype of `ensemble`.

    Raises:
        TypeError: if `index` are no integers or another argument is no floating-point tensor.
        ValueError: if shapes or devices differ, numbers in CPU memory are out of range, or `momentum` is.

    Source:
        Laine and Aila 2017; TE (Dong et al. 2022), Eq. 6, and its released code.

    Examples:
        >>> ensemble = ensemble_update(torch.zeros(3, 2), torch.tensor([2]), torch.tensor([[200.0, 0.0]]))
        >>> ensemble
        tensor([[0.0000, 0.0000],
                [0.0000, 0.0000],
                [0.1000, 0.0000]])
        >>> ensemble_targets(ensemble, torch.tensor([2]))
        tensor([[1., 0.]])
    """
    name = "ensemble_update"
    _check.floating(name, ensemble=ensemble)
    _check.logits(name, logits=logits)
    _check.number(name, "momentum", momentum, at_least=0.0, below=1.0)
    present = logits.detach().to(wide(logits)).softmax(dim=1).to(ensemble.dtype)
    mean, seen = _rows(name, "ensemble", ensemble, index, "logits", present)
    return torch.where(seen & ~mean.isnan(), momentum * ensemble + (1 - momentum) * mean, ensemble)


def ensemble_targets(ensemble: Tensor, index: Tensor) -> Tensor:
    r"""The ensembled predictions of a batch as probabilities, $t = s / \sum_k s_k$.

    The division corrects for the start at zero. A sample that was never updated has nothing to aim at: NaN.

    Args:
        ensemble: shape `(N, K)`, or dense `(N, K, *S)`, as from `ensemble_update`.
        index: numbers of the batch's samples, integers `(B,)`.

    Returns:
        Shape `(B, K)`, or `(B, K, *S)`.

    Raises:
        TypeError: if `index` are no integers or `ensemble` is no floating-point tensor.
        ValueError: if shapes or devices differ, or numbers in CPU memory are out of range.

    Source:
        TE (Dong et al. 2022), released code.

    Examples:
        >>> ensemble_targets(torch.tensor([[0.1, 0.1], [0.0, 0.3]]), torch.tensor([1, 0]))
        tensor([[0.0000, 1.0000],
                [0.5000, 0.5000]])
        >>> ensemble_targets(torch.zeros(1, 2), torch.tensor([0])).isnan().all().item()
        True
    """
    _check.floating("ensemble_targets", ensemble=ensemble)
    if ensemble.ndim < 2:
        raise ValueError(f"ensemble_targets: `ensemble` must be of shape (N, K), got {tuple(ensemble.shape)}.")
    _check_index("ensemble_targets", "ensemble", ensemble, index)
    rows = ensemble[index.long()]
    return rows / rows.sum(dim=1, keepdim=True)


def write(memory: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A table with some samples' rows replaced, such as MMA's margins by those just found.

    Args:
        memory: one row or number per sample, shape `(N, ...)`; left untouched.
        index: numbers of the batch's samples, integers `(B,)`. Rows with the same number are written as their mean.
        values: what to write, shape `(B, ...)`; held fixed.

    Returns:
        A new table, in the dtype of `memory`.

    Raises:
        TypeError: if `index` are no integers or another argument is no floating-point tensor.
        ValueError: if shapes or devices differ, or numbers in CPU memory are out of range.

    Examples:
        >>> write(torch.zeros(4), torch.tensor([2, 0]), torch.tensor([0.5, 0.25]))
        tensor([0.2500, 0.0000, 0.5000, 0.0000])
        >>> write(torch.zeros(2), torch.tensor([1, 1]), torch.tensor([0.5, 0.25]))
        tensor([0.0000, 0.3750])
    """
    _check.floating("write", memory=memory, values=values)
    mean, seen = _rows("write", "memory", memory, index, "values", values.detach().to(memory.dtype))
    return torch.where(seen, mean, memory)


def gathered(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Numbers and rows of the samples of all processes, in the order of the processes; with one process, its own.

    Call it on every process before a table is written, so that all write the same. Batches may differ in size. Waits
    for the other processes, and for the device.

    Args:
        index: numbers of this process's samples, integers `(B,)`.
        *values: what belongs to them, shapes `(B, ...)`; held fixed.

    Returns:
        `(index, *values)` of everybody.

    Raises:
        TypeError: if an argument is no tensor, or `index` holds no integers.
        ValueError: if a number of rows differs.

    Examples:
        >>> index, logits = torch.tensor([3, 1]), torch.zeros(2, 5)
        >>> all(a is b for a, b in zip(gathered(index, logits), (index, logits)))  # one process
        True
        >>> ensemble = ensemble_update(torch.zeros(9, 5), *gathered(index, logits))
    """
    _check.tensor("gathered", "index", index)
    _check.labels("gathered", index, name="index", index=index)
    for place, tensor in enumerate(values):
        _check.tensor("gathered", f"values[{place}]", tensor)
        if tensor.shape[:1] != index.shape:
            raise ValueError(
                f"gathered: `values[{place}]` must have a row for each `index`, shape ({len(index)}, ...), got "
                f"{tuple(tensor.shape)}."
            )
    given = (index, *values)
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return given
    counts = [torch.zeros(1, dtype=torch.long, device=index.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.full_like(counts[0], index.shape[0]))
    sizes = [int(count) for count in counts]
    return tuple(_of_all(tensor.detach(), sizes) for tensor in given)


def _of_all(tensor: Tensor, sizes: list[int]) -> Tensor:
    """The rows of every process, which are sent padded to the largest batch."""
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _rows(function: str, name: str, table: Tensor, index: Tensor, what: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The values as a table of means per sample, and which samples have one, shaped to meet it."""
    _check_index(function, name, table, index)
    if values.shape != (index.shape[0], *table.shape[1:]):
        raise ValueError(
            f"{function}: `{what}` must have one row for each `index`, of the shape of `{name}`'s, "
            f"{(index.shape[0], *table.shape[1:])}, got {tuple(values.shape)}."
        )
    _check.same_device(function, what, values.device, name, table.device)
    rows = index.long()
    counts = table.new_zeros(table.shape[0]).index_add(0, rows, values.new_ones(rows.shape[0]))
    mean = torch.zeros_like(table).index_add(0, rows, values)
    return mean / per_sample(counts.clamp_min(1), table), per_sample(counts > 0, table)


def _check_index(function: str, name: str, table: Tensor, index: Tensor) -> None:
    """Require numbers of samples, in range where that can be read without waiting."""
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{function}: `index` must be a tensor with each sample's number in its data set, got "
            f"{type(index).__name__}; let the loader give it beside the images."
        )
    _check.labels(function, index, name="index", index=index)
    _check.same_device(function, "index", index.device, name, table.device)
    if index.device.type == "cpu" and index.shape[0] and not torch.compiler.is_compiling():
        low, high = (int(extreme) for extreme in torch.aminmax(index))
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"{function}: `index` must lie in [0, {table.shape[0] - 1}], the rows of `{name}`, got values from "
                f"{low} to {high}."
            )
