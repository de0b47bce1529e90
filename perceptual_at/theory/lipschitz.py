r"""How steep a map is, and how fast its Jacobian can turn: what the residual along segments says about constants.

RPAT's Theorem 2 and Equation 12 speak of Lipschitz constants. The functions here hold what is left of them: bounds on
the Jacobian's constant in both directions, and the steepness of the places that were looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import without_autocast
from perceptual_at.theory._shared import Inequality, Map, bound_of, fixed, length, positions, quotient, segment
from perceptual_at.theory.jacobian import gap_along, jacobian_at, matrix_norm, scaled


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
    return Inequality(gap_along(name, h, x, delta, places, "spectral"), places[:, None] * length(delta) * bound)


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
    start = jacobian_at(name, h, x)
    steepness, gaps = [], []
    for point in segment(x, delta, positions(name, alphas, x)):
        there = jacobian_at(name, h, point)
        steepness.append(matrix_norm(there, "spectral"))
        gaps.append(matrix_norm(there - start, "spectral"))
    return Inequality(torch.stack(steepness).amax(0), matrix_norm(start, "spectral") + torch.stack(gaps).amax(0))


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
    matrix, scale = scaled(jacobian_at(function, h, x))
    delta = _signs(matrix)
    with without_autocast(x):
        for _ in range(steps):
            image = delta @ matrix.mT
            delta = _signs(image @ matrix)
        reached: Tensor = torch.linalg.vector_norm(delta @ matrix.mT, dim=-1)
    return reached.amax(-1) * scale[..., 0, 0]


def _signs(values: Tensor) -> Tensor:
    """The sign, with +1 at zero: a corner of the cube, never an edge."""
    return torch.where(values >= 0, 1.0, -1.0).to(values)
