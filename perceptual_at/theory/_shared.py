"""What every theory module shares: two-sided results, argument checks, points and derivatives on a segment."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at._attention import attention_in_parts
from perceptual_at._differentiation import by_func
from perceptual_at._rounding import common, without_autocast
from perceptual_at._shapes import per_sample

Map: TypeAlias = Callable[[Tensor], Tensor]
"""Anything that maps a batch `(B, ...)` to a batch `(B, ...)`: a module in eval mode, a function, a closure."""


class Identity(NamedTuple):
    """Both sides of an equality, computed in two independent ways.

    Examples:
        >>> import torch
        >>> Identity(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])).error
        tensor(0.5000)
        >>> Identity(torch.ones(3), torch.ones(3)).error
        tensor(0.)
    """

    left: Tensor
    right: Tensor

    @property
    def error(self) -> Tensor:
        """Largest absolute difference, a scalar; rounding alone where the statement holds. 0 for no samples."""
        apart = (self.left - self.right).abs()
        return apart.amax() if apart.numel() else apart.sum()


class Inequality(NamedTuple):
    """Both sides of `left <= right`.

    Examples:
        >>> import torch
        >>> Inequality(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.5])).slack
        tensor(0.5000)
        >>> Inequality(torch.tensor([1.0]), torch.tensor([0.0])).slack  # violated
        tensor(-1.)
    """

    left: Tensor
    right: Tensor

    @property
    def slack(self) -> Tensor:
        """Smallest `right - left`, a scalar, infinite for no samples; negative beyond rounding where it fails."""
        room = self.right - self.left
        return room.amin() if room.numel() else room.new_full((), math.inf)


def _draws(layer: nn.Module) -> bool:
    """Whether the layer draws random numbers in training mode."""
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
        return layer.dropout > 0
    return isinstance(layer, nn.RReLU)


def fixed(function: str, h: Map) -> None:
    """Require that `h` is one function: no layer that looks at the rest of the batch or draws numbers.

    Modules and bound methods of modules are checked; what a closure calls cannot be seen.
    """
    if not callable(h):
        raise TypeError(f"{function}: `h` must be a module or a function of a batch, got {type(h).__name__}.")
    _check.model(function, h, name="h")
    owner = h if isinstance(h, nn.Module) else getattr(h, "__self__", None)
    if not isinstance(owner, nn.Module):
        return
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    for name, layer in owner.named_modules():
        where = f"`{name}` ({type(layer).__name__})" if name else type(layer).__name__
        tracks = isinstance(layer, norms) and layer.running_mean is not None
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not tracks:
            raise ValueError(
                f"{function}: {where} has no running statistics, so one sample's output depends on the others even "
                "in eval mode; use `track_running_stats=True`."
            )
        if layer.training and (tracks or _draws(layer)):
            why = "uses the statistics of the batch" if tracks else "draws random numbers"
            raise ValueError(
                f"{function}: {where} is in training mode and {why}, so `h` is not one function of its input; "
                "call `h.eval()` first."
            )


def call(function: str, h: Map, points: Tensor) -> Tensor:
    """Evaluate `h` and require one output per point."""
    with by_func(function, "h"), attention_in_parts():
        values = h(points)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{function}: `h` must return a torch.Tensor, got {type(values).__name__}; `models.logits_of(h, name)` "
            "takes one tensor out of what a network returns."
        )
    if not (values.is_floating_point() or values.is_complex()):
        raise TypeError(
            f"{function}: `h` must return floating-point numbers, which have derivatives, got {values.dtype}."
        )
    if values.ndim < 1 or values.shape[0] != points.shape[0]:
        raise ValueError(
            f"{function}: `h` must keep the batch dimension: it got {points.shape[0]} samples and returned shape "
            f"{tuple(values.shape)}."
        )
    return values


def positions(
    function: str,
    alphas: float | Sequence[float] | Tensor,
    like: Tensor,
    *,
    interior: bool = False,
    name: str = "alphas",
) -> Tensor:
    """Turn places on the segment into a tensor `(m,)` beside `like`.

    Numbers are checked, also as tensors without dimensions; a tensor `(m,)` may live on a device and is taken as it is.
    """
    if isinstance(alphas, Tensor):
        if alphas.ndim > 1 or not alphas.is_floating_point():
            raise ValueError(
                f"{function}: `{name}` must be a number, a sequence of numbers or a floating tensor of shape (m,), "
                f"got {alphas.dtype} of shape {tuple(alphas.shape)}."
            )
        if not alphas.ndim:
            _in_range(function, name, alphas, interior)
        return alphas.reshape(-1).to(like)
    single = _check.is_number(alphas)
    if not single and (not isinstance(alphas, Iterable) or getattr(alphas, "ndim", 1) == 0):
        raise TypeError(f"{function}: `{name}` must be a number or a sequence of numbers, got {type(alphas).__name__}.")
    values = [alphas] if single else list(alphas)  # type: ignore[arg-type]  # as checked above
    if not values:
        raise ValueError(f"{function}: `{name}` must name at least one place on the segment, got none.")
    for value in values:
        _in_range(function, name, value, interior)
    return torch.tensor(values, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)


def _in_range(function: str, name: str, value: Any, interior: bool) -> None:
    if interior:
        _check.number(function, name, value, above=0, below=1)
    else:
        _check.number(function, name, value, at_least=0, at_most=1)


def bound_of(function: str, name: str, value: float | Tensor | None, x: Tensor) -> float | Tensor:
    """Require a bound for all samples, or one for each."""
    if isinstance(value, Tensor) and value.ndim:
        _check.floating(function, **{name: value})
        if value.shape != x.shape[:1]:
            raise ValueError(f"{function}: `{name}` must be of shape ({len(x)},), got shape {tuple(value.shape)}.")
        return value
    _check.number(function, name, value, at_least=0)
    return value  # type: ignore[return-value]  # None is no number


def torch_generator(function: str, generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or one with a fixed seed."""
    _random.of_torch(function, generator)
    return torch.Generator().manual_seed(0) if generator is None else generator


