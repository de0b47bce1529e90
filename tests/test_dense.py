"""Logits with places, `(B, K, *S)`: losses, attack goals and partitions against loops over the places."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import perceptual_at as pat
from perceptual_at import losses
from perceptual_at.attacks import cospgd_loss, segpgd_loss, targeted_dlr
from perceptual_at.divergences import cross_entropy, prediction_squared_error, soft_logit_margin
from perceptual_at.sample_weights import entropy_weights, probability_margin, smallest_margins
from tests.strategies import integers, normal, uniform

BATCH, CLASSES, PLACES = 4, 5, (3, 2)
exactly = partial(assert_close, rtol=1e-12, atol=1e-12)


def labelled(seed=90, places=PLACES, classes=CLASSES):
    """Labels of which some are none, and all of sample 1."""
    labels = integers(seed, BATCH, *places, below=classes)
    labels[uniform(seed + 1, BATCH, *places) < 0.3] = -100
    labels[1] = -100
    labels.view(BATCH, -1)[0, 0] = 0
    return labels


@dataclasses.dataclass
class Case:
    """A function of dense logits that has one value per sample, and whether it takes labels."""

    name: str
    call: Callable[..., torch.Tensor]
    logits: int
    labels: bool = False
    reference: bool = False
    """Its first logits are given beforehand."""

    def given(self, places=PLACES, classes=CLASSES):
        logits = [normal(i, BATCH, classes, *places, scale=2.0) for i in range(self.logits)]
        return [*logits, labelled(places=places, classes=classes)] if self.labels else logits

    def __call__(self, *given):
        return self.call(given[0])(*given[1:]) if self.reference else self.call(*given)


def loss(function, **options):
    return partial(function, reduction="none", **options)


def with_mix(function, **options):
    return loss(function, mix=0.3, temperature=0.5, **options)


CASES = [
    Case("cross_entropy", cross_entropy, 1, labels=True),
    Case("margin", pat.margin, 1, labels=True),
    Case("dlr", pat.dlr, 1, labels=True),
    Case("targeted_dlr", lambda z, labels: targeted_dlr(z, labels, (labels + 1).clamp_min(0) % z.shape[1]), 1, True),
    Case("segpgd", partial(segpgd_loss, wrong_weight=0.2), 1, labels=True),
    Case("cospgd", cospgd_loss, 1, labels=True),
    Case("kl_to", pat.kl_to, 2, labels=True, reference=True),
    Case("squared_error", pat.squared_error, 2),
    Case("cosine_distance", pat.cosine_distance, 2),
    Case("kl_divergence", pat.kl_divergence, 2),
    Case("js_divergence", pat.js_divergence, 2),
    Case("trades", loss(pat.trades_loss), 2, labels=True),
    Case("mart", loss(pat.mart_loss), 2, labels=True),
    Case("boosted_cross_entropy", loss(pat.boosted_cross_entropy), 1, labels=True),
    Case("weighted_kl", loss(pat.weighted_kl_loss), 2, labels=True),
    Case("consistency", loss(pat.consistency_loss), 2),
    Case("soft_logit_margin", soft_logit_margin, 1, labels=True),
    Case("prediction_squared_error", prediction_squared_error, 2),
    Case("distillation", loss(losses.distillation_loss), 2),
    Case("distillation kl", loss(losses.distillation_loss, form="kl"), 2),
    Case("dummy_class", lambda z, labels: losses.dummy_class_loss(
        torch.cat((z, z.flip(1)), dim=1), labels, share=0.3, reduction="none"), 1, labels=True),
    Case("hypersphere", loss(losses.hypersphere_loss), 1, labels=True),
    Case("interpolation", loss(losses.interpolation_consistency_loss, mix=0.3), 3),
    Case("interpolation kl", loss(losses.interpolation_consistency_loss, mix=0.3, criterion="kl"), 3),
    Case("logit_pairing", loss(losses.logit_pairing_loss), 2),
    Case("logit_pairing probabilities", loss(losses.logit_pairing_loss, space="probabilities"), 2),
    Case("normalized_error cosine", loss(losses.normalized_error_loss), 2),
    Case("weighted cosine", lambda a, b, labels: losses.normalized_error_loss(
        a, b, labels=labels, reduction="none"), 2, labels=True),
    Case("one_vs_rest", loss(losses.one_vs_rest_loss), 1, labels=True),
    Case("brier", loss(losses.brier_loss), 1, labels=True),
    Case("brier slack", loss(losses.brier_loss, slack=0.4), 1, labels=True),
    Case("score", loss(losses.score_loss), 2, labels=True),
    Case("score slack", loss(losses.score_loss, slack=0.2, slack_on="robust"), 2, labels=True),
    Case("soft_cross_entropy", loss(losses.soft_cross_entropy_loss), 2),
    Case("weighted_mse", loss(losses.weighted_mse_loss), 2),
    Case("temporal_ensembling", lambda z, t: losses.temporal_ensembling_loss(z, t.softmax(1), reduction="none"), 2),
    Case("probability_margin", probability_margin, 1, labels=True),
    Case("robust_perception_kl", loss(pat.robust_perception_kl_loss, alpha=0.3), 3),
    Case("dicar probabilities", with_mix(pat.dicar_loss), 3),
    Case("dicar logits", with_mix(pat.dicar_loss, space="logits"), 3),
    *(
        Case(f"robust_perception {form} {criterion}",
             loss(pat.robust_perception_loss, alpha=0.3, form=form, criterion=criterion), 3)
        for form in ("quotient", "interpolation")
        for criterion in ("mse", "kl", "reverse_kl", "js", "cosine")
    ),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_labels = pytest.mark.parametrize("case", [case for case in CASES if case.labels], ids=lambda case: case.name)


def place_by_place(case, given):
    """The mean over a sample's labelled places of what the function gives for each place alone."""
    values = []
    for row in range(BATCH):
        own = [v[row].flatten(start_dim=0 if v.ndim == given[0].ndim - 1 else 1) for v in given]
        counted = [i for i in range(own[0].shape[1]) if not case.labels or own[-1][i] >= 0]
        alone = [case(*(v[..., i][None] for v in own)) for i in counted]
        values.append(torch.cat(alone).mean() if alone else given[0].new_zeros(()))
    return torch.stack(values)


