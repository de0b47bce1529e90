"""Certificates of ReLU networks: what no attack inside a box can fall below, in double precision.

`lowest_margins` bounds each logit difference from below by a linear relaxation that is carried back from the output to
the input (CROWN, DeepPoly). `exact.py` decides small networks exactly, with these bounds as its constants.

Networks are traced by `torch.fx` and may be made of linear layers, convolutions, batch norm, average pooling,
normalisation and ReLUs, with residual sums.
"""

import copy
import operator
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at.models import Normalize

AFFINE = (
    nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, Normalize,
)  # fmt: skip
RELUS = (torch.relu, functional.relu, "relu")
SUMS = (operator.add, torch.add, "add")
ALLOWANCE = 1e-4
"""A margin has to be larger than this to count as certified: logits in single precision are not exact."""
REACH = 2.0**-23
"""Boxes are larger than the ball by this, which the rounding of a point in single precision may add to it."""
CHUNK = 256

Bounds = list[tuple[Tensor, Tensor]]
"""Smallest and largest value of every step, each of the shape of one sample."""


class Step(NamedTuple):
    """One operation of a network."""

    kind: str
    """`"input"`, `"affine"`, `"relu"` or `"sum"`."""
    sources: tuple[int, ...] = ()
    """Places of the steps whose values it takes."""
    module: nn.Module | None = None
    """Of an affine step."""


Steps = tuple[Step, ...]


def steps_of(model: nn.Module) -> Steps:
    """The operations of a network in eval mode, in double precision.

    Raises:
        TypeError: if it does something else than these certificates know.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    modules = dict(model.named_modules())
    places: dict[torch.fx.Node, int] = {}
    found: list[Step] = []
    for node in _Tracer().trace(model).nodes:
        if node.op == "output":
            if places[node.args[0]] != len(found) - 1:
                raise TypeError("steps_of: the last operation of the model must be its output.")
            continue
        sources = tuple(places[one] for one in node.all_input_nodes)
        module = modules[node.target] if node.op == "call_module" else None
        if node.op == "placeholder":
            step = Step("input")
        elif isinstance(module, AFFINE):
            step = Step("affine", sources, module)
        elif isinstance(module, nn.ReLU) or node.target in RELUS:
            step = Step("relu", sources)
        elif node.target in SUMS and len(sources) == 2:
            step = Step("sum", sources)
        elif node.target in (torch.flatten, "flatten") and node.args[1:] == (1,):
            step = Step("affine", sources, nn.Flatten())
        else:
            raise TypeError(f"steps_of: the certificates know no {type(module).__name__ if module else node.target}.")
        places[node] = len(found)
        found.append(step)
    return tuple(found)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AFFINE) or super().is_leaf_module(m, module_qualified_name)


def box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The corners of what an attack on an image in [0, 1] may reach, rounding included."""
    center = x.double()
    return (center - eps - REACH).clamp_min(0), (center + eps + REACH).clamp_max(1)


def bounds_of(steps: Steps, low: Tensor, high: Tensor, *, relaxed: bool = True) -> Bounds:
    """Bounds of every step's value on a box: intervals, and where ReLUs stay open, those of the relaxation.

    Args:
        steps: of the network.
        low: smallest inputs, the shape of one sample.
        high: largest ones.
        relaxed: False leaves it at intervals.
    """
    bounds: Bounds = []
    bent: list[bool] = []  # whether there is a ReLU on the way to a step
    rectified = {step.sources[0] for step in steps if step.kind == "relu"}
    for place, step in enumerate(steps):
        bounds.append(_interval(step, bounds, low, high))
        bent.append(step.kind == "relu" or any(bent[source] for source in step.sources))
        if relaxed and place in rectified and bent[place]:
            bounds[place] = _tightened(steps, bounds, place)
    return bounds


def lowest_margins(steps: Steps, bounds: Bounds, label: int) -> Tensor:
    """Lower bounds of the logit of `label` minus each logit, `(K,)`; infinity for itself."""
    classes = bounds[-1][0].numel()
    differences = torch.zeros(classes, classes, dtype=torch.float64)
    differences[:, label] += 1
    differences -= torch.eye(classes, dtype=torch.float64)
    lowest = lower_bounds(steps, bounds, len(steps) - 1, differences)
    lowest[label] = torch.inf
    return lowest


