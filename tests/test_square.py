"""Square: its squares and pyramids are those of the paper, its verdicts those of the original code."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf, margin
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.square import _grid, _pyramids, _side, square
from perceptual_at.divergences import cross_entropy
from tests.passes import host_reads
from tests.robust_model import robust_digits
from tests.strategies import DTYPES, clean_inputs, dtype_name, generator, normal, uniform

THREATS = [Linf(0.1), L2(0.4), L1(1.2)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: type(threat).__name__)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# The pieces of the method -----------------------------------------------------------------------------------------


def original_square(model, x, labels, threat, *, queries, reach_edge=True):
    """Misclassified by the official code, boolean `(B,)`; with `reach_edge` its off-by-one is corrected."""
    module = pytest.importorskip("pyautoattack.square")

    class Corrected(module.SquareAttack):
        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, shape)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        attack = (Corrected if reach_edge else module.SquareAttack)(
            model, norm=type(threat).__name__, eps=threat.eps, n_queries=queries, resc_schedule=False, device=x.device
        )
        return model(attack.perturb(x, labels)).argmax(dim=1) != labels


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_sides_shrink_as_in_the_original_code(kind):
    module = pytest.importorskip("pyautoattack.square")
    attack = module.SquareAttack(None, p_init=0.8, resc_schedule=False)
    for size in (8, 28, 32, 224):
        for query in [*range(60), 199, 200, 201, 1000, 1001, 4001, 6001, 8000, 8001, 9999]:
            side = round(math.sqrt(attack.p_selection(query) * size * size))
            if kind is not Linf:
                side = max(side, 3) + 1 - max(side, 3) % 2
            assert _side(kind.p, 0.8, query, size, size) == min(max(side, 1), size)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 25])
def test_pyramids_are_those_of_the_original_code(order, side):
    module = pytest.importorskip("pyautoattack.square")
    attack = module.SquareAttack(None, norm=f"L{order}", device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [attack.eta(side) for _ in range(20)]
    ours = _pyramids(side, order, torch.float32, torch.device("cpu"))
    for turned in (0, 1):
        assert any(torch.allclose(ours[turned], pyramid, atol=1e-6) for pyramid in theirs)
    assert all(any(torch.allclose(one, pyramid, atol=1e-6) for one in ours) for pyramid in theirs)


def test_a_pyramid_by_hand():
    # above: a row of three, 1 in the middle and a quarter more everywhere; below: two rows around the lower middle
    above = torch.tensor([[0.25, 1.25, 0.25]]).double()
    below = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]]).double()
    expected = torch.cat([above / above.norm(), -below / below.norm()]) / math.sqrt(2)
    upright, turned = _pyramids(3, 2, torch.float64, torch.device("cpu"))
    assert_close(upright, expected)
    assert_close(turned, expected.T)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(32, 32, (6, 1, 5, 5)), (28, 28, (5, 1, 5, 5)), (8, 8, (1, 1, 7, 7)), (12, 12, (2, 1, 5, 5)), (3, 4, (1, 0, 3, 4)),
     (8, 32, (1, 1, 7, 31)), (224, 224, (44, 2, 5, 5))],
)  # fmt: skip
def test_the_grid_of_the_start(height, width, expected):
    assert _grid(height, width) == expected
    side, first, down, across = expected
    assert first + down * side <= height
    assert first + across * side <= width


class Sees(nn.Module):
    """Remembers what it is shown; class 0 always wins, by a margin that is never twice the same."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        logits = torch.zeros(len(x), 3, dtype=x.dtype)
        logits[:, 0] = 1 + 1 / (1 + len(self.seen))  # every proposal has a larger loss
        return logits


def walk(threat, x, queries, **options):
    model = Sees()
    square(model, x, torch.zeros(len(x), dtype=torch.long), threat, queries=queries, generator=generator(0), **options)
    return model.seen[1:]


def test_linf_starts_with_stripes_and_goes_on_with_squares():
    x = uniform(0, 5, 2, 12, 10, low=0.2, high=0.8)
    start, *proposals = walk(Linf(0.1), x, 60)
    assert_close((start - x).abs(), torch.full_like(x, 0.1))
    assert torch.equal((start - x).sign(), (start - x).sign()[:, :, :1].expand_as(x))
    for query, (before, after) in enumerate(itertools.pairwise([start, *proposals])):
        side = _side(math.inf, 0.8, query, 12, 10)
        assert_close((after - x).abs(), torch.full_like(x, 0.1))
        changed = (before - after).abs() > 0.1
        for sample in changed.any(dim=1):  # inside one square
            rows, columns = sample.any(dim=1).nonzero(), sample.any(dim=0).nonzero()
            if len(rows):
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side


