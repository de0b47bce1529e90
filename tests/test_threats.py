"""Threat models: projections, steepest steps, random starts, and the worst case of a linear classifier in each ball."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf, Threat, pgd
from perceptual_at.threats import around
from perceptual_at.threats.simplex import threshold_by_climbing, threshold_by_sorting
from tests.strategies import (
    BOUNDS,
    DTYPES,
    bounds,
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

ONE_OF_EACH = [Linf(0.25), L2(0.5), L2(0.5, projection="ball_box"), L1(1.0)]
every_threat = pytest.mark.parametrize("threat", ONE_OF_EACH, ids=repr)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
ORDER = {"Linf": math.inf, "L2": 2, "L1": 1}


def exact_norm(threat, x_adv, x):
    """The norm of each sample's difference, from exact differences and exact sums."""
    norms = []
    for a, b in zip(x_adv.double().flatten(1).tolist(), x.double().flatten(1).tolist(), strict=True):
        moves = [abs(p - q) for p, q in zip(a, b, strict=True)]
        norms.append(
            max(moves) if isinstance(threat, Linf)
            else math.hypot(*moves) if isinstance(threat, L2)
            else math.fsum(moves)
        )  # fmt: skip
    return norms


def assert_inside(threat, x_adv, x):
    """Ball and box hold with no tolerance, whatever dtype the difference is taken in."""
    assert x_adv.dtype == x.dtype
    assert x_adv.shape == x.shape
    for dtype in {x.dtype, torch.promote_types(x.dtype, torch.float32), torch.float64}:
        assert (threat.norm(x_adv.to(dtype) - x.to(dtype)).double() <= threat.eps).all(), dtype
    if x.dtype != torch.float64:  # differences of these are exact in float64
        assert max(exact_norm(threat, x_adv, x), default=0.0) <= threat.eps
    assert (x_adv.double() >= threat.bounds[0]).all()
    assert (x_adv.double() <= threat.bounds[1]).all()


# Projection -------------------------------------------------------------------------------------------------------


