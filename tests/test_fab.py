"""FAB: its projections are exact, its distances those of linear models, its verdicts those of the original code."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.fab import fab
from perceptual_at.threats.hyperplanes import (
    _level_by_climbing,
    _level_by_sorting,
    shift_l1,
    shift_l2,
    shift_linf,
)
from tests.passes import host_reads
from tests.robust_model import robust_digits
from tests.strategies import DTYPES, clean_inputs, dtype_name, generator, normal, seeds, uniform

SHIFTS = {1: shift_l1, 2: shift_l2, torch.inf: shift_linf}
every_norm = pytest.mark.parametrize("order", SHIFTS)
EVERYWHERE = (-torch.inf, torch.inf)


# Onto a hyperplane, inside a box ----------------------------------------------------------------------------------


def slow_shift(order, point, normal, gap, bounds):
    """One row, by bisection for the one number that the shift depends on."""
    low, high = bounds
    sign = torch.where(normal * gap.sign() > 0, 1.0, -1.0).double() * (normal != 0)
    room = torch.where(sign > 0, high - point, point - low) * sign.abs()
    weight, missing = normal.abs(), gap.abs()
    if (weight * room).sum() <= missing:
        return sign * room
    if order == 1:
        moved = torch.zeros_like(point)
        for i in weight.argsort(descending=True).tolist():
            moved[i] = min(room[i], max(missing - (weight * moved).sum(), 0.0) / max(weight[i], 1e-300))
        return sign * moved
    pace = weight if order == 2 else torch.ones_like(weight)
    below, above = 0.0, float((room / pace.clamp_min(1e-300)).max())
    for _ in range(200):
        middle = (below + above) / 2
        enough = (weight * torch.minimum(middle * pace, room)).sum() >= missing
        below, above = (below, middle) if enough else (middle, above)
    return sign * torch.minimum(above * pace, room)


def planes(seed, rows=6, entries=5, reach=1.0, low=0.0, high=1.0):
    """Points, some at edges; normals, some entries zero; gaps, some beyond the box."""
    points = clean_inputs(seed, (rows, entries), (low, high))
    normals = normal(seed + 1, rows, entries) * (uniform(seed + 2, rows, entries) > 0.2)
    return points, normals, reach * normal(seed + 3, rows)


@pytest.mark.slow
@every_norm
@given(seed=seeds, reach=st.sampled_from([0.0, 0.1, 1.0, 5.0]), box=st.sampled_from([(0.0, 1.0), (-2.1, 2.64)]))
def test_a_shift_is_that_of_a_slow_solver(order, seed, reach, box):
    points, normals, gaps = planes(seed, reach=reach, low=box[0], high=box[1])
    shifts = SHIFTS[order](points, normals, gaps, box)
    for row in zip(shifts, points, normals, gaps, strict=True):
        assert_close(row[0], slow_shift(order, *row[1:], box), rtol=1e-9, atol=1e-9)


@every_norm
@given(seed=seeds, reach=st.sampled_from([0.1, 1.0, 5.0]))
def test_no_point_of_the_plane_in_the_box_is_nearer(order, seed, reach):
    points, normals, gaps = planes(seed, reach=reach)
    shifts = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    arrived = points + shifts
    assert (arrived >= -1e-12).all()
    assert (arrived <= 1 + 1e-12).all()
    missing = gaps - (normals * shifts).sum(dim=1)
    corner = torch.where(normals * gaps[:, None] > 0, 1.0, 0.0).double()
    beyond = (normals * (corner - points)).sum(dim=1).abs() < gaps.abs()
    assert_close(missing[~beyond], torch.zeros_like(missing[~beyond]), rtol=0, atol=1e-9)
    assert_close(arrived[beyond], torch.where(normals == 0, points, corner)[beyond])
    # other points of the plane in the box: where segments between points of the box cross it, near and far
    for spread in (0.01, 0.1, 1.0):
        ends = (arrived + spread * normal(seed + 4, 2, 50, *points.shape)).clamp(0, 1)
        sides = (normals * (ends - points)).sum(dim=-1) - gaps
        share = (sides[0] / (sides[0] - sides[1])).nan_to_num(nan=-1.0)
        others = ends[0].lerp(ends[1], share[..., None])
        crossing = (share >= 0) & (share <= 1) & (normals != 0).any(dim=1)
        lengths = torch.linalg.vector_norm(others - points, ord=order, dim=-1)
        assert (lengths >= torch.linalg.vector_norm(shifts, ord=order, dim=-1) - 1e-9)[crossing].all()


@every_norm
def test_a_shift_in_single_precision_stays_in_the_box_and_reaches_the_plane(order):
    points, normals, gaps = (value.float() for value in planes(0, rows=50, entries=200, reach=3.0))
    shifts = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    assert shifts.dtype == torch.float32
    assert ((points + shifts) > -1e-6).all()
    assert ((points + shifts) < 1 + 1e-6).all()
    assert_close((normals * shifts).sum(dim=1), gaps, rtol=1e-4, atol=1e-4)


@every_norm
def test_without_a_normal_or_without_a_gap_nothing_moves(order):
    points = uniform(0, 2, 4)
    assert not SHIFTS[order](points, torch.zeros_like(points), torch.ones(2).double(), (0.0, 1.0)).any()
    assert not SHIFTS[order](points, normal(1, 2, 4), torch.zeros(2).double(), (0.0, 1.0)).any()


@every_norm
def test_a_box_may_be_infinite(order):
    points, normals, gaps = planes(3, reach=2.0)
    normals = normals + 0.01
    shifts = SHIFTS[order](points, normals, gaps, EVERYWHERE)
    dual = {1: torch.inf, 2: 2, torch.inf: 1}[order]
    lengths = gaps.abs() / torch.linalg.vector_norm(normals, ord=dual, dim=1)
    assert_close(torch.linalg.vector_norm(shifts, ord=order, dim=1), lengths)
    assert_close((normals * shifts).sum(dim=1), gaps)


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_scale_of_a_plane_does_not_matter(order, scale):
    points, normals, gaps = (value.float() for value in planes(5))
    expected = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    assert_close(SHIFTS[order](points, scale * normals, scale * gaps, (0.0, 1.0)), expected, rtol=1e-4, atol=1e-5)


@every_norm
def test_a_shift_is_that_of_the_original_code(order):
    original = pytest.importorskip("pyautoattack.fab_projections")
    theirs = {1: original.projection_l1, 2: original.projection_l2, torch.inf: original.projection_linf}[order]
    points, normals = uniform(0, 40, 64).float(), normal(1, 40, 64).float()
    gaps = (normals * (uniform(2, 40, 64).float() - points)).sum(dim=1)  # of planes that cut the box
    expected = theirs(points, normals, gaps + (normals * points).sum(dim=1))
    ours = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@every_norm
@pytest.mark.parametrize("reach", [1.0, 30.0, 300.0])
def test_a_shift_may_take_many_entries(order, reach):
    points, normals, gaps = planes(7, rows=8, entries=400, reach=reach)
    shifts = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    assert reach < 300 or (shifts != 0).sum(dim=1).max() > 128
    for row in zip(shifts, points, normals, gaps, strict=True):
        assert_close(row[0], slow_shift(order, *row[1:], (0.0, 1.0)), rtol=1e-9, atol=1e-9)


@every_norm
def test_several_points_of_one_plane_are_shifted_as_each_alone(order):
    first, normals, gaps = planes(8, rows=9, entries=300, reach=20.0)
    second, other_gaps = uniform(9, 9, 300), 20 * normal(10, 9)
    both = SHIFTS[order](torch.stack([first, second]), normals, torch.stack([gaps, other_gaps]), (0.0, 1.0))
    assert torch.equal(both[0], SHIFTS[order](first, normals, gaps, (0.0, 1.0)))
    assert torch.equal(both[1], SHIFTS[order](second, normals, other_gaps, (0.0, 1.0)))
    for i in range(9):  # nor does it matter who else is there
        alone = SHIFTS[order](first[i : i + 1], normals[i : i + 1], gaps[i : i + 1], (0.0, 1.0))
        assert torch.equal(both[0, i : i + 1], alone)


@pytest.mark.parametrize("with_pace", [False, True])
@given(seed=seeds, reach=st.sampled_from([0.0, 0.1, 0.9, 1.0, 2.0]), entries=st.sampled_from([1, 7, 200]))
def test_a_climb_ends_at_the_level_that_sorting_finds(with_pace, seed, reach, entries):
    weights = uniform(seed, 6, entries) * (uniform(seed + 1, 6, entries) > 0.2)
    room = uniform(seed + 2, 2, 6, entries) * (uniform(seed + 3, 2, 6, entries) > 0.3) * (weights > 0)
    pace = weights if with_pace else None
    totals = reach * uniform(seed + 4, 2, 6, 1) * (weights * room).sum(dim=-1, keepdim=True)
    levels = [solve(weights, pace, room, totals) for solve in (_level_by_climbing, _level_by_sorting)]
    moves = [torch.minimum(level * (1.0 if pace is None else pace), room) for level in levels]
    assert_close(moves[0], moves[1], rtol=1e-9, atol=1e-12)


@every_norm
def test_undefined_planes_come_to_an_end(order):
    points, normals, gaps = planes(11)
    gaps[0], normals[1] = torch.nan, torch.nan
    shifts = SHIFTS[order](points, normals, gaps, (0.0, 1.0))
    assert_close(shifts[2:], SHIFTS[order](points[2:], normals[2:], gaps[2:], (0.0, 1.0)))


def test_sorting_waits_for_nothing():
    weights, room = uniform(0, 3, 9), uniform(1, 3, 9)
    with host_reads() as reads:
        _level_by_sorting(weights, weights, room, torch.ones(3, 1).double())
    assert not reads


# Distances of linear models ---------------------------------------------------------------------------------------


THREATS = [Linf(0.1), L2(0.5), L1(2.0)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: type(threat).__name__)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def linear(classes=4, entries=12, seed=0, dtype=torch.float64):
    layer = nn.Linear(entries, classes, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, classes, entries))
        layer.bias.copy_(normal(seed + 1, classes, scale=0.1))
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def right_labels(model, x):
    return model(x).argmax(dim=1)


@pytest.mark.slow
@every_threat
@pytest.mark.parametrize("target_classes", [None, 9])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_linear_model_falls_at_its_exact_distance(threat, target_classes, classes):
    model, x = linear(classes), uniform(3, 20, 3, 2, 2)
    labels = right_labels(model, x)
    large = type(threat)(50.0, bounds=EVERYWHERE)
    verdict = fab(model, x, labels, large, steps=30, target_classes=target_classes, early_stop=False, verdict=True)
    logits, weight = model(x), model[1].weight
    lead = logits.gather(1, labels[:, None]) - logits
    difference = weight[labels][:, None] - weight
    dual = {Linf: 1, L2: 2, L1: torch.inf}[type(threat)]
    steepness = torch.linalg.vector_norm(difference, ord=dual, dim=2)
    exact = torch.where(steepness > 0, lead / steepness, torch.inf).amin(dim=1)
    assert verdict.success.all()
    found = threat.norm(verdict.x_adv - x)
    assert (found >= exact * (1 - 1e-6)).all()
    assert (found <= exact * 1.01).all()


@every_threat
def test_the_distance_is_exact_at_the_edge_of_the_box_too(threat):
    model, x = linear(2), clean_inputs(4, (20, 3, 2, 2), (0.0, 1.0))
    labels = right_labels(model, x)
    large = type(threat)({Linf: 1.0, L2: 4.0, L1: 12.0}[type(threat)])
    verdict = fab(model, x, labels, large, early_stop=False, verdict=True)
    order = {Linf: torch.inf, L2: 2, L1: 1}[type(threat)]
    logits, weight = model(x), model[1].weight
    for i in range(len(x)):
        difference = weight[1 - labels[i]] - weight[labels[i]]
        gap = logits[i, labels[i]] - logits[i, 1 - labels[i]]
        shift = slow_shift(order, x[i].flatten(), difference, gap, (0.0, 1.0))
        reachable = (difference * shift).sum() > gap * (1 - 1e-9)
        assert verdict.success[i] == reachable
        if reachable:
            found = threat.norm((verdict.x_adv[i] - x[i])[None])[0]
            exact = torch.linalg.vector_norm(shift, ord=order)
            assert exact * (1 - 1e-6) <= found <= exact * 1.01


@every_threat
def test_an_eps_beyond_the_distance_succeeds_and_one_below_does_not(threat):
    model, x = linear(2), uniform(5, 20, 3, 2, 2, low=0.4, high=0.6)
    labels = right_labels(model, x)
    large = type(threat)(50.0, bounds=EVERYWHERE)
    distance = threat.norm(fab(model, x, labels, large, early_stop=False) - x)
    for factor, expected in ((1.06, True), (0.98, False)):  # 1.05 is how far the first step goes
        near = type(threat)(factor * distance, bounds=EVERYWHERE)
        verdict = fab(model, x, labels, near, steps=10, verdict=True)
        assert (verdict.success == expected).all()
        assert not expected or (verdict.step == 1).all()


# As the original --------------------------------------------------------------------------------------------------


def original_fab(model, x, labels, threat, *, steps, target_classes, restarts=1):
    """What the official code returns."""
    module = pytest.importorskip("pyautoattack.fab_pt")
    with torch.random.fork_rng(devices=[]):
        attack = module.FABAttack_PT(
            model, norm=type(threat).__name__, eps=threat.eps, n_iter=steps, n_restarts=restarts, seed=0,
            targeted=target_classes is not None, n_target_classes=target_classes or 9, device=x.device,
        )  # fmt: skip
        return attack.perturb(x, labels)


def assert_same_verdicts(model, labels, ours, x_adv):
    theirs = model(x_adv).argmax(dim=1) != labels
    assert (ours != theirs).float().mean() <= 0.02  # none on the machine it was written on
    assert abs(ours.float().mean() - theirs.float().mean()) <= 0.01
    assert 0.2 < theirs.float().mean() < 0.8  # or there was nothing to compare


@pytest.mark.parametrize("threat", [Linf(1.0), L2(6.9), L1(48.0)], ids=lambda threat: type(threat).__name__)
@pytest.mark.parametrize("target_classes", [None, 1])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_nearest_points_are_those_of_the_original_code(threat, target_classes, steps):
    layers = nn.Linear(48, 16), nn.Linear(16, 5)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(normal(i, *layer.weight.shape, scale=0.5))
    model = nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1]).requires_grad_(False)
    x = uniform(2, 100, 3, 4, 4).float()
    options = {"steps": steps, "target_classes": target_classes}
    ours = fab(model, x, right_labels(model, x), threat, **options, early_stop=False)
    theirs = original_fab(model, x, right_labels(model, x), threat, **options)
    same = (ours - theirs).abs().flatten(1).amax(dim=1) < 1e-4
    assert same.float().mean() >= 0.9  # the rest took another turn where two numbers were nearly equal
    assert ((ours - x).flatten(1).abs().amax(dim=1) > 1e-3).float().mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.17), L2(0.75), L1(1.7)], ids=lambda threat: type(threat).__name__)
@pytest.mark.parametrize("target_classes", [None, 4])
def test_verdicts_are_those_of_the_original_code(threat, target_classes):
    model, x, labels = robust_digits()
    options = {"steps": 15, "target_classes": target_classes}
    verdict = fab(model, x, labels, threat, **options, verdict=True)
    assert_same_verdicts(model, labels, verdict.success, original_fab(model, x, labels, threat, **options))


@pytest.mark.slow
def test_verdicts_are_those_of_the_original_code_with_restarts():
    model, x, labels = robust_digits()
    options = {"steps": 5, "target_classes": None, "restarts": 4}
    verdict = fab(model, x, labels, Linf(0.17), **options, verdict=True, generator=generator(0))
    assert_same_verdicts(model, labels, verdict.success, original_fab(model, x, labels, Linf(0.17), **options))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_have_few_targets(classes):
    model, x, labels = robust_digits(classes)
    threat = Linf(0.3 if classes == 2 else 0.25)
    verdict = fab(model, x, labels, threat, steps=15, target_classes=9, verdict=True)
    theirs = original_fab(model, x, labels, threat, steps=15, target_classes=classes - 1)
    assert_same_verdicts(model, labels, verdict.success, theirs)
    assert verdict.gradients.max() == 15 * (classes - 1)


# Verdicts ---------------------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """Logits by elementwise products and sums, whose bits do not depend on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(0, 5, 12))

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight.to(x.dtype)).sin().sum(dim=2)