@every_threat
@pytest.mark.parametrize("early_stop", [True, False])
def test_proposals_stay_as_the_model_was_given_them(threat, early_stop):
    given, copies, x = [], [], uniform(0, 4, 1, 8, 8)

    def model(points):
        given.append(points)
        copies.append(points.clone())
        return torch.stack([points.flatten(1).mean(dim=1), torch.full((len(points),), 0.48).double()], dim=1)

    square(model, x, torch.zeros(4, dtype=torch.long), threat, queries=40, early_stop=early_stop)
    for points, copy in zip(given[1:], copies[1:], strict=True):
        assert torch.equal(points, copy)


def test_a_query_waits_for_the_device_once():
    def reads(queries):
        def model(points):  # never wrong
            return torch.stack([points.mean(dim=(1, 2, 3)), torch.full((len(points),), -9.0).double()], dim=1)

        x, labels = uniform(0, 4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
        with host_reads() as seen:
            square(model, x, labels, Linf(0.1), queries=queries, generator=generator(0))
        return len(seen)

    assert reads(30) - reads(20) == 10


def places(threat, reach_edge):
    """Where proposals change something, over all samples."""
    x = uniform(0, 30, 1, 9, 9, low=0.4, high=0.6)
    seen = walk(threat, x, 250, reach_edge=reach_edge)
    changes = [(after - before).abs() > 1e-3 for before, after in itertools.pairwise(seen)]
    return torch.stack(changes).any(dim=0).any(dim=0)[0]


def test_squares_reach_every_pixel_unless_told_to_stay_off_the_last_row_and_column():
    assert places(Linf(0.1), reach_edge=True).all()
    inner = places(Linf(0.1), reach_edge=False)
    assert inner[:-1, :-1].all()
    assert not inner[-1].any()
    assert not inner[:, -1].any()


def test_samples_have_squares_of_their_own():
    x = torch.full((6, 1, 8, 8), 0.5).double()
    for threat in THREATS:
        start, *_, last = walk(threat, x, 30)
        assert len({tuple(sample.flatten().tolist()) for sample in start}) == 6
        assert len({tuple(sample.flatten().tolist()) for sample in last}) == 6


@pytest.mark.parametrize("threat", THREATS[1:], ids=lambda threat: type(threat).__name__)
def test_pyramids_spend_the_whole_budget(threat):
    x = uniform(0, 5, 3, 11, 11, low=0.45, high=0.55)
    seen = walk(threat, x, 80)
    for point in seen:
        assert_close(threat.norm(point - x), torch.full((5,), threat.eps).double(), rtol=0.02, atol=0)
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before, after)


# As the original --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.18), L2(0.75), L1(2.0)], ids=lambda threat: type(threat).__name__)
def test_robust_accuracy_is_that_of_the_original_code(threat):
    # A search of 200 queries is far from its end: two runs of the original code differ on 5 to 10 % of the samples.
    model, x, labels = robust_digits()
    for reach_edge in (True, False) if isinstance(threat, Linf) else (True,):
        options = {"queries": 200, "reach_edge": reach_edge}
        verdict = square(model, x, labels, threat, **options, verdict=True, generator=generator(0))
        theirs = original_square(model, x, labels, threat, **options)
        assert (verdict.success != theirs).float().mean() < 0.12
        assert abs(verdict.success.float().mean() - theirs.float().mean()) < 0.04
        assert 0.15 < theirs.float().mean() < 0.7


# Models with known answers ----------------------------------------------------------------------------------------


def linear(entries, seed=0, classes=2):
    layer = nn.Linear(entries, classes, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, classes, entries))
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


@pytest.mark.slow
def test_on_a_linear_model_the_search_ends_at_the_best_corner():
    model, x = linear(18), uniform(1, 8, 2, 3, 3, low=0.2, high=0.8)
    labels = model(x).argmax(dim=1)
    difference = (model[1].weight[1 - labels] - model[1].weight[labels]).reshape(x.shape)
    best = x + 0.1 * difference.sign()
    found = square(model, x, labels, Linf(0.1), queries=3000, early_stop=False, generator=generator(0))
    assert_close(found, best)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [L2(0.5), L1(1.5)], ids=lambda threat: type(threat).__name__)
def test_on_a_linear_model_the_search_comes_near_the_optimum(threat):
    model, x = linear(64), uniform(1, 8, 1, 8, 8, low=0.45, high=0.55)
    labels = model(x).argmax(dim=1)
    difference = model[1].weight[1 - labels] - model[1].weight[labels]
    dual = torch.linalg.vector_norm(difference, ord=2 if isinstance(threat, L2) else torch.inf, dim=1)
    found = square(model, x, labels, threat, queries=1500, early_stop=False, generator=generator(0))
    gain = margin(model(found), labels) - margin(model(x), labels)
    assert (gain > (0.6 if isinstance(threat, L2) else 0.35) * threat.eps * dual).all()
    assert (gain <= threat.eps * dual * (1 + 1e-9)).all()


