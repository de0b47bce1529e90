"""What the property tests draw: seeds, shapes, dtypes, threat models.

Tensors are built from a drawn seed, which keeps examples small, fast and repeatable.

The default profile runs the same fifteen examples every time, fifty where CI is set; `HYPOTHESIS_PROFILE=nightly` runs
a thousand random ones.
"""

import math
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from perceptual_at import L1, L2, Linf

settings.register_profile("default", derandomize=True, deadline=None, max_examples=50 if os.environ.get("CI") else 15)
settings.register_profile(
    "nightly", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BOUNDS = ((0.0, 1.0), (-1.0, 1.0), (-2.1, 2.64), (0.0, 255.0), (-math.inf, math.inf), (0.0, math.inf))

seeds = st.integers(0, 2**31 - 1)
batches = st.integers(1, 5)
classes = st.sampled_from([2, 3, 4, 10, 40])
dtypes = st.sampled_from(DTYPES)
bounds = st.sampled_from(BOUNDS)
alphas = st.floats(0.01, 0.99)
scales = st.sampled_from([0.001, 1.0, 40.0])
temperatures = st.floats(0.1, 10.0)
accuracies = st.one_of(st.just(0.0), st.just(100.0), st.floats(1e-9, 100.0))
shapes = st.sampled_from([(1, 1), (1, 7), (3, 4), (4, 1, 2, 2), (2, 3, 5, 5), (5, 2, 3)])


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def words(value):
    """Identifier of a test's parameter: only texts name a case; functions and tensors differ between processes."""
    return value if isinstance(value, str) else "-"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, scale=1.0, dtype=torch.float64):
    """Normal numbers; the same ones in every dtype, up to rounding."""
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def uniform(seed, *shape, low=0.0, high=1.0, dtype=torch.float64):
    """Uniform numbers; the same ones in every dtype, up to rounding."""
    return (low + (high - low) * torch.rand(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def integers(seed, *shape, below):
    return torch.randint(below, shape, generator=generator(seed))


def inside_box(value, low, high):
    """The nearest numbers of the tensor's dtype that lie in the box."""
    ulp = torch.finfo(value.dtype).eps
    lowest, highest = (torch.tensor(b, dtype=torch.float64).to(value.dtype) for b in (low, high))
    if lowest.double() < low:
        lowest = (lowest.double() * (1 + math.copysign(ulp, low))).to(value.dtype)
    if highest.double() > high:
        highest = (highest.double() * (1 - math.copysign(ulp, high))).to(value.dtype)
    return torch.minimum(torch.maximum(value, lowest), highest)


def clean_inputs(seed, shape, bounds, dtype=torch.float64):
    """Inputs inside the bounds, a third of their entries at an edge (where there is one)."""
    low, high = (b if math.isfinite(b) else math.copysign(3.0, b) for b in bounds)
    spread = high - low
    x = uniform(seed, *shape, low=low - spread / 4, high=high + spread / 4, dtype=dtype)
    return inside_box(x, low, high)


@st.composite
def threats(draw, kinds=("Linf", "L2", "L1"), bounds=bounds):
    """A threat model of a usual budget for its bounds."""
    kind, box = draw(st.sampled_from(kinds)), draw(bounds)
    width = box[1] - box[0] if math.isfinite(box[1] - box[0]) else 1.0
    share = draw(st.sampled_from([1e-4, 8 / 255, 0.1, 0.5, 1.0]))
    if kind == "Linf":
        return Linf(share * width, bounds=box)
    if kind == "L2":
        return L2(2 * share * width, bounds=box, projection=draw(st.sampled_from(["box_ball", "ball_box"])))
    return L1(6 * share * width, bounds=box)


def rows(per_sample, like):
    """A value per sample, shaped to broadcast over the samples."""
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))
