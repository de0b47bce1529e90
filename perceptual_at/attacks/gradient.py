"""Projected gradient attacks: one function over threat x loss."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._rounding import cast_toward, wide
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
            started from `torch.initial_seed()`.

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
    _check_attack(x, labels, threat, start, restarts)
    _check.count("pgd", "steps", steps)
    _check.count("pgd", "restarts", restarts)
    _check.choice("pgd", "keep", keep, ("last", "best"))
    if step_size is None:
        step_size = 2.5 * _budget(threat) / steps
    _check.number("pgd", "step_size", step_size, above=0.0)
    if x.shape[0] == 0:
        return x.detach().clone()
    score = keep == "best" or restarts > 1
    step: Callable[[Tensor, Tensor, Tensor, float], Tensor] = getattr(threat, "step", None) or _Steepest(threat)

    with torch.inference_mode(False), torch.enable_grad(), frozen(model, model_mode=model_mode) as f:
        x, labels = _plain(x), _plain(labels)
        classes = _validated(x, labels, threat) if validate else None
        ascend = _Ascent(f, labels, loss, classes)
        center = x.to(wide(x))
        best, best_value = None, None
        for _ in range(restarts):
            point = _start(start, center, threat, generator)
            counts = not isinstance(start, Tensor)  # a given start may be outside the set
            for _ in range(steps):
                seen = _visible(point, x, threat)
                value, grad = ascend(seen)
                if keep == "best" and counts:
                    best, best_value = _better(seen, value, best, best_value)
                point = step(point, center, grad.to(center.dtype), step_size)
                counts = True
            last = threat.project(point, x) if point.dtype != x.dtype else point
            last = cast_toward(last, x)
            if not score:
                return last
            best, best_value = _better(last, ascend.value(last), best, best_value)
    assert best is not None
    return best


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
        Goodfellow et al. 2015, Sec. 4; `start="random"` is the R+FGSM of Wong et al. 2020 with a full step.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)
        >>> fgsm(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.25))
        tensor([[0.2500]])
        >>> fgsm(model, torch.tensor([[0.125]]), torch.tensor([0]), Linf(0.25))  # the box is closer
        tensor([[0.]])
    """
    return pgd(
        model, x, labels, threat, steps=1, step_size=_budget(threat), loss=loss, start=start,
        model_mode=model_mode, validate=validate, generator=generator,
    )  # fmt: skip


class _Steepest:
    """One projected step along the steepest direction, for threats with no step of their own."""

    def __init__(self, threat: Threat) -> None:
        self.threat = threat

    def __call__(self, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float) -> Tensor:
        return self.threat.project(x_adv + step_size * self.threat.steepest(grad), x)


class _Ascent:
    """Loss values and input gradients of a model, with what it returns checked once."""

    def __init__(self, model: Model, labels: Tensor, loss: AttackLoss, label_range: tuple[int, int] | None) -> None:
        self.model, self.labels, self.loss = model, labels, loss
        self.label_range, self.checked = label_range, False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        values = self._values(x)
        if not values.requires_grad:
            raise ValueError(
                "pgd: the model's output has no gradient with respect to its input; it must be computed from `x` by "
                "differentiable operations, outside torch.no_grad()."
            )
        (grad,) = torch.autograd.grad(values.sum(), x)
        # A sample whose gradient is undefined stays where it is instead of becoming NaN.
        return values.detach(), grad.nan_to_num(nan=0.0)

    def value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._values(x)

    def _values(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if not self.checked:
            self._check_logits(logits, x.shape[0])
        values = self.loss(logits.to(wide(logits)), self.labels)
        if not self.checked:
            if not isinstance(values, Tensor) or values.shape != (x.shape[0],):
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"pgd: `loss` must return one value per sample, shape ({x.shape[0]},), got {got}; with torch's "
                    "losses pass reduction='none'."
                )
            self.checked = True
        return values

    def _check_logits(self, logits: Any, batch: int) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(f"pgd: `model` must return a tensor of logits, got {type(logits).__name__}.")
        if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            raise ValueError(
                f"pgd: `model` must return logits of shape ({batch}, K) with K >= 2 classes, got shape "
                f"{tuple(logits.shape)}."
            )
        if self.labels.ndim == 2 and self.labels.shape != logits.shape:
            raise ValueError(
                f"pgd: `labels` are class probabilities of shape {tuple(self.labels.shape)} but `model` returns "
                f"logits of shape {tuple(logits.shape)}; the two must be equal."
            )
        if self.label_range is not None:
            _check.label_range("pgd", *self.label_range, logits.shape[1])


