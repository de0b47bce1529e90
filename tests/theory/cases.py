"""Random maps with known properties, drawn from a seed, and the hypothesis settings of the theory tests."""

import itertools
import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

SEEDS = st.integers(0, 2**31 - 1)
ALPHAS = st.floats(0.01, 0.99)
ACTIVATIONS = {"tanh": torch.tanh, "softplus": nn.functional.softplus, "gelu": nn.functional.gelu,
               "silu": nn.functional.silu, "sin": torch.sin}  # fmt: skip
SMOOTH = st.sampled_from(sorted(ACTIVATIONS))
SCALES = st.sampled_from([1e-3, 8 / 255, 0.3, 1.0, 3.0])


def examples(count: int) -> settings:
    """The same `count` random examples in every run."""
    return settings(deadline=None, derandomize=True, max_examples=count)


def f64(values: float | list[float]) -> Tensor:
    """A tensor in float64."""
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int, batch: int, d: int, scale: float) -> tuple[Tensor, Tensor]:
    """Inputs `(batch, d)` and perturbations of Euclidean length `scale`."""
    x, delta = normal(seed + 7_000_000, 2, batch, d)  # not the numbers of the weights
    return x, scale * delta / delta.norm(dim=1, keepdim=True)


def smooth_net(seed: int, activation: str, sizes: tuple[int, ...] = (6, 12, 12, 4)):
    """A fully connected network with a smooth activation and weights of gain 1.5."""
    weights = [1.5 * normal(seed + i, n, m) / math.sqrt(n) for i, (n, m) in enumerate(itertools.pairwise(sizes))]
    biases = [0.3 * normal(seed + 100 + i, m) for i, m in enumerate(sizes[1:])]
    act = ACTIVATIONS[activation]

    def h(x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = x @ weight + bias
            x = act(x) if i + 1 < len(weights) else x
        return x

    return h


def filled(net: nn.Module, seed: int, gain: float = 1.4) -> nn.Module:
    """Fill a module with random weights and random batch-norm statistics, in float64 and eval mode."""
    net = net.double().eval()
    with torch.no_grad():
        for i, (name, values) in enumerate(net.state_dict().items()):
            if values.ndim > 1:
                values.copy_(gain * normal(seed + i, *values.shape) / math.sqrt(values[0].numel()))
            elif values.is_floating_point():
                around_zero = "bias" in name or "mean" in name
                values.copy_(normal(seed + i, *values.shape) * 0.3 + (0.0 if around_zero else 1.0)).abs_()
                if around_zero:
                    values.mul_(normal(seed + 500 + i, *values.shape).sign())
    return net


def relu_mlp(seed: int, sizes: tuple[int, ...] = (6, 12, 12, 4), activation=nn.ReLU) -> nn.Sequential:
    """A plain network of linear layers and ReLU-like activations."""
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), activation()]
    return filled(nn.Sequential(*layers[:-1]), seed)


def cnn(seed: int, activation=nn.ReLU, pool: type[nn.Module] | None = nn.AvgPool2d) -> nn.Sequential:
    """A small convolutional network with batch norm for 3 x 8 x 8 images."""
    middle = [] if pool is None else [pool(2)]
    size = 8 if pool is None else 4
    return filled(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), activation(), *middle,
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), activation(), nn.Flatten(), nn.Linear(6 * size**2, 5),
        ),
        seed,
    )  # fmt: skip


def polynomial(seed: int, degree: int, d: int = 4, outputs: int = 2):
    """A random polynomial map of full degree: a sum of powers of random linear forms."""
    forms = normal(seed, degree + 1, d, outputs) / 2
    return lambda x: sum((x @ forms[k]) ** k for k in range(degree + 1))


def spiral(t: Tensor, winding: float = 1.0) -> Tensor:
    """`t (cos 2 pi w t, sin 2 pi w t)`: at distance `t` from the start, and far from its chord."""
    return torch.cat([t * torch.cos(2 * math.pi * winding * t), t * torch.sin(2 * math.pi * winding * t)], dim=1)


ZERO, ONE = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
GRID = torch.linspace(0, 1, 201, dtype=torch.float64)
INSIDE = GRID[1:-1]


def on_unit_segment(g):
    """Arguments `(h, x, delta)` for a curve `g` on [0, 1], given as a function of `t` of shape (B, 1)."""
    return g, ZERO, ONE
