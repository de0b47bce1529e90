"""The ball of sparse perturbations."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import accumulator, add_inward, cast_toward, wide
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.threats.ball import (
    Ball,
    Units,
    flat,
    held,
    looks_are_free,
    pair,
    radii,
    shrink,
    size_seen,
    slack,
    stretched,
    surely_inside,
)
from perceptual_at.threats.entries import Bounds, Entries, clamped, multipliable
from perceptual_at.threats.simplex import (
    filled,
    is_long,
    threshold,
    threshold_by_climbing,
    threshold_by_sorting,
)


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class L1(Ball):
    r"""The absolute changes of a sample's entries add up to at most `eps`, inside `bounds`.

    $$ \{x' : \textstyle\sum_i |x'_i - x_i| \le \epsilon,\ l_i \le x'_i \le u_i\} $$

    Args:
        eps: largest sum of absolute changes, in input units; 12 is usual for CIFAR images in [0, 1]. A tensor
            `(B,)` gives every sample of a batch its own. With a tensor that broadcasts over the inputs each entry
            reaches its own `eps` when it moves alone, and those with 0 never move; see `Ball`.
        bounds: smallest and largest input value; each a number, which may be infinite, or a tensor as for `eps`.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is negative or the bounds are no interval.

    Source:
        Croce and Hein 2021 ("Mind the box") for the intersection with the box.

    Examples:
        >>> L1(12)
        L1(eps=12)
        >>> x = torch.zeros(1, 3)
        >>> L1(1.0).project(torch.tensor([[1.0, 0.5, 0.0]]), x)  # both entries give up 1/4
        tensor([[0.7500, 0.2500, 0.0000]])
    """

    eps: Entries
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)
    p: ClassVar[float] = 1.0

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        r"""Nearest point of ball and box in Euclidean distance, in the dtype of `x`.

        An entry that wants to move by $a_i$ and can move by $c_i$ moves by $\min(\max(a_i - \lambda, 0), c_i)$;
        $\lambda$ is found exactly by sorting the places where that sum changes slope. Where entries have an `eps` of
        their own, distances are in units of the largest one too.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, center = pair("L1.project", x_adv, x)
        units = self.units(x)
        y = held(y, center, units)
        low, high = self.box(x)
        boxed = clamped(y, low, high)
        nearest = self._nearest(y, boxed, center, x, threshold_by_sorting)
        return cast_toward(shrink(self, nearest, center, x.dtype), x)

    def _settled(self, point: Tensor, x: Tensor) -> Tensor:
        """`project` of points that are outside by a rounding, if at all; long rows are looked at, not sorted."""
        free = looks_are_free(x) and is_long(rows(x))
        if type(self) is not L1 or not free or self.units(x) is not None:
            return self.project(point, x)
        low, high = self.box(x)
        boxed = clamped(point, low, high)
        outside = places(size_seen(self, boxed, x, x.dtype) > self._each(x))
        if not len(outside):
            return boxed
        some, center = self.select(outside), x[outside]
        nearest = some._pulled_in(point[outside], center, center, threshold)
        if not surely_inside(some, nearest, center):
            nearest = shrink(some, nearest, center, x.dtype)
        return boxed.index_copy(0, outside, nearest)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for centres that stay, up to rounding and without sorting, as a function of the point alone."""
        if type(self) is not L1 or not looks_are_free(x) or self.units(x) is not None:
            return lambda point: self.project(point, x)
        low, high = self.box(x)

        def project(point: Tensor) -> Tensor:
            boxed = clamped(point, low, high)
            if surely_inside(self, boxed, x):
                return boxed
            nearest = self._nearest(point, boxed, x, x, threshold_by_climbing)
            return nearest if surely_inside(self, nearest, x) else shrink(self, nearest, x, x.dtype)

        return project

    def steepest(self, grad: Tensor) -> Tensor:
        """The whole unit step in the entry with the largest gradient."""
        units = self.units(grad)
        weight = 1.0 if units is None else units.weight.to(grad.dtype)
        gain = flat("L1.steepest", grad if units is None else grad * weight)
        if not gain.shape[1]:
            return grad
        place = gain.abs().argmax(dim=1, keepdim=True)
        step = torch.zeros_like(gain).scatter(1, place, gain.gather(1, place).sign()).reshape(grad.shape)
        return step if units is None else step * weight

    def step(self, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """One ascent step that spends `step_size` where it gains most and pays where it loses least.

        The entry with the largest gradient may be at the edge of the box already, so the step goes to the entries
        in the order of their gradient, to each as far as it has room. What is then beyond the budget is taken
        back from the entries that gain least. Far from the edges of ball and box this is a step along
        `steepest`; on a linear function it ends at the best point of the set and stays there, which steps
        followed by the Euclidean projection do not.
        """
        units = self.units(x)
        low, high = self.box(x_adv)
        room = torch.where(grad > 0, high - x_adv, x_adv - low)
        delta = x_adv - x
        if units is not None:  # all in units of the largest `eps`
            free, scale = units.scale > 0, units.scale.to(grad.dtype)
            room, delta = (torch.where(free, part * scale, 0.0) for part in (room, delta))
            grad = grad * units.weight.to(grad.dtype)
        gain = flat("L1.step", grad)
        length = torch.as_tensor(step_size, dtype=gain.dtype, device=gain.device).reshape(-1, 1)
        moved = rows(delta) + gain.sign() * filled(rows(room).clamp_min(0).minimum(length), gain.abs(), length)
        size = moved.abs()
        excess = (size.sum(dim=1, keepdim=True) - self._column(x, size.dtype)).clamp_min(0)
        size = size - filled(size, -moved.sign() * gain, excess)
        moved = (moved.sign() * size).reshape(x.shape)
        return self._settled(x + (moved if units is None else moved * units.weight.to(moved.dtype)), x)

    def sparse(self, grad: Tensor, share: Tensor) -> Tensor:
        """Signs of the largest entries of the gradient, a `share` `(B,)` of all, of unit norm: where APGD steps."""
        units = self.units(grad)
        weight = 1.0 if units is None else units.weight.to(grad.dtype)
        gain = rows(grad if units is None else grad * weight)
        size, entries = gain.abs(), gain.shape[1]
        place = ((1 - share) * entries).long().clamp(0, entries - 1)
        rank = entries - 1 - place  # from the largest; how many to look at is known without waiting on CPUs only
        few = int(rank.max()) + 1 if rank.device.type == "cpu" else entries
        least = size.topk(few, dim=1).values.gather(1, rank[:, None])
        signs = gain.sign() * (size >= least)
        step = (signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1)).reshape(grad.shape)
        return step if units is None else step * weight

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the ball around `x`, then projected."""
        _check.floating("L1.random_start", x=x)
        draws = _random.draws("L1.random_start", generator, x)
        shape = tuple(rows(x).shape)
        sizes, signs = draws.exponential(shape, dtype=wide(x)), draws.signs(shape)
        units = self.units(x)
        if units is not None:
            sizes = sizes * rows((units.scale > 0).expand_as(x))
        total = sizes.sum(dim=1, keepdim=True)
        direction = (signs * sizes / (total if units is None else total.clamp_min(1e-30))).reshape(x.shape)
        return self._settled(x + self._spread(x, x.dtype) * direction * radii(self, x, draws), x)

    def far_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """The projection of normal noise, which is sparse, as APGD starts."""
        draws = _random.draws("L1.far_start", generator, x)
        return self.project(x + draws.normal(tuple(x.shape), dtype=wide(x)), x)

    def norm(self, delta: Tensor) -> Tensor:
        """Sum of the absolute entries of each sample, shape `(B,)`; in units of the largest `eps`, see `Ball`."""
        _check.floating("L1.norm", **{"the argument": delta})
        moved = rows(stretched(delta, self.units(delta)))
        return moved.abs().sum(dim=1, dtype=accumulator(moved)).to(wide(delta))

    def _nearest(self, y: Tensor, boxed: Tensor, center: Tensor, x: Tensor, solve: "_Solver") -> Tensor:
        """Nearest point of ball and box, up to the rounding of its norm; where `boxed` is inside, that."""
        outside = per_sample(size_seen(self, boxed, center, x.dtype) > self._each(x), y)
        return boxed.lerp(self._pulled_in(y, center, x, solve), outside.to(y.dtype))  # exact for shares of 0 and 1

    def _pulled_in(self, y: Tensor, center: Tensor, x: Tensor, solve: "_Solver") -> Tensor:
        """The same for points that are outside the ball."""
        low, high = self.box(x)
        delta = y - center
        signs = delta.sign()
        up, down = (multipliable(bound, delta) - center for bound in (high, low))
        room = torch.maximum(up * signs, down * signs).clamp_min_(0)  # not in place: only `signs` may be mapped
        units = self.units(x)
        wanted, room = _measured(delta.abs(), units), _measured(room, units)
        budget = self._column(x, wanted.dtype)
        less = solve(wanted, room, budget * (1 - slack(x.dtype, delta.dtype))).to(delta.dtype)
        moved = torch.minimum((wanted - less).clamp_min_(0), room).reshape(delta.shape)
        moved = moved if units is None else moved * units.weight.to(moved.dtype)
        return clamped(add_inward(center, moved * signs), low, high)

    def _column(self, x: Tensor, dtype: torch.dtype) -> Entries:
        """The budget of each row: a number, or a tensor `(B, 1)`."""
        eps = self._each(x)
        return eps.to(dtype).reshape(-1, 1) if isinstance(eps, Tensor) else eps


_Solver = Callable[[Tensor, Tensor, float | Tensor], Tensor]


def _measured(size: Tensor, units: Units | None) -> Tensor:
    """Sizes as rows, in units of the largest `eps`."""
    return rows(size if units is None else size * units.scale.to(size.dtype))
