"""Steps, projections, norms."""

import math

import numpy as np
import torch
from torch.testing import assert_close

from perceptual_at import (
    L1,
    Linf,
)
from tests.peers.listing import (
    FLOATS,
    NORMS,
    OPEN,
    expected,
    normals,
    points,
    threat_of,
)


@expected(
    "cleverhans",
    "the steepest step of unit length gains the dual norm of the gradient",
    kind=NORMS,
    shape={"vectors": (100, 6), "grids": (100, 3, 2)},
)
def _(kind, shape):
    grad = normals(1, *shape)
    gain = (kind(1.0).steepest(grad) * grad).flatten(1).sum(dim=1)
    assert_close(gain, torch.linalg.vector_norm(grad.flatten(1), ord=kind(1.0).dual, dim=1))


@expected("cleverhans", "the steepest step has unit length", kind=NORMS, dtype=FLOATS)
def _(kind, dtype):
    grad = normals(2, 100, 3, 2, dtype=dtype)
    size = kind(1.0).norm(kind(1.0).steepest(grad))
    assert_close(size.double(), torch.ones(100, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0)


@expected("cleverhans", "the largest entries of a gradient may tie in L1", signs={"+-": (2.0, -2.0), "++": (2.0, 2.0)})
def _(signs):
    grad = torch.tensor([signs])
    step = L1(1.0).steepest(grad)
    assert (float((step * grad).sum()), float(step.abs().sum())) == (2.0, 1.0)


@expected("cleverhans, foolbox", "a gradient of zero gives a step without NaN", kind=NORMS)
def _(kind):
    assert bool(kind(1.0).steepest(torch.zeros(3, 5)).isfinite().all())


@expected("cleverhans, advertorch", "what is far away is put into the ball", kind=NORMS)
def _(kind):
    x, threat = torch.zeros(100, 3, 2), kind(0.5, bounds=OPEN)
    assert bool((threat.norm(threat.project(normals(3, 100, 3, 2, dtype=torch.float32), x)) <= 0.5).all())


@expected("advertorch", "what is inside stays where it is", kind=NORMS, dtype=FLOATS)
def _(kind, dtype):
    x = torch.full((4, 5), 0.5, dtype=dtype)
    near = x + torch.tensor([0.0, 0.03125, -0.03125, 0.0, 0.0], dtype=dtype)
    assert torch.equal(kind(0.25).project(near, x), near)


@expected("advertorch", "projecting twice is projecting once", kind=NORMS)
def _(kind):
    x, far = points(4, 50, 6, dtype=torch.float64), 3 * normals(5, 50, 6)
    once = threat_of(kind).project(far, x)
    assert_close(threat_of(kind).project(once, x), once, rtol=0, atol=1e-12)


@expected("advertorch", "bounds may be integers, floats, or tensors for batch or entry")
def _():
    x, far = 2 * points(6, 11, 12, 13) - 1, 3 * normals(6, 11, 12, 13, dtype=torch.float32)
    ones = torch.ones(11, 12, 13)
    found = [
        Linf(2.0, bounds=bounds).project(far, x)
        for bounds in ((-1, 1), (-1.0, 1.0), (-ones, ones), (-ones[:1], ones[:1]), (-ones[:, :1, :1], ones[:, :1, :1]))
    ]
    assert all(torch.equal(found[0], one) for one in found)


@expected(
    "advertorch",
    "a box may be open on one side",
    kind=NORMS,
    side={"above": (-1.0, math.inf), "below": (-math.inf, 1.0)},
)
def _(kind, side):
    x = 2 * points(7, 9, 12) - 1
    point = kind(3.0, bounds=side).project(9 * normals(7, 9, 12, dtype=torch.float32), x)
    assert bool(((point >= side[0]) & (point <= side[1])).all())


@expected("foolbox", "norms are those of NumPy", kind=NORMS, shape={"images": (10, 3, 8, 8), "vectors": (2, 3)})
def _(kind, shape):
    delta = normals(8, *shape)
    theirs = np.linalg.norm(delta.reshape(len(delta), -1).numpy(), ord=kind.p, axis=-1)
    np.testing.assert_allclose(kind(1.0).norm(delta).numpy(), theirs, rtol=1e-12)


@expected("foolbox", "a threat prints its norm and size", kind=NORMS)
def _(kind):
    assert repr(kind(0.25)) == str(kind(0.25)) == f"{kind.__name__}(eps=0.25)"


@expected("foolbox, cleverhans", "equal settings are equal keys", kind=NORMS)
def _(kind):
    cache = {kind(0.25): True}
    assert kind(0.25) in cache
    assert kind(0.5) not in cache
