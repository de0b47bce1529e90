"""Training with one step or with few: N-FGSM, friendly inputs, catastrophic overfitting."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perceptual_at import L1, L2, Linf, SampleGenerator, friendly_pgd, n_fgsm, pgd, targeted_dlr
from perceptual_at.diagnostics import catastrophic_overfitting
from perceptual_at.divergences import cross_entropy
from tests.strategies import DTYPES, dtype_name, integers, uniform


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype).eval()


class Counting(nn.Module):
    """A model that counts its forward passes and the gradients asked of its input."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.gradients = model, 0, 0

    def forward(self, x):
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(self.count)
        return self.model(x)

    def count(self, grad):
        self.gradients += 1


def problem(batch=16, dtype=torch.float32):
    x = uniform(0, batch, 3, 2, 2).to(dtype)
    return network(dtype=dtype), x, integers(1, batch, below=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# N-FGSM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.3), L1(0.8)], ids=repr)
@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
def test_n_fgsm_stays_in_the_grown_ball_and_the_box_and_uses_them(threat, noise, dtype):
    model, x, labels = problem(64, dtype)
    x_adv = n_fgsm(model, x, labels, threat, noise=noise, generator=generator())
    wider = threat.scaled(noise + 1)
    lengths = wider.norm(x_adv.double() - x.double())
    assert (lengths <= wider.eps).all()
    assert (lengths > 1.2 * threat.eps).any()  # outside the ball itself, which is the point
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad


def test_n_fgsm_is_the_step_of_the_released_code():
    model, x, labels = problem(dtype=torch.float64)
    eps = 0.05
    eta = Linf(2 * eps).random_start(x, generator=generator(3))
    at = eta.clone().requires_grad_()
    grad = torch.autograd.grad(cross_entropy(model(at), labels).sum(), at)[0]
    expected = (eta + eps * grad.sign()).clamp(0, 1)
    x_adv = n_fgsm(model, x, labels, Linf(eps), generator=generator(3))
    assert torch.allclose(x_adv, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("eps", [0.3, 0.4, 0.9])
def test_noise_may_reach_across_the_whole_range(eps):
    model, x, labels = problem()
    x_adv = n_fgsm(model, x, labels, Linf(eps), generator=generator())
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (x_adv - x).abs().max() > eps


def test_n_fgsm_costs_one_pass_and_leaves_the_model_alone():
    model, x, labels = problem()
    model.train()
    counted = Counting(model)
    n_fgsm(counted, x, labels, Linf(0.05), generator=generator())
    assert (counted.forwards, counted.gradients) == (1, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_numbers_per_sample_do_not_depend_on_the_batch():
    model, x, labels = problem()
    index = torch.arange(16)
    for attack in (n_fgsm, functools.partial(friendly_pgd, noise=0.01, steps=3)):
        whole = attack(model, x, labels, Linf(0.1), generator=SampleGenerator(0, index))
        part = attack(model, x[5:9], labels[5:9], Linf(0.1), generator=SampleGenerator(0, index[5:9]))
        assert torch.allclose(whole[5:9], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", [n_fgsm, friendly_pgd])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(16, 12, dtype=torch.uint8)}, TypeError, "`x` must be a floating-point tensor"),
        ({"threat": Linf}, TypeError, "`threat` must be a threat model"),
        ({"noise": -1.0}, ValueError, "`noise` must lie in"),
        ({"labels": torch.full((16,), 7)}, ValueError, "`labels` must lie in"),
        ({"x": torch.full((16, 3, 2, 2), 2.0)}, ValueError, "`x` must lie in the bounds"),
        ({"loss": None}, TypeError, "`loss` must be a function"),
        ({"loss": targeted_dlr}, ValueError, "`loss`=targeted_dlr leads from a label to a target"),
    ],
)
def test_bad_arguments_are_refused(attack, changed, error, message):
    model, x, labels = problem()
    given = {"x": x, "labels": labels, "threat": Linf(0.1), **changed}
    with pytest.raises(error, match=message):
        attack(model, given.pop("x"), given.pop("labels"), given.pop("threat"), **given)


# Friendly inputs --------------------------------------------------------------------------------------------------


def friendly_by_hand(model, x, label, eps, steps, step_size, patience, start):
    """One sample at a time, as the paper's Algorithm 1 has it."""
    point = start
    for _ in range(steps):
        if model(point).argmax(dim=1) != label:
            if patience == 0:
                return point
            patience -= 1
        at = point.clone().requires_grad_()
        grad = torch.autograd.grad(cross_entropy(model(at), label).sum(), at)[0]
        point = (point + step_size * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return point


@pytest.mark.slow
@given(st.integers(0, 200), st.integers(0, 3), st.integers(1, 8))
def test_friendly_pgd_is_the_algorithm_sample_by_sample_and_keeps_the_order(seed, patience, steps):
    model, x, labels = problem(dtype=torch.float64)
    model = network(seed, torch.float64)
    start = Linf(0.2).random_start(x, generator=generator(seed))
    x_adv = friendly_pgd(model, x, labels, Linf(0.2), patience=patience, steps=steps, step_size=0.06, start=start)
    for i in range(len(x)):
        rows = slice(i, i + 1)
        expected = friendly_by_hand(model, x[rows], labels[rows], 0.2, steps, 0.06, patience, start[rows])
        assert torch.allclose(x_adv[rows], expected, rtol=0, atol=1e-12)


def test_each_sample_may_have_its_own_patience():
    model, x, labels = problem(dtype=torch.float64)
    attack = functools.partial(friendly_pgd, model, x, labels, Linf(0.2), steps=6, start="clean")
    mixed = attack(patience=torch.arange(16) % 3)
    for patience in range(3):
        rows = torch.arange(16) % 3 == patience
        assert torch.equal(mixed[rows], attack(patience=patience)[rows])


def test_without_end_to_its_patience_it_is_pgd():
    model, x, labels = problem()
    start = Linf(0.1).random_start(x, generator=generator())
    friendly = friendly_pgd(model, x, labels, Linf(0.1), patience=10, start=start)
    assert torch.equal(friendly, pgd(model, x, labels, Linf(0.1), start=start))


def test_a_start_that_is_wrong_already_is_returned_as_it_is():
    model, x, _ = problem()
    wrong = (model(x).argmax(dim=1) + 1) % 3
    assert torch.equal(friendly_pgd(model, x, wrong, Linf(0.1), start="clean"), x)
    moved = friendly_pgd(model, x, wrong, Linf(0.1), start="clean", patience=1)
    assert not torch.equal(moved, x)


def test_friendly_inputs_are_less_wrong_than_those_of_pgd():
    model, x, _ = problem(200)
    model[1].weight.data *= 6
    labels = model(x).argmax(dim=1)
    start = Linf(0.3).random_start(x, generator=generator())
    friendly = friendly_pgd(model, x, labels, Linf(0.3), start=start)
    full = pgd(model, x, labels, Linf(0.3), start=start)
    losses = [cross_entropy(model(at), labels).mean() for at in (friendly, full)]
    assert losses[0] < losses[1]
    assert (model(friendly).argmax(1) != labels).float().mean() > 0.2


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.8)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_friendly_inputs_are_inside_ball_and_box_also_with_noise(threat, dtype):
    model, x, labels = problem(dtype=dtype)
    x_adv = friendly_pgd(model, x, labels, threat, steps=4, noise=0.05, generator=generator())
    assert (threat.norm(x_adv.double() - x.double()) <= threat.eps).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert x_adv.dtype == dtype


def test_friendly_pgd_costs_what_pgd_costs_and_takes_any_batch():
    model, x, labels = problem()
    counted = Counting(model)
    friendly_pgd(counted, x, labels, Linf(0.1), steps=5)
    assert (counted.forwards, counted.gradients) == (5, 5)
    assert friendly_pgd(model, x[:0], labels[:0], Linf(0.1)).shape == (0, 3, 2, 2)
    assert friendly_pgd(model, x[:1], labels[:1], Linf(0.1)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    ("patience", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), (torch.ones(16), TypeError)]
)
def test_patience_is_a_number_of_steps(patience, error):
    model, x, labels = problem()
    with pytest.raises(error, match="friendly_pgd: `patience` must"):
        friendly_pgd(model, x, labels, Linf(0.1), patience=patience)


# Catastrophic overfitting -----------------------------------------------------------------------------------------


def test_the_collapse_of_multi_step_robustness_is_found():
    fgsm, hard = [0.3, 0.42, 0.5, 0.55, 0.8, 0.93], [0.25, 0.36, 0.41, 0.42, 0.15, 0.01]
    assert catastrophic_overfitting(fgsm, hard) == 4
    assert catastrophic_overfitting(fgsm[:4], hard[:4]) is None
    assert catastrophic_overfitting(fgsm, hard, drop=0.4) == 5
    assert catastrophic_overfitting([], []) is None


def test_slow_decay_over_several_epochs_counts_from_the_best_one():
    # never more than 0.1 from one epoch to the next
    fgsm = [0.5, 0.6, 0.7, 0.8, 0.9]
    assert catastrophic_overfitting(fgsm, [0.45, 0.36, 0.27, 0.18, 0.09]) == 3


def test_a_run_that_diverges_or_recovers_is_not_meant():
    assert catastrophic_overfitting([0.5, 0.1, 0.1], [0.45, 0.1, 0.1]) is None
    assert catastrophic_overfitting([0.5, 0.5], [0.45, 0.30]) is None  # noise


@pytest.mark.parametrize(
    ("easy", "hard", "message"),
    [
        ([0.5], [0.5, 0.4], "`single_step` has 1 epochs but `multi_step` has 2"),
        ([50.0], [40.0], "`single_step` must lie in"),
        ([0.5], [float("nan")], "`multi_step` must lie in"),
    ],
)
def test_accuracies_must_be_fractions_of_the_same_epochs(easy, hard, message):
    with pytest.raises(ValueError, match=message):
        catastrophic_overfitting(easy, hard)
