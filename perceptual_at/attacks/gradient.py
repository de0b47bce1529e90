"""Projected gradient attacks: one function over threat x loss."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import cast_toward, wide
from perceptual_at._shapes import per_sample
from perceptual_at.attacks.arguments import budget, check_arguments, check_values, plain
from perceptual_at.attacks.ascent import Ascent
from perceptual_at.attacks.freeze import Model, ModelMode, frozen
from perceptual_at.attacks.targets import AttackLoss, cross_entropy
from perceptual_at.threats import Threat


def pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    loss: AttackLoss = cross_entropy,
    start: Literal["random", "clean"] | Tensor = "random",
    restarts: int = 1,
    keep: Literal["last", "best"] = "last",
    model_mode: ModelMode = "eval",
    validate: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Adversarial inputs by projected gradient ascent.

    $$ x_{t+1} = \Pi\big( x_t + s \cdot \mathrm{steepest}(\nabla_x \textstyle\sum_i \ell(f(x_t)_i, y_i)) \big) $$

    The threat model gives the projection $\Pi$ and the steepest step; the loss says what to ascend. PGD-AT is
    `pgd(model, x, labels, Linf(8 / 255))`, TRADES' attack adds `loss=kl_to(clean_logits)`, and C&W in the papers'
    tables is `loss=margin`.

    Given a module, the attack runs it in eval mode with its parameters frozen and leaves modes, parameters,
    gradients, buffers and the global random state as found, also after an exception. It works under `no_grad`,
    `inference_mode` and autocast. The result is inside the ball and the box exactly, in every dtype: for
    sixteen-bit inputs perturbation and projection are float32, and the model sees what is returned.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`; normalisation belongs inside it.
        x: clean inputs, shape `(B, ...)`, inside the bounds of the threat model.
        labels: class indices `(B,)` (or class probabilities `(B, K)` if `loss` takes them).
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat`.
        steps: number of gradient steps K; costs K forward passes and K input-gradient passes.
        step_size: length s of a step in input units; None means `2.5 * eps / steps`, 2/255 for ten steps at
            8/255.
        loss: per-sample function `(logits, labels) -> (B,)`.
        start: `"random"` (the threat's `random_start`), `"clean"`, or a tensor to start from. The first
            gradient is taken at that tensor as it is, which may be outside the ball.
        restarts: number of random starts; the one whose kept iterate has the largest loss wins.
        keep: `"last"` returns the final iterate, `"best"` the iterate with the largest loss. `"best"` and
            `restarts > 1` cost one more forward pass per restart.
        model_mode: `"eval"`, or `"keep"` to attack the model as it stands.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the
            device once; skipped while compiling or capturing.
        generator: source of the random start, on the device of `x`. None uses a stream of the library's own,
            started from `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached.

    Raises:
        TypeError: if an argument is of the wrong kind (float labels, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or `restarts > 1` comes with a fixed start.

    Source:
        Madry et al. 2018, Sec. 2.1; settings of RPAT and RAAT: Sec. 5.1 of each.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> x, labels = torch.tensor([[0.5]]), torch.tensor([0])
        >>> pgd(model, x, labels, Linf(0.25), start="clean")
        tensor([[0.2500]])
        >>> pgd(model, x, labels, L2(0.125), steps=1, step_size=0.0625, start="clean")
        tensor([[0.4375]])
    """
    return _attack(
        "pgd", model, x, labels, threat, steps=steps, step_size=step_size, reach=2.5, loss=loss, start=start,
        restarts=restarts, keep=keep, model_mode=model_mode, validate=validate, generator=generator,
    )  # fmt: skip


