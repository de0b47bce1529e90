"""Objectives on dense models: sums of public terms, passes, and what RAAT makes of places that disagree."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import perceptual_at as pat
from perceptual_at import Linf, interpolate, objectives
from perceptual_at.divergences import cross_entropy
from perceptual_at.objectives.alignment import composed
from tests.passes import CountPasses
from tests.strategies import integers, normal, uniform

BATCH, CLASSES, SIZE = 4, 3, (5, 4)
exactly = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def network():
    """Its logits are centred, so that it predicts every class somewhere."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.0), nn.ReLU(), nn.Conv2d(6, CLASSES, 1)
    ).double()
    with torch.no_grad():
        net[3].bias -= net.eval()(uniform(1, BATCH, 2, *SIZE)).mean(dim=(0, 2, 3))
    return net.train()


def attack(model, x, labels, start=None, loss=None):
    """A fixed perturbation: what is tested is what the objectives make of it."""
    return (x + 0.3 * normal(7, *x.shape).sign()).clamp(0, 1)


def problem():
    x1 = uniform(1, BATCH, 2, *SIZE)
    x2 = (x1 + 0.1 * uniform(2, BATCH, 2, *SIZE)).clamp(0, 1)
    labels = integers(3, BATCH, *SIZE, below=CLASSES)
    with torch.no_grad():
        guess = network().eval()(x1).argmax(dim=1)
    labels[2:] = guess[2:]  # places that are right exist
    labels[0, 0] = -100
    labels[1] = -100
    return network(), (x1, x2), labels


NEEDS = {
    "rebat": "average", "rpat_plus_plus": "average", "raat": "mix", "raat_plus_plus": "mix", "dicar": "mix",
    "raat_sharp": "both",
}  # fmt: skip
NAMES = [
    "pgd_at", "trades", "mart", "consistency_at", "rpat", "rebat", "rpat_plus_plus", "raat", "raat_plus_plus",
    "raat_sharp", "dicar",
]  # fmt: skip


def options(name, model):
    wanted = NEEDS.get(name, "")
    return ({"average": pat.snapshot(model)} if wanted in ("average", "both") else {}) | (
        {"mix": 0.6} if wanted in ("mix", "both") else {}
    )


def views_of(name, views):
    return views if name in ("consistency_at", "raat", "raat_plus_plus", "raat_sharp", "dicar") else views[:1]


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_a_dense_model(name):
    model, views, labels = problem()
    loss, terms = getattr(objectives, name)(model, views_of(name, views), labels, attack, **options(name, model))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_one_place_is_classification(name):
    model, views, _ = problem()
    pooled = nn.Sequential(model, nn.AdaptiveAvgPool2d(1))
    labels = integers(3, BATCH, below=CLASSES)
    values = []
    for net, marks in ((pooled, labels[:, None, None]), (nn.Sequential(pooled, nn.Flatten()), labels)):
        found, terms = getattr(objectives, name)(net, views_of(name, views), marks, attack, **options(name, net))
        values.append(torch.stack([found.detach(), *terms.values()]))
    exactly(*values)


def test_trades_and_rpat_are_the_sums_that_they_say():
    model, (x, _), labels = problem()
    x_adv = attack(model, x, labels)
    clean, mid, adv = model(x), model(interpolate(x, x_adv, 0.5)), model(x_adv)
    loss, _ = objectives.rpat(model, (x,), labels, attack, base="trades", weight=2.0)
    evenness = pat.robust_perception_loss(clean, mid, adv, form="interpolation")
    exactly(loss, pat.trades_loss(clean, adv, labels) + 2 * evenness)


LIKE_TRADES = {
    "hat": {"weight": 0.0, "beta": 6.0}, "te": {"targets": None, "base": "trades"},
    "cure": {"average": None, "beta": 6.0},
    "hypersphere": {"base": "trades", "margin": 0.0}, "mail": {"base": "trades", "weighted": False, "beta": 6.0},
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_TRADES)
def test_what_is_trades_without_its_own_term_is_so_on_unlabelled_places_too(name):
    model, (x, _), labels = problem()
    own = LIKE_TRADES[name] | ({"helper": network()} if name == "hat" else {})
    expected, _ = objectives.trades(model, (x,), labels, attack)
    loss, _ = getattr(objectives, name)(model, (x,), labels, attack, **own)
    exactly(loss, expected)


@pytest.mark.parametrize("name", ["lbgat", "ducat"])
def test_the_kl_runs_over_the_labelled_places(name):
    model, (x, _), labels = problem()
    own = {"teacher": network(), "beta": 6.0} if name == "lbgat" else {"base": "trades", "dummies": False}
    _, terms = getattr(objectives, name)(model, (x,), labels, attack, **own)
    exactly(terms["kl"], objectives.trades(model, (x,), labels, attack)[1]["kl"])


