"""Objectives of the methods that the papers compare with: what is detached, batch norm, refusals, their loops.

Values of the released codes are in test_golden_tables.py, passes in test_passes.py.
"""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import Linf, frozen, kl_divergence, objectives, pgd, snapshot
from perceptual_at.attacks import bisect_margins, find_margins
from perceptual_at.divergences import cross_entropy, soft_logit_margin
from perceptual_at.memories import ensemble_targets, ensemble_update, write
from perceptual_at.models import fold_classes
from perceptual_at.objectives.cure import cure_gradients
from perceptual_at.sample_weights import entropy_weights, margin_weights, probability_margin
from perceptual_at.weight_perturbation import once
from tests.needs import needs
from tests.strategies import generator, integers, uniform

STEPS = 3


class Net(nn.Module):
    """Batch norm between two layers, in float64; keeps the inputs of its passes in train mode."""

    def __init__(self, seed=0, outputs=3):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.norm, self.fc = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, outputs)
        self.double()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach())
        return self.fc(torch.tanh(self.norm(self.conv1(x.flatten(1)))))


def problem(outputs=3, batch=10):
    return Net(outputs=outputs).train(), uniform(1, batch, 2, 2, 2), integers(2, batch, below=3)


def sure_problem():
    """Most of the labels are what the model is sure of."""
    model, x, labels = problem()
    with torch.no_grad(), frozen(model) as f:
        model.fc.weight.mul_(8)
        labels = torch.where(torch.arange(10) < 3, labels, f(x).argmax(dim=1))
    return model, x, labels


def attack_with(**options):
    return functools.partial(pgd, threat=Linf(0.1), steps=STEPS, generator=generator(0), validate=False, **options)


def counted(model):
    """Batch norm's counter of batches."""
    return int(model.norm.num_batches_tracked)


# Batch norm as the released codes leave it -------------------------------------------------------------------------

# Objective, options, and what passes through it in train mode: 1 clean, 2 adversarial, 3 beyond, 12 both in one batch.
ORDERS = [
    ("gairat", {}, "2"), ("mail", {}, "2"), ("mail", {"base": "trades"}, "1 2"), ("mail", {"base": "mart"}, "1 2"),
    ("ewat", {}, "2"), ("sovr", {}, "2"), ("piat", {}, "1 2"), ("te", {}, "2"), ("te", {"base": "trades"}, "1 2"),
    ("hat", {}, "1 2 3"), ("hat", {"base": "pgd_at"}, "1 2 3"), ("kd", {}, "2"), ("adr", {}, "2"),
    ("adr", {"base": "trades", "reference_mode": "eval"}, "12"), ("adr", {"base": "trades"}, "1 12"),
    ("adr", {"base": "trades", "reference_mode": "eval", "joint": False}, "1 2"),
    ("cure", {"average": None}, "1 2"), ("mma", {}, "1 2"),
    ("ducat", {}, "12"), ("ducat", {"dummies": False}, "2"), ("ducat", {"base": "trades"}, "12 2 1"),
    ("ducat", {"base": "mart"}, "2 12 1"), ("ducat", {"base": "mart", "dummies": False}, "1 2"),
    ("ducat", {"base": "consistency_at"}, "12"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=str)
def test_batches_pass_in_the_order_of_the_released_code(name, options, order):
    model, x, labels = problem(outputs=6 if name == "ducat" else 3)
    views = (x, x.flip(3)) if options.get("base") == "consistency_at" else (x,)
    x, found = torch.cat(views), []

    def attack(*given, **more):
        found.append(attack_with()(*given, **more))
        return found[0]

    given = needs(name, model, x, 3, steps=STEPS, teacher=Net(seed=4).eval()) | options
    getattr(objectives, name)(model, views, labels, attack, **given)
    (x_adv,) = found
    parts = {"1": x, "2": x_adv, "3": x + 2 * (x_adv - x), "12": torch.cat([x, x_adv])}
    expected = [parts[word] for word in order.split()]
    assert len(model.seen) == len(expected)
    for seen, batch in zip(model.seen, expected, strict=True):
        assert_close(seen, batch, rtol=0, atol=1e-15)
    assert counted(model) == len(expected)


def test_cures_averaged_network_moves_its_own_statistics_alone():
    model, x, labels = problem()
    average = snapshot(model)
    before = {name: value.clone() for name, value in average.items()}
    objectives.cure(model, (x,), labels, attack_with(), average=average)
    assert counted(model) == 2
    assert average["norm.num_batches_tracked"] == 2
    assert not torch.equal(average["norm.running_mean"], before["norm.running_mean"])
    assert torch.equal(average["fc.weight"], before["fc.weight"])
    objectives.cure(model, (x,), labels, attack_with(), average=average, teacher_mode="eval")
    assert average["norm.num_batches_tracked"] == 2


# What is detached --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mail", "ewat"])
def test_weights_have_no_gradient(name):
    model, x, labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)
    loss, _ = getattr(objectives, name)(model, (x,), labels, lambda *_, **__: x_adv)
    adv = model(x_adv)
    weigh = entropy_weights if name == "ewat" else lambda z: margin_weights(probability_margin(z, labels))
    expected = (weigh(adv.detach()) * cross_entropy(adv, labels)).mean()
    assert_close(loss, expected)
    for mine, other in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())), strict=True,
    ):  # fmt: skip
        assert_close(mine, other)