# Values -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("places", [(7,), (3, 2), (2, 1, 3), (1, 1)], ids=str)
def test_a_sample_is_the_mean_over_its_labelled_places(case, places):
    given = case.given(places)
    each = case(*given)
    assert each.shape == (BATCH,)
    exactly(each, place_by_place(case, given))
    assert not case.labels or each[1] == 0


@every_case
def test_two_classes_one_sample_and_one_place_will_do(case):
    given = [v[:1] for v in case.given((1,), classes=2)]
    exactly(case(*given), case(*(v[..., 0] for v in given)))


@every_case
def test_permuting_the_places_changes_nothing(case):
    given = case.given()
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    shuffled = [v.flatten(-2)[..., order].unflatten(-1, PLACES) for v in given]
    exactly(case(*shuffled), case(*given))


@every_case
def test_what_is_there_without_a_label_does_not_matter(case):
    given = case.given()
    if not case.labels:
        return
    nowhere = (given[-1] < 0)[:, None].expand_as(given[0])
    changed = [v.masked_fill(nowhere, math.nan) for v in given[:-1]]
    exactly(case(*changed, given[-1]), case(*given))


@with_labels
def test_no_labels_at_all_give_zero_and_no_gradient(case):
    *logits, labels = case.given()
    leaf = logits[-1].requires_grad_()
    each = case(*logits, torch.full_like(labels, -100))
    assert torch.equal(each, torch.zeros(BATCH, dtype=torch.float64))
    (grad,) = torch.autograd.grad(each.sum(), leaf)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_probabilities_may_be_given_at_places():
    z, adv = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    indices = integers(2, 2, 4, below=3)
    shares = torch.nn.functional.one_hot(indices, 3).movedim(-1, 1).double()
    exactly(cross_entropy(z, shares), cross_entropy(z, indices))
    exactly(pat.trades_loss(z, adv, shares), pat.trades_loss(z, adv, indices))
    mixed = (shares + shares.roll(1, dims=1)) / 2
    exactly(cross_entropy(z, mixed), (cross_entropy(z, indices) + cross_entropy(z, (indices + 1) % 3)) / 2)