def images(batch=30, dtype=torch.float64, seed=0):
    return clean_inputs(seed, (batch, 3, 2, 2), (0.0, 1.0), dtype)


def mostly_right(x):
    """The model's own labels, a few of them wrong."""
    labels = Pointwise()(x).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 5
    return labels


SMALL = [Linf(0.05), L2(0.15), L1(0.4)]
every_small_threat = pytest.mark.parametrize("threat", SMALL, ids=lambda threat: type(threat).__name__)
ways = pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_classes": 2},
        {"early_stop": False},
        {"restarts": 3},
        {"target_classes": 2, "restarts": 2, "early_stop": False},
    ],
    ids=str,
)


@pytest.mark.slow
@every_small_threat
@every_dtype
@ways
def test_a_verdict_is_true(threat, dtype, options):
    x = images(dtype=dtype)
    labels = mostly_right(x)
    model = Pointwise()
    verdict = fab(model, x, labels, threat, steps=10, **options, verdict=True, generator=generator(0))
    assert verdict.x_adv.dtype == dtype
    assert not verdict.x_adv.requires_grad
    assert verdict.robust.any()
    assert (verdict.step > 0).any()
    assert torch.equal(model(verdict.x_adv).argmax(dim=1) != labels, verdict.success)
    for wider in {dtype, torch.promote_types(dtype, torch.float32), torch.float64}:
        assert (threat.norm(verdict.x_adv.to(wider) - x.to(wider)) <= threat.eps).all()
    assert ((verdict.x_adv >= 0) & (verdict.x_adv <= 1)).all()
    assert torch.equal(verdict.x_adv[verdict.robust], x[verdict.robust])
    assert (verdict.step[verdict.robust] == -1).all()
    wrong_already = model(x).argmax(dim=1) != labels
    assert torch.equal(verdict.step == 0, wrong_already)
    assert torch.equal(verdict.x_adv[wrong_already], x[wrong_already])
    assert (verdict.forwards[wrong_already] == 1).all()
    assert (verdict.gradients[wrong_already] == 0).all()
    assert model.weight.grad is None


