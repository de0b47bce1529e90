r"""First derivatives along a segment: what robust perception keeps constant, and what it does not.

A residual of zero makes $J_h(x + \alpha\Delta)\,\Delta$ constant. RPAT's Theorem 2 concludes that $J_h$
itself is constant, which cancels a vector from both sides of an equation. The functions here measure both.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample
from perceptual_at.theory._shared import (
    Identity,
    Inequality,
    Map,
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
    return _jacobian(name, h, x)


def _jacobian(name: str, h: Map, x: Tensor) -> Tensor:
    # The clone keeps in-place layers away from the caller's tensor.
    with torch.inference_mode(False):
        values, pullback = torch.func.vjp(lambda y: call(name, h, y.clone()), usable(x))[:2]
        outputs = values[0].numel()
        units = torch.eye(outputs, dtype=values.dtype, device=values.device)[:, None].expand(-1, x.shape[0], -1)
        (rows,) = torch.func.vmap(pullback)(units.reshape(outputs, *values.shape))
    jacobian: Tensor = rows.flatten(2).transpose(0, 1)
    return jacobian


def _matrix_norm(matrices: Tensor, norm: str) -> Tensor:
    if norm == "frobenius":
        return length(matrices, batch_dims=matrices.ndim - 2)
    own = matrices.to(wide(matrices))  # half precision has no eigenvalues
    gram = own @ own.mT if own.shape[-2] <= own.shape[-1] else own.mT @ own
    largest: Tensor = torch.linalg.eigvalsh(gram)[..., -1]
    return largest.clamp_min(0).sqrt().to(matrices.dtype)


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
        Shape `(m, B)`, in units of `h` per unit of `x`. Not differentiable where it is zero.

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
    return _gap(name, h, x, delta, positions(name, alphas, x), norm)


def _gap(function: str, h: Map, x: Tensor, delta: Tensor, places: Tensor, norm: str) -> Tensor:
    start = _jacobian(function, h, x)
    changes = (_jacobian(function, h, point) - start for point in segment(x, delta, places))
    return torch.stack([_matrix_norm(change, norm) for change in changes])


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
    far = segment(x, delta, positions(name, alphas, x))
    generator = torch_generator(name, generator)
    start = torch.randn(far.shape, generator=generator, dtype=x.dtype, device=generator.device)
    start = start.to(x.device, non_blocking=True)
    v = torch.stack([delta.expand_as(far), start]).flatten(0, 2)
    far = torch.stack([far, far]).flatten(0, 2)
    near = x.repeat(v.shape[0] // x.shape[0], *[1] * (x.ndim - 1))
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
    best = torch.stack(history).reshape(steps, 2, -1, x.shape[0]).amax(1)
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
    start = _jacobian(name, h, x)
    gaps, images = [], []
    for point in segment(x, delta, positions(name, alphas, x)):
        change = _jacobian(name, h, point) - start
        gaps.append(_matrix_norm(change, "spectral"))
        images.append(length((change @ delta.flatten(1)[:, :, None])[..., 0]))
    return Inequality(torch.stack(images), torch.stack(gaps) * length(delta))


def lipschitz_quotient(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""What the residual proves about the Jacobian: a lower bound on its Lipschitz constant.

    $$ \frac{2\,\|q(\alpha)\|}{\|\Delta\|^2} \;\le\; \operatorname{Lip}(J_h)
       = \sup_{x, \Delta, \alpha} \frac{2\,\|q(\alpha)\|}{\|\Delta\|^2} $$

    The bound is sharp, and the supremum over *all* segments in a convex set is the constant itself: this
    two-way statement is what RPAT's Theorem 2 can be turned into. One segment gives a lower bound, never an
    upper one: a random direction found 26 to 79 % of it. At a ReLU kink the quotient grows like `1 /
    |delta|`, so the supremum is infinite.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`, not zero.
        alphas: places strictly between 0 and 1.

    Returns:
        Shape `(m, B)`, in units of `h` per squared unit of `x`.

    Raises:
        ValueError: if shapes differ, a place is not inside (0, 1), or `h` is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs.

    Source:
        RPAT, Theorem 2, as a statement that holds in both directions.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> lipschitz_quotient(torch.square, x, delta, 0.5)  # the derivative 2 x has Lipschitz constant 2
        tensor([[2.]])
        >>> lipschitz_quotient(torch.neg, x, delta, 0.5)
        tensor([[0.]])
    """
    name = "lipschitz_quotient"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    slopes = quotient(name, h, x, delta, positions(name, alphas, x, interior=True))
    return 2 * length(slopes, batch_dims=2) / length(delta).square()


def jacobian_gap_bound(
    h: Map,
    x: Tensor,
    delta: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    lipschitz: float | Tensor,
) -> Inequality:
    r"""RPAT's Theorem 2 with the hypothesis it needs.

    $$ \big\|J_h(x + \alpha\Delta) - J_h(x)\big\|_{\mathrm{spec}} \;\le\; \alpha\,\|\Delta\|\; L,
       \qquad L = \sup \frac{2\,\|q\|}{\|\Delta\|^2} $$

    with the supremum over every segment in a convex set that contains this one. With an $L$ from this segment
    alone, or from a sample of segments, the inequality can fail.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, continuously differentiable.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        lipschitz: $L$, a number or shape `(B,)`; `lipschitz_quotient` bounds it from below.

    Returns:
        `Inequality(left, right)`, each of shape `(m, B)`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        That of `jacobian_gap`.

    Source:
        RPAT, Theorem 2, corrected.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> jacobian_gap_bound(torch.square, x, delta, 0.5, lipschitz=2.0)
        Inequality(left=tensor([[2.]]), right=tensor([[2.]]))
        >>> jacobian_gap_bound(torch.neg, x, delta, 0.5, lipschitz=0.0)
        Inequality(left=tensor([[0.]]), right=tensor([[0.]]))
    """
    name = "jacobian_gap_bound"
    _check.same_shape(name, x=x, delta=delta)
    bound = bound_of(name, "lipschitz", lipschitz, x)
    fixed(name, h)
    places = positions(name, alphas, x)
    return Inequality(_gap(name, h, x, delta, places, "spectral"), places[:, None] * length(delta) * bound)