class Pointwise(nn.Module):
    """Logits by elementwise products and sums, whose bits do not depend on the size of the batch."""

    def __init__(self, entries=48):
        super().__init__()
        self.weight = nn.Parameter(normal(0, 5, entries))

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight.to(x.dtype)).sin().sum(dim=2)


def images(batch=30, dtype=torch.float64, shape=(3, 4, 4)):
    return clean_inputs(0, (batch, *shape), (0.0, 1.0), dtype)


def mostly_right(x):
    """The model's own labels, a few of them wrong."""
    labels = Pointwise(x[0].numel())(x).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 5
    return labels


ways = pytest.mark.parametrize(
    "options", [{}, {"early_stop": False}, {"restarts": 2}, {"loss": cross_entropy}], ids=", ".join
)


@pytest.mark.slow
@every_threat
@every_dtype
@ways
def test_a_verdict_is_true(threat, dtype, options):
    x = images(dtype=dtype)
    labels = mostly_right(x)
    model = Pointwise()
    verdict = square(model, x, labels, threat, queries=20, **options, verdict=True, generator=generator(0))
    assert verdict.x_adv.dtype == dtype
    assert not verdict.x_adv.requires_grad
    assert verdict.robust.any()
    assert (verdict.step > 0).any()
    assert torch.equal(model(verdict.x_adv).argmax(dim=1) != labels, verdict.success)
    for wider in {dtype, torch.promote_types(dtype, torch.float32), torch.float64}:
        assert (threat.norm(verdict.x_adv.to(wider) - x.to(wider)) <= threat.eps).all()
    assert ((verdict.x_adv >= 0) & (verdict.x_adv <= 1)).all()
    assert (verdict.step[verdict.robust] == -1).all()
    wrong_already = model(x).argmax(dim=1) != labels
    assert torch.equal(verdict.step == 0, wrong_already)
    assert torch.equal(verdict.x_adv[wrong_already], x[wrong_already])
    assert (verdict.forwards[wrong_already] == 1).all()
    assert not verdict.gradients.any()
    assert model.weight.grad is None


@every_threat
@ways
def test_what_was_spent_is_counted(threat, options):
    x, passes = images(), []

    def model(z):
        passes.append(len(z))
        assert not torch.is_grad_enabled()
        return Pointwise()(z)

    verdict = square(model, x, mostly_right(x), threat, queries=20, **options, verdict=True)
    assert verdict.forwards.sum() == sum(passes)
    if options.get("early_stop", True):
        assert torch.equal(verdict.step + 1, verdict.forwards.where(verdict.success, 0))
    assert verdict.forwards[verdict.robust].unique().tolist() == [1 + 21 * options.get("restarts", 1)]


@every_threat
def test_early_stops_change_no_verdict_and_their_absence_finds_larger_losses(threat):
    x = images(60)
    labels = mostly_right(x)
    attack = partial(
        square, Pointwise(), x, labels, threat, queries=30, restarts=2, verdict=True,
        generator=SampleGenerator(0, range(60)),
    )  # fmt: skip
    early, full = attack(), attack(early_stop=False)
    assert torch.equal(early.success, full.success)
    larger, smaller = (margin(Pointwise()(found.x_adv), labels) for found in (full, early))
    assert (larger >= smaller).all()
    assert (larger > smaller)[early.step > 0].any()


@every_threat
def test_more_queries_and_more_restarts_lose_nothing(threat):
    x = images(60)
    labels = mostly_right(x)
    attack = partial(square, Pointwise(), x, labels, threat, verdict=True, generator=SampleGenerator(0, range(60)))
    for options in ([{"queries": q} for q in (5, 25, 120)], [{"queries": 10, "restarts": r} for r in (1, 2, 4)]):
        results = [attack(**option) for option in options]
        for few, more in itertools.pairwise(results):
            assert (more.success >= few.success).all()
            losses = [margin(Pointwise()(found.x_adv), labels) for found in (few, more)]
            assert (losses[0] <= losses[1])[~more.success].all()
        assert not torch.equal(results[0].x_adv, results[-1].x_adv)


@pytest.mark.slow
@every_threat
@ways
def test_a_batch_attacked_whole_equals_the_batch_attacked_in_parts(threat, options):
    x = images(12)
    labels = mostly_right(x)
    eps = threat.eps * uniform(3, 12, low=0.5, high=1.5)
    attack = partial(square, Pointwise(), queries=120, verdict=True, **options)
    whole = attack(x, labels, type(threat)(eps), generator=SampleGenerator(7, range(12)))
    for rows in ([0], [5, 2], [11, 3, 4, 7, 1]):
        part = attack(x[rows], labels[rows], type(threat)(eps[rows]), generator=SampleGenerator(7, rows))
        assert torch.equal(part.x_adv, whole.x_adv[rows])
        assert torch.equal(part.success, whole.success[rows])
        assert torch.equal(part.step, whole.step[rows])
        assert torch.equal(part.forwards, whole.forwards[rows])


