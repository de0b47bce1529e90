"""SCORE, IKL, LBGAT, logit pairing, GradAlign, HE and FAT as objectives; RPAT with RAAT; eta per sample.

The constants are values of the released codes in float64, on the logits of `Lookup`.
"""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    adaptive_eta,
    call_with,
    friendly_pgd,
    interpolate,
    models,
    objectives,
    pgd,
    robust_perception_loss,
    smooth_labels,
    snapshot,
)
from perceptual_at.divergences import cross_entropy
from tests.test_objectives import SmallNet, fixed_attack, problem

Z = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
ZA = torch.tensor([[0.5, 1.0, -0.5], [0.2, 0.1, 1.2]], dtype=torch.float64)
ZT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([0, 1])


class Lookup(nn.Module):
    """Gives the clean logits at 0 and the adversarial ones at 1; a factor to train."""

    def __init__(self, clean, adv):
        super().__init__()
        self.clean, self.adv = clean, adv
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        at = x.mean(dim=1, keepdim=True)
        clean, adv = (torch.cat([z] * (len(x) // 2)) for z in (self.clean, self.adv))
        return self.factor * torch.lerp(clean, adv, at)


def released(name, **options):
    """The loss on the fixed logits."""
    x = torch.zeros(2, 1, dtype=torch.float64)
    return getattr(objectives, name)(Lookup(Z, ZA), (x,), Y, fixed_attack(torch.ones_like(x)), **options)[0]


def close(actual, expected):
    assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


# Values of the released codes -------------------------------------------------------------------------------------


def test_values_of_the_released_codes():
    close(released("score"), 1.27985371)
    close(released("ikl", table=torch.full((3, 3), 1 / 3, dtype=torch.float64)), 11.79880781)
    close(released("lbgat", teacher=lambda x: ZT, beta=6.0), 3.40955684)
    close(released("alp", joint=True, smoothing=0.1), 1.29919530)


def test_cosines_with_a_margin():
    cosines = torch.tensor([[0.8, 0.1, -0.2], [0.1, 0.4, 0.3]], dtype=torch.float64)
    x = torch.zeros(2, 1, dtype=torch.float64)
    model = Lookup(15 * cosines, 15 * cosines)
    loss, _ = objectives.hypersphere(model, (x,), Y, fixed_attack(torch.ones_like(x)))
    close(loss, 0.87093518)


# What each is a sum of --------------------------------------------------------------------------------------------


def test_score_on_either_base_and_in_either_order():
    assert_close(released("score", base="pgd_at"), (ZA.softmax(1) - torch.eye(3).double()[Y]).square().sum(1).mean())
    assert_close(released("score", adv_first=True), released("score"))
    model, (x, _), labels = problem()
    soft = smooth_labels(labels, 3, smoothing=0.1, over="others", dtype=torch.float64)
    for base in ("trades", "pgd_at"):
        loss, _ = objectives.score(model, (x,), soft, functools.partial(pgd, threat=Linf(0.1), steps=2), base=base)
        assert torch.isfinite(loss)


def test_dkl_moves_the_weights_as_trades_does():
    model, (x, _), labels = problem()
    model.eval()
    x_adv = pgd(model, x, labels, Linf(0.1), generator=torch.Generator().manual_seed(0))
    dkl, terms = objectives.ikl(
        model, (x,), labels, fixed_attack(x_adv), table=None, detach_adv=True, alpha=6.0, beta=6.0
    )
    trades, _ = objectives.trades(model, (x,), labels, fixed_attack(x_adv), beta=6.0)
    for one, other in zip(*(torch.autograd.grad(loss, model.parameters()) for loss in (dkl, trades)), strict=True):
        assert_close(one, other)
    assert list(terms) == ["cross_entropy", "soft_cross_entropy", "weighted_mse"]


def test_ikl_collects_the_predictions_of_its_clean_pass():
    model, (x, _), labels = problem()
    model.eval()
    sums = torch.zeros(3, 3, dtype=torch.float64)
    table = torch.full_like(sums, 1 / 3)
    attack = functools.partial(pgd, threat=Linf(0.1), steps=1)
    for _ in range(2):
        objectives.ikl(model, (x,), labels, attack, table=table, sums=sums, temperature=2.0)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row, label in zip((model(x) / 2).softmax(dim=1), labels, strict=True):
        expected[label] += 2 * row.detach()
    assert_close(sums, expected)
    assert not sums.requires_grad


def test_lbgat_trains_both_models_and_shows_the_labels_to_one():
    model, (x, _), labels = problem()
    teacher = SmallNet(seed=1).train()
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2)
    loss, terms = objectives.lbgat(model, (x,), labels, attack, teacher=teacher)
    loss.backward()
    assert list(terms) == ["guidance", "cross_entropy"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in teacher.parameters())
    assert model.rows == [12]
    assert teacher.rows == [12]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    other = objectives.lbgat(model.eval(), (x,), labels, fixed_attack(x), teacher=teacher.eval(), beta=6.0)
    assert list(other[1]) == ["guidance", "cross_entropy", "kl"]
    assert len(grads) == 6


def test_alp_in_its_three_forms():
    half = (cross_entropy(Z, Y).mean() + cross_entropy(ZA, Y).mean()) / 2
    assert_close(released("alp", weight=2.0), half + 2 * (Z - ZA).square().mean())
    mart = cross_entropy(ZA, Y).mean() + 2 * (Z.softmax(1) - ZA.softmax(1)).square().sum(1).mean()
    assert_close(released("alp", weight=2.0, supervise="adversarial", space="probabilities"), mart)


def test_the_two_methods_called_clp():
    attacked = cross_entropy(Z, Y).mean() + 0.5 * (Z.softmax(1) - ZA.softmax(1)).square().sum(1).mean()
    assert_close(released("clp", pairs="attacked"), attacked)
    model, (x, _), labels = problem(batch=5)
    model.eval()
    loss, terms = objectives.clp(model, (x,), labels, None, pairs="images", noise=0.0, weight=3.0)
    z = model(x)
    assert_close(loss, cross_entropy(z, labels).mean() + 3 * (z[:2] - z[2:4]).square().mean())
    noisy = [
        objectives.clp(model, (x,), labels, None, pairs="images", generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert noisy[0] == noisy[1] != noisy[2]
    assert list(terms) == ["cross_entropy", "pairing"]


def test_grad_align_is_the_angle_between_two_gradients_one_of_them_held_fixed():
    model, (x, _), labels = problem()
    model.eval()
    threat = Linf(0.1)
    loss, terms = objectives.grad_align(
        model, (x,), labels, fixed_attack(x), threat=threat, weight=0.5, generator=torch.Generator().manual_seed(3)
    )
    beside = threat.random_start(x, generator=torch.Generator().manual_seed(3))

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(model(at), labels).mean(), at, create_graph=True)[0].flatten(1)

    one, other = gradient(x).detach(), gradient(beside)
    angle = (1 - nn.functional.cosine_similarity(one, other, dim=1)).mean()
    assert_close(loss, cross_entropy(model(x), labels).mean() + 0.5 * angle)
    assert_close(terms["grad_align"], angle.detach())
    expected = torch.autograd.grad(cross_entropy(model(x), labels).mean() + 0.5 * angle, model.parameters())
    for actual, wanted in zip(torch.autograd.grad(loss, model.parameters()), expected, strict=True):
        assert_close(actual, wanted)


def test_hypersphere_attacks_without_the_margin_and_learns_with_it():
    torch.manual_seed(0)
    model = models.with_cosine_logits(models.DigitsCNN(width=4), scale=10.0)
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2)
    for base in ("pgd_at", "trades"):
        loss, terms = objectives.hypersphere(model, (x,), labels, attack, base=base, scale=10.0)
        loss.backward()
        assert terms["margin_cross_entropy"] > 0


def test_fat_is_an_attack_of_any_objective():
    for name in ("pgd_at", "trades", "mart"):
        model, (x, _), labels = problem()
        attack = functools.partial(friendly_pgd, threat=Linf(0.3), steps=5, patience=1)
        loss, _ = getattr(objectives, name)(model, (x,), labels, attack)
        assert torch.isfinite(loss)
        assert model.passes["attack"] == 5


PASSES = [
    ("score", {}, [12, 12], 1),
    ("score", {"base": "pgd_at"}, [12], 0),
    ("ikl", {"table": None}, [12, 12], 1),
    ("lbgat", {"teacher": SmallNet(seed=1)}, [12], 1),
    ("lbgat", {"teacher": SmallNet(seed=1), "beta": 6.0}, [12, 12], 1),
    ("alp", {}, [12, 12], 0),
    ("alp", {"joint": True}, [24], 0),
    ("clp", {"pairs": "images"}, [12], 0),
    ("clp", {"pairs": "attacked"}, [12, 12], 0),
    ("grad_align", {"threat": Linf(0.1)}, [12, 12, 12], 0),
    ("hypersphere", {}, [12], 0),
    ("hypersphere", {"base": "trades"}, [12, 12], 1),
]


@pytest.mark.parametrize(("name", "options", "rows", "no_grad"), PASSES, ids=lambda value: str(value)[:30])
def test_a_step_takes_exactly_the_documented_passes(name, options, rows, no_grad):
    model, (x, _), labels = problem()
    attack = functools.partial(pgd, threat=Linf(0.1), steps=3, validate=False)
    objectives.__dict__[name](model, (x,), labels, attack, **options)
    assert model.rows == rows
    assert model.passes["no_grad"] == no_grad
    images = name == "clp" and options["pairs"] == "images"
    assert model.passes["attack"] == (0 if images else 3)


REFUSED = [
    ("lbgat", {"teacher": None}, TypeError, "lbgat: `teacher` must be a second model"),
    ("score", {"base": "pgd_at", "beta": 2.0}, ValueError, "score: `beta`=2.0 has no effect with base='pgd_at'"),
    ("score", {"base": "pgd_at", "adv_first": True}, ValueError, "score: `adv_first`=True has no effect with base="),
    ("score", {"base": "pgd_at", "slack": 0.1, "slack_on": "robust"}, ValueError, "`slack_on`='robust' has no effect"),
    ("score", {"base": "mart"}, ValueError, "score: `base` must be one of"),
    ("score", {"slack": -1.0}, ValueError, "`slack` must lie in"),
    ("hypersphere", {"beta": 2.0}, ValueError, "hypersphere: `beta`=2.0 has no effect with base='pgd_at'"),
    ("ikl", {"table": torch.zeros(3, 2).double()}, ValueError, "ikl: `table` must hold the predictions of each class"),
    ("ikl", {"table": None, "sums": torch.zeros(2, 2)}, ValueError, "`sums` is of 2 classes but `logits` has 3"),
    ("clp", {"pairs": "halves"}, ValueError, "clp: `pairs` must be one of"),
    ("clp", {"pairs": "attacked", "noise": 0.5}, ValueError, "clp: `noise`=0.5 has no effect with pairs='attacked'"),
    ("grad_align", {"threat": 0.1}, TypeError, "grad_align: `threat` must be a threat model"),
    ("raat", {"weight": 0.0, "eta": torch.ones(5)}, ValueError, "raat: `eta` must be one floating-point number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED, ids=[f"{r[0]}-{r[1]}"[:40] for r in REFUSED])
def test_what_is_missing_or_without_effect_is_refused_by_name(name, options, error, message):
    model, (x, _), labels = problem()
    with pytest.raises(error, match=message):
        getattr(objectives, name)(model, (x,), labels, functools.partial(pgd, threat=Linf(0.1), steps=1), **options)


def test_required_options_are_named_when_they_are_forgotten():
    model, (x, _), labels = problem()
    for name, missing in (("lbgat", "teacher"), ("clp", "pairs"), ("grad_align", "threat"), ("ikl", "table")):
        with pytest.raises(TypeError, match=f"{name}.*'{missing}'"):
            getattr(objectives, name)(model, (x,), labels, None)
    with pytest.raises(ValueError, match="lbgat: `teacher` is the model itself"):
        objectives.lbgat(model, (x,), labels, fixed_attack(x), teacher=model)
    with pytest.raises(TypeError, match="clp: `attack` must be a function"):
        objectives.clp(model, (x,), labels, None, pairs="attacked")
    with pytest.raises(ValueError, match="clp: `views` must hold at least two images"):
        objectives.clp(model, (x[:1],), labels[:1], None, pairs="images")


# RPAT with RAAT ---------------------------------------------------------------------------------------------------


def test_rpat_with_raat_is_the_sum_of_the_two():
    model, views, labels = problem()
    model.eval()
    x = torch.cat(views)
    x_adv = pgd(model, x, labels.repeat(2), Linf(0.2), generator=torch.Generator().manual_seed(0))
    raat, terms = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, weight=2.0, eta=0.3)
    both, more = objectives.rpat_raat(
        model, views, labels, fixed_attack(x_adv), mix=0.7, weight=3.0, dicar_weight=2.0, eta=0.3
    )
    logits = model(x), model(interpolate(x, x_adv, 0.5)), model(x_adv)
    assert_close(both, raat + 3 * robust_perception_loss(*logits, form="interpolation"))
    assert list(more) == [*terms, "robust_perception"]
    for source in ("paper", "release"):  # `temperature` is DICAR's
        own = objectives.preset("raat", source)
        raat, _ = objectives.raat(model, views, labels, fixed_attack(x_adv), mix=0.7, **own)
        both, more = objectives.rpat_raat(model, views, labels, fixed_attack(x_adv), mix=0.7, weight=0.0, **own)
        assert_close(both, raat)
        assert own.items() <= objectives.preset("rpat_raat", source).items()
    with pytest.raises(TypeError, match=r"rpat_raat: `strength` has no effect with base='raat'"):
        objectives.rpat_raat(model, views, labels, fixed_attack(x_adv), mix=0.7, strength=1.0)


# The scale-free form ----------------------------------------------------------------------------------------------


def relative(*logits, **options):
    return robust_perception_loss(*logits, form="relative", **options)


def test_the_relative_form_has_no_scale_and_knows_the_chord():
    clean, adv = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middle = clean + 0.3 * (adv - clean)
    assert relative(clean, middle, adv, alpha=0.3) < 1e-30
    bent = middle + 0.1
    for factor in (1e-6, 1.0, 1e6):
        scaled = relative(factor * clean, factor * bent, factor * adv, alpha=0.3)
        assert_close(scaled, relative(clean, bent, adv, alpha=0.3))
    moved = relative(clean + 7, bent + 7, adv + 7, alpha=0.3)
    assert_close(moved, relative(clean, bent, adv, alpha=0.3))
    away = (clean - adv).norm(dim=1, keepdim=True) * torch.nn.functional.normalize(torch.ones(6, 5).double(), dim=1)
    assert_close(relative(clean, middle + away, adv, alpha=0.3), torch.tensor(0.5).double())


def test_nothing_breaks_where_the_chord_has_no_length():
    still = torch.ones(4, 3, dtype=torch.float64)
    for middle in (still, still + 1, still + 1e-200):
        given = [still.clone().requires_grad_(), middle.clone().requires_grad_(), still.clone().requires_grad_()]
        value = relative(*given, reduction="none")
        value.sum().backward()
        assert value.isfinite().all()
        assert (value <= 1).all()
        assert all(v.grad.isfinite().all() for v in given)
    assert relative(still, still, still) == 0
    with pytest.raises(ValueError, match="`criterion`='kl' has no effect with form='relative'"):
        relative(still, still, still, criterion="kl")


# Eta per sample ---------------------------------------------------------------------------------------------------


def test_eta_may_be_one_per_image_or_one_per_row():
    model, views, labels = problem()
    model.eval()
    x, twice = torch.cat(views), labels.repeat(2)
    x_adv = pgd(model, x, twice, Linf(0.3), generator=torch.Generator().manual_seed(0))

    def loss(eta, **options):
        return objectives.raat(model, views, labels, fixed_attack(x_adv), weight=0.0, eta=eta, **options)[0]

    assert_close(loss(torch.full((12,), 0.3).double()), loss(0.3))
    assert_close(loss(torch.full((24,), 0.3).double()), loss(0.3))
    etas = torch.linspace(0.1, 1.0, 12).double()
    assert_close(loss(etas), loss(torch.cat([etas, etas])))
    reduced = interpolate(x, x_adv, etas.repeat(2))
    near, far, clean = (model(v).argmax(1) != twice for v in (reduced, x_adv, x))
    smaller = ~clean & near & far
    assert smaller.any()
    supervised = torch.where(smaller.reshape(-1, 1, 1, 1), reduced, x_adv)
    assert_close(loss(etas), cross_entropy(model(supervised), twice).mean())
    plus = objectives.raat_plus_plus(model, views, labels, fixed_attack(x_adv), weight=0.0, eta=etas)[0]
    assert torch.isfinite(plus)
    average = snapshot(model)
    one = x_adv[:12]
    sharp = objectives.raat_sharp(model, views[:1], labels, fixed_attack(one), weight=0.0, eta=etas, average=average)[0]
    near = call_with(model, average, interpolate(views[0], one, etas)).argmax(1) != labels
    taken = torch.where((near & ~clean[:12] & far[:12]).reshape(-1, 1, 1, 1), interpolate(views[0], one, etas), one)
    assert_close(sharp, cross_entropy(model(taken), labels).mean())
    with pytest.raises(ValueError, match=r"raat: `eta` of shape \(12,\) has no effect together with `reduced_attack`"):
        loss(etas, reduced_attack=fixed_attack(x_adv))


def test_adaptive_eta_is_the_first_place_where_the_sample_is_wrong():
    model, (x, _), labels = problem()
    model.eval()
    x_adv = pgd(model, x, labels, Linf(0.4), generator=torch.Generator().manual_seed(0))
    places = (0.1, 0.25, 0.5, 0.75)
    path = torch.stack([model(interpolate(x, x_adv, place)) for place in places])
    etas = adaptive_eta(path, labels, etas=places)
    for i, eta in enumerate(etas.tolist()):
        wrong = [place for place, logits in zip(places, path, strict=True) if logits[i].argmax() != labels[i]]
        assert eta == (min(wrong) if wrong else 1.0)
    assert len(etas.unique()) > 1
    refused = {"`etas` must grow": (0.1, 0.3, 0.2, 0.4), "of shape": (0.1, 0.2), "must lie in": (0.0, 0.1, 0.2, 0.3)}
    for message, bad in refused.items():
        with pytest.raises(ValueError, match=f"adaptive_eta: .*{message}"):
            adaptive_eta(path, labels, etas=bad)
