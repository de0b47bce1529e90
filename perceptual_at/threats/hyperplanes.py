r"""The shortest way onto a hyperplane inside a box, in three norms: the steps that FAB takes.

Each function solves, for every row at once and exactly,

$$ \min_d \|d\|_p \quad\text{such that}\quad w \cdot d = g, \quad l \le t + d \le u $$

Moving an entry against the gap never helps, so entry $i$ moves by $m_i$ between 0 and its room $r_i$ in the one
direction that closes the gap, and $\sum_i |w_i| m_i = |g|$ remains. Where the box holds no point of the plane,
every entry with $w_i \ne 0$ moves as far as it can: to the corner of the box nearest to the plane.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from perceptual_at.threats.entries import Bounds, multipliable

_FEW = 128  # entries that a step in L1 hardly ever needs more of


def shift_linf(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift with the smallest largest entry, $m_i = \min(\lambda, r_i)$.

    Args:
        points: places in the box to start from, $t$; shape `(B, N)`, or `(S, B, N)` for several of each hyperplane.
        normals: of the hyperplanes, $w$; shape `(B, N)`. Where a row is zero, nothing moves.
        gaps: what is missing in $w \cdot t$, $g$; shape `(B,)` or `(S, B)`.
        bounds: smallest and largest value of an entry, $l$ and $u$: numbers, or tensors that broadcast over the points;
            may be infinite.

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
    return torch.minimum(_level(way.weights, None, way.room, way.gaps), way.room).mul_(way.signs)


def shift_l2(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift of smallest Euclidean length, $m_i = \min(\lambda |w_i|, r_i)$.

    Args:
        points: places in the box to start from, $t$; shape `(B, N)`, or `(S, B, N)` for several of each hyperplane.
        normals: of the hyperplanes, $w$; shape `(B, N)`. Where a row is zero, nothing moves.
        gaps: what is missing in $w \cdot t$, $g$; shape `(B,)` or `(S, B)`.
        bounds: smallest and largest value of an entry, $l$ and $u$: numbers, or tensors that broadcast over the points;
            may be infinite.

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
    level = _level(way.weights, way.weights, way.room, way.gaps)
    return torch.minimum(level * way.weights, way.room).mul_(way.signs)


def shift_l1(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    r"""Shift with the smallest sum of absolute entries: those of largest $|w_i|$ first, each as far as it can.

    Args:
        points: places in the box to start from, $t$; shape `(B, N)`, or `(S, B, N)` for several of each hyperplane.
        normals: of the hyperplanes, $w$; shape `(B, N)`. Where a row is zero, nothing moves.
        gaps: what is missing in $w \cdot t$, $g$; shape `(B,)` or `(S, B)`.
        bounds: smallest and largest value of an entry, $l$ and $u$: numbers, or tensors that broadcast over the points;
            may be infinite.

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
    entries = points.shape[-1]
    few = min(entries, _FEW) if points.device.type == "cpu" else entries
    moved, short = _largest_first(way, few)
    if few < entries and short.any():
        rest = _Way(way.signs, way.weights[short], way.room[..., short, :], way.gaps[..., short, :])
        moved[..., short, :], _ = _largest_first(rest, entries)
    return moved.mul_(way.signs)


SHIFTS: dict[float, Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]] = {
    math.inf: shift_linf, 2.0: shift_l2, 1.0: shift_l1,
}  # fmt: skip
"""By the order of the norm."""


class _Way(NamedTuple):
    """The way to the plane: where to, how much an entry counts, how far it can go, how much is missing `(..., 1)`."""

    signs: Tensor
    weights: Tensor
    room: Tensor
    gaps: Tensor


