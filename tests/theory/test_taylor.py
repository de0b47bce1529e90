"""The segment residual, the two readings of robust perception, and Taylor series along a segment."""

import itertools
import math

import mpmath
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
    spiral,
)

EPS = torch.finfo(torch.float64).eps


# ---- what the residual is -------------------------------------------------------------------------------------------


@given(SEEDS, ALPHAS, SCALES)
@examples(50)
def test_the_residual_of_an_affine_map_is_rounding(seed, alpha, scale):
    x, delta = pair(seed, 3, 5, scale)
    weight, bias = normal(seed + 1, 5, 4), normal(seed + 2, 4)
    values = torch.cat([x @ weight + bias, (x + delta) @ weight + bias])
    residual = theory.segment_residual(lambda x: x @ weight + bias, x, delta, alpha)
    assert residual.abs().max() <= 64 * EPS * values.abs().max()


@given(SEEDS, SMOOTH, ALPHAS, SCALES)
@examples(50)
def test_residual_and_quotient_are_what_the_equations_say(seed, activation, alpha, scale):
    h = smooth_net(seed, activation)
    x, delta = pair(seed, 3, 6, scale)
    clean, mid, adv = h(x), h(x + alpha * delta), h(x + delta)
    noise = 64 * EPS * torch.stack([clean, mid, adv]).abs().max().item()
    assert_close(
        theory.segment_residual(h, x, delta, alpha)[0], mid - (1 - alpha) * clean - alpha * adv, rtol=0, atol=noise
    )
    slopes = (mid - clean) / alpha - (adv - mid) / (1 - alpha)
    assert_close(theory.segment_quotient(h, x, delta, alpha)[0], slopes, rtol=0, atol=noise / (alpha * (1 - alpha)))


@given(SEEDS, SMOOTH, ALPHAS)
@examples(30)
def test_walking_backwards_gives_the_same_residual_and_the_opposite_quotient_slopes(seed, activation, alpha):
    h = smooth_net(seed, activation)
    x, delta = pair(seed, 2, 6, 1.0)
    forwards = theory.segment_residual(h, x, delta, alpha)
    assert_close(theory.segment_residual(h, x + delta, -delta, 1 - alpha), forwards, rtol=0, atol=1e-13)


def test_several_places_have_their_own_first_dimension_for_images_and_for_single_outputs():
    net, x = cnn(0), normal(1, 2, 3, 8, 8)
    assert theory.segment_residual(net, x, 0.1 * x, [0.25, 0.5, 0.75]).shape == (3, 2, 5)
    assert theory.segment_quotient(net, x, 0.1 * x, torch.tensor([0.25, 0.5])).shape == (2, 2, 5)
    assert theory.segment_residual(lambda x: x.flatten(1).square().sum(1), x, x, 0.5).shape == (1, 2)
    assert theory.norm_defect(lambda x: x.flatten(1).square().sum(1), x, x, 0.5).shape == (1, 2)


