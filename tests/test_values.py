"""Public values: they compare by what they hold, copy, pickle, and cannot be made inconsistent."""

import copy
import pickle
from collections import UserList

import pytest
import torch
from torch import nn

from perceptual_at import (
    L1,
    L2,
    AutoAttackVerdict,
    Check,
    Evaluation,
    Lane,
    Linf,
    Partition,
    Protocol,
    SampleGenerator,
    Verdict,
    adaptive_eta,
    aggregate,
    auto_attack,
    compare,
    kl_to,
)
from perceptual_at.attacks.protocol import composition_of
from perceptual_at.data.decoding import checked_size
from perceptual_at.diagnostics import PerceptionGap
from perceptual_at.evaluation import Cost, Difference, Interval
from perceptual_at.models import ResNet, from_joined
from perceptual_at.objectives import kd
from perceptual_at.published import published
from perceptual_at.schedules import rebat_learning_rate, rebat_weight
from perceptual_at.theory import mixup_box


def mask(*digits):
    return torch.tensor([digit == 1 for digit in digits])


def evaluation(last=1):
    return Evaluation(mask(1, 1, 0), {"pgd": mask(1, 0, 0)}, labels=torch.tensor([0, 1, last]), warnings=("w",))


def verdict(kind=Verdict, last=0.0, **more):
    step = torch.tensor([1, -1])
    return kind(torch.tensor([[0.5], [last]]), step >= 0, step, step + 3, step + 4, **more)


PROTOCOL = Protocol(Linf(8 / 255), 10, composition_of("standard", "Linf", 10))
# Of each value one, an equal one, and another one.
VALUES = {
    "Evaluation": (evaluation(), evaluation(), evaluation(0)),
    "scores": (*(Evaluation(torch.tensor([0.5, last]), {}) for last in (0.25, 0.25, 0.5)),),
    "Check": (*(Check("a", True, value, "found") for value in (1.0, 1.0, 2.0)),),
    "Check with NaN": (*(Check("a", True, float("nan"), found) for found in ("b", "b", "c")),),
    "Cost": (Cost(1.0, 2, 3), Cost(1.0, 2, 3), Cost(1.0, 2, 4)),
    "Interval": (Interval(0.0, 0.5), Interval(0.0, 0.5), Interval(0.0, 1.0)),
    "Comparison": (*(compare(evaluation(), evaluation(), names=("a", name)) for name in "bbc"),),
    "Aggregate": (*(aggregate([evaluation()] * count) for count in (2, 2, 3)),),
    "Verdict": (verdict(), verdict(), verdict(last=0.25)),
    "Verdict with NaN": (verdict(last=torch.nan), verdict(last=torch.nan), verdict()),
    "AutoAttackVerdict": (
        *(
            verdict(AutoAttackVerdict, attack=torch.tensor([0, attack]), protocol=PROTOCOL, warnings=())
            for attack in (-1, -1, 1)
        ),
    ),
    "Protocol": (
        PROTOCOL,
        Protocol(Linf(8 / 255), 10, composition_of("standard", "Linf", 10)),
        Protocol(Linf(0.1), 10, ()),
    ),
    "Partition": (*(Partition(mask(1, 0), mask(0, last), mask(0, 1 - last)) for last in (1, 1, 0)),),
    "PerceptionGap": (*(PerceptionGap(torch.tensor([1.0, last]), mask(1, 0), mask(1, 1)) for last in (2.0, 2.0, 3.0)),),
    "SampleGenerator": (*(SampleGenerator(seed, torch.arange(3)) for seed in (0, 0, 1)),),
    "Lane": (Lane(), Lane(), Lane(fold=False)),
    "Linf": (Linf(0.1), Linf(0.1), Linf(0.2)),
    "L2": (*(L2(torch.tensor([1.0, last])) for last in (2.0, 2.0, 3.0)),),
    "L1": (*(L1(1.0, bounds=(0.0, high)) for high in (1.0, 1.0, 2.0)),),
    "PublishedRow": (*(published(paper="RPAT", table=1)[place] for place in (0, 0, 1)),),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_equal_when_they_hold_the_same(name):
    one, same, other = VALUES[name]
    if name != "Check with NaN":  # NaN is no number, not even its own equal
        assert one == same
        assert not one.__ne__(same)
    assert one != other
    assert one != "text"
    assert other not in [one]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
                         ids=["copy", "deepcopy", "pickle"])  # fmt: skip
def test_values_are_copied_and_pickled(name, copied):
    one, *_ = VALUES[name]
    again = copied(one)
    assert type(again) is type(one)
    assert again == one or name == "Check with NaN"
    assert str(again) == str(one)


@pytest.mark.parametrize("name", ["Evaluation", "Check", "Verdict", "PerceptionGap", "Comparison", "Cost", "Protocol"])
def test_nothing_in_a_value_is_replaced(name):
    one, *_ = VALUES[name]
    field = next(iter(vars(one)))
    with pytest.raises(AttributeError):
        setattr(one, field, getattr(one, field))


