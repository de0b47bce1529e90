"""Each objective term: the equation class by class, where it is zero, and what its paper and release say about it."""

import math

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import (
    boosted_cross_entropy,
    consistency_loss,
    cosine_distance,
    dicar_loss,
    interpolate,
    js_divergence,
    kl_divergence,
    mart_loss,
    robust_perception_kl_loss,
    robust_perception_loss,
    squared_error,
    trades_loss,
    weighted_kl_loss,
)
from tests.strategies import alphas, batches, classes, integers, normal, seeds, temperatures, uniform

LOG2 = math.log(2)
criteria = st.sampled_from(["mse", "kl", "js", "cosine"])
mixes = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))
scales = st.sampled_from([0.1, 1.0, 10.0])


def three(seed, batch, classes, scale=1.0):
    return tuple(normal(seed + i, batch, classes, scale=scale) for i in range(3))


def log_softmax(logits):
    """Logarithms of probabilities, with fifty digits."""
    with mpmath.workdps(50):
        logits = [mpmath.mpf(z) for z in logits]
        total = mpmath.log(mpmath.fsum(mpmath.exp(z) for z in logits))
        return [z - total for z in logits]


def per_sample(function, *batches_of_lists):
    with mpmath.workdps(50):
        values = [float(function(*sample)) for sample in zip(*batches_of_lists, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


# Robust perception ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(seeds, batches, classes, alphas)
def test_the_quotient_compares_the_speeds_of_equation_3(seed, batch, classes, alpha):
    def equation(clean, mid, adv):
        speeds = [((m - c) / alpha, (a - m) / (1 - alpha)) for c, m, a in zip(clean, mid, adv, strict=True)]
        return sum((before - after) ** 2 for before, after in speeds) / len(speeds)

    logits = three(seed, batch, classes)
    value = robust_perception_loss(*logits, alpha=alpha, form="quotient", reduction="none")
    assert_close(value, per_sample(equation, *(z.tolist() for z in logits)), rtol=1e-10, atol=0)


@given(seeds, batches, classes, alphas)
def test_the_interpolation_compares_the_middle_with_the_chord(seed, batch, classes, alpha):
    def equation(clean, mid, adv):
        off = [m - ((1 - alpha) * c + alpha * a) for c, m, a in zip(clean, mid, adv, strict=True)]
        return sum(d**2 for d in off) / len(off)

    logits = three(seed, batch, classes)
    value = robust_perception_loss(*logits, alpha=alpha, form="interpolation", reduction="none")
    assert_close(value, per_sample(equation, *(z.tolist() for z in logits)), rtol=1e-12, atol=1e-15)


@given(seeds, batches, classes, alphas, scales)
def test_the_quotient_is_the_interpolation_over_alpha_times_its_complement_squared(seed, batch, classes, alpha, scale):
    logits = three(seed, batch, classes, scale)
    quotient, interpolation = (
        robust_perception_loss(*logits, alpha=alpha, form=form, reduction="none")
        for form in ("quotient", "interpolation")
    )
    assert_close(quotient, interpolation / (alpha * (1 - alpha)) ** 2, rtol=1e-9, atol=0)


def test_the_default_quotient_counts_sixteen_times_the_interpolation():
    logits = three(0, 4, 5)
    assert_close(robust_perception_loss(*logits), 16 * robust_perception_loss(*logits, form="interpolation"))


@given(seeds, batches, classes, alphas, criteria, st.sampled_from(["quotient", "interpolation"]))
def test_the_loss_is_zero_when_the_middle_is_on_the_chord(seed, batch, classes, alpha, criterion, form):
    clean, _, adv = three(seed, batch, classes)
    mid = clean + alpha * (adv - clean)
    value = robust_perception_loss(clean, mid, adv, alpha=alpha, criterion=criterion, form=form, reduction="none")
    assert_close(value, torch.zeros(batch, dtype=torch.float64), rtol=0, atol=1e-15 / (alpha * (1 - alpha)) ** 2)


@given(seeds, batches, classes, alphas, st.sampled_from(["quotient", "interpolation"]), st.sampled_from([1e-3, 1.0]))
def test_under_mse_the_loss_is_zero_only_on_the_chord(seed, batch, classes, alpha, form, distance):
    clean, off, adv = three(seed, batch, classes)
    mid = clean + alpha * (adv - clean) + distance * off
    value = robust_perception_loss(clean, mid, adv, alpha=alpha, form=form, reduction="none")
    expected = distance**2 * off.square().mean(dim=1)
    scale = (alpha * (1 - alpha)) ** 2 if form == "quotient" else 1.0
    assert_close(value, expected / scale, rtol=1e-6, atol=0)


@given(seeds, batches, classes, alphas, criteria)
def test_the_same_chord_is_met_when_the_path_is_walked_backwards(seed, batch, classes, alpha, criterion):
    clean, mid, adv = three(seed, batch, classes)
    for form in ("interpolation", "quotient"):
        if form == "quotient" and criterion in ("kl", "js"):
            continue  # the speeds change their signs, which changes their distributions
        there = robust_perception_loss(clean, mid, adv, alpha=alpha, criterion=criterion, form=form)
        back = robust_perception_loss(adv, mid, clean, alpha=1 - alpha, criterion=criterion, form=form)
        assert_close(there, back, rtol=1e-9, atol=1e-12)


@given(seeds, batches, alphas, st.floats(0.01, 1.0))
def test_on_a_quadratic_the_residual_is_its_curvature_along_the_perturbation(seed, batch, alpha, eps):
    entries, outputs = 6, 3
    hessian, slope = normal(seed, outputs, entries, entries), normal(seed + 1, outputs, entries)
    hessian = hessian + hessian.mT

    def f(x):
        return torch.einsum("bi,kij,bj->bk", x, hessian, x) / 2 + x @ slope.t()

    x, x_adv = normal(seed + 2, batch, entries), normal(seed + 3, batch, entries)
    x_adv = x + eps * (x_adv - x)
    residual = -alpha * (1 - alpha) / 2 * torch.einsum("bi,kij,bj->bk", x_adv - x, hessian, x_adv - x)
    logits = f(x), f(interpolate(x, x_adv, alpha)), f(x_adv)
    value = robust_perception_loss(*logits, alpha=alpha, form="interpolation", reduction="none")
    assert_close(value, residual.square().mean(dim=1), rtol=1e-6, atol=1e-20)


@given(seeds, batches, classes, temperatures, alphas)
def test_criteria_are_the_public_divergences_and_kl_is_of_the_chord_from_the_middle(
    seed, batch, classes, temperature, alpha
):
    clean, mid, adv = three(seed, batch, classes)
    chord = (1 - alpha) * clean + alpha * adv
    expected = {
        "mse": squared_error(mid, chord),
        "kl": kl_divergence(chord, mid, temperature=temperature),
        "js": js_divergence(mid, chord, temperature=temperature),
        "cosine": cosine_distance(mid, chord),
    }
    for criterion, value in expected.items():
        options = {"temperature": temperature} if criterion in ("kl", "js") else {}
        loss = robust_perception_loss(
            clean, mid, adv, alpha=alpha, form="interpolation", criterion=criterion, reduction="none", **options
        )
        assert_close(loss, value, rtol=1e-9, atol=1e-12)


def test_a_criterion_of_ones_own_gets_what_the_equation_compares():
    clean, mid, adv = three(0, 4, 5)
    compared = []

    def note(a, b):
        compared.append((a, b))
        return squared_error(a, b)

    for form in ("quotient", "interpolation"):
        robust_perception_loss(clean, mid, adv, alpha=0.25, form=form, criterion=note)
    assert_close(compared[0], ((mid - clean) / 0.25, (adv - mid) / 0.75))
    assert_close(compared[1], (mid, 0.75 * clean + 0.25 * adv))


@given(seeds, classes, criteria, st.sampled_from(["quotient", "interpolation"]))
def test_an_alpha_per_sample_is_each_samples_own(seed, classes, criterion, form):
    logits, alpha = three(seed, 5, classes), uniform(seed, 5, low=0.1, high=0.9)
    options = {"criterion": criterion, "form": form, "reduction": "none"}
    together = robust_perception_loss(*logits, alpha=alpha, **options)
    each = [robust_perception_loss(*(z[i : i + 1] for z in logits), alpha=alpha[i].item(), **options) for i in range(5)]
    assert_close(together, torch.cat(each), rtol=1e-11, atol=1e-14)
    shared = robust_perception_loss(*logits, alpha=torch.tensor(0.3, dtype=torch.float64), **options)
    assert_close(shared, robust_perception_loss(*logits, alpha=0.3, **options), rtol=1e-11, atol=1e-14)


def test_a_linear_model_is_perceived_evenly():
    weight, bias = normal(0, 12, 5), normal(1, 5)
    x, x_adv = normal(2, 4, 12), normal(3, 4, 12)
    logits = [z @ weight + bias for z in (x, interpolate(x, x_adv, 0.3), x_adv)]
    for criterion in ("mse", "kl", "js", "cosine"):
        assert robust_perception_loss(*logits, alpha=0.3, criterion=criterion) < 1e-13
    assert robust_perception_kl_loss(*logits, alpha=0.3) < 1e-13


# Robust perception of the averaged model (RPAT++) -----------------------------------------------------------------


@given(seeds, batches, classes, st.one_of(st.just(1.0), alphas))
def test_the_kl_term_compares_what_the_first_part_announces_with_the_end(seed, batch, classes, alpha):
    def equation(clean, mid, adv):
        log_p = log_softmax([m - (1 - alpha) * c for c, m in zip(clean, mid, strict=True)])
        log_q = log_softmax([alpha * a for a in adv])
        return mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))

    logits = three(seed, batch, classes)
    value = robust_perception_kl_loss(*logits, alpha=alpha, reduction="none")
    assert_close(value, per_sample(equation, *(z.tolist() for z in logits)), rtol=1e-11, atol=1e-14)


