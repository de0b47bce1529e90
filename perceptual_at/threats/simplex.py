"""How much every entry gives up so that what is left adds up to a budget: two ways to find one number per row."""

import torch
from torch import Tensor

from perceptual_at._rounding import accumulator

_MOST_ROUNDS = 200  # five to ten are usual


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
