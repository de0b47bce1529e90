r"""Piecewise-linear networks: where they bend, how much, and why no Hessian can see it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perceptual_at import _check
from perceptual_at._shapes import rows
from perceptual_at.theory._shared import (
    Identity,
    Map,
    along,
    derivatives_along,
    fixed,
    length,
    positions,
    residual,
    weighted_sum,
)

# Where each piecewise-linear activation bends, by the name under which torch calls it.
_AT_ZERO = ("relu", "leaky_relu", "prelu", "rrelu", "abs")
_SMOOTH = (
    "_native_multi_head_attention", "celu", "elu", "exp", "gelu", "glu", "hardswish", "log_softmax", "logsigmoid",
    "mish", "multi_head_attention_forward", "normalize", "scaled_dot_product_attention", "selu", "sigmoid", "silu",
    "sin", "cos", "softmax", "softplus", "softsign", "square", "sqrt", "tanh", "layer_norm", "group_norm",
    "instance_norm", "log", "log1p", "log2", "log10", "logsumexp", "expm1", "erf", "tan", "atan", "arctan", "sinh",
    "cosh", "rsqrt", "rms_norm", "local_response_norm", "softmin", "cosine_similarity", "hardshrink", "threshold",
)  # fmt: skip
_MANY_INPUTS = ("max_pool", "maximum", "minimum", "amax", "amin", "fractional_max_pool")


def _bends(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, ...]:
    """The inputs at which the activation `name` bends."""
    if name in _AT_ZERO:
        return (0.0,)
    if name == "relu6":
        return (0.0, 6.0)
    if name == "hardtanh":
        given = dict(zip(("min_val", "max_val"), args[1:3], strict=False)) | kwargs
        return (float(given.get("min_val", -1)), float(given.get("max_val", 1)))
    if name == "hardsigmoid":
        return (-3.0, 3.0)
    if name == "softshrink":
        end = float(args[1] if len(args) > 1 else kwargs.get("lambd", 0.5))
        return (-end, end)
    if name in ("clamp", "clip"):
        given = dict(zip(("min", "max"), args[1:3], strict=False)) | kwargs
        bounds = (given.get("min"), given.get("max"))
        return tuple(float(bound) for bound in bounds if isinstance(bound, (int, float)))
    return ()


class _Activations(TorchFunctionMode):
    """Shows the input of every piecewise-linear activation to `visit`, in the order of execution."""

    def __init__(self, visit: Callable[[int, Tensor, tuple[float, ...]], None], function: str | None = None) -> None:
        super().__init__()
        self.visit = visit
        self.function = function  # named in errors; None: let everything pass
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removesuffix("_")
        if self.function is not None and name in _SMOOTH:
            raise ValueError(
                f"{self.function}: `h` applies `{name}`, so it is not piecewise linear without jumps; use "
                "`slope_variation`, which works for any map."
            )
        if self.function is not None and (name in ("max", "min") or any(part in name for part in _MANY_INPUTS)):
            raise ValueError(
                f"{self.function}: `h` applies `{name}`, whose bends depend on several units at once and are not "
                "followed; use `slope_variation`, which works for any map."
            )
        bends = _bends(name, args, kwargs)
        if bends:
            self.visit(self.count, args[0] if args else kwargs["input"], bends)
            self.count += 1
        return func(*args, **kwargs)


class Kinks(NamedTuple):
    """Where one sample's path bends, and by how much."""

    alphas: Tensor
    """Places in (0, 1), increasing, shape `(n,)`."""
    jumps: Tensor
    """Change of the slope at each place, shape `(n, ...)`."""

    @property
    def variation(self) -> Tensor:
        """Total variation of the slope, the sum of the lengths of all jumps: a scalar."""
        return length(self.jumps).sum()


def _breakpoints(function: str, h: Map, x: Tensor, delta: Tensor) -> Tensor:
    """All places in (0, 1) where an activation changes its piece, for one sample `(1, ...)`.

    After the bends of the first k activations are known, the input of the next one is linear between them, so
    its crossings follow from its values there.
    """
    heights: list[tuple[Tensor, tuple[float, ...]]] = []
    wanted = 0

    def visit(index: int, values: Tensor, bends: tuple[float, ...]) -> None:
        if index == wanted:
            heights.append((values.detach().clone(), bends))

    alphas = x.new_tensor([0.0, 1.0])
    while True:
        heights.clear()
        with torch.no_grad(), _Activations(visit, function) as seen:
            along(function, h, x, delta, alphas)
        if wanted >= seen.count:
            return alphas[1:-1]
        values, bends = heights[0]
        if values.shape[0] != len(alphas):
            raise ValueError(f"{function}: an activation of `h` does not keep the batch dimension.")
        found = [alphas]
        for bend in bends:
            height = rows(values) - bend
            positive = height > 0
            left, unit = (positive[1:] != positive[:-1]).nonzero(as_tuple=True)
            before, after = height[left, unit], height[left + 1, unit]
            share = (before / (before - after)).to(alphas.dtype)
            found.append(torch.lerp(alphas[left], alphas[left + 1], share))
        alphas = torch.unique(torch.cat(found))
        wanted += 1


