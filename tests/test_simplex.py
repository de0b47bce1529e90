"""How a budget is shared out among the entries of a row: short rows by sorting, long ones mostly without."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_at import L1, pgd
from perceptual_at.threats.simplex import filled, threshold, threshold_by_sorting
from tests.strategies import generator

LONG = 20_000


def in_order(room, gain, amount):
    """One entry after the other."""
    order = gain.argsort(dim=1, descending=True)
    have = room.gather(1, order)
    before = have.cumsum(dim=1) - have
    return torch.zeros_like(room).scatter(1, order, torch.minimum(have, (amount - before).clamp_min(0)))


@pytest.mark.parametrize("entries", [50, LONG])
@pytest.mark.parametrize("full", [1.0, 0.3, 0.001], ids=lambda full: f"{full} of the entries have room")
@pytest.mark.parametrize("power", [1, 7], ids=["gains alike", "a few large gains"])
def test_an_amount_goes_to_the_entries_of_largest_gain(entries, full, power):
    draw = generator(0)
    gain = torch.randn(4, entries, generator=draw, dtype=torch.float64) ** power
    room = torch.rand(4, entries, generator=draw, dtype=torch.float64)
    room = room * (torch.rand(4, entries, generator=draw) < full)
    for share in (0.0, 1e-3, 0.2, 0.9, 2.0):
        amount = share * room.sum(dim=1, keepdim=True) * torch.tensor([[1.0], [0.5], [0.0], [1.0]])
        torch.testing.assert_close(filled(room, gain, amount), in_order(room, gain, amount), rtol=0, atol=1e-10)


def test_entries_of_equal_gain_share_one_amount():
    room = torch.rand(2, LONG, generator=generator(1))
    gain = (3 * torch.randn(2, LONG, generator=generator(2))).round()
    amount = torch.tensor([[100.0], [4000.0]])
    got = filled(room, gain, amount)
    assert bool(((got >= 0) & (got <= room)).all())
    torch.testing.assert_close(got.sum(dim=1, keepdim=True), amount)
    for row in range(2):  # whoever gains more than one that got something is full
        least = gain[row][got[row] > 0].min()
        above = gain[row] > least
        assert torch.equal(got[row][above], room[row][above])


def test_long_rows_give_up_what_sorting_says():
    wanted, room = (torch.rand(3, LONG, generator=generator(seed)) for seed in (0, 1))
    for radius in (1.0, 300.0, 5000.0):
        torch.testing.assert_close(
            threshold(wanted, room, radius), threshold_by_sorting(wanted, room, radius), rtol=1e-12, atol=1e-12
        )


class _Sorts(TorchDispatchMode):
    """How many entries each sort was given."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "sort" in str(func):
            self.entries.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("start", ["clean", "random"])
def test_steps_of_large_images_sort_few_entries(start):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 2))
    x, labels, threat = torch.rand(2, 3, 96, 96, generator=generator(0)), torch.tensor([0, 1]), L1(12.0)
    with _Sorts() as sorts:
        x_adv = pgd(model, x, labels, threat, start=start, generator=generator(1))
    assert max(sorts.entries) <= x.numel() / 2  # the random start has as many entries as the image
    assert sum(sorts.entries[-6:]) <= x.numel() / 2
    assert bool(threat.contains(x_adv, x).all())