@given(seeds, batches, classes, alphas, st.floats(-20, 20))
def test_the_kl_term_is_zero_on_the_chord_and_beside_it_by_a_constant(seed, batch, classes, alpha, constant):
    clean, _, adv = three(seed, batch, classes)
    mid = (1 - alpha) * clean + alpha * adv + constant
    value = robust_perception_kl_loss(clean, mid, adv, alpha=alpha, reduction="none")
    assert_close(value, torch.zeros(batch, dtype=torch.float64), rtol=0, atol=1e-13)


# DICAR ------------------------------------------------------------------------------------------------------------


@given(seeds, batches, st.sampled_from([2, 5, 10]), mixes, temperatures)
def test_in_probability_space_the_clean_predictions_are_mixed_after_the_softmax(seed, batch, classes, mix, temperature):
    def equation(mixed, first, second):
        q = [mpmath.exp(z) for z in log_softmax([z / temperature for z in mixed])]
        a, b = ([mpmath.exp(z) for z in log_softmax([z / temperature for z in view])] for view in (first, second))
        p = [mix * x + (1 - mix) * y for x, y in zip(a, b, strict=True)]
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        return sum(mpmath.fsum(x * mpmath.log(x / z) for x, z in zip(v, m, strict=True)) for v in (p, q)) / 2

    logits = three(seed, batch, classes)
    value = dicar_loss(*logits, mix=mix, temperature=temperature, reduction="none")
    assert_close(value, per_sample(equation, *(z.tolist() for z in logits)), rtol=1e-11, atol=1e-14)