def test_each_place_and_each_sample_is_independent_of_the_others():
    net, (x, delta) = relu_mlp(3), pair(3, 4, 6, 2.0)
    together = theory.segment_residual(net, x, delta, [0.2, 0.7])
    for i, (place, sample) in enumerate(itertools.product([0.2, 0.7], range(4))):
        alone = theory.segment_residual(net, x[sample : sample + 1], delta[sample : sample + 1], place)
        assert_close(together[i // 4, sample], alone[0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("alpha", "factor"), [(0.5, 16.0), (0.2, 39.0625), (0.8, 39.0625)])
def test_a_squared_error_of_the_quotient_is_a_multiple_of_that_of_the_residual(alpha, factor):
    h, (x, delta) = smooth_net(0, "gelu"), pair(0, 3, 6, 1.0)
    residual, quotient = (f(h, x, delta, alpha) for f in (theory.segment_residual, theory.segment_quotient))
    assert_close(quotient.square().mean() / residual.square().mean(), f64(factor))


@given(SEEDS, SMOOTH)
@examples(30)
def test_the_quotient_has_limits_at_both_ends(seed, activation):
    h, (x, delta) = smooth_net(seed, activation), pair(seed, 2, 6, 1.0)
    start, end = theory.directional_jacobian(h, x, delta, [0.0, 1.0])
    chord = h(x + delta) - h(x)
    near = theory.segment_quotient(h, x, delta, [1e-6, 1 - 1e-6])
    assert_close(near, torch.stack([start - chord, chord - end]), rtol=0, atol=1e-4)


def test_in_float32_the_residual_of_a_small_perturbation_is_above_its_noise():
    net, (x, delta) = relu_mlp(1, (32, 64, 64, 10)), pair(1, 8, 32, 8 / 255 * 32**0.5)
    exact = theory.segment_residual(net, x, delta, 0.5)
    rounded = theory.segment_residual(net.float(), x.float(), delta.float(), 0.5)
    assert (rounded - exact).abs().max() < 2e-6
    assert exact.abs().max() > 1e-4


def test_the_residual_passes_gradients_to_inputs_and_parameters():
    x, delta = (tensor[:, :3].clone().requires_grad_() for tensor in pair(0, 2, 6, 1.0))
    weight = normal(9, 3, 2).requires_grad_()

    def residual(x, delta, weight):
        return theory.segment_residual(lambda x: torch.tanh(x @ weight), x, delta, [0.3, 0.6])

    assert torch.autograd.gradcheck(residual, (x, delta, weight))


# ---- lengths against vectors: RPAT's Definition 1 and Equation 5 ----------------------------------------------------


@given(SEEDS, st.integers(1, 8), ALPHAS)
@examples(100)
def test_stewarts_theorem_gives_the_squared_residual_from_three_lengths(seed, d, alpha):
    points = normal(seed, 3, d)
    # A parabola through any three points, at 0, at alpha and at 1.
    start, middle, end = points
    bend = (middle - (1 - alpha) * start - alpha * end) / (alpha * (alpha - 1))

    def h(t):
        return start + t * (end - start) + t * (t - 1) * bend

    left, right = theory.stewart_identity(*on_unit_segment(h), alpha)
    lengths = sum((a - b).square().sum() for a, b in itertools.combinations(points, 2))
    # The parabola itself is evaluated with rounding of its own, hence the factor 32 on the size of the points.
    assert (left - right).abs().max() <= 32 * EPS * (lengths + points.square().sum() + bend.square().sum())
    assert_close(left[0, 0], (middle - (1 - alpha) * start - alpha * end).square().sum(), rtol=1e-9, atol=1e-12)


def test_a_spiral_meets_the_printed_definition_and_is_far_from_its_chord():
    segment = on_unit_segment(spiral)
    assert theory.norm_defect(*segment, GRID).abs().max() < 1e-15
    residual = theory.segment_residual(*segment, GRID)
    assert residual.norm(dim=-1).max().item() == pytest.approx(1.158, abs=1e-3)
    assert_close(theory.segment_residual(*segment, 0.5)[0, 0], f64([-1.0, 0.0]))


@given(SEEDS)
@examples(20)
def test_any_curve_of_the_right_speed_meets_the_printed_definition(seed):
    bend = normal(seed, 3)

    def phase(t):
        return bend[0] * t + bend[1] * t**2 + bend[2] * torch.sin(5 * t)

    def h(t):
        return torch.cat([t * torch.cos(phase(t)), t * torch.sin(phase(t))], dim=1)

    assert theory.norm_defect(*on_unit_segment(h), GRID).abs().max() < 1e-15
    assert theory.segment_residual(*on_unit_segment(h), GRID).abs().max() > 1e-3


def test_under_the_printed_definition_the_residual_is_what_the_second_length_lacks():
    left, _ = theory.stewart_identity(*on_unit_segment(spiral), GRID)
    second = (spiral(ONE) - spiral(GRID[:, None])).square().sum(1)
    assert_close(left[:, 0], GRID * (second - (1 - GRID) ** 2), rtol=0, atol=1e-14)


def test_the_printed_definition_allows_curvature_across_the_slope_only():
    _, slope, half_bend = theory.taylor_coefficients(*on_unit_segment(spiral), order=2)[:, 0]
    assert slope.norm().item() == pytest.approx(1.0)  # the length of the whole change
    assert (slope @ half_bend).abs() < 1e-15
    assert_close(2 * half_bend, f64([0.0, 4 * math.pi]))  # so Theorem 1 fails: 12.57, not 0


@given(SEEDS, SMOOTH)
@examples(30)
def test_for_a_single_output_lengths_and_vectors_agree_wherever_the_direction_does(seed, activation):
    h, (x, delta) = smooth_net(seed, activation, (6, 12, 1)), pair(seed, 2, 6, 1.0)
    defect, residual = theory.norm_defect(h, x, delta, INSIDE), theory.segment_residual(h, x, delta, INSIDE)[..., 0]
    points = x + INSIDE[:, None, None] * delta
    moved, whole = h(points)[..., 0] - h(x)[:, 0], (h(x + delta) - h(x))[:, 0]
    same = moved * whole > 0
    assert_close(defect.abs()[same], residual.abs()[same], rtol=0, atol=1e-13)
    # Where the direction differs the curve has passed its start, and there the length is zero instead of positive.
    assert (residual.abs()[~same] >= defect.abs()[~same] - 1e-13).all()


@pytest.mark.parametrize(
    ("curve", "order", "largest"),
    [
        (lambda t: torch.cat([t**2 / 2, t - t**2 / 2], dim=1), 1, 2**0.5 / 8),
        (lambda t: torch.cat([t, 0.1 * torch.sin(2 * math.pi * t)], dim=1), math.inf, 0.1),
    ],
    ids=["l1", "linf"],
)
def test_norms_that_are_not_strictly_convex_do_not_see_a_bend_even_from_both_ends(curve, order, largest):
    clean, middle, adv = curve(ZERO), curve(GRID[:, None]), curve(ONE)
    whole = torch.linalg.vector_norm(adv - clean, ord=order, dim=1)
    first = torch.linalg.vector_norm(middle - clean, ord=order, dim=1)
    second = torch.linalg.vector_norm(adv - middle, ord=order, dim=1)
    assert_close(first, GRID * whole)
    assert_close(second, (1 - GRID) * whole, rtol=0, atol=1e-12)
    residual = theory.segment_residual(*on_unit_segment(curve), GRID)
    assert residual.norm(dim=-1).max().item() == pytest.approx(largest, abs=1e-3)


def test_a_constant_map_meets_both_readings():
    segment = on_unit_segment(lambda t: torch.ones_like(t))
    assert not theory.segment_residual(*segment, GRID).any()
    assert not theory.norm_defect(*segment, GRID).any()


def test_a_loss_on_lengths_has_no_gradient_where_the_loss_on_vectors_has_one():
    winding = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    segment = on_unit_segment(lambda t: spiral(t, winding))
    by_length = theory.norm_defect(*segment, INSIDE).square().mean()
    by_vector = theory.segment_residual(*segment, 0.3).square().sum()
    (no_gradient,) = torch.autograd.grad(by_length, winding)
    (gradient,) = torch.autograd.grad(by_vector, winding)
    assert by_length < 1e-30
    assert no_gradient.abs() < 1e-15
    assert by_vector > 0.3
    assert gradient > 0.4


def test_a_kl_surrogate_sees_the_residual_up_to_a_shift_of_all_logits():
    log_p = normal(0, 1, 5).log_softmax(1)
    shifted = (log_p + 0.7).log_softmax(1)
    assert (shifted.exp() * (shifted - log_p)).sum().abs() < 1e-15
    small = 1e-3 * normal(1, 1, 5)
    log_q = (log_p + small).log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    mean = (log_p.exp() * small).sum()
    assert_close(kl, (log_p.exp() * (small - mean).square()).sum() / 2, rtol=2e-3, atol=0)


# ---- one place decides nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "largest"),
    [
        (lambda t: (t - 0.5) ** 3 - (t - 0.5) / 4, 0.0481),
        (lambda t: torch.sin(2 * math.pi * t), 1.0),
    ],
    ids=["cubic", "sine"],
)
def test_the_midpoint_does_not_see_a_curve_that_is_odd_about_it(curve, largest):
    assert theory.segment_residual(*on_unit_segment(curve), 0.5).abs().max() < 1e-15
    assert theory.segment_residual(*on_unit_segment(curve), GRID).abs().max().item() == pytest.approx(largest, abs=1e-3)


def test_a_hat_of_three_kinks_shows_on_its_own_support_only_and_a_single_kink_everywhere():
    def hat(t):
        return torch.relu(t - 0.2) - 2 * torch.relu(t - 0.25) + torch.relu(t - 0.3)

    seen = theory.segment_residual(*on_unit_segment(hat), INSIDE).abs() > 1e-12
    assert seen.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not seen[len(INSIDE) // 2].any()

    def kink(t):
        return torch.relu(t - 0.37)

    assert (theory.segment_residual(*on_unit_segment(kink), INSIDE).abs() > 1e-4).all()


def test_a_quintic_fools_three_places_and_no_polynomial_fools_one_less_than_its_degree():
    def quintic(t):
        return t * (1 - t) * (t - 0.2) * (t - 0.4) * (t - 0.6)

    assert theory.segment_residual(*on_unit_segment(quintic), [0.2, 0.4, 0.6]).abs().max() < 1e-16
    assert theory.segment_residual(*on_unit_segment(quintic), 0.8).abs().max() > 1e-3
    for degree in range(2, 7):
        places = torch.linspace(0, 1, degree + 1, dtype=torch.float64)[1:-1]
        powers = torch.arange(2, degree + 1)
        monomials = theory.segment_residual(*on_unit_segment(lambda t, powers=powers: t**powers), places)[:, 0]
        assert torch.linalg.matrix_rank(monomials) == degree - 1  # zero residuals leave zero coefficients


def test_a_residual_that_tends_to_zero_leaves_the_curvature_where_it_was():
    bound = 2 * math.sqrt(2 * (2 * math.pi) ** 4 / 3)  # 2 sqrt(tau M4 / 3), the same for all n
    assert bound == pytest.approx(64.5, abs=0.1)
    for n, largest in [(1, 2.0), (4, 0.125), (16, 0.0078125), (64, 4.8828125e-4)]:
        segment = on_unit_segment(lambda t, n=n: torch.cos(2 * math.pi * n * t) / n**2)
        grid = torch.linspace(0, 1, 8 * n + 1, dtype=torch.float64)
        assert theory.segment_residual(*segment, grid).abs().max().item() == pytest.approx(largest, rel=1e-9)
        bend = theory.directional_second_derivative(*segment, 0.0).item()
        assert bend == pytest.approx(-4 * math.pi**2, rel=1e-9)  # -39.5
        assert abs(bend) <= bound


def test_halving_for_ever_needs_a_derivative_at_the_start():
    def wave(s):  # zero residual at 1/2 for every shrunk copy of the segment, and not affine
        return s * torch.sin(2 * math.pi * torch.log2(s.clamp_min(1e-300)))

    for length in (3.0, 1.0, 0.6, 0.1):
        segment = (wave, ZERO, length * ONE)
        assert theory.segment_residual(*segment, 0.5).abs().max() < 1e-14
    assert theory.segment_residual(wave, ZERO, 3 * ONE, 0.7).abs().max() > 1


@pytest.mark.slow
def test_training_at_the_midpoint_leaves_a_residual_elsewhere_and_random_places_do_not():
    t = torch.linspace(0, 1, 65, dtype=torch.float64)[:, None]
    target = torch.sin(2 * math.pi * t)  # odd about the midpoint
    largest = {}
    for places in ("midpoint", "random"):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(800):
            alpha = torch.full((4,), 0.5) if places == "midpoint" else torch.rand(4, generator=generator)
            penalty = theory.segment_residual(net, ZERO, ONE, alpha.double()).square().mean()
            loss = (net(t) - target).square().mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        largest[places] = theory.segment_residual(net, ZERO, ONE, GRID).abs().max().item()
        assert theory.segment_residual(net, ZERO, ONE, 0.5).abs().max() < 0.1
    assert largest["midpoint"] > 0.8
    assert largest["random"] < 0.2


# ---- Taylor series --------------------------------------------------------------------------------------------------

MPMATH = {
    "tanh": (torch.tanh, mpmath.tanh),
    "softplus": (nn.functional.softplus, lambda t: mpmath.log(1 + mpmath.exp(t))),
    "gelu": (nn.functional.gelu, lambda t: t * mpmath.ncdf(t)),
    "gelu_tanh": (
        lambda t: nn.functional.gelu(t, approximate="tanh"),
        lambda t: t / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf("0.044715") * t**3))),
    ),
    "silu": (nn.functional.silu, lambda t: t / (1 + mpmath.exp(-t))),
    "sigmoid": (torch.sigmoid, lambda t: 1 / (1 + mpmath.exp(-t))),
    "elu": (nn.functional.elu, lambda t: t if t > 0 else mpmath.expm1(t)),
    "mish": (nn.functional.mish, lambda t: t * mpmath.tanh(mpmath.log(1 + mpmath.exp(t)))),
    "exp": (torch.exp, mpmath.exp),
    "softmax": (
        lambda t: torch.cat([t, 1 - t, 0 * t], dim=1).softmax(1)[:, :1],
        lambda t: mpmath.exp(t) / (mpmath.exp(t) + mpmath.exp(1 - t) + 1),
    ),
    "log_softmax": (
        lambda t: torch.cat([t, 1 - t, 0 * t], dim=1).log_softmax(1)[:, :1],
        lambda t: t - mpmath.log(mpmath.exp(t) + mpmath.exp(1 - t) + 1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MPMATH))