def test_a_mask_of_places_is_a_mean_over_them_and_one_of_samples_takes_them_whole():
    z = [normal(i, BATCH, CLASSES, *PLACES) for i in range(3)]
    kept = uniform(5, BATCH, *PLACES) < 0.5
    kept[2] = False
    each = pat.dicar_loss(*z, mix=0.3, mask=kept, reduction="none")
    for row in range(BATCH):
        alone = [
            pat.dicar_loss(*(v[row : row + 1, :, i, j] for v in z), mix=0.3)
            for i in range(3) for j in range(2) if kept[row, i, j]
        ]  # fmt: skip
        exactly(each[row], torch.stack(alone).mean() if alone else torch.zeros((), dtype=torch.float64))
    exactly(pat.dicar_loss(*z, mix=0.3, mask=kept), each.sum() / 3)
    exactly(pat.dicar_loss(*z, mix=0.3, mask=kept, average_over="all"), each.sum() / 4)
    samples = torch.tensor([True, False, True, False])
    whole = pat.dicar_loss(*z, mix=0.3, reduction="none")
    exactly(pat.dicar_loss(*z, mix=0.3, mask=samples, reduction="none"), whole * samples)
    for distance in (pat.kl_divergence, prediction_squared_error):
        apart = distance(z[0], z[1], mask=kept)
        exactly(apart[0], distance(z[0].movedim(1, -1)[0][kept[0]], z[1].movedim(1, -1)[0][kept[0]]).mean())
        exactly(distance(z[0], z[1], mask=samples), distance(z[0], z[1]) * samples)


def test_the_weights_of_the_attacks_on_segmentation():
    z, labels = normal(0, 1, 3, 4), torch.tensor([[0, 1, 2, -100]])
    places = torch.nn.functional.cross_entropy(z, labels, reduction="none")[0, :3]
    p = z.softmax(dim=1)[0, :, :3]
    right = p.argmax(dim=0) == labels[0, :3]
    cosines = torch.stack([torch.cosine_similarity(p[:, i], torch.eye(3).double()[i], dim=0) for i in range(3)])
    exactly(cospgd_loss(z, labels), (cosines * places).mean()[None])
    exactly(segpgd_loss(z, labels, wrong_weight=0.2), ((0.2 + 0.6 * right.double()) * places).mean()[None])
    exactly(segpgd_loss(z, labels, wrong_weight=0.5), cross_entropy(z, labels) / 2)
    leaf = z.clone().requires_grad_()  # the cosine has no gradient of its own
    (grad,) = torch.autograd.grad(cospgd_loss(leaf, labels).sum(), leaf)
    (plain,) = torch.autograd.grad(cross_entropy(leaf, labels).sum(), leaf)
    exactly(grad[0, :, :3], cosines * plain[0, :, :3])


def test_weights_of_samples_go_by_their_places_on_the_whole():
    z, labels = normal(0, BATCH, CLASSES, *PLACES), labelled()
    entropies = torch.distributions.Categorical(logits=z.movedim(1, -1)).entropy().flatten(1).mean(dim=1)
    exactly(entropy_weights(z, form="proportional"), entropies / entropies.mean())
    margins = -pat.margin(z, labels)
    assert smallest_margins(z, labels, share=0.25).nonzero().item() == margins.argmin()


