r"""First derivatives along a segment: what robust perception keeps constant, and what it does not.

A residual of zero makes $J_h(x + \alpha\Delta)\,\Delta$ constant. RPAT's Theorem 2 concludes that $J_h$
itself is constant, which cancels a vector from both sides of an equation. The functions here measure both.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide, without_autocast
from perceptual_at._shapes import per_sample, rows
from perceptual_at.theory._shared import (
    Identity,
    Inequality,
    Map,
    call,
    derivatives_along,
    fixed,
    jvp,
    length,
    positions,
    quadrature,
    recorded,
    segment,
    torch_generator,
    usable,
    vjp,
    weighted_sum,
)


def directional_jacobian(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""The slope of `h` along the perturbation, at chosen places.

    $$ J_h(x + \alpha\Delta)\,\Delta = \frac{d}{dt}\, h(x + t\Delta)\Big|_{t=\alpha} $$

    The corrected first half of RPAT's Theorem 2: the residual is zero at every place exactly when this is
    constant on the segment. The other $d - 1$ directions of the Jacobian stay free: $h(x) = x_1 x_2$ from
    $(0, 1)$ along the first axis has no residual, and its Jacobian turns from $(1, 0)$ to $(1, 1)$.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        Shape `(m, B, ...)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward-mode pass over `m B` inputs, 5 to 9 forward passes on a CPU.

    Source:
        RPAT, Theorem 2, Equation 16 before it is divided by the perturbation.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> directional_jacobian(lambda x: x[:, :1] * x[:, 1:], x, delta, [0.0, 1.0]).flatten()
        tensor([1., 1.])
        >>> directional_jacobian(torch.square, x, delta, 0.5)  # 2 x delta
        tensor([[[1., 0.]]])
    """
    name = "directional_jacobian"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    return derivatives_along(name, h, x, delta, positions(name, alphas, x), 1)[1]


def batch_jacobian(h: Map, x: Tensor) -> Tensor:
    r"""The Jacobian of every sample's outputs by its own inputs, both flattened.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: inputs, shape `(B, ...)`.

    Returns:
        $J_h(x)$, shape `(B, C, d)` for `C` outputs and `d` inputs per sample.

    Raises:
        ValueError: if `h` is in training mode or does not keep the batch dimension.

    Cost:
        One forward and `C` backward passes, about `2.7 C` forward passes; memory `B C d`.

    Examples:
        >>> import torch
        >>> batch_jacobian(lambda x: x[:, :1] * x[:, 1:], torch.tensor([[3.0, 5.0]]))
        tensor([[[5., 3.]]])
        >>> batch_jacobian(torch.square, torch.tensor([[1.0, 2.0]]))
        tensor([[[2., 0.],
                 [0., 4.]]])
    """
    name = "batch_jacobian"
    _check.floating(name, x=x)
    fixed(name, h)
    return jacobian_at(name, h, x)


def jacobian_at(name: str, h: Map, x: Tensor) -> Tensor:
    """The Jacobians of `h` at `x` as matrices, shape `(B, C, d)`."""
    # The clone keeps in-place layers away from the caller's tensor.
    with torch.inference_mode(False):
        values, pullback = torch.func.vjp(lambda y: call(name, h, y.clone()), usable(x))[:2]
        outputs = values.shape[1:].numel()
        units = torch.eye(outputs, dtype=values.dtype, device=values.device)[:, None].expand(-1, x.shape[0], -1)
        (gradients,) = torch.func.vmap(pullback)(units.reshape(outputs, *values.shape))
    jacobian: Tensor = gradients.reshape(outputs, x.shape[0], math.prod(x.shape[1:])).transpose(0, 1)
    return jacobian


def matrix_norm(matrices: Tensor, norm: str) -> Tensor:
    """The spectral or Frobenius norm of each matrix; NaN or infinite for one that holds such an entry."""
    if norm == "frobenius":
        return length(matrices, batch_dims=matrices.ndim - 2)
    own, scale = scaled(matrices.to(wide(matrices)))  # half precision has no eigenvalues
    usable = scale.isfinite()
    own = torch.where(usable, own, 0.0)  # LAPACK refuses the others
    with without_autocast(own):
        gram = own @ own.mT if own.shape[-2] <= own.shape[-1] else own.mT @ own
    squared: Tensor = torch.linalg.eigvalsh(gram)[..., -1]
    positive = squared > 0  # where it is zero its root has no derivative
    root = torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
    scale, usable = scale[..., 0, 0], usable[..., 0, 0]
    return torch.where(usable, scale * root, scale).to(matrices.dtype)


def scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices whose squares do not leave the dtype, and the power of two that they were divided by.

    It is 1 for matrices of ordinary numbers and of zeros, and NaN or infinite where an entry is.
    """
    largest = matrices.detach().abs().amax(dim=(-2, -1), keepdim=True)
    ordinary = (largest == 0) | ((largest > 2.0**-40) & (largest < 2.0**40))
    power = torch.where(largest.isfinite(), largest.log2().floor().exp2(), largest)
    power = torch.where(ordinary, 1.0, power)
    return matrices / power, power


def jacobian_gap(
    h: Map,
    x: Tensor,
    delta: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    norm: Literal["spectral", "frobenius"] = "spectral",
) -> Tensor:
    r"""How much the whole Jacobian changes along the perturbation.

    $$ \gamma(\alpha) = \big\| J_h(x + \alpha\Delta) - J_h(x) \big\|_{\mathrm{spec}} $$

    The quantity $\gamma$ of RPAT's Theorem 2, exactly. A zero residual on one segment does not bound it: for
    $h = M x_2 \sin(\omega x_1)$ along $x_2 = 0$ the residual is zero and the gap as large as $M$ wishes. On
    trained networks the direction $\Delta$ accounts for some 5 to 50 % of it (see `directional_gap`).

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        norm: `"spectral"`, or `"frobenius"` for the cheaper upper bound, at most `sqrt(C)` times larger.

    Returns:
        Shape `(m, B)`, in units of `h` per unit of `x`. Where it is zero, so is its gradient.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], `norm` is unknown, or `h` is in training
            mode.

    Cost:
        `C (m + 1)` backward passes for `C` outputs, memory `2 B C d`. Beyond some 20 outputs
        `power_jacobian_gap` is cheaper.

    Source:
        RPAT, Theorem 2, Equation 18.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> jacobian_gap(lambda x: x[:, :1] * x[:, 1:], x, delta, 1.0)  # (1, 1) - (1, 0)
        tensor([[1.]])
        >>> jacobian_gap(torch.neg, x, delta, 1.0)
        tensor([[0.]])
    """
    name = "jacobian_gap"
    _check.same_shape(name, x=x, delta=delta)
    _check.choice(name, "norm", norm, ("spectral", "frobenius"))
    fixed(name, h)
    return gap_along(name, h, x, delta, positions(name, alphas, x), norm)


def gap_along(function: str, h: Map, x: Tensor, delta: Tensor, places: Tensor, norm: str) -> Tensor:
    """How far the Jacobian at each place is from that at `x`, shape `(m, B)`."""
    start = jacobian_at(function, h, x)
    changes = (jacobian_at(function, h, point) - start for point in segment(x, delta, places))
    return torch.stack([matrix_norm(change, norm) for change in changes])


def power_jacobian_gap(
    h: Map,
    x: Tensor,
    delta: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The change of the Jacobian from below, by power iteration, for maps with many outputs.

    Each step applies $A = J_h(x + \alpha\Delta) - J_h(x)$ and its transpose to a vector, never forming $A$.
    The values $\|A v\|$ with $\|v\| = 1$ can only grow and never pass $\|A\|_{\mathrm{spec}}$: an
    under-estimate at any step. On the networks we measured 3 to 17 steps came within 1 %.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`; one of the two starting directions.
        alphas: places in [0, 1].
        steps: iterations, at least 1.
        generator: draws the other starting direction, on its own device; a fixed seed if not given.

    Returns:
        The best value so far after each step, shape `(steps, m, B)`; the last entry is the estimate.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], `steps` is below 1, or `h` is in training
            mode.

    Cost:
        11 to 20 forward passes over `2 m B` inputs a step; memory of one backward pass.

    Source:
        RPAT, Theorem 2, Equation 18.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> power_jacobian_gap(lambda x: x[:, :1] * x[:, 1:], x, delta, 1.0, steps=2)[-1].round(decimals=4)
        tensor([[1.]])
        >>> power_jacobian_gap(torch.neg, x, delta, 1.0, steps=2)[-1]
        tensor([[0.]])
    """
    name = "power_jacobian_gap"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "steps", steps)
    fixed(name, h)
    places = positions(name, alphas, x)
    far = segment(x, delta, places)
    generator = torch_generator(name, generator)
    start = torch.randn(far.shape, generator=generator, dtype=x.dtype, device=generator.device)
    start = start.to(x.device, non_blocking=True)
    v = torch.stack([delta.expand_as(far), start]).flatten(0, 2)
    far = torch.stack([far, far]).flatten(0, 2)
    near = x.repeat(2 * len(places), *[1] * (x.ndim - 1))
    both = torch.cat([far, near])

    def fresh(y: Tensor) -> Tensor:
        return call(name, h, y.clone())  # in-place layers stay away from `both`

    _, pullback = vjp(fresh, both)
    v = _unit(v)
    history = []
    for _ in range(steps):
        ahead, behind = jvp(fresh, both, torch.cat([v, v]))[1].chunk(2)
        image = ahead - behind
        history.append(length(image))
        u = _unit(image)
        (pulled,) = pullback(torch.cat([u, -u]))
        ahead, behind = pulled.chunk(2)
        v = _unit(ahead + behind)
    best = torch.stack(history).reshape(steps, 2, len(places), x.shape[0]).amax(1)
    return best.cummax(0).values