@pytest.mark.parametrize("at", [-1.3, 0.2, 0.9])
def test_nested_forward_mode_agrees_with_mpmath_to_order_four(name, at):
    ours, exact = MPMATH[name]
    x, delta = torch.full((1, 1), at, dtype=torch.float64), torch.full((1, 1), 0.8, dtype=torch.float64)
    with mpmath.workdps(40):
        start, step = mpmath.mpf(at), mpmath.mpf(0.8)
        expected = [float(c) for c in mpmath.taylor(lambda t: exact(start + step * t), 0, 4)]
    found = theory.taylor_coefficients(ours, x, delta, order=4).flatten()
    assert_close(found, f64(expected), rtol=0, atol=1e-14)


@pytest.mark.slow
@given(SEEDS, st.integers(1, 4), ALPHAS)
@examples(40)
def test_for_polynomials_the_taylor_residual_is_the_residual(seed, degree, alpha):
    h, (x, delta) = polynomial(seed, degree), pair(seed, 3, 4, 1.0)
    coefficients = theory.taylor_coefficients(h, x, delta, order=4)
    error = theory.taylor_residual(coefficients, alpha) - theory.segment_residual(h, x, delta, alpha)
    assert error.abs().max() <= 1e-12 * (1 + coefficients.abs().sum())


