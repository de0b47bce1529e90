"""The Euclidean ball."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import accumulator, cast_toward, divisor, wide
from perceptual_at._shapes import rows
from perceptual_at.threats.ball import Ball, flat, held, looks_are_free, pair, radii, shrink, stretched, surely_inside
from perceptual_at.threats.entries import Bounds, Entries, clamped


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class L2(Ball):
    r"""The Euclidean length of a sample's perturbation is at most `eps`, inside `bounds`.

    $$ \{x' : \|x' - x\|_2 \le \epsilon,\ l_i \le x'_i \le u_i\} $$

    Args:
        eps: largest Euclidean length, in input units; 128 / 255 is usual for CIFAR images in [0, 1]. A tensor
            `(B,)` gives every sample of a batch its own. With a tensor that broadcasts over the inputs the set is an
            ellipsoid, and entries with 0 never move; see `Ball`.
        bounds: smallest and largest input value; each a number, which may be infinite, or a tensor as for `eps`.
        projection: `"box_ball"` clips to the box, then shrinks into the ball (PGD-AT, the PGD-AT parts of RPAT and
            RAAT, and the original TRADES); `"ball_box"` shrinks, then clips (ReBAT, RPAT++, RAAT#, and the
            copies of TRADES and MART in Consistency-AT, RPAT and RAAT). Neither is the nearest point of the
            intersection; the two differ by up to 0.04 per entry at 128 / 255.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is negative, the bounds are no interval, or `projection` is unknown.

    Source:
        Madry et al. 2018, Sec. 2.

    Examples:
        >>> L2(128 / 255)
        L2(eps=128/255)
        >>> x = torch.zeros(1, 2)
        >>> L2(0.5).project(torch.tensor([[0.75, 1.0]]), x)  # a 3-4-5 triangle
        tensor([[0.3000, 0.4000]])
    """

    eps: Entries
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)
    projection: Literal["box_ball", "ball_box"] = dataclasses.field(default="box_ball", kw_only=True)
    p: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        Ball.__post_init__(self)
        _check.choice("L2", "projection", self.projection, ("box_ball", "ball_box"))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Allowed point for `x_adv` by clipping and radial shrinking, in the dtype of `x`.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, center = pair("L2.project", x_adv, x)
        y, (low, high) = held(y, center, self.units(x)), self.box(x)
        if self.projection == "box_ball":
            y = shrink(self, clamped(y, low, high), center, x.dtype)
        else:
            y = clamped(shrink(self, y, center, x.dtype), low, high)
        return cast_toward(y, x)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for centres that stay, as a function of the point alone, with less to do when all are inside."""
        if type(self) is not L2 or not looks_are_free(x) or self.units(x) is not None:
            return lambda point: self.project(point, x)
        low, high = self.box(x)

        def project(point: Tensor) -> Tensor:
            boxed = clamped(point, low, high)
            if surely_inside(self, boxed if self.projection == "box_ball" else point, x):
                return boxed
            return self.project(point, x)

        return project

    def steepest(self, grad: Tensor) -> Tensor:
        """The gradient divided by its Euclidean length; zero where it is zero. Infinity decides, NaN counts as 0."""
        units = self.units(grad)
        if units is None:
            return _unit("L2.steepest", grad)
        weight = units.weight.to(grad.dtype)
        return _unit("L2.steepest", grad * weight) * weight

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the ball around `x`, then projected."""
        _check.floating("L2.random_start", x=x)
        draws = _random.draws("L2.random_start", generator, x)
        direction = self._direction(draws.normal(tuple(x.shape), dtype=wide(x)))
        return self.project(x + self._spread(x, x.dtype) * direction * radii(self, x, draws), x)

    def far_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """A random direction, the whole way, as APGD starts."""
        draws = _random.draws("L2.far_start", generator, x)
        direction = self._direction(draws.normal(tuple(x.shape), dtype=wide(x)))
        return self.project(x + self._spread(x, wide(x)) * direction, x)

    def norm(self, delta: Tensor) -> Tensor:
        """Euclidean length of each sample, shape `(B,)`; in units of the largest `eps`, see `Ball`."""
        _check.floating("L2.norm", **{"the argument": delta})
        moved = rows(stretched(delta, self.units(delta)))
        if not moved.requires_grad:
            return _lengths(moved).to(wide(delta))
        nowhere = (moved.detach() == 0).all(dim=1)  # where torch has no second derivatives
        length = _lengths(torch.where(nowhere[:, None], 1.0, moved))
        return torch.where(nowhere, 0.0, length).to(wide(delta))

    def _direction(self, noise: Tensor) -> Tensor:
        """A point of the unit sphere, of the entries that may move."""
        return _unit("L2", held(noise, torch.zeros_like(noise), self.units(noise)))


def _lengths(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=accumulator(vectors))
    return length


def _unit(function: str, grad: Tensor) -> Tensor:
    """A vector divided by its length; zero where it is zero."""
    vector = flat(function, grad).nan_to_num()
    # The largest entry is divided out first: squares of small gradients would underflow.
    largest = vector.abs().amax(dim=1, keepdim=True) if vector.shape[1] else vector
    vector = vector / divisor(largest)
    length: Tensor = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return (vector / length.clamp_min(1.0)).reshape(grad.shape)
