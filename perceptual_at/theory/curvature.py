r"""Second derivatives along a segment, and the integrals that turn them into the residual.

Nothing here forms a Hessian: for ten classes and 3072 inputs one alone takes 755 MB in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at.theory._shared import (
    Identity,
    Inequality,
    Map,
    along,
    bound_of,
    call,
    derivatives_along,
    fixed,
    jvp,
    length,
    positions,
    quadrature,
    quotient,
    recorded,
    residual,
    weighted_sum,
)


def directional_second_derivative(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""How sharply `h` bends along the perturbation.

    $$ \Delta^\top H_h(x + \alpha\Delta)\,\Delta = \frac{d^2}{dt^2}\, h(x + t\Delta)\Big|_{t=\alpha} $$

    One number per output of `h`. RPAT's Theorem 1 says that it tends to zero for all perturbations. What
    holds: it is zero *along a given perturbation, on the whole segment*, if and only if the residual is zero
    there at every place. A small residual does not make it small: $\cos(2\pi n t)/n^2$ flattens out and keeps
    its curvature.

    Vacuous for piecewise-linear networks (exactly zero): ask `hessian_is_vacuous` first.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, twice differentiable.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        Shape `(m, B, ...)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        Nested forward mode on the whole batch, 16 to 29 forward passes per place. Exact to about 1e-12.

    Source:
        RPAT, Theorem 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> directional_second_derivative(torch.square, x, delta, 0.5)  # 2 delta^2
        tensor([[[8.]]])
        >>> directional_second_derivative(torch.relu, x - 2, delta, 0.5)  # at the kink, and still zero
        tensor([[[0.]]])
    """
    name = "directional_second_derivative"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    return derivatives_along(name, h, x, delta, positions(name, alphas, x), 2)[2]


def second_derivative(h: Map, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    r"""The Hessian applied to two directions, $u^\top H_h(x)\, v$, one number per output.

    Polarisation gives the same from squares: $4\,u^\top H v = Q(u+v) - Q(u-v)$ with $Q(w) = w^\top H w$.
    Knowing $Q$ on single directions determines $H$ only when their outer products span the symmetric
    matrices, which takes at least $d(d+1)/2$ of them. Vacuous for piecewise-linear networks.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, twice differentiable.
        x: inputs, shape `(B, ...)`.
        u: first direction, the shape of `x`.
        v: second direction, the shape of `x`.

    Returns:
        Shape `(B, ...)`, the shape of `h(x)`.

    Raises:
        ValueError: if shapes differ or `h` is in training mode.

    Cost:
        16 to 29 forward passes.

    Examples:
        >>> import torch
        >>> product = lambda x: x[:, :1] * x[:, 1:]
        >>> x, u, v = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> second_derivative(product, x, u, v)
        tensor([[1.]])
        >>> second_derivative(product, x, u, u)
        tensor([[0.]])
    """
    name = "second_derivative"
    _check.same_shape(name, x=x, u=u, v=v)
    fixed(name, h)
    # The clone keeps in-place layers away from the caller's tensor.
    return recorded(lambda: jvp(lambda y: jvp(lambda z: call(name, h, z.clone()), y, u)[1], x, v)[1])


def second_difference(
    h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor, *, step: float = 1e-3
) -> Tensor:
    r"""The second derivative along the perturbation from three forward passes.

    $$ \frac{h(x + (\alpha + k)\Delta) - 2\,h(x + \alpha\Delta) + h(x + (\alpha - k)\Delta)}{k^2} $$

    Works for anything that has values. For a piecewise-linear map it sees the kinks that automatic
    differentiation misses, as `jump / step`: report it together with its step. It reads `h` a little outside
    the segment near the ends.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        step: $k$, as a share of the perturbation. In float64 the relative error on smooth networks is about
            2e-8 at 1e-3, 1e-6 at 1e-2 and 2e-6 at 1e-4. In float32 use 0.05 or more.

    Returns:
        Shape `(m, B, ...)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], `step` is not in (0, 1], or `h` is in
            training mode.

    Cost:
        One forward pass over `3 m B` inputs.

    Source:
        RPAT, Theorem 1, without derivatives.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> second_difference(torch.square, x, delta, 0.5, step=0.5)
        tensor([[[8.]]])
        >>> second_difference(torch.relu, x - 2, delta, 0.5, step=0.5)  # a jump of 2 in the slope, over 0.5
        tensor([[[4.]]])
    """
    name = "second_difference"
    _check.same_shape(name, x=x, delta=delta)
    _check.number(name, "step", step, above=0, at_most=1)
    fixed(name, h)
    places = positions(name, alphas, x)
    values = along(name, h, x, delta, torch.cat([places - step, places, places + step]))
    before, here, after = values.chunk(3)
    difference: Tensor = ((after - here) - (here - before)) / step**2
    return difference


def peano_identity(
    h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor, *, nodes: int = 32
) -> Identity:
    r"""The residual as a weighted sum of all curvature on the segment.

    $$ r(\alpha) = -\int_0^1 K(\alpha, s)\; \Delta^\top H_h(x + s\Delta)\,\Delta \; ds,
       \qquad K(\alpha, s) = \min(\alpha, s)\,\big(1 - \max(\alpha, s)\big) $$

    $K$ is never negative and integrates to $\alpha(1-\alpha)/2$. So a zero residual at one $\alpha$ only says
    that the weighted curvature cancels. This is what RPAT's Equation 9 becomes with its remainder kept.
    Vacuous for piecewise-linear networks, whose residual it misses entirely: use `kink_identity`.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, twice differentiable.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        nodes: Gauss-Legendre nodes on each side of the kernel's corner at $\alpha$.

    Returns:
        `Identity(left, right)`: residual and integral, each of shape `(m, B, ...)`. With 32 nodes they agree
        to 1e-9 on ordinary networks in float64.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        16 to 29 forward passes for each of `2 nodes m` places.

    Source:
        RPAT, Equation 9, with its remainder kept.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
        >>> left, right = peano_identity(torch.square, x, delta, 0.5)  # minus 8 times 1/8
        >>> left.item(), round(right.item(), 12)
        (-1.0, -1.0)
        >>> peano_identity(torch.relu, x - 1, delta, 0.5).right.item()  # the kink is invisible
        0.0
    """
    name = "peano_identity"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "nodes", nodes)
    fixed(name, h)
    places = positions(name, alphas, x)
    rows = []
    for alpha in places:
        edges = torch.stack([torch.zeros_like(alpha), alpha, torch.ones_like(alpha)])
        row = torch.zeros((), dtype=x.dtype, device=x.device)
        for s, weights in quadrature(nodes, edges):
            kernel = torch.minimum(alpha, s) * (1 - torch.maximum(alpha, s))
            row = row - weighted_sum(weights * kernel, derivatives_along(name, h, x, delta, s, 2)[2])
        rows.append(row)
    return Identity(residual(name, h, x, delta, places), torch.stack(rows))