@pytest.mark.parametrize(("name", "teachers"), [("hat", ["helper"]), ("kd", ["standard_teacher", "robust_teacher"])])
def test_teachers_are_asked_in_eval_mode_and_left_as_they_were(name, teachers):
    model, x, labels = problem()
    networks = {teacher: Net(seed=3 + i).train() for i, teacher in enumerate(teachers)}
    states = {teacher: snapshot(network) for teacher, network in networks.items()}
    loss, _ = getattr(objectives, name)(model, (x,), labels, attack_with(), **networks)
    loss.backward()
    for teacher, network in networks.items():
        assert network.training
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        assert all(torch.equal(value, states[teacher][key]) for key, value in network.state_dict().items())


# Attacks -----------------------------------------------------------------------------------------------------------


def test_gairat_counts_through_a_loss_of_the_attacks_own():
    model, x, labels = problem()
    asked = []

    def loss(logits, labels):
        asked.append(len(logits))
        return -cross_entropy(logits, labels)

    objectives.gairat(model, (x,), labels, attack_with(loss=loss), steps=STEPS)
    assert asked == [10] * STEPS


@pytest.mark.parametrize(
    ("attack", "steps"), [(attack_with(keep="best"), STEPS), (attack_with(restarts=2), STEPS), (attack_with(), 10)]
)
def test_gairat_refuses_an_attack_whose_steps_it_cannot_count(attack, steps):
    model, x, labels = problem()
    with pytest.raises(ValueError, match=f"gairat: the attack asked .* `steps`={steps}.*`kappa`"):
        objectives.gairat(model, (x,), labels, attack, steps=steps)


def test_adr_attacks_rectified_labels_and_follows_a_teacher_that_is_right():
    model, x, labels = problem()
    given = []

    def attack(model, x, labels):
        given.append(labels)
        return x

    objectives.adr(model, (x,), labels, attack, average=snapshot(model), trust=0.9)
    assert given[0].shape == (10, 3)
    assert_close(given[0].sum(dim=1), torch.ones(10, dtype=torch.float64))


