"""Weights of samples: their mean, their order, what makes them all alike."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at.partitions import adaptive_eta
from perceptual_at.sample_weights import (
    StepsWithstood,
    entropy_weights,
    geometric_weights,
    margin_weights,
    probability_margin,
    smallest_margins,
)
from tests.strategies import generator, integers, normal, seeds

FORMS = st.sampled_from(["tanh", "sigmoid", "discrete"])


def weights_of(seed, which, batch=9):
    """A batch, and a function of it that gives weights."""
    kappa, logits, labels = (
        integers(seed, batch, below=11).double(),
        normal(seed, batch, 5),
        integers(seed, batch, below=5),
    )
    functions = {
        "geometric": (lambda k: geometric_weights(k, steps=10), [kappa]),
        "margin code": (lambda z, y: margin_weights(probability_margin(z, y)), [logits, labels]),
        "margin batch": (lambda z, y: margin_weights(probability_margin(z, y), scale="batch"), [logits, labels]),
        "entropy": (entropy_weights, [logits]),
        "entropy proportional": (lambda z: entropy_weights(z, form="proportional"), [logits]),
    }
    return functions[which]


@given(seeds, st.sampled_from(["geometric", "margin code", "margin batch", "entropy", "entropy proportional"]))
def test_permuting_the_batch_permutes_the_weights(seed, which):
    weigh, arguments = weights_of(seed, which)
    order = torch.randperm(9, generator=generator(seed))
    assert_close(weigh(*(a[order] for a in arguments)), weigh(*arguments)[order], rtol=1e-13, atol=0)


@given(seeds, FORMS)
def test_geometric_weights_have_mean_one_and_fall_with_the_steps_withstood(seed, form):
    kappa = integers(seed, 9, below=11).double()
    weights = geometric_weights(kappa, steps=10, form=form)
    assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
    order = kappa.argsort()
    assert (weights[order].diff() <= 1e-15).all()


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
def test_an_infinite_offset_weighs_all_alike_and_a_far_one_does_not_underflow(form):
    kappa = torch.arange(11)
    assert (geometric_weights(kappa, steps=10, offset=math.inf, form=form) == 1).all()
    far = geometric_weights(kappa.double(), steps=10, offset=-900.0, form=form)
    assert far.isfinite().all()
    assert_close(far.mean(), torch.ones((), dtype=torch.float64))


def test_no_weight_has_a_gradient():
    logits, labels = normal(0, 4, 5).requires_grad_(), integers(0, 4, below=5)
    assert not entropy_weights(logits).requires_grad
    assert not margin_weights(probability_margin(logits, labels)).requires_grad
    assert probability_margin(logits, labels).requires_grad  # it is a number like others


def test_where_nobody_is_unsure_all_count_alike():
    sure = 1000.0 * torch.eye(3)
    assert (entropy_weights(sure, form="proportional") == 1).all()


@pytest.mark.parametrize("form", ["one_plus", "proportional"])
def test_a_class_that_is_masked_adds_no_entropy(form):
    logits = normal(0, 6, 5)
    masked = torch.cat([logits, torch.full((6, 1), -math.inf)], dim=1)
    assert_close(entropy_weights(masked, form=form), entropy_weights(logits, form=form))
    assert entropy_weights(masked, form=form).std() > 0.01


@given(seeds, st.integers(0, 9))
def test_as_many_are_chosen_as_asked_for(seed, count):
    logits, labels = normal(seed, 9, 5), integers(seed, 9, below=5)
    chosen = smallest_margins(logits, labels, share=count / 9)
    assert chosen.sum() == count
    margins = logits.gather(1, labels[:, None]).squeeze(1) - logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    if 0 < count < 9:
        assert margins[chosen].max() <= margins[~chosen].min()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: geometric_weights([1, 2]), TypeError, "geometric_weights: `kappa`"),
        (lambda: geometric_weights(torch.zeros(2, 2)), ValueError, r"`kappa` .*\(2, 2\)"),
        (lambda: geometric_weights(torch.zeros(2), steps=0), ValueError, "`steps`"),
        (lambda: geometric_weights(torch.zeros(2), form="cosine"), ValueError, "`form`"),
        (lambda: geometric_weights(torch.zeros(2), offset=math.nan), ValueError, "`offset`"),
        (lambda: geometric_weights(torch.zeros(2), offset=0.0, form="discrete"), ValueError, "`offset` no effect"),
        (lambda: margin_weights(torch.zeros(2, 2)), ValueError, "margin_weights: `margins`"),
        (lambda: margin_weights(torch.zeros(2), slope=-1.0), ValueError, "`slope`"),
        (lambda: margin_weights(torch.zeros(2), scale="paper"), ValueError, "`scale`"),
        (lambda: entropy_weights(torch.zeros(2, 3), form="both"), ValueError, "entropy_weights: `form`"),
        (lambda: smallest_margins(torch.zeros(2, 3), torch.zeros(2).long(), share=40), ValueError, "`share`"),
        (lambda: probability_margin(torch.zeros(2, 3), torch.tensor([0, 3])), ValueError, "`labels`"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words.replace("` no", "`.* no")):
        call()


def test_nan_is_no_prediction_that_withstands():
    undefined = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    withstood, labels = StepsWithstood(), torch.tensor([0, 0])
    withstood(undefined, labels)
    assert withstood.kappa.tolist() == [0, 1]
    assert adaptive_eta(undefined[None], labels, etas=[0.5]).tolist() == [0.5, 1.0]


def test_a_counter_refuses_what_has_no_right_class():
    with pytest.raises(TypeError, match="StepsWithstood: `labels` must be class indices"):
        StepsWithstood()(torch.randn(2, 2), torch.full((2, 2), 0.5))
    with pytest.raises(TypeError, match="StepsWithstood: `loss` must be a function"):
        StepsWithstood("cw")
