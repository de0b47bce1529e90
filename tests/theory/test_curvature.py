"""Second derivatives along a segment, the integrals that give the residual, bounds and certificates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import theory
from tests.theory.cases import (
    ALPHAS,
    GRID,
    INSIDE,
    ONE,
    SCALES,
    SEEDS,
    SMOOTH,
    ZERO,
    cnn,
    examples,
    f64,
    normal,
    on_unit_segment,
    pair,
    polynomial,
    relu_mlp,
    smooth_net,
)

# ---- second derivatives ---------------------------------------------------------------------------------------------


@given(SEEDS, ALPHAS)
@examples(30)
def test_second_derivatives_of_a_quadratic_are_its_matrix(seed, alpha):
    matrix = normal(seed + 1, 5, 5)
    symmetric = matrix + matrix.mT

    def h(x):
        return ((x @ matrix) * x).sum(1, keepdim=True)

    x, delta = pair(seed, 3, 5, 1.0)
    along = (delta @ symmetric * delta).sum(1, keepdim=True)
    assert_close(theory.directional_second_derivative(h, x, delta, alpha)[0], along, rtol=0, atol=1e-12)
    assert_close(theory.second_derivative(h, x, x, delta), (x @ symmetric * delta).sum(1, keepdim=True))


@pytest.mark.slow
@given(SEEDS, SMOOTH)
@examples(30)
def test_mixed_second_derivatives_are_symmetric_and_follow_from_squares(seed, activation):
    h, x = smooth_net(seed, activation), normal(seed + 5, 2, 6)
    u, v = normal(seed + 6, 2, 2, 6)
    mixed = theory.second_derivative(h, x, u, v)
    assert_close(theory.second_derivative(h, x, v, u), mixed, rtol=1e-11, atol=1e-12)

    def square(w):
        return theory.directional_second_derivative(h, x, w, 0.0)[0]

    assert_close((square(u + v) - square(u - v)) / 4, mixed, rtol=1e-9, atol=1e-10)


def test_the_second_derivative_agrees_with_a_full_hessian_of_a_small_network():
    h, (x, delta) = smooth_net(0, "gelu"), pair(0, 1, 6, 1.0)
    hessian = torch.func.hessian(lambda x: h(x[None])[0])(x[0])
    expected = torch.einsum("i,cij,j->c", delta[0], hessian, delta[0])
    assert_close(theory.directional_second_derivative(h, x, delta, 0.0)[0, 0], expected, rtol=1e-12, atol=1e-12)


@given(SEEDS, SMOOTH, ALPHAS)
@examples(40)
def test_three_forward_passes_give_the_second_derivative(seed, activation, alpha):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, 0.3)
    exact = theory.directional_second_derivative(h, x, delta, alpha)
    difference = theory.second_difference(h, x, delta, alpha)
    assert (difference - exact).abs().max() <= 1e-6 * (1 + exact.abs().max())


def test_squares_of_twenty_directions_leave_a_hessian_of_six_inputs_open():
    directions = normal(0, 21, 6)
    squares = torch.einsum("ki,kj->kij", directions, directions).flatten(1)
    assert torch.linalg.matrix_rank(squares[:20]) == 20
    assert torch.linalg.matrix_rank(squares) == 21  # d (d + 1) / 2: now it is determined
    unseen = torch.linalg.svd(squares[:20]).Vh[-16:]
    symmetric = [m.reshape(6, 6) for m in unseen if (m.reshape(6, 6) - m.reshape(6, 6).mT).abs().max() < 1e-9]
    hidden = next(iter(symmetric), None)
    if hidden is None:  # the null space holds the antisymmetric matrices too: project them out
        basis = torch.stack([m.reshape(6, 6) + m.reshape(6, 6).mT for m in unseen])
        hidden = basis[basis.flatten(1).norm(dim=1).argmax()]

    def h(x):
        return (x @ hidden * x).sum(1, keepdim=True)

    zeros = torch.zeros(20, 6, dtype=torch.float64)
    assert theory.directional_second_derivative(h, zeros, directions[:20], 0.0).abs().max() < 1e-12
    assert theory.directional_second_derivative(h, zeros[:1], directions[20:], 0.0).abs().max() > 1e-3


# ---- the residual as an integral ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", range(2, 8))
def test_the_kernel_is_exact_on_monomials(power):
    left, right = theory.peano_identity(*on_unit_segment(lambda t: t**power), [0.1, 0.5, 0.9], nodes=8)
    assert_close(left, right, rtol=0, atol=1e-14)
    places = f64([0.1, 0.5, 0.9])
    assert_close(left.flatten(), places**power - places, rtol=0, atol=1e-15)


@given(SEEDS, SMOOTH, ALPHAS, st.sampled_from([1e-3, 8 / 255, 0.3, 1.0]))
@examples(40)
def test_the_residual_is_the_weighted_integral_of_the_curvature(seed, activation, alpha, scale):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, scale)
    size = max(1.0, h(torch.cat([x, x + delta])).abs().max().item())
    assert theory.peano_identity(h, x, delta, alpha).error <= 1e-9 * size


@given(SEEDS, SMOOTH, ALPHAS, st.sampled_from([1e-3, 8 / 255, 0.3, 1.0]))
@examples(40)
def test_the_quotient_is_the_difference_of_two_mean_slopes(seed, activation, alpha, scale):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, scale)
    size = max(1.0, h(torch.cat([x, x + delta])).abs().max().item())
    assert theory.mean_jacobian_identity(h, x, delta, alpha).error <= 1e-9 * size / (alpha * (1 - alpha))


@pytest.mark.slow
@given(SEEDS, ALPHAS, st.sampled_from([0.3, 1.0, 3.0]))
@examples(30)
def test_for_a_relu_network_the_mean_slopes_hold_and_the_curvature_integral_does_not(seed, alpha, scale):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    (found,) = theory.kinks(net, x, delta)
    exact = theory.mean_jacobian_identity(net, x, delta, alpha, nodes=1, breaks=found.alphas)
    assert exact.error <= 1e-11 * (1 + exact.left.abs().max())
    left, right = theory.peano_identity(net, x, delta, alpha, nodes=4)
    assert not right.any()
    if found.variation > 0:
        assert left.abs().max() > 0


def test_the_identities_hold_at_several_places_and_pass_gradients_on():
    x, delta = pair(0, 2, 3, 1.0)
    weight = normal(9, 3, 2).requires_grad_()
    left, right = theory.peano_identity(lambda x: torch.tanh(x @ weight), x, delta, [0.3, 0.6], nodes=12)
    assert left.shape == right.shape == (2, 2, 2)
    (by_residual,) = torch.autograd.grad(left.square().sum(), weight, retain_graph=True)
    (by_integral,) = torch.autograd.grad(right.square().sum(), weight)
    assert_close(by_residual, by_integral, rtol=1e-7, atol=1e-10)


@given(SEEDS, st.integers(2, 4))
@examples(20)
def test_no_residual_at_any_place_means_no_curvature_along_the_segment(seed, degree):
    curved, (x, delta) = polynomial(seed, degree), pair(seed, 1, 4, 1.0)
    across = torch.linalg.svd(delta).Vh[1:].mT  # coordinates that delta does not change

    def h(x):
        return curved(torch.cat([x @ across, torch.ones_like(x[:, :1])], dim=1)) + x @ delta[0][:, None]

    assert theory.segment_residual(h, x, delta, INSIDE).abs().max() < 1e-12
    assert theory.directional_second_derivative(h, x, delta, GRID).abs().max() < 1e-12
    other = across[:, :1].mT.contiguous()
    assert theory.directional_second_derivative(h, x, other, GRID).abs().max() > 1e-3  # another direction is free


# ---- bounds and certificates ----------------------------------------------------------------------------------------


@pytest.mark.slow
@given(SEEDS, SMOOTH, SCALES)
@examples(40)
def test_the_residual_is_below_half_alpha_one_minus_alpha_times_the_curvature(seed, activation, scale):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, scale)
    left, right = theory.curvature_bound(h, x, delta, [0.1, 0.5, 0.9], points=129)
    noise = 64 * 2.3e-16 * h(torch.cat([x, x + delta])).norm(dim=1).max()
    assert (left <= right * (1 + 1e-2) + noise).all()
    quotient = theory.segment_quotient(h, x, delta, [0.1, 0.5, 0.9]).norm(dim=-1)
    largest = theory.directional_second_derivative(h, x, delta, torch.linspace(0, 1, 129)).norm(dim=-1).amax(0)
    assert (quotient <= largest / 2 * (1 + 1e-2) + noise / 0.09).all()


@given(SEEDS)
@examples(20)
def test_the_curvature_bound_is_an_equality_for_quadratics(seed):
    left, right = theory.curvature_bound(polynomial(seed, 2), *pair(seed, 3, 4, 1.0), [0.1, 0.5, 0.9], points=3)
    assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_the_curvature_bound_fails_for_a_relu_network():
    left, right = theory.curvature_bound(relu_mlp(0), *pair(0, 4, 6, 3.0), 0.5)
    assert not right.any()
    assert left.max() > 0.01


@given(SEEDS, st.sampled_from([0.3, 1.0, 3.0]))
@examples(30)
def test_the_residual_is_below_alpha_one_minus_alpha_times_the_variation_of_the_slope(seed, scale):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    variation = theory.kinks(net, x, delta)[0].variation
    residual = theory.segment_residual(net, x, delta, INSIDE).norm(dim=-1)[:, 0]
    assert (residual <= INSIDE * (1 - INSIDE) * variation + 1e-12).all()


def test_the_bound_by_the_variation_is_reached_by_a_single_kink():
    kink = on_unit_segment(lambda t: torch.relu(t - 0.5))
    assert theory.slope_variation(*kink, points=3).item() == 1.0
    assert theory.segment_residual(*kink, 0.5).item() == -0.25


@given(SEEDS, st.sampled_from([0.3, 1.0, 3.0]))
@examples(20)
def test_a_finer_grid_finds_more_of_the_variation_and_never_too_much(seed, scale):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    exact = theory.kinks(net, x, delta)[0].variation.item()
    found = [theory.slope_variation(net, x, delta, points=2**k + 1).item() for k in (4, 7, 10)]
    assert found[0] <= found[1] + 1e-9
    assert found[1] <= found[2] + 1e-9
    assert found[2] <= exact + 1e-8


def test_for_a_smooth_map_the_variation_is_the_integral_of_the_curvature():
    sine = on_unit_segment(lambda t: torch.sin(2 * math.pi * t))
    assert theory.slope_variation(*sine, points=2001).item() == pytest.approx(8 * math.pi, rel=1e-3)


@given(SEEDS, st.sampled_from([0.3, 1.0, 3.0]), st.integers(1, 12))
@examples(30)
def test_a_grid_and_the_variation_certify_the_largest_residual(seed, scale, points):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    (found,) = theory.kinks(net, x, delta)
    # A piecewise-linear residual is largest at one of its kinks.
    exact = theory.segment_residual(net, x, delta, torch.cat([found.alphas, f64([0.5])])).norm(dim=-1).max()
    low, high = theory.residual_certificate(net, x, delta, points=points, variation=found.variation[None])
    assert low <= exact + 1e-12
    assert exact <= high + 1e-12


@given(SEEDS, SMOOTH, st.integers(1, 12))
@examples(30)
def test_a_grid_and_the_curvature_certify_the_largest_residual(seed, activation, points):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, 1.0)
    curvature = theory.directional_second_derivative(h, x, delta, GRID).norm(dim=-1).amax(0) * 1.01
    low, high = theory.residual_certificate(h, x, delta, points=points, curvature=curvature)
    exact = theory.segment_residual(h, x, delta, INSIDE).norm(dim=-1).amax(0)
    assert (low <= exact + 1e-3).all()  # the dense grid may miss a little of the maximum that `low` found
    assert (exact <= high + 1e-12).all()


def test_the_certificates_margin_shrinks_as_stated():
    square = on_unit_segment(torch.square)
    for points in (1, 3, 7):
        low, high = theory.residual_certificate(*square, points=points, curvature=f64([2.0]))
        assert (high - low).item() == pytest.approx(2 / 8 / (points + 1) ** 2)
        low, high = theory.residual_certificate(*square, points=points, variation=f64([2.0]))
        assert (high - low).item() == pytest.approx(2 / 4 / (points + 1))


def test_works_on_images_and_single_outputs():
    net, x = cnn(0, torch.nn.GELU), normal(1, 2, 3, 8, 8)
    assert theory.directional_second_derivative(net, x, 0.1 * x, [0.0, 0.5]).shape == (2, 2, 5)
    assert theory.second_difference(net, x, 0.1 * x, [0.0, 0.5]).shape == (2, 2, 5)
    assert theory.curvature_bound(net, x, 0.1 * x, [0.2, 0.5], points=3).left.shape == (2, 2)
    assert theory.slope_variation(net, x, 0.1 * x, points=3).shape == (2,)
    assert theory.slope_variation(lambda x: x.flatten(1).square().sum(1), x, 0.1 * x, points=3).shape == (2,)


def test_errors_say_what_is_missing():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match="exactly one of `variation` and `curvature` must be given, got neither"):
        theory.residual_certificate(torch.tanh, x, x)
    with pytest.raises(ValueError, match="got both"):
        theory.residual_certificate(torch.tanh, x, x, variation=ONE, curvature=ONE)
    with pytest.raises(ValueError, match=r"`step` must lie in \(0, 1\], got 0"):
        theory.second_difference(torch.tanh, x, x, 0.5, step=0)
    with pytest.raises(ValueError, match="`points` must lie in"):
        theory.slope_variation(torch.tanh, x, x, points=2)
    with pytest.raises(ValueError, match="`nodes` must be at least 1"):
        theory.peano_identity(torch.tanh, x, x, 0.5, nodes=0)
    with pytest.raises(ValueError, match=r"`v` has shape \(1, 1\)"):
        theory.second_derivative(torch.tanh, x, x, ZERO)