def segment(x: Tensor, delta: Tensor, alphas: Tensor) -> Tensor:
    """The points `x + alphas delta`, shape `(m, B, ...)`; always fresh memory, so in-place layers are harmless."""
    return x + per_sample(alphas, x.unsqueeze(0)) * delta


def with_ends(places: Tensor) -> Tensor:
    """0 and 1, then the places."""
    return torch.cat([places.new_zeros(1), places.new_ones(1), places])


def by_point(values: Tensor, points: Tensor) -> Tensor:
    """View values `(m B, ...)` at points `(m, B, ...)` as `(m, B, ...)`."""
    return values.reshape(*points.shape[:2], *values.shape[1:])


def along(function: str, h: Map, x: Tensor, delta: Tensor, alphas: Tensor) -> Tensor:
    """The values `h(x + alphas delta)` in one batched forward pass, shape `(m, B, ...)`."""
    points = segment(x, delta, alphas)
    return by_point(call(function, h, points.flatten(0, 1)), points)


def residual(function: str, h: Map, x: Tensor, delta: Tensor, places: Tensor) -> Tensor:
    """How far `h` is from its chord at the places, shape `(m, B, ...)`."""
    return from_chord(along(function, h, x, delta, with_ends(places)), places)


def from_chord(values: Tensor, places: Tensor) -> Tensor:
    """The residual, given the values at 0, at 1 and at `places`."""
    clean, adv, middle = values[0], values[1], values[2:]
    # Two small differences instead of three large numbers: what cancels, cancels before it is rounded.
    return (middle - clean) - per_sample(places, middle) * (adv - clean)


def quotient(function: str, h: Map, x: Tensor, delta: Tensor, places: Tensor) -> Tensor:
    """The difference of the slopes on both sides of the places, shape `(m, B, ...)`."""
    found = residual(function, h, x, delta, places)
    return found / per_sample(places * (1 - places), found)


def coefficients(function: str, h: Map, x: Tensor, delta: Tensor, place: Tensor, order: int) -> Tensor:
    """Taylor coefficients of the curve from `x` along `delta` at one place, shape `(order + 1, B, ...)`."""
    values = derivatives_along(function, h, x, delta, place, order)
    return torch.stack([value[0] / math.factorial(k) for k, value in enumerate(values)])


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode rules; it warns once about its own way of loading them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros((), device="cpu")
        torch.func.jvp(torch.neg, (zero,), (zero,))


