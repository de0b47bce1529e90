"""The least that an objective of the tables' other methods needs beside model, views, labels and attack."""

import copy

import torch

from perceptual_at import snapshot

ONE_VIEW = ("te", "mma")
"""Objectives that take one view only."""
OWN_TESTS = ("preset", "ducat")
"""What the tests of all objectives leave out: DUCAT's network has two outputs per class."""
DETACHED = ("mail", "ewat")
"""Objectives whose weights depend on the parameters without a gradient."""


def needs(name, model, x, classes, *, steps, teacher=None):
    """Keywords by the name of the objective."""
    rows, like = len(x), x.new_zeros(())
    teacher = model if teacher is None else teacher
    return {
        "gairat": {"steps": steps},
        "te": {"targets": torch.full((rows, classes), 1 / classes).to(like), "weight": 2.0},
        "hat": {"helper": teacher},
        "kd": {"standard_teacher": teacher, "robust_teacher": teacher},
        "adr": {"average": snapshot(model)},
        "cure": {"average": snapshot(model)},
        "clp": {"pairs": "attacked"},
        "ikl": {"table": None},
        "lbgat": {"teacher": copy.deepcopy(teacher)},
        "mma": {"margins": torch.linspace(0, 0.2, rows).to(like), "largest": 0.15},
    }.get(name, {})