@every_small_threat
@ways
def test_what_was_spent_is_counted(threat, options):
    x = images()
    passes, backwards = [], []

    def model(z):
        passes.append(len(z))
        logits = Pointwise()(z)
        if logits.requires_grad:
            logits.register_hook(lambda grad: backwards.append(len(grad)))
        return logits

    verdict = fab(model, x, mostly_right(x), threat, steps=6, **options, verdict=True)
    assert verdict.forwards.sum() == sum(passes)
    assert verdict.gradients.sum() == sum(backwards)


@pytest.mark.slow
@every_small_threat
@pytest.mark.parametrize("target_classes", [None, 3])
def test_early_stops_change_no_verdict_and_their_absence_no_point_for_a_farther_one(threat, target_classes):
    x = images(60)
    labels = mostly_right(x)
    attack = partial(
        fab, Pointwise(), x, labels, threat, steps=10, target_classes=target_classes, restarts=2, verdict=True,
        generator=SampleGenerator(0, range(60)),
    )  # fmt: skip
    early, full = attack(), attack(early_stop=False)
    assert torch.equal(early.success, full.success)
    near, far = threat.norm(full.x_adv - x), threat.norm(early.x_adv - x)
    assert (near <= far)[early.success].all()
    assert (near < far).any()
    assert (early.forwards <= full.forwards).all()


