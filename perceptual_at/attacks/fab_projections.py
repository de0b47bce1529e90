r"""The shortest way onto a hyperplane inside a box, in three norms: the steps that FAB takes.

Each function solves, for every row at once and exactly,

$$ \min_d \|d\|_p \quad\text{such that}\quad w \cdot d = g, \quad l \le t + d \le u $$

Moving an entry against the gap never helps, so entry $i$ moves by $m_i$ between 0 and its room $r_i$ in the one
direction that closes the gap, and $\sum_i |w_i| m_i = |g|$ remains. Where the box holds no point of the plane,
every entry with $w_i \ne 0$ moves as far as it can: to the corner of the box nearest to the plane.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from perceptual_at.threats import Bounds


def shift_linf(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift with the smallest largest entry, $m_i = \min(\lambda, r_i)$.

    Args:
        points: places in the box to start from, $t$; shape `(B, N)`.
        normals: of the hyperplanes, $w$; shape `(B, N)`. Where a row is zero, nothing moves.
        gaps: what is missing in $w \cdot t$, $g$; shape `(B,)`.
        bounds: smallest and largest value of an entry, $l$ and $u$; may be infinite.

    Returns:
        The shifts $d$, shape and dtype of `points`.

    Source:
        Croce and Hein 2020 (FAB), projection onto a hyperplane with box constraints.

    Examples:
        >>> point, normal = torch.tensor([[0.5, 0.875]]), torch.tensor([[1.0, 1.0]])
        >>> shift_linf(point, normal, torch.tensor([0.5]), (0.0, 1.0))  # the second has room for 1/8
        tensor([[0.3750, 0.1250]])
    """
    way = _way(points, normals, gaps, bounds)
    return way.signs * torch.minimum(_level(way.weights, way.room, way.gaps), way.room)


def shift_l2(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift of smallest Euclidean length, $m_i = \min(\lambda |w_i|, r_i)$.

    Args:
        points: see `shift_linf`.
        normals: see `shift_linf`.
        gaps: see `shift_linf`.
        bounds: see `shift_linf`.

    Returns:
        The shifts, shape and dtype of `points`.

    Source:
        Croce and Hein 2020 (FAB), projection onto a hyperplane with box constraints.

    Examples:
        >>> point, normal = torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, -1.0]])
        >>> shift_l2(point, normal, torch.tensor([1.25]), (0.0, 1.0))  # an eighth of the normal
        tensor([[ 0.3750, -0.1250]])
    """
    way = _way(points, normals, gaps, bounds)
    limits = torch.where(way.weights > 0, way.room / way.weights, way.room)
    level = torch.minimum(_level(way.weights.square(), limits, way.gaps), limits)
    return way.signs * torch.minimum(level * way.weights, way.room)


def shift_l1(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift with the smallest sum of absolute entries: those of largest $|w_i|$ first, each as far as it can.

    Args:
        points: see `shift_linf`.
        normals: see `shift_linf`.
        gaps: see `shift_linf`.
        bounds: see `shift_linf`.

    Returns:
        The shifts, shape and dtype of `points`.

    Source:
        Croce and Hein 2020 (FAB), projection onto a hyperplane with box constraints.

    Examples:
        >>> point, normal = torch.tensor([[0.5, 0.5]]), torch.tensor([[2.0, -1.0]])
        >>> shift_l1(point, normal, torch.tensor([1.25]), (0.0, 1.0))  # 2 * 0.5 + 1 * 0.25
        tensor([[ 0.5000, -0.2500]])
    """
    way = _way(points, normals, gaps, bounds)
    weights, order = way.weights.sort(dim=1, descending=True, stable=True)
    room = way.room.gather(1, order)
    full = weights * room
    gained = torch.minimum(full, (way.gaps - _before(full)).clamp_min(0))
    moved = torch.where(gained == full, room, gained / weights)
    return way.signs * torch.zeros_like(moved).scatter(1, order, moved)


class _Way(NamedTuple):
    """The way to the plane: where to, how much an entry counts, how far it can go, how much is missing `(B, 1)`."""

    signs: Tensor
    weights: Tensor
    room: Tensor
    gaps: Tensor


def _way(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> _Way:
    """Turn the plane so that every entry moves by a positive amount, and scale its largest weight to one."""
    facing = torch.where(gaps[:, None] < 0, -normals, normals)
    weights = facing.abs()
    largest = weights.amax(dim=1, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    weights = weights / unit
    # Weights whose square is zero in this dtype would be neither there nor absent.
    weights = torch.where(weights > torch.finfo(weights.dtype).tiny ** 0.5, weights, torch.zeros_like(weights))
    room = torch.where(facing > 0, bounds[1] - points, points - bounds[0]).clamp_min(0)
    room = torch.where(weights > 0, room, torch.zeros_like(room))
    return _Way(facing.sign(), weights, room, gaps.abs()[:, None] / unit)


def _level(weights: Tensor, limits: Tensor, totals: Tensor) -> Tensor:
    """Solve `sum(weights * min(level, limits)) = totals` in each row; infinite where the sum stays below."""
    limits, order = limits.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    settled = _before(weights * limits)  # by the entries with lower limits
    slope = weights.flip(1).cumsum(dim=1).flip(1)  # of the entries that still grow
    reached = settled + limits * slope >= totals
    first = reached.to(torch.uint8).argmax(dim=1, keepdim=True)
    smallest = torch.finfo(slope.dtype).tiny
    level = (totals - settled.gather(1, first)) / slope.gather(1, first).clamp_min(smallest)
    return torch.where(reached.any(dim=1, keepdim=True), level, torch.full_like(level, torch.inf))


def _before(value: Tensor) -> Tensor:
    """Sum of the earlier entries of each row."""
    return functional.pad(value[:, :-1], (1, 0)).cumsum(dim=1)