def _way(points: Tensor, normals: Tensor, gaps: Tensor, bounds: Bounds) -> _Way:
    """Turn the plane so that every entry moves by a positive amount, and scale its largest weight to one."""
    info = torch.finfo(points.dtype)
    largest = normals.abs().amax(dim=-1, keepdim=True)
    unit = largest.masked_fill(largest == 0, 1.0)
    # Weights whose square is zero in this dtype would be neither there nor absent.
    facing = functional.hardshrink(normals / unit, info.tiny**0.5)
    signs = facing.sign() * gaps.sign()[..., None]
    low, high = (multipliable(bound, points) for bound in bounds)
    room = torch.maximum((high - points).mul_(signs), (low - points).mul_(signs)).clamp_min_(0)
    return _Way(signs, facing.abs(), room, gaps.abs()[..., None] / unit)


def _largest_first(way: _Way, few: int) -> tuple[Tensor, Tensor]:
    """How far entries move when only `few`, those of the largest weights, may; and the rows `(B,)` with more to do."""
    weights, order = way.weights.topk(few, dim=-1)
    order = order.expand(*way.room.shape[:-1], few)
    room = way.room.gather(-1, order)
    full = weights * room
    gained = torch.minimum(full, (way.gaps - _before(full)).clamp_min(0))
    moved = torch.zeros_like(way.room).scatter_(-1, order, torch.where(gained == full, room, gained / weights))
    short = (gained[..., -1] == full[..., -1]).reshape(-1, weights.shape[0]).any(dim=0)
    return moved, short


def _level(weights: Tensor, pace: Tensor | None, room: Tensor, totals: Tensor) -> Tensor:
    """Solve `sum(weights * min(level * pace, room)) = totals` in each row; huge where the sum stays below.

    None is a pace of one. Sorting waits for nothing, the climb looks at every round whether it was the last; on CPUs
    looking is free, and a climb takes a few rounds.
    """
    solve = _level_by_climbing if room.device.type == "cpu" else _level_by_sorting
    return solve(weights, pace, room, totals)


def _level_by_climbing(weights: Tensor, pace: Tensor | None, room: Tensor, totals: Tensor) -> Tensor:
    """Newton's method from 0: the sum is concave in the level, so that no step goes too far.

    A row is done when a step has brought no entry to rest, because then the sum was linear on all of its way.
    """
    largest = torch.finfo(room.dtype).max
    slopes = weights if pace is None else weights * pace
    level, gained, before = torch.zeros_like(totals), torch.zeros_like(totals), torch.full_like(totals, -1.0)
    at_work, reach = torch.empty_like(room), level  # one buffer for all rounds
    for _ in range(room.shape[-1] + 2):  # every round but the last brings an entry to rest
        slope = torch.gt(room, reach, out=at_work).mul_(slopes).sum(dim=-1, keepdim=True)
        if torch.equal(slope, before):
            break
        step = torch.where(slope > 0, (totals - gained) / slope, largest).clamp_(0, largest)
        level = (level + step * (slope != before)).clamp_(max=largest)
        reach = level if pace is None else level * pace
        gained = torch.minimum(reach, room, out=at_work).mul_(weights).sum(dim=-1, keepdim=True)
        before = slope
    return level


def _level_by_sorting(weights: Tensor, pace: Tensor | None, room: Tensor, totals: Tensor) -> Tensor:
    """All levels at which an entry comes to rest, in their order, and the sum at each of them."""
    largest = torch.finfo(room.dtype).max
    limits = room if pace is None else torch.where(pace > 0, room / pace, room)
    slopes = weights if pace is None else weights * pace
    limits, order = limits.sort(dim=-1, stable=True)
    slopes = slopes.expand_as(limits).gather(-1, order)
    settled = _before(slopes * limits)  # by the entries with lower limits
    slope = slopes.flip(-1).cumsum(dim=-1).flip(-1)  # of the entries that still grow
    reached = settled + limits * slope >= totals
    first = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
    smallest = torch.finfo(slope.dtype).tiny
    level = (totals - settled.gather(-1, first)) / slope.gather(-1, first).clamp_min(smallest)
    return torch.where(reached.any(dim=-1, keepdim=True), level, largest).clamp_max(largest)


def _before(value: Tensor) -> Tensor:
    """Sum of the earlier entries of each row."""
    return functional.pad(value[..., :-1], (1, 0)).cumsum(dim=-1)