def lower_bounds(steps: Steps, bounds: Bounds, place: int, weights: Tensor) -> Tensor:
    """Lower bounds of weighted sums of a step's values on the box, `(S,)`; `weights` are `(S, ...)`.

    Each ReLU that may be open or shut lies between two lines: from below 0 or the identity, whichever leaves the
    smaller triangle, from above the chord. Which one bounds the sum depends on the sign of its weight.
    """
    held = {place: weights}
    total = torch.zeros(len(weights), dtype=torch.float64)
    for at in range(place, -1, -1):
        if at not in held:
            continue
        step, weight = steps[at], held.pop(at)
        positive, negative = weight.clamp_min(0), weight.clamp_max(0)
        if step.kind == "input":
            low, high = bounds[at]
            total += (positive * low + negative * high).flatten(1).sum(dim=1)
        elif step.kind == "affine":
            source = bounds[step.sources[0]][0]
            point = source.new_zeros(len(weight), *source.shape).requires_grad_()
            value = step.module(point)
            (back,) = torch.autograd.grad(value, point, weight)
            total += (weight * value.detach()).flatten(1).sum(dim=1)
            _add(held, step.sources[0], back)
        elif step.kind == "sum":
            for source in step.sources:
                _add(held, source, weight)
        else:
            low, high = bounds[step.sources[0]]
            chord = torch.where(low >= 0, 1.0, high.clamp_min(0) / (high.clamp_min(0) - low).clamp_min(1e-300))
            rise = torch.where((low < 0) & (high > 0), -low * chord, 0.0)
            below = torch.where((low >= 0) | ((high > 0) & (high > -low)), 1.0, 0.0).double()
            total += (negative * rise).flatten(1).sum(dim=1)
            _add(held, step.sources[0], positive * below + negative * chord)
    return total


def _add(held: dict[int, Tensor], place: int, weight: Tensor) -> None:
    held[place] = held[place] + weight if place in held else weight


def _interval(step: Step, bounds: Bounds, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Of a step, from those of its sources."""
    if step.kind == "input":
        return low.double(), high.double()
    lows, highs = zip(*(bounds[source] for source in step.sources), strict=True)
    if step.kind == "relu":
        return lows[0].clamp_min(0), highs[0].clamp_min(0)
    if step.kind == "sum":
        return lows[0] + lows[1], highs[0] + highs[1]
    center = step.module((lows[0] + highs[0])[None] / 2)[0]
    radius = _sizes(step.module)((highs[0] - lows[0])[None] / 2)[0]
    return center - radius, center + radius


def _sizes(module: nn.Module) -> nn.Module:
    """The layer that maps half the width of an interval to that of what comes out: absolute weights, no constants."""
    sizes = copy.deepcopy(module)
    if isinstance(sizes, nn.Linear | nn.Conv2d):
        sizes.weight.abs_()
        sizes.bias = None
    elif isinstance(sizes, nn.BatchNorm1d | nn.BatchNorm2d):
        sizes.running_mean.zero_()
        if sizes.affine:
            sizes.weight.abs_()
            sizes.bias.zero_()
    elif isinstance(sizes, Normalize):
        sizes.mean.zero_()
    return sizes


def _tightened(steps: Steps, bounds: Bounds, place: int) -> tuple[Tensor, Tensor]:
    """The bounds of a step, those of entries with either sign by the relaxation."""
    low, high = (bound.flatten().clone() for bound in bounds[place])
    shape = bounds[place][0].shape
    for entries in ((low < 0) & (high > 0)).nonzero().squeeze(1).split(CHUNK):
        chosen = torch.zeros(len(entries), low.numel(), dtype=torch.float64)
        chosen[torch.arange(len(entries)), entries] = 1
        both = torch.cat([chosen, -chosen]).reshape(-1, *shape)
        below, above = lower_bounds(steps, bounds, place, both).chunk(2)
        low[entries] = torch.maximum(low[entries], below)
        high[entries] = torch.minimum(high[entries], -above)
    return low.reshape(shape), high.reshape(shape)