def _unit(vectors: Tensor) -> Tensor:
    """Divide by the length; zero stays zero."""
    return vectors / per_sample(length(vectors).clamp_min(torch.finfo(vectors.dtype).tiny), vectors)


def directional_gap(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Inequality:
    r"""The change of the slope along the perturbation against the change of the whole Jacobian.

    $$ \big\|\big(J_h(x + \alpha\Delta) - J_h(x)\big)\Delta\big\| \;\le\;
       \big\|J_h(x + \alpha\Delta) - J_h(x)\big\|_{\mathrm{spec}}\,\|\Delta\| $$

    A residual of zero makes the left side zero and leaves the right side alone. `left / right` is the share
    of the change that robust perception can see.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        `Inequality(left, right)`, each of shape `(m, B)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        That of `jacobian_gap`.

    Source:
        RPAT, Theorem 2, between Equations 16 and 17.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> directional_gap(lambda x: x[:, :1] * x[:, 1:], x, delta, 1.0)
        Inequality(left=tensor([[0.]]), right=tensor([[1.]]))
        >>> directional_gap(lambda x: x[:, :1].square(), x, delta, 1.0)  # only this direction matters
        Inequality(left=tensor([[2.]]), right=tensor([[2.]]))
    """
    name = "directional_gap"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    start = jacobian_at(name, h, x)
    gaps, images = [], []
    for point in segment(x, delta, positions(name, alphas, x)):
        change = jacobian_at(name, h, point) - start
        gaps.append(matrix_norm(change, "spectral"))
        images.append(length((change @ rows(delta)[:, :, None])[..., 0]))
    return Inequality(torch.stack(images), torch.stack(gaps) * length(delta))


def hessian_identity(
    h: Map,
    x: Tensor,
    delta: Tensor,
    v: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    nodes: int = 32,
) -> Identity:
    r"""The change of the Jacobian in any direction as an integral of the Hessian.

    $$ \big(J_h(x + \alpha\Delta) - J_h(x)\big)\, v = \int_0^\alpha H_h(x + s\Delta)[\Delta, v]\, ds $$

    For $v = \Delta$ the right side is what a zero residual controls; for other directions it needs mixed
    second derivatives, which no segment along $\Delta$ shows. Vacuous for piecewise-linear networks.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, twice differentiable.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        v: direction in which the Jacobian is applied, the shape of `x`.
        alphas: places in [0, 1].
        nodes: Gauss-Legendre nodes.

    Returns:
        `Identity(left, right)`, each of shape `(m, B, ...)`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        16 to 29 forward passes for each of `nodes m` places.

    Source:
        RPAT, Theorem 2, where Equations 13 to 17 drop terms.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> product = lambda x: x[:, :1] * x[:, 1:]
        >>> left, right = hessian_identity(product, x, delta, torch.tensor([[0.0, 1.0]]), 0.5)
        >>> left, right.round(decimals=5)  # the mixed derivative 1, over half the segment
        (tensor([[[0.5000]]]), tensor([[[0.5000]]]))
        >>> hessian_identity(product, x, delta, delta, 0.5).left  # the only direction a residual sees
        tensor([[[0.]]])
    """
    name = "hessian_identity"
    _check.same_shape(name, x=x, delta=delta, v=v)
    _check.count(name, "nodes", nodes)
    fixed(name, h)

    def slope(y: Tensor) -> Tensor:
        directions = v.repeat(y.shape[0] // max(1, v.shape[0]), *[1] * (v.ndim - 1))
        return jvp(lambda z: call(name, h, z.clone()), y, directions)[1]

    def integral(alpha: Tensor) -> Tensor:
        ((s, weights),) = quadrature(nodes, torch.stack([torch.zeros_like(alpha), alpha]))
        return weighted_sum(weights, derivatives_along(name, slope, x, delta, s, 1)[1])

    places = positions(name, alphas, x)
    changes = [slope(x + alpha * delta) - slope(x) for alpha in places]
    integrals = [recorded(functools.partial(integral, alpha)) for alpha in places]
    return Identity(torch.stack(changes), torch.stack(integrals))
