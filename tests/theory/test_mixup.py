"""RAAT's Theorem 2: what holds before the attack, what the attack adds, and where the printed form fails."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import theory
from tests.theory.cases import (
    ALPHAS,
    ONE,
    SEEDS,
    SMOOTH,
    ZERO,
    cnn,
    examples,
    f64,
    normal,
    pair,
    polynomial,
    smooth_net,
)

# ---- two views, no attack -------------------------------------------------------------------------------------------


@given(SEEDS, SMOOTH, ALPHAS)
@examples(40)
def test_the_mixup_residual_is_the_segment_residual_at_the_other_weight(seed, activation, mix):
    h, (x1, step) = smooth_net(seed, activation), pair(seed, 3, 6, 1.0)
    x2 = x1 + step
    residual = theory.mixup_residual(h, x1, x2, mix)
    assert_close(residual, h(mix * x1 + (1 - mix) * x2) - mix * h(x1) - (1 - mix) * h(x2), rtol=0, atol=1e-12)
    assert_close(residual, theory.segment_residual(h, x1, step, 1 - mix)[0], rtol=0, atol=1e-12)
    assert_close(theory.mixup_residual(h, x2, x1, 1 - mix), residual, rtol=0, atol=1e-12)


def test_each_sample_may_have_its_own_weight():
    h, (x1, step) = smooth_net(0, "tanh"), pair(0, 3, 6, 1.0)
    mix = f64([0.0, 0.3, 1.0])
    together = theory.mixup_residual(h, x1, x1 + step, mix)
    for i in range(3):
        alone = theory.mixup_residual(h, x1[i : i + 1], (x1 + step)[i : i + 1], mix[i].item())
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-14)
    assert together[[0, 2]].abs().max() < 1e-15  # nothing is mixed
    taylor = theory.taylor_mixup_residual(h, x1, x1 + step, mix, order=2)
    assert taylor[[0, 2]].abs().max() < 1e-15


@pytest.mark.slow
@given(SEEDS, st.integers(1, 4), ALPHAS)
@examples(40)
def test_for_polynomials_the_taylor_form_is_exact_with_this_sign(seed, degree, mix):
    h, (x1, step) = polynomial(seed, degree), pair(seed, 3, 4, 1.0)
    residual = theory.mixup_residual(h, x1, x1 + step, mix)
    taylor = theory.taylor_mixup_residual(h, x1, x1 + step, mix)
    scale = 1 + theory.taylor_coefficients(h, x1, step).abs().sum()
    assert (taylor - residual).abs().max() <= 1e-12 * scale
    if degree == 2 and residual.abs().max() > 1e-6:
        assert (-taylor - residual).abs().max() > 1e-6  # the printed sign (only its square is used there)


@pytest.mark.slow
@given(SEEDS, st.sampled_from(["softplus", "gelu", "silu", "sin"]), ALPHAS, st.integers(1, 3))
@examples(40)
def test_the_remainder_is_the_difference_of_two_integrals(seed, activation, mix, order):
    h, (x1, step) = smooth_net(seed, activation), pair(seed, 2, 6, 0.5)
    identity = theory.mixup_identity(h, x1, x1 + step, mix, order=order, nodes=24)
    assert identity.error <= 1e-9 * (1 + identity.left.abs().max())


@pytest.mark.parametrize("order", [2, 3])
def test_the_remainder_has_one_order_more_than_printed(order):
    h, (x1, step) = smooth_net(3, "tanh"), pair(3, 1, 6, 1.0)
    sizes = f64([0.02, 0.01])
    rest = [theory.mixup_identity(h, x1, x1 + size * step, 0.3, order=order).right.norm() for size in sizes]
    slope = (torch.stack(rest).log().diff() / sizes.log().diff()).item()
    assert slope == pytest.approx(order + 1, abs=0.15)


def test_the_printed_statement_sees_nothing_of_two_augmentations():
    def h(x):
        return x.square().sum(1, keepdim=True)

    x1, x2 = f64([[0.3, 0.2]]), f64([[0.35, 0.25]])
    attack = 1e-9 * f64([[1.0, -1.0]])  # the adversarial Delta of the printed theorem, eps -> 0
    left = theory.mixup_residual(h, x1 + attack, x2 + attack, 0.3).square()
    printed = theory.taylor_residual(theory.taylor_coefficients(h, x1, attack, order=2), 0.7).square()
    corrected = theory.taylor_mixup_residual(h, x1, x2, 0.3, order=2).square()
    assert printed.item() < 1e-30
    assert left.item() > 1e-7
    assert_close(left, corrected, rtol=1e-6, atol=0)


def test_the_base_point_of_the_expansion_is_the_first_view_not_the_image():
    def cube(x):
        return x**3

    image, x1, x2, mix = f64([[0.5]]), f64([[0.8]]), f64([[0.3]]), 0.3
    residual = theory.mixup_residual(cube, x1, x2, mix)
    at_view = theory.taylor_mixup_residual(cube, x1, x2, mix, order=3)
    at_image = theory.taylor_mixup_residual(cube, image, image + (x2 - x1), mix, order=3)
    assert_close(at_view, residual)
    assert (at_image - residual).abs() > 0.02


def partial_sums(function, start, step, orders):
    """Sums of the Taylor series of the mixup residual with weight 1/2 in 60 digits, and the true residual."""
    with mpmath.workdps(60):
        start, step, half = mpmath.mpf(start), mpmath.mpf(step), mpmath.mpf("0.5")
        coefficients = mpmath.taylor(lambda t: function(start + step * t), 0, max(orders))
        sums = [float(sum((half**k - half) * coefficients[k] for k in range(2, order + 1))) for order in orders]
        ends = (function(start) + function(start + step)) / 2
        return sums, float(function(start + step / 2) - ends)


def test_a_step_below_one_is_not_enough_for_the_series_to_converge():
    sums, true = partial_sums(lambda t: 1 / (1 + 25 * t**2), 0, 0.9, [2, 4, 6, 8])
    assert true == pytest.approx(-0.359, abs=1e-3)
    assert sums[0] == pytest.approx(5.06, abs=0.01)
    assert all(abs(later) > 20 * abs(earlier) for earlier, later in itertools.pairwise(sums[:3]))


@pytest.mark.slow
def test_an_analytic_activation_beyond_its_radius_of_convergence_diverges_and_within_it_converges():
    slope_two = partial_sums(lambda t: mpmath.tanh(2 * t + mpmath.mpf("0.3")), 0, 0.9, [16, 64])
    assert slope_two[1] == pytest.approx(0.203, abs=1e-3)
    assert abs(slope_two[0][1]) > 100
    slope_one = partial_sums(lambda t: mpmath.tanh(t + mpmath.mpf("0.3")), 0, 0.9, [32, 64])
    assert slope_one[0][1] == pytest.approx(slope_one[1], abs=1e-12)


def test_rescaling_the_input_changes_no_term_of_the_series():
    h, (x1, step) = smooth_net(0, "tanh"), pair(0, 2, 6, 3.0)

    def shrunk(x):
        return h(1024 * x)

    for order in (2, 3, 4):
        ours = theory.taylor_mixup_residual(h, x1, x1 + step, 0.3, order=order)
        other = theory.taylor_mixup_residual(shrunk, x1 / 1024, (x1 + step) / 1024, 0.3, order=order)
        assert_close(ours, other, rtol=0, atol=0)


def test_one_weight_leaves_the_derivatives_free_to_cancel():
    def cubic(t):
        return (t - 0.5) ** 3 - (t - 0.5) / 4

    assert theory.mixup_residual(cubic, ZERO, ONE, 0.5).abs() < 1e-16
    assert theory.taylor_coefficients(cubic, ZERO, ONE)[2:].abs().max() > 0.5
    assert theory.mixup_residual(cubic, ZERO, ONE, 0.2).abs() > 0.04


@pytest.mark.parametrize(
    ("gamma", "weight"), [(0.75, 0.0292), (1.0, 1 / 30), (1e9, 1 / 16)], ids=["Beta(3/4, 3/4)", "uniform", "one half"]
)
def test_random_weights_look_at_the_curvature_less_than_one_half_does(gamma, weight):
    # E[(l - l^2)^2] for l ~ Beta(g, g), from its moments.
    def moment(k):
        return math.prod((gamma + i) / (2 * gamma + i) for i in range(k))

    assert moment(2) - 2 * moment(3) + moment(4) == pytest.approx(weight, abs=5e-5)
    draws = torch.distributions.Beta(f64(gamma), f64(gamma)).sample((200_000,)) if gamma < 10 else f64([0.5])
    assert (draws - draws**2).square().mean().item() == pytest.approx(weight, abs=3e-4)


# ---- with an attack -------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(["softplus", "gelu", "silu"]), ALPHAS, st.sampled_from([8 / 255, 0.1]))
@examples(40)
def test_what_dicar_compares_is_curvature_plus_an_integral_of_the_slope(seed, activation, mix, eps):
    h, (x1, step) = smooth_net(seed, activation), pair(seed, 2, 6, 0.5)
    delta1, delta2 = eps * normal(seed + 3, 2, 2, 6).sign()
    identity = theory.adversarial_mixup_identity(h, x1, x1 + step, delta1, delta2, mix)
    assert identity.error <= 1e-11 * (1 + h(x1).abs().max())


def test_beyond_the_first_order_term_the_attack_adds_its_square():
    h, (x1, step) = smooth_net(0, "softplus"), pair(0, 1, 6, 0.5)
    delta1, delta2 = normal(3, 2, 1, 6).sign()
    still = theory.mixup_residual(h, x1, x1 + step, 0.3)
    sizes, rest, first = f64([0.02, 0.01]), [], []
    for eps in sizes:
        left, _ = theory.adversarial_mixup_identity(h, x1, x1 + step, eps * delta1, eps * delta2, 0.3)
        term = theory.adversarial_first_order_term(h, x1, x1 + step, eps * delta1, eps * delta2, 0.3)
        rest.append((left - still - term).norm())
        first.append((left - still).norm())

    def slope(values):
        return (torch.stack(values).log().diff() / sizes.log().diff()).item()

    assert slope(rest) == pytest.approx(2, abs=0.1)
    assert slope(first) == pytest.approx(1, abs=0.1)  # the printed theorem has no term of this order


@given(SEEDS, ALPHAS)
@examples(20)
def test_for_an_affine_map_dicar_is_the_slope_along_the_attack_and_nothing_else(seed, mix):
    weight, bias = normal(seed, 6, 4), normal(seed + 1, 4)
    x1, x2 = normal(seed + 2, 2, 3, 6)
    delta1, delta2 = 0.03 * normal(seed + 3, 2, 3, 6).sign()
    left, _ = theory.adversarial_mixup_identity(lambda x: x @ weight + bias, x1, x2, delta1, delta2, mix)
    shift = mix * delta1 + (1 - mix) * delta2
    assert_close(left, shift @ weight, rtol=0, atol=1e-13)
    assert left.abs().max() > 1e-3  # a perfectly aligned map is penalised all the same


def test_opposite_attacks_cancel():
    h, (x1, step) = smooth_net(0, "gelu"), pair(0, 2, 6, 0.5)
    delta = 0.03 * normal(3, 2, 6).sign()
    term = theory.adversarial_first_order_term(h, x1, x1 + step, 0.7 / 0.3 * -delta, delta, 0.3)
    assert term.abs().max() < 1e-15


def test_for_close_views_the_attack_dominates_at_the_usual_budget():
    h, (x1, step) = smooth_net(0, "softplus", (64, 64, 64, 10)), pair(0, 4, 64, 1.0)
    crossovers = [theory.crossover_eps(h, x1, x1 + size * step, 0.5).max().item() for size in (0.02, 0.2, 1.0)]
    assert crossovers == sorted(crossovers)
    assert crossovers[0] < 0.01 * 8 / 255
    assert crossovers[-1] < 8 / 255
    slope = math.log(crossovers[1] / crossovers[0]) / math.log(10)
    assert slope == pytest.approx(2, abs=0.2)  # the residual shrinks with the square of the distance


@given(SEEDS)
@examples(20)
def test_the_crossover_is_where_both_parts_are_equally_long(seed):
    h, (x1, step) = polynomial(seed, 2, outputs=1), pair(seed, 2, 4, 0.5)
    eps = theory.crossover_eps(h, x1, x1 + step, 0.4)[:, None]
    gradient = theory.batch_jacobian(h, x1 + 0.6 * step)[:, 0]
    worst = eps * gradient.sign()
    term = theory.adversarial_first_order_term(h, x1, x1 + step, worst, worst, 0.4)
    assert_close(term.abs(), theory.mixup_residual(h, x1, x1 + step, 0.4).abs())


@given(SEEDS, ALPHAS, st.sampled_from([0.0, 8 / 255, 0.4]))
@examples(30)
def test_all_mixtures_of_two_attacked_images_fill_a_box(seed, mix, eps):
    x1, x2 = normal(seed, 2, 3, 5).sigmoid()
    low, high = theory.mixup_box(x1, x2, mix, eps=eps)
    shifts = 2 * normal(seed + 1, 2, 200, 3, 5).sigmoid() - 1
    inside = mix * (x1 + eps * shifts[0]).clamp(0, 1) + (1 - mix) * (x2 + eps * shifts[1]).clamp(0, 1)
    assert (inside >= low - 1e-15).all()
    assert (inside <= high + 1e-15).all()
    for corner, sign in ((low, -1), (high, 1)):  # both ends are reached by attacks inside box and ball
        reached = mix * (x1 + sign * eps).clamp(0, 1) + (1 - mix) * (x2 + sign * eps).clamp(0, 1)
        assert_close(corner, reached, rtol=0, atol=1e-15)
    away = eps + 1e-12
    assert (high - (mix * x1 + (1 - mix) * x2) <= away).all()


def test_works_on_images():
    net, x = cnn(0), normal(1, 2, 3, 8, 8).sigmoid()
    assert theory.mixup_residual(net, x, x.flip(0), f64([0.2, 0.5])).shape == (2, 5)
    assert theory.crossover_eps(net, x, x.flip(0), 0.5).shape == (2,)
    assert theory.mixup_box(x, x.flip(0), f64([0.2, 0.5]), eps=0.1)[0].shape == x.shape


def test_errors_say_what_came_and_what_was_wanted():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match=r"mixup_residual: `mix` must lie in \[0, 1\], got 1.2"):
        theory.mixup_residual(torch.tanh, x, x, 1.2)
    with pytest.raises(ValueError, match=r"`mix` must be a number or a tensor of shape \(2,\), got shape \(3,\)"):
        theory.mixup_residual(torch.tanh, x, x, torch.rand(3))
    with pytest.raises(ValueError, match="`x2` has shape"):
        theory.mixup_residual(torch.tanh, x, x[:1], 0.5)
    with pytest.raises(ValueError, match="`order` must lie in"):
        theory.mixup_identity(torch.tanh, x, x, 0.5, order=4)
    with pytest.raises(ValueError, match="`eps` must lie in"):
        theory.mixup_box(x, x, 0.5, eps=-1.0)
