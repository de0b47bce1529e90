"""Who is misclassified, at the boundary, inside: masks that always fit together, and what makes them monotone."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perceptual_at import Partition, boundary_partition, interpolate
from tests.strategies import DTYPES, classes, dtype_name, integers, normal, seeds, uniform


def drawn(seed, batch, classes, *, coarse=False):
    """Logits at three places; coarse ones are often tied."""
    logits = [normal(seed + i, batch, classes) for i in range(3)]
    return [z.round() for z in logits] if coarse else logits, integers(seed + 9, batch, below=classes)


@given(seeds, st.integers(0, 30), classes, st.booleans(), st.booleans())
def test_the_masks_are_boolean_disjoint_and_covering(seed, batch, classes, coarse, released):
    (clean, reduced, adv), labels = drawn(seed, batch, classes, coarse=coarse)
    parts = boundary_partition(clean, reduced, labels, adv_logits=adv if released else None)
    for mask in parts:
        assert mask.dtype == torch.bool
        assert mask.shape == (batch,)
    assert (torch.stack(list(parts)).sum(dim=0) == 1).all()


@given(seeds, classes, st.booleans())
def test_each_sample_is_sorted_by_its_predictions(seed, classes, released):
    (clean, reduced, adv), labels = drawn(seed, 30, classes)
    parts = boundary_partition(clean, reduced, labels, adv_logits=adv if released else None)
    for i, label in enumerate(labels.tolist()):
        right, right_nearby, right_attacked = (z[i].argmax().item() == label for z in (clean, reduced, adv))
        if not right:
            expected = "misclassified"
        elif not right_nearby and not (released and right_attacked):
            expected = "boundary"
        else:
            expected = "interior"
        assert getattr(parts, expected)[i]


@given(seeds, classes)
def test_the_released_condition_only_moves_samples_from_the_boundary_to_the_interior(seed, classes):
    (clean, reduced, adv), labels = drawn(seed, 30, classes)
    paper = boundary_partition(clean, reduced, labels)
    release = boundary_partition(clean, reduced, labels, adv_logits=adv)
    assert torch.equal(paper.misclassified, release.misclassified)
    assert (paper.boundary | ~release.boundary).all()
    assert (release.interior | ~paper.interior).all()
    moved = paper.boundary & release.interior
    assert torch.equal(moved, paper.boundary & (adv.argmax(dim=1) == labels))


def test_every_case_by_hand():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    clean, reduced, adv = (
        torch.tensor(column)
        for column in zip(
            (right, right, right), (right, right, wrong), (right, wrong, right), (right, wrong, wrong),
            (wrong, right, right), (wrong, right, wrong), (wrong, wrong, right), (wrong, wrong, wrong),
            strict=True,
        )
    )  # fmt: skip
    labels = torch.zeros(8, dtype=torch.long)
    paper = boundary_partition(clean, reduced, labels)
    assert paper.misclassified.tolist() == [False] * 4 + [True] * 4
    assert paper.boundary.tolist() == [False, False, True, True] + [False] * 4
    assert paper.interior.tolist() == [True, True, False, False] + [False] * 4
    release = boundary_partition(clean, reduced, labels, adv_logits=adv)
    assert release.boundary.tolist() == [False, False, False, True] + [False] * 4
    assert release.interior.tolist() == [True, True, True, False] + [False] * 4


@given(seeds, classes)
def test_logits_affine_on_the_path_make_the_partition_monotone(seed, classes):
    # the region where a label wins is convex, so it is left once and for all
    clean, adv = normal(seed, 30, classes), normal(seed + 1, 30, classes)
    labels = clean.argmax(dim=1)
    masks = [
        boundary_partition(clean, interpolate(clean, adv, eta), labels).boundary
        for eta in torch.linspace(0, 1, 11).tolist()
    ]
    for smaller, larger in itertools.pairwise(masks):
        assert (larger | ~smaller).all()


def test_a_curved_margin_makes_it_not_monotone():
    # cos(3 pi t) + 0.2 is the margin at t: wrong part-way, right again, wrong at the end
    etas = torch.arange(1, 11) / 10
    margin = torch.cos(3 * math.pi * etas) + 0.2
    clean = torch.tensor([[1.2, 0.0]]).expand(10, 2)
    reduced = torch.stack([margin, torch.zeros(10)], dim=1)
    parts = boundary_partition(clean, reduced, torch.zeros(10, dtype=torch.long))
    assert [round(10 * eta) for eta in etas[parts.boundary].tolist()] == [2, 3, 4, 9, 10]


@given(seeds, classes)
def test_shifting_and_scaling_the_logits_of_a_sample_changes_nothing(seed, classes):
    (clean, reduced, adv), labels = drawn(seed, 20, classes)
    scale, shift = uniform(seed + 5, 20, 1, low=0.1, high=9.0), normal(seed + 6, 20, 1)
    before = boundary_partition(clean, reduced, labels, adv_logits=adv)
    after = boundary_partition(*(scale * z + shift for z in (clean, reduced)), labels, adv_logits=scale * adv + shift)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64], ids=dtype_name)
def test_any_dtypes_will_do(dtype, label_dtype):
    (clean, reduced, _), labels = drawn(0, 20, 4)
    expected = boundary_partition(clean.to(dtype).double(), reduced.to(dtype).double(), labels)
    parts = boundary_partition(clean.to(dtype), reduced.to(dtype), labels.to(label_dtype))
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


def test_the_result_reads_like_words_and_unpacks_in_their_order():
    (clean, reduced, _), labels = drawn(0, 20, 4)
    misclassified, boundary, interior = parts = boundary_partition(clean, reduced, labels)
    assert isinstance(parts, Partition)
    assert parts._fields == ("misclassified", "boundary", "interior")
    assert misclassified is parts.misclassified
    assert boundary is parts.boundary
    assert interior is parts.interior
    assert all(mask.any() for mask in parts)


def test_masks_carry_no_gradient_and_stay_on_the_device():
    (clean, reduced, _), labels = drawn(0, 20, 4)
    assert not any(mask.requires_grad for mask in boundary_partition(clean.requires_grad_(), reduced, labels))
    on_meta = boundary_partition(clean.to("meta"), reduced.to("meta"), labels.to("meta"))
    assert all(mask.device.type == "meta" for mask in on_meta)


def test_compiling_the_full_graph_agrees_with_eager():
    (clean, reduced, adv), labels = drawn(0, 20, 4)
    torch._dynamo.reset()
    compiled = torch.compile(boundary_partition, fullgraph=True, backend="eager")
    for ours, expected in zip(
        compiled(clean, reduced, labels, adv_logits=adv),
        boundary_partition(clean, reduced, labels, adv_logits=adv),
        strict=True,
    ):
        assert torch.equal(ours, expected)
