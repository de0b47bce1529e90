"""Piecewise-linear networks: exact kinks, the identity over them, and why Hessian checks are vacuous."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from perceptual_at import theory
from tests.theory.cases import (
    ALPHAS,
    INSIDE,
    ONE,
    SCALES,
    SEEDS,
    ZERO,
    cnn,
    examples,
    f64,
    filled,
    normal,
    on_unit_segment,
    pair,
    relu_mlp,
)

PIECEWISE = {
    "mlp": lambda: (relu_mlp(0, (32, 64, 64, 10)), pair(0, 4, 32, 0.5)),
    "deep mlp": lambda: (relu_mlp(1, (32, 64, 64, 64, 10)), pair(1, 4, 32, 0.5)),
    "cnn": lambda: (cnn(0, pool=None), (normal(0, 2, 3, 8, 8), 0.1 * normal(1, 2, 3, 8, 8))),
    "max-pooling": lambda: (cnn(0, pool=nn.MaxPool2d), (normal(0, 2, 3, 8, 8), 0.1 * normal(1, 2, 3, 8, 8))),
    "leaky relu": lambda: (relu_mlp(0, activation=nn.LeakyReLU), pair(0, 4, 6, 1.0)),
    "hard tanh": lambda: (relu_mlp(0, activation=nn.Hardtanh), pair(0, 4, 6, 1.0)),
    "absolute value": lambda: (torch.abs, (-torch.ones(1, 2).double(), 1.5 * torch.ones(1, 2).double())),
}
SMOOTH_MODULES = {
    "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus, "elu": nn.ELU, "mish": nn.Mish
}  # fmt: skip


# ---- vacuous Hessians -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PIECEWISE.values(), ids=PIECEWISE)
def test_second_derivatives_are_exactly_zero_where_the_residual_is_not(case):
    net, (x, delta) = case()
    assert not theory.directional_second_derivative(net, x, delta, [0.0, 0.31, 0.77]).any()
    assert theory.segment_residual(net, x, delta, [0.25, 0.5, 0.75]).abs().max() > 1e-3
    assert theory.second_difference(net, x, delta, 0.5, step=0.4).abs().max() > 1e-3
    assert theory.hessian_is_vacuous(net, x, delta) is True


def test_the_full_hessian_of_a_relu_network_is_exactly_zero():
    net, (x, _) = relu_mlp(0), pair(0, 1, 6, 1.0)
    assert not torch.func.hessian(lambda x: net(x[None])[0])(x[0]).any()


@pytest.mark.parametrize("activation", SMOOTH_MODULES.values(), ids=SMOOTH_MODULES)
def test_smooth_networks_are_worth_a_hessian(activation):
    net, (x, delta) = relu_mlp(0, activation=activation), pair(0, 2, 6, 0.03)
    assert theory.hessian_is_vacuous(net, x, delta) is False


def test_a_kink_far_from_the_inputs_is_found():
    assert theory.hessian_is_vacuous(lambda x: torch.relu(x + 20), ZERO, 0.1 * ONE)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 1e3])
def test_a_smooth_network_is_recognised_at_any_length_of_the_perturbation(scale):
    net, (x, delta) = relu_mlp(0, activation=nn.GELU).float(), pair(0, 2, 6, 1.0)
    assert not theory.hessian_is_vacuous(net, x.float(), scale * delta.float())


def test_an_affine_map_has_a_hessian_of_zero_and_rightly_so():
    net, (x, delta) = relu_mlp(0, (6, 4)), pair(0, 2, 6, 1.0)
    assert theory.hessian_is_vacuous(net, x, delta) is False
    assert theory.hessian_is_vacuous(lambda x: torch.ones_like(x), x, delta) is False


@pytest.mark.slow
@given(SEEDS, st.sampled_from([0.0, 1e-6, 1e-3, 8 / 255, 1.0, 100.0]), st.sampled_from([torch.float32, torch.float64]))
@examples(40)
def test_a_relu_network_is_recognised_at_any_length_of_the_perturbation(seed, scale, dtype):
    net, (x, delta) = relu_mlp(seed).to(dtype), pair(seed, 2, 6, scale)
    assert theory.hessian_is_vacuous(net, x.to(dtype), delta.to(dtype))


def test_probabilities_of_a_relu_network_have_a_hessian_that_is_blind_to_the_kinks():
    net, (x, delta) = relu_mlp(0), pair(0, 3, 6, 2.0)

    def probabilities(x):
        return net(x).softmax(1)

    assert not theory.hessian_is_vacuous(probabilities, x, delta)
    value, slope = torch.func.jvp(net, (x,), (delta,))
    start, line = 0 * x[:, :1], torch.ones_like(x[:, :1])
    linearised = theory.directional_second_derivative(lambda t: (value + t * slope).softmax(1), start, line, 0.0)
    assert_close(theory.directional_second_derivative(probabilities, x, delta, 0.0), linearised, rtol=0, atol=1e-14)
    straight = 0.5 * (value.softmax(1) + (value + slope).softmax(1))
    explained = (value + slope / 2).softmax(1) - straight  # what that curvature stands for
    assert (theory.segment_residual(probabilities, x, delta, 0.5)[0] - explained).abs().max() > 1e-2


# ---- exact kinks ----------------------------------------------------------------------------------------------------


def test_kinks_of_a_sum_of_hinges_are_found_with_their_jumps():
    def h(t):
        return 3 * torch.relu(t - 0.2) - torch.abs(t - 0.7) + t.clamp(0.4, 2.0)

    (found,) = theory.kinks(*on_unit_segment(h))
    assert_close(found.alphas, f64([0.2, 0.4, 0.7]), rtol=0, atol=1e-15)
    assert_close(found.jumps[:, 0], f64([3.0, 1.0, -2.0]), rtol=0, atol=1e-12)
    assert found.variation.item() == pytest.approx(6.0)


def test_a_second_layer_bends_where_the_first_made_it_bend():
    def hat(t):
        return torch.relu(torch.relu(t) - 2 * torch.relu(t - 0.5) - 0.25)  # a hat of height 1/4 around 1/2

    (found,) = theory.kinks(hat, ZERO, ONE)
    assert_close(found.alphas, f64([0.25, 0.5, 0.75]), rtol=0, atol=1e-15)
    assert_close(found.jumps[:, 0], f64([1.0, -2.0, 1.0]), rtol=0, atol=1e-12)


class Residual(nn.Module):
    """A network that no list of layers describes: a skip connection, activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = nn.functional.relu(self.first(x))
        return self.last(torch.relu(x + nn.functional.leaky_relu(self.second(x), 0.1)))


