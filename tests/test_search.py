"""The books of an attack that searches: who fell where, who is left, what it cost."""

import torch

from perceptual_at.attacks.verdict import Search
from tests.strategies import uniform

LABELS = torch.tensor([0, 1, 0, 1])


def logits_for(*predictions):
    return torch.nn.functional.one_hot(torch.tensor(predictions), 2).double()


def test_the_first_misclassified_point_is_kept():
    x, first, second = (uniform(seed, 4, 3) for seed in range(3))
    search, rows = Search(x, LABELS), torch.arange(4)
    assert search.judge(rows, first, logits_for(1, 1, 1, 1), 2).tolist() == [True, False, True, False]
    assert search.judge(rows, second, logits_for(1, 0, 0, 1), 5).tolist() == [True, True, False, False]
    assert torch.equal(search.x_adv, torch.stack([first[0], second[1], first[2], x[3]]))
    assert search.step.tolist() == [2, 5, 2, -1]
    assert search.success.tolist() == [True, True, True, False]
    assert search.remaining().tolist() == [3]


def test_logits_with_nan_are_no_success():
    search = Search(uniform(0, 4, 3), LABELS)
    assert not search.judge(torch.arange(4), uniform(1, 4, 3), torch.full((4, 2), float("nan")), 1).any()


def test_points_to_return_without_success_never_replace_a_success():
    x, found, other = (uniform(seed, 4, 3) for seed in range(3))
    search, rows = Search(x, LABELS), torch.tensor([1, 3])
    search.record(rows, found[rows], torch.tensor([True, False]), 1)
    search.settle(torch.arange(4), other, torch.tensor([True, True, False, True]))
    assert torch.equal(search.x_adv, torch.stack([other[0], found[1], x[2], other[3]]))


def test_passes_are_counted_by_row():
    search = Search(uniform(0, 4, 3), LABELS)
    search.spend(torch.tensor([0, 2]), gradients=3)
    search.spend(torch.tensor([2]), forwards=2)
    assert search.gradients.tolist() == [3, 0, 3, 0]
    assert search.forwards.tolist() == [3, 0, 5, 0]
    assert search.result(verdict=True).gradients is search.gradients


def test_the_inputs_stay_as_they_are():
    x = uniform(0, 4, 3)
    before, search = x.clone(), Search(x, LABELS)
    search.record(torch.arange(4), x + 1, torch.ones(4, dtype=torch.bool), 0)
    assert torch.equal(x, before)
