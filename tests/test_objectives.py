"""The objectives: sums of public terms, with exactly the passes they need, and every documented difference reachable.

Values of the released codes are in test_golden.py; here are passes, gradients, combinations, choices and refusals.
"""

import functools
import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    boosted_cross_entropy,
    boundary_partition,
    call_with,
    consistency_loss,
    dicar_loss,
    ema_update,
    frozen,
    interpolate,
    kl_divergence,
    models,
    objectives,
    pgd,
    robust_perception_kl_loss,
    robust_perception_loss,
    snapshot,
    trades_loss,
    weighted_kl_loss,
)
from perceptual_at.divergences import cross_entropy
from tests.needs import DETACHED, OWN_TESTS, needs
from tests.tiny import fixed_attack

THREAT = Linf(0.1)
STEPS = 3
BASES = ("pgd_at", "trades", "mart", "consistency_at")


class SmallNet(nn.Module):
    """Batch norm and a smooth activation, in float64; counts its passes by kind."""

    def __init__(self, seed=0, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, classes)
        self.double()
        self.rows, self.passes = [], {"forward": 0, "no_grad": 0, "attack": 0}

    def forward(self, x):
        kind = "no_grad" if not torch.is_grad_enabled() else "attack" if not self.first.weight.requires_grad else None
        self.passes[kind or "forward"] += 1
        if kind is None:
            self.rows.append(x.shape[0])
        return self.last(torch.tanh(self.norm(self.first(x.flatten(1)))))