@pytest.mark.slow
@given(SEEDS, st.integers(2, 5))
@examples(30)
def test_at_the_midpoint_only_even_derivatives_count(seed, degree):
    h, (x, delta) = polynomial(seed, degree), pair(seed, 3, 4, 1.0)
    middle = theory.taylor_coefficients(h, x, delta, order=4, alpha=0.5)
    expected = -(middle[2] / 4 + middle[4] / 16)
    error = theory.segment_residual(h, x, delta, 0.5)[0] - expected
    assert error.abs().max() <= 1e-12 * (1 + middle.abs().sum())


def test_coefficients_beyond_the_first_are_exactly_zero_for_a_relu_network():
    net, (x, delta) = relu_mlp(0), pair(0, 4, 6, 3.0)
    assert not theory.taylor_coefficients(net, x, delta, order=4)[2:].any()
    assert theory.segment_residual(net, x, delta, 0.5).abs().max() > 1e-2


def test_coefficients_pass_gradients_to_parameters():
    x, delta = pair(0, 2, 3, 1.0)
    weight = normal(9, 3, 2).requires_grad_()
    second = theory.taylor_coefficients(lambda x: torch.tanh(x @ weight), x, delta, order=2)[2]
    (gradient,) = torch.autograd.grad(second.sum(), weight)
    assert gradient.abs().max() > 1e-3


