"""What an attack needs to know about a threat model, and what it asks of any of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._random import Generator
from perceptual_at._rounding import round_down, wide
from perceptual_at._shapes import per_sample, rows
from perceptual_at.threats.entries import box_over, entries_text, largest_finite, over


@runtime_checkable
class Threat(Protocol):
    """What an attack needs to know about a threat model.

    Implement these five and `pgd`, `apgd`, `evaluate` and `sanity_checks` accept it. More is used where it is there:

    - `eps`, a number or a tensor: needed when the step size is left to the attack, as always in `apgd`.
    - `bounds`, two numbers or tensors: inputs are compared with them when they are validated.
    - `step(x_adv, x, grad, step_size)`: one projected ascent step, where moving along `steepest` and projecting is
      not the best it can do (`L1` does).
    - `select(rows)`: the threat for some samples of a batch, by index or mask; needed by a threat that holds something
      for each sample.
    - `around(x)`: `project` for centres that stay, as a function of the point alone, where that saves work.

    `fab`, `square` and `auto_attack` know the geometry of `Linf`, `L2` and `L1` only, and say so at once.

    Examples:
        >>> class FirstEntry:  # anything may happen to the first entry, nothing to the others
        ...     eps = 1.0
        ...     def project(self, x_adv, x):
        ...         return torch.cat([x_adv[:, :1].clamp(0, 1), x[:, 1:]], dim=1)
        ...     def steepest(self, grad):
        ...         return grad.sign()
        ...     def random_start(self, x, *, generator=None):
        ...         return x
        ...     def norm(self, delta):
        ...         return delta.abs().amax(dim=1)
        ...     def scaled(self, factor):
        ...         return self
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> pgd(model, torch.full((1, 3), 0.5), torch.tensor([0]), FirstEntry())
        tensor([[0.0000, 0.5000, 0.5000]])
    """

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Allowed point for `x_adv`, in the dtype of `x`; allowed points stay as they are."""

    def steepest(self, grad: Tensor) -> Tensor:
        """Step of unit norm with the largest inner product with `grad`."""

    def random_start(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Random allowed point around `x`."""

    def norm(self, delta: Tensor) -> Tensor:
        """Length of each sample's perturbation, shape `(B,)`."""

    def scaled(self, factor: float) -> "Threat":
        """The same threat with `factor` times the budget."""


def check_threat(function: str, threat: Any) -> None:
    """Require a threat model, not its class."""
    if not is_threat(threat):
        given = threat.__name__ if isinstance(threat, type) else repr(threat)
        raise TypeError(f"{function}: `threat` must be a threat model such as Linf(8 / 255), got {given}.")


def is_threat(value: Any) -> bool:
    """Whether something is a threat model."""
    # The library's own are known at a glance; asking a protocol takes as long as an operation.
    return not isinstance(value, type) and (hasattr(value, "looks") or isinstance(value, Threat))


def select(threat: Threat, rows: Tensor) -> Threat:
    """The threat for some samples of its batch, by index or mask; one that holds nothing per sample stays as it is."""
    own = getattr(threat, "select", None)
    return threat if own is None else own(rows)


def around(threat: Threat, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`threat.project` around centres that stay: what depends on them alone is computed once."""
    own: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = getattr(threat, "around", None)
    return (lambda point: _fitting(threat, "project", x, point, x)) if own is None else own(x)


def projected(threat: Threat, point: Tensor, x: Tensor) -> Tensor:
    """`threat.project`, in shape and dtype of `x` whoever wrote it."""
    return _fitting(threat, "project", x, point, x)


class Ascent(NamedTuple):
    """Ascent around centres that stay; made by `ascent`."""

    threat: Threat
    x: Tensor
    """The centres."""
    step: Callable[[Tensor, Tensor], Tensor]
    """One step, `(point, grad) -> point`."""
    random_start: Callable[..., Tensor]
    """The threat's own, around the centres."""


def ascent(threat: Threat, x: Tensor, step_size: float | Tensor) -> Ascent:
    """Steps of the threat's own, or along `steepest`; what depends on the centres alone is computed once.

    Args:
        threat: a threat model.
        x: the centres, in the dtype to compute in.
        step_size: a number, or one per sample `(B,)`.
    """
    start: Callable[..., Tensor] = functools.partial(threat.random_start, x)
    if hasattr(threat, "step"):
        return Ascent(threat, x, lambda point, grad: _fitting(threat, "step", x, point, x, grad, step_size), start)
    length = per_sample(step_size.to(x), x) if isinstance(step_size, Tensor) else step_size
    looks: bool | None = getattr(threat, "looks", None)
    if looks:  # while steps wait for nothing
        return Ascent(threat, x, lambda point, grad: threat.project(point + length * threat.steepest(grad), x), start)
    project: Any = around(threat, x) if looks is None else threat.around(x)  # type: ignore[attr-defined]  # balls have it
    if hasattr(project, "step"):
        return Ascent(threat, x, functools.partial(project.step, length=length), project.random_start)
    return Ascent(threat, x, lambda point, grad: project(point + length * _fitting(threat, "steepest", x, grad)), start)


def start(
    function: str,
    threat: Threat,
    x: Tensor,
    generator: Generator | None,
    *,
    restart: int = 0,
    far: bool = False,
) -> Tensor:
    """The threat's own random point; with numbers per sample, another one for each restart.

    `far` asks for one at the edge of the set (`far_start`), where the threat has it.
    """
    draw: Callable[..., Tensor] = getattr(threat, "far_start", threat.random_start) if far else threat.random_start
    if not isinstance(generator, _random.SampleGenerator):
        drawn = draw(x, generator=generator)
        return drawn if hasattr(threat, "looks") else _fitted(threat, draw.__name__, drawn, x)
    generator = _random.checked(function, generator, x)
    if far and hasattr(threat, "far_start"):
        return draw(x, generator=generator)
    generator = generator.fork(restart)
    if getattr(threat, "draws_per_sample", False):
        return draw(x, generator=generator)
    # A threat of the user's own draws from torch's generators: one for each sample.
    seeds = generator.bits((len(generator),)).tolist()
    everyone = torch.arange(len(x), device=x.device)
    starts = [
        select(threat, everyone[i : i + 1]).random_start(
            x[i : i + 1], generator=torch.Generator(x.device).manual_seed(seed)
        )
        for i, seed in enumerate(seeds)
    ]
    return _fitted(threat, "random_start", torch.cat(starts), x) if starts else x


def _fitting(threat: Threat, method: str, x: Tensor, *given: Any) -> Tensor:
    """What a method gives, in shape and dtype of `x`; the balls' own need no check."""
    call: Callable[..., Tensor] = getattr(threat, method)
    if hasattr(threat, "looks"):
        return call(*given)
    try:
        return _fitted(threat, method, call(*given), x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # as torch calls shapes that do not meet
        raise ValueError(f"{type(threat).__name__}.{method}: fails for {_batch(x)}: {error} {_PER_SAMPLE}") from error


def _fitted(threat: Threat, method: str, found: Any, x: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != x.shape:
        raise ValueError(
            f"{type(threat).__name__}.{method}: must give points of the shape of `x` for {_batch(x)}, got "
            f"{_check.came(found)}. {_PER_SAMPLE}"
        )
    return found.to(x.dtype)


def _batch(x: Tensor) -> str:
    return f"{len(x)} sample{'s' * (len(x) != 1)} of shape {tuple(x.shape[1:])}"


_PER_SAMPLE = (
    "A threat that holds something for each sample needs `select(rows)`, because decided samples leave the batch."
)


def budget(function: str, threat: Any) -> float | Tensor:
    """The largest `eps` of each sample: a number for all, or one per sample `(B,)`; for a step size that was left open.

    Entries with an `eps` of their own count in units of it, see `Ball`.
    """
    eps = getattr(threat, "eps", None)
    if eps is None:
        raise ValueError(f"{function}: a step size must be given, because {type(threat).__name__} has no `eps`.")
    if not isinstance(eps, Tensor):
        return float(eps)
    if eps.ndim > 1:
        eps = eps.flatten(1).amax(dim=1)
        return eps[0] if len(eps) == 1 else eps
    return eps


def budgets(function: str, threat: Any, x: Tensor) -> Tensor:
    """The largest `eps` of each sample, shape `(B,)`, in the dtype to compute in."""
    eps = budget(function, threat)
    if not isinstance(eps, Tensor):
        return x.new_full((x.shape[0],), eps, dtype=wide(x))
    own: Tensor = threat.eps
    if own.ndim == 1 and len(own) != x.shape[0]:
        raise ValueError(
            f"{function}: `threat` has {len(own)} values of `eps` but `x` has {x.shape[0]} samples; there must "
            "be one for each, or one number for all."
        )
    largest = rows(over(function, "eps", own, x)).amax(dim=1)
    return largest.to(wide(x)).expand(x.shape[0])


def box(threat: Any, x: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Smallest and largest input values, numbers of the dtype of `x`; tensors broadcast over `x`.

    The box of a threat without bounds is infinite.
    """
    low, high = bounds = getattr(threat, "bounds", (-math.inf, math.inf))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return box_over(type(threat).__name__, bounds, x)
    return -round_down(-low, x.dtype), round_down(high, x.dtype)


def check_excess(function: str, threat: Any, x: Tensor, beyond: float) -> None:
    """Require inputs inside the box, give or take a few roundings, which a resize or a normalisation leaves."""
    bounds = getattr(threat, "bounds", (-math.inf, math.inf))
    allowed = 8 * torch.finfo(x.dtype).eps * max(1.0, largest_finite(bounds))
    if not beyond <= allowed:
        shown = f"[{', '.join(map(entries_text, bounds))}]"
        raise ValueError(
            f"{function}: `x` must lie in the bounds {shown} of the threat model, got values from "
            f"{float(x.amin()):.4g} to {float(x.amax()):.4g}, up to {beyond:.3g} beyond them. Inputs that were "
            "normalised must not be: put the normalisation into the model (perceptual_at.models.Normalize), or give "
            "the threat model other `bounds`."
        )