def fgsm(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: AttackLoss = cross_entropy,
    start: Literal["random", "clean"] | Tensor = "clean",
    model_mode: ModelMode = "eval",
    validate: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Adversarial inputs by one full step, $\Pi(x + \epsilon \cdot \mathrm{steepest}(\nabla_x \ell))$.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: a threat model with `eps`.
        loss: per-sample function `(logits, labels) -> (B,)`.
        start: where the gradient is taken; see `pgd`.
        model_mode: see `pgd`.
        validate: see `pgd`.
        generator: see `pgd`.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached.

    Raises:
        TypeError: see `pgd`.
        ValueError: see `pgd`.

    Source:
        Goodfellow et al. 2015, Sec. 4; with `start="random"` it is the FGSM of
        Wong et al. 2020, who step 1.25 budgets: `pgd(..., steps=1, step_size=1.25 * eps)`.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)
        >>> fgsm(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.25))
        tensor([[0.2500]])
        >>> fgsm(model, torch.tensor([[0.125]]), torch.tensor([0]), Linf(0.25))  # the box is closer
        tensor([[0.]])
    """
    return _attack(
        "fgsm", model, x, labels, threat, steps=1, step_size=None, reach=1.0, loss=loss, start=start,
        restarts=1, keep="last", model_mode=model_mode, validate=validate, generator=generator,
    )  # fmt: skip


def _attack(
    function: str,
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float | None,
    reach: float,
    loss: AttackLoss,
    start: str | Tensor,
    restarts: int,
    keep: str,
    model_mode: ModelMode,
    validate: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The body of the attacks. Errors speak of `function`; all steps together go `reach` budgets far by default."""
    check_arguments(function, model, x, labels, threat, loss, start, restarts)
    _check.count(function, "steps", steps)
    _check.choice(function, "keep", keep, ("last", "best"))
    _check.choice(function, "model_mode", model_mode, ("eval", "keep"))
    if step_size is None:
        step_size = reach * budget(function, threat) / steps
    _check.number(function, "step_size", step_size, above=0.0)
    if x.shape[0] == 0:
        return x.detach().clone()
    step: Callable[[Tensor, Tensor, Tensor, float], Tensor] = getattr(threat, "step", None) or _Steepest(threat)

    with torch.inference_mode(False), torch.enable_grad(), frozen(model, model_mode=model_mode) as f:
        x, labels = plain(x), plain(labels)
        label_range = check_values(function, x, labels, threat, start) if validate else None
        ascent = Ascent(function, f, labels, loss, label_range)
        center = x.to(wide(x))
        best, best_value = None, None
        for _ in range(restarts):
            point = _start(start, center, threat, generator)
            inside = not isinstance(start, Tensor)  # a given start may be outside the set
            for _ in range(steps):
                seen = _visible(point, x, threat)
                value, grad = ascent.value_and_grad(seen)
                if keep == "best" and inside:
                    best, best_value = _better(seen, value, best, best_value)
                point = step(point, center, grad.to(center.dtype), step_size)
                inside = True
            last = _visible(point, x, threat)
            if keep == "last" and restarts == 1:
                return last
            best, best_value = _better(last, ascent.value(last), best, best_value)
    assert best is not None
    return best


class _Steepest:
    """One projected step along the steepest direction, for threats with no step of their own."""

    def __init__(self, threat: Threat) -> None:
        self.threat = threat

    def __call__(self, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float) -> Tensor:
        return self.threat.project(x_adv + step_size * self.threat.steepest(grad), x)


def _start(start: str | Tensor, center: Tensor, threat: Threat, generator: torch.Generator | None) -> Tensor:
    """Where to begin, in the working dtype."""
    if isinstance(start, Tensor):
        return plain(start).to(center.dtype)
    return center if start == "clean" else threat.random_start(center, generator=generator)


def _visible(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point in the dtype of the inputs: what the model sees and the caller gets."""
    return point if point.dtype == x.dtype else cast_toward(threat.project(point, x), x)


def _better(point: Tensor, value: Tensor, best: Tensor | None, best_value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per sample, the candidate with the larger loss; an undefined loss never wins."""
    if best is None or best_value is None:
        return point, value.nan_to_num(nan=-math.inf)
    wins = value > best_value
    return torch.where(per_sample(wins, point), point, best), torch.where(wins, value, best_value)