# ---- all layers: RAAT's Definition 1 --------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([0.05, 0.3, 1.0]))
@examples(60)
def test_a_relu_network_is_aligned_after_all_layers_exactly_when_no_unit_flips(seed, scale):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    residuals = theory.layer_residuals(net, x, delta, INSIDE)
    largest = max(residual.abs().max().item() for residual in residuals.values())
    flips = theory.count_activation_flips(net, x, delta, points=401).item()
    (found,) = theory.kinks(net, x, delta)
    assert (largest > 1e-9) == (len(found.alphas) > 0)
    assert (flips > 0) <= (len(found.alphas) > 0)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
def test_a_smooth_network_is_aligned_after_all_layers_only_if_its_first_layer_ignores_the_step(activation):
    net = relu_mlp(0, (6, 4, 4, 3), activation)
    x, delta = pair(0, 2, 6, 1.0)
    seen = theory.layer_residuals(net, x, delta, INSIDE, layers=["1"])["1"]
    assert seen.abs().max() > 1e-2
    blind = torch.linalg.svd(net[0].weight.detach()).Vh[4:]  # the kernel of the first layer
    ignored = (delta @ blind.mT) @ blind
    assert ignored.norm(dim=1).min() > 0.1
    for residual in theory.layer_residuals(net, x, ignored, INSIDE).values():
        assert residual.abs().max() < 1e-14
    assert (net(x + ignored) - net(x)).abs().max() < 1e-14