def test_te_asks_trades_attack_for_the_sum_it_trains_on():
    model, x, labels = problem()
    model.eval()
    targets = torch.full((10, 3), 1 / 3, dtype=torch.float64)
    losses = []
    attack = lambda model, x, labels, loss, start: losses.append(loss) or x  # noqa: E731
    objectives.te(model, (x,), labels, attack, targets=targets, weight=5.0, base="trades", beta=2.0)
    logits = Net(seed=8)(x)
    with torch.no_grad(), frozen(model) as f:
        reference = f(x)
    term = (logits.softmax(dim=1) - targets).square().mean(dim=1)
    assert_close(losses[0](logits, labels), 2 * kl_divergence(reference, logits) + 5 * term)


def test_an_attack_made_once_spares_trades_its_reference():
    model, x, labels = problem()
    asked = []
    model.register_forward_pre_hook(lambda module, inputs: asked.append(torch.is_grad_enabled()))
    attack = once(lambda model, x, labels, **options: x)
    for expected in ([False, True, True], [True, True]):
        asked.clear()
        objectives.trades(model, (x,), labels, attack)
        assert asked == expected


# MMA's search ------------------------------------------------------------------------------------------------------


def test_margins_are_where_the_soft_margin_changes_sign():
    model, x, labels = sure_problem()
    model.eval()
    clean = model(x)
    found = find_margins(
        model, x, clean, labels, functools.partial(pgd, steps=5), ball=Linf, before=torch.zeros(10).double(),
        largest=0.5, search_steps=30,
    )  # fmt: skip
    assert torch.equal(found.right, soft_logit_margin(clean, labels) < 0)
    assert (found.margins[~found.right] == 0).all()
    assert torch.equal(found.x_adv[~found.right], x[~found.right])
    at_points = soft_logit_margin(model(found.x_adv), labels)
    inside = found.right & (found.margins < 0.499)
    assert inside.any()
    assert at_points[inside].abs().max() < 1e-5
    assert (at_points[found.right & ~inside] < 0).all()


def test_the_search_passes_the_right_samples_as_often_as_released():
    model, x, labels = sure_problem()
    clean = model(x)
    model.seen.clear()
    find_margins(model, x, clean, labels, functools.partial(pgd, steps=5), ball=Linf, before=torch.zeros(10).double(),
                 largest=0.5)  # fmt: skip
    right = int((soft_logit_margin(clean, labels) < 0).sum())
    assert [len(batch) for batch in model.seen] == [right] * 11  # the attack's are in eval mode


def test_nobody_right_is_no_search():
    model, x, labels = problem()
    logits = torch.zeros(10, 3, dtype=torch.float64)
    found = find_margins(model, x, logits, labels, pgd, ball=Linf, before=torch.zeros(10), largest=0.5)
    assert not found.right.any()
    assert torch.equal(found.x_adv, x)
    assert model.seen == []


def test_one_right_sample_that_batch_norm_cannot_take_stays_where_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x = torch.rand(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    given = {"ball": Linf, "before": torch.full((4,), 0.1), "largest": 0.5}
    for sure, mode in itertools.product((1, 2), ("eval", "as_is")):
        logits = torch.where(torch.arange(4) < sure, 9.0, -9.0).unsqueeze(1) * nn.functional.one_hot(labels)
        attack = functools.partial(pgd, steps=2, model_mode=mode)
        found = find_margins(model, x, logits, labels, attack, **given)
        assert found.right.sum() == sure
        assert torch.equal(found.x_adv, x) == bool((found.margins == 0).all()) == (sure == 1)


def test_a_network_in_which_nothing_learns_has_no_gradients_to_revise():
    model, x, labels = problem()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="cure_gradients: `model` has no parameter that requires a gradient"):
        cure_gradients(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1)), average=None)


def test_an_attack_with_a_threat_of_its_own_is_refused():
    model, x, labels = problem()
    with pytest.raises(TypeError, match="find_margins: `attack` has a `threat` of its own"):
        find_margins(model, x, model(x), labels, attack_with(), ball=Linf, before=torch.zeros(10), largest=0.5)


