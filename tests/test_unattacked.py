"""Standard training, training on noise, and attacks that depend on where a sample stands."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import Linf, diagnostics, objectives

THREAT = Linf(0.1)


def problem():
    torch.manual_seed(0)
    return nn.Linear(3, 4), (torch.rand(6, 3), torch.rand(6, 3)), torch.tensor([0, 1, 2, 3, 0, 1])


def test_standard_training_is_cross_entropy_of_the_clean_inputs():
    model, (x, _), labels = problem()
    loss, terms = objectives.standard(model, (x,), labels, None)
    assert_close(loss, torch.nn.functional.cross_entropy(model(x), labels))
    assert_close(loss, terms["cross_entropy"])


def test_training_on_noise_is_cross_entropy_at_the_random_start_of_an_attack():
    model, (x, _), labels = problem()
    start = THREAT.random_start(x, generator=torch.Generator().manual_seed(3))
    options = {"threat": THREAT, "generator": torch.Generator().manual_seed(3)}
    loss, _ = objectives.random_noise(model, (x,), labels, None, **options)
    assert_close(loss, torch.nn.functional.cross_entropy(model(start), labels))
    assert not torch.equal(start, x)
    with pytest.raises(TypeError, match="random_noise: `threat` must be a threat model"):
        objectives.random_noise(model, (x,), labels, None, threat=8 / 255)


@pytest.mark.parametrize("group", ["boundary", "interior"])
@pytest.mark.parametrize("strength", ["full", "reduced", "clean"])
def test_a_group_gets_the_perturbation_it_is_given(group, strength):
    # On the line, class 0 left of 1/2. Wrong; at the boundary (0.45 moves to 0.55); inside.
    x, labels = torch.tensor([[0.8], [0.45], [0.1]]), torch.tensor([0, 0, 0])

    def model(x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)

    def attack(model, x, labels):
        return x + 0.2

    perturbed = diagnostics.attacked_by_group(model, x, labels, attack, eta=0.5, **{group: strength})
    row = {"boundary": 1, "interior": 2}[group]
    expected = torch.tensor([[0.8], [0.65], [0.3]])
    expected[row] = x[row] + {"full": 0.2, "reduced": 0.1, "clean": 0.0}[strength]
    assert_close(perturbed, expected)


def test_groups_are_of_samples():
    with pytest.raises(ValueError, match=r"attacked_by_group: `labels` .* got dense ones .* it is not defined"):
        diagnostics.attacked_by_group(nn.Conv2d(1, 3, 1), torch.rand(2, 1, 2, 2), torch.zeros(2, 2, 2).long(), None)
