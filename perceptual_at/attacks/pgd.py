"""Projected gradient attacks: one function over threat x loss."""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._random import Generator, SampleGenerator
from perceptual_at._rounding import cast_toward, divisor
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.attacks.targets import ascended, loss_of, margin, targeted_dlr
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Ascent, Threat, ascent, budget, select
from perceptual_at.threats import start as start_of
from perceptual_at.threats.entries import entries_text, width
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, classified, misclassified, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PgdOptions(TypedDict, total=False):
    """What `pgd` can be given besides model, inputs, labels, threat and `verdict`."""

    steps: int
    step_size: float | Tensor | None
    loss: PerSampleLoss
    targets: Tensor | None
    start: Literal["random", "clean"] | Tensor
    restarts: int
    momentum: float
    eot: int
    keep: Literal["last", "best"]
    early_stop: bool
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: Generator | None


class FgsmOptions(TypedDict, total=False):
    """What `fgsm` can be given besides model, inputs, labels, threat and `verdict`."""

    loss: PerSampleLoss
    targets: Tensor | None
    start: Literal["random", "clean"] | Tensor
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: Generator | None


class CwOptions(TypedDict, total=False):
    """What `cw` can be given besides model, inputs, labels, threat and `verdict`."""

    steps: int
    step_size: float | Tensor | None
    targets: Tensor | None
    start: Literal["random", "clean"] | Tensor
    restarts: int
    keep: Literal["last", "best"]
    early_stop: bool
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: Generator | None