def test_layers_come_in_the_order_of_execution_with_their_own_residual():
    net, (x, delta) = relu_mlp(2), pair(2, 3, 6, 2.0)
    residuals = theory.layer_residuals(net, x, delta, [0.3, 0.6])
    assert list(residuals) == ["0", "1", "2", "3", "4"]
    assert_close(residuals["4"], theory.segment_residual(net, x, delta, [0.3, 0.6]), rtol=0, atol=1e-13)
    assert_close(residuals["1"], theory.segment_residual(net[:2], x, delta, [0.3, 0.6]), rtol=0, atol=1e-13)
    shares = theory.layer_residuals(net, x, delta, [0.3, 0.6], layers=["1"], relative=True)["1"]
    change = (net[:2](x + delta) - net[:2](x)).norm(dim=1)
    assert_close(shares, residuals["1"] / change[:, None], rtol=1e-12, atol=1e-14)
    assert not net._forward_hooks
    assert not any(layer._forward_hooks for layer in net)


def test_layers_keep_their_own_output_when_the_next_one_works_in_place():
    net = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)).eval()
    residuals = theory.layer_residuals(net, -ONE, 2 * ONE, 0.5)
    assert residuals["0"].item() == 0.0
    assert residuals["1"].item() == -0.5


# ---- errors and purity ----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "segment_residual": lambda h, x, delta: theory.segment_residual(h, x, delta, 0.5),
    "segment_quotient": lambda h, x, delta: theory.segment_quotient(h, x, delta, 0.5),
    "norm_defect": lambda h, x, delta: theory.norm_defect(h, x, delta, 0.5),
    "stewart_identity": lambda h, x, delta: theory.stewart_identity(h, x, delta, 0.5),
    "taylor_coefficients": lambda h, x, delta: theory.taylor_coefficients(h, x, delta, order=2),
    "directional_second_derivative": lambda h, x, delta: theory.directional_second_derivative(h, x, delta, 0.5),
    "second_derivative": lambda h, x, delta: theory.second_derivative(h, x, delta, delta),
    "second_difference": lambda h, x, delta: theory.second_difference(h, x, delta, 0.5),
    "peano_identity": lambda h, x, delta: theory.peano_identity(h, x, delta, 0.5, nodes=2),
    "mean_jacobian_identity": lambda h, x, delta: theory.mean_jacobian_identity(h, x, delta, 0.5, nodes=2),
    "curvature_bound": lambda h, x, delta: theory.curvature_bound(h, x, delta, 0.5, points=3),
    "slope_variation": lambda h, x, delta: theory.slope_variation(h, x, delta, points=5),
    "residual_certificate": lambda h, x, delta: theory.residual_certificate(h, x, delta, curvature=torch.ones(2).to(x)),
    "hessian_is_vacuous": theory.hessian_is_vacuous,
    "kinks": theory.kinks,
    "kink_identity": lambda h, x, delta: theory.kink_identity(h, x, delta, 0.5),
    "count_activation_flips": theory.count_activation_flips,
    "directional_jacobian": lambda h, x, delta: theory.directional_jacobian(h, x, delta, 0.5),
    "batch_jacobian": lambda h, x, delta: theory.batch_jacobian(h, x + delta),
    "jacobian_gap": lambda h, x, delta: theory.jacobian_gap(h, x, delta, 0.5),
    "power_jacobian_gap": lambda h, x, delta: theory.power_jacobian_gap(h, x, delta, 0.5, steps=2),
    "directional_gap": lambda h, x, delta: theory.directional_gap(h, x, delta, 0.5),
    "lipschitz_quotient": lambda h, x, delta: theory.lipschitz_quotient(h, x, delta, 0.5),
    "jacobian_gap_bound": lambda h, x, delta: theory.jacobian_gap_bound(h, x, delta, 0.5, lipschitz=1.0),
    "local_lipschitz_bound": lambda h, x, delta: theory.local_lipschitz_bound(h, x, delta, 0.5),
    "hessian_identity": lambda h, x, delta: theory.hessian_identity(h, x, delta, delta, 0.5, nodes=2),
    "linf_to_l2_norm": lambda h, x, delta: theory.linf_to_l2_norm(h, x + delta),
    "mixup_residual": lambda h, x, delta: theory.mixup_residual(h, x, x + delta, 0.5),
    "taylor_mixup_residual": lambda h, x, delta: theory.taylor_mixup_residual(h, x, x + delta, 0.5, order=2),
    "mixup_identity": lambda h, x, delta: theory.mixup_identity(h, x, x + delta, 0.5, order=1, nodes=2),
    "adversarial_first_order_term": lambda h, x, delta: theory.adversarial_first_order_term(
        h, x, x + delta, delta, delta, 0.5
    ),
    "adversarial_mixup_identity": lambda h, x, delta: theory.adversarial_mixup_identity(
        h, x, x + delta, delta, delta, 0.5, nodes=2
    ),
    "crossover_eps": lambda h, x, delta: theory.crossover_eps(h, x, x + delta, 0.5),
    "layer_residuals": lambda h, x, delta: theory.layer_residuals(h, x, delta, 0.5),
}
every_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
def test_batch_norm_in_training_mode_is_refused(call):
    net = cnn(0).train()
    x = normal(0, 2, 3, 8, 8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"`1` \(BatchNorm2d\) is in training mode.*h\.eval"):
        call(net, x, 0.1 * x)
    assert_close(dict(net.state_dict()), before)


