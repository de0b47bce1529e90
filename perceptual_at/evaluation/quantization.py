"""Adversarial inputs as image files can hold them."""

import math

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import accumulator
from perceptual_at._shapes import per_sample, rows
from perceptual_at.threats import L1, L2, Ball, Linf, as_ball
from perceptual_at.threats.entries import clamped
from perceptual_at.victims import Model, asked, lent, misclassified


def quantize(x_adv: Tensor, x: Tensor, threat: Linf | L2 | L1, *, levels: int = 256) -> Tensor:
    r"""Adversarial inputs on the lattice that image files have, still inside the ball and the box exactly.

    Rounding to 8 bits moves an image by up to 1/510 per pixel, often out of the ball and back over the decision
    boundary. Here every entry becomes one of the values $l + (u - l)\,k / 255$. In `Linf` it is the one nearest to
    `x_adv` inside the ball. In `L2` and `L1` all entries are rounded to the nearest value; then as many as needed
    go one step towards `x`, those first that this takes least away from `x_adv`.

    The ball is kept without tolerance. Where `x` lies on the lattice too and `eps` is a whole number of steps, the
    rounding of `k / 255` in floating point can put the last step just outside, and the entry then stops one step
    short of it. To allow for that rounding, give `threat.scaled(1 + 1e-6)`.

    Args:
        x_adv: adversarial inputs, shape `(B, ...)`.
        x: clean inputs, the same shape and dtype, inside the bounds.
        threat: `Linf`, `L2` or `L1`, with finite bounds: the lattice goes from one to the other.
        levels: number of values an entry can take; 256 for 8-bit images.

    Returns:
        Shape and dtype of `x`. `((q - l) / (u - l) * 255).round()` are the integers to save.

    Raises:
        TypeError: if `threat` is of another kind or inputs are no floating-point tensors.
        ValueError: if shapes, devices or dtypes differ, values are not finite, bounds are infinite, the dtype cannot
            tell the levels apart (bfloat16 with 256), or the ball of a sample holds no point of the lattice (`x` is
            not an 8-bit image and `eps` is small).

    Examples:
        >>> x = torch.tensor([[0.0, 10 / 255]])
        >>> q = quantize(x + torch.tensor([[0.0101, -0.0101]]), x, Linf(0.0105))
        >>> (q * 255).round()  # 2.58 would be 3, but that is outside: 0.0118 > 0.0105
        tensor([[2., 8.]])
    """
    _check_call(x_adv, x, threat, levels)
    x_adv, x = x_adv.detach(), x.detach()
    if not x.numel():
        return x.clone()
    low, high = threat.bounds
    values = torch.arange(levels, device=x.device, dtype=accumulator(x))
    # As an image is read: the integer, divided; then rounded to the dtype.
    lattice = (low + (high - low) * (values / (levels - 1))).to(x.dtype)
    lattice = clamped(lattice, *threat.box(x))
    nearest = ((x_adv.to(values.dtype) - low) * ((levels - 1) / (high - low))).round()
    places = nearest.long().clamp(0, levels - 1)
    if math.isinf(as_ball("quantize", threat).p):
        places = _into_cube(places, lattice, x, threat)
    else:
        places = _into_ball(places, lattice, x_adv, x, threat)
    result = lattice[places]
    outside = ~threat.contains(result, x)
    if bool(outside.any()):
        raise ValueError(
            f"quantize: the ball holds no point of the lattice for {int(outside.sum())} of {len(x)} samples: `x` is "
            f"further than {threat!r} from the {levels} values."
        )
    return result


def still_adversarial(model: Model, x_adv: Tensor, labels: Tensor) -> Tensor:
    """Which inputs the model takes for another class than their label.

    Called before and after `quantize`, it says how many attacks survive being saved.

    Args:
        model: maps inputs to logits; a module runs in eval mode.
        x_adv: inputs, shape `(B, ...)`.
        labels: class indices `(B,)`.

    Returns:
        Boolean `(B,)`. Logits with NaN do not count.

    Raises:
        TypeError: if `labels` are no integers.
        ValueError: if shapes do not fit or labels are out of range.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x_adv, labels = torch.tensor([[0.2499], [0.375]]), torch.tensor([0, 0])
        >>> still_adversarial(model, x_adv, labels)
        tensor([ True, False])
        >>> still_adversarial(model, quantize(x_adv, x_adv, Linf(0.01)), labels)  # 64 / 255 > 1/4
        tensor([False, False])
    """
    _check.model("still_adversarial", model)
    _check.floating("still_adversarial", x_adv=x_adv)
    with torch.no_grad(), lent("still_adversarial", model) as f:
        logits = asked("still_adversarial", f, x_adv, name="x_adv")
    _check.logits("still_adversarial", **{"model(x_adv)": logits})
    _check.labels("still_adversarial", labels, classes=logits.shape[1], x_adv=x_adv)
    return misclassified(logits, labels)