def mean_jacobian_identity(
    h: Map,
    x: Tensor,
    delta: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    nodes: int = 32,
    breaks: Tensor | None = None,
) -> Identity:
    r"""The quotient of RPAT's loss as a difference of two mean slopes.

    $$ q(\alpha) = \operatorname*{mean}_{s \in [0, \alpha]} J_h(x + s\Delta)\,\Delta
                 - \operatorname*{mean}_{s \in [\alpha, 1]} J_h(x + s\Delta)\,\Delta $$

    First derivatives only, so it also holds for ReLU networks: this, not a Hessian, is what the loss sees of
    them.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places strictly between 0 and 1.
        nodes: Gauss-Legendre nodes on each piece.
        breaks: places in (0, 1) where the slope jumps, shape `(n,)`, the same for all samples; the quadrature
            is split there. From `kinks` it makes the right side exact for a piecewise-linear network (one
            node suffices). Without it a jump costs about `jump / nodes`.

    Returns:
        `Identity(left, right)`: quotient and difference of means, each of shape `(m, B, ...)`.

    Raises:
        ValueError: if shapes differ, a place is not inside (0, 1), or `h` is in training mode.

    Cost:
        5 to 9 forward passes for each of `nodes` places on every piece.

    Source:
        RPAT, Equation 3, read with the fundamental theorem of calculus.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
        >>> left, right = mean_jacobian_identity(torch.square, x, delta, 0.5)  # mean slopes 2 and 6
        >>> left.item(), round(right.item(), 12)
        (-4.0, -4.0)
        >>> at = torch.tensor([0.5], dtype=torch.float64)
        >>> mean_jacobian_identity(torch.relu, x - 1, delta, 0.5, nodes=1, breaks=at).right.item()  # slopes 0 and 2
        -2.0
    """
    name = "mean_jacobian_identity"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "nodes", nodes)
    fixed(name, h)
    places = positions(name, alphas, x, interior=True)
    inner = places.new_empty(0) if breaks is None else positions(name, breaks, x, name="breaks")
    rows = []
    for alpha in places:
        edges = torch.cat([places.new_zeros(1), inner, alpha[None], places.new_ones(1)]).sort().values
        row = torch.zeros((), dtype=x.dtype, device=x.device)
        for s, weights in quadrature(nodes, edges):
            # Each piece lies on one side of alpha, so its nodes do too (an empty piece weighs nothing).
            signed = torch.where(s.mean() <= alpha, weights / alpha, -weights / (1 - alpha))
            row = row + weighted_sum(signed, derivatives_along(name, h, x, delta, s, 1)[1])
        rows.append(row)
    return Identity(quotient(name, h, x, delta, places), torch.stack(rows))