def kinks(h: Map, x: Tensor, delta: Tensor) -> tuple[Kinks, ...]:
    r"""Every place where a piecewise-linear network bends on the segment, and the jump of its slope there.

    $$ t_j \in (0, 1), \qquad g'(t_j^+) - g'(t_j^-) $$

    Exact up to rounding, for any architecture of affine layers with ReLU, leaky ReLU, PReLU, ReLU6, hard
    tanh, hard sigmoid, soft shrinkage, absolute values and clamps by constants: residual connections,
    convolutions, average pooling and batch norm in eval mode included. A kink to which the output is blind
    appears with a jump of zero. Products of units and rarer smooth functions are not noticed;
    `kink_identity` then fails. Use float64.

    Args:
        h: a piecewise-linear map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.

    Returns:
        One `Kinks(alphas, jumps)` per sample, of shapes `(n,)` and `(n, ...)`.

    Raises:
        ValueError: if `h` applies a smooth activation, a normalisation by its input, or a maximum of several
            units (max-pooling); if shapes differ or `h` is in training mode.

    Cost:
        One forward pass over the kinks found so far for each activation layer, and one derivative between each two
        neighbours. The number of kinks depends on the data, so this waits for the device.

    Examples:
        >>> import torch
        >>> (found,) = kinks(torch.relu, torch.tensor([[-1.0]]), torch.tensor([[4.0]]))
        >>> found.alphas, found.jumps  # slope 0, then 4
        (tensor([0.2500]), tensor([[4.]]))
        >>> (found,) = kinks(lambda x: 3 * x, torch.tensor([[-1.0]]), torch.tensor([[4.0]]))
        >>> len(found.alphas)
        0
    """
    name = "kinks"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    return tuple(_kinks(name, h, x[i : i + 1], delta[i : i + 1]) for i in range(x.shape[0]))


def _kinks(name: str, h: Map, x: Tensor, delta: Tensor) -> Kinks:
    alphas = _breakpoints(name, h, x, delta)
    edges = torch.cat([alphas.new_zeros(1), alphas, alphas.new_ones(1)])
    slopes = derivatives_along(name, h, x, delta, (edges[1:] + edges[:-1]) / 2, 1)[1][:, 0]
    return Kinks(alphas, slopes.diff(dim=0))


def kink_identity(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Identity:
    r"""The residual of a piecewise-linear network as a weighted sum of its kinks.

    $$ r(\alpha) = -\sum_j K(\alpha, t_j)\,\big[g'(t_j^+) - g'(t_j^-)\big],
       \qquad K(\alpha, s) = \min(\alpha, s)\,\big(1 - \max(\alpha, s)\big) $$

    The same kernel as in `peano_identity`, with jumps of the slope in place of the second derivative: here is
    all the curvature that a ReLU network has. With many kinks of random sign the residual grows like
    $\|\Delta\|^{3/2}$, not like its square, so $r/\|\Delta\|^2$ is no scale-free curvature.

    Args:
        h: a piecewise-linear map as for `kinks`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        `Identity(left, right)`: residual and sum, each of shape `(m, B, ...)`. They agree to
        `1e-11 max(1, |h|)` in float64.

    Raises:
        ValueError: as `kinks`, or if a place is outside [0, 1].

    Cost:
        That of `kinks`.

    Source:
        RPAT, Theorem 1, for the networks it is applied to.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
        >>> kink_identity(torch.relu, x, delta, 0.5)  # minus a quarter of the jump of 2
        Identity(left=tensor([[[-0.5000]]]), right=tensor([[[-0.5000]]]))
        >>> kink_identity(torch.relu, x + 5, delta, 0.5)  # never below zero: no kink
        Identity(left=tensor([[[0.]]]), right=tensor([[[-0.]]]))
    """
    name = "kink_identity"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    places = positions(name, alphas, x)
    left = residual(name, h, x, delta, places)
    sums = []
    for i in range(x.shape[0]):
        at, jumps = _kinks(name, h, x[i : i + 1], delta[i : i + 1])
        kernel = torch.minimum(places[:, None], at) * (1 - torch.maximum(places[:, None], at))
        sums.append(-weighted_sum(kernel, jumps))
    return Identity(left, torch.stack(sums, dim=1) if sums else torch.zeros_like(left))


def count_activation_flips(h: Map, x: Tensor, delta: Tensor, *, points: int = 17) -> Tensor:
    r"""How often units of a piecewise-linear network change their piece along the segment.

    Compares the activation patterns at neighbouring places of a grid. A plain ReLU network is aligned after
    all its layers (RAAT, Definition 1) exactly when the count is zero. Two points miss the units that flip
    and flip back; 17 have found every kink of the networks we tried.

    ReLU, leaky ReLU, PReLU, ReLU6, hard tanh, hard sigmoid, soft shrinkage, absolute values and clamps are
    counted, as modules or as functions. Smooth activations have no pieces, and changes of the winner inside a
    max-pooling window are not counted.

    Args:
        h: any map `(B, ...) -> (B, ...)` with such activations, in eval mode, not compiled.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        points: uniform places, ends included, at least 2.

    Returns:
        Counts, an integer tensor of shape `(B,)`.

    Raises:
        ValueError: if `h` has no such activation, shapes differ, `points` is below 2, or `h` is in training
            mode.

    Cost:
        One forward pass over `points B` inputs.

    Source:
        RAAT, Definition 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[-1.0, 1.0, 2.0]]), torch.tensor([[2.0, 2.0, -4.0]])
        >>> count_activation_flips(torch.relu, x, delta)  # the first and the last coordinate cross zero
        tensor([2])
        >>> count_activation_flips(torch.relu, x, delta / 4)
        tensor([0])
    """
    name = "count_activation_flips"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "points", points)
    _check.number(name, "points", points, at_least=2)
    fixed(name, h)
    batch = x.shape[0]
    flips: list[Tensor] = []

    def visit(_index: int, values: Tensor, bends: tuple[float, ...]) -> None:
        piece = sum((values > bend).to(torch.int8) for bend in bends)
        if not isinstance(piece, Tensor) or piece.shape[0] != points * batch:
            raise ValueError(f"{name}: an activation of `h` does not keep the batch dimension.")
        pattern = rows(piece)
        flips.append(pattern.reshape(points, batch, pattern.shape[1]).diff(dim=0).abs().sum(dim=(0, 2)))

    grid = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    with torch.no_grad(), _Activations(visit):
        along(name, h, x, delta, grid)
    if not flips:
        raise ValueError(
            f"{name}: `h` ran no ReLU-like activation, so there is nothing to count; for smooth networks use "
            "`directional_second_derivative`. A compiled model hides its activations: pass the original."
        )
    return torch.stack(flips).sum(0)