@given(seeds, batches, classes, mixes, temperatures)
def test_in_logit_space_they_are_mixed_before_the_softmax(seed, batch, classes, mix, temperature):
    mixed, first, second = three(seed, batch, classes)
    value = dicar_loss(mixed, first, second, mix=mix, temperature=temperature, space="logits", reduction="none")
    expected = js_divergence(mixed, mix * first + (1 - mix) * second, temperature=temperature)
    assert_close(value, expected, rtol=1e-11, atol=1e-14)


spaces = st.sampled_from(["probabilities", "logits"])


@given(seeds, batches, classes, mixes, spaces)
def test_swapping_the_views_and_the_weight_changes_nothing(seed, batch, classes, mix, space):
    mixed, first, second = three(seed, batch, classes)
    there = dicar_loss(mixed, first, second, mix=mix, space=space, reduction="none")
    back = dicar_loss(mixed, second, first, mix=1 - mix, space=space, reduction="none")
    assert_close(there, back, rtol=1e-11, atol=1e-14)


@given(seeds, batches, classes, spaces)
def test_a_weight_of_zero_or_one_leaves_a_single_view(seed, batch, classes, space):
    mixed, first, second = three(seed, batch, classes)
    for mix, view in ((1.0, first), (0.0, second)):
        for weight in (mix, int(mix), torch.full((batch,), mix, dtype=torch.float64)):
            value = dicar_loss(mixed, first, second, mix=weight, space=space, reduction="none")
            assert_close(value, js_divergence(mixed, view), rtol=1e-12, atol=1e-15)
        assert dicar_loss(view, first, second, mix=mix, space=space).abs() < 1e-15


