r"""Interpolating two inputs: RAAT's Theorem 2 with the right sign, base point, remainder and first-order term.

`mix` is the weight on the first input, $\lambda$ in the paper, and $\hat\lambda = 1 - \lambda$. Given for each sample,
shape `(B,)`, it is taken as it is.
"""

import math

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._shapes import per_sample
from perceptual_at.theory._shared import (
    Identity,
    Map,
    call,
    coefficients,
    derivatives_along,
    fixed,
    jvp,
    length,
    quadrature,
    weighted_sum,
)
from perceptual_at.theory.lipschitz import corner_ascent


def _weight(function: str, mix: float | Tensor, like: Tensor) -> Tensor:
    """The mixing weight as a tensor `(1,)` or `(B,)` beside `like`."""
    if isinstance(mix, Tensor):
        if mix.shape not in ((), (1,), (like.shape[0],)):
            raise ValueError(
                f"{function}: `mix` must be a number or a tensor of shape ({like.shape[0]},), got shape "
                f"{tuple(mix.shape)}."
            )
        if mix.ndim:
            return mix.reshape(-1).to(like)
    _check.number(function, "mix", mix, at_least=0, at_most=1)
    if isinstance(mix, Tensor):
        return mix.reshape(1).to(like)
    return torch.full((1,), mix, dtype=like.dtype, device=like.device)


def _mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """`weight first + (1 - weight) second`, sample by sample."""
    return torch.lerp(second, first, per_sample(weight.to(first.dtype), first).expand_as(first))


def mixup_residual(h: Map, x1: Tensor, x2: Tensor, mix: float | Tensor) -> Tensor:
    r"""How far `h` is from linear between two inputs.

    $$ R_0 = h\big(\lambda x_1 + \hat\lambda x_2\big) - \big[\lambda\, h(x_1) + \hat\lambda\, h(x_2)\big] $$

    The segment residual at $\alpha = \hat\lambda$ from $x_1$ along $x_2 - x_1$. With two augmentations of one
    image it is what DICAR compares before any perturbation.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x1: inputs, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        mix: $\lambda$, the weight on `x1`, in [0, 1]: a number, or shape `(B,)`, which is taken as it is.

    Returns:
        $R_0$, the shape of `h(x1)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward pass over `3 B` inputs.

    Source:
        RAAT, Definition 4 and Theorem 6 (Verma et al., 2019).

    Examples:
        >>> import torch
        >>> x1, x2 = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> mixup_residual(torch.square, x1, x2, 0.25)  # 1.5^2 - 0.75 * 4
        tensor([[-0.7500]])
        >>> mixup_residual(torch.neg, x1, x2, 0.25)
        tensor([[0.]])
    """
    name = "mixup_residual"
    _check.same_shape(name, x1=x1, x2=x2)
    fixed(name, h)
    weight = _weight(name, mix, x1)
    return _mixup_residual(name, h, x1, x2, weight)


