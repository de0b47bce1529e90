"""Projected gradient attacks: one function over threat x loss."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import Generator
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, rows
from perceptual_at.attacks.arguments import budget, check_arguments, check_values, plain
from perceptual_at.attacks.freeze import Model, ModelMode, check_lane, frozen
from perceptual_at.attacks.lanes import Lane
from perceptual_at.attacks.queries import Queries, classified, misclassified, visible
from perceptual_at.attacks.starts import random_start
from perceptual_at.attacks.steps import ascended
from perceptual_at.attacks.targets import AttackLoss, cross_entropy, margin
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.threats import Threat


@overload
def pgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def pgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: Any
) -> Verdict: ...
def pgd(  # type: ignore[misc]  # the options of the overloads are checked by the call
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    loss: AttackLoss = cross_entropy,
    targets: Tensor | None = None,
    start: Literal["random", "clean"] | Tensor = "random",
    restarts: int = 1,
    momentum: float = 0.0,
    eot: int = 1,
    keep: Literal["last", "best"] = "last",
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: Generator | None = None,
) -> Tensor | Verdict:
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
        step_size: length s of a step in input units, one number or one per sample `(B,)`; None means
            `2.5 * eps / steps`, 2/255 for ten steps at 8/255.
        loss: per-sample function `(logits, labels) -> (B,)`.
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them, and success means
            being classified as the target.
        start: `"random"` (the threat's `random_start`), `"clean"`, or a tensor to start from. The first
            gradient is taken at that tensor as it is, which may be outside the ball.
        restarts: number of random starts; the one whose kept iterate has the largest loss wins.
        momentum: decay of the sum of past gradients, each divided by its L1 norm; 0 uses the current gradient alone.
        eot: forward and gradient passes per step to average over, for models that are random (expectation over
            transformation). Losses and logits are averaged alike.
        keep: `"last"` returns the final iterate, `"best"` the iterate with the largest loss; with `verdict=True`,
            misclassified iterates come before all others. `"best"`, `restarts > 1` and `verdict` cost one more
            forward pass per restart.
        model_mode: `"eval"`, or `"keep"` to attack the model as it stands.
        lane: run the steps on a copy of the model that costs less, for example `Lane(dtype=torch.bfloat16)`; see
            `Lane`. Whether a `verdict` is a success is asked of the model itself, at one more forward pass.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the
            device once; skipped while compiling or capturing.
        verdict: return a `Verdict`: also whether each sample is misclassified, since which step, at what cost.
        generator: source of the random start, on the device of `x`: a `torch.Generator` for the batch, or a
            `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started
            from `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; a `Verdict` with them if `verdict`.

    Raises:
        TypeError: if an argument is of the wrong kind (float labels, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or `restarts > 1` comes with a fixed start.

    Source:
        Madry et al. 2018, Sec. 2.1; settings of RPAT and RAAT: Sec. 5.1 of each. Momentum: Dong et al. 2018,
        Algorithm 1. Averaging over a random model: Athalye et al. 2018, Sec. 4.2.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> x, labels = torch.tensor([[0.5]]), torch.tensor([0])
        >>> pgd(model, x, labels, Linf(0.25), start="clean")
        tensor([[0.2500]])
        >>> pgd(model, x, labels, L2(0.125), steps=1, step_size=0.0625, start="clean")
        tensor([[0.4375]])
        >>> pgd(model, x, labels, Linf(0.25), start="clean", targets=torch.tensor([0]))  # be surely of class 0
        tensor([[0.7500]])
    """
    return _attack(
        "pgd", model, x, labels, threat, steps=steps, step_size=step_size, reach=2.5, loss=loss, targets=targets,
        start=start, restarts=restarts, momentum=momentum, eot=eot, keep=keep, model_mode=model_mode,
        lane=lane, validate=validate, verdict=verdict, generator=generator,
    )  # fmt: skip


