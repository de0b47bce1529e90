"""Schedules against the values of ReBAT's released code."""

import math

import pytest
import torch

from perceptual_at.schedules import rebat_learning_rate, rebat_weight

PROGRESS = [0.0078125, 99.99, 100.0, 149.99, 150.0, 199.5]
# Made by running the schedule of the released code (PKU-ML/ReBAT, train_cifar_wa.py) at these points.
GOLDEN = {
    1.5: (
        [0.1, 0.1, 0.06666666666666667, 0.06666666666666667, 0.044444444444444446, 0.044444444444444446],
        [0.0, 0.0, 0.25, 0.25, 0.625, 0.625],
    ),
    1.7: (
        [0.1, 0.1, 0.05882352941176471, 0.05882352941176471, 0.03460207612456748, 0.03460207612456748],
        [0.0, 0.0, 0.35, 0.35, 0.9450000000000001, 0.9450000000000001],
    ),
}
both_functions = pytest.mark.parametrize("function", [rebat_learning_rate, rebat_weight])


@pytest.mark.parametrize("factor", GOLDEN)
def test_rate_and_weight_are_those_of_the_released_code(factor):
    rates, weights = GOLDEN[factor]
    for progress, rate, weight in zip(PROGRESS, rates, weights, strict=True):
        assert rebat_learning_rate(progress, factor=factor) == pytest.approx(rate, abs=1e-15)
        assert rebat_weight(progress, factor=factor) == pytest.approx(weight, abs=1e-12)


def test_the_weight_is_half_of_what_the_rate_has_lost_relative_to_what_is_left():
    for progress in PROGRESS:
        rate = rebat_learning_rate(progress, peak=0.3, factor=4.0, milestones=(2, 150))
        assert rebat_weight(progress, factor=4.0, milestones=(2, 150)) == pytest.approx((0.3 / rate - 1) / 2)


def test_torchs_scheduler_follows_the_schedule_in_every_iteration():
    iterations = 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rebat_learning_rate((step + 1) / iterations, peak=1.0, milestones=(2, 3)),
    )
    for epoch in range(4):
        for iteration in range(iterations):
            progress = epoch + (iteration + 1) / iterations
            expected = rebat_learning_rate(progress, peak=0.1, milestones=(2, 3))
            assert math.isclose(optimizer.param_groups[0]["lr"], expected)
            optimizer.step()
            scheduler.step()


@both_functions
@pytest.mark.parametrize(
    ("progress", "options", "message"),
    [
        (-0.1, {}, r"`progress` must lie in \[0, inf\), got -0.1"),
        (1, {"factor": 0.5}, r"`factor` must lie in \[1, inf\), got 0.5"),
        (1, {"milestones": (100,)}, r"`milestones` must hold two points of progress, got \(100,\)"),
        (1, {"milestones": (150, 100)}, r"`milestones` must be in order, got \(150, 100\)"),
        (1, {"milestones": (-1, 100)}, r"`milestones` must lie in \[0, inf\)"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(function, progress, options, message):
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        function(progress, **options)


def test_a_rate_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"rebat_learning_rate: `peak` must lie in \(0, inf\), got 0"):
        rebat_learning_rate(1, peak=0)


@both_functions
@pytest.mark.parametrize("milestones", [None, 100, "ab", {1, 2}])
def test_milestones_that_are_no_pair_are_refused(function, milestones):
    with pytest.raises(TypeError, match=f"{function.__name__}: `milestones` must hold two points of progress"):
        function(1, milestones=milestones)
