"""RPAT's Theorem 2: counter-examples to the printed form, the corrected forms, and exact and power-iterated norms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from perceptual_at import theory
from tests.theory.cases import (
    ALPHAS,
    GRID,
    INSIDE,
    SEEDS,
    SMOOTH,
    cnn,
    examples,
    f64,
    normal,
    pair,
    relu_mlp,
    smooth_net,
)

CORNER, FIRST = f64([[0.0, 1.0]]), f64([[1.0, 0.0]])


def product(x):
    return x[:, :1] * x[:, 1:]


# ---- the printed theorem fails --------------------------------------------------------------------------------------


def relu_pair(x):
    return torch.relu(x[:, :1] - 0.5 + x[:, 1:]) - torch.relu(x[:, :1] - 0.5 - x[:, 1:])


@pytest.mark.parametrize(
    ("h", "x", "start", "end"),
    [
        (product, CORNER, [1.0, 0.0], [1.0, 1.0]),
        (relu_pair, 0 * CORNER, [0.0, 0.0], [0.0, 2.0]),
    ],
    ids=["product", "relu"],
)
def test_without_any_residual_the_jacobian_can_turn(h, x, start, end):
    assert not theory.segment_residual(h, x, FIRST, GRID).any()
    assert_close(theory.batch_jacobian(h, x)[0, 0], f64(start))
    assert_close(theory.batch_jacobian(h, x + FIRST)[0, 0], f64(end))
    left, right = theory.directional_gap(h, x, FIRST, 1.0)
    assert left.item() == 0.0
    assert right.item() >= 1.0


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_without_any_residual_the_jacobian_can_change_as_much_as_it_likes(size):
    def h(x):
        return size * x[:, 1:] * torch.sin(x[:, :1])

    assert not theory.segment_residual(h, 0 * CORNER, 1.5 * FIRST, GRID).any()
    gap = theory.jacobian_gap(h, 0 * CORNER, 1.5 * FIRST, 1.0).item()
    assert gap == pytest.approx(size * math.sin(1.5))


@given(SEEDS, SMOOTH)
@examples(20)
def test_the_slope_along_the_step_is_constant_exactly_when_there_is_no_residual(seed, activation):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 1, 6, 1.0)
    slopes = theory.directional_jacobian(h, x, delta, GRID)
    residual = theory.segment_residual(h, x, delta, INSIDE).abs().max()
    spread = (slopes - slopes[0]).abs().max()
    assert residual > 1e-6
    assert residual <= spread  # q is a difference of two means of the slope, r at most a quarter of it

    def linear(x):
        return h(0 * x) + x @ normal(seed + 3, 6, 4)

    flat = theory.directional_jacobian(linear, x, delta, GRID)
    assert (flat - flat[0]).abs().max() < 1e-14
    assert theory.segment_residual(linear, x, delta, INSIDE).abs().max() < 1e-13


def test_a_cone_has_no_residual_in_any_direction_from_its_tip_and_no_constant_jacobian():
    def cone(x):
        return x.norm(dim=1, keepdim=True)

    tip, steps = torch.zeros(50, 3, dtype=torch.float64), normal(0, 50, 3)
    assert theory.segment_residual(cone, tip, steps, INSIDE).abs().max() < 1e-14
    jacobians = theory.batch_jacobian(cone, steps)
    assert (jacobians - jacobians[0]).norm(dim=-1).max() > 1


@pytest.mark.parametrize(
    "net", [relu_mlp(0, (32, 64, 64, 10)), smooth_net(0, "gelu", (32, 64, 64, 10))], ids=["relu", "gelu"]
)
def test_on_networks_the_step_sees_a_small_part_of_the_change(net):
    left, right = theory.directional_gap(net, *pair(0, 8, 32, 1.0), 1.0)
    share = left / right
    assert (share <= 1).all()
    assert share.mean() < 0.6


# ---- the corrected theorem ------------------------------------------------------------------------------------------


def quadratic(seed, outputs=3, d=5):
    """A random vector quadratic and its symmetric matrices."""
    matrices = normal(seed, outputs, d, d)
    matrices = (matrices + matrices.mT) / 2
    return (lambda x: torch.einsum("bi,cij,bj->bc", x, matrices, x) / 2), matrices


def steepest_change(matrices, seed, starts=12):
    """The direction along which the Jacobian of a quadratic changes fastest, by alternating maximisation."""
    best, where = 0.0, None
    for start in normal(seed, starts, matrices.shape[1]):
        v = start / start.norm()
        for _ in range(100):
            u = torch.einsum("i,cij,j->c", v, matrices, v)
            values, vectors = torch.linalg.eigh(torch.einsum("c,cij->ij", u / u.norm(), matrices))
            v = vectors[:, values.abs().argmax()]
        reached = torch.einsum("i,cij,j->c", v, matrices, v).norm().item()
        best, where = max((best, where), (reached, v), key=lambda pair: pair[0])
    return best, where


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_quotient_is_the_lipschitz_constant_of_the_jacobian(seed):
    h, matrices = quadratic(seed)
    lipschitz, direction = steepest_change(matrices, seed + 50)
    x, delta = normal(seed + 1, 1, 5), 0.7 * direction[None]
    assert_close(theory.lipschitz_quotient(h, x, delta, [0.3, 0.5]), f64([[lipschitz], [lipschitz]]))
    others, steps = normal(seed + 2, 500, 5), normal(seed + 3, 500, 5)
    # No segment exceeds it, and neither does the Jacobian itself, in any direction.
    assert theory.lipschitz_quotient(h, others, steps, 0.5).max() <= lipschitz * (1 + 1e-9)
    left, right = theory.jacobian_gap_bound(h, others, steps, [0.4, 1.0], lipschitz=lipschitz)
    assert (left <= right * (1 + 1e-9)).all()
    change = torch.einsum("cij,i->cj", matrices, direction)
    assert torch.linalg.matrix_norm(change, ord=2).item() == pytest.approx(lipschitz, rel=1e-7)


@given(SEEDS)
@examples(10)
def test_one_segment_bounds_the_lipschitz_constant_from_below_only(seed):
    h, matrices = quadratic(seed)
    lipschitz, _ = steepest_change(matrices, seed, starts=4)
    x, delta = pair(seed, 1, 5, 1.0)
    single = theory.lipschitz_quotient(h, x, delta, 0.5).item()
    assert single < 0.999 * lipschitz
    left, right = theory.jacobian_gap_bound(h, x, delta, 1.0, lipschitz=single)
    assert left > right  # with the constant of one segment the inequality is false


def test_at_a_kink_the_quotient_has_no_upper_limit():
    def kink(x):
        return torch.relu(x)

    lengths = f64([[1.0], [0.1], [0.001]])
    quotient = theory.lipschitz_quotient(kink, -lengths / 2, lengths, 0.5)[0]
    assert_close(quotient, 2 / lengths[:, 0], rtol=1e-9, atol=0)


@pytest.mark.slow
@given(SEEDS, SMOOTH, ALPHAS)
@examples(25)
def test_the_change_of_the_jacobian_is_an_integral_of_the_hessian(seed, activation, alpha):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, 0.5)
    identity = theory.hessian_identity(h, x, delta, normal(seed + 9, 2, 6), [alpha, 1.0], nodes=24)
    assert identity.error <= 1e-9 * (1 + identity.left.abs().max())


def test_identities_of_the_hessian_hold_without_recording_gradients_too():
    net, (x, delta) = relu_mlp(0, activation=nn.SiLU), pair(0, 2, 6, 0.5)
    with torch.no_grad():
        identity = theory.hessian_identity(net, x, delta, delta, 0.5, nodes=24)
        bend = theory.second_derivative(net, x, delta, delta)
    assert identity.error < 1e-10
    assert not identity.right.requires_grad
    assert not bend.requires_grad
    assert theory.second_derivative(net, x, delta, delta).requires_grad


# ---- local Lipschitz bound ------------------------------------------------------------------------------------------


@given(SEEDS, SMOOTH)
@examples(25)
def test_the_local_bound_holds_on_the_segment(seed, activation):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, 1.0)
    bound = theory.local_lipschitz_bound(h, x, delta, [0.25, 0.5, 1.0])
    assert bound.slack >= -1e-12
    gap = theory.jacobian_gap(h, x, delta, [0.25, 0.5, 1.0])
    start, end = (torch.linalg.matrix_norm(theory.batch_jacobian(h, point), ord=2) for point in (x, x + delta))
    assert_close(bound.right, start + gap.amax(0))
    assert ((end - start).abs() <= gap[-1] + 1e-12).all()


def test_the_local_bound_fails_elsewhere_in_the_same_ball():
    x, delta = f64([[0.0, 1.0]]), f64([[0.5, 0.0]])
    bound = theory.local_lipschitz_bound(product, x, delta, [0.5, 1.0]).right
    elsewhere = theory.batch_jacobian(product, x + f64([[0.5, 0.5]])).norm()
    assert_close(bound, f64([1.5]))
    assert elsewhere.item() == pytest.approx(2.5**0.5)  # steeper, at a corner of the same box
    farther = theory.batch_jacobian(product, x + f64([[9.0, 0.0]])).norm()
    assert farther > 6 * bound.item()  # and no global constant at all


# ---- norms of the change --------------------------------------------------------------------------------------------


def test_batch_jacobians_are_those_of_each_sample():
    net, x = cnn(0), normal(1, 3, 3, 8, 8)
    found = theory.batch_jacobian(net, x)
    for sample, jacobian in zip(x, found, strict=True):
        single = torch.func.jacrev(lambda x: net(x[None])[0])(sample)
        assert_close(jacobian, single.flatten(1), rtol=1e-12, atol=1e-12)


@given(SEEDS, SMOOTH, st.sampled_from([(6, 12, 4), (3, 12, 8), (6, 12, 1)]))
@examples(25)
def test_norms_of_the_change_are_those_of_its_matrix(seed, activation, sizes):
    h, (x, delta) = smooth_net(seed, activation, sizes), pair(seed, 2, sizes[0], 1.0)
    change = theory.batch_jacobian(h, x + 0.7 * delta) - theory.batch_jacobian(h, x)
    spectral = theory.jacobian_gap(h, x, delta, 0.7)[0]
    frobenius = theory.jacobian_gap(h, x, delta, 0.7, norm="frobenius")[0]
    assert_close(spectral, torch.linalg.matrix_norm(change, ord=2), rtol=1e-9, atol=1e-10)
    assert_close(frobenius, torch.linalg.matrix_norm(change), rtol=1e-9, atol=1e-10)
    rank = min(sizes[0], sizes[-1])
    assert (spectral <= frobenius * (1 + 1e-12)).all()
    assert (frobenius <= spectral * rank**0.5 * (1 + 1e-12)).all()


@pytest.mark.slow
@given(SEEDS, st.sampled_from(["relu", "tanh", "gelu", "softplus"]))
@examples(30)
def test_power_iteration_climbs_to_the_exact_value_and_never_passes_it(seed, activation):
    h = relu_mlp(seed, (12, 24, 6)) if activation == "relu" else smooth_net(seed, activation, (12, 24, 6))
    x, delta = pair(seed, 2, 12, 1.0)
    exact = theory.jacobian_gap(h, x, delta, [0.3, 1.0])
    history = theory.power_jacobian_gap(h, x, delta, [0.3, 1.0], steps=60)
    assert history.shape == (60, 2, 2)
    tolerance = 1e-12 * (1 + theory.batch_jacobian(h, x).norm())
    assert (history.diff(dim=0) >= 0).all()
    assert (history <= exact + tolerance).all()
    assert (history[-1] >= 0.99 * exact).all()
    assert (history[0] >= theory.directional_gap(h, x, delta, [0.3, 1.0]).left / delta.norm(dim=1) - tolerance).all()


def test_power_iteration_uses_its_generator_and_repeats_itself_without_one():
    h, (x, delta) = relu_mlp(0, (12, 24, 6)), pair(0, 2, 12, 1.0)

    def draw(seed):
        return theory.power_jacobian_gap(
            h, x, delta, 1.0, steps=1, generator=None if seed is None else torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(None), draw(None))
    assert torch.equal(draw(3), draw(3))
    best = torch.stack([draw(seed)[-1] for seed in range(5)])
    assert best.std(0).max() > 0


def test_power_iteration_of_no_change_is_zero():
    assert not theory.power_jacobian_gap(lambda x: 3 * x, *pair(0, 2, 6, 1.0), 0.5, steps=3).any()


@given(SEEDS)
@examples(25)
def test_the_change_along_the_step_is_at_most_the_whole_change(seed):
    h, (x, delta) = relu_mlp(seed), pair(seed, 2, 6, 2.0)
    bound = theory.directional_gap(h, x, delta, [0.3, 1.0])
    assert bound.slack >= -1e-12
    slopes = theory.directional_jacobian(h, x, delta, [0.0, 0.3, 1.0])
    assert_close(bound.left, (slopes[1:] - slopes[0]).norm(dim=-1), rtol=1e-9, atol=1e-12)


@given(SEEDS, st.integers(1, 4))
@examples(40)
def test_sign_ascent_reaches_a_corner_and_never_more_than_the_best_one(seed, outputs):
    matrix = normal(seed, outputs, 8)
    found = theory.linf_to_l2_norm(lambda x: x @ matrix.mT, torch.zeros(1, 8, dtype=torch.float64)).item()
    corners = f64(list(itertools.product([-1.0, 1.0], repeat=8)))
    best = (corners @ matrix.mT).norm(dim=1).max().item()
    assert found <= best * (1 + 1e-12)
    assert found >= 0.9 * best
    if outputs == 1:
        assert found == pytest.approx(matrix.abs().sum().item())


def test_batched_forward_mode_equals_one_sample_at_a_time():
    net, x = cnn(0), normal(1, 3, 3, 8, 8)
    delta = 0.1 * normal(2, 3, 3, 8, 8)
    together = theory.directional_jacobian(net, x, delta, 0.4)[0]
    alone = torch.func.vmap(lambda x, d: torch.func.jvp(lambda y: net(y[None])[0], (x,), (d,))[1])(
        x + 0.4 * delta, delta
    )
    assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_the_change_of_the_jacobian_passes_gradients_to_parameters():
    x, delta = pair(0, 2, 3, 1.0)
    weight = normal(9, 3, 2).requires_grad_()
    gap = theory.jacobian_gap(lambda x: torch.tanh(x @ weight), x, delta, [0.5, 1.0])
    (gradient,) = torch.autograd.grad(gap.sum(), weight)
    assert gradient.abs().max() > 1e-3


def test_works_on_images_and_single_outputs():
    net, x = cnn(0), normal(1, 2, 3, 8, 8)
    assert theory.jacobian_gap(net, x, 0.1 * x, [0.5, 1.0]).shape == (2, 2)
    assert theory.power_jacobian_gap(net, x, 0.1 * x, 0.5, steps=2).shape == (2, 1, 2)

    def single(x):
        return x.flatten(1).square().sum(1)

    assert theory.batch_jacobian(single, x).shape == (2, 1, 192)
    assert_close(theory.jacobian_gap(single, x, 0.1 * x, 1.0)[0], 0.2 * x.flatten(1).norm(dim=1))


def test_errors_name_the_argument():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match="`norm` must be one of 'spectral', 'frobenius', got 'l2'"):
        theory.jacobian_gap(torch.tanh, x, x, 0.5, norm="l2")
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        theory.power_jacobian_gap(torch.tanh, x, x, 0.5, steps=0)
    with pytest.raises(ValueError, match=r"`alphas` must lie in \(0, 1\), got 1"):
        theory.lipschitz_quotient(torch.tanh, x, x, 1)
    with pytest.raises(ValueError, match="`v` has shape"):
        theory.hessian_identity(torch.tanh, x, x, x[:1], 0.5)
