"""Budgets and boxes."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from perceptual_at import (
    L1,
    L2,
    Linf,
    SampleGenerator,
    evaluate,
    fgsm,
    pgd,
)
from perceptual_at.diagnostics import random_noise
from tests.peers.listing import (
    ATTACKS,
    FLOATS,
    FOLLOWS_STEPS,
    GRADIENT,
    LAYOUTS,
    NORMS,
    SIZES,
    Images,
    Slab,
    expected,
    flat_case,
    images,
    is_inside,
    points,
    refused,
    smooth_case,
    still_right,
    threat_of,
)
from tests.strategies import generator


@expected(
    "foolbox, advertorch, torchattacks, cleverhans", "results have the shape of the inputs", attack=ATTACKS, kind=NORMS
)
def _(attack, kind):
    x, labels = images()
    assert attack(Images().eval(), x, labels, threat_of(kind)).shape == x.shape


@expected("advertorch, adv-lib", "inputs of any number of dimensions are attacked", attack=GRADIENT, layout=LAYOUTS)
def _(attack, layout):
    model, x, labels = flat_case(layout=layout)
    x_adv = attack(model, x, labels, Linf(0.2))
    assert x_adv.shape == x.shape
    assert still_right(model, x_adv, labels) < len(x)


@expected("cleverhans", "results have the dtype of the inputs", attack=ATTACKS, dtype=FLOATS)
def _(attack, dtype):
    x, labels = images(dtype=dtype)
    assert attack(Images().eval().to(dtype), x, labels, Linf(0.1)).dtype == dtype


@expected("cleverhans, foolbox, AutoAttack", "results lie in the ball", attack=ATTACKS, kind=NORMS, dtype=FLOATS)
def _(attack, kind, dtype):
    x, labels = images(dtype=dtype)
    threat = threat_of(kind)
    x_adv = attack(Images().eval().to(dtype), x, labels, threat)
    assert bool((threat.norm(x_adv.double() - x.double()) <= threat.eps).all())


@expected(
    "cleverhans, foolbox",
    "results lie in the box",
    attack=GRADIENT,
    kind=NORMS,
    bounds={"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "wide": (-5.0, 5.0), "bytes": (0.0, 255.0)},
)
def _(attack, kind, bounds):
    model, x, labels = flat_case()
    x_adv = attack(model, x, labels, threat_of(kind, bounds=bounds))
    assert bounds[0] <= float(x_adv.min())
    assert float(x_adv.max()) <= bounds[1]


@expected("cleverhans", "a box that cuts the ball is reached on both sides", kind={"Linf": Linf})
def _(kind):
    model, x, labels = flat_case(n=20)
    x = 0.4 + 0.2 * x
    x_adv = fgsm(model, x, labels, kind(0.3, bounds=(0.35, 0.65)))
    assert (float(x_adv.min()), float(x_adv.max())) == (pytest.approx(0.35), pytest.approx(0.65))


@expected("cleverhans", "a budget of 0 gives back the inputs", attack=ATTACKS, kind=NORMS)
def _(attack, kind):
    x, labels = images()
    assert torch.equal(attack(Images().eval(), x, labels, kind(0.0)), x)


@expected("cleverhans", "a negative budget is a ValueError", kind=NORMS)
def _(kind):
    refused(lambda: kind(-0.1), "`eps`", ValueError)


@expected("cleverhans", "bounds in the wrong order are a ValueError", kind=NORMS)
def _(kind):
    refused(lambda: kind(0.1, bounds=(0.5, -0.5)), "`bounds`", ValueError)


@expected("foolbox, advertorch", "a budget must be a finite number", kind=NORMS)
def _(kind):
    for wrong in (math.nan, math.inf, "0.1", None, [0.1]):
        refused(lambda wrong=wrong: kind(wrong), "eps")


@expected("cleverhans, foolbox", "inputs outside the box are refused", attack=ATTACKS, kind=NORMS)
def _(attack, kind):
    x, labels = images()
    refused(lambda: attack(Images().eval(), 0 * x - 0.1, labels, threat_of(kind)), r"got values from -0\.1")
    refused(lambda: attack(Images().eval(), 0 * x + 1.1, labels, threat_of(kind)), r"to 1\.1")


@expected("cleverhans", "a negative step is a ValueError", attack=FOLLOWS_STEPS, kind=NORMS)
def _(attack, kind):
    model, x, labels = flat_case()
    refused(lambda: attack(model, x, labels, threat_of(kind), step_size=-0.01), "`step_size`", ValueError)


@expected("cleverhans", "few short steps do not reach the edge of the ball", attack=FOLLOWS_STEPS, kind=NORMS)
def _(attack, kind):
    model, x, labels = smooth_case()
    threat = kind(0.5, bounds=(-5, 5))
    x_adv = attack(model, x, labels, threat, steps=10, step_size=0.01, start="clean")
    assert float(threat.norm(x_adv - x).max()) < 0.25


@expected(
    "cleverhans",
    "one step of full length ends at the edge of the ball",
    kind=NORMS,
    eps={str(eps): eps for eps in (0.1, 0.2, 0.3, 0.4)},
)
def _(kind, eps):
    model, x, labels = smooth_case()
    threat = kind(eps, bounds=(-5, 5))
    assert_close(threat.norm(fgsm(model, x, labels, threat) - x), torch.full((len(x),), eps), rtol=1e-4, atol=0)


@expected("cleverhans", "calls with other budgets do not remember the last one", kind=NORMS)
def _(kind):
    model, x, labels = smooth_case()
    alone = fgsm(model, x, labels, kind(0.2, bounds=(-5, 5)))
    for eps in (0.1, 0.4):
        fgsm(model, x, labels, kind(eps, bounds=(-5, 5)))
    assert torch.equal(fgsm(model, x, labels, kind(0.2, bounds=(-5, 5))), alone)


@expected("advertorch", "a budget for each sample means the same as one number", attack=ATTACKS, kind=NORMS)
def _(attack, kind):
    x, labels = images(dtype=torch.float64)
    model, eps = Images().eval().double(), SIZES[kind]
    for per_sample in (torch.full((6,), eps, dtype=torch.float64), torch.full((6, 1, 1, 1), eps, dtype=torch.float64)):
        found = [
            attack(model, x, labels, kind(one), generator=SampleGenerator(0, torch.arange(6)))
            if attack is not fgsm
            else attack(model, x, labels, kind(one))
            for one in (eps, per_sample)
        ]
        assert_close(*found, rtol=0, atol=1e-12)


@expected("advertorch", "a float32 budget for each sample differs from a number by its rounding", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    eps = SIZES[kind]
    found = [pgd(model, x, labels, kind(one), steps=5, start="clean") for one in (eps, torch.full((8,), eps))]
    assert_close(*found, rtol=0, atol=1e-6)


@expected("advertorch", "a step for each sample means the same as one number", attack=FOLLOWS_STEPS, kind=NORMS)
def _(attack, kind):
    model, x, labels = flat_case(dtype=torch.float64)
    found = [
        attack(model, x, labels, threat_of(kind), steps=4, step_size=step, start="clean")
        for step in (0.02, torch.full((8,), 0.02, dtype=torch.float64))
    ]
    assert torch.equal(*found)


@expected(
    "advertorch",
    "bounds as tensors mean the same as two numbers",
    attack=GRADIENT,
    kind=NORMS,
    shape={"per sample": (8, 1, 1, 1), "per channel": (1, 3, 1, 1), "per entry": (1, 3, 4, 4)},
)
def _(attack, kind, shape):
    model, x, labels = flat_case(dtype=torch.float64)
    low, high = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    options = {} if attack is fgsm else {"generator": SampleGenerator(0, torch.arange(8))}
    plain, spread = (attack(model, x, labels, threat_of(kind, bounds=one), **options) for one in ((0, 1), (low, high)))
    assert_close(plain, spread, rtol=0, atol=1e-9)


@expected(
    "foolbox",
    "other units of the inputs give the same attack",
    bounds={"symmetric": (-1.0, 1.0), "bytes": (0.0, 255.0), "int16": (-32768.0, 32767.0)},
)
def _(bounds):
    model, x, labels = flat_case(dtype=torch.float64)
    low, width = bounds[0], bounds[1] - bounds[0]
    plain = pgd(model, x, labels, Linf(0.1), steps=4, step_size=0.03, start="clean")
    there = pgd(
        lambda z: model((z - low) / width),
        x * width + low,
        labels,
        Linf(0.1 * width, bounds=bounds),
        steps=4,
        step_size=0.03 * width,
        start="clean",
    )
    assert_close((there - low) / width, plain, rtol=0, atol=1e-9)


@expected("foolbox", "L1 and L2 budgets may be as large as one likes", kind={"L2": L2, "L1": L1})
def _(kind):
    model, x, labels = flat_case()
    threat = kind(5000.0)
    x_adv = pgd(model, x, labels, threat, steps=5)
    assert is_inside(threat, x_adv, x)
    assert still_right(model, x_adv, labels) == 0


@expected("foolbox, cleverhans", "the whole box can be asked for in every norm", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    for threat in (threat_of(kind).whole_box(x), threat_of(kind).scaled(1000)):
        assert bool(threat.contains(1 - x, x).all())
        assert still_right(model, pgd(model, x, labels, threat, steps=10), labels) == 0


@expected("foolbox", "a larger budget breaks no fewer samples", kind=NORMS)
def _(kind):
    model = Slab(6)
    x = 0.5 + 0.3 * points(8, 40, 6, dtype=torch.float64)
    labels = torch.zeros(40, dtype=torch.long)
    left = [
        still_right(model, pgd(model, x, labels, kind(eps), steps=20), labels)
        for eps in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] == 40 > left[-1]


@expected("foolbox", "robust accuracy starts at clean accuracy and ends at 0", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    labels = torch.where(torch.arange(8) == 3, (labels + 1) % 4, labels)
    attacks = {"none": partial(pgd, threat=kind(0.0)), "all": partial(pgd, threat=threat_of(kind).whole_box(x))}
    result = evaluate(model, [(x, labels)], attacks, progress=False)
    assert (result.robust_accuracy["none"], result.robust_accuracy["all"]) == (result.clean_accuracy, 0.0)


@expected("foolbox, cleverhans", "noise of a norm stays in ball and box", kind=NORMS, dtype=FLOATS)
def _(kind, dtype):
    x = points(9, 20, 3, 4, 4, dtype=dtype)
    noisy = random_noise(None, x, torch.zeros(20, dtype=torch.long), threat_of(kind), generator=generator(0))
    assert is_inside(threat_of(kind), noisy, x)
    assert not torch.equal(noisy, x)


@expected("RobustBench", "a point is put into cube and box entry by entry", dtype=FLOATS)
def _(dtype):
    x = torch.tensor([[0.0, 0.5, 0.875]], dtype=dtype)
    far = torch.tensor([[0.4, 0.6, 1.5]], dtype=dtype)
    expected_point = torch.tensor([[0.25, far[0, 1].item(), 1.0]], dtype=dtype)
    assert torch.equal(Linf(0.25).project(far, x), expected_point)
