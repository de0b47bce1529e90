"""Networks that take batches of one size only."""

import functools

import pytest
import torch
from torch import nn

from perceptual_at import Lane, Linf, apgd, auto_attack, evaluate, pgd
from perceptual_at.models import whole_batches


class Fixed(nn.Module):
    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.size, self.layer = size, nn.Linear(8, 3).double()

    def forward(self, x):
        assert len(x) == self.size
        return self.layer(x.flatten(1)).tanh()


X = torch.rand(13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_outputs_and_gradients_are_those_of_the_samples():
    model, free = whole_batches(Fixed(4), 4), Fixed(13)
    x, other = (X.clone().requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    free(other).square().sum().backward()
    assert torch.allclose(model(X), free(X), rtol=1e-12)
    assert torch.allclose(x.grad, other.grad, rtol=1e-12)
    weights = zip(model.parameters(), free.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-10) for a, b in weights)  # copies add nothing


@pytest.mark.slow
def test_attacks_and_evaluations_keep_its_batches_whole():
    model = whole_batches(Fixed(4), 4)
    layer = model.model.layer
    labels = model(X).argmax(dim=1)
    attacks = {
        "pgd": functools.partial(pgd, threat=Linf(0.6), steps=5, keep="best", early_stop=True),
        "aa": functools.partial(auto_attack, threat=Linf(0.6), version=["apgd-ce", "fab"]),
    }
    data = [(X[:9], labels[:9]), (X[9:], labels[9:])]
    whole, free = (
        evaluate(net, data, attacks, progress=False) for net in (model, lambda x: layer(x.flatten(1)).tanh())
    )
    assert whole.clean_accuracy == 1.0
    assert all(torch.equal(whole.robust[name], free.robust[name]) for name in attacks)


class OnAGraph(nn.Module):
    """Samples that look at each other: the nodes of a graph."""

    def __init__(self, nodes):
        super().__init__()
        torch.manual_seed(0)
        self.neighbours, self.layer = torch.arange(nodes).roll(1), nn.Linear(8, 3).double()

    def forward(self, x):
        return self.layer((x + x[self.neighbours]) / 2)


def exported(size):
    return torch.export.export(Fixed(size), (X[:size],)).module()


WHOLE = {"asserts": Fixed, "graph": OnAGraph, "export": exported}


@pytest.mark.parametrize("kind", WHOLE)
def test_models_that_take_no_part_of_a_batch_are_told_what_to_do(kind):
    model, attack = WHOLE[kind](12), functools.partial(pgd, threat=Linf(0.1), steps=2)
    x = X[:12]
    labels = model(x).argmax(dim=1)
    assert attack(model, x, labels).shape == x.shape
    assert attack(model, x, labels, lane=Lane(dtype=torch.bfloat16)).shape == x.shape
    labels[0] = (labels[0] + 1) % 3
    advice = "models[.]from_joined.*models[.]whole_batches.*nodes of a graph"
    with pytest.raises(ValueError, match=f"(?s)^apgd: `model` fails for the 11 of 12 samples .*{advice}"):
        apgd(model, x, labels, Linf(1e-3), steps=2)
    with pytest.raises(
        ValueError, match=f"(?s)^evaluate: `model` fails for a batch of 11 samples, after one of 12: .*{advice}"
    ):
        evaluate(model, [(x, labels)], {"pgd": attack}, progress=False)
    with pytest.raises(
        ValueError, match=f"(?s)^evaluate: `model` fails for a batch of 5 samples, after one of 12: .*{advice}"
    ):
        evaluate(model, [(x, labels), (X[:5], labels[:5])], {}, progress=False)


def test_errors_of_attacks_on_a_part_of_a_batch_are_their_own():
    def attack(model, x, labels):
        raise IndexError("mine")

    model = Fixed(12).layer
    labels = model(X).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3
    with pytest.raises(IndexError, match=r"^mine$"):
        evaluate(model, [(X, labels)], {"own": attack}, progress=False)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(TypeError, match="whole_batches: `model` must be a"):
        whole_batches(lambda x: x, 4)
    with pytest.raises(ValueError, match="whole_batches: `size` must be at least 1"):
        whole_batches(Fixed(4), 0)
    with pytest.raises(ValueError, match="whole_batches: `x` holds no sample"):
        whole_batches(Fixed(4), 4)(X[:0])