def hessian_is_vacuous(h: Map, x: Tensor, delta: Tensor) -> bool:
    r"""Whether second derivatives are identically zero although `h` is not affine: a ReLU-like network.

    For such networks every statement about the Hessian (RPAT's Theorem 1, the Taylor terms of RAAT's Theorem
    2) is true and says nothing: automatic differentiation returns exactly 0 wherever it is defined, trained
    or not. Then use instead

    - `segment_residual` and `segment_quotient`: what the losses see;
    - `mean_jacobian_identity`: the quotient as a difference of mean slopes;
    - `slope_variation`, `kinks` and `kink_identity`: the curvature that is there, all of it in the kinks;
    - `count_activation_flips`: how many units change.

    Pass logits. Softmax probabilities of a ReLU network do have a second derivative, the curvature of softmax
    at the linearised logits; the answer is `False`, and that derivative is still blind to every kink.

    The second derivative is taken at several places along `delta` and along steps of the size of the inputs, in its
    direction and in three random ones (fixed seed). The residual is sought on the same segments and on longer ones,
    so that a short `delta` which crosses no kink does not hide the network's nature.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.

    Returns:
        `True` for piecewise-linear maps that bend; `False` for smooth maps and for affine ones, whose Hessian
        really is zero.

    Raises:
        ValueError: if shapes differ, there is no sample, or `h` is in training mode.

    Cost:
        About 300 forward passes. Reads its result on the host, so it waits for the device.

    Source:
        On RPAT, Theorem 1, and RAAT, Theorem 2.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[-1.0, 1.0]]), torch.tensor([[2.0, 0.5]])
        >>> hessian_is_vacuous(torch.relu, x, delta)
        True
        >>> hessian_is_vacuous(torch.tanh, x, delta)
        False
    """
    name = "hessian_is_vacuous"
    _check.same_shape(name, x=x, delta=delta)
    if not x.numel():
        raise ValueError(f"{name}: `x` must hold a sample to try `h` at, got shape {tuple(x.shape)}.")
    fixed(name, h)
    generator = torch.Generator().manual_seed(0)
    x, delta = x.detach(), delta.detach()
    # Besides the given direction, steps as long as the inputs are large: a kink has to be met, and curvature must
    # not be lost to underflow.
    reach = x.abs().mean() + 1
    random = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    probes = [delta, delta * reach / delta.abs().mean().clamp_min(torch.finfo(x.dtype).tiny), *(reach * random)]
    places = x.new_tensor([0.11, 0.5, 0.83])
    with torch.no_grad():
        for probe in probes:
            if derivatives_along(name, h, x, probe, places, 2)[2].any():
                return False
        for probe in (*probes, *(30 * probe for probe in probes)):
            values = along(name, h, x, probe, x.new_tensor([0.0, 1.0]))
            noise = 64 * torch.finfo(x.dtype).eps * values.abs().amax()
            if (residual(name, h, x, probe, places).abs() > noise).any():
                return True
    return False
