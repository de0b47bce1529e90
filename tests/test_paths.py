"""The straight path, and random places on it."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import Linf, draw_beta, interpolate
from tests.strategies import (
    DTYPES,
    clean_inputs,
    dtype_name,
    dtypes,
    generator,
    normal,
    rows,
    scales,
    seeds,
    shapes,
    threats,
    uniform,
)

places = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))


@given(seeds, shapes, scales, dtypes)
def test_the_ends_of_the_path_are_met_to_the_last_bit(seed, shape, scale, dtype):
    x, x_adv = (normal(seed + i, *shape, scale=scale, dtype=dtype) for i in range(2))
    for start, end in ((0, 1), (0.0, 1.0), (torch.zeros(shape[0]), torch.ones(shape[0]))):
        assert torch.equal(interpolate(x, x_adv, start), x)
        assert torch.equal(interpolate(x, x_adv, end), x_adv)


@given(seeds, shapes, places, scales)
def test_alpha_multiplies_the_perturbation(seed, shape, alpha, scale):
    x, x_adv = (normal(seed + i, *shape, scale=scale) for i in range(2))
    assert_close(interpolate(x, x_adv, alpha), x + alpha * (x_adv - x), rtol=1e-13, atol=1e-15 * scale)


@given(seeds, shapes, places, scales, dtypes)
def test_every_entry_stays_between_its_ends(seed, shape, alpha, scale, dtype):
    x, x_adv = (normal(seed + i, *shape, scale=scale, dtype=dtype) for i in range(2))
    middle = interpolate(x, x_adv, alpha)
    assert middle.dtype == dtype
    assert (middle >= torch.minimum(x, x_adv)).all()
    assert (middle <= torch.maximum(x, x_adv)).all()


@given(threats(), seeds, places)
def test_the_path_to_an_adversarial_input_lies_in_ball_and_box(threat, seed, alpha):
    x = clean_inputs(seed, (3, 7), threat.bounds)
    x_adv = threat.project(x + normal(seed + 1, 3, 7, scale=9.0), x)
    middle = interpolate(x, x_adv, alpha)
    assert (threat.norm(middle - x) <= threat.eps * (1 + 1e-15)).all()
    assert (middle >= threat.bounds[0]).all()
    assert (middle <= threat.bounds[1]).all()


@given(seeds, shapes, places)
def test_a_part_of_the_path_is_an_attack_of_a_smaller_budget(seed, shape, eta):
    threat, x = Linf(0.2), clean_inputs(seed, shape, (0.0, 1.0))
    x_adv = threat.random_start(x, generator=generator(seed))
    reduced = interpolate(x, x_adv, eta)
    assert (threat.norm(reduced - x) <= eta * threat.eps + 1e-15).all()


@given(seeds, shapes)
def test_a_place_per_sample_is_each_samples_own(seed, shape):
    x, x_adv = (normal(seed + i, *shape) for i in range(2))
    alpha = uniform(seed, shape[0])
    together = interpolate(x, x_adv, alpha)
    each = [interpolate(x[i : i + 1], x_adv[i : i + 1], a) for i, a in enumerate(alpha.tolist())]
    assert_close(together, torch.cat(each), rtol=1e-14, atol=1e-15)
    assert_close(together, x + rows(alpha, x) * (x_adv - x), rtol=1e-13, atol=1e-15)
    assert_close(interpolate(x, x_adv, alpha[0]), interpolate(x, x_adv, alpha[0].item()), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_place_of_another_dtype_does_not_widen_the_inputs(dtype):
    x, x_adv = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    for alpha in (0.25, torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25, 0.25], dtype=torch.float16)):
        assert torch.equal(interpolate(x, x_adv, alpha), torch.full((2, 3), 0.25, dtype=dtype))


def test_gradients_flow_into_both_ends_and_the_place():
    x, x_adv = (normal(i, 2, 3).requires_grad_() for i in range(2))
    alpha = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(interpolate(x, x_adv, alpha).sum(), (x, x_adv, alpha))
    assert_close(grads[0], (1 - alpha).detach()[:, None].expand(2, 3))
    assert_close(grads[1], alpha.detach()[:, None].expand(2, 3))
    assert_close(grads[2], (x_adv - x).detach().sum(dim=1))


def test_arguments_are_not_modified():
    x, x_adv = normal(0, 2, 3), normal(1, 2, 3)
    before = x.clone(), x_adv.clone()
    interpolate(x, x_adv, 0.5).add_(1)
    interpolate(x, x_adv, 0.0).add_(1)
    interpolate(x, x_adv, 1.0).add_(1)
    assert torch.equal(x, before[0])
    assert torch.equal(x_adv, before[1])


def test_an_empty_batch_has_an_empty_path():
    assert interpolate(torch.zeros(0, 3), torch.zeros(0, 3), 0.5).shape == (0, 3)
    assert interpolate(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)).shape == (0, 3)


# Random places ----------------------------------------------------------------------------------------------------


def draws(count=4000, seed=0, **options):
    source = generator(seed)
    return torch.tensor([draw_beta(generator=source, **options) for _ in range(count)], dtype=torch.float64)


@pytest.mark.parametrize("concentration", [0.75, 1.0, 4.0])
def test_draws_have_the_moments_of_their_distribution(concentration):
    sample = draws(concentration=concentration)
    variance = 1 / (4 * (2 * concentration + 1))
    assert abs(sample.mean() - 0.5) < 4 * math.sqrt(variance / len(sample))
    assert abs(sample.var() / variance - 1) < 0.1
    assert sample.min() >= 0
    assert sample.max() <= 1


def test_the_default_concentration_is_that_of_the_papers():
    assert torch.equal(draws(10), draws(10, concentration=0.75))


def test_folded_draws_are_the_larger_or_the_smaller_side():
    plain = draws(50)
    assert torch.equal(draws(50, fold="max"), torch.maximum(plain, 1 - plain))
    assert torch.equal(draws(50, fold="min"), torch.minimum(plain, 1 - plain))


def test_a_generator_makes_draws_repeatable_and_moves_on():
    assert torch.equal(draws(5, seed=3), draws(5, seed=3))
    assert len(set(draws(50, seed=3).tolist())) == 50


def test_draws_leave_the_global_random_states_alone():
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    values = {draw_beta() for _ in range(20)}
    draw_beta(generator=generator(0))
    assert len(values) == 20
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("concentration", [5e-324, 1e-308, 1e-3, 0.04, 0.05, 1e12, 1e13, 1e200, 1.7e308])
def test_every_concentration_above_zero_is_drawn_from(concentration):
    drawn = draws(400, concentration=concentration)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(drawn.mean() - 0.5) < 0.1
    variance = 1 / (4 * (2 * min(concentration, 1e300) + 1))
    assert drawn.var(unbiased=False) == pytest.approx(variance, rel=0.3, abs=1e-18)
    folded = draws(20, concentration=concentration, fold="max")
    assert (folded >= 0.5).all()
