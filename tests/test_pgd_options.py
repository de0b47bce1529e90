"""Targets, momentum, averaged passes, budgets per sample, and what a verdict says."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf, SampleGenerator, apgd, cw, fab, fgsm, margin, pgd, square
from perceptual_at.attacks import friendly_pgd, n_fgsm, surrogate_pgd
from perceptual_at.divergences import cross_entropy
from perceptual_at.threats import select
from tests.strategies import DTYPES, clean_inputs, dtype_name, dtypes, generator, normal, seeds, threats, uniform, words
from tests.test_attack_contract import Net, Pointwise, assert_allowed, classes_of, images

LINF = Linf(0.1)


# Targets ----------------------------------------------------------------------------------------------------------


def test_a_targeted_attack_descends_the_loss_towards_its_targets():
    net, x, labels = Net().eval(), images(), classes_of()
    targets = (labels + 2) % 5
    options = {"steps": 3, "start": "clean"}
    towards = pgd(net, x, labels, LINF, targets=targets, **options)
    away = pgd(net, x, targets, LINF, loss=lambda logits, labels: -cross_entropy(logits, labels), **options)
    assert torch.equal(towards, away)
    assert (cross_entropy(net(towards), targets) < cross_entropy(net(x), targets)).all()


def test_a_targeted_attack_succeeds_when_the_target_is_predicted():
    net, x, labels = Net().eval(), images(40), classes_of(40)
    targets = (labels + 1) % 5
    for attack, options in ((pgd, {"steps": 20}), (cw, {"steps": 20}), (fgsm, {})):
        found = attack(net, x, labels, Linf(0.2), targets=targets, verdict=True, **options)
        assert torch.equal(found.success, net(found.x_adv).argmax(dim=1) == targets)
        assert found.success.any()
        assert found.robust.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("classes", [1000, 20000])
def test_the_last_of_many_classes_is_a_class_in_sixteen_bits_too(dtype, classes):
    net = nn.Linear(4, classes)
    x, labels = uniform(0, 2, 4).to(dtype), torch.full((2,), classes - 1)
    found = pgd(lambda z: net(z.to(net.weight.dtype)), x, labels, LINF, steps=1)
    assert found.dtype == dtype
    with pytest.raises(ValueError, match=rf"`labels` must lie in \[0, {classes - 1}\] .* from {classes} to {classes}"):
        pgd(lambda z: net(z.to(net.weight.dtype)), x, labels + 1, LINF, steps=1)


def test_cw_is_pgd_on_the_margin():
    net, x, labels = Net().eval(), images(), classes_of()
    for options in ({"start": "clean"}, {"generator": generator(1)}):
        expected = pgd(net, x, labels, LINF, steps=30, loss=margin, **options)
        options = {**options, **({"generator": generator(1)} if "generator" in options else {})}
        assert torch.equal(cw(net, x, labels, LINF, **options), expected)


# Early stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [pgd, cw], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"restarts": 3}, {"targets": True}, {"threat": L2(torch.linspace(0.02, 0.4, 24))}],
    ids=["plain", "restarts", "targets", "budgets"],
)
def test_samples_that_leave_at_their_first_success_have_the_same_flags(attack, options):
    net, x, labels = Net().eval(), images(24), classes_of(24)
    options = {"threat": Linf(0.06), "steps": 4, "keep": "best", "verdict": True, **options}
    if options.pop("targets", False):
        options["targets"] = (labels + 1) % 5
    full = attack(net, x, labels, generator=generator(0), **options)
    quick = attack(net, x, labels, generator=generator(0), early_stop=True, **options)
    assert torch.equal(quick.success, full.success)
    assert 0 < quick.success.sum() < 24
    assert_close(quick.x_adv[quick.robust], full.x_adv[full.robust])
    runs = options.get("restarts", 1)
    # Decided samples pay for the iterates up to their first success, and for nothing after it.
    left = quick.success & (quick.step < 4)
    assert left.any()
    assert (quick.gradients[left] - 1 == quick.step[left] + 4 * ((quick.gradients[left] - 1) // 4)).all()
    assert (quick.gradients[quick.robust] == 4 * runs).all()
    assert (full.gradients == 4 * runs).all()
    assert (quick.step <= full.step)[quick.success].all() or runs > 1


def test_what_is_returned_early_is_the_first_misclassified_iterate():
    line = nn.Linear(1, 2, bias=False).requires_grad_(False)
    line.weight.copy_(torch.tensor([[1.0], [0.0]]))  # class 0 for positive x
    model, x = (lambda z: line(z - 0.5)), torch.tensor([[0.625], [0.75], [0.25]])
    labels, options = torch.zeros(3, dtype=torch.long), {"steps": 4, "step_size": 0.2, "start": "clean"}
    found = pgd(model, x, labels, Linf(0.5), keep="best", early_stop=True, verdict=True, **options)
    assert_close(found.x_adv, torch.tensor([[0.425], [0.35], [0.25]]))
    assert found.step.tolist() == [1, 2, 0]
    assert found.gradients.tolist() == [2, 3, 1]
    assert found.forwards.tolist() == [2, 3, 1]


def test_nothing_is_asked_once_every_sample_has_left():
    net, x = Net().eval(), images()
    wrong = (net(x).argmax(dim=1) + 1) % 5
    calls = []
    handle = net.register_forward_hook(lambda *args: calls.append(None))
    assert torch.equal(pgd(net, x, wrong, LINF, start="clean", keep="best", early_stop=True), x)
    handle.remove()
    assert len(calls) == 1


def test_an_early_stop_needs_the_best_iterate_and_class_indices():
    net, x, labels = Net(), images(), classes_of()
    with pytest.raises(ValueError, match="pgd: `early_stop` returns the first misclassified iterate, which keep"):
        pgd(net, x, labels, LINF, early_stop=True)
    with pytest.raises(TypeError, match="pgd: `labels` must be integer class indices"):
        pgd(net, x, functional.one_hot(labels, 5).to(x), LINF, keep="best", early_stop=True)


# Momentum and averaged passes -------------------------------------------------------------------------------------


def test_momentum_adds_up_gradients_of_unit_length():
    net, x, labels, decay = Net().eval(), images(), classes_of(), 0.7
    point, velocity = x, torch.zeros_like(x)
    for _ in range(4):
        seen = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(functional.cross_entropy(net(seen), labels, reduction="sum"), seen)
        velocity = decay * velocity + grad / grad.abs().sum(dim=(1, 2, 3), keepdim=True)
        point = LINF.project(point + 0.03 * velocity.sign(), x)
    options = {"steps": 4, "step_size": 0.03, "start": "clean"}
    assert_close(pgd(net, x, labels, LINF, momentum=decay, **options), point, rtol=0, atol=1e-12)
    assert not torch.equal(pgd(net, x, labels, LINF, **options), point)


def test_momentum_survives_a_sample_without_gradient():
    x, labels = images(3), torch.zeros(3, dtype=torch.long)
    weight = normal(0, 12)

    def model(z):
        score = (z.flatten(1) @ weight) * torch.tensor([0.0, 1.0, 1.0], dtype=z.dtype)
        return torch.stack([score, -score], dim=1)

    x_adv = pgd(model, x, labels, LINF, momentum=0.9, start="clean")
    assert torch.equal(x_adv[0], x[0])
    assert (x_adv[1:] != x[1:]).any()


def test_averaged_passes_attack_the_mean_of_a_random_model():
    """One pass pushes to either side; the mean over many knows the way."""
    calls = []

    def model(z):
        calls.append(1)
        sign = 1.0 if len(calls) % 2 else -0.5
        score = sign * z.flatten(1).sum(dim=1)
        return torch.stack([score, -score], dim=1)

    x, labels = torch.full((2, 3), 0.5), torch.zeros(2, dtype=torch.long)
    found = pgd(model, x, labels, LINF, steps=5, start="clean", eot=2, loss=margin, verdict=True)
    assert_close(found.x_adv, torch.full((2, 3), 0.4))
    assert len(calls) == 2 * (5 + 1)
    assert found.gradients.tolist() == [10, 10]
    assert found.forwards.tolist() == [12, 12]


# Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [{}, {"keep": "best"}, {"restarts": 3}, {"restarts": 2, "keep": "best"}, {"start": "clean", "keep": "best"}],
    ids=str,
)
def test_a_verdict_is_true(options, dtype):
    net, x, labels = Net(dtype=dtype).eval(), images(40, dtype=dtype), classes_of(40)
    options = {"steps": 4, **options}
    found = pgd(net, x, labels, LINF, verdict=True, generator=generator(0), **options)
    assert_allowed(LINF, found.x_adv, x)
    assert torch.equal(found.success, net(found.x_adv).argmax(dim=1) != labels)
    assert torch.equal(found.robust, ~found.success)
    assert found.success.any()
    assert found.robust.any()
    assert torch.equal(found.step >= 0, found.success)
    restarts = options.get("restarts", 1)
    assert (found.gradients == 4 * restarts).all()
    assert (found.forwards == 5 * restarts).all()
    assert len(found) == 40


def test_the_last_iterate_is_returned_with_the_same_points_as_without_a_verdict():
    net, x, labels = Net().eval(), images(20), classes_of(20)
    found = pgd(net, x, labels, LINF, steps=4, verdict=True, generator=generator(0))
    assert torch.equal(found.x_adv, pgd(net, x, labels, LINF, steps=4, generator=generator(0)))
    assert (found.step[found.success] == 4).all()


def test_with_keep_best_any_misclassified_iterate_counts():
    # class 1 wins in a narrow band on the way; beyond it the loss is larger but class 0 wins again
    def model(z):
        at = z[:, 0]
        inside = ((at > 0.55) & (at < 0.65)).to(z.dtype)
        return torch.stack([torch.zeros_like(at), 0.1 * inside - 1 + at, 0 * at - 1 + 0.9 * at], dim=1)

    def loss(logits, labels):
        return logits[:, 2]  # grows all the way

    x, labels = torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.long)

    def winner(z):
        logits = model(z)
        return torch.where(((z[:, :1] > 0.55) & (z[:, :1] < 0.65)), logits + torch.tensor([0.0, 2.0, 0.0]), logits)

    options = {"steps": 3, "step_size": 0.1, "start": "clean", "loss": loss}
    best = pgd(winner, x, labels, Linf(0.3), keep="best", verdict=True, **options)
    assert best.success.item()
    assert best.step.item() == 1
    assert_close(best.x_adv, torch.full((1, 1), 0.6))
    last = pgd(winner, x, labels, Linf(0.3), keep="last", verdict=True, **options)
    assert not last.success.item()
    assert last.step.item() == -1
    # without a verdict the largest loss is kept, whatever its class
    assert_close(pgd(winner, x, labels, Linf(0.3), keep="best", **options), torch.full((1, 1), 0.8))


def test_logits_with_nan_are_no_success():
    def model(z):
        logits = torch.cat([z, 0.5 - z], dim=1)
        return torch.where(z < 0.3, float("nan"), logits)

    x, labels = torch.tensor([[0.4], [0.9]]), torch.zeros(2, dtype=torch.long)
    found = pgd(model, x, labels, Linf(0.2), start="clean", verdict=True)
    assert found.success.tolist() == [False, False]
    assert found.x_adv.isfinite().all()


def test_an_empty_batch_has_an_empty_verdict():
    found = pgd(Net(), images()[:0], classes_of()[:0], LINF, verdict=True)
    assert len(found) == 0
    assert found.x_adv.shape == (0, 3, 2, 2)
    assert found.success.dtype == torch.bool


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": torch.zeros(5, dtype=torch.long)}, ValueError, "`targets` has 5 rows but `x` has 6 samples"),
        ({"targets": torch.rand(6)}, TypeError, "`targets` must be integer class indices"),
        (
            {"targets": 2 * torch.rand(6, 5) + 1},
            ValueError,
            "`targets` of a floating dtype must be class probabilities",
        ),
        ({"targets": 3}, TypeError, "`targets` must be a torch.Tensor, got int"),
        ({"targets": torch.full((6,), 7)}, ValueError, r"`targets` must lie in \[0, 4\]"),
        ({"momentum": -1.0}, ValueError, r"`momentum` must lie in \[0.0, inf\)"),
        ({"eot": 0}, ValueError, "`eot` must be at least 1, got 0"),
        ({"eot": 1.5}, TypeError, "`eot` must be an integer"),
        ({"verdict": True, "labels": torch.rand(6, 5)}, TypeError, "`labels` must be integer class indices"),
    ],
    ids=words,
)
def test_malformed_options_are_refused(options, error, message):
    labels = options.get("labels", classes_of())
    options = {name: value for name, value in options.items() if name != "labels"}
    with pytest.raises(error, match=f"^pgd: {message}"):
        pgd(Net(), images(), labels, LINF, **options)


# float16 ----------------------------------------------------------------------------------------------------------


class Confident(nn.Module):
    """Right by so much that the gradient of the cross entropy is far below what float16 can hold."""

    def __init__(self, lead):
        super().__init__()
        self.linear = nn.Linear(12, 3)
        with torch.no_grad():
            self.linear.weight.copy_(normal(0, 3, 12, scale=1e-3, dtype=torch.float32))
            self.linear.bias.copy_(torch.tensor([lead, 0.0, 0.0]))

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("attack", [pgd, fgsm])
def test_a_confident_model_in_float16_is_attacked_as_in_float32(attack):
    x, labels = images(dtype=torch.float32), torch.zeros(6, dtype=torch.long)
    model = Confident(12.0)
    exact = attack(model, x, labels, LINF, start="clean")
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype == torch.float16
        kept = attack(model, x, labels, LINF, start="clean")
    assert torch.equal(kept, exact)
    assert (kept != x).any(dim=(1, 2, 3)).all()


def test_losses_in_float16_are_those_of_the_logits():
    """The slope is rescaled, the values are not: on a hill that is walked over, the iterate on top is kept."""

    def hill(logits, labels):
        return -(logits[:, 0] - 0.5).square()

    x, labels = torch.tensor([[0.4], [0.3], [0.5]]), torch.zeros(3, dtype=torch.long)
    options = {"steps": 1, "step_size": 0.2, "start": "clean", "loss": hill, "keep": "best"}
    best = pgd(lambda z: torch.cat([z, -z], dim=1).half(), x, labels, Linf(0.3), **options)
    assert_close(best, torch.tensor([[0.4], [0.5], [0.5]]))


def test_a_flat_loss_in_float16_leaves_the_input_where_it_is():
    x, labels = images(dtype=torch.float32), torch.zeros(6, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        x_adv = pgd(Confident(1.0), x, labels, LINF, start="clean", loss=lambda logits, labels: 0 * logits[:, 0])
    assert torch.equal(x_adv, x)


# Budgets per sample -----------------------------------------------------------------------------------------------


def each(threat, share):
    """The threat with that share of its budget for each sample."""
    return type(threat)(threat.eps * share, bounds=threat.bounds)


@given(threats(), seeds, dtypes)
def test_every_sample_has_its_own_ball(threat, seed, dtype):
    share = torch.tensor([0.25, 0.5, 1.0, 1e-3], dtype=torch.float64)
    several = each(threat, share)
    x = clean_inputs(seed, (4, 2, 3), threat.bounds, dtype)
    for point in (several.random_start(x, generator=generator(seed)), x + normal(seed, 4, 2, 3, scale=5).to(dtype)):
        allowed = several.project(point, x)
        for i in range(4):
            alone = each(threat, float(share[i]))
            expected = alone.project(point[i : i + 1], x[i : i + 1])
            assert_close(allowed[i : i + 1], expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 * alone.eps)
        for wider in {dtype, torch.float64}:
            assert (several.norm(allowed.to(wider) - x.to(wider)).double() <= several.eps).all()


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.8), L1(2.0)], ids=repr)
@pytest.mark.parametrize("attack", [pgd, fgsm])
def test_an_attack_with_budgets_per_sample_is_one_attack_per_sample(threat, attack):
    share = torch.tensor([0.1, 1.0, 0.5, 0.25, 0.8, 0.01], dtype=torch.float64)
    x, labels = images(), classes_of()
    together = attack(Pointwise(), x, labels, each(threat, share), start="clean")
    for i in range(6):
        alone = attack(Pointwise(), x[i : i + 1], labels[i : i + 1], each(threat, float(share[i])), start="clean")
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_steps_may_differ_by_sample_too():
    x, labels = images(), classes_of()
    sizes = torch.linspace(0.01, 0.1, 6, dtype=torch.float64)
    together = pgd(Pointwise(), x, labels, LINF, step_size=sizes, start="clean", steps=3)
    for i in range(6):
        alone = pgd(
            Pointwise(), x[i : i + 1], labels[i : i + 1], LINF, step_size=float(sizes[i]), start="clean", steps=3
        )
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("as_given", [numpy.int64, torch.tensor], ids=["numpy", "tensor"])
def test_counts_may_be_of_numpy_or_tensors(as_given):
    x, labels, two = images(), classes_of(), as_given(2)
    for attack in (apgd, surrogate_pgd, fab, square, pgd):
        steps = "queries" if attack is square else "steps"
        numbers = {"generator": SampleGenerator(as_given(0), torch.arange(6))}
        found = attack(Net(), x, labels, LINF, restarts=two, **{steps: two}, **numbers)
        numbers = {"generator": SampleGenerator(0, torch.arange(6))}
        assert torch.equal(found, attack(Net(), x, labels, LINF, restarts=2, **{steps: 2}, **numbers))
    found = friendly_pgd(Net(), x, labels, LINF, patience=two, start="clean")
    assert torch.equal(found, friendly_pgd(Net(), x, labels, LINF, patience=2, start="clean"))


@pytest.mark.parametrize("factor", [numpy.float32(2), numpy.int64(2), torch.tensor(2.0), torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_budget_is_scaled_by_numbers_of_every_kind(kind, factor):
    assert repr(kind(0.125).scaled(factor)) == repr(kind(0.25))
    assert type(kind(0.125).scaled(factor).eps) is float
    assert kind(torch.full((6,), 0.125)).scaled(factor) == kind(torch.full((6,), 0.25))
    x_adv = n_fgsm(Net(), images(), classes_of(), kind(0.125), noise=factor, generator=generator(0))
    assert torch.equal(x_adv, n_fgsm(Net(), images(), classes_of(), kind(0.125), noise=2.0, generator=generator(0)))


def test_budgets_can_be_selected_scaled_and_shown():
    several = L2(torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(select(several, torch.tensor([2, 0])).eps, torch.tensor([0.3, 0.1]))
    assert torch.equal(select(several, torch.tensor([True, False, True])).eps, torch.tensor([0.1, 0.3]))
    assert select(LINF, torch.tensor([0])) is LINF
    assert_close(several.scaled(0.5).eps, torch.tensor([0.05, 0.1, 0.15]))
    assert repr(several) == "L2(eps=<3 values>)"


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (torch.tensor([1]), TypeError, "`eps` must be a number or floating-point numbers"),
        (torch.tensor([0.1, -0.1]), ValueError, "every `eps` must be positive and finite, or 0"),
        (torch.tensor([0.1, float("nan")]), ValueError, "every `eps` must be positive and finite"),
        (torch.tensor([0.1, 8.0]), ValueError, r"`eps`=8.0 exceeds the input range .* did you mean 8 / 255\?"),
    ],
    ids=words,
)
def test_malformed_budgets_are_refused(eps, error, message):
    with pytest.raises(error, match=f"^Linf: {message}"):
        Linf(eps)


@given(st.sampled_from([Linf, L2, L1]))
def test_budgets_for_another_batch_are_refused(kind):
    x = uniform(0, 4, 3)
    with pytest.raises(ValueError, match=r"`eps` has 3 values but `x` has 4 samples"):
        kind(torch.full((3,), 0.1)).project(x, x)