@every_function
def test_the_callers_tensors_and_the_random_state_are_left_alone(call):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double().eval()
    x, delta = pair(0, 2, 6, 1.0)
    kept, state = (x.clone(), delta.clone()), torch.get_rng_state()
    call(net, x, delta)
    assert_close((x, delta), kept, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


@every_function
def test_float32_in_gives_float32_out(call):
    net, (x, delta) = relu_mlp(0).float(), pair(0, 2, 6, 1.0)
    result = call(net, x.float(), delta.float())
    flat = [result] if isinstance(result, torch.Tensor) else result.values() if isinstance(result, dict) else result
    for part in flat if not isinstance(flat, bool) else ():
        tensors = [part] if isinstance(part, torch.Tensor) else part
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"hessian_is_vacuous", "kinks", "kink_identity"}))
def test_nothing_is_read_on_the_host(name):
    # Tensors on the meta device have no values, so whatever looks at one fails there.
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to("meta").eval()
    x, delta = torch.empty(2, 2, 6, device="meta")
    result = FUNCTIONS[name](net, x, delta)
    parts = [result] if isinstance(result, torch.Tensor) else result.values() if isinstance(result, dict) else result
    assert all(part.device.type == "meta" for part in parts)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), "draws random numbers"),
        (nn.BatchNorm1d(6), "statistics of the batch"),
        (nn.BatchNorm1d(6, track_running_stats=False).eval(), "no running statistics"),
        (nn.RReLU(), "draws random numbers"),
        (nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1)), r"`1` \(Dropout\)"),
        (nn.MultiheadAttention(6, 1, dropout=0.1), "draws random numbers"),
    ],
)
def test_layers_that_are_not_one_function_are_named(layer, message):
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match=message):
        theory.segment_residual(layer, x, x, 0.5)
    with pytest.raises(ValueError, match=message):
        theory.segment_residual(layer.forward, x, x, 0.5)