Value = TypeVar("Value", Tensor, tuple[Tensor, ...])


def jvp(f: Callable[[Tensor], Value], primal: Tensor, tangent: Tensor) -> tuple[Value, Value]:
    """The value of `f` and its derivative along `tangent`, in one forward-mode pass."""
    _load_forward_mode()
    with torch.inference_mode(False):  # in which torch 2.6 has no derivatives, and gives zeros
        result: tuple[Value, Value] = torch.func.jvp(f, (usable(primal),), (usable(tangent),))[:2]
    return result


def vjp(f: Callable[[Tensor], Tensor], primal: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """The value, and the function that pulls weights of it back."""
    with torch.inference_mode(False):
        values, pull_back = torch.func.vjp(f, usable(primal))[:2]

    def pulled_back(weights: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):
            grads: tuple[Tensor, ...] = pull_back(usable(weights))
        return grads

    return values, pulled_back


def usable(value: Tensor) -> Tensor:
    """The tensor; a copy where derivatives could not follow it."""
    return value.clone() if value.is_inference() else value


def recorded(compute: Callable[[], Value]) -> Value:
    """Run nested forward mode with gradients recorded: SiLU and Mish have second derivatives only then.

    The result carries gradients only if the caller records them.
    """
    if torch.is_grad_enabled():
        return compute()
    with torch.enable_grad():
        result = compute()
    return result.detach() if isinstance(result, Tensor) else tuple(value.detach() for value in result)


def derivatives(g: Map, t: Tensor, order: int) -> tuple[Tensor, ...]:
    """The value and the first `order` derivatives of `g` at the scalar `t`, by nested forward mode.

    One nest carries all orders: each level returns what the level below returned, plus one derivative more.
    """

    def level(k: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if k == 0:
            return lambda s: (g(s),)
        below = level(k - 1)

        def with_derivative(s: Tensor) -> tuple[Tensor, ...]:
            values, tangents = jvp(below, s, torch.ones_like(s))
            return (*values, tangents[-1])

        return with_derivative

    return recorded(lambda: level(order)(t)) if order > 1 else level(order)(t)


def derivatives_along(
    function: str, h: Map, x: Tensor, delta: Tensor, alphas: Tensor, order: int
) -> tuple[Tensor, ...]:
    """`d^k/dt^k h(x + t delta)` at `t = alphas` for `k = 0..order`, each of shape `(m, B, ...)`."""
    points = segment(x, delta, alphas)
    direction = delta.expand_as(points).flatten(0, 1)
    base = points.flatten(0, 1)

    def g(t: Tensor) -> Tensor:
        return call(function, h, base + t * direction)

    return tuple(by_point(value, points) for value in derivatives(g, base.new_zeros(()), order))


@functools.lru_cache(maxsize=32)
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] in float64 (Golub and Welsch, 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64, device="cpu")
    off_diagonal = k / (4 * k.square() - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    weights = vectors[0].square()
    # The exact rule is symmetric about 1/2; averaging with its mirror image removes half of the rounding.
    return (1 + (points - points.flip(0)) / 2) / 2, (weights + weights.flip(0)) / 2


def quadrature(nodes: int, edges: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Gauss-Legendre nodes and weights for each panel between consecutive `edges`."""
    points, weights = (part.to(edges, non_blocking=True) for part in _legendre(nodes))
    for low, high in itertools.pairwise(edges):
        width = high - low
        yield low + width * points, width * weights


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum `weights (n,)` times `values (n, ...)` over the first dimension, in the wider dtype of the two."""
    dtype = common(weights, values)
    with without_autocast(values):
        total: Tensor = torch.tensordot(weights.to(dtype), values.to(dtype), dims=1)
    return total


def length(values: Tensor, batch_dims: int = 1) -> Tensor:
    """Euclidean length over everything behind the first `batch_dims` dimensions."""
    if values.ndim == batch_dims:  # one number per sample
        return values.abs()
    size: Tensor = torch.linalg.vector_norm(values.flatten(batch_dims), dim=-1)
    return size