@every_small_threat
def test_more_restarts_lose_nothing(threat):
    x = images(60)
    labels = mostly_right(x)
    results = [
        fab(Pointwise(), x, labels, threat.scaled(4), steps=2, restarts=restarts, verdict=True, early_stop=False,
            generator=SampleGenerator(0, range(60)))
        for restarts in (1, 2, 4)
    ]  # fmt: skip
    for few, more in itertools.pairwise(results):
        assert (more.success >= few.success).all()
        nearer, farther = (threat.norm(found.x_adv - x)[few.success] for found in (more, few))
        assert (nearer <= farther).all()
    assert not torch.equal(results[0].x_adv, results[-1].x_adv)


@every_small_threat
def test_restarts_begin_elsewhere_half_way_to_the_nearest_point(threat):
    x = uniform(3, 10, 3, 2, 2, low=0.4, high=0.6)
    labels = right_labels(Pointwise(), x)
    seen = []

    def model(z):
        if z.requires_grad:
            seen.append(z.detach().clone())
        return Pointwise()(z)

    attack = partial(fab, x=x, labels=labels, steps=2, early_stop=False)
    far = type(threat)(20.0, bounds=EVERYWHERE)
    first = attack(Pointwise(), threat=far, target_classes=1, verdict=True)
    distances = torch.where(first.success, threat.norm(first.x_adv - x), torch.inf)
    threat = type(threat)(float(distances.median()), bounds=EVERYWHERE)
    attack(model, threat=threat, target_classes=2, restarts=3, generator=generator(0))
    starts = seen[::2]  # of two steps each
    assert torch.equal(starts[0], x)
    assert torch.equal(starts[3], x)
    drawn = [starts[run] - x for run in (1, 2, 4, 5)]
    for one, other in itertools.combinations(drawn, 2):
        cosine = torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1))
        assert (cosine < 0.99).all()
    assert_close(threat.norm(drawn[0]), distances.clamp_max(threat.eps) / 2)
    assert (distances < threat.eps).any()
    assert (distances > threat.eps).any()


