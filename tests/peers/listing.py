"""How an expectation is written down, and what it is checked over: networks, attacks, norms, dtypes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from perceptual_at import (
    L1,
    L2,
    Linf,
    apgd,
    auto_attack,
    cw,
    dlr,
    fab,
    fgsm,
    pgd,
    square,
)
from perceptual_at.attacks import surrogate_pgd
from tests.strategies import DTYPES, dtype_name, normal, uniform


class Expectation(NamedTuple):
    """A behaviour, whose suites check it, and how it is checked here."""

    peers: str
    behaviour: str
    check: Callable[..., None]
    over: dict[str, dict[str, Any]]

    def cases(self):
        """One case for each combination of what it is checked over; the first is fast, the others are slow."""
        for number, names in enumerate(itertools.product(*self.over.values())):
            values = {key: self.over[key][name] for key, name in zip(self.over, names, strict=True)}
            marks = [pytest.mark.slow] if number else []
            yield pytest.param(self.check, values, marks=marks, id="-".join([self.behaviour, *names]))


EXPECTED: list[Expectation] = []
DIFFERENT: list[Expectation] = []
PEERS = {"adv-lib", "cleverhans", "foolbox", "torchattacks", "advertorch", "AutoAttack", "RobustBench"}


def expected(peers, behaviour, *, into=EXPECTED, **over):
    """Put a check into the list."""

    def enter(check):
        into.append(Expectation(peers, behaviour, check, over))
        return check

    return enter


different = partial(expected, into=DIFFERENT)


# What it is checked over ---------------------------------------------------------------------------------------------

NORMS = {"Linf": Linf, "L2": L2, "L1": L1}
SIZES = {Linf: 0.1, L2: 0.4, L1: 1.5}
OPEN = (-math.inf, math.inf)
GRADIENT = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=5),
    "pgd, clean start": partial(pgd, steps=5, start="clean"),
    "pgd, momentum": partial(pgd, steps=5, momentum=0.9),
    "cw": partial(cw, steps=5),
    "apgd": partial(apgd, steps=6),
    "apgd, dlr": partial(apgd, steps=6, loss=dlr),
    "fab": partial(fab, steps=6),
}
ATTACKS = {
    **GRADIENT,
    "square": partial(square, queries=40),
    "surrogate": partial(surrogate_pgd, steps=4),
    "auto_attack": partial(auto_attack, version=["apgd-ce", ("square", {"queries": 20})]),
}
TARGETED = {
    "pgd": partial(pgd, steps=20),
    "apgd": partial(apgd, steps=20),
    "fab": partial(fab, steps=20),
    "square": partial(square, queries=300),
}
DRAWS = {"pgd": partial(pgd, steps=2), "apgd": partial(apgd, steps=3), "square": partial(square, queries=20)}
FOLLOWS_STEPS = {"pgd": pgd, "pgd, momentum": partial(pgd, momentum=0.5), "cw": cw}
FLOATS = {dtype_name(dtype): dtype for dtype in DTYPES}
LAYOUTS = {"vectors": (12,), "grids": (3, 4), "images": (3, 4, 4), "grey": (1, 6, 4), "volumes": (2, 2, 3, 3)}


def points(seed, *shape, dtype=torch.float32):
    """Uniform numbers in [0, 1]."""
    return uniform(seed, *shape, dtype=dtype)


def normals(seed, *shape, dtype=torch.float64):
    """Normal numbers."""
    return normal(seed, *shape, dtype=dtype)


class Vectors(nn.Module):
    """A small perceptron."""

    def __init__(self, entries=48, classes=4):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(entries, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.layers(x)


class Images(nn.Module):
    """Convolution, batch norm, a ReLU that works in place, pooling, dropout."""

    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(4)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5)
        )
        self.head = nn.Linear(24, classes)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Smooth(nn.Module):
    """Two features, two classes, one hidden layer of sigmoids: attacks can be judged by their rates of success."""

    def __init__(self):
        super().__init__()
        self.first = torch.tensor([[2.0, -1.5], [-1.0, 2.0]])
        self.second = torch.tensor([[-2.0, 1.5], [1.5, -2.0]])

    def forward(self, x):
        return torch.sigmoid((x - 0.5) @ self.first.to(x)) @ self.second.to(x)


class Slab(nn.Module):
    """Right of a plane through the middle of the box: the nearest mistake is known."""

    def __init__(self, entries):
        super().__init__()
        self.weight = 0.5 + points(11, entries)

    def height(self, x):
        return (x.flatten(1) - 0.5) @ self.weight.to(x)

    def forward(self, x):
        height = self.height(x)[:, None]
        return torch.cat([height, -height, torch.full_like(height, -9.0)], dim=1)


def images(n=6, dtype=torch.float32):
    """Images, and the labels that the network gives them."""
    x = points(1, n, 3, 4, 4, dtype=dtype)
    return x, Images().eval().to(dtype)(x).argmax(dim=1)


def flat_case(n=8, layout=(3, 4, 4), dtype=torch.float32, classes=4):
    """A perceptron, inputs, its own labels."""
    model = Vectors(math.prod(layout), classes).eval().to(dtype)
    x = points(2, n, *layout, dtype=dtype)
    return model, x, model(x).argmax(dim=1)


def smooth_case(n=100):
    """The two-class network on random points."""
    model, x = Smooth(), points(5, n, 2)
    return model, x.float(), model(x.float()).argmax(dim=1)


def threat_of(kind, size=1.0, **options):
    """A threat of usual size."""
    return kind(size * SIZES[kind], **options)


def is_inside(threat, x_adv, x):
    """Ball and box hold exactly."""
    return bool(threat.contains(x_adv, x).all())


def still_right(model, x, labels):
    """How many are right."""
    with torch.no_grad():
        return int((model(x).argmax(dim=1) == labels).sum())


def refused(call, words, kind=(ValueError, TypeError)):
    """The call is refused, in these words."""
    with pytest.raises(kind, match=words):
        call()
