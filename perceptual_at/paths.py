"""The straight path from a clean to an adversarial input."""

import math
import random
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import common
from perceptual_at._shapes import per_sample


def interpolate(x: Tensor, x_adv: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Input part-way along the straight path from clean to adversarial.

    $$ x_\alpha = x + \alpha\,(x_{\mathrm{adv}} - x) $$

    `alpha` always multiplies the perturbation: 0 gives `x` and 1 gives `x_adv`, both to the last bit. A
    point between two points of a box and a ball lies in both. The same function makes RAAT's reduced
    sample, with `eta` in place of `alpha`.

    Args:
        x: clean inputs, shape `(B, ...)`.
        x_adv: adversarial inputs, the same shape.
        alpha: place on the path in [0, 1]; a tensor of shape `(B,)` gives each sample its own, and is taken as it is.

    Returns:
        Inputs of the shape of `x`.

    Raises:
        TypeError: if an input is no floating-point tensor or `alpha` no number or tensor.
        ValueError: if shapes or devices differ, or `alpha` is outside [0, 1].

    Source:
        RPAT, Definition 1 and Eq. 2 (its $\tilde x$); RAAT, Eq. 8 as its released code computes it.

    Examples:
        >>> x, x_adv = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.0]])
        >>> interpolate(x, x_adv, 0.5)
        tensor([[0.2500, 0.5000]])
        >>> bool((interpolate(x, x_adv, 1.0) == x_adv).all())
        True
    """
    _check.same_shape("interpolate", x=x, x_adv=x_adv)
    dtype = common(x, x_adv)
    x, x_adv = x.to(dtype), x_adv.to(dtype)
    return torch.lerp(x, x_adv, fraction("interpolate", "alpha", alpha, x))


def draw_beta(
    *,
    concentration: float = 0.75,
    fold: Literal["none", "min", "max"] = "none",
    generator: torch.Generator | None = None,
) -> float:
    r"""Random place on a path: a draw from $\mathrm{Beta}(\gamma, \gamma)$, once per batch.

    Args:
        concentration: $\gamma$; 0.75 in both papers, 1 is uniform.
        fold: `"max"` gives $\max(b, 1 - b)$ (RAAT's released code for `mix`), `"min"` the smaller.
        generator: on any device (on an accelerator the draw waits for it); None uses the library's own stream on
            the CPU, started from `torch.initial_seed()` once per process and seed.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError: if `concentration` is no number or `generator` no generator.
        ValueError: if `concentration` is not positive or `fold` is unknown.

    Source:
        RAAT, Sec. C.2 ($\beta$); RPAT, Fig. 4b ("Beta-" and "Beta+").

    Examples:
        >>> draws = [draw_beta(fold="max") for _ in range(9)]
        >>> 0.5 <= min(draws) <= max(draws) <= 1.0
        True
        >>> draw_beta(generator=torch.Generator().manual_seed(0)) == draw_beta(
        ...     generator=torch.Generator().manual_seed(0)
        ... )
        True
    """
    _check.number("draw_beta", "concentration", concentration, above=0.0)
    _check.choice("draw_beta", "fold", fold, ("none", "min", "max"))
    home = generator.device if isinstance(generator, torch.Generator) else torch.device("cpu")
    generator = _random.source("draw_beta", generator, home)
    seed = int(torch.randint(2**62, (), generator=generator, device=home))
    draw = _beta(random.Random(seed), float(concentration))
    return {"none": draw, "min": min(draw, 1 - draw), "max": max(draw, 1 - draw)}[fold]


def _beta(source: random.Random, concentration: float) -> float:
    """A draw of Beta(c, c), also where the quotient of two Gamma draws would under- or overflow."""
    if concentration > 1e12:  # normal around 1/2
        return 0.5 + source.gauss(0.0, 1.0) / (math.sqrt(8.0) * math.sqrt(concentration))
    if concentration >= 0.05:
        return source.betavariate(concentration, concentration)
    # X / (X + Y) for Gamma draws X, Y, whose logarithms are log U / c + log G with U uniform and G of Gamma(c + 1)
    uniforms = [math.log(1.0 - source.random()) for _ in range(2)]
    gammas = [math.log(source.gammavariate(concentration + 1.0, 1.0) or 5e-324) for _ in range(2)]
    apart = (uniforms[0] - uniforms[1]) / concentration + (gammas[0] - gammas[1])
    smaller = math.exp(-min(abs(apart), 800.0))
    return (1.0 if apart >= 0 else smaller) / (1.0 + smaller)


def fraction(function: str, name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """Check a weight in [0, 1]; shape a per-sample one `(B,)` to broadcast over `like`."""
    if not isinstance(value, Tensor) or not value.ndim:
        _check.number(function, name, value, at_least=0.0, at_most=1.0)
    if not isinstance(value, Tensor):
        return value
    if value.shape not in ((), like.shape[:1]) or not value.is_floating_point():
        raise ValueError(
            f"{function}: a tensor `{name}` must be floating-point of shape () or ({like.shape[0]},), got "
            f"{value.dtype} of shape {tuple(value.shape)}."
        )
    if value.ndim:
        _check.same_device(function, name, value.device, "the other arguments", like.device)
    return per_sample(value.to(like.dtype), like)


def mixture(logits_1: Tensor, logits_2: Tensor, weight: float | Tensor) -> Tensor:
    """Mixed logits, with a weight as from `fraction`: a class that one part masks is masked, unless its weight is 0."""
    return _part(weight, logits_1) + _part(1 - weight, logits_2)


def _part(weight: float | Tensor, logits: Tensor) -> Tensor:
    absent = logits.isneginf()
    part = weight * logits.masked_fill(absent, 0.0)
    if isinstance(weight, Tensor):
        return part.masked_fill(absent & (weight > 0), -math.inf)
    return part.masked_fill(absent, -math.inf) if weight > 0 else part