def problem(batch=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x1 = torch.rand(batch, 2, 2, 2, generator=generator, dtype=torch.float64)
    x2 = (x1 + 0.02 * torch.randn(x1.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    model = SmallNet()
    with torch.no_grad(), frozen(model) as f:  # labels the model is mostly right about, some of them wrong
        labels = f(x1).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 3
    model.passes = dict.fromkeys(model.passes, 0)
    return model.train(), (x1, x2), labels


def attack_with(seed=0, **options):
    return functools.partial(
        pgd, threat=THREAT, steps=STEPS, generator=torch.Generator().manual_seed(seed), validate=False, **options
    )


def averaged(model):
    return {name: value + 0.1 if value.is_floating_point() else value for name, value in snapshot(model).items()}


def call(name, model, views, labels, attack, **options):
    """Any objective with the least it needs."""
    needed = {
        "clp": {"pairs": "attacked"}, "grad_align": {"threat": THREAT}, "ikl": {"table": None},
        "lbgat": {"teacher": SmallNet(seed=1)},
    }  # fmt: skip
    options = {**needed.get(name, {}), **options}
    if name in ("raat", "raat_plus_plus", "raat_sharp", "dicar", "rpat_raat"):
        options = {"mix": 0.7, **options}
    elif name != "consistency_at" and options.get("base") not in ("consistency_at", objectives.consistency_at):
        views = views[:1]
    if name in ("rebat", "rpat_plus_plus", "raat_sharp"):
        options = {"average": averaged(model), **options}
    if name == "random_noise":
        options = {"threat": THREAT, "generator": torch.Generator().manual_seed(0), **options}
    options = {**needs(name, model, views[0], 3, steps=STEPS, teacher=SmallNet(seed=5)), **options}
    return getattr(objectives, name)(model, views, labels, attack, **options)


UNATTACKED = ("standard", "random_noise")
OBJECTIVES = [name for name in objectives.__all__ if name not in OWN_TESTS]

# objective, options, training forwards (with their rows in batches of 12), forwards without gradient
PASSES = [
    ("standard", {}, [12], 0),
    ("random_noise", {}, [12], 0),
    ("pgd_at", {}, [12], 0),
    ("trades", {}, [12, 12], 1),
    ("trades", {"repeat_clean_forward": True}, [12, 12, 12], 1),
    ("mart", {}, [12, 12], 0),
    ("consistency_at", {}, [24], 0),
    ("rpat", {}, [12, 12, 12], 0),
    ("rpat", {"base": "trades"}, [12, 12, 12], 1),
    ("rpat", {"base": "mart"}, [12, 12, 12], 0),
    ("rpat", {"base": "consistency_at"}, [24, 24, 24], 0),
    ("rebat", {}, [12], 1),
    ("rebat", {"average": None}, [12], 0),
    ("rpat_plus_plus", {}, [12], 2),
    ("raat", {}, [24, "pairs", 24], 3),
    ("raat", {"boundary": "definition"}, [24, "pairs", 24], 2),
    ("raat", {"weight": 0.0}, [24], 3),
    ("raat", {"bound": False}, [24, "pairs", 24], 1),
    ("raat", {"misclassified": "mart"}, [24, "pairs", 24], 3),
    ("raat_plus_plus", {}, [24, 24, 24, "pairs"], 3),
    ("raat_plus_plus", {"repeat_clean_forward": True}, [24, 24, 24, "pairs", 24], 3),
    ("raat_plus_plus", {"bound": False}, [24, 24, "pairs"], 1),
    ("raat_sharp", {}, [12, "pairs", 24], 4),
    ("raat_sharp", {"weight": 0.0}, [12], 3),
    ("dicar", {}, [24, "pairs", 24], 1),
    ("dicar", {"base": "mart"}, [24, 24, "pairs"], 1),
]


@pytest.mark.parametrize(("name", "options", "rows", "no_grad"), PASSES, ids=lambda v: str(v))
def test_a_step_takes_exactly_the_documented_passes(name, options, rows, no_grad):
    model, views, labels = problem()
    call(name, model, views, labels, attack_with(), **options)
    with torch.no_grad(), frozen(model) as f:
        right = [f(view).argmax(dim=1) == labels for view in views]
    pairs = int((right[0] & right[1]).sum())
    if name == "raat_sharp" and rows != [12]:
        assert 0 < model.rows[1] <= 12  # the averaged model chooses the pairs
        rows = [model.rows[1] if row == "pairs" else row for row in rows]
    assert model.rows == [pairs if row == "pairs" else row for row in rows]
    attacks = 0 if name in UNATTACKED else 2 if name == "raat_sharp" and rows != [12] else 1
    assert model.passes["attack"] == attacks * STEPS
    assert model.passes["no_grad"] == no_grad + 2  # two of them are this test's own


HELD_FIXED = ("grad_align", "ikl", *DETACHED)  # parts of these have a value that moves and a gradient that does not


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in HELD_FIXED])
def test_gradient_agrees_with_finite_differences(name):
    model, views, labels = problem()
    model.eval()
    x_advs = [attack_with()(model, view, labels) for view in views]
    both = torch.cat(x_advs)
    options = {"average": averaged(model)} if name in ("rebat", "rpat_plus_plus", "raat_sharp", "adr", "cure") else {}
    options |= {"kappa": torch.arange(12) % 4} if name == "gairat" else {}  # a ready answer has no steps to count

    def value():
        given = fixed_attack(*x_advs) if name == "raat_sharp" else lambda m, x, y, **o: both[: len(x)]
        return call(name, model, views, labels, given, **options)[0]

    gradients = torch.autograd.grad(value(), list(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            sides.append(value().item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=step)
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


def test_objectives_are_the_sums_they_document():
    model, (x, x2), labels = problem()
    model.eval()
    x_adv, x2_adv = (attack_with()(model, view, labels) for view in (x, x2))
    mid = interpolate(x, x_adv, 0.5)
    f, given = model, fixed_attack
    average = averaged(model)
    teacher = functools.partial(call_with, model, average)
    ce = cross_entropy(f(x_adv), labels).mean()

    def value(name, views, *x_advs, **options):
        return getattr(objectives, name)(model, views, labels, given(*x_advs), **options)[0]

    assert_close(value("pgd_at", (x,), x_adv), ce)
    assert_close(value("trades", (x,), x_adv, beta=2.0), trades_loss(f(x), f(x_adv), labels, beta=2.0))
    even = robust_perception_loss(f(x), f(mid), f(x_adv), form="interpolation")
    assert_close(value("rpat", (x,), x_adv, weight=3.0), ce + 3 * even)
    assert_close(
        value("rpat", (x,), x_adv, base="trades", beta=2.0), trades_loss(f(x), f(x_adv), labels, beta=2.0) + even
    )
    both = torch.cat([x_adv, x2_adv])
    js = consistency_loss(f(x_adv), f(x2_adv))
    ce2 = cross_entropy(f(both), labels.repeat(2)).mean()
    assert_close(value("consistency_at", (x, x2), both, consistency_weight=0.5), ce2 + 0.5 * js)
    assert_close(value("rebat", (x,), x_adv, average=average, beta=2.0),
                 ce + 2 * kl_divergence(teacher(x_adv), f(x_adv)).mean())  # fmt: skip
    assert_close(value("rpat_plus_plus", (x,), x_adv, average=average),
                 ce + robust_perception_kl_loss(teacher(x), teacher(mid), f(x_adv)))  # fmt: skip
    mask = (f(x).argmax(1) == labels) & (f(x2).argmax(1) == labels)
    term = dicar_loss(f(interpolate(x2_adv, x_adv, 0.7)), f(x), f(x2), mix=0.7, space="logits", temperature=0.5,
                      mask=mask)  # fmt: skip
    assert_close(value("dicar", (x, x2), both, mix=0.7), ce2 + term)
    assert_close(value("raat", (x, x2), both, mix=0.7, bound=False), ce2 + term)
    everything, twice = torch.cat([x, x2]), labels.repeat(2)
    reduced = interpolate(everything, both, 0.1)
    parts = boundary_partition(f(everything), f(reduced), twice, adv_logits=f(both))
    supervised = torch.where(parts.boundary.reshape(-1, 1, 1, 1), reduced, both)
    assert_close(value("raat", (x, x2), both, mix=0.7), cross_entropy(f(supervised), twice).mean() + term)
    boosted, stable = boosted_cross_entropy(f(supervised), twice), weighted_kl_loss(f(everything), f(both), twice)
    assert_close(value("raat_plus_plus", (x, x2), both, mix=0.7, beta=2.0), boosted + 2 * stable + term)


@pytest.mark.parametrize(
    ("base", "regulariser", "ema"), list(itertools.product(BASES, ("none", "rpat", "dicar"), (False, True)))
)
def test_any_regulariser_on_any_base_takes_a_decreasing_step(base, regulariser, ema):
    model, views, labels = problem(batch=16)
    model.eval()  # a descent step must decrease the same function: batch statistics would move it
    average = snapshot(model)

    x_adv = None

    def frozen_attack(m, x, y, **options):
        nonlocal x_adv
        x_adv = attack_with()(m, x, y, **options) if x_adv is None else x_adv
        return x_adv

    def loss_with_fixed_attack():
        if regulariser == "none":
            return call(base, model, views, labels, frozen_attack)[0]
        return call(regulariser, model, views, labels, frozen_attack, base=base)[0]

    before = loss_with_fixed_attack()
    assert torch.isfinite(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before.backward()
    optimizer.step()
    after = loss_with_fixed_attack()
    assert after < before
    if ema:
        average = ema_update(average, model, decay=0.5)
        mean = (snapshot(model)["first.weight"] + average["first.weight"]) / 2
        assert not torch.equal(mean, average["first.weight"])
        assert_close(average["norm.running_mean"], snapshot(model)["norm.running_mean"])


# Paper and release: one test per difference ----------------------------------------------------------------------


def test_rpat_form_is_the_papers_or_the_releases():
    model, (x, _), labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)
    terms = {
        source: objectives.rpat(model, (x,), labels, fixed_attack(x_adv), **objectives.preset("rpat", source))[1]
        for source in ("paper", "release")
    }
    assert_close(terms["paper"]["robust_perception"], 16 * terms["release"]["robust_perception"])


def test_weight_one_in_the_release_is_a_sixteenth_of_eq_3():
    model, (x, _), labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)
    paper = objectives.rpat(model, (x,), labels, fixed_attack(x_adv), form="quotient", weight=1 / 16)[0]
    assert_close(paper, objectives.rpat(model, (x,), labels, fixed_attack(x_adv), form="interpolation")[0])


def test_alpha_multiplies_the_perturbation_where_the_release_weighs_the_clean_input():
    model, (x, _), labels = problem()
    x_adv = attack_with()(model, x, labels)
    rate = 0.2
    assert_close(interpolate(x, x_adv, 1 - rate), rate * x + (1 - rate) * x_adv)


def test_rpat_plus_plus_takes_the_place_of_rebats_term():
    model, (x, _), labels = problem()
    average = averaged(model)
    terms = objectives.rpat_plus_plus(model, (x,), labels, attack_with(), average=average)[1]
    assert "averaged_kl" not in terms
    assert terms["robust_perception_kl"] > 0


def test_the_averaged_model_can_run_in_the_models_mode_as_released():
    model, (x, _), labels = problem()
    average = averaged(model)
    statistics = average["norm.running_mean"].clone()
    x_adv = attack_with()(model, x, labels)
    for mode in ("eval", "as_is"):
        term = objectives.rebat(model, (x,), labels, fixed_attack(x_adv), average=average, teacher_mode=mode)[1]
        moved = not torch.equal(average["norm.running_mean"], statistics)
        assert moved == (mode == "as_is")
        assert term["averaged_kl"] > 0


def test_the_attack_can_run_in_train_mode_as_rebat_releases_it():
    model, (x, _), labels = problem()
    before = model.norm.running_mean.clone()
    objectives.pgd_at(model, (x,), labels, attack_with(model_mode="as_is"))
    tracked = int(model.norm.num_batches_tracked)
    assert tracked == STEPS + 1
    assert not torch.equal(before, model.norm.running_mean)


class Steps(nn.Module):
    """Class 1 on [0.15, 0.6] and beyond 0.8, class 0 elsewhere; a parameter to train."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        one = ((x >= 0.15) & (x <= 0.6)) | (x > 0.8)
        return self.scale * torch.cat([(~one).double(), one.double()], dim=1) + 0 * x


@pytest.mark.parametrize(
    ("rule", "reduced"),
    [("release", [True, False, False]), ("definition", [True, True, False]), ("objective", [True, True, True])],
)
def test_boundary_rule(rule, reduced):
    model = Steps()
    # Wrong on x'' and x_adv; wrong on x'' but right on x_adv; wrong on x already, and on x''.
    x = torch.tensor([[0.0], [0.0], [0.9]], dtype=torch.float64)
    x_adv = torch.tensor([[1.0], [0.7], [0.85]], dtype=torch.float64)
    near = interpolate(x, x_adv, 0.3)
    assert [model(v).argmax(dim=1).tolist() for v in (x, near, x_adv)] == [[0, 0, 1], [1, 1, 1], [1, 0, 1]]
    labels = torch.zeros(3, dtype=torch.int64)
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]) if torch.is_grad_enabled() else None)
    objectives.raat(model, (x,), labels, fixed_attack(x_adv), weight=0.0, eta=0.3, boundary=rule)
    assert (seen[0] == near).squeeze(1).tolist() == reduced
    assert torch.equal(seen[0], torch.where(torch.tensor(reduced)[:, None], near, x_adv))


def test_misclassified_samples_as_standard_mma_or_mart():
    model, views, labels = problem()
    model.eval()
    x, twice = torch.cat(views), labels.repeat(2)
    x_adv = attack_with()(model, x, twice)
    wrong = model(x).argmax(1) != twice
    assert 0 < wrong.sum() < len(wrong)
    losses = {}
    for rule in ("standard", "clean", "mart"):
        options = {"beta": 2.0} if rule == "mart" else {}
        losses[rule], terms = objectives.raat(
            model, views, labels, fixed_attack(x_adv), weight=0.0, misclassified=rule, **options
        )  # fmt: skip
    adv, clean = cross_entropy(model(x_adv), twice), cross_entropy(model(x), twice)
    assert_close(losses["standard"] - losses["clean"], (adv - clean)[wrong].sum() / len(wrong))
    kl = weighted_kl_loss(model(x), model(x_adv), twice, reduction="none")
    assert_close(losses["mart"] - losses["standard"], 2 * kl[wrong].sum() / len(wrong))
    assert_close(terms["weighted_kl"], kl[wrong].sum() / len(wrong))


def test_reduced_sample_by_scaling_or_by_its_own_attack():
    model, views, labels = problem()
    calls = []

    def recorded(m, x, y, **options):
        calls.append(options)
        return pgd(m, x, y, THREAT.scaled(0.1), steps=STEPS, start="clean")

    objectives.raat(model, views, labels, attack_with(), mix=0.7, reduced_attack=recorded)
    assert len(calls) == 1
    assert model.passes["attack"] == 2 * STEPS


@pytest.mark.parametrize("choice", [{"space": "probabilities"}, {"temperature": 1.0}, {"average_over": "all"}])
def test_each_dicar_choice_changes_the_term(choice):
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    default = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7)[1]["dicar"]
    other = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, **choice)[1]["dicar"]
    assert (default - other).abs() > 1e-8
    if "average_over" in choice:
        right = (model(views[0]).argmax(1) == labels) & (model(views[1]).argmax(1) == labels)
        assert_close(other, default * right.sum() / len(labels))


def test_raat_plus_plus_weighs_its_kl_by_six_in_the_release_and_by_one_in_the_paper():
    assert objectives.preset("raat_plus_plus", "release")["beta"] == 6.0
    assert objectives.preset("raat_plus_plus", "paper")["beta"] == 1.0
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    six, terms = objectives.raat_plus_plus(model, views, labels, fixed_attack(x_adv), mix=0.7)
    one, _ = objectives.raat_plus_plus(model, views, labels, fixed_attack(x_adv), mix=0.7, beta=1.0)
    assert_close(six - one, 5 * terms["weighted_kl"], check_dtype=False)


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "raat_sharp", "trades", "rpat"])
def test_presets_are_keywords_the_objective_takes(name):
    model, views, labels = problem()
    for source in ("paper", "release"):
        loss, _ = call(name, model, views, labels, attack_with(), **objectives.preset(name, source))
        assert torch.isfinite(loss)


@pytest.mark.parametrize("source", ["paper", "release"])
def test_a_preset_with_a_base_leaves_both_their_own_keywords(source):
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    own = objectives.preset("raat", source)
    raat, _ = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, **own)
    chosen = objectives.preset("rpat", source, base="raat")
    assert chosen["base"].keywords == {"temperature": own["temperature"]}  # which `rpat` has too
    both, terms = objectives.rpat(model, views, labels, fixed_attack(x_adv), mix=0.7, **chosen)
    assert_close(both - raat, terms["robust_perception"], check_dtype=False)
    kd = objectives.preset("rpat", source, base="kd")
    assert kd["base"].keywords["form"] != kd["form"]
    assert objectives.preset("rpat", source, base="consistency_at")["base"] == "consistency_at"


def test_a_preset_can_be_changed_without_changing_the_next_one():
    objectives.preset("raat", "paper")["space"] = "logits"
    assert objectives.preset("raat", "paper")["space"] == "probabilities"


# The ablations of RAAT's Fig. 5, and RPAT's choices --------------------------------------------------------------


def test_bound_only_and_dicar_only_are_the_two_halves_of_raat():
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    full, terms = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7)
    bound_only, bound_terms = objectives.raat(model, views, labels, fixed_attack(x_adv), weight=0.0)
    dicar_only, dicar_terms = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, bound=False)
    assert list(bound_terms) == ["cross_entropy"]
    assert_close(full, bound_only + terms["dicar"])
    assert_close(dicar_terms["dicar"], terms["dicar"])
    pgd_at = objectives.pgd_at(model, views, labels, fixed_attack(x_adv))[0]
    assert_close(dicar_only, pgd_at + terms["dicar"])


def test_eta_one_reduces_nothing():
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    eta_one = objectives.raat(model, views, labels, fixed_attack(x_adv), weight=0.0, eta=1.0)[0]
    assert_close(eta_one, objectives.pgd_at(model, views, labels, fixed_attack(x_adv))[0])


def test_no_pair_gives_no_dicar_and_no_pass():
    model, views, labels = problem()
    wrong = (labels + 1) % 3
    wrong[:2] = (wrong[:2] + 1) % 3
    with torch.no_grad(), frozen(model) as f:
        wrong = torch.where(f(views[0]).argmax(1) == wrong, (wrong + 1) % 3, wrong)
    model.rows = []
    loss, terms = objectives.raat(model, views, wrong, attack_with(), mix=0.7)
    assert terms["dicar"] == 0
    assert model.rows == [24]
    loss.backward()


@pytest.mark.parametrize("criterion", ["mse", "kl", "js", "cosine"])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_rpat_takes_every_criterion_and_place(criterion, alpha):
    model, (x, _), labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)
    term = objectives.rpat(model, (x,), labels, fixed_attack(x_adv), criterion=criterion, alpha=alpha)[1]
    logits = model(x), model(interpolate(x, x_adv, alpha)), model(x_adv)
    expected = robust_perception_loss(*logits, alpha=alpha, criterion=criterion, form="interpolation")
    assert_close(term["robust_perception"], expected)


def test_rpat_regularises_an_inner_layer_when_told_to():
    model, (x, _), labels = problem()
    model.eval()
    x_adv = attack_with()(model, x, labels)

    def perceive(v):
        features = torch.tanh(model.norm(model.first(v.flatten(1))))
        return model.last(features), features

    loss, terms = objectives.rpat(model, (x,), labels, fixed_attack(x_adv), perceive=perceive)
    inner = [perceive(v)[1] for v in (x, interpolate(x, x_adv, 0.5), x_adv)]
    assert_close(terms["robust_perception"], robust_perception_loss(*inner, form="interpolation"))
    assert_close(loss, cross_entropy(model(x_adv), labels).mean() + terms["robust_perception"])


def test_mixed_images_train_with_rebat_and_rpat_plus_plus():
    model, (x, _), labels = problem()
    soft = 0.7 * nn.functional.one_hot(labels, 3) + 0.3 * nn.functional.one_hot(labels.flip(0), 3)
    soft = soft.double()
    for name in ("rebat", "rpat_plus_plus"):
        loss, _ = call(name, model, (x,), soft, attack_with())
        assert torch.isfinite(loss)


def test_terms_are_detached_scalars_and_the_loss_is_not():
    for name in OBJECTIVES:
        model, views, labels = problem()
        loss, terms = call(name, model, views, labels, attack_with())
        assert loss.requires_grad
        assert loss.ndim == 0
        assert all(not value.requires_grad and value.ndim == 0 for value in terms.values())


# Refusals ---------------------------------------------------------------------------------------------------------


REFUSED = [
    ("raat", {"mix": None}, TypeError, "raat: `mix` is needed"),
    ("dicar", {"mix": None}, TypeError, "dicar: `mix` is needed"),
    ("dicar", {"mix": None, "weight": 0.0}, TypeError, "dicar: `mix` is needed"),
    ("raat", {"eta": 0.0}, ValueError, "raat: `eta` must lie in"),
    ("raat", {"eta": 0.1, "reduced_attack": attack_with()}, ValueError, "raat: `eta`=0.1 has no effect"),
    ("raat", {"bound": False, "eta": 0.2}, ValueError, "have no effect with bound=False"),
    ("raat", {"beta": 3.0}, ValueError, "raat: `beta`=3.0 has no effect"),
    ("raat", {"boundary": "both"}, ValueError, "raat: `boundary` must be one of"),
    ("raat", {"misclassified": "drop"}, ValueError, "raat: `misclassified` must be one of"),
    ("raat", {"weight": -1.0}, ValueError, "raat: `weight` must lie in"),
    ("raat_sharp", {"weight": -1.0}, ValueError, "raat_sharp: `weight` must lie in"),
    ("rpat", {"beta": 6.0}, TypeError, "rpat: `beta` has no effect with base='pgd_at', which takes no options"),
    ("rpat", {"base": "mart", "consistency_weight": 1.0}, TypeError, "no effect with base='mart', which takes beta"),
    ("rpat", {"base": "awp"}, ValueError, "rpat: `base` must be one of"),
    ("rpat", {"alpha": 1.0, "form": "quotient"}, ValueError, "`alpha` must lie in"),
    ("trades", {"noise": 0.0}, ValueError, "trades: `noise` must lie in"),
    ("trades", {"beta": -1.0}, ValueError, "trades: `beta` must lie in"),
    ("rebat", {"teacher_mode": "train"}, ValueError, "rebat: `teacher_mode` must be one of"),
    ("rebat", {"average": {}}, ValueError, "does not belong to this model"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED, ids=[f"{r[0]}-{r[1]}"[:60] for r in REFUSED])
def test_impossible_combinations_are_refused(name, options, error, message):
    model, views, labels = problem()
    with pytest.raises(error, match=message.replace("(", r"\(").replace("[", r"\[")):
        call(name, model, views, labels, attack_with(), **options)


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "consistency_at", "dicar", "raat_sharp"])
def test_two_views_are_needed(name):
    model, views, labels = problem()
    with pytest.raises(ValueError, match=r"`views` must be a tuple \(x1, x2\)"):
        call(name, model, views[:1], labels, attack_with())


@pytest.mark.parametrize("name", ["mart", "raat", "raat_plus_plus", "raat_sharp", "dicar"])
def test_mixed_labels_are_refused_where_one_class_must_be_right(name):
    model, views, labels = problem()
    soft = nn.functional.one_hot(labels, 3).double()
    with pytest.raises(TypeError, match="`labels` must be class indices"):
        call(name, model, views, soft, attack_with())


def test_a_bare_tensor_is_no_tuple_of_views():
    model, (x, _), labels = problem()
    with pytest.raises(TypeError, match=r"pgd_at: `views` must be a tuple \(x,\) or \(x1, x2\)"):
        objectives.pgd_at(model, x, labels, attack_with())


def test_an_attack_that_changes_the_shape_is_refused():
    model, (x, _), labels = problem()
    with pytest.raises(ValueError, match="attack"):
        objectives.pgd_at(model, (x,), labels, lambda m, v, y: v[:1])
    with pytest.raises(TypeError, match="pgd_at: `attack` must be a function"):
        objectives.pgd_at(model, (x,), labels, "pgd")


@pytest.mark.parametrize("proxy", ["second_to_last", "third_to_last"])
def test_the_networks_of_the_papers_offer_their_inner_perceptions(proxy):
    torch.manual_seed(0)
    model, x, labels = models.DigitsCNN(width=4), torch.rand(6, 1, 8, 8), torch.arange(6)
    perceive = models.perceive_at(model, proxy)
    attack = functools.partial(pgd, threat=THREAT, steps=1)
    loss, terms = objectives.rpat(model, (x,), labels, attack, perceive=perceive)
    assert terms["robust_perception"] > 0
    loss.backward()
    assert model.linear.weight.grad is not None


def test_dicar_uses_the_pairs_it_is_told_to():
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    mask = torch.arange(len(labels)) % 3 == 0
    term = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, mask=mask)[1]["dicar"]
    x1_adv, x2_adv = x_adv.chunk(2)
    logits = model(interpolate(x2_adv, x1_adv, 0.7)), model(views[0]), model(views[1])
    assert_close(term, dicar_loss(*logits, mix=0.7, space="logits", temperature=0.5, mask=mask))
    with pytest.raises(ValueError, match="raat: `mask` must be a boolean mask"):
        objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, mask=mask.double())


def test_only_the_first_view_is_supervised_when_told_so():
    model, views, labels = problem()
    model.eval()
    x_adv = attack_with()(model, torch.cat(views), labels.repeat(2))
    loss, terms = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, bound=False, supervise="first")
    assert_close(loss - terms["dicar"], cross_entropy(model(x_adv[: len(labels)]), labels).mean())


def test_every_objective_has_keywords_of_paper_and_release():
    for name in objectives.__all__:
        if name == "preset":
            continue
        known = set(inspect.signature(getattr(objectives, name)).parameters)
        if "raat_options" in known:  # which are handed on
            known |= set(inspect.signature(objectives.raat).parameters)
        paper, release = (objectives.preset(name, source) for source in ("paper", "release"))
        assert set(paper) | set(release) <= known, name
    both = objectives.preset("rpat", "paper", base="kd")
    assert (both.pop("form"), both.pop("base").keywords) == ("quotient", {"form": "kl"})  # each has its own
    assert not both
    assert objectives.preset("dicar", "paper", base="cure")["beta"] == 1.0


def test_the_released_trades_with_rpat_moves_batch_norm_four_times():
    model, (x, _), labels = problem()
    keywords = objectives.preset("rpat", "release", base="trades")
    objectives.rpat(model, (x,), labels, attack_with(), **keywords)
    assert int(model.norm.num_batches_tracked) == 4
    with pytest.raises(ValueError, match="`base`='mart' has no effect with objective='raat'"):
        objectives.preset("raat", "paper", base="mart")


class Overwriting(nn.Module):
    """Normalises its input in place, as models in the wild do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.sub_(0.25).mul_(2.0))


class Careful(Overwriting):
    def forward(self, x):
        return self.model((x - 0.25) * 2.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_model_that_writes_to_its_input_trains_as_one_that_does_not(name):
    losses = []
    for kind in (Careful, Overwriting):
        model, views, labels = problem()
        before = [view.clone() for view in views]
        torch.manual_seed(0)
        draws = "generator" in inspect.signature(getattr(objectives, name)).parameters
        options = {"generator": torch.Generator().manual_seed(0)} if draws else {}
        loss, _ = call(name, kind(model), views, labels, attack_with(), **options)
        loss.backward()
        assert all(torch.equal(*pair) for pair in zip(views, before, strict=True))
        losses.append(loss.detach())
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", ["rpat", "dicar", "pgd_at", "trades", "raat"])
def test_an_attack_that_cannot_be_called_is_named_by_who_was_called(name):
    options = {"mix": 0.6} if name in ("dicar", "raat") else {}
    model, x, labels = nn.Linear(2, 3), torch.rand(3, 2), torch.tensor([0, 1, 2])
    missing = r"missing a required argument: 'threat'.*functools.partial\(pgd"
    for wrong, says in ((pgd, missing), (Linf(0.1), "got Linf")):
        with pytest.raises(TypeError, match=f"^{name}: `attack` .*{says}"):
            getattr(objectives, name)(model, (x, x), labels, wrong, **options)


@pytest.mark.parametrize("name", ["standard", "random_noise", "pgd_at", "trades", "mart"])
def test_a_model_is_something_that_gives_logits(name):
    objective, x, labels = getattr(objectives, name), torch.rand(3, 2), torch.tensor([0, 1, 0])
    given = {"threat": Linf(0.1)} if name == "random_noise" else {}
    with pytest.raises(TypeError, match=f"^{name}: `model` must be callable, got NoneType"):
        objective(None, (x,), labels, lambda *_, **__: x, **given)
    with pytest.raises(TypeError, match=rf"^{name}: `model` must return a tensor of logits, got dict.*logits_of"):
        objective(lambda z: {"logits": z}, (x,), labels, lambda *_, **__: x.clone(), **given)
    wrong = {
        "floating-point": lambda z: (9 * z).long(),
        "shape": lambda z: z[:, 0],
        "the pair": lambda z: z[:, :1],
        "a row of logits for each of 3": lambda z: torch.cat([z, z]),
    }
    for words, model in wrong.items():  # of the model, not of what its outputs go into
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: `model.* must .*{words}"):
            objective(model, (x,), labels, lambda *_, **__: x.clone(), **given)


class Boxed(SmallNet):
    def forward(self, x):
        return {"logits": super().forward(x)}


BUILT_ON = [("rpat", "trades"), ("dicar", "mart"), ("rpat", objectives.consistency_at)]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OBJECTIVES), *((name, {"base": base}) for name, base in BUILT_ON),
     ("alp", {"joint": True}), ("adr", {"joint": True, "base": "trades"}), ("clp", {"pairs": "images"})],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)  # fmt: skip
def test_outputs_that_are_no_logits_are_named_by_who_was_called(name, options):
    _, views, labels = problem()
    options |= {"kappa": torch.zeros(12)} if name == "gairat" else {}
    with pytest.raises(TypeError, match=rf"^{name}: `model` must return a tensor of logits, got dict"):
        call(name, Boxed(), views, labels, lambda _, x, *__, **___: x.clone(), **options)


def test_a_sum_of_two_objectives_speaks_in_its_own_name():
    model, views, labels = problem()
    soft = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    for wrong in ({"views": views[:1]}, {"labels": labels[:3]}, {"labels": soft}):
        given = {"views": views, "labels": labels, **wrong}
        with pytest.raises((TypeError, ValueError), match=f"^rpat_raat: `{next(iter(wrong))}` "):
            objectives.rpat_raat(model, given["views"], given["labels"], attack_with(), mix=0.6)


@pytest.mark.parametrize(
    ("name", "teacher"),
    [("hat", "helper"), ("kd", "standard_teacher"), ("kd", "robust_teacher"), ("lbgat", "teacher")],
)
def test_a_teacher_is_asked_and_named_as_the_model_is(name, teacher):
    model, views, labels = problem()
    before = views[0].clone()
    call(name, model, views, labels, attack_with(), **{teacher: Overwriting(SmallNet(seed=1))})
    assert torch.equal(views[0], before)
    with pytest.raises(TypeError, match=rf"^{name}: `{teacher}` must return a tensor of logits, got dict"):
        call(name, model, views, labels, attack_with(), **{teacher: Boxed()})


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mart"])
def test_an_attack_that_changes_the_dtype_is_named(name):
    model, x, labels = nn.Linear(2, 3), torch.rand(3, 2), torch.tensor([0, 1, 0])
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match=rf"^{name}: `attack.* must return inputs of torch.float32.*got {dtype}"):
            getattr(objectives, name)(model, (x,), labels, lambda *_, dtype=dtype, **__: x.to(dtype))


def test_a_weight_of_another_dtype_does_not_widen_the_loss():
    model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
    beta = torch.linspace(0, 6, 4, dtype=torch.float64)[3]
    loss, terms = objectives.trades(model, (x,), labels, fixed_attack(x + 0.1), beta=beta)
    assert loss.dtype == torch.float32
    assert_close(loss, terms["cross_entropy"] + 6 * terms["kl"])