# Gradients and graphs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_case
def test_gradients_are_those_of_finite_differences(case):
    given = [v[:2] for v in case.given((2,))]
    logits = [v.requires_grad_() for v in given[: case.logits]]
    if case.reference:  # held fixed
        logits[0].requires_grad_(False)
    if case.name in ("cospgd", "soft_cross_entropy", "weighted_mse"):  # their weights are held fixed: see above
        return
    assert torch.autograd.gradcheck(lambda *z: case(*z, *given[case.logits :]), logits)


@pytest.mark.slow
@every_case
def test_compiled_as_one_graph_it_agrees(case):
    torch._dynamo.reset()
    given = case.given()
    call, rest = (case.call(given[0]), given[1:]) if case.reference else (case.call, given)
    exactly(torch.compile(call, fullgraph=True, backend="eager")(*rest), case(*given))


# Partitions -------------------------------------------------------------------------------------------------------


def test_the_partition_is_that_of_each_place_and_leaves_out_what_has_no_label():
    clean, near, far = (normal(i, BATCH, 3, *PLACES) for i in range(3))
    labels = labelled(classes=3)
    for more in ({}, {"adv_logits": far}):
        parts = pat.boundary_partition(clean, near, labels, **more)
        assert torch.equal(torch.stack(parts).sum(dim=0), (labels >= 0).long())
        for i, j in ((0, 0), (1, 1), (2, 0)):
            there = labels[:, i, j] >= 0
            alone = pat.boundary_partition(
                clean[there, :, i, j], near[there, :, i, j], labels[there, i, j],
                **{name: value[there, :, i, j] for name, value in more.items()},
            )  # fmt: skip
            for dense, single in zip(parts, alone, strict=True):
                assert torch.equal(dense[there, i, j], single)


def test_nan_is_no_prediction():
    undefined, sure = torch.full((1, 2), math.nan), torch.tensor([[1.0, 0.0]])
    first = torch.tensor([0])
    assert pat.boundary_partition(undefined, sure, first).misclassified.all()
    assert pat.boundary_partition(sure, undefined, first).boundary.all()
    half = torch.tensor([[math.nan, 0.0]])
    assert pat.boundary_partition(half, sure, first).misclassified.all()


# Classes without probability --------------------------------------------------------------------------------------


def masked_logits(case, places=()):
    """Logits of five classes, the last two of which are masked in all of them; and the first three alone."""
    logits = [normal(i, BATCH, CLASSES, *places) for i in range(case.logits)]
    short = [z[:, :3].clone() for z in logits]
    for z in logits:
        z[:, 3:] = -math.inf
    labels = [integers(9, BATCH, *places, below=3)] if case.labels else []
    return [*logits, *labels], [*short, *labels]


UNLIKE = ("targeted_dlr", "dummy_class")  # masked targets, dummies
MEANS = ("interpolation", "temporal_ensembling", "squared_error", "logit_pairing")  # over five classes
maskable = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in UNLIKE], ids=lambda case: case.name
)  # fmt: skip


@pytest.mark.slow
@maskable
@pytest.mark.parametrize("places", [(), (2,)], ids=str)
def test_masked_classes_count_as_absent(case, places):
    given, short = masked_logits(case, places)
    for v in (*given[: case.logits], *short[: case.logits]):
        v.requires_grad_()
    each, expected = case(*given), case(*short)
    if case.name in MEANS or ("robust_perception" in case.name and "mse" in case.name):
        expected = expected * 3 / 5
    exactly(each, expected)
    grads = torch.autograd.grad(each.sum(), given[: case.logits], allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), short[: case.logits], allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        if want is not None:
            exactly(grad[:, :3], want)
            assert torch.equal(grad[:, 3:], torch.zeros_like(grad[:, 3:]))