NETS = {
    "mlp": relu_mlp,
    "deep": lambda seed: relu_mlp(seed, (6, 8, 8, 8, 8, 3)),
    "leaky": lambda seed: relu_mlp(seed, activation=nn.LeakyReLU),
    "hard tanh": lambda seed: relu_mlp(seed, activation=nn.Hardtanh),
    "relu6": lambda seed: relu_mlp(seed, activation=nn.ReLU6),
    "prelu": lambda seed: relu_mlp(seed, activation=nn.PReLU),
    "residual": lambda seed: filled(Residual(), seed),
}


@pytest.mark.slow
@given(SEEDS, st.sampled_from(sorted(NETS)), ALPHAS, SCALES)
@examples(60)
def test_the_residual_is_the_weighted_sum_of_the_kinks(seed, name, alpha, scale):
    net, (x, delta) = NETS[name](seed), pair(seed, 2, 6, scale)
    for found in theory.kinks(net, x, delta):
        gaps = torch.cat([ZERO[0], found.alphas, ONE[0]]).diff()
        assume(gaps.min() > 1e-9)
    identity = theory.kink_identity(net, x, delta, [alpha, 0.5])
    assert identity.error <= 1e-11 * max(1.0, net(torch.cat([x, x + delta])).abs().max().item())


@pytest.mark.parametrize(("activation", "alphas", "jumps"), [
    (nn.Hardsigmoid(), [1 / 8, 7 / 8], [8 / 6, -8 / 6]),
    (nn.Softshrink(0.25), [3.75 / 8, 4.25 / 8], [-8.0, 8.0]),
    (lambda x: nn.functional.softshrink(x), [3.5 / 8, 4.5 / 8], [-8.0, 8.0]),
], ids=["hard sigmoid", "soft shrinkage", "function"])  # fmt: skip
def test_activations_with_two_bends(activation, alphas, jumps):
    x, delta = f64([[-4.0]]), f64([[8.0]])
    (found,) = theory.kinks(activation, x, delta)
    assert_close(found.alphas, f64(alphas))
    assert_close(found.jumps.flatten(), f64(jumps), rtol=1e-6, atol=1e-6)
    # The sixth in torch's derivative of the hard sigmoid is one of float32.
    assert theory.kink_identity(activation, x, delta, [0.2, 0.5]).error <= 1e-8


@pytest.mark.parametrize("name", ["expm1", "erf", "atan", "log1p"])
def test_functions_that_are_smooth_have_no_kinks(name):
    with pytest.raises(ValueError, match=f"kinks: `h` applies `{name}`, so it is not piecewise linear"):
        theory.kinks(getattr(torch, name), f64([[1.0]]), f64([[1.0]]))


