"""The per-sample distances: against slow references, and the facts of information theory that they must obey."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import cosine_distance, js_divergence, kl_divergence, squared_error
from perceptual_at.divergences import cross_entropy, prediction_squared_error, soft_logit_margin
from perceptual_at.losses import normalized_error_loss, robust_perception_loss
from tests.strategies import batches, classes, integers, normal, seeds, temperatures

scales = st.sampled_from([0.01, 1.0, 10.0])
relations = st.sampled_from(["independent", "equal", "shifted", "permuted", "opposite"])
LOG2 = math.log(2)


def pairs(seed, batch, classes, scale, relation="independent"):
    """Two batches of logits in a given relation."""
    a = normal(seed, batch, classes, scale=scale).clamp(-40, 40)
    b = {
        "independent": lambda: normal(seed + 1, batch, classes, scale=scale).clamp(-40, 40),
        "equal": a.clone,
        "shifted": lambda: a + 3.0,
        "permuted": lambda: a.roll(1, dims=1),
        "opposite": lambda: -a,
    }[relation]()
    return a, b


def softmax(logits, temperature=1):
    """Probabilities with fifty digits."""
    with mpmath.workdps(50):
        weights = [mpmath.exp(mpmath.mpf(z) / mpmath.mpf(temperature)) for z in logits]
        return [w / mpmath.fsum(weights) for w in weights]


def kl(p, q):
    with mpmath.workdps(50):
        return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))


def js(p, q):
    with mpmath.workdps(50):
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (kl(p, m) + kl(q, m)) / 2


def reference(divergence, a, b, temperature):
    return torch.tensor(
        [
            float(divergence(softmax(x, temperature), softmax(y, temperature)))
            for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


# Against slow references ------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([2, 3, 10]), scales, relations, temperatures)
def test_kl_is_the_sum_of_the_textbook(seed, classes, scale, relation, temperature):
    a, b = pairs(seed, 2, classes, scale, relation)
    expected = reference(kl, a, b, temperature)
    noise = 1e-15 * (1 + max(a.abs().max(), b.abs().max()) / temperature)
    assert_close(kl_divergence(a, b, temperature=temperature), expected, rtol=1e-13, atol=10 * noise)


@given(seeds, st.sampled_from([2, 3, 10]), scales, relations, temperatures)
def test_js_is_the_sum_of_the_textbook(seed, classes, scale, relation, temperature):
    a, b = pairs(seed, 2, classes, scale, relation)
    expected = reference(js, a, b, temperature)
    assert_close(js_divergence(a, b, temperature=temperature), expected, rtol=1e-13, atol=1e-14)


@given(seeds, batches, classes, scales)
def test_squared_error_is_that_of_torch_per_sample(seed, batch, classes, scale):
    a, b = pairs(seed, batch, classes, scale)
    assert_close(squared_error(a, b).mean(), functional.mse_loss(a, b))
    assert_close(squared_error(a, b), torch.stack([functional.mse_loss(x, y) for x, y in zip(a, b, strict=True)]))
    assert_close(squared_error(a, a + 3), torch.full((batch,), 9.0, dtype=torch.float64))


@given(seeds, batches, classes, scales)
def test_cosine_distance_is_that_of_torch(seed, batch, classes, scale):
    a, b = pairs(seed, batch, classes, scale)
    assert_close(cosine_distance(a, b), 1 - functional.cosine_similarity(a, b, dim=1), rtol=0, atol=1e-14)


def test_cosine_distance_keeps_its_digits_for_nearly_parallel_vectors():
    angle = 1e-5  # 1 - cos(1e-5) is 5e-11; float32 arithmetic on the cosine itself gives 0
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert_close(cosine_distance(a, b).item(), angle**2 / 2, rtol=1e-5, atol=0)


def test_cosine_distance_of_zero_vectors_is_as_documented():
    zero, other = torch.zeros(1, 3), torch.tensor([[0.0, 4.0, 3.0]])
    assert cosine_distance(zero, zero) == 0
    assert_close(cosine_distance(zero, other), torch.tensor([0.5]))


def test_a_vector_without_direction_has_no_gradient():
    clean, adv = normal(0, 2, 3), normal(1, 2, 3)
    pairs_of = {
        "distance": lambda a: cosine_distance(a, adv), "the other way": lambda a: cosine_distance(adv, a),
        "normalized error": lambda a: normalized_error_loss(a, adv),
        "first half of a path": lambda a: robust_perception_loss(clean, clean + a, adv, criterion="cosine"),
    }  # fmt: skip
    for distance in pairs_of.values():
        still = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(distance(still).sum(), still)
        assert gradient.abs().max() < 10


# Facts ------------------------------------------------------------------------------------------------------------


@given(seeds, batches, classes, scales, relations, temperatures)
def test_js_is_symmetric_zero_on_equal_and_at_most_log_2(seed, batch, classes, scale, relation, temperature):
    a, b = pairs(seed, batch, classes, scale, relation)
    value = js_divergence(a, b, temperature=temperature)
    assert_close(value, js_divergence(b, a, temperature=temperature), rtol=0, atol=1e-15)
    assert (value >= -1e-15).all()
    assert (value <= LOG2 + 1e-15).all()
    if relation in ("equal", "shifted"):
        assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
    narrow = js_divergence(a.float(), b.float(), temperature=temperature)
    assert (narrow >= -1e-6).all()
    assert_close(narrow.double(), value, rtol=0, atol=2e-5)


def test_js_is_log_2_exactly_when_the_supports_are_disjoint():
    a = torch.tensor([[900.0, 900.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(js_divergence(a, a.flip(1)).item(), LOG2, rtol=1e-15, atol=0)
    touching = torch.tensor([[900.0, 900.0, 900.0, 0.0]], dtype=torch.float64)
    assert js_divergence(a, touching.flip(1)) < LOG2 - 0.1


@given(seeds, batches, classes, scales, relations)
def test_js_is_the_entropy_of_the_mean_minus_the_mean_entropy(seed, batch, classes, scale, relation):
    a, b = pairs(seed, batch, classes, scale, relation)
    p, q = a.softmax(dim=1), b.softmax(dim=1)
    mixed, first, second = (-torch.special.xlogy(v, v).sum(dim=1) for v in ((p + q) / 2, p, q))
    assert_close(js_divergence(a, b), mixed - (first + second) / 2, rtol=0, atol=1e-14)


@given(seeds, batches, classes, scales, relations)
def test_js_lies_between_its_sharp_bounds(seed, batch, classes, scale, relation):
    a, b = pairs(seed, batch, classes, scale, relation)
    p, q = a.softmax(dim=1), b.softmax(dim=1)
    value, rounding = js_divergence(a, b), 1e-14
    triangle = ((p - q).square() / ((p + q) / 2)).sum(dim=1)
    variation = (p - q).abs().sum(dim=1) / 2
    assert (triangle / 8 <= value + rounding).all()
    assert (value <= LOG2 / 4 * triangle + rounding).all()
    assert (variation.square() / 2 <= value + rounding).all()
    assert (value <= LOG2 * variation + rounding).all()


@given(seeds, batches, classes, scales, relations, temperatures)
def test_kl_is_positive_and_zero_only_when_logits_differ_by_a_constant(
    seed, batch, classes, scale, relation, temperature
):
    a, b = pairs(seed, batch, classes, scale, relation)
    value = kl_divergence(a, b, temperature=temperature)
    assert (value >= -1e-14).all()
    spread = ((a - b) - (a - b).mean(dim=1, keepdim=True)).abs().amax(dim=1)
    assert (value[spread < 1e-12].abs() < 1e-14).all()
    softened = (a.abs().amax() + b.abs().amax()) / temperature < 8  # no class is out of sight
    if softened:
        assert (value[spread > 1e-2] > 1e-12).all()


@given(seeds, batches, classes, scales, st.floats(-30, 30))
def test_shifting_all_logits_of_a_sample_changes_no_divergence(seed, batch, classes, scale, shift):
    a, b = pairs(seed, batch, classes, scale)
    shifts = shift * normal(seed + 2, batch, 1)
    for divergence in (kl_divergence, js_divergence):
        assert_close(divergence(a + shifts, b), divergence(a, b), rtol=1e-11, atol=1e-12)
        assert_close(divergence(a, b + shifts), divergence(a, b), rtol=1e-11, atol=1e-12)


@given(seeds, batches, classes)
def test_a_high_temperature_leaves_the_variance_of_the_difference(seed, batch, classes):
    a, b = pairs(seed, batch, classes, 1.0)
    variance = (a - b).var(dim=1, correction=0)
    hot = 1e4
    assert_close(hot**2 * js_divergence(a, b, temperature=hot), variance / 8, rtol=2e-3, atol=1e-7)
    assert_close(hot**2 * kl_divergence(a, b, temperature=hot), variance / 2, rtol=2e-3, atol=1e-7)


@given(seeds, classes)
def test_a_low_temperature_leaves_the_agreement_of_the_winners(seed, classes):
    a, b = pairs(seed, 40, classes, 1.0)
    gaps = torch.stack([z.topk(2, dim=1).values.diff(dim=1).squeeze(1).abs() for z in (a, b)]).amin(dim=0)
    clear = gaps > 0.01
    agree = a.argmax(dim=1) == b.argmax(dim=1)
    cold = js_divergence(a, b, temperature=1e-4)
    expected = LOG2 * (~agree).double()
    assert_close(cold[clear], expected[clear], rtol=0, atol=1e-12)


def test_js_is_not_monotone_in_the_temperature():
    a, b = torch.tensor([[4.0, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    values = [js_divergence(a, b, temperature=t).item() for t in (0.1, 0.5, 1.0, 2.0, 10.0, 100.0)]
    steps = [later - earlier for earlier, later in itertools.pairwise(values)]
    assert max(steps) > 0.01
    assert min(steps) < -0.01


@given(seeds, st.sampled_from([2, 10, 1000]), st.sampled_from([1.0, 10.0]))
def test_the_released_clamp_lowers_js_by_no_more_than_stated(seed, classes, scale):
    a, b = pairs(seed, 3, classes, scale)
    p, q = a.softmax(dim=1), b.softmax(dim=1)
    log_mixture = ((p + q) / 2).clamp_min(1e-8).log()
    clamped = sum((torch.special.xlogy(v, v) - v * log_mixture).sum(dim=1) for v in (p, q)) / 2
    exact = js_divergence(a, b)
    assert (clamped <= exact + 1e-13).all()
    assert (clamped >= exact - classes * 1e-8 / math.e - 1e-13).all()


def test_the_released_clamp_can_be_negative_for_equal_predictions_and_ours_is_not():
    # all but one of a thousand classes at 1e-8 / e, where the clamp lowers most
    p = torch.full((1, 1000), 1e-8 / math.e, dtype=torch.float64)
    p[0, 0] = 1 - 999e-8 / math.e
    clamped = (torch.special.xlogy(p, p) - p * p.clamp_min(1e-8).log()).sum()
    assert_close(clamped.item(), -999 * 1e-8 / math.e, rtol=1e-6, atol=0)
    assert js_divergence(p.log(), p.log()).abs() < 1e-15


@given(seeds, batches, classes, temperatures)
def test_a_temperature_divides_the_logits(seed, batch, classes, temperature):
    a, b = pairs(seed, batch, classes, 3.0)
    for divergence in (kl_divergence, js_divergence):
        assert_close(divergence(a, b, temperature=temperature), divergence(a / temperature, b / temperature))


@given(seeds, batches, classes, st.floats(0.01, 100))
def test_cosine_distance_sees_directions_only(seed, batch, classes, factor):
    a, b = pairs(seed, batch, classes, 1.0)
    value = cosine_distance(a, b)
    assert_close(cosine_distance(factor * a, b), value, rtol=0, atol=1e-13)
    assert_close(cosine_distance(b, a), value, rtol=0, atol=1e-14)
    assert_close(cosine_distance(a, -b), 2 - value, rtol=0, atol=1e-13)
    assert (value >= 0).all()
    assert (value <= 2 + 1e-14).all()


@pytest.mark.parametrize("divergence", [squared_error, cosine_distance, kl_divergence, js_divergence])
def test_equal_arguments_are_at_distance_zero_with_zero_gradient(divergence):
    a = normal(0, 5, 7).requires_grad_()
    b = a.detach().clone().requires_grad_()
    value = divergence(a, b)
    assert_close(value, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-15)
    for grad in torch.autograd.grad(value.sum(), (a, b)):
        assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "divergence", [squared_error, cosine_distance, kl_divergence, js_divergence, prediction_squared_error]
)
def test_sixteen_bits_are_widened_inside_and_rounded_once(divergence, dtype):
    a, b = (normal(i, 50, 200, scale=2.0, dtype=dtype) for i in range(2))
    once = torch.finfo(dtype).eps / 2 * 1.01
    assert_close(divergence(a, b).double(), divergence(a.double(), b.double()), rtol=once, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("places", [(), (3,)], ids=["samples", "places"])
def test_with_labels_too(places, dtype):
    logits, labels = normal(0, 50, 20, *places, scale=6.0, dtype=dtype), integers(1, 50, *places, below=20)
    shares = normal(2, 50, 20, *places, dtype=torch.float32).softmax(dim=1)
    once = torch.finfo(dtype).eps / 2 * 1.01
    for loss, marks in ((cross_entropy, shares), (soft_logit_margin, labels)):
        assert loss(logits, marks).dtype == dtype
        wide = marks.double() if marks.is_floating_point() else marks
        assert_close(loss(logits, marks).double(), loss(logits.double(), wide), rtol=once, atol=1e-6)


def test_the_soft_margins_sign_survives_sixteen_bits():
    logits = torch.tensor([[30.0, 29.5, 29.0], [30.0, 29.5, 29.25]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 0])
    assert (soft_logit_margin(logits, labels) < 0).tolist() == (logits.double().softmax(dim=1)[:, 0] > 0.5).tolist()
    assert soft_logit_margin(logits, labels)[0] < 0


def test_sums_beyond_float16_are_no_problem():
    many = torch.ones(1, 5000, dtype=torch.float16)
    assert squared_error(8 * many, 0 * many) == 64  # the sum is 320 000