@overload
def pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[PgdOptions]",
) -> Tensor: ...
@overload
def pgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: "Unpack[PgdOptions]"
) -> Verdict: ...
@overload
def pgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: bool, **options: "Unpack[PgdOptions]"
) -> Tensor | Verdict: ...
def pgd(
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
    `pgd(model, x, labels, Linf(8 / 255))`, TRADES' attack adds `loss=kl_to(clean_logits)`, and `cw` is
    `loss=margin`.

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
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them (of DLR it ascends the
            targeted form), and success means being classified as the target.
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
        TypeError: if an argument is of the wrong kind (float class indices, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or an option would have no effect (`restarts > 1` with a
            fixed start, `early_stop` with `keep="last"`).

    Source:
        Madry et al. 2018, Sec. 2.1; settings of RPAT: Sec. A, of RAAT: Sec. D.1. Momentum: Dong et al. 2018,
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
    stops = early_stop is not False  # what is no truth value is refused behind the door
    terms = Terms(
        loss, targets, start, model_mode, lane, eot, validate, judged=stops or verdict is not False, even=not stops
    )
    climb = Climb(steps, step_size, momentum, restarts, keep, early_stop, verdict, generator)
    return climbed("pgd", model, x, labels, threat, terms, climb)


@overload
def fgsm(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[FgsmOptions]",
) -> Tensor: ...
@overload
def fgsm(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: "Unpack[FgsmOptions]"
) -> Verdict: ...
@overload
def fgsm(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: bool, **options: "Unpack[FgsmOptions]"
) -> Tensor | Verdict: ...
def fgsm(
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
        model: maps inputs `(B, ...)` to logits `(B, K)`, dense logits `(B, K, *S)`, or whatever else `loss` takes.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)` or `(B, *S)`, class probabilities, or whatever else `loss` takes.
        threat: a threat model with `eps`.
        loss: per-sample function `(logits, labels) -> (B,)`.
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them (of DLR it ascends the
            targeted form), and success means being classified as the target.
        start: `"random"` (the threat's `random_start`), `"clean"`, or a tensor to start from. The gradient is taken at
            that tensor as it is, which may be outside the ball.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: run the steps on a copy of the model that costs less, for example `Lane(dtype=torch.bfloat16)`; see
            `Lane`. Whether a `verdict` is a success is asked of the model itself, at one more forward pass.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the device
            once; skipped while compiling or capturing.
        verdict: return a `Verdict`: also whether each sample is misclassified, since which step, at what cost.
        generator: source of the random start, on the device of `x`: a `torch.Generator` for the batch, or a
            `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started from
            `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; a `Verdict` with them if `verdict`.

    Raises:
        TypeError: if an argument is of the wrong kind (float class indices, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or an option would have no effect.

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
    terms = Terms(loss, targets, start, model_mode, lane, validate=validate, judged=verdict is not False, even=True)
    climb = Climb(1, None, verdict=verdict, generator=generator, reach=1.0)
    return climbed("fgsm", model, x, labels, threat, terms, climb)


@overload
def cw(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[CwOptions]",
) -> Tensor: ...
@overload
def cw(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: "Unpack[CwOptions]"
) -> Verdict: ...
@overload
def cw(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: bool, **options: "Unpack[CwOptions]"
) -> Tensor | Verdict: ...
def cw(
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
    r"""Adversarial inputs by projected gradient ascent on the margin of the logits.

    $$ \max_{x'} \; \max_{k \ne y} z_k(x') - z_y(x') $$

    It is `pgd` with `loss=margin`: the loss of Carlini and Wagner inside a fixed ball, not their attack, which looks
    for the smallest perturbation; for that see `fab`.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`, or dense logits `(B, K, *S)`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.
        threat: a threat model.
        steps: number of gradient steps.
        step_size: length s of a step in input units, one number or one per sample `(B,)`; None means
            `2.5 * eps / steps`, 2/255 for ten steps at 8/255.
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them, and success means being
            classified as the target.
        start: `"random"` (the threat's `random_start`), `"clean"`, or a tensor to start from. The first gradient is
            taken at that tensor as it is, which may be outside the ball.
        restarts: number of random starts; the one whose kept iterate has the largest loss wins.
        keep: `"last"` returns the final iterate, `"best"` the iterate with the largest loss; with `verdict=True`,
            misclassified iterates come before all others. `"best"`, `restarts > 1` and `verdict` cost one more forward
            pass per restart.
        early_stop: with `keep="best"`, let a sample go at its first misclassified iterate, which is returned for it;
            decided samples then cost nothing. Waits for the device in every step.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: run the steps on a copy of the model that costs less, for example `Lane(dtype=torch.bfloat16)`; see
            `Lane`. Whether a `verdict` is a success is asked of the model itself, at one more forward pass.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the device
            once; skipped while compiling or capturing.
        verdict: return a `Verdict`: also whether each sample is misclassified, since which step, at what cost.
        generator: source of the random start, on the device of `x`: a `torch.Generator` for the batch, or a
            `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started from
            `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; a `Verdict` with them if `verdict`.

    Raises:
        TypeError: if an argument is of the wrong kind (float class indices, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or an option would have no effect.

    Source:
        Carlini and Wagner 2017, objective $f_6$. Column C&W of RAAT's tables (Sec. 5.1; its Sec. A.1
        describes the minimum-norm attack) is this one in our reading; the source of the printed values is unknown.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> cw(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.25))
        tensor([[0.2500]])
    """
    stops = early_stop is not False
    terms = Terms(
        margin,
        targets,
        start,
        model_mode,
        lane,
        validate=validate,
        judged=stops or verdict is not False,
        even=not stops,
    )
    climb = Climb(steps, step_size, 0.0, restarts, keep, early_stop, verdict, generator)
    return climbed("cw", model, x, labels, threat, terms, climb)


REACH = 2.5
"""How many budgets all steps together are long where nothing else is said: across the ball, and half a budget more."""


class Climb(NamedTuple):
    """How to climb."""

    steps: int
    step_size: float | Tensor | None
    momentum: float = 0.0
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    early_stop: bool = False
    verdict: bool = False
    generator: Generator | None = None
    reach: float = REACH


def climbed(
    function: str, model: Model, x: Tensor, labels: Tensor, threat: Threat, terms: Terms, climb: Climb
) -> Tensor | Verdict:
    """The attacks. Errors speak of `function`."""
    with opened(function, model, x, labels, threat, terms) as victim:
        step_size = _check_climb(function, x, threat, terms, climb)
        loss: Any = terms.loss
        if terms.targets is not None or loss is targeted_dlr or loss is None:
            loss = ascended(function, loss, labels, terms.targets)
        if climb.keep == "best" or climb.restarts > 1 or climb.verdict:
            return _searched(victim, threat, loss, terms, climb._replace(step_size=step_size))
        x, center = victim.x, victim.x.to(victim.width)
        up, velocity = ascent(threat, center, step_size), None
        point = _start(function, terms.start, up, climb.generator, 0)
        for _ in range(climb.steps if len(x) else 0):
            seen = point if point.dtype == x.dtype else visible(point, x, threat)  # asked here: few need the call
            grad = victim.gradient(seen, victim.labels, loss).grad
            if climb.momentum:
                grad = velocity = accelerated(grad, velocity, climb.momentum)
            point = up.step(point, grad)
        return point if point.dtype == x.dtype else visible(point, x, threat)


def _searched(victim: Victim, threat: Threat, loss: PerSampleLoss, terms: Terms, climb: Climb) -> Tensor | Verdict:
    """The climb that compares its iterates and starts, and lets decided samples go."""
    search = Search(victim.x, victim.labels, misclassified if terms.targets is None else classified)
    if not len(victim.x):
        return search.result(climb.verdict)
    best, steps = climb.keep == "best", climb.steps
    for restart in range(climb.restarts):
        run = _Run(victim, threat, loss, climb)
        run.point = _start(victim.function, terms.start, run.up, climb.generator, restart)
        if climb.early_stop and restart:
            run.take(~search.success)
        inside = not isinstance(terms.start, Tensor)  # a given start may be outside the set
        for index in range(steps):
            if not len(run.x):
                break
            seen = visible(run.point, run.x, run.threat)
            answer = victim.gradient(seen, run.labels, run.loss)
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
            values, logits = victim.value(last, run.labels, run.loss)
            search.spend(run.at, forwards=terms.eot)
            search.offer(run.at, last, values, search.wrong(run.at, logits) if terms.judged else None, steps)
    if terms.judged and victim.confirms:
        search.rejudge(victim, steps)
    return search.result(climb.verdict)


class _Run:
    """One run from one start, for the samples `at` of the batch that are still in it."""

    point: Tensor

    def __init__(self, victim: Victim, threat: Threat, loss: PerSampleLoss, climb: Climb) -> None:
        self.x, self.labels, self.threat, self.loss = victim.x, victim.labels, threat, loss
        self.step_size, self.momentum = climb.step_size, climb.momentum
        self.center = victim.x.to(victim.width)
        self.at = torch.arange(len(victim.x), device=victim.x.device)
        self.velocity: Tensor | None = None
        self.up = ascent(threat, self.center, self.step_size)  # type: ignore[arg-type]  # filled in by now

    def advance(self, grad: Tensor) -> None:
        """One step along a gradient, or along the decaying sum of all so far."""
        if self.momentum:
            grad = self.velocity = accelerated(grad, self.velocity, self.momentum)
        self.point = self.up.step(self.point, grad)

    def take(self, kept: Tensor) -> Tensor:
        """Go on with some of the samples, and with what belongs to them; gives their places."""
        left = places(kept)
        if len(left) == len(self.x):
            return left
        self.x, self.center, self.labels, self.at = (
            value[left] for value in (self.x, self.center, self.labels, self.at)
        )
        self.threat = select(self.threat, left)
        self.loss = loss_of(self.loss, left)
        self.velocity = None if self.velocity is None else self.velocity[left]
        if isinstance(self.step_size, Tensor) and self.step_size.ndim:
            self.step_size = self.step_size[left]
        self.point = self.point[left]
        self.up = ascent(self.threat, self.center, self.step_size)  # type: ignore[arg-type]  # as above
        return left


def accelerated(grad: Tensor, velocity: Tensor | None, momentum: float) -> Tensor:
    """The decaying sum of all gradients so far, each divided by its L1 norm."""
    length = rows(grad).abs().sum(dim=1).clamp_max(torch.finfo(grad.dtype).max)  # huge ones shall not vanish
    unit = grad / per_sample(divisor(length), grad)
    return unit if velocity is None else momentum * velocity + unit


def _start(function: str, start: str | Tensor, up: Ascent, generator: Generator | None, restart: int) -> Tensor:
    """Where to begin, in the working dtype."""
    if isinstance(start, Tensor):
        return start.detach().to(up.x.dtype, copy=start.is_inference())
    if start == "clean":
        return up.x
    if not isinstance(generator, SampleGenerator):
        return up.random_start(generator=generator)
    return start_of(function, up.threat, up.x, generator, restart=restart)


def visible(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point in the dtype of the inputs: what the model sees and the caller gets."""
    return point if point.dtype == x.dtype else cast_toward(threat.project(point, x), x)


def _check_climb(function: str, x: Tensor, threat: Threat, terms: Terms, climb: Climb) -> float | Tensor:
    """Require options that go together; gives the length of a step."""
    usual = (  # right at a glance; what is not is looked at piece by piece, for its message
        type(climb.steps) is int
        and climb.steps > 0
        and type(climb.momentum) is float
        and climb.momentum == 0.0
        and climb.keep == "last"
        and type(climb.restarts) is int
        and climb.restarts == 1
        and climb.early_stop is False
        and type(climb.verdict) is bool
        and climb.generator is None
        and terms.targets is None
    )
    if not usual:
        _check_search(function, x, terms, climb)
    if climb.step_size is None:
        eps = getattr(threat, "eps", None)
        return climb.reach * (eps if type(eps) is float else budget(function, threat)) / climb.steps
    check_step_size(function, climb.step_size, x, threat, read=terms.validate)
    return climb.step_size


def _check_search(function: str, x: Tensor, terms: Terms, climb: Climb) -> None:
    """Require options of more than the plain climb that go together."""
    _check.flag(function, early_stop=climb.early_stop, verdict=climb.verdict)
    _random.check(function, climb.generator, x)
    _check.count(function, "steps", climb.steps)
    _check.number(function, "momentum", climb.momentum, at_least=0.0)
    _check.choice(function, "keep", climb.keep, ("last", "best"))
    _check.count(function, "restarts", climb.restarts)
    if climb.restarts > 1 and not (isinstance(terms.start, str) and terms.start == "random"):
        raise ValueError(
            f"{function}: `restarts`={climb.restarts} has no effect with a fixed start; pass start='random' or drop it."
        )
    if climb.early_stop and climb.keep != "best":
        raise ValueError(
            f"{function}: `early_stop` returns the first misclassified iterate, which keep={climb.keep!r} does not; "
            "pass keep='best', or drop it."
        )


def check_step_size(function: str, step_size: float | Tensor, x: Tensor, threat: Threat, *, read: bool) -> None:
    """Require a positive length, or one per sample, that is not meant in 255ths; 0 where nothing may move anyway.

    Those of samples are looked at only if `read`.
    """
    if isinstance(step_size, Tensor) and step_size.ndim:
        if step_size.shape != x.shape[:1] or not step_size.is_floating_point():
            raise ValueError(
                f"{function}: `step_size` must be a number or floating-point numbers of shape ({len(x)},), got "
                f"{step_size.dtype} of shape {tuple(step_size.shape)}."
            )
        if not read or torch.compiler.is_compiling() or not x.numel():
            return
        still = getattr(threat, "eps", None) is not None and budget(function, threat) == 0
        if not bool(((step_size > 0) | ((step_size == 0) & still)).logical_and(step_size.isfinite()).all()):
            raise ValueError(f"{function}: every `step_size` must be positive and finite, got {step_size}.")
        step_size = step_size.max()
    elif not _rests(step_size, threat):
        _check.number(function, "step_size", step_size, above=0.0)
    longest, (low, high) = float(step_size), getattr(threat, "bounds", (-math.inf, math.inf))
    side = width((low, high))
    if not longest > side or not x.numel():
        return
    eps = getattr(threat, "eps", None)  # a step of many budgets is a way to go straight to the edge
    if eps is None or not longest > 20.001 * float(eps.max() if isinstance(eps, Tensor) else eps):
        return
    if longest > float(threat.norm(torch.full(x.shape, side, device=x.device)).max()):
        raise ValueError(
            f"{function}: `step_size`={longest:g} is further than across the input range "
            f"({entries_text(low)}, {entries_text(high)}). It is in input units, not in 255ths: did you mean "
            f"{longest:g} / 255?"
        )


def _rests(step_size: Any, threat: Any) -> bool:
    """Whether a step of no length is all that the threat allows."""
    if not _check.is_number(step_size) or step_size != 0:
        return False
    eps = getattr(threat, "eps", None)
    return eps is not None and not bool((eps > 0).any() if isinstance(eps, Tensor) else eps > 0)
