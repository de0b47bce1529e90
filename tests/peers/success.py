"""What attacks find."""

import math
from functools import partial

import torch
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import (
    L2,
    Linf,
    SampleGenerator,
    apgd,
    fab,
    fgsm,
    pgd,
    square,
)
from tests.peers.listing import (
    ATTACKS,
    FLOATS,
    GRADIENT,
    NORMS,
    OPEN,
    TARGETED,
    Images,
    Slab,
    Smooth,
    expected,
    flat_case,
    images,
    is_inside,
    normals,
    points,
    smooth_case,
    still_right,
    threat_of,
)
from tests.strategies import generator


@expected("foolbox, torchattacks", "an attack lowers accuracy", attack=ATTACKS, kind=NORMS)
def _(attack, kind):
    x, labels = images(24)
    model = Images().eval()
    assert still_right(model, attack(model, x, labels, threat_of(kind, 4.0 if kind is not Linf else 2.0)), labels) < 24


@expected("torchattacks", "accuracy under attack never exceeds clean accuracy", attack=GRADIENT, kind=NORMS)
def _(attack, kind):
    x, _ = images(24)
    labels = torch.arange(24) % 4  # most are wrong from the start
    model = Images().eval()
    verdict = attack(model, x, labels, threat_of(kind), verdict=True)
    right = model(x).argmax(dim=1) == labels
    assert bool(verdict.success[~right].all()), "mistakes without an attack stay mistakes"
    assert int((~verdict.success).sum()) <= int(right.sum())


@expected(
    "cleverhans",
    "half of a smooth network's points fall to a budget of one half",
    kind=NORMS,
    attack={name: GRADIENT[name] for name in ("fgsm", "pgd", "pgd, momentum", "apgd", "fab")},
)
def _(kind, attack):
    model, x, labels = smooth_case()
    assert still_right(model, attack(model, x, labels, kind(0.5, bounds=(-5, 5))), labels) < 50


@expected("cleverhans", "seven of ten points reach a random target", attack=TARGETED, kind=NORMS)
def _(attack, kind):
    model, x, labels = smooth_case()
    targets = torch.randint(2, (100,), generator=generator(0))
    if attack.func is square:  # which takes images
        x, model = x[:, :, None, None], lambda z: Smooth()(z.flatten(1))
    x_adv = attack(model, x, labels, kind(0.6, bounds=(-5, 5)), targets=targets)
    assert int((model(x_adv).argmax(dim=1) == targets).sum()) > 70


@expected("foolbox, advertorch", "targeted attacks take more samples to their targets", attack=TARGETED, kind=NORMS)
def _(attack, kind):
    x, labels = images(24)
    model, targets = Images().eval(), (labels + 1) % 4
    x_adv = attack(model, x, labels, threat_of(kind, 6.0 if kind is not Linf else 3.0), targets=targets)
    assert int((model(x_adv).argmax(dim=1) == targets).sum()) > 0


@expected(
    "torchattacks",
    "targets may be random, the least likely class, or any function of the labels",
    attack=TARGETED,
    way={
        "random": lambda logits, labels: (labels + torch.randint(1, 4, labels.shape)) % 4,
        "least likely": lambda logits, labels: logits.argmin(dim=1),
        "by function": lambda logits, labels: (labels + 2) % 4,
    },
)
def _(attack, way):
    x, labels = images(16)
    model = Images().eval()
    torch.manual_seed(0)
    targets = way(model(x).detach(), labels)
    verdict = attack(model, x, labels, Linf(0.3), targets=targets, verdict=True)
    assert torch.equal(verdict.success, model(verdict.x_adv).argmax(dim=1) == targets)


@expected("cleverhans, foolbox", "clipping happens at every step: a narrow box leaves few points right")
def _():
    model, x, _ = smooth_case()
    x = 0.5 + 0.2 * x
    labels = model(x).argmax(dim=1)
    threat = Linf(0.2, bounds=(0.5, 0.7))  # the box itself, which is 0.2 wide in decimals only
    assert still_right(model, pgd(model, x, labels, threat, steps=5, step_size=0.05), labels) < 10


