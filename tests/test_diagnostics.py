"""Diagnostics on models and attacks as they are found: some write to what they are given."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import Linf, accuracy, pgd
from perceptual_at.diagnostics import (
    attacked_by_group,
    catastrophic_overfitting,
    perception_gap,
    perception_path,
    perturbed_by_group,
    random_noise,
)
from perceptual_at.evaluation import bootstrap_interval, still_adversarial

exactly = functools.partial(assert_close, rtol=0, atol=0)
X, LABELS = torch.linspace(0.05, 0.95, 24).reshape(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])


class Overwriting(nn.Module):
    """Normalises its input in place, as models in the wild do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x.sub_(0.25).mul_(2.0).flatten(1))


class Careful(Overwriting):
    def forward(self, x):
        return super().forward(x.clone())


def up(model, x, labels):
    return x + 0.125


def gap(model, attack, labels=None):
    found = perception_gap(model, [(X, LABELS if labels is None else labels)], attack)
    return found.distance, found.defended, found.correct


@pytest.mark.parametrize("measure", [
    lambda model: perception_path(model, X, X + 0.125, [0.0, 0.5, 1.0]),
    lambda model: gap(model, up),
    lambda model: gap(model, lambda *_: X),
    lambda model: attacked_by_group(model, X, LABELS, functools.partial(pgd, threat=Linf(0.1), start="clean", steps=1)),
    lambda model: attacked_by_group(model, X, LABELS, up, reduced_attack=lambda *_: X, boundary="reduced"),
], ids=["path", "gap", "gap of a ready point", "group", "group reduced"])  # fmt: skip
def test_a_model_that_writes_to_its_input_is_measured_as_one_that_does_not(measure):
    before = X.clone()
    found, expected = measure(Overwriting()), measure(Careful())
    assert torch.equal(before, X)
    for one, other in zip(found, expected, strict=True):
        exactly(one, other)


def up_and_labels_away(model, x, labels):
    labels.zero_()
    return x.add_(0.125)


@pytest.mark.parametrize("measure", [
    lambda labels, attack: gap(Careful(), attack, labels),
    lambda labels, attack: attacked_by_group(Careful(), X, labels, attack, boundary="clean"),
    lambda labels, attack: attacked_by_group(Careful(), X, labels, attack, reduced_attack=attack, boundary="reduced"),
], ids=["gap", "group", "group reduced"])  # fmt: skip
def test_an_attack_that_writes_to_what_it_gets_is_measured_as_one_that_does_not(measure):
    before, labels = X.clone(), LABELS.clone()
    for one, other in zip(measure(labels, up_and_labels_away), measure(LABELS, up), strict=True):
        exactly(one, other)
    assert torch.equal(labels, LABELS)
    assert torch.equal(before, X)


@pytest.mark.parametrize("returned", [
    lambda model, x, labels: None,
    lambda model, x, labels: (x, x),
    lambda model, x, labels: x.numpy(),
    lambda model, x, labels: x[:1],
    lambda model, x, labels: x[..., :1],
    functools.partial(pgd, threat=Linf(0.1), verdict=True),
], ids=["nothing", "pair", "array", "fewer", "other shape", "verdict"])  # fmt: skip
def test_what_a_perturbation_returns_is_named_where_it_is_no_input(returned):
    for words, call in {
        "perception_gap: `perturb": lambda: gap(Careful(), returned),
        "attacked_by_group: `attack": lambda: attacked_by_group(Careful(), X, LABELS, returned),
        "attacked_by_group: `reduced_attack": lambda: attacked_by_group(
            Careful(), X, LABELS, up, reduced_attack=returned
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{words}\(model, x, labels\)` (must be|has)"):
            call()


def test_loaders_and_places_are_named_and_empty_batches_do_no_harm():
    whole = perception_gap(Careful(), [(X, LABELS), (X[:0], LABELS[:0])], up)
    assert whole == perception_gap(Careful(), [(X, LABELS)], up)
    calls = {
        "perception_gap: `loader` must give batches": lambda: perception_gap(Careful(), None, up),
        "perception_gap: `loader` must give pairs .* got 3 things": lambda: perception_gap(
            Careful(), [(X, LABELS, LABELS)], up
        ),
        "perception_gap: `loader` must give pairs .* got Tensor": lambda: perception_gap(Careful(), [X], up),
        "perception_gap: `model` must be callable": lambda: perception_gap(None, [(X, LABELS)], up),
        "perception_gap: `score` must be callable": lambda: perception_gap(Careful(), [(X, LABELS)], up, score="mean"),
        "perception_gap: `perceive` must be callable": lambda: perception_gap(
            Careful(), [(X, LABELS)], up, perceive="penultimate"
        ),
        "perception_gap: `perturb` cannot be called .* 'threat'": lambda: perception_gap(Careful(), [(X, LABELS)], pgd),
        "perception_path: `model` must be callable": lambda: perception_path("net", X, X, [0.5]),
        "random_noise: `threat` must be a threat model": lambda: random_noise(None, X, LABELS, 0.1),
        "random_noise: `x` must be": lambda: random_noise(None, X.tolist(), LABELS, Linf(0.1)),
        "perception_gap: `perturb\\(model, x, labels\\)` must be a torch.Tensor, got NoneType": lambda: perception_gap(
            Careful(), [(X, LABELS)], lambda *_: None
        ),
        "perception_gap: `perturb\\(model, x, labels\\)` has shape": lambda: perception_gap(
            Careful(), [(X, LABELS)], lambda *_: X[:2]
        ),
        "perception_gap: `perceive` must give \\(logits, perception\\), got shape": lambda: perception_gap(
            Careful(), [(X, LABELS)], up, perceive=Careful()
        ),
        "attacked_by_group: `attack\\(model, x, labels\\)` must be a torch.Tensor": lambda: attacked_by_group(
            Careful(), X, LABELS, lambda *_: None
        ),
        "attacked_by_group: `reduced_attack\\(model, x, labels\\)` has shape": lambda: attacked_by_group(
            Careful(), X, LABELS, up, reduced_attack=lambda *_: X[:2]
        ),
        "attacked_by_group: `model\\(x\\)` must be a torch.Tensor, got tuple": lambda: attacked_by_group(
            lambda x: (x,), X, LABELS, up
        ),
        "attacked_by_group: `labels` must lie in": lambda: attacked_by_group(Careful(), X, LABELS + 99, up),
        "perturbed_by_group: `partition` must be": lambda: perturbed_by_group(X, X, X, (LABELS == 0, LABELS == 1)),
        "attacked_by_group: `model` must be callable": lambda: attacked_by_group(None, X, LABELS, up),
        "accuracy: `labels` must be": lambda: accuracy(X.flatten(1), LABELS.double()),
        "still_adversarial: `model` must be callable": lambda: still_adversarial(None, X, LABELS),
        "bootstrap_interval: `seed` must be": lambda: bootstrap_interval(X.flatten(), seed=10**30),
        "perception_path: `alphas` must be a sequence of numbers": lambda: perception_path(Careful(), X, X, 0.5),
        "perception_path: `x_adv` has shape": lambda: perception_path(Careful(), X, X[:2], [0.5]),
        "catastrophic_overfitting: `single_step` must be a sequence": lambda: catastrophic_overfitting(None, [0.1]),
    }
    for words, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            call()
    exactly(*(perception_path(Careful(), X, X + 0.5, places) for places in ([0.25, 0.5], torch.tensor([0.25, 0.5]))))