def _mixup_residual(function: str, h: Map, x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
    middle, first, second = call(function, h, torch.cat([_mix(x1, x2, weight), x1, x2])).chunk(3)
    w = per_sample(weight, middle)
    return w * (middle - first) + (1 - w) * (middle - second)


def taylor_mixup_residual(h: Map, x1: Tensor, x2: Tensor, mix: float | Tensor, *, order: int = 4) -> Tensor:
    r"""The mixup residual from the derivatives at the first input, up to a given order.

    $$ \sum_{k=2}^{K} \frac{\hat\lambda^k - \hat\lambda}{k!}\; \partial^k h(x_1)\big[(x_2 - x_1)^{\otimes k}\big] $$

    Exact for polynomials of degree $K$. The printed Theorem 2 of RAAT differs in three places that matter: it
    puts the derivatives at the clean image $x$ and the adversarial perturbation $x' - x$ where $x_1$ and $x_2
    - x_1$ belong, and lets the remainder vanish for $K \to \infty$ when $\|\Delta\| < 1$, which needs a
    radius of convergence larger than $\|\Delta\|$ instead. Its sign $(\hat\lambda - \hat\lambda^k)$ is
    reversed, harmlessly, under a square.

    Vacuous for piecewise-linear networks, where every term is zero.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, smooth enough.
        x1: inputs, shape `(B, ...)`, the base point of the expansion.
        x2: other inputs, the shape of `x1`.
        mix: $\lambda$, the weight on `x1`.
        order: $K$, from 1 to 4.

    Returns:
        The shape of `h(x1)`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], `order` is outside 1 to 4, or `h` is in
            training mode.

    Cost:
        That of `taylor_coefficients`.

    Source:
        RAAT, Theorem 2.

    Examples:
        >>> import torch
        >>> x1, x2 = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> taylor_mixup_residual(torch.square, x1, x2, 0.25)  # (0.75^2 - 0.75) / 2 * 2 * 2^2
        tensor([[-0.7500]])
        >>> taylor_mixup_residual(torch.relu, x1 - 1, x2 - 1, 0.5)  # the true residual is -0.5
        tensor([[0.]])
    """
    name = "taylor_mixup_residual"
    _check.same_shape(name, x1=x1, x2=x2)
    _check.count(name, "order", order, at_most=4)
    fixed(name, h)
    return _taylor_mixup_residual(name, h, x1, x2, _weight(name, mix, x1), order)


def _taylor_mixup_residual(function: str, h: Map, x1: Tensor, x2: Tensor, weight: Tensor, order: int) -> Tensor:
    terms = coefficients(function, h, x1, x2 - x1, x1.new_zeros(1), order)
    hat = 1 - weight
    total = torch.zeros_like(terms[0])
    for k in range(2, order + 1):
        total = total + per_sample(hat**k - hat, total) * terms[k]
    return total


def mixup_identity(h: Map, x1: Tensor, x2: Tensor, mix: float | Tensor, *, order: int = 2, nodes: int = 16) -> Identity:
    r"""RAAT's Theorem 2 before the attack, with its exact remainder.

    $$ R_0 - \sum_{k=2}^{K} \frac{\hat\lambda^k - \hat\lambda}{k!}\, g^{(k)}(0)
       = \frac{1}{K!}\Big[\int_0^{\hat\lambda} (\hat\lambda - s)^K g^{(K+1)}(s)\, ds
         - \hat\lambda \int_0^1 (1 - s)^K g^{(K+1)}(s)\, ds\Big], \qquad g(t) = h\big(x_1 + t\,(x_2 - x_1)\big) $$

    The remainder is of order $\|x_2 - x_1\|^{K+1}$; the paper prints $\|\Delta\|^K$.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, smooth.
        x1: inputs, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        mix: $\lambda$, the weight on `x1`, one number.
        order: $K$, from 1 to 3.
        nodes: Gauss-Legendre nodes of each integral.

    Returns:
        `Identity(left, right)`, each the shape of `h(x1)`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], `order` is outside 1 to 3, or `h` is in
            training mode.

    Cost:
        Nested forward mode of order `K + 1` at `2 nodes` places.

    Source:
        RAAT, Theorem 6 and Equation 5.

    Examples:
        >>> import torch
        >>> x1, x2 = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
        >>> left, right = mixup_identity(lambda x: x**3, x1, x2, 0.5)  # 1 - 4: the second derivative at 0 is 0
        >>> left.item(), round(right.item(), 12)
        (-3.0, -3.0)
        >>> mixup_identity(torch.square, x1, x2, 0.5).error.item() < 1e-12
        True
    """
    name = "mixup_identity"
    _check.same_shape(name, x1=x1, x2=x2)
    _check.count(name, "order", order)
    _check.number(name, "order", order, at_most=3)
    _check.count(name, "nodes", nodes)
    fixed(name, h)
    if isinstance(mix, Tensor) and mix.numel() != 1:
        raise ValueError(f"{name}: `mix` must be one number, got shape {tuple(mix.shape)}.")
    weight = _weight(name, mix, x1)
    hat = 1 - weight[0]
    zero, one = torch.zeros_like(hat), torch.ones_like(hat)
    left = _mixup_residual(name, h, x1, x2, weight) - _taylor_mixup_residual(name, h, x1, x2, weight, order)
    right = torch.zeros_like(left)
    for end, factor in ((hat, one), (one, -hat)):
        ((s, weights),) = quadrature(nodes, torch.stack([zero, end]))
        derivative = derivatives_along(name, h, x1, x2 - x1, s, order + 1)[order + 1]
        right = right + factor * weighted_sum(weights * (end - s) ** order, derivative) / math.factorial(order)
    return Identity(left, right)


def adversarial_first_order_term(
    h: Map, x1: Tensor, x2: Tensor, delta1: Tensor, delta2: Tensor, mix: float | Tensor
) -> Tensor:
    r"""The term of first order in the attack budget that RAAT's Theorem 2 leaves out.

    $$ J_h(m)\, d, \qquad m = \lambda x_1 + \hat\lambda x_2, \quad d = \lambda\delta_1 + \hat\lambda\delta_2 $$

    DICAR compares `h` at the interpolated *adversarial* inputs with the interpolation of its clean outputs,
    and that difference is $R_0 + J_h(m)\,d + O(\epsilon^2)$. For an affine map it is exactly $J d$: DICAR is
    then not zero, and making it zero means making the map ignore the attack.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable almost everywhere.
        x1: inputs, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        delta1: perturbation of `x1`, its shape.
        delta2: perturbation of `x2`, the same shape.
        mix: $\lambda$, the weight on `x1`: a number or shape `(B,)`.

    Returns:
        The shape of `h(x1)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward-mode pass, 5 to 9 forward passes on a CPU.

    Source:
        RAAT, Theorem 2, between Equations 5 and 6.

    Examples:
        >>> import torch
        >>> x1, x2, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]])
        >>> adversarial_first_order_term(torch.square, x1, x2, delta, delta, 0.5)  # slope 2 at 1, times 0.5
        tensor([[1.]])
        >>> adversarial_first_order_term(torch.square, x1, x2, delta, -delta, 0.5)  # opposite attacks cancel
        tensor([[0.]])
    """
    name = "adversarial_first_order_term"
    _check.same_shape(name, x1=x1, x2=x2, delta1=delta1, delta2=delta2)
    fixed(name, h)
    weight = _weight(name, mix, x1)
    middle, shift = _mix(x1, x2, weight), _mix(delta1, delta2, weight)
    return jvp(lambda y: call(name, h, y.clone()), middle, shift)[1]


def adversarial_mixup_identity(
    h: Map,
    x1: Tensor,
    x2: Tensor,
    delta1: Tensor,
    delta2: Tensor,
    mix: float | Tensor,
    *,
    nodes: int = 12,
) -> Identity:
    r"""What DICAR compares, split into the curvature between two views and the attack on their mixture.

    $$ h(m + d) - \big[\lambda\, h(x_1) + \hat\lambda\, h(x_2)\big] = R_0 + \int_0^1 J_h(m + t d)\, d \; dt $$

    Exact for any budget. The printed Theorem 2 of RAAT keeps only $R_0$; the integral is of first order in
    the budget and is the larger part for two views that are close (`crossover_eps`).

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable.
        x1: inputs, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        delta1: perturbation of `x1`, its shape.
        delta2: perturbation of `x2`, the same shape.
        mix: $\lambda$, the weight on `x1`: a number or shape `(B,)`.
        nodes: Gauss-Legendre nodes.

    Returns:
        `Identity(left, right)`, each the shape of `h(x1)`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], or `h` is in training mode.

    Cost:
        5 to 9 forward passes for each of `nodes` places.

    Source:
        RAAT, Theorem 2 and Equation 6.

    Examples:
        >>> import torch
        >>> x1, x2, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]])
        >>> left, right = adversarial_mixup_identity(torch.square, x1, x2, delta, delta, 0.5)
        >>> left, right.round(decimals=4)  # 1.5^2 - 2, and -1 + 1.25
        (tensor([[0.2500]]), tensor([[0.2500]]))
        >>> adversarial_mixup_identity(torch.neg, x1, x2, delta, delta, 0.5).left  # affine, and not zero
        tensor([[-0.5000]])
    """
    name = "adversarial_mixup_identity"
    _check.same_shape(name, x1=x1, x2=x2, delta1=delta1, delta2=delta2)
    _check.count(name, "nodes", nodes)
    fixed(name, h)
    weight = _weight(name, mix, x1)
    middle, shift = _mix(x1, x2, weight), _mix(delta1, delta2, weight)
    attacked, first, second = call(name, h, torch.cat([middle + shift, x1, x2])).chunk(3)
    left = attacked - _mix(first, second, weight)
    ((t, weights),) = quadrature(nodes, torch.cat([weight.new_zeros(1), weight.new_ones(1)]))
    moved = weighted_sum(weights, derivatives_along(name, h, middle, shift, t, 1)[1])
    return Identity(left, _mixup_residual(name, h, x1, x2, weight) + moved)


def crossover_eps(h: Map, x1: Tensor, x2: Tensor, mix: float | Tensor, *, steps: int = 20) -> Tensor:
    r"""The $\ell_\infty$ budget above which DICAR is mostly about the attack.

    $$ \epsilon^* = \frac{\|R_0\|_2}{\|J_h(m)\|_{\infty \to 2}}, \qquad m = \lambda x_1 + \hat\lambda x_2 $$

    Below it the curvature between the two views dominates, above it the first derivative at their mixture.
    Since $\|R_0\|$ shrinks with the square of the distance of the views, close views put it far below 8/255.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, differentiable.
        x1: inputs, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        mix: $\lambda$, the weight on `x1`: a number or shape `(B,)`.
        steps: rounds of `linf_to_l2_norm`, whose lower bound makes this an upper bound on $\epsilon^*$.

    Returns:
        Shape `(B,)`, in units of `x`; infinite where the Jacobian vanishes.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward pass over `3 B` inputs and `C` backward passes.

    Source:
        RAAT, Theorem 2, on the limit of a vanishing budget.

    Examples:
        >>> import torch
        >>> x1, x2 = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> crossover_eps(torch.square, x1, x2, 0.5)  # residual 1, slope 2
        tensor([0.5000])
        >>> crossover_eps(torch.neg, x1, x2, 0.5)  # affine: any attack dominates
        tensor([0.])
    """
    name = "crossover_eps"
    _check.same_shape(name, x1=x1, x2=x2)
    _check.count(name, "steps", steps)
    fixed(name, h)
    weight = _weight(name, mix, x1)
    residual = length(_mixup_residual(name, h, x1, x2, weight))
    steepness = corner_ascent(name, h, _mix(x1, x2, weight), steps)
    return torch.where(steepness == 0, math.inf, residual / torch.where(steepness == 0, 1.0, steepness))


def mixup_box(
    x1: Tensor,
    x2: Tensor,
    mix: float | Tensor,
    *,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    r"""All mixtures of two attacked inputs: a box, so DICAR's double maximum is a single one.

    $$ \{\lambda x_1' + \hat\lambda x_2'\} = \big[\lambda\, l(x_1) + \hat\lambda\, l(x_2),\;
       \lambda\, u(x_1) + \hat\lambda\, u(x_2)\big],
       \qquad l(x) = \max(0, x - \epsilon),\quad u(x) = \min(1, x + \epsilon) $$

    The targets of RAAT's Definition 4 are clean outputs, so the two attacks enter only through their mixture.
    One PGD inside this box solves the inner problem at half the cost of two.

    Args:
        x1: inputs in `bounds`, shape `(B, ...)`.
        x2: other inputs, the shape of `x1`.
        mix: $\lambda$, the weight on `x1`: a number or shape `(B,)`.
        eps: $\ell_\infty$ budget of each attack, in units of `x`.
        bounds: smallest and largest allowed value.

    Returns:
        The lowest and the highest mixture, each the shape of `x1`.

    Raises:
        ValueError: if shapes differ, `mix` is outside [0, 1], `eps` is negative, or the bounds are no interval.

    Cost:
        None.

    Source:
        RAAT, Definition 4.

    Examples:
        >>> import torch
        >>> x1, x2 = torch.tensor([[0.0]]), torch.tensor([[0.5]])
        >>> mixup_box(x1, x2, 0.5, eps=0.25)  # (0 + 0.25) / 2 and (0.25 + 0.75) / 2
        (tensor([[0.1250]]), tensor([[0.5000]]))
        >>> mixup_box(x1, x2, 1.0, eps=0.0)
        (tensor([[0.]]), tensor([[0.]]))
    """
    name = "mixup_box"
    _check.same_shape(name, x1=x1, x2=x2)
    _check.number(name, "eps", eps, at_least=0)
    weight = _weight(name, mix, x1)
    if not _check.is_sequence(bounds) or len(bounds) != 2:
        raise TypeError(f"{name}: `bounds` must be two numbers (low, high), got {bounds!r}.")
    low, high = bounds
    for value in bounds:
        _check.number(name, "bounds", value)
    if not low < high:
        raise ValueError(f"{name}: `bounds` must be numbers (low, high) with low < high, got {bounds!r}.")
    return (
        _mix((x1 - eps).clamp(low, high), (x2 - eps).clamp(low, high), weight),
        _mix((x1 + eps).clamp(low, high), (x2 + eps).clamp(low, high), weight),
    )