@given(SEEDS)
@examples(5)
def test_the_identity_holds_for_convolutions_batch_norm_and_average_pooling(seed):
    net, x = cnn(seed), normal(seed + 1, 1, 3, 8, 8)
    delta = 0.3 * normal(seed + 2, 1, 3, 8, 8).sign()
    identity = theory.kink_identity(net, x, delta, [0.2, 0.5])
    assert identity.error <= 1e-11 * max(1.0, net(x).abs().max().item())
    assert identity.left.abs().max() > 1e-4
    assert len(theory.kinks(net, x, delta)[0].alphas) > 10


@given(SEEDS, st.sampled_from(sorted(NETS)))
@examples(20)
def test_between_its_kinks_the_network_is_affine(seed, name):
    net, (x, delta) = NETS[name](seed), pair(seed, 1, 6, 2.0)
    (found,) = theory.kinks(net, x, delta)
    edges = torch.cat([ZERO[0], found.alphas, ONE[0]])
    for low, high in itertools.pairwise(edges):
        piece = theory.segment_residual(net, x + low * delta, (high - low) * delta, [0.3, 0.5, 0.8])
        assert piece.abs().max() < 1e-13 * max(1.0, net(x).abs().max().item()) * 10


@pytest.mark.slow
def test_the_residual_grows_with_a_power_between_one_and_two():
    net, x = cnn(3, pool=None), normal(0, 64, 3, 8, 8)
    delta = normal(1, 64, 3, 8, 8).sign()
    sizes = f64([0.05, 0.1, 0.2])
    largest = torch.stack([theory.segment_residual(net, x, eps * delta, INSIDE).abs().amax((0, 2)) for eps in sizes])
    slopes = largest.mean(1).log().diff() / sizes.log().diff()
    assert (slopes > 1.2).all()
    assert (slopes < 1.9).all()


def test_maps_that_are_not_followed_are_refused_by_name():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match="kinks: `h` applies `gelu`, so it is not piecewise linear"):
        theory.kinks(nn.Sequential(nn.Linear(6, 3), nn.GELU()).double(), x, x)
    with pytest.raises(ValueError, match="`softmax`"):
        theory.kinks(lambda x: x.softmax(1), x, x)
    image = normal(0, 1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`max_pool2d`, whose bends .* use `slope_variation`"):
        theory.kink_identity(cnn(0, pool=nn.MaxPool2d), image, image, 0.5)
    with pytest.raises(ValueError, match="does not keep the batch dimension"):
        theory.kinks(lambda x: x + torch.relu(x.sum(0, keepdim=True))[:0].sum(), x, x)


# ---- activation flips -----------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([0.05, 0.3, 1.0]))
@examples(30)
def test_a_fine_grid_counts_every_kink_and_a_coarse_one_not_more(seed, scale):
    net, (x, delta) = relu_mlp(seed), pair(seed, 1, 6, scale)
    exact = len(theory.kinks(net, x, delta)[0].alphas)
    coarse, usual, fine = (theory.count_activation_flips(net, x, delta, points=n).item() for n in (2, 17, 2049))
    assert coarse <= usual <= fine <= exact
    assert exact - fine <= 1  # two flips of one unit may still fall between two of 2049 places


def test_flips_are_counted_for_each_sample_whatever_the_layer_or_function():
    x, delta = f64([[-1.0, 1.0], [-1.0, 1.0]]), f64([[2.0, 1.0], [0.5, 1.0]])
    assert theory.count_activation_flips(torch.relu, x, delta).tolist() == [1, 0]
    assert theory.count_activation_flips(nn.PReLU().double(), x, delta).tolist() == [1, 0]
    assert theory.count_activation_flips(nn.Hardtanh(), x, delta).tolist() == [2, 2]  # bends at -1 and 1
    assert theory.count_activation_flips(lambda x: x.clamp(min=0), x, delta).tolist() == [1, 0]
    assert theory.count_activation_flips(lambda x: torch.relu(x).relu_() + x.abs(), x, delta).tolist() == [3, 0]


def test_max_pooling_is_let_through_but_not_counted():
    image, delta = normal(0, 2, 3, 8, 8), 0.1 * normal(1, 2, 3, 8, 8)
    assert theory.count_activation_flips(cnn(0, pool=nn.MaxPool2d), image, delta).shape == (2,)


def test_nothing_to_count_is_an_error():
    x = normal(0, 2, 6)
    with pytest.raises(ValueError, match="ran no ReLU-like activation"):
        theory.count_activation_flips(torch.tanh, x, x)
    with pytest.raises(ValueError, match="`points` must lie in"):
        theory.count_activation_flips(torch.relu, x, x, points=1)
