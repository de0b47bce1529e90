"""Budgets and bounds as tensors: per sample, per channel, per entry; frozen entries; every dtype, exactly inside."""

import copy
import dataclasses
import math
import pickle

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf, SampleGenerator, pgd
from perceptual_at.threats import around, select
from tests.strategies import DTYPES, dtype_name, dtypes, generator, normal, scales, seeds, uniform

KINDS = {"Linf": Linf, "L2": L2, "L1": L1}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
shapes = st.sampled_from([(3, 4), (4, 1, 2, 2), (2, 3, 5, 5), (5, 2, 3)])
layouts = st.sampled_from(["sample", "sample, all dimensions", "channel", "entry", "everything"])


def laid_out(layout, shape, seed, low, high, dtype=torch.float64):
    """Numbers that broadcast over a shape in one of the ways there are."""
    sizes = {
        "sample": shape[:1],
        "sample, all dimensions": (shape[0], *[1] * (len(shape) - 1)),
        "channel": (1, shape[1], *[1] * (len(shape) - 2)),
        "entry": (1, *shape[1:]),
        "everything": shape,
    }
    return uniform(seed, *sizes[layout], low=low, high=high, dtype=dtype)


def over(value, x):
    """A budget or bound as it broadcasts over the inputs, in float64."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim == 1 else value


@st.composite
def problems(draw):
    """A threat with tensors in it, and clean inputs inside its box."""
    kind, shape, seed, dtype = draw(st.sampled_from(list(KINDS.values()))), draw(shapes), draw(seeds), draw(dtypes)
    size = {Linf: 0.5, L2: 1.0, L1: 4.0}[kind]
    eps = laid_out(draw(layouts), shape, seed, 1e-3, size, draw(st.sampled_from([torch.float64, torch.float32])))
    if draw(st.booleans()):
        eps = eps * (torch.rand(eps.shape, generator=generator(seed)) > 0.4)
    low, high = draw(st.sampled_from([(0.0, 1.0), (-math.inf, math.inf), (-math.inf, 2.0), None])) or (
        laid_out(draw(layouts), shape, seed + 1, -2.5, -1.5),
        laid_out(draw(layouts), shape, seed + 2, 1.5, 2.5),
    )
    x = uniform(seed + 3, *shape, low=-0.2, high=1.2)
    x = x.clamp(0, 1) if isinstance(high, float) else torch.minimum(torch.maximum(2 * x, over(low, x)), over(high, x))
    if not isinstance(high, float):  # the nearest numbers of the dtype that lie in the box
        x = 0.99 * x
    options = {"projection": draw(st.sampled_from(["box_ball", "ball_box"]))} if kind is L2 else {}
    return kind(eps, bounds=(low, high), **options), x.to(dtype), seed


def assert_inside(threat, x_adv, x):
    """Ball and box hold with no tolerance, whatever dtype the difference is taken in."""
    assert x_adv.dtype == x.dtype
    assert x_adv.shape == x.shape
    eps = over(threat.eps, x)
    for dtype in {x.dtype, torch.promote_types(x.dtype, torch.float32), torch.float64}:
        delta = x_adv.to(dtype) - x.to(dtype)
        assert (delta.double().abs() <= eps).all(), "no entry goes further than its own budget"
        assert (threat.norm(delta).double() <= threat.budgets(x.double())).all(), dtype
    low, high = (over(bound, x) for bound in threat.bounds)
    assert (x_adv.double() >= low).all()
    assert (x_adv.double() <= high).all()
    frozen = (eps == 0).expand_as(x)
    assert torch.equal(x_adv[frozen], x[frozen])
    assert threat.contains(x_adv, x).all()


@given(problems(), scales)
def test_projections_land_in_the_set_exactly(problem, scale):
    threat, x, seed = problem
    point = x + normal(seed + 9, *x.shape, scale=scale, dtype=x.dtype)
    once = threat.project(point, x)
    assert_inside(threat, once, x)
    assert torch.equal(threat.project(once, x), once)
    assert_inside(threat, around(threat, x)(point), x)
    wider = threat.project(x.double() + normal(seed + 9, *x.shape, scale=scale), x)
    assert_inside(threat, wider, x)


@given(problems())
def test_random_and_far_starts_are_inside(problem):
    threat, x, seed = problem
    for numbers in (generator(seed), SampleGenerator(seed, torch.arange(len(x)))):
        assert_inside(threat, threat.random_start(x, generator=numbers), x)
        assert_inside(threat, threat.far_start(x, generator=numbers), x)


@settings(max_examples=15)
@given(problems())
def test_attacks_stay_inside(problem):
    threat, x, seed = problem
    weight = normal(seed, x[0].numel(), 3, dtype=x.dtype)
    labels = torch.arange(len(x)) % 3
    x_adv = pgd(lambda z: z.flatten(1) @ weight, x, labels, threat, steps=3, generator=generator(seed), validate=False)
    assert_inside(threat, x_adv, x)


@given(problems(), st.sampled_from([1e-30, 1.0, 1e30]))
def test_the_steepest_step_has_unit_norm_and_no_other_gains_more(problem, scale):
    threat, x, seed = problem
    grad = normal(seed, *x.shape)
    step = threat.steepest(grad * scale)
    moves = (over(threat.eps, x) > 0).expand_as(x).flatten(1).any(dim=1) | torch.tensor(threat.eps.ndim == 1)
    assert_close(threat.norm(step)[moves], torch.ones(len(x), dtype=torch.float64)[moves], rtol=1e-13, atol=0)
    gain = (step * grad).flatten(1).sum(dim=1)
    for i in range(4):
        other = normal(seed + 1 + i, *x.shape) ** (1 + 2 * (i % 3))
        if threat.eps.ndim > 1:
            other = other * (over(threat.eps, x) > 0)
        other = other / threat.norm(other).clamp_min(1e-30).reshape(-1, *[1] * (x.ndim - 1))
        assert (gain >= (other * grad).flatten(1).sum(dim=1) - 1e-12).all()


@every_kind
@given(shapes, seeds, dtypes)
def test_equal_entries_mean_what_one_number_means(kind, shape, seed, dtype):
    x, eps = uniform(seed, *shape, dtype=dtype), 0.3
    one = kind(eps)
    for layout in ("sample, all dimensions", "channel", "everything"):
        many = kind(torch.full_like(laid_out(layout, shape, 0, 0.0, 1.0), eps))
        point = x + normal(seed + 1, *shape, dtype=dtype)
        tolerance = 20 * torch.finfo(dtype).eps
        assert_close(many.project(point, x), one.project(point, x), rtol=tolerance, atol=tolerance)
        assert_close(many.steepest(point), one.steepest(point), rtol=tolerance, atol=tolerance)
        assert_close(many.norm(point).double(), one.norm(point).double(), rtol=1e-6, atol=0)


@every_kind
@pytest.mark.parametrize("start", ["clean", "random"])
def test_an_attack_on_normalised_inputs_is_the_attack_on_the_images(kind, start):
    # pixel space and normalised space are the same problem in other units
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.5, 0.25]))
    weight = normal(3, 12, 4)

    def images(z):
        return z.flatten(1).mul(2).sin() @ weight

    x, labels = uniform(0, 5, 3, 2, 2), torch.arange(5) % 4
    eps = {Linf: 0.1, L2: 0.4, L1: 1.0}[kind]
    plain = pgd(images, x, labels, kind(eps), start=start, generator=generator(1))
    threat = kind(eps / std, bounds=((0 - mean) / std, (1 - mean) / std))
    scaled = pgd(
        lambda z: images(z * std + mean), (x - mean) / std, labels, threat, start=start, generator=generator(1)
    )
    assert_close(scaled * std + mean, plain, rtol=0, atol=1e-9)


@every_kind
@every_dtype
def test_no_budget_gives_back_the_inputs(kind, dtype):
    x = uniform(0, 4, 3, 2, 2, low=-0.5, high=1.5, dtype=dtype).clamp(0, 1)
    weight = normal(1, 12, 3, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0])
    for eps in (0, torch.tensor(0.0), torch.zeros(4), torch.zeros(1, 3, 1, 1)):
        threat = kind(eps)
        assert torch.equal(threat.project(x + normal(2, *x.shape, dtype=dtype), x), x)
        assert torch.equal(threat.random_start(x, generator=generator(0)), x)
        for start in ("clean", "random"):
            x_adv = pgd(lambda z: z.flatten(1) @ weight, x, labels, threat, start=start, steps=2)
            assert torch.equal(x_adv, x)


@every_kind
def test_samples_with_and_without_a_budget_share_a_batch(kind):
    x = uniform(0, 3, 4)
    threat = kind(torch.tensor([0.0, 0.2, 0.0], dtype=torch.float64))
    x_adv = pgd(lambda z: z[:, :2] - z[:, 2:], x, torch.tensor([0, 1, 0]), threat)
    assert torch.equal(x_adv[[0, 2]], x[[0, 2]])
    assert not torch.equal(x_adv[1], x[1])


@every_kind
def test_frozen_features_never_move_and_the_others_get_the_whole_budget(kind):
    x, free = torch.full((2, 6), 0.5, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    weight = torch.tensor([3.0, 9, -9, 2, -1, 5], dtype=torch.float64)
    threat = kind(0.2 * free[None], bounds=(-math.inf, math.inf))  # out of reach

    def model(z):
        return torch.stack([z @ weight, -(z @ weight)], dim=1)

    step = {Linf: 0.05, L2: 2.0, L1: 0.05}[kind]
    x_adv = pgd(model, x, torch.zeros(2, dtype=torch.long), threat, steps=40, step_size=step)
    g = weight * free
    best = {
        Linf: 0.2 * g.sign(), L2: 0.2 * g / g.norm(), L1: torch.tensor([0.2, 0, 0, 0, 0, 0], dtype=torch.float64)
    }[kind]  # fmt: skip
    assert_close(x_adv, x - best, rtol=0, atol=1e-9)


def test_a_random_start_fills_the_ball_of_the_free_features():
    samples = 20_000
    eps = torch.tensor([[0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    for kind in (L2, L1, Linf):
        threat = kind(eps, bounds=(-math.inf, math.inf))
        delta = threat.random_start(torch.zeros(samples, 4, dtype=torch.float64), generator=generator(3))
        filled = ((threat.norm(delta) / 0.5) ** 2).sort().values  # a ball of two dimensions
        even = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        assert (filled - even).abs().max() < 2.0 / math.sqrt(samples)


@pytest.mark.parametrize("box", [(0.5, 0.7), (0.1, 0.3), (0.07, 0.66)])
def test_a_budget_of_the_whole_box_is_not_refused_for_a_rounding(box):
    for first in range(0, 100, 3):
        for last in range(first + 1, 101, 2):
            Linf((last - first) / 100, bounds=(first / 100, last / 100))
    Linf(round(box[1] - box[0], 2), bounds=box)
    with pytest.raises(ValueError, match="exceeds the input range"):
        Linf(1.01 * (box[1] - box[0]), bounds=box)


def test_a_larger_budget_can_be_had_on_request():
    assert Linf(0.75).scaled(4) == Linf(1.0)
    assert Linf(0.75, bounds=(-1, 1)).scaled(4) == Linf(2.0, bounds=(-1, 1))
    x = uniform(0, 3, 4)
    for kind in (Linf, L2, L1):
        assert torch.equal(kind(0.01).whole_box(x).project(1 - x.round(), x), 1 - x.round())


def test_bounds_per_channel_hold():
    low, high = torch.tensor([-1.0, -2.0]).reshape(1, 2, 1), torch.tensor([1.0, 3.0]).reshape(1, 2, 1)
    x = torch.zeros(3, 2, 4)
    far = Linf(4.0, bounds=(low, high)).project(torch.full_like(x, 9.0), x)
    assert_close(far, torch.tensor([1.0, 3.0]).reshape(1, 2, 1).expand(3, 2, 4))
    half = Linf(2.5, bounds=(low, 0.5)).project(torch.full_like(x, -9.0), x)
    assert_close(half, low.expand(3, 2, 4))


def test_a_constant_feature_may_have_equal_bounds():
    threat = Linf(0.5, bounds=(torch.tensor([[0.0, 0.25]]), torch.tensor([[1.0, 0.25]])))
    x = torch.tensor([[0.5, 0.25]])
    assert torch.equal(threat.project(torch.tensor([[0.75, 0.75]]), x), torch.tensor([[0.75, 0.25]]))


# Values -----------------------------------------------------------------------------------------------------------


@given(problems())
def test_threats_with_tensors_compare_hash_copy_and_pickle(problem):
    threat, _, _ = problem
    for twin in (pickle.loads(pickle.dumps(threat)), copy.deepcopy(threat), dataclasses.replace(threat)):
        assert twin == threat
        assert hash(twin) == hash(threat)
        assert {threat: 1}[twin] == 1
    assert threat != dataclasses.replace(threat, eps=threat.eps * 0.5 + 1e-4)
    assert threat != dataclasses.replace(threat, eps=0.3)
    assert threat != "a threat"
    repr(threat)


def test_a_threat_does_not_change_with_the_tensor_it_was_made_of():
    eps = torch.tensor([0.1, 0.2])
    threat = Linf(eps)
    eps.zero_()
    assert threat == Linf(torch.tensor([0.1, 0.2]))


def test_numbers_without_dimensions_are_numbers():
    assert Linf(torch.tensor(0.25)) == Linf(0.25)
    assert L2(0.5, bounds=(torch.tensor(-1.0), torch.tensor(1.0))) == L2(0.5, bounds=(-1, 1))


def test_the_repr_counts_in_255ths_in_tensors_too():
    assert repr(Linf(torch.tensor([[[[8 / 255]], [[4 / 255]], [[0.1]]]]))) == "Linf(eps=<1x3x1x1: 8/255, 4/255, 0.1>)"
    many = Linf(torch.linspace(1, 16, 16, dtype=torch.float64).reshape(1, 16) / 255)
    assert repr(many) == "Linf(eps=<1x16 values from 1/255 to 16/255>)"
    assert repr(L2(0.5, bounds=(torch.tensor([[-1.0, -2.0]]), 3))) == "L2(eps=0.5, bounds=(<1x2: -1, -2>, 3.0))"


@given(problems(), st.lists(st.booleans(), min_size=5, max_size=5))
def test_rows_are_selected_with_their_budgets_and_bounds(problem, kept):
    threat, x, seed = problem
    mask = torch.tensor(kept[: len(x)])
    point = x + normal(seed + 7, *x.shape, dtype=x.dtype)
    rows = mask.nonzero().squeeze(1)
    for chosen in (mask, rows):
        part = select(threat, chosen)
        assert torch.equal(part.project(point[chosen], x[chosen]), threat.project(point, x)[chosen])
        assert torch.equal(part.budgets(x[chosen]), threat.budgets(x)[chosen])


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (torch.full((3,), 0.1), r".*3 values.* but `x` has 4 samples"),
        (torch.full((2, 1, 1), 0.1), r"`eps` of shape \(2, 1, 1\) .* Did you mean \(1, 2, 1, 1\)\?"),
        (torch.full((1, 3, 1, 1), 0.1), r"`eps` of shape \(1, 3, 1, 1\) must have as many dimensions as `x`"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(eps, message):
    x = torch.full((4, 2, 3, 3), 0.5)
    for kind in (Linf, L2, L1):
        for call in (lambda t: t.project(x, x), lambda t: t.random_start(x), lambda t: t.budgets(x)):
            with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
                call(kind(eps))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linf(torch.full((1, 2), 0.1, dtype=torch.int64)), TypeError, "`eps` must be a number or floating"),
        (lambda: L2(torch.tensor([[0.1, -0.1]])), ValueError, "every `eps` must be positive and finite, or 0"),
        (lambda: L1(torch.tensor([[0.1, math.inf]])), ValueError, "every `eps` must be positive and finite, or 0"),
        (lambda: Linf(torch.tensor([[0.1, 8.0]])), ValueError, "exceeds the input range"),
        (lambda: L2(0.1, bounds=(torch.tensor([[0.0, 1.0]]), 0.5)), ValueError, "low <= high everywhere"),
        (lambda: L2(0.1, bounds=(torch.tensor([[0.0, math.nan]]), 0.5)), ValueError, "low <= high everywhere"),
        (lambda: L2(0.1, bounds=(torch.tensor([0, 1]), 2)), TypeError, "`bounds` must be a number or floating"),
        (lambda: L2(0.1, bounds=(torch.zeros(1, 2), "1")), ValueError, "`bounds` must be numbers"),
        (lambda: L1(0.1, bounds=(numpy.zeros(2), numpy.ones(2))), TypeError, "^L1: `bounds` .* got ndarray"),
    ],
)
def test_malformed_tensors_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_differences_that_round_outwards_are_allowed_for():
    # In float16 the difference to 1e-4 rounds up to 0.3, which is more than eps, although the point is inside.
    grid = 2.0**-12
    k = round(0.3 / grid)
    x = torch.tensor([[1e-4]], dtype=torch.float16)
    eps = k * grid - 0.5e-4
    for kind in (L2, L1):
        threat = kind(eps)
        x_adv = threat.project(torch.ones_like(x), x)
        assert threat.norm(x_adv - x).double() <= eps
        assert x_adv > 0.298


# The boxes of hundredths -------------------------------------------------------------------------------------------

BOXES = [(low / 100, high / 100) for low in range(101) for high in range(low + 1, 101)]


def as_given(value, dtype):
    """A number as it is written, or as a tensor of a dtype holds it."""
    return value if dtype is None else torch.tensor([value], dtype=dtype)


@pytest.mark.parametrize("of_bounds", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("of_eps", [None, *DTYPES], ids=str)
def test_a_budget_as_wide_as_its_box_is_taken_however_both_are_rounded(of_eps, of_bounds):
    assert len(BOXES) == 5050
    every = 1 if of_eps is None and of_bounds is None else 7
    for low, high in BOXES[::every]:
        bounds = as_given(low, of_bounds), as_given(high, of_bounds)
        for eps in (high - low, round(high - low, 2)):
            Linf(as_given(eps, of_eps), bounds=bounds)


@pytest.mark.slow
@pytest.mark.parametrize("of_bounds", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("of_eps", [None, *DTYPES], ids=str)
@every_kind
def test_every_box_in_every_dtype(kind, of_eps, of_bounds):
    for low, high in BOXES:
        kind(as_given(round(high - low, 2), of_eps), bounds=(as_given(low, of_bounds), as_given(high, of_bounds)))


@every_kind
@every_dtype
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_projections_into_every_box_stay_inside(kind, dtype, given):
    low, high = (torch.tensor(side, dtype=given).reshape(-1, 1) for side in zip(*BOXES, strict=True))
    wider = high > low  # some are points in half precision
    low, high = low[wider].reshape(-1, 1), high[wider].reshape(-1, 1)
    threat = kind((high - low).flatten(), bounds=(low, high))
    middle = low.double() + (high.double() - low.double()) * torch.linspace(0.3, 0.7, 4, dtype=torch.float64)
    x = middle.to(dtype)
    inside = ((x.double() >= low.double()) & (x.double() <= high.double())).all(dim=1)
    point = threat.project(x + torch.tensor([9.0, -9.0, 0.5, 0.0], dtype=dtype), x)
    assert bool(((point.double() >= low.double()) & (point.double() <= high.double()))[inside].all())
    assert bool(threat.contains(point, x)[inside].all())
    assert int(inside.sum()) > (2500 if dtype == torch.bfloat16 else 4000)


def test_a_budget_beyond_the_box_is_still_refused():
    for dtype in (None, *DTYPES):
        for eps in (0.21, 0.5, 8.0):
            with pytest.raises(ValueError, match="exceeds the input range"):
                Linf(as_given(eps, dtype), bounds=(0.5, 0.7))


@pytest.mark.parametrize("kind_of_number", [numpy.float16, numpy.float32, numpy.float64])
def test_numbers_of_numpy_are_rounded_too(kind_of_number):
    for low, high in BOXES[::7]:
        Linf(kind_of_number(round(high - low, 2)), bounds=(kind_of_number(low), kind_of_number(high)))
