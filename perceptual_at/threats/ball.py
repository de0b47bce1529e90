"""What the three balls share."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import accumulator, add_inward, cast_toward, round_down, wide
from perceptual_at._shapes import per_sample, rows
from perceptual_at.threats.entries import (
    Bounds,
    Entries,
    box_over,
    checked_bounds,
    checked_eps,
    clamped,
    entries_text,
    over,
    per_row,
    plain_entries,
    rows_taken,
    same_entries,
    width,
)
from perceptual_at.threats.threat import budgets

Self = TypeVar("Self", bound="Ball")


class Units(NamedTuple):
    """How much the entries of a sample count where each has an `eps` of its own; both broadcast over the inputs."""

    weight: Tensor
    """Share of the sample's largest `eps`, from 0 to 1."""
    scale: Tensor
    """Its inverse; 0 for entries that must not move."""


class Ball:
    r"""What `Linf`, `L2` and `L1` have in common beyond the methods of `Threat`.

    `eps` and each of the two `bounds` are a number or a tensor. A tensor `(B,)` is one number per sample; one with as
    many dimensions as the inputs broadcasts over them: `(1, C, 1, 1)` per channel, `(1, N)` per feature,
    `(B, 1, 1, 1)` per sample. A tensor without dimensions is a number. Values are taken as they are held: 0.1 in
    float32 is a little more than 0.1, so give float64 where the numbers shall be those of Python.

    Where the entries of a sample have an `eps` of their own, lengths are measured in units of the largest one:

    $$ \|\delta\| = \epsilon_{\max} \, \| (\delta_i / \epsilon_i)_i \|_p, \qquad
       \|\delta\| \le \epsilon_{\max} \text{ is allowed} $$

    so that equal entries mean what one number means, `L2(eps / std)` on inputs that were divided by `std` is `L2(eps)`
    on those that were not, and entries with an `eps` of 0 never move. Steps and directions count in the same units:
    `steepest` moves an entry in proportion to its `eps` (in `L2` to its square, and to its gradient), and a step size
    is that of the entries with the largest.

    Examples:
        >>> x = torch.tensor([[0.5, 0.5]])
        >>> threat = Linf(torch.tensor([[0.25, 0.0]]))  # one `eps` per feature; the second is frozen
        >>> threat.project(torch.tensor([[0.0, 0.0]]), x)
        tensor([[0.2500, 0.5000]])
        >>> threat
        Linf(eps=<1x2: 0.25, 0>)
        >>> Linf(torch.tensor([0.25, 0.125])).select(torch.tensor([1]))
        Linf(eps=<1 values>)
    """

    __slots__ = ()
    p: ClassVar[float]
    """Order of the norm."""
    draws_per_sample: ClassVar[bool] = True
    """Whether `random_start` takes a `SampleGenerator`."""
    looks: ClassVar[bool] = True
    """Whether what `around` gives looks at numbers where that is free.

    Balls alone have it, which tells them apart in `threats.threat`, a module that they import.
    """
    eps: Entries
    bounds: Bounds

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "bounds", checked_bounds(name, self.bounds))
        object.__setattr__(self, "eps", checked_eps(name, self.eps))

    def __repr__(self) -> str:
        """Source text of the value, with `eps` in 255ths where it is a whole number of them."""
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # the balls are dataclasses
            value = getattr(self, field.name)
            if field.name == "eps":
                parts.append(f"eps={entries_text(value, in_255ths=True)}")
            elif not same_entries(value, field.default):
                shown = f"({', '.join(map(entries_text, value))})" if isinstance(value, tuple) else repr(value)
                parts.append(f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(same_entries(*pair) for pair in zip(_values(self), _values(other), strict=True))

    def __hash__(self) -> int:
        return hash((type(self), *map(plain_entries, _values(self))))

    @property
    def dual(self) -> float:
        """Order of the dual norm, in which gradients are measured."""
        return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[self.p]

    def scaled(self: Self, factor: float) -> Self:
        """The same threat with `factor` times the budget."""
        _check.number(f"{type(self).__name__}.scaled", "factor", factor, above=0.0)
        plain = type(factor) in (int, float, torch.SymFloat)  # others would spoil the repr
        return self._with(eps=self.eps * (factor if plain else float(factor)))

    def select(self: Self, rows: Tensor) -> Self:
        """The threat for some samples of its batch, by index or mask."""
        held = (self.eps, *self.bounds)
        if not any(map(per_row, held)):
            return self
        eps, low, high = (rows_taken(one, rows) for one in held)
        return self._with(eps=eps, bounds=(low, high))

    def budgets(self, x: Tensor) -> Tensor:
        """The largest `eps` of each sample, shape `(B,)`, in the dtype to compute in."""
        return budgets(type(self).__name__, self, x)

    def box(self, x: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Smallest and largest input values, numbers of the dtype of `x`; tensors broadcast over it."""
        return box_over(type(self).__name__, self.bounds, x)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that each entry can take, in the dtype to compute in: the corners of the set.

        In `Linf` everything between them is allowed, in the others each of them by itself.
        """
        center, reach, (low, high) = x.to(wide(x)), self._reach(x), self.box(x)
        return clamped(add_inward(center, -reach), low, high), clamped(add_inward(center, reach), low, high)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which points are inside ball and box, with no tolerance; boolean `(B,)`."""
        exact, name = accumulator(x), f"{type(self).__name__}.contains"
        _check.same_shape(name, x=x, x_adv=x_adv)
        point, (low, high) = x_adv.to(exact), self.box(x)
        boxed = (point >= low) & (point <= high)
        return (self.norm(point - x.to(exact)) <= self._each(x)) & rows(boxed).all(dim=1)

    def whole_box(self: Self, x: Tensor) -> Self:
        """The same kind of threat, large enough to reach every point of the box from every other.

        Where the box is infinite, the range of `x` takes its place. Entries with an `eps` of 0 stay where they are.
        """
        side = width(self.bounds)
        side = side if math.isfinite(side) else float(x.max() - x.min())
        entries = math.prod(x.shape[1:])
        reach = side * (entries ** (1 / self.p) if math.isfinite(self.p) else 1.0)
        return self._with(eps=(self.eps > 0) * reach if isinstance(self.eps, Tensor) else reach)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for centres that stay, as a function of the point alone; what depends on them is computed once."""
        return lambda point: self.project(point, x)  # type: ignore[attr-defined]  # every norm has its own

    def far_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Random point at the edge of the set, where `random_start` may be anywhere in it."""
        raise NotImplementedError  # every norm has its own

    def norm(self, delta: Tensor) -> Tensor:
        """Length of each sample's perturbation, shape `(B,)`."""
        raise NotImplementedError  # every norm has its own

    def units(self, x: Tensor) -> Units | None:
        """How much the entries of a sample count; None where all count alike."""
        if not isinstance(self.eps, Tensor) or math.prod(self.eps.shape[1:]) == 1:
            return None
        eps = over(type(self).__name__, "eps", self.eps, x).to(accumulator(x))
        largest = per_sample(rows(eps).amax(dim=1), eps)
        weight = torch.where(largest > 0, eps / largest, 0.0)
        return Units(weight, torch.where(eps > 0, largest / eps, 0.0))

    def _with(self: Self, **changes: Any) -> Self:
        """The value with other fields, which need no checks: those read the numbers."""
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    def _spread(self, x: Tensor, dtype: torch.dtype | None = None) -> Entries:
        """The budget, shaped to broadcast over `x`, and in a dtype if one is said."""
        if not isinstance(self.eps, Tensor):
            return self.eps
        eps = over(type(self).__name__, "eps", self.eps, x)
        return eps if dtype is None else eps.to(dtype)

    def _each(self, x: Tensor) -> Entries:
        """The largest budget of each sample: a number, or a tensor `(B,)` or `(1,)` with room for digits of `x`."""
        eps = self._spread(x)
        return rows(eps).amax(dim=1).to(accumulator(x)) if isinstance(eps, Tensor) else eps

    def _reach(self, x: Tensor) -> Tensor:
        """The budget as the largest number of the dtype of `x` that is not above it, shaped to broadcast over `x`."""
        eps = self._spread(x)
        if not isinstance(eps, Tensor):
            if not torch.compiler.is_compiling():
                return x.new_full((), round_down(eps, x.dtype), dtype=wide(x))
            eps = eps * x.new_ones((1,) * x.ndim, dtype=accumulator(x))  # in a graph the budget may be an input
        eps = eps.to(wide(eps))
        return cast_toward(eps, torch.zeros_like(eps, dtype=x.dtype)).to(wide(x))


def pair(function: str, x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, checked, in the dtype to compute in."""
    _check.same_shape(function, x=x, x_adv=x_adv)
    dtype = wide(x_adv, x)
    return x_adv.to(dtype), x.to(dtype)


def flat(function: str, value: Tensor) -> Tensor:
    """One row per sample, of a checked tensor."""
    _check.floating(function, **{"the argument": value})
    return rows(value)


def stretched(delta: Tensor, units: Units | None) -> Tensor:
    """A perturbation in units of the largest `eps`; infinite where an entry moved that must not."""
    if units is None:
        return delta
    wider = delta.to(units.scale.dtype)
    return torch.where((units.scale == 0) & (delta != 0), math.inf, wider * units.scale)


def held(point: Tensor, center: Tensor, units: Units | None) -> Tensor:
    """The point, with the entries that must not move at the centre."""
    return point if units is None else torch.where(units.scale == 0, center, point)


def slack(dtype: torch.dtype, working: torch.dtype) -> float:
    """Share of the budget given up so that the norm stays below `eps` however it is computed.

    One rounding of every entry in the dtype of the inputs, which is that of a difference taken in it, and a few of the
    working dtype for sums.
    """
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(working).eps


def shrink(ball: Ball, y: Tensor, center: Tensor, dtype: torch.dtype) -> Tensor:
    """Move points that are outside the ball straight towards its centre until they are inside."""
    size = size_seen(ball, y, center, dtype)
    eps = ball._each(y)
    outside = size > eps
    inner, one = eps * (1 - slack(dtype, y.dtype)), torch.ones_like(size)
    # Not by the size of a point at the centre, which is 0 and would give all of its batch a gradient of NaN.
    factor = torch.where(outside, inner / torch.where(outside, size, one), one).to(y.dtype)
    moved = add_inward(center, (y - center) * per_sample(factor, y))
    return y.lerp(moved, per_sample(outside, y).to(y.dtype))  # exact for shares of 0 and 1


def size_seen(ball: Ball, y: Tensor, center: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm of `y - center`: the larger of the exact one and the one a reader of `dtype` would see."""
    exact = accumulator(y)
    return torch.maximum(ball.norm(y.to(exact) - center.to(exact)), ball.norm(y.to(dtype) - center.to(dtype)).to(exact))


def surely_inside(ball: Ball, point: Tensor, center: Tensor) -> bool:
    """Whether all are inside, however the norm is computed."""
    size = ball.norm((point - center).to(accumulator(point)))
    return bool((size <= ball._each(point) * (1 - 2 * torch.finfo(point.dtype).eps)).all())


def looks_are_free(x: Tensor) -> bool:
    """Whether numbers can be looked at without waiting, in the dtype that is computed in."""
    return x.device.type == "cpu" and x.dtype == wide(x) and x.numel() > 0 and not torch.compiler.is_compiling()


def radii(ball: Ball, x: Tensor, draws: _random.Draws) -> Tensor:
    """Radius of a uniform point in the unit ball of the entries that may move, shaped to broadcast over `x`."""
    units = ball.units(x)
    if units is None:
        return per_sample(draws.radius(max(1, math.prod(x.shape[1:])), dtype=wide(x)), x)
    free = rows((units.scale > 0).expand_as(x)).sum(dim=1).clamp_min(1)
    return per_sample(draws.radius(1, dtype=wide(x)) ** (1 / free), x)


def _values(ball: Any) -> list[Any]:
    return [getattr(ball, field.name) for field in dataclasses.fields(ball)]
