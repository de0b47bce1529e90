"""Threat models: how far an adversarial input may be from the clean one, and all geometry that follows.

A threat model is a small frozen value. `pgd` needs five things of it (see `Threat`), so a new one takes
about fifteen lines. Every `project` here returns points that are inside the ball and the box exactly: with
`delta = x_adv - x`, `threat.norm(delta) <= threat.eps` holds with no tolerance in float64, float32, float16
and bfloat16, whether the difference is taken in the dtype of the inputs or in a wider one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import accumulator, add_inward, cast_toward, round_down, wide
from perceptual_at._shapes import per_sample, rows

Bounds = tuple[float, float]
Ball = TypeVar("Ball", "Linf", "L2", "L1")
_MOST_ROUNDS = 200  # five to ten are usual


@runtime_checkable
class Threat(Protocol):
    """What an attack needs to know about a threat model.

    Implement these and `pgd` accepts it; `eps` (a number) is needed too when the step size is left to
    `pgd`, and `bounds` when inputs are to be validated. A threat may add
    `step(x_adv, x, grad, step_size)`, one projected ascent step, where moving along `steepest` and
    projecting is not the best it can do (`L1` does).

    Examples:
        >>> class FirstEntry:  # anything may happen to the first entry, nothing to the others
        ...     eps = 1.0
        ...     def project(self, x_adv, x):
        ...         return torch.cat([x_adv[:, :1].clamp(0, 1), x[:, 1:]], dim=1)
        ...     def steepest(self, grad):
        ...         return grad.sign()
        ...     def random_start(self, x, *, generator=None):
        ...         return x
        ...     def norm(self, delta):
        ...         return delta.abs().amax(dim=1)
        ...     def scaled(self, factor):
        ...         return self
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> pgd(model, torch.full((1, 3), 0.5), torch.tensor([0]), FirstEntry())
        tensor([[0.0000, 0.5000, 0.5000]])
    """

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Allowed point for `x_adv`, in the dtype of `x`; allowed points stay as they are."""

    def steepest(self, grad: Tensor) -> Tensor:
        """Step of unit norm with the largest inner product with `grad`."""

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Random allowed point around `x`."""

    def norm(self, delta: Tensor) -> Tensor:
        """Length of each sample's perturbation, shape `(B,)`."""

    def scaled(self, factor: float) -> "Threat":
        """The same threat with `factor` times the budget."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Linf:
    r"""Every input entry may move by at most `eps`, inside `bounds`.

    $$ \{x' : \max_i |x'_i - x_i| \le \epsilon,\ l \le x'_i \le u\} $$

    Args:
        eps: largest change of an entry, in input units: for images in [0, 1] write `Linf(eps=8 / 255)`. A tensor
            `(B,)` gives every sample of a batch its own; the threat then fits batches of that size only.
        bounds: smallest and largest input value; may be infinite.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is not positive or exceeds the input range, or the bounds are no interval.

    Source:
        Madry et al. 2018, Sec. 2.

    Examples:
        >>> Linf(8 / 255)
        Linf(eps=8/255)
        >>> x = torch.tensor([[0.5, 0.875]])
        >>> Linf(0.25).project(torch.tensor([[0.0, 2.0]]), x)
        tensor([[0.2500, 1.0000]])
    """

    eps: float | Tensor
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)

    def __post_init__(self) -> None:
        _check_ball(self)
        largest = float(self.eps.max()) if isinstance(self.eps, Tensor) and len(self.eps) else self.eps
        if not isinstance(largest, Tensor) and largest > self.bounds[1] - self.bounds[0]:
            raise ValueError(
                f"Linf: `eps`={largest!r} exceeds the input range {self.bounds}. `eps` is in input units, not in "
                f"255ths: did you mean {largest:g} / 255?"
            )

    def __repr__(self) -> str:
        return _describe(self)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest allowed point (also in Euclidean distance), in the dtype of `x`; exact.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, center = _pair("Linf.project", x_adv, x)
        return cast_toward(y.clamp(*_limits(self, center, x.dtype)), x)

    def steepest(self, grad: Tensor) -> Tensor:
        """The sign of the gradient: every entry moves by one."""
        _check.floating("Linf.steepest", grad=grad)
        return grad.sign()

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the cube around `x`, then clipped to the box (as PGD-AT does)."""
        _check.floating("Linf.random_start", x=x)
        noise = _random.draws("Linf.random_start", generator, x).uniform(tuple(x.shape), dtype=wide(x))
        return self.project(x + _budget(self, x) * (2 * noise - 1), x)

    def norm(self, delta: Tensor) -> Tensor:
        """Largest absolute entry of each sample, shape `(B,)`."""
        flat = _flat("Linf.norm", delta)
        return flat.abs().amax(dim=1) if flat.shape[1] else flat.sum(dim=1)

    def scaled(self, factor: float) -> "Linf":
        """The same threat with `factor` times the budget."""
        return _scaled(self, factor)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class L2:
    r"""The Euclidean length of a sample's perturbation is at most `eps`, inside `bounds`.

    $$ \{x' : \|x' - x\|_2 \le \epsilon,\ l \le x'_i \le u\} $$

    Args:
        eps: largest Euclidean length, in input units; 128 / 255 is usual for CIFAR images in [0, 1]. A tensor
            `(B,)` gives every sample of a batch its own.
        bounds: smallest and largest input value; may be infinite.
        projection: `"box_ball"` clips to the box, then shrinks into the ball (PGD-AT, the PGD-AT parts of RPAT and
            RAAT, and the original TRADES); `"ball_box"` shrinks, then clips (ReBAT, RPAT++, RAAT#, and the
            copies of TRADES and MART in Consistency-AT, RPAT and RAAT). Neither is the nearest point of the
            intersection; the two differ by up to 0.04 per entry at 128 / 255.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is not positive, the bounds are no interval, or `projection` is unknown.

    Source:
        Madry et al. 2018, Sec. 2.

    Examples:
        >>> L2(128 / 255)
        L2(eps=128/255)
        >>> x = torch.zeros(1, 2)
        >>> L2(0.5).project(torch.tensor([[0.75, 1.0]]), x)  # a 3-4-5 triangle
        tensor([[0.3000, 0.4000]])
    """

    eps: float | Tensor
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)
    projection: Literal["box_ball", "ball_box"] = dataclasses.field(default="box_ball", kw_only=True)

    def __post_init__(self) -> None:
        _check_ball(self)
        _check.choice("L2", "projection", self.projection, ("box_ball", "ball_box"))

    def __repr__(self) -> str:
        return _describe(self)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Allowed point for `x_adv` by clipping and radial shrinking, in the dtype of `x`.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, center = _pair("L2.project", x_adv, x)
        low, high = _box(self.bounds, x.dtype)
        if self.projection == "box_ball":
            y = _shrink(self, y.clamp(low, high), center, x.dtype)
        else:
            y = _shrink(self, y, center, x.dtype).clamp(low, high)
        return cast_toward(y, x)

    def steepest(self, grad: Tensor) -> Tensor:
        """The gradient divided by its Euclidean length; zero where it is zero."""
        flat = _flat("L2.steepest", grad)
        # The largest entry is divided out first: squares of small gradients would underflow.
        largest = flat.abs().amax(dim=1, keepdim=True) if flat.shape[1] else flat
        flat = flat / torch.where(largest > 0, largest, torch.ones_like(largest))
        length: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return (flat / length.clamp_min(1.0)).reshape(grad.shape)

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the ball around `x`, then projected."""
        _check.floating("L2.random_start", x=x)
        draws = _random.draws("L2.random_start", generator, x)
        direction = self.steepest(draws.normal(tuple(x.shape), dtype=wide(x)))
        return self.project(x + _budget(self, x) * direction * _radius(x, draws), x)

    def norm(self, delta: Tensor) -> Tensor:
        """Euclidean length of each sample, shape `(B,)`."""
        flat = _flat("L2.norm", delta)
        length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=accumulator(flat))
        return length.to(wide(delta))

    def scaled(self, factor: float) -> "L2":
        """The same threat with `factor` times the budget."""
        return _scaled(self, factor)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class L1:
    r"""The absolute changes of a sample's entries add up to at most `eps`, inside `bounds`.

    $$ \{x' : \textstyle\sum_i |x'_i - x_i| \le \epsilon,\ l \le x'_i \le u\} $$

    Args:
        eps: largest sum of absolute changes, in input units; 12 is usual for CIFAR images in [0, 1]. A tensor
            `(B,)` gives every sample of a batch its own.
        bounds: smallest and largest input value; may be infinite.

    Raises:
        TypeError: if `eps` or a bound is no number.
        ValueError: if `eps` is not positive or the bounds are no interval.

    Source:
        Croce and Hein 2021 ("Mind the box") for the intersection with the box.

    Examples:
        >>> L1(12)
        L1(eps=12)
        >>> x = torch.zeros(1, 3)
        >>> L1(1.0).project(torch.tensor([[1.0, 0.5, 0.0]]), x)  # both entries give up 1/4
        tensor([[0.7500, 0.2500, 0.0000]])
    """

    eps: float | Tensor
    bounds: Bounds = dataclasses.field(default=(0.0, 1.0), kw_only=True)

    def __post_init__(self) -> None:
        _check_ball(self)

    def __repr__(self) -> str:
        return _describe(self)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        r"""Nearest point of ball and box in Euclidean distance, in the dtype of `x`.

        An entry that wants to move by $a_i$ and can move by $c_i$ moves by $\min(\max(a_i - \lambda, 0), c_i)$;
        $\lambda$ is found exactly by sorting the places where that sum changes slope.

        Args:
            x_adv: points to project, shape `(B, ...)`.
            x: centres of the balls, the same shape, inside the bounds.
        """
        y, center = _pair("L1.project", x_adv, x)
        boxed = y.clamp(*_box(self.bounds, x.dtype))
        nearest = _nearest(self, y, boxed, center, x.dtype, _threshold)
        return cast_toward(_shrink(self, nearest, center, x.dtype), x)

    def steepest(self, grad: Tensor) -> Tensor:
        """The whole unit step in the entry with the largest gradient."""
        flat = _flat("L1.steepest", grad)
        if not flat.shape[1]:
            return grad
        place = flat.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, place, flat.gather(1, place).sign()).reshape(grad.shape)

    def step(self, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """One ascent step that spends `step_size` where it gains most and pays where it loses least.

        The entry with the largest gradient may be at the edge of the box already, so the step goes to the entries
        in the order of their gradient, to each as far as it has room. What is then beyond the budget is taken
        back from the entries that gain least. Far from the edges of ball and box this is a step along
        `steepest`; on a linear function it ends at the best point of the set and stays there, which steps
        followed by the Euclidean projection do not.
        """
        low, high = _box(self.bounds, x_adv.dtype)
        gain = _flat("L1.step", grad)
        order = gain.abs().argsort(dim=1, descending=True)
        length = torch.as_tensor(step_size, dtype=gain.dtype, device=gain.device).reshape(-1, 1)
        room = rows(torch.where(grad > 0, high - x_adv, x_adv - low)).clamp_min(0).minimum(length)
        delta = rows(x_adv - x) + gain.sign() * _fill(room, order, length)
        size = delta.abs()
        excess = (size.sum(dim=1, keepdim=True) - _budget(self, size)).clamp_min(0)
        size = size - _fill(size, (delta.sign() * gain).argsort(dim=1), excess)
        return self.project(x + (delta.sign() * size).reshape(x.shape), x)

    def random_start(self, x: Tensor, *, generator: _random.Generator | None = None) -> Tensor:
        """Uniform in the ball around `x`, then projected."""
        _check.floating("L1.random_start", x=x)
        draws = _random.draws("L1.random_start", generator, x)
        shape = tuple(rows(x).shape)
        sizes, signs = draws.exponential(shape, dtype=wide(x)), draws.signs(shape)
        direction = (signs * sizes / sizes.sum(dim=1, keepdim=True)).reshape(x.shape)
        return self.project(x + _budget(self, x) * direction * _radius(x, draws), x)

    def norm(self, delta: Tensor) -> Tensor:
        """Sum of the absolute entries of each sample, shape `(B,)`."""
        flat = _flat("L1.norm", delta)
        return flat.abs().sum(dim=1, dtype=accumulator(flat)).to(wide(delta))

    def scaled(self, factor: float) -> "L1":
        """The same threat with `factor` times the budget."""
        return _scaled(self, factor)


def _check_ball(ball: Linf | L2 | L1) -> None:
    name = type(ball).__name__
    if isinstance(ball.eps, Tensor):
        _check_budgets(name, ball.eps)
    else:
        _check.number(name, "eps", ball.eps, above=0.0)
    if not isinstance(ball.bounds, tuple | list) or len(ball.bounds) != 2:
        raise TypeError(f"{name}: `bounds` must be a pair (low, high), got {ball.bounds!r}.")
    low, high = ball.bounds
    if any(isinstance(bound, str | bool) for bound in (low, high)) or not low < high:
        raise ValueError(f"{name}: `bounds` must be numbers (low, high) with low < high, got {ball.bounds!r}.")
    object.__setattr__(ball, "bounds", (float(low), float(high)))
    if not isinstance(ball.eps, Tensor) and type(ball.eps) not in (int, float):  # NumPy's would spoil the repr
        object.__setattr__(ball, "eps", float(ball.eps))


def _check_budgets(name: str, eps: Tensor) -> None:
    if not eps.is_floating_point() or eps.ndim != 1:
        raise TypeError(
            f"{name}: `eps` must be a number or floating-point numbers of shape (B,), got {eps.dtype} of shape "
            f"{tuple(eps.shape)}."
        )
    if not bool((eps.isfinite() & (eps > 0)).all()):
        raise ValueError(f"{name}: every `eps` must be positive and finite, got {eps}.")


def _describe(ball: Linf | L2 | L1) -> str:
    """Source text of the value, with `eps` in 255ths where it is a whole number of them."""
    parts = []
    for field in dataclasses.fields(ball):
        value = getattr(ball, field.name)
        if isinstance(value, Tensor):
            parts.append(f"eps=<{len(value)} values>")
        elif field.name == "eps":
            steps = round(value * 255)
            parts.append(f"eps={steps}/255" if steps and steps / 255 == value and steps % 255 else f"eps={value!r}")
        elif value != field.default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(ball).__name__}({', '.join(parts)})"


def _scaled(ball: Ball, factor: float) -> Ball:
    _check.number(f"{type(ball).__name__}.scaled", "factor", factor, above=0.0)
    return dataclasses.replace(ball, eps=ball.eps * factor)


def select(threat: Threat, rows: Tensor) -> Threat:
    """The threat for some samples of its batch, by index or mask; one with a common `eps` stays as it is."""
    if isinstance(threat, Linf | L2 | L1) and isinstance(threat.eps, Tensor):
        return dataclasses.replace(threat, eps=threat.eps[rows.to(threat.eps.device)])
    return threat


def _each(ball: Linf | L2 | L1, x: Tensor) -> float | Tensor:
    """The budget of each sample: a number, or a tensor `(B,)` on the device of `x`."""
    if not isinstance(ball.eps, Tensor):
        return ball.eps
    if len(ball.eps) != x.shape[0]:
        raise ValueError(
            f"{type(ball).__name__}: `eps` has {len(ball.eps)} values but `x` has {x.shape[0]} samples; there must be "
            "one for each, or one number for all."
        )
    return ball.eps.to(x.device)


def _budget(ball: Linf | L2 | L1, x: Tensor) -> float | Tensor:
    """The budget, shaped to broadcast over `x`."""
    eps = _each(ball, x)
    return per_sample(eps.to(x.dtype), x) if isinstance(eps, Tensor) else eps


def _reach(ball: Linf, center: Tensor, dtype: torch.dtype) -> Tensor:
    """The budget as the largest number of `dtype` that is not above it, shaped to broadcast over `center`."""
    eps = _each(ball, center)
    if not isinstance(eps, Tensor):
        if not torch.compiler.is_compiling():
            return center.new_full((), round_down(eps, dtype))
        eps = eps * center.new_ones(1, dtype=accumulator(center))  # in a graph the budget may be an input
    return per_sample(cast_toward(eps, torch.zeros_like(eps, dtype=dtype)).to(center.dtype), center)


def _limits(ball: Linf, center: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest and largest allowed values, numbers of `dtype`, in that of the centres."""
    reach, (low, high) = _reach(ball, center, dtype), _box(ball.bounds, dtype)
    return add_inward(center, -reach).clamp(low, high), add_inward(center, reach).clamp(low, high)


def projection(threat: Threat, center: Tensor) -> Callable[[Tensor], Tensor]:
    """`threat.project` around centres that stay: what depends on them alone is computed once."""
    if center.dtype != wide(center) or not center.numel():
        return lambda point: threat.project(point, center)
    if type(threat) is Linf:
        lower, upper = _limits(threat, center, center.dtype)
        return lambda point: point.clamp(lower, upper)
    if center.device.type == "cpu":  # where looking at numbers is free
        if type(threat) is L2:
            return lambda point: _project_l2(threat, point, center)
        if type(threat) is L1:
            return lambda point: _project_l1(threat, point, center)
    return lambda point: threat.project(point, center)


def _project_l2(ball: L2, point: Tensor, center: Tensor) -> Tensor:
    """`ball.project`, with less to do when the whole batch is inside the ball."""
    boxed = point.clamp(*_box(ball.bounds, center.dtype))
    if _surely_inside(ball, boxed if ball.projection == "box_ball" else point, center):
        return boxed
    return ball.project(point, center)


def _project_l1(ball: L1, point: Tensor, center: Tensor) -> Tensor:
    """`ball.project` up to rounding, without sorting."""
    boxed = point.clamp(*_box(ball.bounds, center.dtype))
    if _surely_inside(ball, boxed, center):
        return boxed
    nearest = _nearest(ball, point, boxed, center, center.dtype, _threshold_by_climbing)
    return nearest if _surely_inside(ball, nearest, center) else _shrink(ball, nearest, center, center.dtype)


def _surely_inside(ball: L2 | L1, point: Tensor, center: Tensor) -> bool:
    """Whether all are inside, however the norm is computed."""
    size = ball.norm((point - center).to(accumulator(point)))
    return bool((size <= _each(ball, point) * (1 - 2 * torch.finfo(point.dtype).eps)).all())


def _pair(function: str, x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, checked, in the dtype to compute in."""
    _check.same_shape(function, x=x, x_adv=x_adv)
    dtype = wide(x_adv, x)
    return x_adv.to(dtype), x.to(dtype)


def _flat(function: str, value: Tensor) -> Tensor:
    """One row per sample, of a checked tensor."""
    _check.floating(function, **{"the argument": value})
    return rows(value)


def _box(bounds: Bounds, dtype: torch.dtype) -> Bounds:
    """The bounds, rounded inwards to numbers of the dtype."""
    return -round_down(-bounds[0], dtype), round_down(bounds[1], dtype)


def _slack(dtype: torch.dtype, working: torch.dtype) -> float:
    """Share of the radius given up so that the norm stays below `eps` however it is computed.

    One rounding of every entry in the dtype of the inputs, and a few of the working dtype for sums.
    """
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(working).eps


def _size(ball: L2 | L1, y: Tensor, center: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm of `y - center`: the larger of the exact one and the one a reader of `dtype` would see."""
    exact = accumulator(y)
    return torch.maximum(ball.norm(y.to(exact) - center.to(exact)), ball.norm(y.to(dtype) - center.to(dtype)).to(exact))


def _shrink(ball: L2 | L1, y: Tensor, center: Tensor, dtype: torch.dtype) -> Tensor:
    """Move points that are outside the ball straight towards its centre until they are inside."""
    size = _size(ball, y, center, dtype)
    eps = _each(ball, y)
    outside = size > eps
    radius = eps * (1 - _slack(dtype, y.dtype))
    factor = torch.where(outside, radius / size, torch.ones_like(size)).to(y.dtype)
    moved = add_inward(center, (y - center) * per_sample(factor, y))
    return y.lerp(moved, per_sample(outside, y).to(y.dtype))  # exact for shares of 0 and 1


def _fill(room: Tensor, order: Tensor, amount: float | Tensor) -> Tensor:
    """Distribute `amount` over each row in the given order, to each entry as much as it has room for."""
    have = room.gather(1, order)
    before = have.cumsum(dim=1) - have
    return torch.zeros_like(room).scatter(1, order, torch.minimum(have, (amount - before).clamp_min(0)))


def _nearest(
    ball: L1,
    y: Tensor,
    boxed: Tensor,
    center: Tensor,
    dtype: torch.dtype,
    solve: Callable[[Tensor, Tensor, float | Tensor], Tensor],
) -> Tensor:
    """Nearest point of ball and box, up to the rounding of its norm; where `boxed` is inside, that."""
    low, high = _box(ball.bounds, dtype)
    delta = y - center
    signs = delta.sign()
    largest = torch.finfo(delta.dtype).max / 4  # zero times infinity is no room
    up, down = (min(max(bound, -largest), largest) - center for bound in (high, low))
    room = torch.maximum(up * signs, down * signs).clamp_min_(0)  # not in place: only `signs` may be mapped
    wanted, room = _flat("L1.project", delta).abs(), rows(room)
    threshold = solve(wanted, room, _budget(ball, wanted) * (1 - _slack(dtype, delta.dtype))).to(delta.dtype)
    moved = torch.minimum((wanted - threshold).clamp_min_(0), room).reshape(delta.shape)
    outside = per_sample(_size(ball, boxed, center, dtype) > _each(ball, y), y)
    nearest = add_inward(center, moved * signs).clamp(low, high)
    return boxed.lerp(nearest, outside.to(y.dtype))  # exact for shares of 0 and 1


def _threshold(wanted: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """Solve `sum(min(max(wanted - t, 0), room)) = radius` for t >= 0 in each row; 0 where the sum is below."""
    wanted, room = wanted.to(accumulator(wanted)), room.to(accumulator(room))
    ones, end = torch.ones_like(wanted), wanted.new_zeros(wanted.shape[0], 1)
    # Going down from large t, an entry starts to grow at `wanted` and stops at `wanted - room`.
    places = torch.cat([wanted, (wanted - room).clamp_min(0), end], dim=1)
    places, order = places.sort(dim=1, descending=True)
    slopes = torch.cat([ones, -ones, end], dim=1).gather(1, order).cumsum(dim=1)[:, :-1]
    sums = (slopes * (places[:, :-1] - places[:, 1:])).cumsum(dim=1)
    reached = sums >= radius
    first = reached.to(torch.uint8).argmax(dim=1, keepdim=True)
    excess = (sums.gather(1, first) - radius) / slopes.gather(1, first).clamp_min(1)
    solution = places[:, 1:].gather(1, first) + excess
    return torch.where(reached.any(dim=1, keepdim=True), solution, torch.zeros_like(solution))


def _threshold_by_climbing(wanted: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """The same up to rounding, by Newton's method between bounds that close in; waits for the device every round.

    The sum is linear in `t` between the places that the other form sorts, so that a step from the right piece arrives;
    where a step would leave the bounds they are halved.
    """
    low, high = torch.zeros_like(wanted[:, :1]), wanted.amax(dim=1, keepdim=True)
    level, near = low, 4 * torch.finfo(wanted.dtype).eps * radius
    for _ in range(_MOST_ROUNDS):
        left = wanted - level
        moved = torch.minimum(left, room).clamp_min_(0)
        excess = moved.sum(dim=1, keepdim=True) - radius
        done = (excess.abs() <= near) | ((excess <= 0) & (level == 0))
        low, high = torch.where(excess > 0, level, low), torch.where(excess > 0, high, level)
        following = torch.ge(room, left, out=left).mul_(moved.sign_()).sum(dim=1, keepdim=True)
        step = level + excess / following
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        step = torch.where(done, level, step)
        if torch.equal(step, level):
            break
        level = step
    return level


def _radius(x: Tensor, draws: _random.Draws) -> Tensor:
    """Radius of a uniform point in the unit ball, `u^(1/d)`, shaped to broadcast over `x`."""
    return per_sample(draws.radius(max(1, math.prod(x.shape[1:])), dtype=wide(x)), x)