@expected(
    "cleverhans, torchattacks",
    "more random starts break no fewer samples",
    attack={"pgd": partial(pgd, steps=2, step_size=0.05), "apgd": partial(apgd, steps=3)},
)
def _(attack):
    x, labels = images(24)
    model, noise = Images().eval(), SampleGenerator(0, torch.arange(24))
    once, often = (
        attack(model, x, labels, Linf(0.1), restarts=restarts, generator=noise, verdict=True).success
        for restarts in (1, 5)
    )
    assert bool((often | ~once).all())


@expected(
    "adv-lib",
    "every point beside a plane is moved across it",
    batch={"1": 1, "3": 3, "8": 8},
    dims={"vectors": (8,), "grids": (4, 6), "images": (5, 7, 7)},
    attack={name: GRADIENT[name] for name in ("pgd", "pgd, momentum", "cw", "apgd", "fab")},
)
def _(batch, dims, attack):
    model = Slab(math.prod(dims))
    x = (0.55 + 0.01 * normals(12, batch, *dims)).clamp(0.51, 1).float()
    labels = torch.zeros(batch, dtype=torch.long)
    distance = model.height(x) / model.weight.norm()
    assert still_right(model, attack(model, x, labels, L2(2 * float(distance.max()))), labels) == 0


@expected(
    "adv-lib",
    "the minimum-norm attack is close to the distance of the plane",
    kind=NORMS,
    batch={"1": 1, "3": 3, "8": 8},
    dims={"vectors": (8,), "grids": (4, 6), "images": (5, 7, 7)},
)
def _(kind, batch, dims):
    model = Slab(math.prod(dims))
    x = (0.55 + 0.01 * normals(12, batch, *dims)).clamp(0.51, 1).float()
    nearest = model.height(x) / torch.linalg.vector_norm(model.weight, ord=kind(1.0).dual)
    threat = kind(min(3 * float(nearest.max()), 1.0 if kind is Linf else math.inf))
    x_adv = fab(model, x, torch.zeros(batch, dtype=torch.long), threat, steps=10)
    assert bool((threat.norm(x_adv - x) <= 2 * nearest).all())


@expected(
    "adv-lib, AutoAttack",
    "on a linear model an attack finds exactly the samples within reach",
    kind=NORMS,
    attack={"pgd": partial(pgd, steps=30), "apgd": partial(apgd, steps=60), "fab": partial(fab, steps=30)},
)
def _(kind, attack):
    model = Slab(10)
    x = 0.5 + 0.05 * points(13, 60, 10, dtype=torch.float64)
    nearest = model.height(x) / torch.linalg.vector_norm(model.weight, ord=kind(1.0).dual)
    eps = float(nearest.median())
    found = attack(model, x, torch.zeros(60, dtype=torch.long), kind(eps), verdict=True).success
    assert torch.equal(found[(nearest - eps).abs() > 0.02 * eps], (nearest < eps)[(nearest - eps).abs() > 0.02 * eps])


@expected(
    "cleverhans, advertorch", "every factor of momentum ends at the edge", momentum={str(m): m for m in (0.0, 0.5, 1.0)}
)
def _(momentum):
    model, x, labels = smooth_case()
    threat = Linf(0.5, bounds=(-5, 5))
    x_adv = pgd(model, x, labels, threat, steps=20, step_size=0.06, momentum=momentum, start="clean")
    assert_close(threat.norm(x_adv - x), torch.full((100,), 0.5), rtol=1e-3, atol=0)