@given(threats(), shapes, seeds, scales, dtypes)
def test_projections_land_in_the_set_exactly(threat, shape, seed, scale, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    assert_inside(threat, threat.project(x + normal(seed + 1, *shape, scale=scale, dtype=dtype), x), x)


@given(threats(), shapes, seeds, dtypes)
def test_points_just_outside_the_ball_land_in_it_too(threat, shape, seed, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    direction = threat.steepest(normal(seed + 1, *shape)) * threat.eps
    for factor in (1.0, 1.0 + 2**-52, 1.0 + 2**-20, 1.01):
        assert_inside(threat, threat.project((x.double() + factor * direction).to(dtype), x), x)


@given(threats(), shapes, seeds, scales, dtypes)
def test_projecting_twice_changes_no_bit(threat, shape, seed, scale, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    once = threat.project(x + normal(seed + 1, *shape, scale=scale, dtype=dtype), x)
    assert torch.equal(threat.project(once, x), once)


@given(threats(), shapes, seeds, st.sampled_from([1e-7, 0.001, 1.0, 40.0]), dtypes)
def test_projections_around_centres_that_stay_are_those_of_the_threat(threat, shape, seed, scale, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    project = around(threat, x)
    points = [x + normal(seed + i, *shape, scale=scale, dtype=dtype) for i in range(1, 3)]
    points.append(torch.cat([points[0][:1], x[1:]]))  # one sample moves, the others stay
    for point in (*points, threat.project(points[0], x)):
        projected = project(point)
        assert_inside(threat, projected, x)
        tolerance = 50 * torch.finfo(dtype).eps * max([1.0, *(abs(b) for b in threat.bounds if math.isfinite(b))])
        assert_close(projected, threat.project(point, x), rtol=tolerance, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_centres_that_stay_may_have_budgets_of_their_own(kind):
    threat, x = kind(torch.tensor([0.05, 0.5, 0.9])), uniform(0, 3, 20)
    for scale in (0.01, 1.0):
        point = x + normal(1, 3, 20, scale=scale)
        assert_close(around(threat, x)(point), threat.project(point, x))


def test_a_threat_of_the_users_own_projects_itself_around_centres_that_stay():
    class Still(L2):
        def project(self, x_adv, x):
            return x

    x = uniform(0, 3, 4)
    for way in (0.001, 1.0):
        assert torch.equal(around(Still(0.5), x)(x + way), x)


@given(seeds, st.sampled_from([0.01, 0.5, 0.99, 2.0]), st.sampled_from([1, 5, 300]))
def test_the_l1_threshold_is_found_without_sorting_too(seed, share, entries):
    wanted = normal(seed, 4, entries).abs() * (uniform(seed + 1, 4, entries) > 0.3)
    room = uniform(seed + 2, 4, entries) * (uniform(seed + 3, 4, entries) > 0.3)
    radius = share * torch.minimum(wanted, room).sum(dim=1, keepdim=True) + 1e-3
    found, sorted_out = (solve(wanted, room, radius) for solve in (threshold_by_climbing, threshold_by_sorting))
    moved, expected = (torch.minimum((wanted - t).clamp_min(0), room) for t in (found, sorted_out))
    assert_close(moved, expected, rtol=1e-10, atol=1e-11)


def test_a_threshold_that_is_undefined_comes_to_an_end():
    wanted = torch.tensor([[math.nan, 1.0], [2.0, 1.0]])
    found = threshold_by_climbing(wanted, torch.ones(2, 2), 1.0)
    assert_close(found[1], torch.tensor([1.0]))


@given(threats(), shapes, seeds, st.sampled_from([0.0, 0.1, 0.9]), dtypes)
def test_projections_leave_insiders_alone(threat, shape, seed, share, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    move = share * threat.eps * threat.steepest(normal(seed + 1, *shape))
    inside = clean_inputs(seed, shape, threat.bounds) + move  # float64
    inside = inside.clamp(*threat.bounds).to(dtype)
    inside = torch.where(  # rounding may have left ball or box
        rows(threat.norm(inside.double() - x.double()) <= 0.95 * threat.eps, x)
        & (inside.double() >= threat.bounds[0])
        & (inside.double() <= threat.bounds[1]),
        inside,
        x,
    )
    assert torch.equal(threat.project(inside, x), inside)


@every_threat
@every_dtype
def test_points_on_the_surface_are_insiders(threat, dtype):
    x = torch.full((1, 4), 0.5, dtype=dtype)
    move = {"Linf": [0.25, -0.25, 0.25, 0.0], "L2": [0.5, 0, 0, 0], "L1": [0.25, 0.25, -0.5, 0.0]}
    surface = x + torch.tensor([move[type(threat).__name__]], dtype=dtype)
    assert torch.equal(threat.project(surface, x), surface)


@given(threats(), shapes, seeds, scales)
def test_projections_do_not_touch_their_arguments(threat, shape, seed, scale):
    x = clean_inputs(seed, shape, threat.bounds)
    y = x + normal(seed + 1, *shape, scale=scale)
    before = x.clone(), y.clone()
    threat.project(y, x)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@every_threat
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_images_of_many_entries_stay_inside(threat, dtype):
    threat = dataclasses.replace(threat, bounds=(-math.inf, math.inf))
    x = clean_inputs(0, (2, 3, 224, 224), (0.0, 1.0), dtype)
    once = threat.project(x + normal(1, *x.shape, dtype=dtype), x)
    assert (threat.norm(once - x).double() <= threat.eps).all()
    assert torch.equal(threat.project(once, x), once)


@every_threat
@pytest.mark.parametrize("threat_dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_a_wide_point_comes_back_in_the_dtype_of_the_inputs(threat, threat_dtype, dtype):
    x = clean_inputs(0, (5, 3, 4, 4), (0.0, 1.0), dtype)
    assert_inside(threat, threat.project(x.to(threat_dtype) + normal(1, *x.shape, dtype=threat_dtype), x), x)


@every_threat
def test_no_precision_is_given_away(threat):
    # "inside" is not bought by shrinking: outsiders end within rounding of the surface
    threat = dataclasses.replace(threat, bounds=(-math.inf, math.inf))
    for dtype in DTYPES:
        x = torch.zeros(3, 40, dtype=dtype)
        size = threat.norm(threat.project(normal(1, 3, 40, scale=9.0, dtype=dtype), x)).double()
        roundings = 20 if dtype in (torch.float64, torch.float32) else 2
        assert (size >= threat.eps * (1 - roundings * torch.finfo(dtype).eps)).all(), dtype


@given(bounds, shapes, seeds, scales)
def test_the_linf_projection_is_the_nearest_point(box, shape, seed, scale):
    threat = Linf(0.3, bounds=box)
    x = clean_inputs(seed, shape, box)
    y = x + normal(seed + 1, *shape, scale=scale)
    nearest = y.clamp(x - 0.3, x + 0.3).clamp(*box)
    assert_close(threat.project(y, x), nearest, rtol=1e-15, atol=1e-15)


def nearest_in_l1_ball_and_box(y, x, eps, low, high):
    """One sample by bisection on how much every entry gives up."""
    wanted = (y - x).abs()
    room = torch.where(y > x, high - x, x - low)
    small, large = 0.0, wanted.max().item()
    if torch.minimum(wanted, room).sum() <= eps:
        return y.clamp(low, high)
    for _ in range(200):
        middle = (small + large) / 2
        moved = torch.minimum((wanted - middle).clamp_min(0), room)
        small, large = (middle, large) if moved.sum() > eps else (small, middle)
    return x + (y - x).sign() * torch.minimum((wanted - large).clamp_min(0), room)


@given(threats(kinds=["L1"]), shapes, seeds, scales)
def test_the_l1_projection_is_the_nearest_point(threat, shape, seed, scale):
    x = clean_inputs(seed, shape, threat.bounds)
    y = x + normal(seed + 1, *shape, scale=scale)
    expected = torch.stack(
        [nearest_in_l1_ball_and_box(*pair, threat.eps, *threat.bounds) for pair in zip(y, x, strict=True)]
    )
    tolerance = 1e-13 * max(1.0, y.abs().max().item())
    assert_close(threat.project(y, x), expected, rtol=0, atol=tolerance)


@given(threats(kinds=["Linf", "L1"]), shapes, seeds, scales)
def test_no_allowed_point_is_nearer_than_the_projection(threat, shape, seed, scale):
    x = clean_inputs(seed, shape, threat.bounds)
    y = x + normal(seed + 1, *shape, scale=scale)
    nearest = threat.project(y, x)
    distance = (y - nearest).flatten(1).norm(dim=1)
    for i in range(5):  # random points of the set, and points close to the projection
        for other in (threat.random_start(x, generator=generator(seed + i)), nearest + normal(seed + i, *shape) / 100):
            other = threat.project(other, x)
            assert (distance <= (y - other).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@given(bounds, shapes, seeds, scales)
def test_the_two_orders_of_the_l2_projection_are_what_they_say(box, shape, seed, scale):
    x = clean_inputs(seed, shape, box)
    y = x + normal(seed + 1, *shape, scale=scale)

    def shrunk(z):
        factor = (0.5 / (z - x).flatten(1).norm(dim=1)).clamp_max(1.0)
        return x + (z - x) * rows(factor, z)

    clipped_first = L2(0.5, bounds=box, projection="box_ball").project(y, x)
    clipped_last = L2(0.5, bounds=box, projection="ball_box").project(y, x)
    assert_close(clipped_first, shrunk(y.clamp(*box)), rtol=0, atol=1e-12)
    assert_close(clipped_last, shrunk(y).clamp(*box), rtol=0, atol=1e-12)
    if not any(map(math.isfinite, box)):
        assert_close(clipped_first, clipped_last, rtol=0, atol=1e-12)


def test_the_two_orders_of_the_l2_projection_differ_where_the_box_is_close():
    x, y = torch.tensor([[0.9, 0.5]]), torch.tensor([[1.3, 0.8]])  # wants (0.4, 0.3), has room for (0.1, 0.5)
    clipped_first = L2(0.25).project(y, x)
    clipped_last = L2(0.25, projection="ball_box").project(y, x)
    assert_close(clipped_first, x + torch.tensor([[0.1, 0.3]]) * 0.25 / math.hypot(0.1, 0.3))
    assert_close(clipped_last, torch.tensor([[1.0, 0.65]]))


# Steepest step ----------------------------------------------------------------------------------------------------


@given(threats(), shapes, seeds, st.sampled_from([1e-200, 1e-30, 1.0, 1e30]))
def test_the_steepest_step_has_unit_norm_and_the_dual_norms_gain(threat, shape, seed, scale):
    grad = normal(seed, *shape, scale=scale)
    step = threat.steepest(grad)
    assert_close(threat.norm(step), torch.ones(shape[0], dtype=torch.float64), rtol=1e-14, atol=0)
    dual = {"Linf": 1, "L2": 2, "L1": math.inf}[type(threat).__name__]
    largest = grad.abs().amax()  # divided out: squares of small numbers underflow
    gain = (step * (grad / largest)).flatten(1).sum(dim=1)
    assert_close(gain, torch.linalg.vector_norm((grad / largest).flatten(1), ord=dual, dim=1), rtol=1e-13, atol=0)


@given(threats(), shapes, seeds)
def test_no_sampled_unit_step_gains_more_than_the_steepest(threat, shape, seed):
    grad = normal(seed, *shape)
    gain = (threat.steepest(grad) * grad).flatten(1).sum(dim=1)
    for i in range(20):
        other = normal(seed + 1 + i, *shape) ** (1 + 2 * (i % 3))  # odd powers: from even to peaked directions
        other = other / rows(threat.norm(other), other)
        assert (gain >= (other * grad).flatten(1).sum(dim=1) - 1e-12).all()


@every_threat
@every_dtype
def test_a_zero_gradient_gives_a_zero_step(threat, dtype):
    grad = torch.zeros(2, 3, 4, dtype=dtype)
    grad[1, 0, 0] = -1e-4  # the neighbour's step is its own
    step = threat.steepest(grad)
    assert step.dtype == dtype
    assert (step[0] == 0).all()
    assert step[1, 0, 0] == -1
    x = torch.full((2, 3, 4), 0.5, dtype=dtype)
    if hasattr(threat, "step"):
        assert torch.equal(threat.step(x, x, grad, 0.25)[0], x[0])


@every_threat
@every_dtype
def test_an_infinite_gradient_decides_and_an_undefined_one_is_none(threat, dtype):
    grad = torch.tensor([[math.inf, 0.0], [0.0, -math.inf], [math.nan, math.nan]], dtype=dtype)
    assert torch.equal(threat.steepest(grad), torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], dtype=dtype))


@every_threat
@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [(torch.float64, 5e-324), (torch.float32, 1.5e-45), (torch.float16, 6e-8), (torch.bfloat16, 1e-40)],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_the_smallest_gradient_still_points_somewhere(threat, dtype, tiny):
    step = threat.steepest(torch.tensor([[tiny, 0.0]], dtype=dtype))
    assert torch.equal(step, torch.tensor([[1.0, 0.0]], dtype=dtype))


# Random starts ----------------------------------------------------------------------------------------------------


@given(threats(), shapes, seeds, dtypes)
def test_random_starts_are_inside(threat, shape, seed, dtype):
    x = clean_inputs(seed, shape, threat.bounds, dtype)
    assert_inside(threat, threat.random_start(x, generator=generator(seed)), x)


@every_threat
def test_random_starts_repeat_by_generator_and_differ_without(threat):
    x = torch.full((4, 6), 0.5)
    first, second = (threat.random_start(x, generator=generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, threat.random_start(x, generator=generator(8)))
    assert not torch.equal(threat.random_start(x), threat.random_start(x))


@pytest.mark.parametrize("entries", [1, 2, 10])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_random_starts_fill_the_ball_evenly(kind, entries):
    samples = 20_000
    threat = kind(0.5, bounds=(-math.inf, math.inf))
    delta = threat.random_start(torch.zeros(samples, entries, dtype=torch.float64), generator=generator(3))
    radius = threat.norm(delta) / threat.eps
    # in a ball of d dimensions the radius to the power d is uniform on (0, 1), whatever the norm
    filled = (radius**entries).sort().values
    even = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    assert (filled - even).abs().max() < 2.0 / math.sqrt(samples)  # Kolmogorov-Smirnov: chance 1e-3
    # and no direction is preferred: neither a sign nor an entry
    spread = delta.std()
    assert delta.mean(dim=0).abs().max() < 4 * spread / math.sqrt(samples)
    squares = delta.square().mean(dim=0)
    assert (squares / squares.mean() - 1).abs().max() < 10 / math.sqrt(samples)


@pytest.mark.parametrize("kind", [L2, L1])
def test_directions_of_random_starts_are_uniform_on_the_surface(kind):
    # in two dimensions a uniform point of the ball lies in the cone |x| > 2 |y| with a known probability
    threat = kind(1.0, bounds=(-math.inf, math.inf))
    delta = threat.random_start(torch.zeros(20_000, 2, dtype=torch.float64), generator=generator(4))
    inside_cone = (delta[:, 0].abs() > 2 * delta[:, 1].abs()).double().mean().item()
    expected = 2 * math.atan(0.5) / math.pi if kind is L2 else 1 / 3
    assert abs(inside_cone - expected) < 4 * 0.5 / math.sqrt(20_000)


# Values -----------------------------------------------------------------------------------------------------------


@given(threats())
def test_the_repr_evaluates_back(threat):
    assert eval(repr(threat), {"Linf": Linf, "L2": L2, "L1": L1, "inf": math.inf}) == threat


def test_the_repr_counts_in_255ths_where_that_is_exact():
    assert repr(Linf(8 / 255)) == "Linf(eps=8/255)"
    assert repr(Linf(0.031)) == "Linf(eps=0.031)"
    assert repr(L1(12)) == "L1(eps=12)"
    assert repr(L2(1.0, bounds=(-1, 1), projection="ball_box")) == (
        "L2(eps=1.0, bounds=(-1.0, 1.0), projection='ball_box')"
    )


@given(threats(), st.floats(0.01, 1.0))
def test_scaled_multiplies_the_budget_and_nothing_else(threat, factor):
    scaled = threat.scaled(factor)
    assert scaled.eps == threat.eps * factor
    assert dataclasses.replace(scaled, eps=threat.eps) == threat


@given(threats())
def test_threats_are_frozen_hashable_and_picklable(threat):
    assert pickle.loads(pickle.dumps(threat)) == threat
    assert {threat: 1}[dataclasses.replace(threat)] == 1
    for name in ("eps", "bounds"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(threat, name, 1.0)
    assert isinstance(threat, Threat)


def test_threats_of_different_kinds_are_different_values():
    assert len({Linf(0.5), L2(0.5), L1(0.5), L2(0.5, projection="ball_box"), Linf(0.5, bounds=(-1, 1))}) == 5
    assert Linf(0.5, bounds=[0, 1]) == Linf(0.5)


@given(threats(), shapes, seeds, dtypes)
def test_norms_are_those_of_the_textbook(threat, shape, seed, dtype):
    delta = normal(seed, *shape, dtype=dtype)
    size = threat.norm(delta)
    expected = exact_norm(threat, delta, torch.zeros_like(delta))
    rounding = 4 * torch.finfo(size.dtype).eps
    assert_close(size.double(), torch.tensor(expected, dtype=torch.float64), rtol=rounding, atol=0)


@every_threat
def test_batches_may_be_empty_and_samples_may_be_single_numbers(threat):
    for shape in ((0, 3), (0, 1, 2, 2), (4,), (1, 1)):
        x = torch.full(shape, 0.5)
        assert threat.project(x + 9, x).shape == shape
        assert threat.random_start(x, generator=generator(0)).shape == shape
        assert threat.steepest(x).shape == shape
        assert threat.norm(x).shape == shape[:1]


@every_threat
def test_points_at_the_centre_have_gradients_and_so_have_others_in_their_batch(threat):
    x, delta = torch.full((2, 3), 0.5), torch.zeros(2, 3)
    delta[1, 0] = 0.3
    (grad,) = torch.autograd.grad(threat.project(x + delta.requires_grad_(), x).sum(), delta)
    assert torch.equal(grad[0], torch.ones(3))
    assert grad[1].isfinite().all()
    (first,) = torch.autograd.grad(threat.project(x + delta, x).square().sum(), delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    assert torch.equal(second[0], torch.full((3,), 2.0))
    assert second[1].isfinite().all()


def test_the_norm_of_what_must_not_move_and_does_not_has_a_gradient():
    delta = torch.zeros(1, 2, requires_grad=True)
    for threat in (Linf(torch.tensor([[0.25, 0.0]])), L2(torch.tensor([[0.25, 0.0]])), L1(torch.tensor([[0.25, 0.0]]))):
        (grad,) = torch.autograd.grad(threat.norm(delta).sum(), delta)
        assert grad.isfinite().all()


# The worst case of a linear classifier ----------------------------------------------------------------------------


def linear_classifier(weight):
    """Two classes; the loss of class 0 grows as the score falls, by a known amount per unit."""

    def model(x):
        score = (x.flatten(1) * weight).sum(dim=1)
        return torch.stack([score, -score], dim=1)

    return model


def worst_in_linf(x, weight, eps, box):
    return (x - eps * weight.sign().reshape(x.shape[1:])).clamp(*box)


def worst_in_l2(x, weight, eps, box):
    return x - eps * (weight / weight.norm()).reshape(x.shape[1:])  # where the box is out of reach


def worst_in_l1(x, weight, eps, box):
    """Spend the budget on the heaviest entry until it meets the box, then on the next."""
    worst = x.flatten(1).clone()
    for row in worst:
        left = eps
        for k in weight.abs().argsort(descending=True).tolist():
            room = row[k].item() - box[0] if weight[k] > 0 else box[1] - row[k].item()
            move = min(left, room)
            row[k] -= move * weight[k].sign()
            left -= move
    return worst.reshape(x.shape)


WORST_CASES = {
    "Linf": (Linf(0.1), worst_in_linf, 0.3, 0.7),
    "Linf against the box": (Linf(0.4), worst_in_linf, 0.0, 1.0),
    "L2": (L2(0.02), worst_in_l2, 0.4, 0.6),
    "L2, clipped last": (L2(0.25, projection="ball_box"), worst_in_l2, 0.3, 0.7),
    "L1": (L1(0.25), worst_in_l1, 0.3, 0.7),
    "L1 against the box": (L1(3.0), worst_in_l1, 0.0, 1.0),
    "L1 with a budget for everything": (L1(9.0), worst_in_l1, 0.0, 1.0),
    "L1 in other bounds": (L1(2.0, bounds=(-2.1, 2.64)), worst_in_l1, -2.1, 2.64),
}


@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("case", WORST_CASES)
def test_pgd_reaches_the_worst_case_of_a_linear_classifier(case, start):
    threat, worst, low, high = WORST_CASES[case]
    weight = normal(5, 12)
    x = low + (high - low) * torch.rand(6, 3, 2, 2, generator=generator(6), dtype=torch.float64)
    labels = torch.zeros(6, dtype=torch.long)
    # on the surface of an L2 ball the way left shrinks elevenfold with each step of ten radii
    step_size = 10 * threat.eps if isinstance(threat, L2) else threat.eps / 2
    x_adv = pgd(
        linear_classifier(weight), x, labels, threat,
        steps=40, step_size=step_size, start=start, generator=generator(0),
    )  # fmt: skip
    expected = worst(x, weight, threat.eps, threat.bounds)
    assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert threat.norm(expected - x).max() <= threat.eps + 1e-12  # the closed form is an allowed point


@pytest.mark.parametrize("box", BOUNDS[:4], ids=str)
def test_one_linf_step_of_full_size_is_enough_for_a_linear_classifier(box):
    threat = Linf(0.2, bounds=box)
    weight = normal(5, 12)
    x = clean_inputs(6, (6, 12), box)
    x_adv = pgd(linear_classifier(weight), x, torch.zeros(6, dtype=torch.long), threat, steps=1, step_size=0.4)
    assert_close(x_adv, worst_in_linf(x, weight, 0.2, box), rtol=0, atol=1e-14 * max(map(abs, box)))


@pytest.mark.parametrize(
    ("threat", "dtype", "x", "far"),
    [
        (L1(0.1), torch.bfloat16, [0.1005859375], [0.0]),
        (L1(0.3), torch.float16, [0.3046875], [0.0]),
        (L2(1.0), torch.float16, [0.501953125, 0.9716796875], [0.0, 0.0]),
        (L2(0.5), torch.bfloat16, [0.6640625, 0.78515625], [0.0, 1.0]),
    ],
)
def test_a_difference_taken_in_the_dtype_of_the_inputs_is_inside_too(threat, dtype, x, far):
    x, far = torch.tensor([x], dtype=dtype), torch.tensor([far], dtype=dtype)
    found = threat.project(far, x)
    assert (threat.norm(found - x) <= threat.eps).all()
    assert (threat.norm(found.double() - x.double()) <= threat.eps).all()