@given(seeds, st.sampled_from([3, 5, 10]), st.floats(0.05, 0.95))
def test_each_space_has_a_zero_set_of_its_own(seed, classes, mix):
    _, first, second = three(seed, 20, classes, scale=2.0)
    by_probabilities = (mix * first.softmax(dim=1) + (1 - mix) * second.softmax(dim=1)).log()
    by_logits = mix * first + (1 - mix) * second
    for space, zero, other in (
        ("probabilities", by_probabilities, by_logits),
        ("logits", by_logits, by_probabilities),
    ):
        assert dicar_loss(zero, first, second, mix=mix, space=space).abs() < 1e-14
        assert dicar_loss(other, first, second, mix=mix, space=space) > 1e-5


def test_affine_logits_are_aligned_in_logit_space_and_not_in_probability_space():
    # the more so the surer the model is: exact alignment and a zero probability-space loss exclude each other
    weight, x1, x2 = normal(0, 12, 5), normal(1, 50, 12) / 2, normal(2, 50, 12) / 2
    losses = []
    for scale in (0.1, 1.0, 5.0, 20.0):
        logits = [scale * z @ weight for z in (0.4 * x1 + 0.6 * x2, x1, x2)]
        assert dicar_loss(*logits, mix=0.4, space="logits") < 1e-13
        losses.append(dicar_loss(*logits, mix=0.4).item())
    assert losses == sorted(losses)
    assert losses[0] < 1e-3
    assert losses[-1] > 0.1


def test_a_model_affine_in_probabilities_is_aligned_in_probability_space_only():
    corners, weights = normal(0, 3, 5).softmax(dim=1), normal(1, 20, 2, 3).softmax(dim=2)
    p1, p2 = weights[:, 0] @ corners, weights[:, 1] @ corners
    logits = [p.log() for p in (0.3 * p1 + 0.7 * p2, p1, p2)]
    assert dicar_loss(*logits, mix=0.3) < 1e-15
    assert dicar_loss(*logits, mix=0.3, space="logits") > 1e-7


@given(seeds, batches, classes, mixes, spaces, temperatures)
def test_dicar_lies_between_zero_and_log_2(seed, batch, classes, mix, space, temperature):
    logits = three(seed, batch, classes, scale=8.0)
    value = dicar_loss(*logits, mix=mix, space=space, temperature=temperature, reduction="none")
    assert (value >= -1e-15).all()
    assert (value <= LOG2 + 1e-15).all()


def test_the_selected_average_divides_by_the_selected():
    logits, mask = three(0, 6, 5), torch.tensor([True, False, False, True, False, False])
    each = dicar_loss(*logits, mix=0.3, reduction="none")
    assert_close(dicar_loss(*logits, mix=0.3, mask=mask), each[mask].mean())
    assert_close(dicar_loss(*logits, mix=0.3, mask=mask, average_over="all"), each[mask].sum() / 6)
    assert_close(dicar_loss(*logits, mix=0.3, mask=mask, reduction="sum"), each[mask].sum())
    masked = dicar_loss(*logits, mix=0.3, mask=mask, reduction="none")
    assert_close(masked[mask], each[mask])
    assert (masked[~mask] == 0).all()


# TRADES and consistency -------------------------------------------------------------------------------------------


@given(seeds, batches, classes, st.floats(0.0, 20.0))
def test_trades_is_cross_entropy_plus_beta_times_the_kl_from_clean_to_adversarial(seed, batch, classes, beta):
    clean, adv, _ = three(seed, batch, classes, scale=3.0)
    labels = integers(seed, batch, below=classes)
    kl = functional.kl_div(adv.log_softmax(dim=1), clean.softmax(dim=1), reduction="none").sum(dim=1)
    expected = functional.cross_entropy(clean, labels, reduction="none") + beta * kl
    assert_close(trades_loss(clean, adv, labels, beta=beta, reduction="none"), expected, rtol=1e-11, atol=1e-13)


