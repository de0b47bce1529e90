r"""How far a map strays from the straight line on one segment, and what its Taylor series says about it.

With $g(t) = h(x + t\,\Delta)$ every statement on this page is about the curve $g$ on $[0, 1]$: clean at 0,
adversarial at 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at._shapes import per_sample
from perceptual_at.theory._shared import (
    Identity,
    Map,
    along,
    by_point,
    call,
    coefficients,
    fixed,
    from_chord,
    length,
    positions,
    quotient,
    residual,
    segment,
    with_ends,
)


def segment_residual(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""How far `h` is from its chord at chosen places on the segment.

    $$ r(\alpha) = h(x + \alpha\Delta) - \big[(1-\alpha)\, h(x) + \alpha\, h(x + \Delta)\big] $$

    It vanishes at every $\alpha$ exactly when $h$ is affine on the segment. One place decides nothing:
    $\alpha = 1/2$ cannot see any curve that is odd about the midpoint. Polynomials of degree $K$ need $K - 1$
    places, random places suffice for analytic maps, and a single ReLU kink shows at every interior place.

    The definition is RPAT's Equation 5 and RAAT's Definition 1. RPAT's own Definition 1 asks for the lengths
    only, which is weaker: see `norm_defect`.

    Args:
        h: any map `(B, ...) -> (B, ...)`: logits, probabilities, one hidden layer. Modules in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`; `x_adv - x`.
        alphas: places in [0, 1]: a number, a sequence, or a tensor of shape `(m,)`, which is taken as it is.

    Returns:
        $r$, shape `(m, B, ...)`, in the units of `h`. Rounding is about `64 eps max|h|`: in float32 a
        residual below `1e-5 max|h|` is noise. Differentiable in the inputs and in the parameters of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs.

    Source:
        RPAT, Equation 5; RAAT, Definition 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> segment_residual(lambda x: 3 * x + 1, x, delta, 0.5)  # affine: on the chord
        tensor([[[0.]]])
        >>> segment_residual(torch.square, x, delta, [0.25, 0.5])  # 0.25 - 1 and 1 - 2
        tensor([[[-0.7500]],
        <BLANKLINE>
                [[-1.0000]]])
    """
    name = "segment_residual"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    places = positions(name, alphas, x)
    return residual(name, h, x, delta, places)


