"""Signs that a model makes attacks fail without being robust, as values; what they mean is for the caller to say."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _random
from perceptual_at._binomial import rare
from perceptual_at._differentiation import only_backward
from perceptual_at._places import margins
from perceptual_at._rounding import leveled, wide
from perceptual_at._shapes import places, rows
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, select, start
from perceptual_at.victims.door import Victim
from perceptual_at.victims.frozen import lent

TINY = 1e-12
"""Gradients whose largest entry is below this have lost the digits that tell their direction."""


def gives_probabilities(logits: Tensor) -> bool:
    """Whether every row is a probability distribution already."""
    nearly = 1e-5
    inside = bool((logits > -nearly).all()) and bool((logits < 1 + nearly).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < nearly).all())


def passes_differ(victim: Victim, x: Tensor, *, passes: int = 5) -> float:
    """Largest distance between the logits of equal passes, in units of their length; 0 for the same each time."""
    first, *others = (victim.logits(x) for _ in range(passes))
    distances = torch.linalg.vector_norm(torch.stack(others) - first, dim=2)
    return float((distances / (torch.linalg.vector_norm(first, dim=1) + 1e-10)).amax())


def takes_gradients(model: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether the model computes gradients of its own in a forward pass, as defences that adapt to an input do."""
    seen = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG001
        code = frame.f_code
        if event == "call" and code.co_name in ("grad", "backward") and "autograd" in code.co_filename:
            seen.append(code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            model(x.clone())
    finally:
        sys.setprofile(before)
    return bool(seen)


def gradient_sizes(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, loss: PerSampleLoss = cross_entropy
) -> Tensor:
    """Largest entry of each sample's input gradient, `(B,)`: 0 where there is none, NaN where it is undefined.

    Scaled from the logits on, so that half precision does not make it vanish on its way.
    """
    with torch.inference_mode(False), torch.enable_grad():
        own = x.detach().clone().requires_grad_()
        raw = model(own.clone())
        if not raw.requires_grad:
            return raw.new_zeros(len(x), dtype=wide(raw))
        logits = raw.detach().to(wide(raw)).requires_grad_()
        (slope,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
        steepest, unit = rows(slope).abs().amax(dim=1), leveled(slope).to(raw.dtype)
        try:
            gradient = torch.autograd.grad(raw, own, unit, allow_unused=True, materialize_grads=True)[0]
        except RuntimeError as error:
            if not only_backward(error):
                raise
            with lent("inspection", model) as f:  # whose parameters are frozen, so that this writes to `own` alone
                f(own.clone()).backward(unit)
            gradient = torch.zeros_like(own) if own.grad is None else own.grad
        return rows(gradient).abs().amax(dim=1).to(steepest) * steepest


def nothing_to_gain(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, threat: Threat, *, rounds: int = 3
) -> Tensor:
    """Samples whose margin is nowhere in the ball above that of the input, as far as a few dozen points show, `(B,)`.

    Outputs that are constant there, or that only become surer, have no gradient to follow and none to find. The points
    are random, and as far out as the ball goes in every entry at once: with random signs, with stripes along each
    dimension, and all up or down, which move a network more than noise does.
    """
    nowhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if not len(x):
        return nowhere
    numbers = _random.SampleGenerator(0, torch.arange(len(x), device=x.device))
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone()
        first = model(x.clone())
        before, digits = margins(first, labels), torch.finfo(first.dtype).eps * (1 + rows(first).abs().amax(dim=1))
        for number in range(rounds):
            for point in far_and_wide(x, threat, numbers.fork(number)):
                gained = margins(model(point.to(x.dtype).clone()), labels) - before
                nowhere = nowhere & (gained <= 4 * digits)
            if not bool(nowhere.any()):
                break
    return nowhere


def far_and_wide(x: Tensor, threat: Threat, drawn: _random.SampleGenerator) -> Iterator[Tensor]:
    """A random point of the ball, and points where its corners, stripes and uniform shifts end."""
    yield start("inspection", threat, x, drawn)
    shapes = {tuple(x.shape), (len(x), *[1] * (x.ndim - 1))}
    shapes |= {(len(x), *(size if d == at else 1 for d, size in enumerate(x.shape[1:]))) for at in range(x.ndim - 1)}
    for number, shape in enumerate(sorted(shapes)):
        far = 1e3 * drawn.fork(number).signs(shape).to(x)
        yield threat.project(x + far, x)
        yield threat.project(x - far, x)


def lost_gradients(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    threat: Threat | None = None,
    loss: PerSampleLoss = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Samples whose gradient is zero or undefined, and samples where it is tiny, two masks `(B,)`.

    Samples whose margin rises nowhere in the ball are in neither: zero is what the gradient of a robust sample may be.
    """
    sizes = gradient_sizes(model, x, labels, loss)
    zero, tiny = (sizes == 0) | sizes.isnan(), (sizes > 0) & (sizes < TINY)
    suspects = zero | tiny
    if threat is not None and bool(suspects.any()):
        at = places(suspects)
        loses = torch.zeros_like(suspects)
        loses[at] = ~nothing_to_gain(model, x[at], labels[at], select(threat, at))
        zero, tiny = zero & loses, tiny & loses
    return zero, tiny


def suspicions(
    victim: Victim,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    losses: Mapping[str, PerSampleLoss],
    *,
    averages: bool = False,
) -> list[str]:
    """What some samples say against trusting attacks on a model, in sentences; never an error.

    Args:
        victim: the model.
        x: clean inputs.
        labels: class indices `(B,)`.
        threat: the ball; where no logits in it are worse than the input's, a zero gradient is no sign of masking.
        losses: what attacks by gradient ascend, by name; none for attacks that need no gradient.
        averages: whether the attacks average over passes, as random models want it.
    """
    found: list[str] = []
    with contextlib.suppress(Exception):  # a model that cannot do what only a diagnosis asks of it
        logits = victim.logits(x)
        if not averages and (spread := passes_differ(victim, x)) > 1e-4:  # as AutoAttack's own check has it
            found.append(
                f"the model is random: equal passes differ by up to {spread:.2g} of the logits' length. A single pass "
                'of such a model cannot be trusted; use version="rand", which averages over passes.'
            )
        if gives_probabilities(logits):
            found.append(
                "the model seems to return probabilities, not logits: a softmax in the model makes gradients vanish. "
                "Attack the logits."
            )
        if takes_gradients(victim.model, x[:1].clone()):
            found.append(
                "the model computes gradients in its forward pass (a defence that adapts to its input?): attacks that "
                "do not follow it there may be too weak."
            )
        right = places(logits.argmax(dim=1) == labels)
        for name, loss in losses.items():
            zero, _ = lost_gradients(victim.model, x[right], labels[right], select(threat, right), loss)
            count = int(zero.sum())
            if rare(count, len(right)):
                found.append(
                    f"the gradient of the {name} is exactly zero for {count} of {len(right)} samples although some "
                    "point of the ball lowers their lead: saturated logits or a part without derivative. Attacks by "
                    "gradient cannot move these; rely on Square or attack a smooth stand-in."
                )
    return found


def square_alone(broken: int, n: int, queries: int) -> str:
    """A sentence on what Square broke after attacks by gradient; nothing if that is no more than chance."""
    if not rare(broken, n):
        return ""
    return (
        f"Square, which uses no gradients, broke {broken} of {n} samples with {queries} queries after the attacks "
        "before it had failed on them, significantly more than the 1 % to be expected: their gradients may be masked. "
        "Run it with more queries, and an attack made for this model."
    )