def test_beta_is_six_unless_told_otherwise():
    clean, adv, _ = three(0, 4, 5)
    labels = integers(0, 4, below=5)
    for loss in (trades_loss, mart_loss):
        assert_close(loss(clean, adv, labels), loss(clean, adv, labels, beta=6.0), rtol=0, atol=0)
        assert not torch.equal(loss(clean, adv, labels), loss(clean, adv, labels, beta=5.0))


@given(seeds, batches, classes, temperatures)
def test_consistency_is_js_sharpened_by_one_half_by_default(seed, batch, classes, temperature):
    first, second, _ = three(seed, batch, classes)
    value = consistency_loss(first, second, temperature=temperature, reduction="none")
    assert_close(value, js_divergence(first, second, temperature=temperature), rtol=0, atol=0)
    assert_close(consistency_loss(first, second), js_divergence(2 * first, 2 * second).mean())


# MART -------------------------------------------------------------------------------------------------------------


def boosted(logits, label):
    log_p = log_softmax(logits)
    strongest = max((k for k in range(len(logits)) if k != label), key=lambda k: logits[k])
    others = mpmath.fsum(mpmath.exp(log_p[k]) for k in range(len(logits)) if k != strongest)  # 1 - p_strongest
    return -log_p[label] - mpmath.log(others)


@given(seeds, batches, classes, scales)
def test_boosted_cross_entropy_is_equation_7(seed, batch, classes, scale):
    adv, labels = normal(seed, batch, classes, scale=scale), integers(seed, batch, below=classes)
    value = boosted_cross_entropy(adv, labels, reduction="none")
    assert_close(value, per_sample(boosted, adv.tolist(), labels.tolist()), rtol=1e-12, atol=1e-14)


@given(seeds, batches, classes, st.sampled_from([0.1, 1.0, 10.0, 40.0]))
def test_boosted_cross_entropy_is_between_once_and_twice_the_cross_entropy(seed, batch, classes, scale):
    adv, labels = normal(seed, batch, classes, scale=scale), integers(seed, batch, below=classes)
    ce = functional.cross_entropy(adv, labels, reduction="none")
    bce = boosted_cross_entropy(adv, labels, reduction="none")
    assert (bce >= ce * (1 - 1e-14)).all()
    assert (bce <= 2 * ce + 1e-13).all()
    if classes == 2:
        assert_close(bce, 2 * ce, rtol=1e-12, atol=1e-14)
    # the strongest of the C - 1 wrong classes has at least their average
    least = math.log(classes - 1) - torch.log(classes - 2 + torch.exp(-ce))  # -log(1 - (1 - p_y) / (C - 1))
    assert (bce - ce >= least - 1e-12).all()


def test_the_margin_term_is_exact_where_the_release_is_capped():
    # sure of a wrong class by 40: 1 - p is 4e-18, which no subtraction from 1 can hold
    adv = torch.tensor([[0.0, 40.0, -5.0]], dtype=torch.float64)
    margin = boosted_cross_entropy(adv, torch.tensor([0])) - functional.cross_entropy(adv, torch.tensor([0]))
    assert_close(margin.item(), 40.0 - math.log1p(math.exp(-5)), rtol=1e-14, atol=0)
    assert margin > 9.2104  # -log(1e-4 + 1e-12), the release's cap


@given(seeds, st.sampled_from([2, 10]), scales)
def test_the_released_margin_differs_by_what_is_stated(seed, classes, scale):
    adv, labels = normal(seed, 20, classes, scale=scale), integers(seed, 20, below=classes)
    p = adv.softmax(dim=1)
    strongest = p.scatter(1, labels[:, None], -1).amax(dim=1)
    ce = functional.cross_entropy(adv, labels, reduction="none")
    released = ce - torch.log(1.0001 - strongest + 1e-12)
    ours = boosted_cross_entropy(adv, labels, reduction="none")
    near = strongest <= 0.99
    assert_close(
        ours[near] - released[near], torch.log1p((1e-4 + 1e-12) / (1 - strongest[near])), rtol=1e-6, atol=1e-12
    )
    assert (ours[near] - released[near] <= 0.00996).all()
    assert (released >= ce - 1.0001e-4).all()  # so the release can fall below the cross entropy, by this much
    assert (ours >= ce).all()


