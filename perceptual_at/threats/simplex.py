"""How a budget is shared out among the entries of a row.

Two ways to find how much every entry gives up so that what is left adds up to the budget, one number per row; and how
an amount goes to the entries one after the other.
"""

import math

import torch
from torch import Tensor

from perceptual_at._rounding import accumulator

_MOST_ROUNDS = 200  # five to ten are usual
_SAMPLE = 2048  # entries that tell where in the order of a long row an amount ends
_SPARE = 8  # of them, to either side


def threshold_by_sorting(wanted: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """Solve `sum(min(max(wanted - t, 0), room)) = radius` for t >= 0 in each row; 0 where the sum is below."""
    wanted, room = wanted.to(accumulator(wanted)), room.to(accumulator(room))
    ones, end = torch.ones_like(wanted), wanted.new_zeros(wanted.shape[0], 1)
    # Going down from large t, an entry starts to grow at `wanted` and stops at `wanted - room`.
    places = torch.cat([wanted, (wanted - room).clamp_min(0), end], dim=1)
    places, order = places.sort(dim=1, descending=True)
    slopes = torch.cat([ones, -ones, end], dim=1).gather(1, order).cumsum(dim=1)[:, :-1]
    sums = (slopes * (places[:, :-1] - places[:, 1:])).cumsum(dim=1)
    reached = sums >= radius
    first = reached.to(torch.uint8).argmax(dim=1, keepdim=True)
    excess = (sums.gather(1, first) - radius) / slopes.gather(1, first).clamp_min(1)
    solution = places[:, 1:].gather(1, first) + excess
    return torch.where(reached.any(dim=1, keepdim=True), solution, torch.zeros_like(solution))


def threshold_by_climbing(wanted: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """The same up to rounding, by Newton's method between bounds that close in; waits for the device every round.

    The sum is linear in `t` between the places that the other form sorts, so that a step from the right piece arrives;
    where a step would leave the bounds they are halved.
    """
    low, high = torch.zeros_like(wanted[:, :1]), wanted.amax(dim=1, keepdim=True)
    level, near = low, 4 * torch.finfo(wanted.dtype).eps * radius
    for _ in range(_MOST_ROUNDS):
        left = wanted - level
        moved = torch.minimum(left, room).clamp_min_(0)
        excess = moved.sum(dim=1, keepdim=True) - radius
        done = (excess.abs() <= near) | ((excess <= 0) & (level == 0))
        low, high = torch.where(excess > 0, level, low), torch.where(excess > 0, high, level)
        following = torch.ge(room, left, out=left).mul_(moved.sign_()).sum(dim=1, keepdim=True)
        step = level + excess / following
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        step = torch.where(done, level, step)
        if torch.equal(step, level):
            break
        level = step
    return level


def threshold(wanted: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """The same as exactly as by sorting, but without sorting long rows."""
    if not is_long(wanted):
        return threshold_by_sorting(wanted, room, radius)
    dtype = accumulator(wanted)
    return threshold_by_climbing(wanted.to(dtype), room.to(dtype), radius)


def filled(room: Tensor, gain: Tensor, amount: Tensor) -> Tensor:
    """Distribute `amount` `(B, 1)` over each row in the order of falling gain, to each entry what it has room for.

    To sort long rows would take longer than all else in a step. Where numbers can be looked at without waiting, only
    the entries are sorted among which the amount may end: a sample guesses them, and sums over all confirm it.
    """
    if not is_long(room):
        places = gain.argsort(dim=1, descending=True)
        return torch.zeros_like(room).scatter(1, places, _shared_out(room.gather(1, places), 0.0, amount))
    first, least = _guessed(room, gain, amount)
    sure, some = gain > first, room > 0
    unsure = (gain >= least) & some & ~sure
    before = (room * sure).sum(dim=1, keepdim=True, dtype=accumulator(room))
    upto = before + (room * unsure).sum(dim=1, keepdim=True)
    if not bool(((before <= amount) & ((upto >= 1.001 * amount) | (least == -math.inf))).all()):
        sure, unsure, before = torch.zeros_like(sure), some, torch.zeros_like(before)
    places, have = _packed(unsure, gain, room)
    return (room * sure).scatter_add(1, places, _shared_out(have, before, amount))


def is_long(value: Tensor) -> bool:
    """Whether sorting rows would take longer than to look at them first, which waits for nothing."""
    return value.shape[1] > 2 * _SAMPLE and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _shared_out(have: Tensor, before: float | Tensor, amount: Tensor) -> Tensor:
    """What each of a row of entries gets of an amount of which some is gone already."""
    upto = (before + have.cumsum(dim=1, dtype=accumulator(have))).to(have.dtype)
    return torch.minimum(have, (amount - (upto - have)).clamp_min(0))


def _guessed(room: Tensor, gain: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Gains above which entries surely get all they have room for, and below which they get nothing; `(B, 1)`."""
    stride = room.shape[1] // _SAMPLE | 1  # odd, as the sides of images are not
    sample, order = gain[:, ::stride].sort(dim=1, descending=True)
    upto = room[:, ::stride].gather(1, order).cumsum(dim=1) * stride
    high, low = ((upto < share * amount).sum(dim=1, keepdim=True) for share in (0.8, 1.25))
    high, low, last = high - _SPARE, low + _SPARE, sample.shape[1] - 1
    first = sample.gather(1, high.clamp_min(0)).masked_fill(high < 0, math.inf)
    return first, sample.gather(1, low.clamp_max(last)).masked_fill(low > last, -math.inf)


def _packed(chosen: Tensor, gain: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen entries of each row in the order of falling gain: their places, and their room; the rest has none."""
    row, place = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(dim=1)
    turn = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]
    places = row.new_zeros(len(room), int(counts.max()))
    keys = gain.new_full(places.shape, -math.inf)
    have = torch.zeros_like(keys)
    for target, values in ((places, place), (keys, gain[row, place]), (have, room[row, place])):
        target[row, turn] = values
    order = keys.argsort(dim=1, descending=True)
    return places.gather(1, order), have.gather(1, order)