def segment_quotient(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""The difference of the two slopes that robust perception compares.

    $$ q(\alpha) = \frac{h(x+\alpha\Delta) - h(x)}{\alpha} - \frac{h(x+\Delta) - h(x+\alpha\Delta)}{1-\alpha}
       = \frac{r(\alpha)}{\alpha(1-\alpha)} $$

    It is minus the second divided difference of $g$ on $0, \alpha, 1$, and has limits at both ends:
    $q(0^+) = g'(0) - (g(1)-g(0))$, $q(1^-) = (g(1)-g(0)) - g'(1)$. A loss on $q$ is a loss on $r$ times
    $(\alpha(1-\alpha))^{-2}$: 16 at one half, 39.06 at 0.2 and 0.8.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places strictly between 0 and 1; in float32 stay inside [0.01, 0.99], where the noise is below
            `3e-5 max|h|`.

    Returns:
        $q$, shape `(m, B, ...)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is not inside (0, 1), or `h` is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs.

    Source:
        RPAT, Equation 3.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> segment_quotient(torch.square, x, delta, 0.5)  # slope 2 on the first half, 6 on the second
        tensor([[[-4.]]])
        >>> segment_quotient(torch.relu, x - 1, delta, 0.5)  # 0, then 2
        tensor([[[-2.]]])
    """
    name = "segment_quotient"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    places = positions(name, alphas, x, interior=True)
    return quotient(name, h, x, delta, places)


def norm_defect(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""How far the *length* of the change is from proportional: robust perception as it is printed.

    $$ \|h(x+\alpha\Delta) - h(x)\|_2 - \alpha\,\|h(x+\Delta) - h(x)\|_2 $$

    A diagnostic, not a loss. A zero residual makes it zero, but not the other way round once `h` has two
    outputs: a spiral of the right speed has no defect and is nowhere near its chord. For a single output of a
    continuous map, zero at all places means the same for both.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        The defect, shape `(m, B)`, in the units of `h`.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs.

    Source:
        RPAT, Definition 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> spiral = lambda t: torch.cat([t * torch.cos(2 * torch.pi * t), t * torch.sin(2 * torch.pi * t)], dim=1)
        >>> norm_defect(spiral, x, delta, 0.5)  # half as far from the start, in the opposite direction
        tensor([[0.]])
        >>> norm_defect(torch.square, x, delta, 0.5)  # a quarter instead of a half
        tensor([[-0.2500]])
    """
    name = "norm_defect"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    places = positions(name, alphas, x)
    values = along(name, h, x, delta, with_ends(places))
    moved = length(values - values[0], batch_dims=2)
    return moved[2:] - per_sample(places, moved) * moved[1]


def stewart_identity(h: Map, x: Tensor, delta: Tensor, alphas: float | Sequence[float] | Tensor) -> Identity:
    r"""The squared residual from three lengths: what distances alone can say about it.

    $$ \|r(\alpha)\|^2 = (1-\alpha)\|g(\alpha)-g(0)\|^2 + \alpha\|g(1)-g(\alpha)\|^2
       - \alpha(1-\alpha)\|g(1)-g(0)\|^2 $$

    Stewart's theorem for the triangle $g(0), g(\alpha), g(1)$, exact in the Euclidean norm. It shows what is
    missing from RPAT's Definition 1: proportional first lengths leave
    $\alpha(\|g(1)-g(\alpha)\|^2 - (1-\alpha)^2 L^2)$, so both lengths have to be right.

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].

    Returns:
        `Identity(left, right)`, each of shape `(m, B)`; they agree to `32 eps` times the sum of the three
        squared lengths.

    Raises:
        ValueError: if shapes differ, a place is outside [0, 1], or `h` is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs.

    Source:
        Stewart's theorem, applied to RPAT, Definition 1.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> stewart_identity(torch.square, x, delta, 0.5)  # (1 - 2)^2 and (1 + 9) / 2 - 16 / 4
        Identity(left=tensor([[1.]]), right=tensor([[1.]]))
        >>> stewart_identity(torch.neg, x, delta, 0.5)
        Identity(left=tensor([[0.]]), right=tensor([[0.]]))
    """
    name = "stewart_identity"
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, h)
    places = positions(name, alphas, x)
    values = along(name, h, x, delta, with_ends(places))
    clean, adv, middle = values[:1], values[1:2], values[2:]
    chord, first, second, whole = (
        length(part, batch_dims=2).square()
        for part in (from_chord(values, places), middle - clean, adv - middle, adv - clean)
    )
    a = places[:, None]
    return Identity(chord, (1 - a) * first + a * second - a * (1 - a) * whole)


def layer_residuals(
    model: nn.Module,
    x: Tensor,
    delta: Tensor,
    alphas: float | Sequence[float] | Tensor,
    *,
    layers: Sequence[str] | None = None,
    relative: bool = False,
) -> dict[str, Tensor]:
    r"""The segment residual after every layer of a model.

    RAAT's Definition 1 asks for $r(\alpha) = 0$ after *all* layers. That is a strong demand. A plain ReLU
    network meets it exactly when no unit changes sign on the segment. A network with an analytic activation
    (tanh, GELU, softplus) meets it only where its first layer does not see the perturbation at all. Only the
    residual of the logits is a sensible target for smooth networks.

    Args:
        model: a module in eval mode.
        x: clean inputs, shape `(B, ...)`.
        delta: perturbation, the shape of `x`.
        alphas: places in [0, 1].
        layers: names as in `model.named_modules()`; all layers without children if not given.
        relative: divide by the length of the layer's own change from clean to adversarial, sample by sample, so that
            layers can be compared; NaN where it does not change.

    Returns:
        `{name: residual}` in the order of execution, each of shape `(m, B, ...)`. A layer that runs several
        times keeps its last output; of one that gives several tensors, as attention does, the first counts.

    Raises:
        ValueError: if a name is unknown, a layer never ran or changes the batch dimension, shapes differ, a
            place is outside [0, 1], or the model is in training mode.

    Cost:
        One forward pass over `(m + 2) B` inputs; the outputs of the layers named are kept.

    Source:
        RAAT, Definition 1.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Identity(), nn.ReLU())
        >>> residuals = layer_residuals(net, torch.tensor([[-1.0]]), torch.tensor([[2.0]]), 0.5)
        >>> residuals["0"]  # affine
        tensor([[[0.]]])
        >>> residuals["1"]  # relu(0) - (relu(-1) + relu(1)) / 2
        tensor([[[-0.5000]]])
    """
    name = "layer_residuals"
    _check.module(name, model)
    _check.flag(name, relative=relative)
    _check.same_shape(name, x=x, delta=delta)
    fixed(name, model)
    places = positions(name, alphas, x)
    modules = dict(model.named_modules())
    if layers is not None:
        _check.names(name, "layers", layers)
    wanted = [key for key, layer in modules.items() if not any(layer.children())] if layers is None else layers
    for key in wanted:
        if key not in modules:
            raise ValueError(f"{name}: `layers` names {key!r}, which is not a module of {type(model).__name__}.")
    points = segment(x, delta, with_ends(places))
    outputs = _outputs_of(name, model, {key: modules[key] for key in wanted}, points.flatten(0, 1))
    residuals = {}
    for key in wanted if layers is not None else outputs:
        if key not in outputs:
            raise ValueError(
                f"{name}: layer {key!r} did not run, or gave no tensor, in the forward pass of {type(model).__name__}."
            )
        if outputs[key].shape[0] != points.shape[0] * points.shape[1]:
            raise ValueError(
                f"{name}: layer {key!r} changes the batch dimension (shape {tuple(outputs[key].shape)} for "
                f"{points.shape[0] * points.shape[1]} inputs); leave it out of `layers`."
            )
        values = by_point(outputs[key], points)
        residuals[key] = from_chord(values, places)
        if relative:
            residuals[key] = residuals[key] / per_sample(length(values[1] - values[0]), values[0])
    return residuals


def _outputs_of(function: str, model: nn.Module, layers: Mapping[str, nn.Module], inputs: Tensor) -> dict[str, Tensor]:
    """What layers give in one forward pass, in the order of execution; nothing of those that give no tensor."""
    outputs: dict[str, Tensor] = {}

    def keep(key: str, output: Any) -> None:
        outputs.pop(key, None)  # a repeated layer moves to its last place
        if (first := _first_tensor(output)) is not None:
            outputs[key] = first.clone()  # the next layer may work in place

    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, key=key: keep(key, output))
        for key, layer in layers.items()
    ]
    try:
        call(function, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor in what a layer gave: attention and recurrent layers give several."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def taylor_coefficients(h: Map, x: Tensor, delta: Tensor, *, order: int = 4, alpha: float = 0.0) -> Tensor:
    r"""Taylor coefficients of the curve $g(t) = h(x + t\Delta)$.

    $$ c_k = \frac{1}{k!}\frac{d^k}{dt^k}\, h(x + t\Delta)\Big|_{t=\alpha}
           = \frac{1}{k!}\,\partial^k h(x + \alpha\Delta)[\Delta, \dots, \Delta], \qquad k = 0, \dots, K $$

    Vacuous for networks with ReLU-like activations: everything beyond $c_1$ is exactly zero
    (see `hessian_is_vacuous`).

    Args:
        h: any map `(B, ...) -> (B, ...)`, in eval mode, smooth enough.
        x: clean inputs, shape `(B, ...)`.
        delta: direction, the shape of `x`.
        order: highest $K$, from 1 to 4.
        alpha: where on the segment the series is centred.

    Returns:
        The coefficients, shape `(order + 1, B, ...)`; entry 0 is the value itself.

    Raises:
        ValueError: if shapes differ, `order` is outside 1 to 4, or `h` is in training mode.

    Cost:
        Nested forward mode, about 5 to 9 forward passes for order 1 and three times more for each further order (4: 110
        to 230). No Hessian is ever formed.

    Source:
        RPAT, Equations 6 and 7; RAAT, Theorem 2.

    Examples:
        >>> import torch
        >>> x, delta = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> taylor_coefficients(torch.square, x, delta, order=2).flatten()  # (1 + 2 t)^2
        tensor([1., 4., 4.])
        >>> taylor_coefficients(torch.relu, x, delta, order=3).flatten()
        tensor([1., 2., 0., 0.])
    """
    name = "taylor_coefficients"
    _check.same_shape(name, x=x, delta=delta)
    _check.count(name, "order", order)
    _check.number(name, "order", order, at_most=4)
    fixed(name, h)
    place = positions(name, alpha, x, name="alpha")
    if len(place) != 1:
        raise ValueError(f"{name}: `alpha` must be one place, where the series is centred, got {len(place)} of them.")
    return coefficients(name, h, x, delta, place, order)


def taylor_residual(coefficients: Tensor, alphas: float | Sequence[float] | Tensor) -> Tensor:
    r"""The segment residual that a Taylor polynomial has.

    $$ r_K(\alpha) = \sum_{k=2}^{K} (\alpha^k - \alpha)\, c_k $$

    Equal to `segment_residual` for polynomials of degree $K$, and in the limit $K \to \infty$ where the
    series of $g$ at 0 converges on all of [0, 1]. Being analytic is not enough for that, nor is $\|\Delta\| <
    1$: what counts is the radius of convergence, and rescaling the input changes no term of the sum. The
    first coefficient never enters, so nothing here limits $J\Delta$.

    Args:
        coefficients: $c_0, \dots, c_K$, shape `(K + 1, B, ...)`, from `taylor_coefficients` at `alpha=0`.
        alphas: places in [0, 1].

    Returns:
        $r_K$, shape `(m, B, ...)`.

    Raises:
        ValueError: if `coefficients` has no order-1 entry, or a place is outside [0, 1].

    Cost:
        No forward pass.

    Source:
        RPAT, Equation 9, with every order kept.

    Examples:
        >>> import torch
        >>> taylor_residual(torch.tensor([[1.0], [4.0], [4.0]]), 0.5)  # 4 (0.25 - 0.5)
        tensor([[-1.]])
        >>> taylor_residual(torch.tensor([[1.0], [4.0]]), 0.5)  # affine
        tensor([[0.]])
    """
    name = "taylor_residual"
    _check.floating(name, coefficients=coefficients)
    if coefficients.ndim < 2 or coefficients.shape[0] < 2:
        raise ValueError(
            f"{name}: `coefficients` must have shape (K + 1, B, ...) with K >= 1, got {tuple(coefficients.shape)}."
        )
    places = positions(name, alphas, coefficients)
    powers = torch.arange(2, coefficients.shape[0], device=coefficients.device)
    weights = places[:, None] ** powers - places[:, None]
    found: Tensor = torch.tensordot(weights, coefficients[2:], dims=1)
    return found