def test_the_search_keeps_to_bounds_of_any_form_and_takes_labels_of_any_integers():
    model, x, labels = sure_problem()
    model.eval()  # in train mode every pass moves its statistics
    options = {"before": torch.zeros(10).double(), "largest": 0.5}
    attack = functools.partial(pgd, steps=5, start="clean")
    expected = find_margins(model, x, model(x), labels, attack, ball=Linf, **options)
    upper = torch.ones(1, *x.shape[1:], dtype=x.dtype)
    for bounds in ((0.0, upper), (0 * upper, upper)):
        ball = functools.partial(Linf, bounds=bounds)
        found = find_margins(model, x, model(x), labels.to(torch.uint16), attack, ball=ball, **options)
        assert_close(found.x_adv, expected.x_adv)
        assert_close(found.margins, expected.margins)


def test_a_search_for_margins_refuses_what_it_cannot_use():
    model, x, labels = problem()
    given = {"directions": x, "before": torch.ones(10) / 4, "before_margin": torch.zeros(10), "largest": 0.5}
    for bounds in ((1.0, 0.0), ("a", "b"), (0.0, float("nan"))):
        with pytest.raises(ValueError, match=r"^bisect_margins: `bounds` must be numbers"):
            bisect_margins(model, x, labels, bounds=bounds, **given)
    with pytest.raises(TypeError, match=r"^bisect_margins: `model` must be callable, got NoneType"):
        bisect_margins(None, x, labels, **given)
    with pytest.raises(TypeError, match=r"^find_margins: `model` must be a function, got NoneType"):
        find_margins(None, x, model(x), labels, pgd, ball=Linf, before=torch.zeros(10), largest=0.5)


# CURE's gradients --------------------------------------------------------------------------------------------------


def test_without_revision_cures_gradients_are_those_of_its_loss():
    model, x, labels = problem()
    model.eval()
    given = {"average": snapshot(Net(seed=6)), "beta": 3.0, "weight": 2.0}
    x_adv = attack_with()(model, x, labels)
    attack = lambda *_, **__: x_adv  # noqa: E731
    loss, _ = objectives.cure(model, (x,), labels, attack, **given)
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    same, terms = cure_gradients(model, (x,), labels, attack, share=0.0, **given)
    assert_close(same, loss.detach())
    assert not any(value.requires_grad for value in (same, *terms.values()))
    for name, p in model.named_parameters():
        assert_close(p.grad, plain[name])
    model.zero_grad()
    cure_gradients(model, (x,), labels, attack, share=0.5, layers=lambda i, name: name == "conv1.weight", **given)
    gone = model.conv1.weight.grad == 0
    assert gone.sum() == 24
    assert_close(model.conv1.weight.grad[~gone], plain["conv1.weight"][~gone])