@every_small_threat
@ways
def test_a_batch_attacked_whole_equals_the_batch_attacked_in_parts(threat, options):
    x = images(12)
    labels = mostly_right(x)
    eps = 4 * threat.eps * uniform(3, 12, low=0.5, high=1.5)
    attack = partial(fab, Pointwise(), steps=2, verdict=True, **options)
    whole = attack(x, labels, type(threat)(eps), generator=SampleGenerator(7, range(12)))
    for rows in ([0], [5, 2], [11, 3, 4, 7, 1]):
        part = attack(x[rows], labels[rows], type(threat)(eps[rows]), generator=SampleGenerator(7, rows))
        assert torch.equal(part.x_adv, whole.x_adv[rows])
        assert torch.equal(part.success, whole.success[rows])
        assert torch.equal(part.step, whole.step[rows])
        assert torch.equal(part.gradients, whole.gradients[rows])


# Broken numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_small_threat
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("target_classes", [None, 2])
def test_logits_that_are_not_finite_never_reach_the_result(threat, value, target_classes):
    x = images(10)
    labels = Pointwise()(x).argmax(dim=1)

    def broken(z, everywhere):
        logits = Pointwise()(z)
        moved = torch.ones(len(z), dtype=bool) if everywhere else (z.flatten(1)[:, None] != x.flatten(1)).any(2).all(1)
        return torch.where(moved[:, None], logits * value, logits)

    for everywhere in (True, False):
        verdict = fab(
            partial(broken, everywhere=everywhere), x, labels, threat,
            steps=5, target_classes=target_classes, verdict=True,
        )  # fmt: skip
        assert verdict.x_adv.isfinite().all()
        assert (threat.norm(verdict.x_adv - x) <= threat.eps).all()
        nan = broken(verdict.x_adv, everywhere).isnan().any(dim=1)
        assert not (verdict.success & nan).any()