def test_a_class_that_one_side_alone_masks():
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    assert pat.kl_divergence(q, p).item() == pytest.approx(math.log(2))
    assert pat.kl_divergence(p, q).item() == math.inf
    expected = ((math.log(2 / 3) + math.log(2)) / 2 + math.log(4 / 3)) / 2  # JS of (1/2, 1/2) and (1, 0)
    assert pat.js_divergence(p, q).item() == pytest.approx(expected)
    assert pat.dicar_loss(p, p, q, mix=1.0, space="logits").item() == pytest.approx(0, abs=1e-7)  # view 2 has no weight
    alone = pat.interpolation_consistency_loss(p, p, q, mix=1.0)
    assert alone == pat.interpolation_consistency_loss(p, p, q, mix=torch.ones(1)) == 0
    assert pat.trades_loss(q, q, torch.tensor([1])).item() == math.inf  # the label itself is impossible


def test_a_mix_may_be_a_number_of_numpy():
    numpy = pytest.importorskip("numpy")
    given = [normal(i, BATCH, CLASSES) for i in range(3)]
    for space in ("logits", "probabilities"):
        expected = pat.dicar_loss(*given, mix=0.25, space=space)
        assert_close(pat.dicar_loss(*given, mix=numpy.float32(0.25), space=space), expected)


def test_all_classes_but_one_may_be_masked():
    only = torch.tensor([[-math.inf, 2.0, -math.inf]], requires_grad=True)
    label = torch.tensor([1])
    assert pat.boosted_cross_entropy(only, label) == 0
    assert pat.mart_loss(only, only, label) == 0
    (grad,) = torch.autograd.grad(pat.mart_loss(only, only, label), only)
    assert torch.equal(grad, torch.zeros(1, 3))
    assert cross_entropy(only, torch.tensor([[0.0, 1.0, 0.0]])) == 0


# Directions by name -----------------------------------------------------------------------------------------------


def test_both_directions_of_the_kl_have_a_name():
    clean, mid, adv = (normal(i, BATCH, CLASSES) for i in range(3))
    chord = torch.lerp(clean, adv, 0.5)
    call = partial(loss(pat.robust_perception_loss, form="interpolation"), clean, mid, adv)
    exactly(call(criterion="kl"), pat.kl_divergence(chord, mid))
    exactly(call(criterion="reverse_kl"), pat.kl_divergence(mid, chord))
    exactly(call(criterion="reverse_kl", temperature=2.0), pat.kl_divergence(mid, chord, temperature=2.0))


# Clear errors -----------------------------------------------------------------------------------------------------

