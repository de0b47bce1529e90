"""The cube: every entry may move by so much."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from perceptual_at import _check, _random
from perceptual_at._rounding import add_inward, cast_toward, round_down, wide
from perceptual_at._shapes import per_sample, rows
from perceptual_at.threats.ball import Ball, flat, pair
from perceptual_at.threats.entries import Bounds, Entries, coarseness, exceeds, width


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class Linf(Ball):
    r"""Every input entry may move by at most `eps`, inside `bounds`.

    $$ \{x' : |x'_i - x_i| \le \epsilon_i,\ l_i \le x'_i \le u_i\} $$

    Args:
        eps: largest change of an entry, in input units: for images in [0, 1] write `Linf(eps=8 / 255)`. A tensor `(B,)`
            gives every sample of a batch its own; the threat then fits batches of that size only. A tensor with as
            many dimensions as the inputs broadcasts over them, see `Ball`; entries with 0 never move.
        bounds: smallest and largest input value; each a number, which may be infinite, or a tensor as for `eps`.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is negative or exceeds the input range, or the bounds are no interval.

    Source:
        Madry et al. 2018, Sec. 2.

    Examples:
        >>> Linf(8 / 255)
        Linf(eps=8/255)
        >>> x = torch.tensor([[0.5, 0.875]])
        >>> Linf(0.25).project(torch.tensor([[0.0, 2.0]]), x)
        tensor([[0.2500, 1.0000]])
        >>> Linf(torch.tensor([[0.25, 0.0]])).project(torch.tensor([[0.0, 2.0]]), x)
        tensor([[0.2500, 0.8750]])
    """

    eps: Entries
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)
    p: ClassVar[float] = math.inf
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self.bounds if _check.is_sequence(self.bounds) else ()
        rounding = coarseness(self.eps, *given)  # of the numbers as they came; what is kept may be wider
        Ball.__post_init__(self)
        if isinstance(self.eps, Tensor):
            if not self.eps.numel():
                return
            largest = float(self.eps.max())
        else:
            largest = self.eps
        if exceeds(largest, self.bounds, rounding):
            raise ValueError(
                f"Linf: `eps`={largest!r} exceeds the input range {self.bounds}. `eps` is in input units, not in "
                f"255ths: did you mean {largest:g} / 255?"
            )

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest allowed point (also in Euclidean distance), in the dtype of `x`; exact.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, _ = pair("Linf.project", x_adv, x)
        return cast_toward(y.clamp(*self.limits(x)), x)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for centres that stay, as a function of the point alone: one clamp."""
        if type(self) is not Linf:  # which may project otherwise
            return lambda point: self.project(point, x)
        return _Cube(self, x, *self.limits(x))

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that each entry can take, in the dtype to compute in: the corners of the set."""
        eps, (low, high) = self.eps, self.bounds
        if isinstance(eps, Tensor) or isinstance(low, Tensor) or isinstance(high, Tensor) or is_compiling():
            return Ball.limits(self, x)
        dtype = wide(x)
        low, high = -round_down(-low, x.dtype), round_down(high, x.dtype)
        reach = x.new_full((2, *[1] * x.ndim), round_down(eps, x.dtype), dtype=dtype)
        reach[0].neg_()  # both ends at once
        lower, upper = add_inward(x.to(dtype), reach).clamp(low, high).unbind()
        return lower, upper

    def steepest(self, grad: Tensor) -> Tensor:
        """The sign of the gradient: every entry moves by one, or by its share of the largest `eps`."""
        if not (isinstance(grad, Tensor) and grad.is_floating_point() and grad.ndim):
            _check.floating("Linf.steepest", grad=grad)
        units = self.units(grad) if isinstance(self.eps, Tensor) else None
        return grad.sign() if units is None else grad.sign() * units.weight.to(grad.dtype)

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the cube around `x`, then clipped to the box (as PGD-AT does)."""
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim):
            _check.floating("Linf.random_start", x=x)
        return self.around(x)(self._noisy(x, generator))

    def far_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform noise, scaled so that the largest entry is at the edge of the cube, as APGD starts."""
        noise = 2 * _random.draws("Linf.far_start", generator, x).uniform(tuple(x.shape), dtype=wide(x)) - 1
        noise = noise / per_sample(rows(noise).abs().amax(dim=1).clamp_min(1e-12), noise)
        return self.project(x + self._spread(x, wide(x)) * noise, x)

    def norm(self, delta: Tensor) -> Tensor:
        """Largest absolute entry of each sample, shape `(B,)`; in units of the largest `eps`, see `Ball`."""
        size = flat("Linf.norm", delta).abs()
        units = self.units(delta)
        if units is None:
            return size.amax(dim=1) if size.shape[1] else size.sum(dim=1)
        # A quotient by the entry's own `eps` is at most one exactly where the entry is inside.
        spread: Any = self._spread(delta, units.scale.dtype)  # a tensor, where there are units
        eps = rows(spread.expand_as(delta))
        share = torch.where(size == 0, 0.0, size.to(eps.dtype) / torch.where(size == 0, 1.0, eps)).amax(dim=1)
        length = share * eps.amax(dim=1)
        return cast_toward(length.nan_to_num(nan=math.inf), torch.zeros_like(length, dtype=wide(delta)))

    def scaled(self, factor: float) -> "Linf":
        """The same threat with `factor` times the budget, at most that of the whole box."""
        larger = Ball.scaled(self, factor)
        if factor <= 1:
            return larger
        side, eps = width(self.bounds), larger.eps
        return larger._with(eps=eps.clamp_max(side) if isinstance(eps, Tensor) else min(eps, side))

    def _noisy(self, x: Tensor, generator: _random.Generator | None) -> Tensor:
        """Uniform in the cube around `x`, whatever the box."""
        noise = _random.draws("Linf.random_start", generator, x).uniform(tuple(x.shape), dtype=wide(x))
        size = self._spread(x, x.dtype) if isinstance(self.eps, Tensor) else self.eps
        return x + size * (2 * noise - 1)


@dataclasses.dataclass(slots=True, eq=False)
class _Cube:
    """A cube around centres that stay, with its corners: called with a point, the nearest one inside."""

    threat: Linf
    x: Tensor
    lower: Tensor
    upper: Tensor

    def __call__(self, point: Tensor) -> Tensor:
        """The nearest point inside."""
        clamped = point.clamp(self.lower, self.upper)
        return clamped if clamped.dtype == self.x.dtype else cast_toward(clamped, self.x)

    def step(self, point: Tensor, grad: Tensor, length: float | Tensor) -> Tensor:
        """One step along `Linf.steepest`, then the nearest point inside."""
        if isinstance(self.threat.eps, Tensor) or isinstance(length, Tensor):
            return self(point + length * self.threat.steepest(grad))
        return self(torch.add(point, grad.sign(), alpha=length))  # the same: the product is exact

    def random_start(self, *, generator: _random.Generator | None = None) -> Tensor:
        """`Linf.random_start` around the centres."""
        return self(self.threat._noisy(self.x, generator))
