"""Threat models of the user's own: what takes them, what cannot and says so before the first pass."""

import functools

import pytest
import torch
from torch import nn

from perceptual_at import (
    SampleGenerator,
    apgd,
    auto_attack,
    diagnostics,
    evaluate,
    fab,
    fgsm,
    friendly_pgd,
    n_fgsm,
    pgd,
    sanity_checks,
    square,
)
from tests.strategies import generator


class Ellipsoid:
    """Axes of different lengths; no `eps`, no bounds."""

    def __init__(self, axes, radius=1.0):
        self.axes, self.radius = axes, radius

    def norm(self, delta):
        return (delta / self.axes).flatten(1).norm(dim=1)

    def project(self, x_adv, x):
        delta = x_adv - x
        share = (self.radius * (1 - 1e-6) / self.norm(delta).clamp_min(1e-12)).clamp_max(1.0)
        return x + delta * share.reshape(-1, 1, 1, 1)

    def steepest(self, grad):
        step = grad * self.axes.square()
        return step / self.norm(step).clamp_min(1e-12).reshape(-1, 1, 1, 1)

    def random_start(self, x, *, generator=None):
        return self.project(x + 0.1 * torch.randn(x.shape, generator=generator), x)

    def scaled(self, factor):
        return type(self)(self.axes, self.radius * factor)


class WithEps(Ellipsoid):
    @property
    def eps(self):
        return self.radius


class Both(WithEps):
    """The cube and the ellipsoid at once, with numbers of double precision."""

    def project(self, x_adv, x):
        inside = super().project(x_adv.double(), x.double())
        return torch.maximum(torch.minimum(inside, x.double() + 0.2), x.double() - 0.2)


class Masked(WithEps):
    """What each sample may change; forgets to say how its rows are taken."""

    def __init__(self, mask, radius=0.5):
        self.mask, self.radius = mask, radius

    def norm(self, delta):
        return delta.abs().flatten(1).amax(dim=1)

    def project(self, x_adv, x):
        return x + (x_adv - x).clamp(-self.radius, self.radius) * self.mask

    def steepest(self, grad):
        return grad.sign() * self.mask

    def scaled(self, factor):
        return type(self)(self.mask, self.radius * factor)


class Selected(Masked):
    def select(self, rows):
        return type(self)(self.mask[rows], self.radius)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.passes = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0

    def forward(self, x):
        self.passes += 1
        return self.net(x)


X = torch.rand(8, 1, 8, 8, generator=generator(0))
LABELS = Counting().eval()(X).argmax(dim=1)
AXES, MASK = (
    torch.rand(1, 1, 8, 8, generator=generator(1)) + 0.1,
    torch.rand(8, 1, 8, 8, generator=generator(2)).round(),
)
THREATS = {"ellipsoid": WithEps(AXES), "both": Both(AXES), "mask": Selected(MASK)}
ATTACKS = {
    "pgd": functools.partial(pgd, steps=4),
    "search": functools.partial(pgd, steps=4, keep="best", early_stop=True, restarts=2),
    "fgsm": fgsm,
    "apgd": functools.partial(apgd, steps=4),
    "targets in turn": functools.partial(apgd, steps=4, target_classes=2),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
def test_attacks_stay_inside_and_find_something(threat, attack):
    model = Counting()
    found = attack(model, X, LABELS, threat, generator=SampleGenerator(0, torch.arange(8)), verdict=True)
    assert found.x_adv.dtype == X.dtype
    assert (threat.norm(found.x_adv - X) <= threat.eps * (1 + 1e-5)).all()
    assert found.success.any()


@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
def test_attacks_for_training_take_them_with_starts_and_numbers_of_each_sample(threat):
    numbers = SampleGenerator(0, torch.arange(8))
    for start in ("random", X.clone()):
        x_adv = friendly_pgd(Counting(), X, LABELS, threat, steps=2, noise=0.001, generator=numbers, start=start)
        assert x_adv.dtype == X.dtype
        assert (threat.norm(x_adv - X) <= threat.eps * (1 + 1e-5)).all()
    noisy = n_fgsm(Counting(), X, LABELS, threat, generator=numbers)
    assert noisy.dtype == X.dtype
    assert torch.equal(noisy, n_fgsm(Counting(), X, LABELS, threat, generator=numbers))
    assert apgd(Counting(), X, LABELS, threat, steps=3, start=X.clone()).dtype == X.dtype


@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
def test_evaluations_checks_and_noise_take_them(threat, tmp_path):
    attack = functools.partial(pgd, threat=threat, steps=3)
    batches = [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]
    result = evaluate(Counting(), batches, {"pgd": attack}, progress=False, checks=True, record=tmp_path / "record")
    assert result.robust_accuracy["pgd"] < 1
    again = evaluate(Counting(), batches, {"pgd": attack}, progress=False, record=tmp_path / "record")
    assert torch.equal(again.robust["pgd"], result.robust["pgd"])
    other = functools.partial(pgd, threat=threat.scaled(0.5), steps=3)
    with pytest.raises(ValueError, match=r"^evaluate: `record`"):
        evaluate(Counting(), batches, {"pgd": other}, progress=False, record=tmp_path / "record")
    assert {"more_steps", "losses"} <= {check.name for check in result.checks if check.applies}
    assert diagnostics.random_noise(Counting(), X, LABELS, threat).shape == X.shape


@pytest.mark.parametrize("attack", [fab, square, auto_attack])
def test_what_cannot_be_done_for_them_is_said_before_the_first_pass(attack):
    model = Counting()
    with pytest.raises(TypeError, match=rf"^{attack.__name__}: `threat` must be Linf, L2 or L1"):
        attack(model, X, LABELS, THREATS["ellipsoid"])
    assert model.passes == 0


@pytest.mark.parametrize("attack", [pgd, fgsm, apgd])
def test_without_a_budget_the_step_size_is_asked_for(attack):
    model = Counting()
    with pytest.raises(ValueError, match=rf"^{attack.__name__}: a step size must be given, because Ellipsoid"):
        attack(model, X, LABELS, Ellipsoid(AXES))
    assert model.passes == 0
    assert (Ellipsoid(AXES).norm(pgd(model, X, LABELS, Ellipsoid(AXES), step_size=0.1) - X) <= 1).all()
    last = sanity_checks(Counting().eval(), X, LABELS, Ellipsoid(AXES))[-1]
    assert not last.applies
    assert "Ellipsoid has no `eps`" in last.found


@pytest.mark.parametrize(
    "attack",
    [
        ATTACKS["apgd"],
        ATTACKS["search"],
        functools.partial(pgd, generator=SampleGenerator(0, torch.arange(8))),
    ],
    ids=["apgd", "search", "numbers of each sample"],
)
def test_one_that_holds_something_per_sample_and_forgets_its_rows_is_told(attack):
    labels = torch.where(torch.arange(8) < 3, (LABELS + 1) % 10, LABELS)  # three are wrong and leave at once
    with pytest.raises(ValueError, match=r"^Masked[.]\w+: .*needs `select\(rows\)`"):
        attack(Counting(), X, labels, Masked(MASK))