def test_the_boosted_cross_entropy_vanishes_for_sure_and_right_predictions():
    assert boosted_cross_entropy(torch.tensor([[0.0, 90.0, 0.0]]), torch.tensor([1])) == 0


@given(seeds, batches, classes, scales)
def test_the_weighted_kl_is_weighted_by_the_doubt_of_the_clean_prediction(seed, batch, classes, scale):
    def equation(clean, adv, label):
        log_p, log_q = log_softmax(clean), log_softmax(adv)
        kl = mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        return kl * (1 - mpmath.exp(log_p[label]))

    clean, adv, _ = three(seed, batch, classes, scale)
    labels = integers(seed, batch, below=classes)
    value = weighted_kl_loss(clean, adv, labels, reduction="none")
    assert_close(value, per_sample(equation, clean.tolist(), adv.tolist(), labels.tolist()), rtol=1e-11, atol=1e-14)
    assert (value <= kl_divergence(clean, adv) + 1e-14).all()


def test_the_doubt_of_a_sure_prediction_keeps_its_digits():
    # 1 - p_y is 9.4e-14 here; 1 - softmax is 0 in float32, and the release's 1.0000001 - p_y is 1.2e-7
    clean, adv = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    weight = weighted_kl_loss(clean, adv, torch.tensor([0])) / kl_divergence(clean, adv)[0]
    assert_close(weight.item(), math.exp(-30), rtol=1e-5, atol=0)


@given(seeds, batches, classes, st.floats(0.0, 20.0))
def test_mart_is_the_sum_of_its_public_terms(seed, batch, classes, beta):
    clean, adv, _ = three(seed, batch, classes, scale=3.0)
    labels = integers(seed, batch, below=classes)
    for reduction in ("none", "mean", "sum"):
        expected = boosted_cross_entropy(adv, labels, reduction=reduction) + beta * weighted_kl_loss(
            clean, adv, labels, reduction=reduction
        )
        assert_close(mart_loss(clean, adv, labels, beta=beta, reduction=reduction), expected, rtol=1e-12, atol=1e-14)


@given(seeds, classes)
def test_nothing_is_detached_inside(seed, classes):
    clean, adv, mid = (z.requires_grad_() for z in three(seed, 3, classes))
    labels = integers(seed, 3, below=classes)
    assume((clean - adv).abs().max() > 0.1)
    for loss, inputs in (
        (weighted_kl_loss(clean, adv, labels), (clean, adv)),
        (trades_loss(clean, adv, labels), (clean, adv)),
        (robust_perception_loss(clean, mid, adv), (clean, mid, adv)),
        (robust_perception_kl_loss(clean, mid, adv), (clean, mid, adv)),
        (dicar_loss(mid, clean, adv, mix=0.5), (mid, clean, adv)),
    ):
        assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, inputs))


def test_the_weight_of_the_weighted_kl_gets_a_gradient_too():
    clean, adv = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.tensor([[1.0, -1.0]]).double()
    labels = torch.tensor([0])
    (whole,) = torch.autograd.grad(weighted_kl_loss(clean, adv, labels).sum(), clean)
    doubt = 0.5
    (without,) = torch.autograd.grad(kl_divergence(clean, adv).sum() * doubt, clean)
    kl = kl_divergence(clean.detach(), adv)
    # d(1 - p_y)/dz_y = -p_y (1 - p_y) = -1/4
    assert_close(whole - without, kl * torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


@pytest.mark.parametrize("loss", [robust_perception_loss, robust_perception_kl_loss])
def test_alpha_multiplies_the_perturbation(loss):
    # all movement happens before the middle: uneven, and the more so the closer the middle is to the clean end
    clean, adv = torch.zeros(1, 2), torch.tensor([[3.0, -3.0]])
    early, late = (loss(clean, adv, adv, alpha=alpha, **_form(loss)) for alpha in (0.1, 0.9))
    assert early > late


def _form(loss):
    return {"form": "interpolation"} if loss is robust_perception_loss else {}
