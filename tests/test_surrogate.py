"""PGD along surrogate gradients: what it sees of a model, what it follows, and what it finds that others do not."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import L1, L2, Lane, Linf, auto_attack, pgd
from perceptual_at.attacks import surrogate
from perceptual_at.attacks.protocol import Protocol, composition_of
from perceptual_at.attacks.surrogate import surrogate_pgd
from perceptual_at.victims import Terms, opened
from tests.strategies import generator, uniform

OTHER_WAYS = {
    "module": lambda u: nn.ReLU()(u),
    "module in place": lambda u: nn.ReLU(inplace=True)(u),
    "function": functional.relu,
    "function in place": lambda u: functional.relu(u, inplace=True),
    "torch": torch.relu,
    "method": lambda u: u.relu(),
    "method in place": lambda u: u.relu_(),
    "in place, result unused": lambda u: (torch.relu_(u), u)[1],
    "clamp": lambda u: u.clamp(min=0),
    "torch.clamp": lambda u: torch.clamp(u, 0),
    "clamp_min": lambda u: u.clamp_min(0.0),
}
NO_RELU = {
    "box": lambda u: u.clamp(0, 1),
    "other floor": lambda u: u.clamp(min=-1.0),
    "ceiling": lambda u: u.clamp(max=0),
    "relu6": functional.relu6,
    "tanh": torch.tanh,
}


def shut(rectify):
    """Class 1 when a unit opens, beyond 0.75 in the mean: around 0.5 no gradient says so."""

    def model(x):
        total = x.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([torch.full_like(total, 0.05), rectify(total - 0.75)], dim=1)

    return model


@pytest.mark.parametrize("rectify", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_a_shut_unit_is_opened_however_it_is_written(rectify):
    model, x, labels = shut(rectify), torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    threat = Linf(0.375)
    assert not pgd(model, x, labels, threat, start="clean", verdict=True).success.any()
    found = surrogate_pgd(model, x, labels, threat, steps=20, restarts=1, probes=4, verdict=True)
    assert found.success.all()
    assert torch.equal(model(found.x_adv.clone()).argmax(dim=1), torch.ones(3, dtype=torch.long))
    assert threat.contains(found.x_adv, x).all()


@pytest.mark.parametrize("threat", [L2(0.75), L1(1.5)], ids=repr)
def test_a_shut_unit_is_opened_in_other_balls(threat):
    x, labels = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    found = surrogate_pgd(shut(torch.relu), x, labels, threat, steps=30, probes=4, verdict=True)
    assert found.success.all()


@pytest.mark.parametrize("rectify", [*OTHER_WAYS.values(), *NO_RELU.values()], ids=[*OTHER_WAYS, *NO_RELU])
def test_only_the_slopes_differ_and_only_of_relus(rectify):
    weights = uniform(0, 6, 5) - 0.5

    def model(x):
        return rectify(x @ weights) @ weights.T

    x = uniform(1, 4, 6)
    gates = surrogate._Gates(model)
    gates.open, gates.blend = [torch.full((4, 5), 0.25, dtype=x.dtype)], 0.5
    point = x.clone().requires_grad_()
    logits = gates(point)
    assert torch.equal(logits, model(x))
    (grad,) = torch.autograd.grad(logits.sum(), point)
    units = x @ weights
    slope = torch.where(units > 0, 0.5 + 0.125, 0.125).to(x.dtype)
    if rectify in NO_RELU.values():
        again = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(again).sum(), again)
    else:
        expected = (slope * weights.sum(dim=0)) @ weights.T
    assert_close(grad, expected)


def test_shares_are_those_of_the_points_in_the_ball_for_each_sample():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[1].bias.fill_(-2.0)  # open where the four entries have a mean above 1/2
    x = torch.tensor([[0.2] * 4, [0.5] * 4, [0.8] * 4])
    with opened("surrogate_pgd", net, x, torch.zeros(3, dtype=torch.long), Linf(0.1), Terms()) as victim:
        gates = surrogate._Gates(victim.model)
        numbers = surrogate._random.SampleGenerator(0, torch.arange(3))
        gates.count(victim, victim.x, Linf(0.1), numbers, 63)
        (shares,) = gates.open
        assert shares.shape == (3, 1)
        assert_close(shares[[0, 2], 0], torch.tensor([0.5 / 64, 63.5 / 64]))
        assert 0.2 < shares[1, 0] < 0.8
        gates.take(torch.tensor([False, True, False]))
        assert_close(gates.open[0], shares[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_points_are_counted_beyond_what_a_half_counts_to(dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).to(dtype)
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([9.0, -9.0]))
    x, labels = torch.full((1, 4), 0.5, dtype=dtype), torch.zeros(1, dtype=torch.long)
    with opened("surrogate_pgd", net, x, labels, Linf(0.1), Terms()) as victim:
        gates = surrogate._Gates(victim.model)
        gates.count(victim, victim.x, Linf(0.1), surrogate._random.SampleGenerator(0, torch.arange(1)), 2100)
        assert_close(gates.open[0].float(), torch.tensor([[2100.5, 0.5]]) / 2101)
    found = surrogate_pgd(net, x, net(x).argmax(dim=1), Linf(0.1), steps=2, restarts=1, probes=2)
    assert found.dtype == dtype


def test_without_blend_it_follows_the_gradients_of_the_model():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x, labels = torch.rand(6, 1, 4, 4, generator=generator(0)), torch.arange(6) % 4
    options = {"steps": 5, "restarts": 1, "blend": 0.0, "verdict": True}
    found = surrogate_pgd(net, x, labels, Linf(0.05), generator=generator(1), probes=1, **options)
    calls = []
    smooth = surrogate_pgd(
        lambda z: calls.append(len(z)) or net(z), x, labels, Linf(0.05), generator=generator(1), probes=1, **options
    )
    assert torch.equal(found.x_adv, smooth.x_adv)
    assert sum(calls) == found.forwards.sum()


def test_what_resists_for_the_wrong_reason_is_broken_and_the_stamp_says_by_what():
    x, labels = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    few = [("surrogate", {"steps": 20, "restarts": 1, "probes": 4})]
    found = auto_attack(shut(torch.relu), x, labels, Linf(0.375), version=few, verdict=True)
    assert found.success.all()
    assert found.protocol.name == "custom: surrogate, Linf(eps=0.375)"
    with pytest.raises(ValueError, match="auto_attack: backend='pyautoattack' has no 'surrogate' attack"):
        auto_attack(shut(torch.relu), x, labels, Linf(0.375), version=few, backend="pyautoattack")


def test_the_thorough_version_goes_by_a_name_of_its_own():
    threat = Linf(8 / 255)
    published, own = (Protocol(threat, 10, composition_of(name, "Linf", 10)) for name in ("standard", "thorough"))
    assert published.name == "AutoAttack standard, Linf(eps=8/255)"
    assert own.name == "thorough: apgd-ce + apgd-t + fab-t + square + surrogate, Linf(eps=8/255)"
    assert own.version == "thorough"
    assert own.fingerprint != published.fingerprint


def test_a_lane_a_half_and_an_odd_model_are_attacked_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x, labels = torch.rand(6, 1, 4, 4, generator=generator(0)), torch.arange(6) % 4
    few = functools.partial(surrogate_pgd, steps=3, restarts=1, probes=2)
    assert few(net, x, labels, Linf(0.05), lane=Lane(dtype=torch.bfloat16)).shape == x.shape
    assert few(net.to(torch.bfloat16), x.to(torch.bfloat16), labels, Linf(0.05)).dtype == torch.bfloat16
    net, seen = net.float(), []

    def differs(z):  # runs a unit more every other time
        seen.append(len(z))
        return net(z) + (functional.relu(z.flatten(1)[:, :4]) if len(seen) % 2 else 0)

    assert few(differs, x, labels, Linf(0.05)).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"blend": 1.5}, r"`blend` must lie in \[0.0, 1.0\]"),
        ({"probes": 0}, "`probes` must be at least 1"),
        ({"restarts": 0}, "`restarts` must be at least 1"),
        ({"target_classes": 0}, "`target_classes` must be at least 1"),
        ({"momentum": -1.0}, r"`momentum` must lie in \[0.0, inf\)"),
    ],
)
def test_malformed_options_are_refused(options, message):
    x, labels = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"^surrogate_pgd: {message}"):
        surrogate_pgd(shut(torch.relu), x, labels, Linf(0.1), **options)
