"""Batches of real and generated images."""

import math

import torch
from torch import Tensor

from perceptual_at import _check, _random


def mixed_rows(
    real: int,
    generated: int,
    *,
    batch_size: int = 512,
    fraction: float = 0.7,
    batches: int | None = None,
    generator: torch.Generator | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The rows of every batch of an epoch: real images without replacement, generated ones with.

    `int(fraction * batch_size)` rows of a batch are generated, drawn anew each time from all of them; the rest are
    real, in the order of a permutation, which starts over when it is used up.

    Args:
        real: how many real images there are.
        generated: how many generated ones.
        batch_size: rows of a batch.
        fraction: share of generated rows in [0, 1]: 0.7 with one million of them, 0.8 with more.
        batches: how many batches; `ceil(real / batch_size)` if left out, as released: an "epoch" then shows less
            than all real images, 30 % of them at 0.7.
        generator: what draws, on the CPU; torch's global generator if absent. One seeded by the epoch gives the same
            rows to every process and after a kill.

    Returns:
        For each batch the rows of the real and of the generated images.

    Raises:
        TypeError: if a count is no integer or `generator` no generator.
        ValueError: if a count is not positive, `fraction` is outside [0, 1], or a batch takes more real rows than
            there are.

    Source:
        Wang et al. 2023 (DM-Improves-AT), released code; the fraction after Rebuffi et al. 2021.

    Examples:
        >>> rows = mixed_rows(50_000, 1_000_000, batch_size=512, fraction=0.7)
        >>> len(rows), len(rows[0][0]), len(rows[0][1])
        (98, 154, 358)
    """
    for name, value in (("real", real), ("generated", generated), ("batch_size", batch_size)):
        _check.count("mixed_rows", name, value)
    _random.on_cpu("mixed_rows", generator)
    _check.number("mixed_rows", "fraction", fraction, at_least=0, at_most=1)
    made = int(fraction * batch_size)
    taken = int(batch_size) - made
    if taken > real:
        raise ValueError(f"mixed_rows: `batch_size`={batch_size} takes {taken} real rows but `real` is {real}.")
    if batches is None:
        batches = math.ceil(real / batch_size)
    _check.count("mixed_rows", "batches", batches)
    order: list[Tensor] = []
    while taken and len(order) < batches:
        shuffled = torch.randperm(real, generator=generator, device="cpu")
        order += torch.split(shuffled[: real // taken * taken], taken)
    nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
    drawn = torch.randint(generated, (batches, made), generator=generator, device="cpu")
    return [(order[batch] if taken else nothing, drawn[batch]) for batch in range(batches)]
