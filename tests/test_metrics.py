"""Accuracy, and the two summaries of the trade-off: their order, their units, their edges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import accuracy, mean_score, nrr
from perceptual_at.metrics import confusion_counts
from tests.strategies import DTYPES, accuracies, classes, dtype_name, integers, normal, seeds

ULP = 2**-52


@given(accuracies, accuracies)
def test_nrr_lies_between_the_smaller_and_the_mean(clean, robust):
    value = nrr(clean, robust)
    assert min(clean, robust) <= value <= mean_score(clean, robust) <= max(clean, robust)


@given(accuracies, accuracies)
def test_nrr_is_below_the_geometric_mean_and_twice_the_smaller(clean, robust):
    value = nrr(clean, robust)
    assert value <= math.sqrt(clean * robust) * (1 + 4 * ULP)
    assert value <= 2 * min(clean, robust) * (1 + 4 * ULP)


@given(accuracies, accuracies)
def test_the_mean_exceeds_nrr_by_the_squared_gap_over_twice_the_sum(clean, robust):
    if clean + robust > 0:
        gap = (clean - robust) ** 2 / (2 * (clean + robust))
        assert math.isclose(mean_score(clean, robust) - nrr(clean, robust), gap, rel_tol=1e-9, abs_tol=1e-12)


@given(accuracies, accuracies)
def test_nrr_is_the_harmonic_mean(clean, robust):
    if clean > 0 and robust > 0:
        assert math.isclose(nrr(clean, robust), 2 / (1 / clean + 1 / robust), rel_tol=1e-14)


@given(accuracies, accuracies)
def test_both_scores_are_symmetric(clean, robust):
    assert nrr(clean, robust) == nrr(robust, clean)
    assert mean_score(clean, robust) == mean_score(robust, clean)


@given(accuracies, accuracies, st.sampled_from([0.01, 2.0, 100.0]))
def test_the_unit_that_comes_in_goes_out(clean, robust, factor):
    for score in (nrr, mean_score):
        assert math.isclose(score(factor * clean, factor * robust), factor * score(clean, robust), rel_tol=1e-14)


@given(accuracies)
def test_equal_scores_are_their_own_summary(value):
    assert nrr(value, value) == value
    assert mean_score(value, value) == value


def test_zero_is_the_value_at_zero():
    assert nrr(0, 0) == nrr(0.0, 0.0) == 0.0
    assert nrr(90.0, 0.0) == nrr(0.0, 90.0) == 0.0
    assert mean_score(0.0, 0.0) == 0.0
    zeros = torch.zeros(2)
    assert torch.equal(nrr(zeros, torch.tensor([0.0, 1.0])), zeros)


@given(accuracies, accuracies, accuracies, accuracies)
def test_nrr_of_averages_is_at_least_the_average_of_nrrs(c1, r1, c2, r2):
    assert nrr((c1 + c2) / 2, (r1 + r2) / 2) >= (nrr(c1, r1) + nrr(c2, r2)) / 2 - 1e-12


def test_a_lower_nrr_does_not_mean_a_more_one_sided_model():
    assert nrr(50.0, 50.0) < nrr(90.0, 40.0) == pytest.approx(55.3846, abs=1e-4)


def test_numbers_of_the_papers():
    # RPAT's convention: percent in, percent out, two decimals
    assert nrr(80.0, 50.0) == pytest.approx(61.54, abs=0.005)
    assert mean_score(83.5, 48.25) == pytest.approx(65.875)


@given(st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=6))
def test_tensors_give_what_numbers_give(pairs):
    clean, robust = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    for score in (nrr, mean_score):
        expected = torch.tensor([score(*pair) for pair in pairs], dtype=torch.float64)
        assert_close(score(clean, robust), expected, rtol=4 * ULP, atol=0)
        assert_close(score(clean, pairs[0][1]), score(clean, torch.full_like(clean, pairs[0][1])), rtol=0, atol=0)
        assert_close(score(pairs[0][0], robust), score(torch.full_like(robust, pairs[0][0]), robust), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tensors_keep_their_dtype_and_order(dtype):
    clean, robust = (100 * normal(i, 200).abs().clamp_max(1) for i in range(2))
    clean, robust = clean.to(dtype), robust.to(dtype)
    value = nrr(clean, robust)
    assert value.dtype == mean_score(clean, robust).dtype == dtype
    assert (value >= torch.minimum(clean, robust)).all()
    assert (value <= mean_score(clean, robust)).all()


def test_tiny_and_huge_scores_neither_vanish_nor_overflow():
    assert nrr(1e-300, 1e-300) == 1e-300
    assert nrr(1e308, 1e308) == 1e308
    assert mean_score(1e308, 1e308) == 1e308


@given(seeds, st.integers(1, 40), classes)
def test_accuracy_is_the_share_of_winning_labels(seed, batch, classes):
    logits, labels = normal(seed, batch, classes), integers(seed, batch, below=classes)
    hits = sum(z.index(max(z)) == y for z, y in zip(logits.tolist(), labels.tolist(), strict=True))
    assert accuracy(logits, labels).item() == pytest.approx(hits / batch)


def test_accuracy_of_an_empty_batch_is_zero():
    assert accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 0


def test_logits_with_nan_are_never_counted_as_right():
    logits = torch.tensor([[torch.nan, 1.0], [0.0, torch.nan], [2.0, 1.0]])
    labels = torch.tensor([0, 0, 0])
    assert confusion_counts(logits, labels).sum(dim=0).tolist() == [[1, 2], [0, 0]]
    assert accuracy(logits, labels).item() == pytest.approx(1 / 3)


def test_accuracy_stays_on_the_device():
    assert (
        accuracy(torch.zeros(3, 2, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")).device.type
        == "meta"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_accuracy_counts_exactly_whatever_the_dtype_of_the_logits(dtype):
    logits = torch.zeros(10_001, 2, dtype=dtype)
    logits[:, 1] = 1
    labels = torch.ones(10_001, dtype=torch.long)
    assert accuracy(logits, labels) == 1
    labels[0] = 0
    assert accuracy(logits, labels).item() == pytest.approx(10_000 / 10_001, abs=1e-7)
