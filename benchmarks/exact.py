"""Exact verification of small ReLU networks by mixed-integer programming, which needs SciPy (HiGHS).

One binary for each ReLU that the box leaves open, with the bounds of the relaxation as big-M constants.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from certificates import ALLOWANCE, CHUNK, Bounds, Steps, lowest_margins
from scipy import sparse
from scipy.optimize import Bounds as Range
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

Matrices = dict[int, tuple[Any, np.ndarray]]
"""Affine steps by their place: sparse matrix, and what is added."""


class Decided(NamedTuple):
    """What mixed-integer programming says of a sample."""

    verdict: str
    """`"robust"`, `"broken"` or `"undecided"`."""
    point: Tensor | None
    """In single precision, inside the ball, where the network is wrong; for `"broken"`."""
    seconds: float


def open_relus(steps: Steps, bounds: Bounds) -> int:
    """How many ReLUs the box leaves open: the binaries of the program."""
    sources = {step.sources[0] for step in steps if step.kind == "relu"}
    return sum(int(((bounds[source][0] < 0) & (bounds[source][1] > 0)).sum()) for source in sources)


def matrices_of(steps: Steps, shape: Sequence[int]) -> Matrices:
    """Every affine step as a sparse matrix with what it adds, by its place; `shape` is that of one sample."""
    shapes, found = [torch.Size(shape)], {}
    for place, step in enumerate(steps[1:], 1):
        shape = shapes[step.sources[0]]
        if step.kind == "affine":
            added = step.module(torch.zeros(1, *shape, dtype=torch.float64))
            points = torch.eye(shape.numel(), dtype=torch.float64).split(CHUNK)
            columns = [(step.module(part.reshape(-1, *shape)) - added).flatten(1).numpy() for part in points]
            matrix = sparse.vstack([sparse.csr_array(part) for part in columns]).T.tocsr()
            found[place] = matrix, added.flatten().numpy()
            shape = added.shape[1:]
        shapes.append(shape)
    return found


def smallest_margin(
    steps: Steps,
    matrices: Matrices,
    bounds: Bounds,
    label: int,
    other: int,
    *,
    below: float | None = None,
    seconds: float = 60.0,
) -> tuple[float, np.ndarray | None]:
    """The smallest difference of two logits on the box: what is proved to be a lower bound of it, and where it is.

    Args:
        steps: of the network.
        matrices: its affine steps, from `matrices_of`.
        bounds: from `bounds_of`, on the box.
        label: the logit to be small.
        other: the one to be large.
        below: look only for differences up to this, and stop at the first; infinity as the bound then says that there
            is none.
        seconds: limit of the search.

    Returns:
        The bound, and the best input found, flat; None where there is none.
    """
    program = _Program(steps, matrices, bounds)
    objective = np.zeros(program.size)
    objective[program.first[-1] + label], objective[program.first[-1] + other] = 1.0, -1.0
    constraints = [program.constraint()]
    if below is not None:
        constraints.append(LinearConstraint(objective[None], -np.inf, below))
    found = milp(
        objective, integrality=program.whole, bounds=Range(program.low, program.high), constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 0.0 if below is None else 1e9},
    )  # fmt: skip
    point = None if found.x is None else found.x[: bounds[0][0].numel()]
    if found.status == 2:  # infeasible
        return np.inf, None
    bound = found.mip_dual_bound if program.whole.any() else found.fun if found.status == 0 else None
    return (-np.inf if bound is None else float(bound)), point


def decide(
    model: Callable[[Tensor], Tensor],
    steps: Steps,
    matrices: Matrices,
    bounds: Bounds,
    label: int,
    *,
    project: Callable[[Tensor], Tensor],
    seconds: float = 60.0,
) -> Decided:
    """Whether there is a point of the ball that the network takes for another class.

    Only classes that the relaxation does not rule out are looked at. A sample is broken if the network itself, in
    single precision, is wrong at the point found once `project` has put it into the ball, and robust if no margin of
    `ALLOWANCE` or less is possible in the box. What is neither in the time given is undecided.
    """
    began, doubt = time.perf_counter(), False
    lowest = lowest_margins(steps, bounds, label)
    for other in lowest.argsort().tolist():
        if lowest[other] > ALLOWANCE:
            break
        left = seconds - (time.perf_counter() - began)
        if left <= 0:
            doubt = True
            break
        bound, point = smallest_margin(steps, matrices, bounds, label, other, below=ALLOWANCE, seconds=left)
        if point is not None:
            tried = project(torch.from_numpy(point).float().reshape(1, *bounds[0][0].shape))
            if int(model(tried).argmax()) != label:
                return Decided("broken", tried[0], time.perf_counter() - began)
        doubt |= bound <= ALLOWANCE
    return Decided("undecided" if doubt else "robust", None, time.perf_counter() - began)


class _Program:
    """The network on a box as linear constraints on variables, some of them 0 or 1."""

    def __init__(self, steps: Steps, matrices: Matrices, bounds: Bounds) -> None:
        self.steps, self.matrices = steps, matrices
        flat = [tuple(bound.flatten().numpy() for bound in pair) for pair in bounds]
        self.first = np.cumsum([0, *(len(low) for low, _ in flat)])[:-1].tolist()
        self.values = self.first[-1] + len(flat[-1][0])
        self.opened = {
            place: np.flatnonzero((flat[step.sources[0]][0] < 0) & (flat[step.sources[0]][1] > 0))
            for place, step in enumerate(steps) if step.kind == "relu"
        }  # fmt: skip
        binaries = sum(map(len, self.opened.values()))
        self.size = self.values + binaries
        self.low = np.concatenate([*(low for low, _ in flat), np.zeros(binaries)])
        self.high = np.concatenate([*(high for _, high in flat), np.ones(binaries)])
        self.whole = np.concatenate([np.zeros(self.values), np.ones(binaries)])
        self.flat = flat

    def constraint(self) -> Any:
        """What ties the values of the steps together."""
        parts, lows, highs, binary = [], [], [], self.values
        for place, step in enumerate(self.steps):
            if step.kind == "affine":
                matrix, added = self.matrices[place]
                parts.append(self._rows([(place, sparse.eye_array(len(added))), (step.sources[0], -matrix)]))
                lows.append(added)
                highs.append(added)
            elif step.kind == "sum":
                one = sparse.eye_array(len(self.flat[place][0]))
                parts.append(self._rows([(place, one), *((source, -one) for source in step.sources)]))
                lows.append(np.zeros(one.shape[0]))
                highs.append(np.zeros(one.shape[0]))
            elif step.kind == "relu":
                for rows, low, high in self._relu(place, binary):
                    parts.append(rows)
                    lows.append(low)
                    highs.append(high)
                binary += len(self.opened[place])
        return LinearConstraint(sparse.vstack(parts).tocsr(), np.concatenate(lows), np.concatenate(highs))

    def _relu(self, place: int, binary: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """`a = z` where open for sure; `a >= z`, `a <= z - l (1 - d)`, `a <= u d` where the binary `d` decides."""
        source = self.steps[place].sources[0]
        low, high = self.flat[source]
        identity = sparse.eye_array(len(low)).tocsr()
        passing, opened = np.flatnonzero(low >= 0), self.opened[place]
        same = self._rows([(place, identity[passing]), (source, -identity[passing])])
        chosen = identity[opened]
        above = self._rows([(place, chosen), (source, -chosen)])
        switch = sparse.eye_array(len(opened), self.size, k=binary).tocsr()
        low, high = low[opened], high[opened]
        anything = np.full(len(opened), np.inf)
        return [
            (same, np.zeros(len(passing)), np.zeros(len(passing))),
            (above, np.zeros(len(opened)), anything),
            (above - sparse.diags_array(low) @ switch, -anything, -low),
            (self._rows([(place, chosen)]) - sparse.diags_array(high) @ switch, -anything, np.zeros(len(opened))),
        ]

    def _rows(self, blocks: Sequence[tuple[int, Any]]) -> Any:
        """Rows of the constraint matrix, from what multiplies the values of some steps."""
        height = blocks[0][1].shape[0]
        total = sparse.csr_array((height, self.size))
        for place, block in blocks:
            block = sparse.coo_array(block)
            total = total + sparse.csr_array(
                (block.data, (block.row, block.col + self.first[place])), shape=(height, self.size)
            )
        return total