def curvature_bound(
    h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor, *, points: int = 33
) -> Inequality:
    r"""The residual against the largest curvature on the segment.

    $$ \|r(\alpha)\| \le \frac{\alpha(1-\alpha)}{2}\, \sup_{s \in [0,1]} \|\Delta^\top H_h(x + s\Delta)\,\Delta\| $$

    Sharp: an equality for quadratics. Equivalent to $\|q(\alpha)\| \le \tfrac12 \sup\|g''\|$ for every $\alpha$.
    False in the other direction, and vacuous for piecewise-linear networks, where the right side is zero and
    the left side is not.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, twice differentiable.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        points: uniform places, ends included, at which the supremum is looked for. The grid underestimates it
            by a relative error of order `1 / points**2`.

    Returns:
        `Inequality(left, right)`, each of shape `(m, B)`, Euclidean norms over the outputs.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        16 to 29 forward passes for each of `points` places.

    Source:
        The converse of RPAT, Theorem 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> curvature_bound(torch.square, x, delta, 0.5)
        Inequality(left=tensor([[1.]]), right=tensor([[1.]]))
        >>> curvature_bound(torch.relu, x - 1, delta, 0.5)  # the printed theorem, on a ReLU
        Inequality(left=tensor([[0.5000]]), right=tensor([[0.]]))
    """
    name = "curvature_bound"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "points", points)
    fixed(name, h)
    places = positions(name, alphas, x)
    grid = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    largest = length(derivatives_along(name, h, x, delta, grid, 2)[2], batch_dims=2).amax(0)
    strayed = length(residual(name, h, x, delta, places), batch_dims=2)
    return Inequality(strayed, (places * (1 - places) / 2)[:, None] * largest)


def slope_variation(h: Map, x: Tensor, delta: Tensor, *, points: int = 129) -> Tensor:
    r"""How much the slope along the segment changes in total, seen on a grid.

    $$ \mathrm{TV}(g') \;\ge\; \frac1k \sum_i \big\| g(t_{i+1}) - 2 g(t_i) + g(t_{i-1}) \big\| $$

    The total variation of the slope plays the part of the curvature for any map, smooth or not:
    $\|r(\alpha)\| \le \alpha(1-\alpha)\,\mathrm{TV}(g')$. For a smooth map it is $\int\|g''\|$, for a ReLU
    network the sum of all jumps of the slope. The grid gives a lower bound that grows with `points`; `kinks`
    gives the exact value for piecewise-linear networks.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        points: uniform places, ends included, at least 3.

    Returns:
        Shape `(B,)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, `points` is below 3, or `h` is in training mode.

    Cost:
        One forward pass over `points B` inputs.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
        >>> slope_variation(torch.relu, x, delta, points=3)  # the slope goes from 0 to 2
        tensor([2.])
        >>> slope_variation(torch.neg, x, delta, points=3)
        tensor([0.])
    """
    name = "slope_variation"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "points", points)
    _check.number(name, "points", points, at_least=3)
    fixed(name, h)
    grid = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    slopes = along(name, h, x, delta, grid).diff(dim=0) * (points - 1)
    return length(slopes.diff(dim=0), batch_dims=2).sum(0)


def residual_certificate(
    h: Map,
    x: Tensor,
    delta: Tensor,
    *,
    points: int = 9,
    variation: Tensor | None = None,
    curvature: Tensor | None = None,
) -> Inequality:
    r"""What a grid of residuals proves about all places between.

    $$ \max_i \|r(\alpha_i)\| \;\le\; \sup_\alpha \|r(\alpha)\| \;\le\; \max_i \|r(\alpha_i)\| +
       \begin{cases} \tfrac{k}{4}\, \mathrm{TV}(g') \\[2pt] \tfrac{k^2}{8}\, \sup\|g''\| \end{cases} $$

    where $k = 1/(\text{points} + 1)$ is the spacing. A grid alone proves nothing; one number about the map
    has to be known besides, and exactly one must be given. The certificate is as good as that number.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        points: uniform interior places.
        variation: an upper bound on the total variation of the slope, shape `(B,)`: exact from `kinks` for
            piecewise-linear networks.
        curvature: an upper bound on $\sup\|\Delta^\top H \Delta\|$ on the segment, shape `(B,)`.

    Returns:
        `Inequality(left, right)`, each of shape `(B,)`: below and above the largest residual.

    Raises:
        ValueError: if none or both of `variation` and `curvature` are given, shapes differ, or `h` is in
            training mode.

    Cost:
        One forward pass over `(points + 2) B` inputs.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> residual_certificate(torch.square, x, delta, points=1, curvature=torch.tensor([8.0]))  # 1, and 1 + 8 / 32
        Inequality(left=tensor([1.]), right=tensor([1.2500]))
        >>> residual_certificate(torch.relu, x - 1, delta, points=1, variation=torch.tensor([2.0]))
        Inequality(left=tensor([0.5000]), right=tensor([0.7500]))
    """
    name = "residual_certificate"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "points", points)
    if (variation is None) == (curvature is None):
        given = "neither" if variation is None else "both"
        raise ValueError(
            f"{name}: exactly one of `variation` and `curvature` must be given, got {given}; a grid alone proves "
            "nothing about the places between."
        )
    fixed(name, h)
    bound = (
        bound_of(name, "variation", variation, x) if curvature is None else bound_of(name, "curvature", curvature, x)
    )
    spacing = 1 / (points + 1)
    grid = torch.linspace(0, 1, points + 2, dtype=x.dtype, device=x.device)[1:-1]
    largest = length(residual(name, h, x, delta, grid), batch_dims=2).amax(0)
    return Inequality(largest, largest + bound * (spacing / 4 if curvature is None else spacing**2 / 8))