@every_small_threat
@pytest.mark.parametrize("target_classes", [None, 2])
def test_a_model_without_slope_keeps_its_inputs(threat, target_classes):
    x = images(5)
    labels = torch.zeros(5, dtype=torch.long)
    constant = torch.tensor([1.0, 0.5, 0.0]).double()
    verdict = fab(
        lambda z: 0 * z.flatten(1).sum(dim=1, keepdim=True) + constant, x, labels, threat,
        steps=5, restarts=2, target_classes=target_classes, verdict=True,
    )  # fmt: skip
    assert not verdict.success.any()
    assert torch.equal(verdict.x_adv, x)


@pytest.mark.parametrize("threat", [Linf(0.3), L2(1.0), L1(3.0)], ids=repr)
def test_steps_keep_their_precision_under_autocast(threat):
    def model(x):  # of products that autocast leaves alone
        return torch.stack([x[:, :5].square().sum(dim=1), x[:, 5:].square().sum(dim=1)], dim=1)

    x = uniform(3, 8, 10).float()
    labels = model(x).argmax(dim=1)
    found = fab(model, x, labels, threat, steps=5, early_stop=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(fab(model, x, labels, threat, steps=5, early_stop=False), found, rtol=0, atol=1e-6)
    assert not torch.equal(found, x)


def test_an_empty_batch_stays_empty():
    x = torch.zeros(0, 3)
    verdict = fab(linear(), x, torch.zeros(0, dtype=torch.long), Linf(0.1), verdict=True)
    assert verdict.x_adv.shape == (0, 3)
    assert len(verdict) == 0


# Malformed calls --------------------------------------------------------------------------------------------------


class Everything:
    """A threat of the user's own."""

    def project(self, x_adv, x):
        return x_adv

    steepest = random_start = norm = scaled = project


def without_slope(x):
    return torch.eye(4)[right_labels(linear(dtype=torch.float32), x)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threat": Everything()}, TypeError, "must be Linf, L2 or L1, got <"),
        ({"threat": Linf}, TypeError, "must be a threat model such as"),
        ({"threat": Linf(torch.tensor([0.1]))}, ValueError, "1 values of `eps` but `x` has 4 samples"),
        ({"labels": torch.ones(4, 4) / 4}, TypeError, "`labels` must be integer class indices"),
        ({"labels": torch.tensor([0, 1, 2, 4])}, ValueError, r"`labels` must lie in \[0, 3\]"),
        ({"x": torch.full((4, 12), 2.0)}, ValueError, "must lie in the bounds"),
        ({"x": torch.full((4, 12), torch.nan)}, ValueError, "NaN"),
        ({"model": lambda x: x[:, 0]}, ValueError, "must return logits of shape"),
        ({"model": without_slope}, ValueError, "no gradient with respect to its input"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"restarts": 1.5}, TypeError, "`restarts` must be an integer"),
        ({"target_classes": 0}, ValueError, "`target_classes` must be at least 1"),
        ({"clean_share": 1.5}, ValueError, "`clean_share` must lie in"),
        ({"overshoot": 0.9}, ValueError, "`overshoot` must lie in"),
        ({"backward_step": -0.1}, ValueError, "`backward_step` must lie in"),
        ({"model_mode": "train"}, ValueError, "`model_mode` must be one of"),
        ({"generator": SampleGenerator(0, range(3))}, ValueError, "for 3 samples but `x` has 4"),
        ({"generator": 0}, TypeError, "`generator` must be"),
    ],
)
def test_malformed_calls_are_refused(change, error, message):
    x = uniform(0, 4, 12).float()
    call = {"model": linear(dtype=torch.float32), "x": x, "threat": Linf(0.1)}
    call |= {"labels": right_labels(call["model"], x)} | change
    with pytest.raises(error, match=f"^fab: .*{message}"):
        fab(call.pop("model"), call.pop("x"), call.pop("labels"), call.pop("threat"), **call)


def test_a_step_waits_for_the_device_once_while_nothing_is_in_reach(monkeypatch):
    hyperplanes = importlib.import_module("perceptual_at.threats.hyperplanes")
    monkeypatch.setattr(hyperplanes, "_level_by_climbing", _level_by_sorting)  # as on devices
    model, x = linear(), uniform(3, 5, 3, 2, 2)

    def reads(steps):
        with host_reads() as seen:
            fab(model, x, right_labels(model, x), Linf(1e-4), steps=steps, target_classes=1)
        return len(seen)

    assert reads(12) - reads(7) == 2 * 5  # one of the two is made on CPUs alone, where looking is free


@every_threat
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_search_outlives_logits_that_are_not_finite(threat, value):
    layer, x = linear(), uniform(3, 5, 3, 2, 2)
    calls = []

    def model(points):
        calls.append(len(points))
        logits = layer(points)
        return logits + value * torch.eye(4).double()[right_labels(layer, x)] if len(calls) == 2 else logits

    large = type(threat)(50.0, bounds=EVERYWHERE)
    labels = right_labels(layer, x)
    assert fab(model, x, labels, large, steps=10, target_classes=1, verdict=True).success.all()
