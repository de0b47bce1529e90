"""GradAlign, SCORE, DKL and IKL, logit pairing, hypersphere embedding, smoothed labels: the formulas, spelled out.

The constants are values of the released codes, computed in float64 on the inputs below.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    brier_loss,
    grad_align_loss,
    hypersphere_loss,
    kl_divergence,
    logit_pairing_loss,
    models,
    pgd,
    score_loss,
    smooth_labels,
    soft_cross_entropy_loss,
    squared_error,
    weighted_mse_loss,
)
from perceptual_at.class_predictions import add_class_predictions, class_table
from perceptual_at.divergences import cross_entropy
from perceptual_at.soft_labels import score_slack
from tests.strategies import integers, normal

Z = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
ZA = torch.tensor([[0.5, 1.0, -0.5], [0.2, 0.1, 1.2]], dtype=torch.float64)
Y = torch.tensor([0, 1])
EVEN = torch.full_like(Z, 1 / 3)


def close(actual, expected):
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


# Values of the released codes -------------------------------------------------------------------------------------


def test_values_of_the_released_codes():
    close(score_loss(Z, ZA, Y, beta=4.0), 1.27985371)
    close(weighted_mse_loss(Z, ZA, class_weights=EVEN), 0.33388889)
    dkl = 4 * soft_cross_entropy_loss(Z, ZA) + 20 * weighted_mse_loss(Z, ZA, class_weights=EVEN)
    close(cross_entropy(Z, Y).mean() + dkl, 11.79880781)
    cosines = torch.tensor([[0.8, 0.1, -0.2], [0.1, 0.4, 0.3]], dtype=torch.float64)
    close(hypersphere_loss(15 * cosines, Y, scale=15.0, margin=0.2), 0.87093518)
    close(cross_entropy(Z, smooth_labels(Y, 3, smoothing=0.1, over="others", dtype=torch.float64)).mean(), 0.61079048)
    close(cross_entropy(Z, smooth_labels(Y, 3, smoothing=0.1, dtype=torch.float64)).mean(), 0.56079048)
    close(torch.tensor(score_slack(10, 0.4), dtype=torch.float64), 0.4**2 * 10 / 9)


# SCORE ------------------------------------------------------------------------------------------------------------


def brier_by_hand(logits, labels):
    total = 0.0
    for row, label in zip(logits.softmax(dim=1).tolist(), labels.tolist(), strict=True):
        total += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    return total / len(labels)


def test_brier_is_the_squared_distance_from_the_label():
    close(brier_loss(Z, Y), brier_by_hand(Z, Y))
    assert_close(brier_loss(Z, smooth_labels(Y, 3, smoothing=0.0)), brier_loss(Z, Y))
    assert_close(brier_loss(Z, ZA.softmax(dim=1)), (Z.softmax(1) - ZA.softmax(1)).square().sum(1).mean())


def test_slack_is_taken_from_the_sum_of_a_sample_or_from_the_robust_distance_before_beta():
    wrong, moved = brier_loss(Z, Y, reduction="none"), (Z.softmax(1) - ZA.softmax(1)).square().sum(1)
    b = 0.2
    assert (moved < b).any()
    assert (moved > b).any()
    assert_close(score_loss(Z, ZA, Y, beta=3.0, slack=b, reduction="none"), (wrong + 3 * moved - b).clamp_min(0))
    robust = score_loss(Z, ZA, Y, beta=3.0, slack=b, slack_on="robust", reduction="none")
    assert_close(robust, wrong + 3 * (moved - b).clamp_min(0))


def test_slack_is_the_distance_of_a_label_that_gives_away_a_share():
    given_away = smooth_labels(torch.tensor([3]), 10, smoothing=0.3, over="others")
    assert score_slack(10, 0.3) == pytest.approx(brier_loss(given_away.log(), torch.tensor([3])).item(), rel=1e-5)


def test_score_moves_both_predictions():
    z, za = Z.clone().requires_grad_(), ZA.clone().requires_grad_()
    score_loss(z, za, Y).backward()
    assert z.grad.abs().min() > 0
    assert za.grad.abs().min() > 0


# DKL and IKL ------------------------------------------------------------------------------------------------------


def pairs_by_hand(clean, adv, weights):
    """The double sum over pairs of classes."""
    change = clean - adv
    gaps = change[:, :, None] - change[:, None, :]
    return (weights[:, :, None] * weights[:, None, :] * gaps.square()).sum(dim=(1, 2)) / 4


@given(st.integers(0, 1000), st.sampled_from([2, 3, 7]), st.sampled_from([0.2, 0.5, 1.0]))
def test_weighted_mse_is_the_sum_over_pairs_of_classes(seed, classes, gamma):
    z, za, s = (normal(seed + i, 5, classes) for i in range(3))
    weights = s.softmax(dim=1)
    expected = pairs_by_hand(z, za, weights**gamma)
    total = (weights**gamma).sum(dim=1).square()
    assert_close(
        weighted_mse_loss(z, za, class_weights=weights, gamma=gamma), expected.sum() / total.sum(), rtol=1e-12, atol=0
    )


def test_the_two_halves_of_dkl_have_the_gradients_of_the_kl():
    z, za = normal(0, 6, 5).requires_grad_(), normal(1, 6, 5).requires_grad_()
    kl = torch.autograd.grad(kl_divergence(z, za).sum(), (z, za))
    halves = soft_cross_entropy_loss(z, za, reduction="sum") + weighted_mse_loss(
        z, za, detach_adv=True, reduction="sum"
    )
    for actual, expected in zip(torch.autograd.grad(halves, (z, za)), kl, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-15)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum()
    assert_close(soft_cross_entropy_loss(z, za, reduction="sum"), kl_divergence(z, za).sum() + entropy)


def test_what_is_held_fixed():
    z, za, s = (normal(i, 4, 3).requires_grad_() for i in range(3))
    grads = torch.autograd.grad(soft_cross_entropy_loss(z, za), (z, za), allow_unused=True)
    assert grads[0] is None
    fixed = torch.autograd.grad(weighted_mse_loss(z, za, detach_adv=True), (z, za), allow_unused=True)
    assert fixed[1] is None
    both = torch.autograd.grad(weighted_mse_loss(z, za, class_weights=s.softmax(1)), (z, za, s), allow_unused=True)
    assert both[2] is None
    assert_close(both[0], -both[1])


def test_the_table_of_class_predictions_is_the_mean_of_each_class():
    logits, labels = normal(0, 30, 4), integers(1, 30, below=3)  # nobody of class 3
    sums = torch.zeros(4, 4, dtype=torch.float64)
    for rows in torch.arange(30).split(7):
        sums = add_class_predictions(sums, logits[rows], labels[rows], temperature=4.0)
    table = class_table(sums)
    predictions = (logits / 4).softmax(dim=1)
    for label in range(3):
        assert_close(table[label], predictions[labels == label].mean(dim=0))
    assert_close(table[3], torch.full((4,), 0.25, dtype=torch.float64))
    before = torch.eye(4, dtype=torch.float64)
    assert torch.equal(class_table(sums, before)[3], before[3])


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_sample_without_a_prediction_leaves_the_table_to_the_others(odd):
    logits, labels = normal(0, 6, 4), integers(1, 6, below=4)
    expected = add_class_predictions(torch.zeros(4, 4, dtype=torch.float64), logits[:5], labels[:5])
    logits[5, 1] = odd
    assert_close(add_class_predictions(torch.zeros(4, 4, dtype=torch.float64), logits, labels), expected)


def test_the_table_keeps_its_digits_under_autocast():
    logits, labels = normal(0, 30, 4, dtype=torch.float32), integers(1, 30, below=4)
    expected = add_class_predictions(torch.zeros(4, 4), logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(add_class_predictions(torch.zeros(4, 4), logits, labels), expected)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="add_class_predictions: `sums` is of 4 classes but `logits` has 3"):
        add_class_predictions(torch.zeros(4, 4), Z.float(), Y)
    with pytest.raises(ValueError, match="class_table: `sums` must hold the predictions of each class, of shape"):
        class_table(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="weighted_mse_loss: `class_weights` has shape"):
        weighted_mse_loss(Z, ZA, class_weights=EVEN[:, :2])
    with pytest.raises(ValueError, match="weighted_mse_loss: `gamma` must lie in"):
        weighted_mse_loss(Z, ZA, gamma=2.0)


# Pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_compared_by_the_mean_over_logits_or_the_sum_over_probabilities():
    assert_close(logit_pairing_loss(Z, ZA), squared_error(Z, ZA).mean())
    probabilities = (Z.softmax(1) - ZA.softmax(1)).square().sum(1).mean()
    assert_close(logit_pairing_loss(Z, ZA, space="probabilities"), probabilities)
    with pytest.raises(ValueError, match="logit_pairing_loss: `space` must be one of"):
        logit_pairing_loss(Z, ZA, space="features")


# GradAlign --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-8, 1.0, 1e8]), st.sampled_from([torch.float32, torch.float64]))
def test_grad_align_sees_directions_only(seed, size, dtype):
    a, b = normal(seed, 3, 2, 4, dtype=dtype), normal(seed + 1, 3, 2, 4, dtype=dtype)
    expected = 1 - nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)
    assert_close(grad_align_loss(size * a, b, reduction="none").double(), expected, rtol=1e-4, atol=1e-6)


def test_samples_with_a_zero_gradient_are_left_out_of_the_mean():
    a, b = normal(0, 4, 3), normal(1, 4, 3)
    a[1], b[2] = 0, 0
    counted = torch.tensor([0, 3])
    assert_close(grad_align_loss(a, b), grad_align_loss(a[counted], b[counted]))
    assert grad_align_loss(a, b, reduction="none")[[1, 2]].tolist() == [0, 0]
    nothing = torch.zeros(2, 3, requires_grad=True)
    loss = grad_align_loss(torch.zeros(2, 3), nothing)
    loss.backward()
    assert loss == 0
    assert (nothing.grad == 0).all()


def test_grad_align_is_zero_for_a_linear_model_and_trains_a_curved_one():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(8, 6, dtype=torch.float64, generator=generator), integers(0, 8, below=3)
    noise = 0.1 * torch.randn(x.shape, dtype=torch.float64, generator=generator)

    def gradient(model, at, create_graph):
        at = at.detach().requires_grad_()
        value = cross_entropy(model(at), labels)
        # of one logit: a linear model's cross entropy is not linear
        value = model(at)[:, 0] if isinstance(model, nn.Linear) else value
        return torch.autograd.grad(value.sum(), at, create_graph=create_graph)[0]

    linear = nn.Linear(6, 3).double()
    assert grad_align_loss(gradient(linear, x, False), gradient(linear, x + noise, True)) < 1e-12
    torch.manual_seed(0)
    curved = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    curved[0].weight.data *= 5
    losses = []
    optimizer = torch.optim.SGD(curved.parameters(), lr=0.5)
    for _ in range(20):
        loss = grad_align_loss(gradient(curved, x, False), gradient(curved, x + noise, True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Hypersphere ------------------------------------------------------------------------------------------------------


def test_the_margin_is_taken_from_the_right_cosine_only():
    cosines = torch.tensor([[0.8, 0.1, -0.2], [0.1, 0.4, 0.3]], dtype=torch.float64)
    moved = cosines.clone()
    moved[[0, 1], Y] -= 0.2
    assert_close(hypersphere_loss(10 * cosines, Y, scale=10.0, margin=0.2), cross_entropy(10 * moved, Y).mean())
    assert_close(hypersphere_loss(10 * cosines, Y, margin=0.0), cross_entropy(10 * cosines, Y).mean())


def test_a_network_on_the_hypersphere_gives_scaled_cosines_and_leaves_the_old_one_alone():
    torch.manual_seed(0)
    model = models.DigitsCNN(width=4).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embedded = models.with_cosine_logits(model, scale=10.0)
    x = torch.rand(5, 1, 8, 8)
    features = embedded.pool(embedded.layer3(embedded.layer2(embedded.layer1(x))))
    expected = 10 * nn.functional.cosine_similarity(features[:, None], model.linear.weight[None], dim=2)
    assert_close(embedded(x), expected, rtol=1e-5, atol=1e-5)
    assert not embedded.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert isinstance(model.linear, nn.Linear)
    hypersphere_loss(embedded(x), torch.arange(5), scale=10.0).backward()
    assert embedded.linear.weight.grad is not None
    assert model.linear.weight.grad is None
    x_adv = pgd(embedded, x, torch.arange(5), Linf(0.1), steps=2)
    assert not torch.equal(x_adv, x)


def test_a_network_without_a_linear_layer_has_no_cosine_logits():
    with pytest.raises(ValueError, match=r"`model` must end in an nn\.Linear, but Sequential has none"):
        models.with_cosine_logits(nn.Sequential(nn.Flatten()))
    with pytest.raises(ValueError, match="CosineLinear: `scale` must lie in"):
        models.CosineLinear(3, 2, scale=0.0)


def test_zero_features_give_zero_logits_and_finite_gradients():
    layer, features = models.CosineLinear(3, 2), torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(features).sum(), features, create_graph=True)
    assert torch.autograd.grad(slope.sum(), features)[0].isfinite().all()
    layer(features).sum().backward()
    assert (layer(features) == 0).all()
    assert features.grad.isfinite().all()


# Smoothed labels --------------------------------------------------------------------------------------------------


@given(st.integers(2, 50), st.floats(0, 1), st.sampled_from(["all", "others"]))
def test_smoothed_labels_are_probabilities(classes, smoothing, over):
    labels = integers(classes, 6, below=classes)
    soft = smooth_labels(labels, classes, smoothing=smoothing, over=over)
    assert_close(soft.sum(dim=1), torch.ones(6), rtol=1e-5, atol=0)
    right = soft.gather(1, labels[:, None])
    expected = 1 - smoothing * ((classes - 1) / classes if over == "all" else 1)
    assert_close(right, torch.full((6, 1), expected), rtol=1e-5, atol=1e-6)


def test_the_two_conventions_are_each_other_with_another_smoothing():
    labels = torch.tensor([0, 2])
    assert_close(smooth_labels(labels, 4, smoothing=0.4), smooth_labels(labels, 4, smoothing=0.3, over="others"))


def test_smoothing_is_that_of_torch():
    torchs = nn.functional.cross_entropy(Z, Y, label_smoothing=0.1)
    assert_close(cross_entropy(Z, smooth_labels(Y, 3, smoothing=0.1)).mean(), torchs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("labels", "classes", "options", "error", "message"),
    [
        (torch.tensor([0.5]), 3, {}, TypeError, "smooth_labels: `labels` must be integer class indices"),
        (torch.tensor([[0]]), 3, {}, ValueError, "smooth_labels: `labels` must be integer class indices of shape"),
        (torch.tensor([3]), 3, {}, ValueError, "smooth_labels: `labels` must lie in"),
        (torch.tensor([0]), 1, {}, ValueError, "smooth_labels: `classes` must be in \\[2, "),
        (torch.tensor([0]), 3, {"smoothing": 1.5}, ValueError, "smooth_labels: `smoothing` must lie in"),
        (torch.tensor([0]), 3, {"over": "rest"}, ValueError, "smooth_labels: `over` must be one of"),
    ],
)
def test_labels_that_cannot_be_smoothed_are_refused(labels, classes, options, error, message):
    with pytest.raises(error, match=message):
        smooth_labels(labels, classes, **options)
