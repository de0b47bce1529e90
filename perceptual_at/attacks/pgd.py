"""Projected gradient attacks: one function over threat x loss."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import Generator
from perceptual_at._rounding import cast_toward
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.attacks.search import Search
from perceptual_at.attacks.starts import random_start
from perceptual_at.attacks.steps import ascended
from perceptual_at.attacks.targets import margin
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, budget, check_threat, select
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, classified, misclassified, opened


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
    loss: PerSampleLoss = cross_entropy,
    targets: Tensor | None = None,
    start: Literal["random", "clean"] | Tensor = "random",
    restarts: int = 1,
    momentum: float = 0.0,
    eot: int = 1,
    keep: Literal["last", "best"] = "last",
    early_stop: bool = False,
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
        model: maps inputs `(B, ...)` to logits `(B, K)`, dense logits `(B, K, *S)`, or whatever else `loss` takes;
            normalisation belongs inside it.
        x: clean inputs, shape `(B, ...)`, inside the bounds of the threat model.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label; class probabilities of the logits' shape;
            with a `loss` of your own, whatever it takes, with a row per sample.
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat`.
        steps: number of gradient steps K; costs K forward passes and K input-gradient passes.
        step_size: length s of a step in input units, one number or one per sample `(B,)`; None means
            `2.5 * eps / steps`, 2/255 for ten steps at 8/255.
        loss: per-sample function `(outputs, labels) -> (B,)`.
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
        early_stop: with `keep="best"`, let a sample go at its first misclassified iterate, which is returned for it;
            decided samples then cost nothing. Waits for the device in every step.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
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
            numbers out of range, the model returns no logits, or an option would have no effect (`restarts > 1` with a
            fixed start, `early_stop` with `keep="last"`).

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
    terms = Terms(loss, targets, start, model_mode, lane, eot, validate, judged=verdict or early_stop)
    climb = _Climb(steps, step_size, momentum, restarts, keep, early_stop, verdict, generator)
    return _ascended("pgd", model, x, labels, threat, terms, climb)


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
    loss: PerSampleLoss = cross_entropy,
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
    check_threat("fgsm", threat)
    step_size = budget("fgsm", threat)
    terms = Terms(loss, targets, start, model_mode, lane, validate=validate, judged=verdict)
    return _ascended(
        "fgsm", model, x, labels, threat, terms, _Climb(1, step_size, verdict=verdict, generator=generator)
    )


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
    early_stop: bool = False,
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
        early_stop: see `pgd`.
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
    terms = Terms(margin, targets, start, model_mode, lane, validate=validate, judged=verdict or early_stop)
    climb = _Climb(steps, step_size, 0.0, restarts, keep, early_stop, verdict, generator)
    return _ascended("cw", model, x, labels, threat, terms, climb)


class _Climb(NamedTuple):
    """How to climb."""

    steps: int
    step_size: float | Tensor | None
    momentum: float = 0.0
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    early_stop: bool = False
    verdict: bool = False
    generator: Generator | None = None


def _ascended(
    function: str, model: Model, x: Tensor, labels: Tensor, threat: Threat, terms: Terms, climb: _Climb
) -> Tensor | Verdict:
    """The attacks. Errors speak of `function`."""
    _check_climb(function, climb, terms.start)
    with opened(function, model, x, labels, threat, terms) as victim:
        step_size = climb.step_size
        if step_size is None:
            step_size = 2.5 * budget(function, threat) / climb.steps
        loss: PerSampleLoss = terms.loss  # type: ignore[assignment]
        towards: PerSampleLoss = loss if terms.targets is None else (lambda logits, aims: -loss(logits, aims))
        if climb.keep == "best" or climb.restarts > 1 or climb.verdict:
            return _searched(victim, threat, towards, terms, climb._replace(step_size=step_size))
        center = victim.x.to(victim.width)
        point = _start(function, terms.start, center, threat, climb.generator, 0)
        velocity = None
        for _ in range(climb.steps if len(x) else 0):
            grad = victim.slope(visible(point, victim.x, threat), victim.labels, towards)
            if climb.momentum:
                grad = velocity = _accelerated(grad, velocity, climb.momentum)
            point = ascended(threat, point, center, grad, step_size)
        return visible(point, victim.x, threat)


def _searched(victim: Victim, threat: Threat, loss: PerSampleLoss, terms: Terms, climb: _Climb) -> Tensor | Verdict:
    """The climb that compares its iterates and starts, and lets decided samples go."""
    search = Search(victim.x, victim.labels, misclassified if terms.targets is None else classified)
    if not len(victim.x):
        return search.result(climb.verdict)
    best, steps = climb.keep == "best", climb.steps
    for restart in range(climb.restarts):
        run = _Run(victim, threat, climb)
        run.point = _start(victim.function, terms.start, run.center, threat, climb.generator, restart)
        if climb.early_stop and restart:
            run.take(~search.success)
        inside = not isinstance(terms.start, Tensor)  # a given start may be outside the set
        for index in range(steps):
            if not len(run.x):
                break
            seen = visible(run.point, run.x, run.threat)
            answer = victim.gradient(seen, run.labels, loss)
            grad = answer.grad
            search.spend(run.at, gradients=terms.eot)
            if best and inside:
                wrong = search.wrong(run.at, answer.logits) if terms.judged else None
                if climb.early_stop and wrong is not None:
                    wrong = search.confirmed(victim, run.at, seen, wrong)
                search.offer(run.at, seen, answer.values, wrong, index)
                if climb.early_stop and wrong is not None:
                    grad = grad[run.take(~wrong)]
            run.advance(grad)
            inside = True
        if len(run.x):
            last = visible(run.point, run.x, run.threat)
            values, logits = victim.value(last, run.labels, loss)
            search.spend(run.at, forwards=terms.eot)
            search.offer(run.at, last, values, search.wrong(run.at, logits) if terms.judged else None, steps)
    if terms.judged and victim.confirms:
        search.rejudge(victim, steps)
    return search.result(climb.verdict)


class _Run:
    """One run from one start, for the samples `at` of the batch that are still in it."""

    point: Tensor

    def __init__(self, victim: Victim, threat: Threat, climb: _Climb) -> None:
        self.x, self.labels, self.threat = victim.x, victim.labels, threat
        self.step_size, self.momentum = climb.step_size, climb.momentum
        self.center = victim.x.to(victim.width)
        self.at = torch.arange(len(victim.x), device=victim.x.device)
        self.velocity: Tensor | None = None

    def advance(self, grad: Tensor) -> None:
        """One step along a gradient, or along the decaying sum of all so far."""
        if self.momentum:
            grad = self.velocity = _accelerated(grad, self.velocity, self.momentum)
        self.point = ascended(self.threat, self.point, self.center, grad, self.step_size)  # type: ignore[arg-type]

    def take(self, kept: Tensor) -> Tensor:
        """Go on with some of the samples; gives their places."""
        left = places(kept)
        self.x, self.center, self.labels, self.point, self.at = (
            value[left] for value in (self.x, self.center, self.labels, self.point, self.at)
        )
        self.threat = select(self.threat, left)
        self.velocity = None if self.velocity is None else self.velocity[left]
        if isinstance(self.step_size, Tensor) and self.step_size.ndim:
            self.step_size = self.step_size[left]
        return left


def _accelerated(grad: Tensor, velocity: Tensor | None, momentum: float) -> Tensor:
    """The decaying sum of all gradients so far, each divided by its L1 norm."""
    length = rows(grad).abs().sum(dim=1).clamp_max(torch.finfo(grad.dtype).max)  # huge ones shall not vanish
    unit = grad / per_sample(torch.where(length > 0, length, torch.ones_like(length)), grad)
    return unit if velocity is None else momentum * velocity + unit


def _start(
    function: str, start: str | Tensor, center: Tensor, threat: Threat, generator: Generator | None, restart: int
) -> Tensor:
    """Where to begin, in the working dtype."""
    if isinstance(start, Tensor):
        return start.detach().to(center.dtype, copy=start.is_inference())
    return center if start == "clean" else random_start(function, threat, center, generator, restart)


def visible(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point in the dtype of the inputs: what the model sees and the caller gets."""
    return point if point.dtype == x.dtype else cast_toward(threat.project(point, x), x)


def _check_climb(function: str, climb: _Climb, start: str | Tensor) -> None:
    _check.count(function, "steps", climb.steps)
    _check.number(function, "momentum", climb.momentum, at_least=0.0)
    _check.choice(function, "keep", climb.keep, ("last", "best"))
    _check.count(function, "restarts", climb.restarts)
    if climb.restarts > 1 and not (isinstance(start, str) and start == "random"):
        raise ValueError(
            f"{function}: `restarts`={climb.restarts} has no effect with a fixed start; pass start='random' or drop it."
        )
    if climb.step_size is not None and not isinstance(climb.step_size, Tensor):
        _check.number(function, "step_size", climb.step_size, above=0.0)
    if climb.early_stop and climb.keep != "best":
        raise ValueError(
            f"{function}: `early_stop` returns the first misclassified iterate, which keep={climb.keep!r} does not; "
            "pass keep='best', or drop it."
        )