class Placed(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.places, self.head = nn.Embedding(3, 5, sparse=sparse), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(x.flatten(1)) + self.places(torch.ones(len(x), dtype=torch.int64))


def test_cure_revises_sparse_gradients_as_dense_ones():
    found = []
    for sparse in (False, True):
        model, x, labels = Placed(sparse), torch.rand(4, 12), torch.tensor([0, 1, 2, 4])
        attack = functools.partial(pgd, threat=Linf(0.1), steps=1)
        cure_gradients(model, (x,), labels, attack, average=None, generator=torch.Generator().manual_seed(0))
        found.append(model.places.weight.grad)
    assert_close(*found)


# DUCAT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["max", "sum"])
def test_folded_classes_are_attacked_and_predicted_through(rule):
    model, x, labels = problem(outputs=6)
    folded = fold_classes(model, rule=rule)
    x_adv = attack_with()(folded, x, labels)
    assert model.training
    assert counted(model) == 0
    assert (x_adv - x).abs().max() <= 0.1
    with torch.no_grad(), frozen(folded) as f, frozen(model) as g:
        assert f(x).shape == (10, 3)
        if rule == "max":
            assert torch.equal(f(x).argmax(dim=1), g(x).argmax(dim=1) % 3)
        else:
            assert_close(f(x).softmax(dim=1), g(x).softmax(dim=1).reshape(10, 2, 3).sum(dim=1))


def test_summed_classes_are_twice_differentiable_however_sure_the_network_is():
    folded = fold_classes(torch.nn.Identity(), rule="sum")
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0, 0.0, 100.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(folded(logits).softmax(dim=1)[0, 1], logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert second.isfinite().all()


@pytest.mark.parametrize("base", ["pgd_at", "trades", "mart", "consistency_at"])
@pytest.mark.parametrize("dummies", [True, False])
def test_ducat_learns_on_every_base(base, dummies):
    model, x, labels = problem(outputs=6)
    views = (x, x.flip(3)) if base == "consistency_at" else (x,)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        loss, terms = objectives.ducat(model, views, labels, attack_with(), base=base, dummies=dummies, beta=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(value.isfinite() for value in terms.values())
    assert losses[-1] < losses[0]


# Loops -------------------------------------------------------------------------------------------------------------


def train(steps, state=None):
    """TE and MMA side by side, with their memories; from a saved state where there is one."""
    model, x, labels = sure_problem()
    ensemble, margins = torch.zeros(20, 3), torch.zeros(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = 0
    if state is not None:
        first, ensemble, margins = state["step"], state["ensemble"], state["margins"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        index = torch.randperm(20, generator=generator(step))[:10]
        attack = functools.partial(pgd, steps=2, generator=generator(step), validate=False)
        with torch.no_grad(), frozen(model) as f:
            ensemble = ensemble_update(ensemble, index, f(x))
        loss, _ = objectives.te(
            model, (x,), labels, functools.partial(attack, threat=Linf(0.1)), weight=1.0,
            targets=ensemble_targets(ensemble, index).double(),
        )  # fmt: skip
        clean = model(x)
        found = find_margins(model, x, clean, labels, attack, ball=Linf, before=margins[index].double(), largest=0.3)
        margins = write(margins, index, found.margins)
        second, _ = objectives.mma(model, (x,), labels, lambda *_: found.x_adv, margins=found.margins, largest=0.3,  # noqa: B023
                                   clean_logits=clean)  # fmt: skip
        optimizer.zero_grad()
        (loss + second).backward()
        optimizer.step()
    return {
        "step": steps, "ensemble": ensemble, "margins": margins, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip


def test_a_killed_run_with_memories_goes_on_to_the_same_bits(tmp_path):
    whole = train(6)
    torch.save(train(3), tmp_path / "state.pt")
    again = train(6, torch.load(tmp_path / "state.pt", weights_only=True))
    for name in ("ensemble", "margins"):
        assert torch.equal(whole[name], again[name])
        assert whole[name].count_nonzero()
    assert all(torch.equal(value, again["model"][name]) for name, value in whole["model"].items())


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("hat", {"helper": None}, TypeError, "hat: `helper` must be a network trained without attacks.*NoneType"),
        ("kd", {"standard_teacher": None, "robust_teacher": None}, TypeError, "kd: `standard_teacher` must be"),
        ("kd", {"robust_teacher": None}, TypeError, "kd: `robust_teacher` must be an adversarially trained"),
        ("kd", {"weights": (1.0, 2.0)}, ValueError, "kd: `weights` must be three"),
        ("adr", {"average": None}, TypeError, "adr: `average` must be averaged weights"),
        ("adr", {"trust": 1.5}, ValueError, "`trust`"),
        ("te", {"targets": torch.zeros(3, 3)}, ValueError, "te: `targets` .*memories.ensemble_targets"),
        ("mma", {"margins": torch.zeros(20)}, ValueError, r"mma: `margins` .*\(10,\).*index"),
        ("mma", {"largest": 0.0}, ValueError, "mma: `largest`"),
        ("gairat", {"kappa": torch.zeros(3)}, ValueError, r"gairat: `kappa` .*\(10,\)"),
        ("mail", {"base": "consistency_at"}, ValueError, "mail: `base`"),
        ("mail", {"margin": "PM_adv"}, ValueError, "mail: `margin`"),
        ("sovr", {"share": 40}, ValueError, "sovr: `share`"),
        ("ducat", {}, ValueError, r"dummy_class_loss: `logits` .*two outputs per class"),
        ("ducat", {"base": "trades", "adv_weight": 2.0}, ValueError, "ducat: `adv_weight`=2.0 has no effect"),
        ("ducat", {"consistency_weight": 2.0}, ValueError, "ducat: `consistency_weight`=2.0 has no effect"),
        ("ducat", {"consistency_temperature": 1.0, "base": "mart"}, ValueError, "`consistency_temperature`=1.0 has no"),
        ("ducat", {"base": "consistency_at"}, ValueError, "ducat: `views`"),
        ("cure", {"teacher_mode": "train"}, ValueError, "cure: `teacher_mode`"),
        ("ewat", {"form": "both"}, ValueError, "ewat: `form`"),
        ("piat", {"weight": -1.0}, ValueError, "piat: `weight`"),
    ],
)
def test_a_method_without_what_it_needs_says_what_to_pass(name, options, error, words):
    model, x, labels = problem()
    given = needs(name, model, x, 3, steps=STEPS, teacher=Net(seed=4)) | options
    with pytest.raises(error, match=words):
        getattr(objectives, name)(model, (x,), labels, attack_with(), **given)


@pytest.mark.parametrize("name", ["gairat", "mail", "ewat", "sovr", "piat", "te", "hat", "adr", "cure", "mma", "ducat"])
def test_labels_that_are_distributions_are_refused(name):
    model, x, labels = problem()
    soft = nn.functional.one_hot(labels, 3).double()
    given = needs(name, model, x, 3, steps=STEPS, teacher=Net(seed=4))
    with pytest.raises(TypeError, match=f"{name}: `labels` must be class indices"):
        getattr(objectives, name)(model, (x,), soft, attack_with(), **given)


def test_a_burn_in_weighs_all_alike():
    model, x, labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)
    for loss, _ in (
        objectives.gairat(model, (x,), labels, lambda *_: x_adv, kappa=torch.arange(10) % 4, offset=math.inf),
        objectives.mail(model, (x,), labels, lambda *_, **__: x_adv, weighted=False),
    ):
        assert_close(loss, cross_entropy(model(x_adv), labels).mean())


def test_the_models_deep_copy_is_left_alone_by_every_objective():
    """An objective reads the model it is given, and no other."""
    model, x, labels = problem()
    twin = copy.deepcopy(model)
    objectives.hat(model, (x,), labels, attack_with(), helper=twin)
    assert counted(twin) == 0


# Regularisers on top -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regulariser", ["rpat", "dicar"])
@pytest.mark.parametrize("base", ["gairat", "mail", "ewat", "sovr", "piat", "te", "hat", "kd", "adr", "cure", "ducat"])
def test_regularisers_go_on_top_of_every_one(regulariser, base):
    model, x, labels = problem(outputs=6 if base == "ducat" else 3)
    views = (x,) if regulariser == "rpat" else (x, x.flip(3))
    if base == "te" and regulariser == "dicar":
        return  # its memory knows one view
    options = needs(base, model, x, 3, steps=STEPS, teacher=Net(seed=4))
    if regulariser == "dicar":
        options |= {"mix": 0.7, "mask": torch.arange(10) < 6}
    loss, terms = getattr(objectives, regulariser)(model, views, labels, attack_with(), base=base, **options)
    loss.backward()
    assert list(terms)[-1] == {"rpat": "robust_perception", "dicar": "dicar"}[regulariser]
    assert all(value.isfinite() for value in terms.values())