@every_threat
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1), (3, 2, 3), (2, 1, 9), (1, 12, 12), (1, 7, 30)], ids=str)
def test_images_of_any_shape(threat, shape):
    x = images(6, shape=shape)
    verdict = square(Pointwise(x[0].numel()), x, mostly_right(x), threat, queries=30, early_stop=False, verdict=True)
    assert verdict.x_adv.shape == x.shape
    assert (threat.norm(verdict.x_adv - x) <= threat.eps).all()
    assert not torch.equal(verdict.x_adv, x)


@every_threat
def test_any_bounds(threat):
    bounds = (-2.1, 2.64), (-math.inf, math.inf)
    for low_high in bounds:
        x = clean_inputs(0, (10, 1, 6, 6), low_high)
        allowed = type(threat)(threat.eps, bounds=low_high)
        verdict = square(Pointwise(36), x, mostly_right(x), allowed, queries=30, verdict=True)
        assert (allowed.norm(verdict.x_adv - x) <= allowed.eps).all()
        assert (verdict.step > 0).any()


def test_a_model_that_cannot_be_differentiated():
    x = images(20)
    labels = mostly_right(x)
    verdict = square(lambda z: Pointwise()(z).detach().round(), x, labels, Linf(0.3), queries=50, verdict=True)
    assert (verdict.step > 0).any()


@every_threat
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_logits_that_are_not_finite_never_reach_the_result(threat, value):
    x = images(10)
    labels = Pointwise()(x).argmax(dim=1)
    clean = {tuple(sample.flatten().tolist()) for sample in x}

    def broken(z, everywhere):
        logits = Pointwise()(z)
        moved = torch.tensor([everywhere or tuple(sample.flatten().tolist()) not in clean for sample in z])
        return torch.where(moved[:, None], logits * value, logits)

    for everywhere in (True, False):
        model = partial(broken, everywhere=everywhere)
        verdict = square(model, x, labels, threat, queries=10, verdict=True)
        assert verdict.x_adv.isfinite().all()
        assert (threat.norm(verdict.x_adv - x) <= threat.eps).all()
        assert not (verdict.success & model(verdict.x_adv).isnan().any(dim=1)).any()


def test_an_empty_batch_stays_empty():
    verdict = square(Pointwise(), torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.long), Linf(0.1), verdict=True)
    assert verdict.x_adv.shape == (0, 3, 4, 4)
    assert len(verdict) == 0


# Malformed calls --------------------------------------------------------------------------------------------------


class Everything:
    """A threat of the user's own."""

    def project(self, x_adv, x):
        return x_adv

    steepest = random_start = norm = scaled = project


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threat": Everything()}, TypeError, "must be Linf, L2 or L1, got <"),
        ({"threat": Linf}, TypeError, "must be a threat model such as"),
        ({"threat": L2(torch.tensor([0.1]))}, ValueError, "1 values of `eps` but `x` has 4 samples"),
        ({"x": torch.rand(4, 48)}, ValueError, r"images of shape \(B, C, H, W\), got 2 dimensions"),
        ({"x": torch.rand(4, 3, 4, 4) + 1}, ValueError, "must lie in the bounds"),
        ({"labels": torch.ones(4, 5) / 5}, TypeError, "`labels` must be integer class indices"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, ValueError, r"`labels` must lie in \[0, 4\]"),
        ({"model": lambda x: x.sum(dim=(1, 2, 3))}, ValueError, "must return logits of shape"),
        ({"model": None}, TypeError, "`model` must be callable"),
        ({"loss": "margin"}, TypeError, "`loss` must be a function"),
        ({"loss": nn.functional.cross_entropy}, ValueError, "`loss` must return one value per sample"),
        ({"queries": 0}, ValueError, "`queries` must be at least 1"),
        ({"p_init": 0.0}, ValueError, "`p_init` must lie in"),
        ({"p_init": 1.1}, ValueError, "`p_init` must lie in"),
        ({"restarts": True}, TypeError, "`restarts` must be an integer"),
        ({"model_mode": "train"}, ValueError, "`model_mode` must be one of"),
        ({"generator": SampleGenerator(0, range(3))}, ValueError, "for 3 samples but `x` has 4"),
    ],
)
def test_malformed_calls_are_refused(change, error, message):
    x = images(4, torch.float32)
    call = {"model": Pointwise(), "x": x, "labels": mostly_right(x), "threat": Linf(0.1)} | change
    with pytest.raises(error, match=f"^square: .*{message}"):
        square(call.pop("model"), call.pop("x"), call.pop("labels"), call.pop("threat"), **call)