@expected("torchattacks, advertorch", "momentum 0 is the plain attack", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    plain, zero = (pgd(model, x, labels, threat_of(kind), start="clean", **extra) for extra in ({}, {"momentum": 0.0}))
    assert torch.equal(plain, zero)


@expected(
    "torchattacks, cleverhans, advertorch", "one full step from the clean point is the fast gradient method", kind=NORMS
)
def _(kind):
    model, x, labels = flat_case()
    threat = threat_of(kind)
    step = pgd(model, x, labels, threat, steps=1, step_size=threat.eps, start="clean")
    assert_close(fgsm(model, x, labels, threat), step, rtol=0, atol=1e-6)


@expected(
    "torchattacks, advertorch, foolbox",
    "iterated gradient signs are what the textbook writes",
    steps={"1": 1, "7": 7},
    start={"clean": False, "given": True},
)
def _(steps, start):
    model, x, labels = flat_case()
    point = (x + 0.05 * (2 * points(14, *x.shape) - 1)).clamp(0, 1) if start else x
    found = pgd(model, x, labels, Linf(0.1), steps=steps, step_size=0.03, start=point)
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(leaf), labels), leaf)
        point = (point + 0.03 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert_close(found, point, rtol=0, atol=1e-6)


@expected("torchattacks, advertorch, foolbox", "iterated L2 steps are what the textbook writes")
def _():
    model, x, labels = flat_case(dtype=torch.float64)
    point = x
    for _ in range(5):
        leaf = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(leaf), labels), leaf)
        moved = point + 0.1 * slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) - x
        size = moved.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        point = x + moved * (0.3 / size).clamp_max(1)
    found = pgd(model, x, labels, L2(0.3, bounds=OPEN), steps=5, step_size=0.1, start="clean")
    assert_close(found, point, rtol=0, atol=1e-9)


@expected("advertorch", "a targeted attack descends on the loss of the target")
def _():
    model, x, labels = flat_case()
    targets, point = (labels + 1) % 4, x
    for _ in range(5):
        leaf = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(leaf), targets), leaf)
        point = (point - 0.03 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    found = pgd(model, x, labels, Linf(0.1), steps=5, step_size=0.03, start="clean", targets=targets)
    assert_close(found, point, rtol=0, atol=1e-6)


@expected("foolbox, torchattacks", "averaging over passes changes nothing on a model that is not random", kind=NORMS)
def _(kind):
    model, x, labels = flat_case(dtype=torch.float64)
    once, often = (pgd(model, x, labels, threat_of(kind), steps=4, start="clean", eot=eot) for eot in (1, 4))
    assert_close(once, often, rtol=0, atol=1e-9)


@expected(
    "torchattacks, AutoAttack",
    "averaging over passes runs on a random model",
    attack={"pgd": partial(pgd, steps=2), "apgd": partial(apgd, steps=3)},
)
def _(attack):
    x, labels = images()
    model = Images().eval()
    noisy = lambda z: model(z + 0.05 * torch.randn_like(z))  # noqa: E731
    assert is_inside(Linf(0.1), attack(noisy, x, labels, Linf(0.1), eot=3), x)


@expected(
    "torchattacks, cleverhans",
    "a random start is inside ball and box and is not the clean point",
    kind=NORMS,
    dtype=FLOATS,
)
def _(kind, dtype):
    x = points(15, 20, 6, dtype=dtype)
    start = threat_of(kind).random_start(x, generator=generator(0))
    assert is_inside(threat_of(kind), start, x)
    assert not bool((start == x).all(dim=1).any())


@expected("foolbox", "an attack begins at a point that one gives it", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    point = threat_of(kind).project(1 - x, x)
    found = pgd(model, x, labels, threat_of(kind), steps=1, step_size=1e-7, start=point)
    assert_close(found, point, rtol=0, atol=1e-5)


@expected("foolbox", "a start outside the ball is brought inside", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    assert is_inside(threat_of(kind), pgd(model, x, labels, threat_of(kind), steps=1, start=1 - x), x)


@expected("foolbox", "stopping early costs no success", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    threat = threat_of(kind, 2.0)
    found = [
        pgd(model, x, labels, threat, steps=8, start="clean", keep="best", early_stop=stop, verdict=True).success
        for stop in (False, True)
    ]
    assert torch.equal(*found)


@expected("torchattacks, AutoAttack", "the best point of a run is at least as good as its last", kind=NORMS)
def _(kind):
    x, labels = images(24)
    model, threat = Images().eval(), threat_of(kind)
    last, best = (
        pgd(model, x, labels, threat, steps=6, start="clean", keep=keep, verdict=True).success
        for keep in ("last", "best")
    )
    assert bool((best | ~last).all())