@overload
def fgsm(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def fgsm(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: Any
) -> Verdict: ...
def fgsm(  # type: ignore[misc]
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: AttackLoss = cross_entropy,
    targets: Tensor | None = None,
    start: Literal["random", "clean"] | Tensor = "clean",
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: Generator | None = None,
) -> Tensor | Verdict:
    r"""Adversarial inputs by one full step, $\Pi(x + \epsilon \cdot \mathrm{steepest}(\nabla_x \ell))$.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: a threat model with `eps`.
        loss: per-sample function `(logits, labels) -> (B,)`.
        targets: see `pgd`.
        start: where the gradient is taken; see `pgd`.
        model_mode: see `pgd`.
        lane: see `pgd`.
        validate: see `pgd`.
        verdict: see `pgd`.
        generator: see `pgd`.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; a `Verdict` with them if `verdict`.

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
        "fgsm", model, x, labels, threat, steps=1, step_size=None, reach=1.0, loss=loss, targets=targets,
        start=start, restarts=1, momentum=0.0, eot=1, keep="last", model_mode=model_mode, lane=lane,
        validate=validate, verdict=verdict, generator=generator,
    )  # fmt: skip


@overload
def cw(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def cw(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: Any
) -> Verdict: ...
def cw(  # type: ignore[misc]
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 30,
    step_size: float | Tensor | None = None,
    targets: Tensor | None = None,
    start: Literal["random", "clean"] | Tensor = "random",
    restarts: int = 1,
    keep: Literal["last", "best"] = "last",
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: Generator | None = None,
) -> Tensor | Verdict:
    r"""Adversarial inputs by projected gradient ascent on the margin: "C&W" in the papers' tables.

    $$ \max_{x'} \; \max_{k \ne y} z_k(x') - z_y(x') $$

    It is `pgd` with `loss=margin`: the loss of Carlini and Wagner inside a fixed ball, not their attack, which looks
    for the smallest perturbation; for that see `fab`.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: a threat model.
        steps: number of gradient steps.
        step_size: see `pgd`.
        targets: see `pgd`.
        start: see `pgd`.
        restarts: see `pgd`.
        keep: see `pgd`.
        model_mode: see `pgd`.
        lane: see `pgd`.
        validate: see `pgd`.
        verdict: see `pgd`.
        generator: see `pgd`.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; a `Verdict` with them if `verdict`.

    Raises:
        TypeError: see `pgd`.
        ValueError: see `pgd`.

    Source:
        Carlini and Wagner 2017, objective $f_6$; RAAT, Sec. 5.1, for its use as a column of the tables.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> cw(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.25))
        tensor([[0.2500]])
    """
    return _attack(
        "cw", model, x, labels, threat, steps=steps, step_size=step_size, reach=2.5, loss=margin, targets=targets,
        start=start, restarts=restarts, momentum=0.0, eot=1, keep=keep, model_mode=model_mode, lane=lane,
        validate=validate, verdict=verdict, generator=generator,
    )  # fmt: skip


def _attack(
    function: str,
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float | Tensor | None,
    reach: float,
    loss: AttackLoss,
    targets: Tensor | None,
    start: str | Tensor,
    restarts: int,
    momentum: float,
    eot: int,
    keep: str,
    model_mode: ModelMode,
    lane: Lane | None,
    validate: bool,
    verdict: bool,
    generator: Generator | None,
) -> Tensor | Verdict:
    """The body of the attacks. Errors speak of `function`; all steps together go `reach` budgets far by default."""
    check_arguments(function, model, x, labels, threat, loss, start, restarts, targets=targets, verdict=verdict)
    _check.count(function, "steps", steps)
    _check.count(function, "eot", eot)
    _check.number(function, "momentum", momentum, at_least=0.0)
    _check.choice(function, "keep", keep, ("last", "best"))
    _check.choice(function, "model_mode", model_mode, ("eval", "keep"))
    check_lane(function, model, model_mode, lane)
    if step_size is None:
        step_size = reach * budget(function, threat) / steps
    elif not isinstance(step_size, Tensor):
        _check.number(function, "step_size", step_size, above=0.0)
    if x.shape[0] == 0:
        return _result(x.detach().clone(), None, 0, 0) if verdict else x.detach().clone()
    scored = restarts if keep == "best" or restarts > 1 or verdict else 0  # forward passes that only judge

    with torch.inference_mode(False), torch.enable_grad(), frozen(model, model_mode=model_mode, lane=lane) as f:
        x, labels = plain(x), plain(labels)
        aims = labels if targets is None else plain(targets)
        label_range = check_values(function, x, aims, threat, start) if validate else None
        queries = Queries(function, f, label_range, eot=eot, labels_are="labels" if targets is None else "targets")
        ascend: AttackLoss = loss if targets is None else (lambda logits, aims: -loss(logits, aims))
        success = misclassified if targets is None else classified
        center = x.to(wide(x))
        best = _Best(judged=verdict)
        for restart in range(restarts):
            point = _start(function, start, center, threat, generator, restart)
            inside = not isinstance(start, Tensor)  # a given start may be outside the set
            velocity: Tensor | None = None
            for index in range(steps):
                seen = visible(point, x, threat)
                answer = queries.gradient(seen, aims, ascend)
                if keep == "best" and inside:
                    best.offer(seen, answer.values, success(answer.logits, aims) if verdict else None, index)
                direction = velocity = _accelerated(answer.grad.to(center.dtype), velocity, momentum)
                point = ascended(threat, point, center, direction, step_size)
                inside = True
            last = visible(point, x, threat)
            if not scored:
                return last
            values, logits = queries.value(last, aims, ascend)
            best.offer(last, values, success(logits, aims) if verdict else None, steps)
        assert best.point is not None
        if not verdict:
            return best.point
        if queries.confirms:
            best.success = success(queries.logits(best.point, aims), aims)
            scored += 1
    return _result(best.point, best, restarts * steps * eot, scored * eot)


class _Best:
    """Per sample the candidate with the largest loss; where success is judged, successes come before all others."""

    def __init__(self, *, judged: bool) -> None:
        self.judged = judged
        self.point: Tensor | None = None
        self.values = self.success = self.step = torch.empty(0)

    def offer(self, point: Tensor, values: Tensor, success: Tensor | None, step: int) -> None:
        if success is None:
            success = torch.zeros_like(values, dtype=torch.bool)
        if self.point is None:
            self.point, self.values, self.success = point, values.nan_to_num(nan=-math.inf), success
            self.step = torch.full_like(values, step, dtype=torch.long)
            return
        wins = values > self.values  # an undefined loss never wins
        if self.judged:
            wins = (success & ~self.success) | (wins & (success == self.success))
        self.point = torch.where(per_sample(wins, point), point, self.point)
        self.values = torch.where(wins, values, self.values)
        self.success = torch.where(wins, success, self.success)
        self.step = torch.where(wins, step, self.step)


def _result(x_adv: Tensor, best: _Best | None, gradients: int, scorings: int) -> Verdict:
    """The verdict, for passes that every sample took part in."""
    spent = torch.full((x_adv.shape[0],), gradients, device=x_adv.device)
    if best is None:
        return Verdict(x_adv, spent.bool(), spent, spent, spent)
    return Verdict(x_adv, best.success, torch.where(best.success, best.step, -1), spent, spent + scorings)


def _accelerated(grad: Tensor, velocity: Tensor | None, momentum: float) -> Tensor:
    """The gradient, or the decaying sum of all gradients so far, each divided by its L1 norm."""
    if not momentum:
        return grad
    length = rows(grad).abs().sum(dim=1)
    unit = grad / per_sample(torch.where(length > 0, length, torch.ones_like(length)), grad)
    return unit if velocity is None else momentum * velocity + unit


def _start(
    function: str, start: str | Tensor, center: Tensor, threat: Threat, generator: Generator | None, restart: int
) -> Tensor:
    """Where to begin, in the working dtype."""
    if isinstance(start, Tensor):
        return plain(start).to(center.dtype)
    return center if start == "clean" else random_start(function, threat, center, generator, restart)