def _check_attack(x: Tensor, labels: Tensor, threat: Any, start: Any, restarts: Any) -> None:
    _check.floating("pgd", x=x)
    if isinstance(threat, type) or not isinstance(threat, Threat):
        given = threat.__name__ if isinstance(threat, type) else repr(threat)
        raise TypeError(f"pgd: `threat` must be a threat model such as Linf(8 / 255), got {given}.")
    _check.tensor("pgd", "labels", labels)
    if labels.ndim == 2 and labels.is_floating_point():
        if labels.shape[0] != x.shape[0]:
            raise ValueError(f"pgd: `labels` has {labels.shape[0]} rows but `x` has {x.shape[0]} samples.")
    else:
        _check.labels("pgd", labels, x.shape[0])
    _check.same_device("pgd", "labels", labels.device, "x", x.device)
    if isinstance(start, Tensor):
        _check.same_shape("pgd", x=x, start=start)
    else:
        _check.choice("pgd", "start", start, ("random", "clean"))
    if restarts != 1 and not (isinstance(start, str) and start == "random"):
        raise ValueError(
            f"pgd: `restarts`={restarts!r} has no effect with a fixed start; pass start='random' or drop it."
        )


def _budget(threat: Any) -> float:
    eps = getattr(threat, "eps", None)
    if eps is None:
        raise ValueError(f"pgd: `step_size` must be given, because {type(threat).__name__} has no `eps`.")
    return float(eps)


def _plain(value: Tensor) -> Tensor:
    """The tensor without its history; a copy where autograd could not save it."""
    return value.clone() if value.is_inference() else value.detach()


def _validated(x: Tensor, labels: Tensor, threat: Threat) -> tuple[int, int] | None:
    """Check inputs against the bounds with one wait for the device; give the extremes of the labels."""
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    if not x.numel():
        return None
    extremes = torch.stack([v.to(wide(x)) for v in (*torch.aminmax(x), *torch.aminmax(labels))])
    low, high, first_label, last_label = extremes.tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pgd: `x` contains NaN or infinite values.")
    bounds = getattr(threat, "bounds", (-math.inf, math.inf))
    tolerance = torch.finfo(x.dtype).eps * max([1.0, *(abs(b) for b in bounds if math.isfinite(b))])
    if low < bounds[0] - tolerance or high > bounds[1] + tolerance:
        raise ValueError(
            f"pgd: `x` must lie in the bounds {list(bounds)} of the threat model, got values from {low:.4g} to "
            f"{high:.4g}. Inputs that were normalised must not be: put the normalisation into the model "
            "(perceptual_at.models.Normalize), or give the threat model other `bounds`."
        )
    return None if labels.is_floating_point() else (int(first_label), int(last_label))


def _start(start: str | Tensor, center: Tensor, threat: Threat, generator: torch.Generator | None) -> Tensor:
    """Where to begin, in the working dtype."""
    if isinstance(start, Tensor):
        return _plain(start).to(center.dtype)
    return center if start == "clean" else threat.random_start(center, generator=generator)


def _visible(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point in the dtype of the inputs: what the model sees."""
    return point if point.dtype == x.dtype else cast_toward(threat.project(point, x), x)


def _better(point: Tensor, value: Tensor, best: Tensor | None, best_value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per sample, the candidate with the larger loss; an undefined loss never wins."""
    if best is None or best_value is None:
        return point, value.nan_to_num(nan=-math.inf)
    wins = value > best_value
    return (
        torch.where(wins.reshape(-1, *[1] * (point.ndim - 1)), point, best),
        torch.where(wins, value, best_value),
    )