def _check_call(x_adv: Tensor, x: Tensor, threat: Ball, levels: int) -> None:
    _check.same_shape("quantize", x=x, x_adv=x_adv)
    if x_adv.dtype != x.dtype:
        raise ValueError(f"quantize: `x_adv` is {x_adv.dtype} but `x` is {x.dtype}; the two must be equal.")
    as_ball("quantize", threat)
    _check.count("quantize", "levels", levels)
    if levels < 2 or torch.finfo(x.dtype).eps * (levels - 1) >= 1:
        raise ValueError(f"quantize: `levels`={levels} cannot be told apart in {x.dtype}; use float32 inputs.")
    if not all(not isinstance(bound, Tensor) and math.isfinite(bound) for bound in threat.bounds):
        raise ValueError(f"quantize: `threat` must have finite bounds that are numbers, got {threat!r}.")
    if not bool(x.isfinite().all() & x_adv.isfinite().all()):
        raise ValueError("quantize: `x` or `x_adv` contains NaN or infinite values.")


def _distance(points: Tensor, x: Tensor) -> Tensor:
    """Absolute differences, exact for neighbouring float32 numbers."""
    return (points.to(accumulator(x)) - x.to(accumulator(x))).abs()


def _towards(places: Tensor, lattice: Tensor, x: Tensor) -> Tensor:
    """The neighbours of lattice places on the side of `x`."""
    return (places + (x - lattice[places]).sign().long()).clamp(0, len(lattice) - 1)


def _into_cube(places: Tensor, lattice: Tensor, x: Tensor, threat: Ball) -> Tensor:
    """Step towards `x`, entry by entry, where outside and as long as that comes nearer."""
    eps = threat.eps
    if isinstance(eps, Tensor):
        eps = per_sample(eps, x) if eps.ndim == 1 else eps
        eps = eps.to(x.device)
    while True:
        gap, nearer = _distance(lattice[places], x), _towards(places, lattice, x)
        moves = (gap > eps) & (_distance(lattice[nearer], x) < gap)
        if not bool(moves.any()):
            return places
        places = torch.where(moves, nearer, places)


def _into_ball(places: Tensor, lattice: Tensor, x_adv: Tensor, x: Tensor, threat: Ball) -> Tensor:
    """Step towards `x` with the fewest, cheapest entries of the samples that are outside."""
    while True:
        outside = ~threat.contains(lattice[places], x)
        nearer = _towards(places, lattice, x)
        gap = _distance(lattice[places], x)
        gain = (gap - _distance(lattice[nearer], x)) * per_sample(outside, x)
        if not bool((gain > 0).any()):
            return places
        cost = _distance(lattice[nearer], x_adv) - _distance(lattice[places], x_adv)
        order = rows(cost.masked_fill(gain <= 0, math.inf)).argsort(dim=1, stable=True)
        places = _first_inside(places, nearer, order, (gain > 0).sum(dim=tuple(range(1, x.ndim))), lattice, x, threat)


def _first_inside(
    places: Tensor, nearer: Tensor, order: Tensor, usable: Tensor, lattice: Tensor, x: Tensor, threat: Ball
) -> Tensor:
    """Move the fewest entries of `order` that bring each sample inside; all usable ones where none do."""
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
    rank = rank.reshape(x.shape)
    few, many = torch.zeros_like(usable), usable
    # By bisection: every move shortens the difference, so inside stays inside.
    while bool((few < many).any()):
        middle = (few + many) // 2
        moved = torch.where(rank < per_sample(middle, x), nearer, places)
        done = threat.contains(lattice[moved], x)
        few, many = torch.where(done | (few >= many), few, middle + 1), torch.where(done, middle, many)
    return torch.where(rank < per_sample(many, x), nearer, places)