def local_lipschitz_bound(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Inequality:
    r"""The steepest point of the segment against the steepness at its start plus the change of the Jacobian.

    $$ \max_\alpha \|J_h(x + \alpha\Delta)\|_{\mathrm{spec}} \;\le\;
       \|J_h(x)\|_{\mathrm{spec}} + \max_\alpha \|J_h(x + \alpha\Delta) - J_h(x)\|_{\mathrm{spec}} $$

    The true scope of RPAT's Equation 12: a triangle inequality that bounds the steepness *at the places
    named, on this segment*. It says nothing about the rest of the ball (which is steeper somewhere, as
    measured), and nothing about a global constant. With a global supremum on the right the statement is a
    tautology.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        `Inequality(left, right)`, each of shape `(B,)`, in units of `h` per unit of `x`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        That of `jacobian_gap`.

    Source:
        RPAT, Theorem 2, Equation 12.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> local_lipschitz_bound(torch.square, x, delta, [0.5, 1.0])  # slopes 2, 4, 6
        Inequality(left=tensor([6.]), right=tensor([6.]))
        >>> local_lipschitz_bound(torch.square, x, -delta, [0.5, 1.0])  # slopes 2, 0, -2
        Inequality(left=tensor([2.]), right=tensor([6.]))
    """
    name = "local_lipschitz_bound"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    start = _jacobian(name, h, x)
    steepness, gaps = [], []
    for point in segment(x, delta, positions(name, alphas, x)):
        there = _jacobian(name, h, point)
        steepness.append(_matrix_norm(there, "spectral"))
        gaps.append(_matrix_norm(there - start, "spectral"))
    return Inequality(torch.stack(steepness).amax(0), _matrix_norm(start, "spectral") + torch.stack(gaps).amax(0))


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
        directions = v.repeat(y.shape[0] // v.shape[0], *[1] * (v.ndim - 1))
        return jvp(lambda z: call(name, h, z.clone()), y, directions)[1]

    def integral(alpha: Tensor) -> Tensor:
        ((s, weights),) = quadrature(nodes, torch.stack([torch.zeros_like(alpha), alpha]))
        return weighted_sum(weights, derivatives_along(name, slope, x, delta, s, 1)[1])

    places = positions(name, alphas, x)
    changes = [slope(x + alpha * delta) - slope(x) for alpha in places]
    integrals = [recorded(functools.partial(integral, alpha)) for alpha in places]
    return Identity(torch.stack(changes), torch.stack(integrals))


def linf_to_l2_norm(h: Map, x: Tensor, *, steps: int = 20) -> Tensor:
    r"""How far a perturbation of maximum norm one can move the linearised outputs.

    $$ \|J_h(x)\|_{\infty \to 2} = \max_{\|\delta\|_\infty \le 1} \|J_h(x)\,\delta\|_2 $$

    The maximum sits at a corner $\delta \in \{-1, 1\}^d$ and is hard to find exactly. Sign ascent $\delta
    \leftarrow \operatorname{sign}(J^\top J \delta)$ never decreases the value; it starts from the sign of
    every row of $J$ and keeps the best. The result is reached by some $\delta$, so it is a lower bound, and
    it is exact for a single output, where it is the $\ell_1$ norm of the gradient.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x: inputs, shape `(B, ...)`.
        steps: rounds of ascent, at least 1; it usually stands still after a few.

    Returns:
        Shape `(B,)`, in units of `h` per unit of `x`.

    Raises:
        ValueError: if `steps` is below 1 or `h` is in training mode.

    Cost:
        `C` backward passes and `steps` matrix products, memory `2 B C d`.

    Examples:
        >>> import torch
        >>> linf_to_l2_norm(lambda x: x[:, :1] - 3 * x[:, 1:], torch.zeros(1, 2))
        tensor([4.])
        >>> linf_to_l2_norm(lambda x: torch.cat([3 * x[:, :1], 4 * x[:, 1:]], dim=1), torch.zeros(1, 2))
        tensor([5.])
    """
    name = "linf_to_l2_norm"
    _check.floating(name, x=x)
    _check.count(name, "steps", steps)
    fixed(name, h)
    return corner_ascent(name, h, x, steps)


def corner_ascent(function: str, h: Map, x: Tensor, steps: int) -> Tensor:
    """The largest change of the linearised outputs that sign ascent finds, shape `(B,)`."""
    matrix = _jacobian(function, h, x)
    delta = _signs(matrix)
    for _ in range(steps):
        image = delta @ matrix.mT
        delta = _signs(image @ matrix)
    reached: Tensor = torch.linalg.vector_norm(delta @ matrix.mT, dim=-1)
    return reached.amax(-1)


def _signs(values: Tensor) -> Tensor:
    """The sign, with +1 at zero: a corner of the cube, never an edge."""
    return torch.where(values >= 0, 1.0, -1.0).to(values)