def test_an_evaluation_keeps_what_it_was_made_of():
    correct, robust = mask(1, 1, 0), {"pgd": mask(1, 0, 0)}
    result = Evaluation(correct, robust)
    correct[2] = True
    robust["more"] = correct
    assert result.clean_accuracy == pytest.approx(2 / 3)
    assert list(result.robust) == ["pgd"]
    for change in (
        lambda: result.robust.update(more=correct), lambda: result.robust.pop("pgd"),
        lambda: result.robust.__setitem__("pgd", correct), lambda: result.robust.clear(),
        lambda: result.costs.setdefault("pgd", Cost(1.0)), lambda: result.provenance.__ior__({"a": 1}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


def test_robust_means_right_without_attack_too():
    result = Evaluation(mask(1, 0), {"pgd": mask(1, 1)})
    assert result.robust["pgd"].tolist() == [True, False]


INCONSISTENT = {
    "`robust['pgd']` must be of shape (3,), as `correct`": lambda: Evaluation(mask(1, 1, 0), {"pgd": mask(1, 0)}),
    "`correct` must be of shape (n,)": lambda: Evaluation(mask(1, 1)[:, None], {}),
    "`correct` must be of shape (n,) with n >= 1": lambda: Evaluation(mask(), {}),
    "`correct` must be boolean or scores": lambda: Evaluation(torch.tensor([1, 0]), {}),
    "`correct` must hold scores in [0, 1]": lambda: Evaluation(torch.tensor([0.5, torch.nan]), {}),
    "`robust['a']` must hold scores": lambda: Evaluation(torch.tensor([0.5]), {"a": torch.tensor([1.5])}),
    "`robust` must be a dictionary": lambda: Evaluation(mask(1), [mask(1)]),
    "cannot be called 'clean'": lambda: Evaluation(mask(1), {"clean": mask(1)}),
    "`labels` must be integer class indices of shape (2,)": lambda: Evaluation(mask(1, 0), {}, labels=torch.arange(3)),
    "`index` must be integer": lambda: Evaluation(mask(1, 0), {}, index=torch.rand(2)),
    "`repeated['clean']` must be of shape (repeats, 1)": lambda: Evaluation(mask(1), {}, repeated={"clean": mask(1)}),
    "`suspicious['tie']` must be boolean": lambda: Evaluation(mask(1), {}, suspicious={"tie": torch.tensor([0.5])}),
    "`passed` must be a bool": lambda: Check("a", 1, 0.0, "found"),
    "`passed` must be True for a check that does not apply": lambda: Check("a", False, 0.0, "found", applies=False),
    "`success` must be of shape (2,)": lambda: Verdict(torch.rand(2, 1), mask(1), *[torch.zeros(2).long()] * 3),
    "`success` must be boolean": lambda: Verdict(torch.rand(2, 1), *[torch.zeros(2).long()] * 4),
    "`defended` must be a boolean mask": lambda: PerceptionGap(torch.rand(2), mask(1), mask(1, 0)),
    "`only_b` must be in [0, 1]": lambda: Difference("clean", 0.5, 0.5, 1, 2, 2),
    "`a` must lie in [0.0, 1.0]": lambda: Difference("clean", 1.5, 0.5, 1, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("words", INCONSISTENT)
def test_no_value_can_be_made_inconsistent(words):
    with pytest.raises((TypeError, ValueError)) as caught:
        INCONSISTENT[words]()
    assert words in str(caught.value)


def test_functions_that_are_made_are_copied_and_pickled():
    reference = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss = kl_to(reference)
    z, labels = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(3, dtype=torch.long)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(again(z, labels), loss(z, labels))


# ------------------------------------------------------------------------ settings that were read from files

X, LABELS = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize("row", [UserList, list], ids=["a list of a kind of its own", "a list"])
@pytest.mark.parametrize(
    "use",
    [
        lambda row: Linf(0.25, bounds=row((0, 1))),
        lambda row: L2(0.25, bounds=row((0.0, 1.0))),
        lambda row: rebat_learning_rate(120, milestones=row((100, 150))),
        lambda row: rebat_weight(120, milestones=row((100, 150))),
        lambda row: mixup_box(X, X, 0.5, eps=0.1, bounds=row((0, 1)))[0].tolist(),
        lambda row: adaptive_eta(torch.eye(4).expand(2, 4, 4), torch.arange(4), etas=row((0.1, 0.5))).tolist(),
        lambda row: [stage.shape for stage in ResNet("basic", row((1, 1, 1, 1)), width=2).parameters()],
        lambda row: repr(from_joined(NET, row((1, 8, 8)))),
        lambda row: checked_size("image_folder", row((8, 16))),
        lambda row: kd(
            NET,
            (X,),
            LABELS,
            lambda _, x, __: x,
            standard_teacher=NET,
            robust_teacher=NET,
            weights=row((0.3, 0.1, 0.6)),
        )[0].item(),
        lambda row: (
            auto_attack(
                NET, X, LABELS, Linf(0.25), version=row((row(("square", {"queries": 3})), "apgd-ce")), verdict=True
            ).protocol.name
        ),
    ],
)
def test_any_sequence_is_taken_where_a_tuple_is(use, row):
    torch.manual_seed(1)
    assert use(row) == use(tuple)