def test_averaged_terms_run_over_the_labelled_places():
    model, (x, _), labels = problem()
    average = {key: value + 0.1 for key, value in pat.snapshot(model).items()}
    _, terms = objectives.cure(model, (x,), labels, attack, average=average, teacher_mode="eval")
    counted = labels != -100
    expected = 0.0
    for inputs in (x, attack(model, x, labels)):
        with torch.no_grad():
            teacher = pat.call_with(network().eval(), average, inputs)
        expected = expected + pat.kl_divergence(teacher, model(inputs), mask=counted).mean()
    exactly(terms["averaged_kl"], expected.detach())


def test_scores_terms_sum_to_its_loss_and_its_attack_sees_the_labelled_places():
    model, (x, _), labels = problem()
    ascended = []

    def noted(model, x, labels, loss, start=None):
        ascended.append(loss(model(x + 0.1), labels).detach())
        return attack(model, x, labels)

    loss, terms = objectives.score(model, (x,), labels, noted)
    exactly(loss.detach(), terms["squared_error"] + 4 * terms["squared_distance"])
    assert ascended[0][1] == 0  # of the sample without labels
    assert (ascended[0][[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_class_indices(name):  # in them, -100 is 156
    torch.manual_seed(0)
    model = nn.Conv2d(2, 160, 1).double()
    views = uniform(1, BATCH, 2, *SIZE), uniform(2, BATCH, 2, *SIZE)
    labels = integers(3, BATCH, *SIZE, below=160)
    labels[:, :, 0] = 156
    values = []
    for marks in (labels, labels.to(torch.uint8)):
        own = options(name, model) | ({"misclassified": "mart"} if name == "raat" else {})
        found, terms = getattr(objectives, name)(model, views_of(name, views), marks, attack, **own)
        values.append(torch.stack([found.detach(), *terms.values()]))
    exactly(*values)


# Where places disagree --------------------------------------------------------------------------------------------


def test_the_reading_per_sample_goes_by_the_share_and_the_one_per_place_by_the_place():
    a, b = uniform(0, 2, 3, 2, 4), uniform(1, 2, 3, 2, 4)
    labels = integers(2, 2, 2, 4, below=3)
    labels[0, 0] = -100
    where = torch.zeros(2, 2, 4, dtype=torch.bool)
    where[0, 1, 0] = where[1] = True
    by_share = composed("mine", where, a, b, labels)
    exactly(by_share[0], b[0] + 0.25 * (a[0] - b[0]))  # one of four labelled places
    assert torch.equal(by_share[1], a[1])
    by_place = composed("mine", where, a, b, labels, "place")
    assert torch.equal(by_place, torch.where(where[:, None], a, b))
    coarse = torch.tensor([[[True, False]], [[False, True]]])  # each place stands for 2 x 2 pixels
    by_place = composed("mine", coarse, a, b, labels[:, :1, :2], "place")
    assert torch.equal(by_place[0, :, :, :2], a[0, :, :, :2])
    assert torch.equal(by_place[0, :, :, 2:], b[0, :, :, 2:])


@pytest.mark.parametrize("misclassified", ["standard", "clean", "mart"])
@pytest.mark.parametrize("reduce_per", ["sample", "place"])
def test_raat_trains_on_what_the_partition_composes(reduce_per, misclassified):
    model, views, labels = problem()
    model.eval()
    x, both = torch.cat(views), torch.cat([labels, labels])
    x_adv = attack(model, x, both)
    near = interpolate(x, x_adv, 0.5)
    parts = pat.boundary_partition(model(x), model(near), both, adv_logits=model(x_adv))
    assert parts.boundary.any()
    supervised = composed("mine", parts.boundary, near, x_adv, both, reduce_per)
    if misclassified != "standard":
        instead = x if misclassified == "clean" else x_adv
        supervised = composed("mine", parts.misclassified, instead, supervised, both, reduce_per)
    expected = cross_entropy(model(supervised), both).mean()
    if misclassified == "mart":
        each = [
            (parts.misclassified & (both >= 0)) * torch.stack([
                pat.weighted_kl_loss(model(x)[:, :, i, j], model(supervised)[:, :, i, j], both[:, i, j].clamp_min(0),
                                     reduction="none")
                for i in range(SIZE[0]) for j in range(SIZE[1])
            ], dim=1).unflatten(1, SIZE)
        ][0]  # fmt: skip
        expected = expected + 6 * (each.flatten(1).sum(1) / (both >= 0).flatten(1).sum(1).clamp_min(1)).mean()
    loss, _ = objectives.raat(
        model, views, labels, attack, weight=0.0, eta=0.5, reduce_per=reduce_per, misclassified=misclassified
    )
    exactly(loss, expected)


def test_dicar_uses_the_places_that_are_right_in_both_views():
    model, views, labels = problem()
    model.eval()
    kept = (model(views[0]).argmax(1) == labels) & (model(views[1]).argmax(1) == labels)
    assert kept.any()
    _, terms = objectives.dicar(model, views, labels, attack, mix=0.6)
    adv_1, adv_2 = attack(model, torch.cat(views), None).chunk(2)
    mixed = model(interpolate(adv_2, adv_1, 0.6))
    clean = [model(view) for view in views]
    expected = pat.dicar_loss(mixed, *clean, mix=0.6, mask=kept, space="logits", temperature=0.5)
    exactly(terms["dicar"], expected.detach())
    _, terms = objectives.dicar(model, views, labels, attack, mix=0.6, mask=kept)
    exactly(terms["dicar"], expected.detach())


@pytest.mark.parametrize(("name", "forwards"), [("pgd_at", 1), ("trades", 3), ("mart", 2), ("rpat", 3)])
def test_the_passes_are_those_of_classification(name, forwards):
    model, views, labels = problem()
    model.eval()
    with CountPasses(channels=2) as passes:
        getattr(objectives, name)(model, views[:1], labels, attack)[0].backward()
    assert passes.forwards == forwards * BATCH
    assert passes.input_gradients == 0


def test_mixed_labels_go_where_no_single_class_is_needed():
    model, views, labels = problem()
    soft = nn.functional.one_hot(labels.clamp_min(0), CLASSES).movedim(-1, 1).double()
    for name in ("pgd_at", "trades", "consistency_at", "rpat"):
        found, _ = getattr(objectives, name)(model, views_of(name, views), soft, attack)
        expected, _ = getattr(objectives, name)(model, views_of(name, views), labels.clamp_min(0), attack)
        exactly(found, expected)


# Clear errors -----------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_refused_at_once():
    model, views, labels = problem()
    wrong = torch.full_like(labels, 99)  # no pair is right, so that nothing downstream would notice
    for options_, says in (
        ({"mix": 1.5}, r"`mix` must lie in \[0.0, 1.0\]"),
        ({"temperature": -1}, "`temperature`"),
        ({"average_over": "mean"}, "`average_over`"),
        ({"space": "logit"}, "`space`"),
        ({"reduce_per": "pixel"}, "`reduce_per`"),
    ):
        with pytest.raises(ValueError, match=f"raat: {says}"):
            objectives.raat(model, views, wrong, attack, **{"mix": 0.5, **options_})
    flat = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="raat: `reduce_per`='place' has no effect"):
        objectives.raat(flat, views, labels[:, 0, 0].clamp_min(0), attack, mix=0.5, reduce_per="place")
    with pytest.raises(ValueError, match="`reduce_per`='place' needs inputs"):
        composed("raat", torch.zeros(2, 3, dtype=torch.bool), views[0], views[0], torch.zeros(2, 3), "place")


def test_labels_of_another_size_are_named():
    model, views, labels = problem()
    for name in ("pgd_at", "trades", "mart", "raat"):
        with pytest.raises(ValueError, match=r"`labels` must be .*got .*shape \((4|8), 5, 3\)"):
            getattr(objectives, name)(model, views_of(name, views), labels[..., :3], attack, **options(name, model))
    with pytest.raises(ValueError, match="`labels` has 3 rows but"):
        objectives.pgd_at(model, views[:1], labels[:3], attack)


# Linear models: what an attack can reach is known -----------------------------------------------------------------


def linear_gap(weight, x, labels, eps):
    """Largest margin that a perturbation of each pixel reaches: wrong minus right logit plus eps times its slope."""
    logits = torch.einsum("kc,bchw->bkhw", weight, x)
    index = labels[:, None]
    steep = (weight[None, :, :] - weight[:, None, :]).abs().sum(-1)  # steep[y, k]
    reach = logits - logits.gather(1, index) + eps * steep[labels].movedim(-1, 1)
    return reach.scatter(1, index, -torch.inf).amax(1)


def test_the_closed_form_of_a_linear_model_of_each_pixel():
    weight = normal(0, 2, 3)  # two classes: the best direction does not depend on who is ahead
    model = nn.Conv2d(3, 2, 1, bias=False).double()
    model.weight.data = weight[:, :, None, None].clone()
    x, labels = uniform(1, 2, 3, 4, 4, low=0.3, high=0.7), integers(2, 2, 4, 4, below=2)
    labels[0, 0] = -100
    direction = (weight[1 - labels.clamp_min(0)] - weight[labels.clamp_min(0)]).movedim(-1, 1)
    best = x + 0.1 * direction.sign()
    assert Linf(0.1).norm(best - x).max() <= 0.1 + 1e-12
    gap = linear_gap(weight, x, labels.clamp_min(0), 0.1)
    reached = pat.margin(model(best), labels)
    exactly(reached, (gap * (labels >= 0)).flatten(1).sum(1) / (labels >= 0).flatten(1).sum(1))


@pytest.mark.parametrize("name", ["adr", "gairat", "mma"])
def test_methods_without_a_dense_form_say_so_in_their_own_name(name):
    model, (x, _), labels = problem()
    own = {"adr": {"average": pat.snapshot(model)}, "mma": {"margins": torch.zeros(BATCH), "largest": 1.0}}
    with pytest.raises(ValueError, match=rf"^{name}: `labels` must be integer class indices .* not defined"):
        getattr(objectives, name)(model, (x,), labels, attack, **own.get(name, {}))