Z = normal(0, 2, 3, 4, 5)
L = integers(1, 2, 4, 5, below=3)
ERRORS = [
    ("labels of another size", ValueError, r"`labels` must be .* of shape \(2, 4, 5\), got shape \(2, 4, 4\)",
     lambda: pat.trades_loss(Z, Z, L[:, :, :4])),
    ("labels per sample", ValueError, r"`labels` must be .* of shape \(2, 4, 5\), got shape \(2,\)",
     lambda: pat.mart_loss(Z, Z, L[:, 0, 0])),
    ("labels beyond the classes", ValueError, r"`labels` must lie in \[0, 2\] for 3 classes, got values from 0 to 3",
     lambda: pat.trades_loss(Z, Z, L.masked_fill(L == 2, 3))),
    ("labels counted from 1", ValueError, r"got values from 1 to 3\. Classes are counted from 0\.$",
     lambda: pat.trades_loss(Z, Z, L + 1)),
    ("negative labels that are not -100", ValueError,
     r"`labels` must lie in \[0, 2\].* from -1 to 2\. In dense labels, -100 is no label\.$",
     lambda: pat.boundary_partition(Z, Z, L.masked_fill(L == 0, -1))),
    ("255 as in files", ValueError, r"got values from 0 to 255\. In dense labels, -100 is no label\.$",
     lambda: pat.evaluate(lambda x: x, [(Z, L.masked_fill(L == 2, 255))], {}, progress=False)),
    ("-100 for a sample", ValueError, r"`labels` must lie in", lambda: pat.trades_loss(Z[..., 0, 0], Z[..., 0, 0],
                                                                                   torch.tensor([0, -100]))),
    ("float labels", TypeError, r"class indices of shape \(2, 4, 5\) or class probabilities of shape \(2, 3, 4, 5\)",
     lambda: pat.trades_loss(Z, Z, L.double())),
    ("margins belong to samples", ValueError, r"max_margin_loss: `labels` .*, got dense ones .* it is not defined",
     lambda: losses.max_margin_loss(Z, Z, L, margins=torch.ones(2), largest=1.0)),
    ("labels beyond the classes, not their dummies", ValueError, r"dummy_class_loss: .* in \[0, 1\] for 2 classes",
     lambda: losses.dummy_class_loss(Z.repeat(1, 4, 1, 1)[:, :4], L.masked_fill(L == 0, 2), share=0.5)),
    ("probabilities that are none", ValueError, r"class probabilities, at least 0 and of sum 1",
     lambda: pat.trades_loss(Z, Z, Z)),
    ("a single class is needed", TypeError, r"weighted_kl_loss: `labels` must be integer class indices",
     lambda: pat.weighted_kl_loss(Z, Z, Z.softmax(dim=1))),
    ("float masks", ValueError, r"`mask` must be a boolean mask of shape \(2,\) or \(2, 4, 5\), got torch.float64",
     lambda: pat.dicar_loss(Z, Z, Z, mix=0.5, mask=L.double())),
    ("masks of another size", ValueError, r"`mask` must be a boolean mask of .* or \(2, 4, 5\), got .*\(2, 4\)",
     lambda: pat.dicar_loss(Z, Z, Z, mix=0.5, mask=L[..., 0] > 0)),
    ("a mask for the KL", ValueError, r"kl_divergence: `mask` must be a boolean mask",
     lambda: pat.kl_divergence(Z, Z, mask=L)),
    ("a mask for the squared distance", ValueError, r"prediction_squared_error: `mask` must be a boolean mask",
     lambda: prediction_squared_error(Z, Z, mask=L)),
    ("one logit", ValueError, r"K >= 2 .* got shape \(2, 1, 4\)\. One logit z for two classes is the pair \[0, z\]",
     lambda: cross_entropy(Z[:, :1, :, 0], L[..., 0])),
    ("dense reference, other logits", ValueError, r"\(2, 3, 4\)", lambda: pat.kl_to(Z)(Z[..., 0], L[..., 0])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "says", "call"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_what_does_not_fit_is_named(kind, says, call):
    with pytest.raises(kind, match=says):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32], ids=str)
def test_labels_may_be_of_any_integer_dtype(dtype):
    labels = L.to(dtype)
    assert torch.equal(pat.mart_loss(Z, Z, labels), pat.mart_loss(Z, Z, L))
    assert torch.equal(pat.margin(Z, labels), pat.margin(Z, L))
    assert torch.equal(
        torch.stack(pat.boundary_partition(Z, -Z, labels)), torch.stack(pat.boundary_partition(Z, -Z, L))
    )


# Hyper-parameters of a compiled loss ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda z, labels, v: pat.dicar_loss(*z, mix=v),
        lambda z, labels, v: pat.dicar_loss(*z, mix=v, space="logits"),
        lambda z, labels, v: pat.robust_perception_loss(*z, alpha=v),
        lambda z, labels, v: pat.robust_perception_loss(*z, alpha=v, form="interpolation", criterion="reverse_kl"),
        lambda z, labels, v: pat.robust_perception_kl_loss(*z, alpha=v),
        lambda z, labels, v: pat.trades_loss(*z[:2], labels, beta=v),
        lambda z, labels, v: pat.mart_loss(*z[:2], labels, beta=v),
        lambda z, labels, v: pat.consistency_loss(*z[:2], temperature=v),
    ],
    ids=["dicar", "dicar logits", "quotient", "interpolation", "perception kl", "trades", "mart", "consistency"],
)
def test_one_graph_takes_a_number_after_another(call, dynamic):
    torch._dynamo.reset()
    z, labels = [normal(i, 4, 5) for i in range(3)], torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    for value in (0.3, 0.7, 0.5):
        exactly(compiled(z, labels, value), call(z, labels, value))