def test_harmless_layers_in_training_mode_are_accepted():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.0), nn.LayerNorm(6)).double().train()
    assert theory.segment_residual(net, *pair(0, 2, 6, 1.0), 0.5).shape == (1, 2, 6)


def test_errors_say_what_came_and_what_was_wanted():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match=r"segment_residual: `delta` has shape \(2, 5\) but `x` has shape \(2, 6\)"):
        theory.segment_residual(torch.tanh, x, x[:, :5], 0.5)
    with pytest.raises(ValueError, match=r"`alphas` must lie in \[0, 1\], got 1.5"):
        theory.segment_residual(torch.tanh, x, x, [0.5, 1.5])
    with pytest.raises(ValueError, match=r"`alphas` must lie in \(0, 1\), got 0"):
        theory.segment_quotient(torch.tanh, x, x, 0)
    with pytest.raises(ValueError, match="at least one place"):
        theory.segment_residual(torch.tanh, x, x, [])
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        theory.segment_residual(torch.tanh, x, x, torch.rand(2, 2))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        theory.segment_residual(torch.tanh, x.long(), x.long(), 0.5)
    with pytest.raises(ValueError, match="must keep the batch dimension"):
        theory.segment_residual(torch.sum, x, x, 0.5)
    with pytest.raises(TypeError, match=r"`h` must return a torch\.Tensor, got tuple"):
        theory.segment_residual(lambda x: (x,), x, x, 0.5)
    with pytest.raises(ValueError, match="`order` must lie in"):
        theory.taylor_coefficients(torch.tanh, x, x, order=5)
    with pytest.raises(ValueError, match=r"\(K \+ 1, B, \.\.\.\)"):
        theory.taylor_residual(x[:1], 0.5)
    with pytest.raises(ValueError, match="'7', which is not a module"):
        theory.layer_residuals(nn.Sequential(nn.ReLU()), x, x, 0.5, layers=["7"])
    flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 6)))
    with pytest.raises(ValueError, match="layer '0' changes the batch dimension"):
        theory.layer_residuals(flat, x, x, 0.5)
