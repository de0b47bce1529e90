"""Auto-PGD: projected gradient ascent that chooses its step size by itself."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.attacks.pgd import visible
from perceptual_at.attacks.targets import ascended, likely_targets, loss_of, targeted_dlr
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, around, budget, budgets, check_threat, projected, select
from perceptual_at.threats import start as start_of
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, classified, misclassified, opened, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

# The schedule of Croce and Hein 2020, Sec. 3: shares of all steps.
_FIRST_CHECK, _LEAST_CHECK, _SOONER = 0.22, 0.06, 0.03
_MOMENTUM = _RHO = 0.75
# And of Croce and Hein 2021, Sec. 3.3, for L1.
_CHECK_L1, _FIRST_SHARE, _DENSER, _SHRINK, _SMALLEST = 0.04, 0.2, 1.5, 1.5, 10.0
_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


class ApgdOptions(TypedDict, total=False):
    """What `apgd` can be given besides model, inputs, labels, threat and `verdict`."""

    steps: int
    loss: PerSampleLoss | TargetedLoss | None
    targets: Tensor | None
    target_classes: int | None
    start: Literal["random"] | Tensor
    restarts: int
    rho: float
    from_larger_eps: bool
    eot: int
    early_stop: bool
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: _random.Generator | None


@overload
def apgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[ApgdOptions]",
) -> Tensor: ...
@overload
def apgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: Literal[True], **options: "Unpack[ApgdOptions]"
) -> Verdict: ...
@overload
def apgd(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *, verdict: bool, **options: "Unpack[ApgdOptions]"
) -> Tensor | Verdict: ...
def apgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    loss: PerSampleLoss | TargetedLoss | None = None,
    targets: Tensor | None = None,
    target_classes: int | None = None,
    start: Literal["random"] | Tensor = "random",
    restarts: int = 1,
    rho: float = _RHO,
    from_larger_eps: bool = False,
    eot: int = 1,
    early_stop: bool = True,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: _random.Generator | None = None,
) -> Tensor | Verdict:
    r"""Adversarial inputs by projected gradient ascent with momentum and a step size that halves when progress stalls.

    $$ z = \Pi\big(x_t + s_t \, \mathrm{steepest}(\nabla \ell)\big), \qquad
       x_{t+1} = \Pi\big(x_t + \tfrac34 (z - x_t) + \tfrac14 (x_t - x_{t-1})\big) $$

    The step size starts at $2 \epsilon$. At checkpoints, at first after 22 % of the steps and then ever sooner, it is
    halved for every sample whose loss rose in at most $\rho$ of the steps since the last checkpoint, or whose step
    size and best loss have both stayed as they were; such a sample goes on from its best point. For `L1` the step
    moves the entries with the largest gradients, as many as the best point so far suggests, without momentum.

    APGD-CE is `apgd(model, x, labels, threat)`, APGD-DLR adds `loss=dlr`, APGD-T adds `target_classes=9`.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs, shape `(B, ...)`, inside the bounds of the threat model.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat`. `L2(eps, projection="ball_box")` takes the
            original's steps exactly.
        steps: number of gradient steps of each run; costs `steps + 1` gradients.
        loss: per-sample function `(logits, labels) -> (B,)`, with `target_classes` a function
            `(logits, labels, targets) -> (B,)`. None means `cross_entropy`, or `targeted_dlr`.
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them (of DLR it ascends the
            targeted form), and success means being classified as the target.
        target_classes: attack towards each of this many wrong classes in turn, most likely first (all of them
            where there are fewer); None attacks without a target.
        start: `"random"`, or a tensor to start from.
        restarts: number of runs, per target class.
        rho: share of steps, more than which must have raised the loss; none in `L1`, where steps follow sparseness.
        from_larger_eps: only with `L1`: 30 % of the steps at three times the budget, 30 % at twice, the rest at the
            budget itself, each from the best point of the one before.
        eot: passes to average over in each step, for models that are random.
        early_stop: a sample leaves the batch as soon as it is misclassified, so that decided samples cost
            nothing. False spends all steps on all samples and returns misclassified points with the largest loss.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: search on a copy of the model that costs less; see `Lane`. Every success is confirmed by the model itself.
        validate: check once that inputs are finite and inside the bounds, and labels in range.
        verdict: return a `Verdict`.
        generator: source of the random start, on the device of `x`: a `torch.Generator` for the batch, or a
            `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started from
            `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; samples without success at the point of largest loss.
        With `verdict`, a `Verdict` with them.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels or numbers out
            of range, the model returns no logits, or an option would have no effect.

    Source:
        Croce and Hein 2020 (AutoAttack), Sec. 3 and Algorithm 1; for L1 Croce and Hein 2021 ("Mind the box"), Sec. 3.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> x, labels = torch.tensor([[0.5], [0.125]]), torch.tensor([0, 0])
        >>> apgd(lambda x: model(x - 0.25), x, labels, Linf(0.125), steps=10, verdict=True).success
        tensor([False,  True])
        >>> apgd(lambda x: model(x - 0.25), x, labels, Linf(0.125), steps=10)  # the second was wrong to begin with
        tensor([[0.3750],
                [0.1250]])
    """
    name = "apgd"
    _check.flag(name, early_stop=early_stop, verdict=verdict)
    _check_call(threat, steps, targets, target_classes, start, restarts, rho, from_larger_eps)
    _check_loss(loss, target_classes)
    chosen = _Aim(loss, labels, targets, target_classes)
    terms = Terms(chosen.given, targets, start, model_mode, lane, eot, validate)
    with opened(name, model, x, labels, threat, terms) as victim:
        numbers = _random.per_sample_generator(name, generator, x)
        search = Search(victim.x, victim.labels, misclassified if targets is None else classified)
        if not len(x):
            return search.result(verdict)
        everyone = torch.arange(len(x), device=x.device)
        chosen.begin(search.begin(victim), victim.labels)
        for rank, restart in itertools.product(range(len(chosen.rivals)), range(restarts)):
            at = search.remaining() if early_stop else everyone
            if not len(at):
                break
            given = start if isinstance(start, Tensor) else None
            ascent = _Ascent(victim, search, threat, chosen.taken(rank, at), at, rho)
            _climb(
                ascent, None if given is None else plain(given)[at], numbers.take(at).fork(rank * restarts + restart),
                steps, early_stop=early_stop, larger=from_larger_eps,
            )  # fmt: skip
    return search.result(verdict)


def _check_call(
    threat: Any,
    steps: Any,
    targets: Any,
    target_classes: Any,
    start: Any,
    restarts: Any,
    rho: Any,
    from_larger_eps: bool,
) -> None:
    name = "apgd"
    check_threat(name, threat)
    budget(name, threat)
    for what, value in (("steps", steps), ("restarts", restarts)):
        _check.count(name, what, value)
    _check.number(name, "rho", rho, above=0.0, at_most=1.0)
    _check.flag(name, from_larger_eps=from_larger_eps)
    if target_classes is not None:
        _check.count(name, "target_classes", target_classes)
        if targets is not None:
            raise ValueError(f"{name}: `target_classes` has no effect with given `targets`; drop one of them.")
    if not isinstance(start, Tensor):
        _check.choice(name, "start", start, ("random",))
    elif restarts > 1:
        raise ValueError(
            f"{name}: `restarts`={restarts} has no effect with a fixed start; pass start='random' or drop it."
        )
    if rho != _RHO and hasattr(threat, "sparse"):
        raise ValueError(f"{name}: `rho`={rho} has no effect in L1, where steps shrink with sparseness; drop it.")
    if from_larger_eps and not hasattr(threat, "sparse"):
        raise ValueError(f"{name}: `from_larger_eps` is for L1 threat models, got {threat!r}.")
    if from_larger_eps and isinstance(start, Tensor):
        raise ValueError(f"{name}: `from_larger_eps` has no effect with a given `start`; drop one of them.")


def _check_loss(loss: Any, target_classes: Any) -> None:
    """Require a loss that takes the class to move to, where there is one."""
    if target_classes is None or not callable(loss):
        return
    if error := _check.unbound(loss):  # three things, as an attack takes
        raise TypeError(
            "apgd: `loss` must be a function (logits, labels, targets) -> (B,) with `target_classes`, such as "
            f"targeted_dlr, got {getattr(loss, '__name__', loss)!r}: {error}."
        ) from error


class _Aim:
    """What is ascended: a loss away from the labels, towards given targets, or towards wrong classes in turn."""

    def __init__(
        self, loss: PerSampleLoss | TargetedLoss | None, labels: Tensor, targets: Tensor | None, target_classes: Any
    ) -> None:
        self.given: Any = loss
        if loss is None:
            self.given = cross_entropy if target_classes is None else targeted_dlr
        self.target_classes = target_classes
        self.loss = ascended("apgd", self.given, labels, targets) if target_classes is None else self.given
        self.rivals: list[Tensor | None] = [None]
        """The classes to move to, one tensor for each round."""

    def begin(self, clean_logits: Tensor, labels: Tensor) -> None:
        """Take what belongs to the samples: their labels, or the targets."""
        self.labels = labels
        if self.target_classes is not None:
            self.rivals = list(likely_targets(clean_logits, labels, self.target_classes).unbind(dim=1))

    def taken(self, rank: int, rows: Tensor) -> "_Objective":
        """What some of the samples ascend in a round."""
        rivals = self.rivals[rank]
        return _Objective(loss_of(self.loss, rows), self.labels[rows], None if rivals is None else rivals[rows])


class _Objective(NamedTuple):
    """A loss with the classes of the samples that it is for."""

    loss: Any
    labels: Tensor
    rivals: Tensor | None

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One value per sample."""
        value: Tensor = self.loss(logits, labels, *(() if self.rivals is None else (self.rivals,)))
        return value

    def take(self, rows: Tensor) -> "_Objective":
        """The same for some of the samples."""
        rivals = None if self.rivals is None else self.rivals[rows]
        return self._replace(loss=loss_of(self.loss, rows), labels=self.labels[rows], rivals=rivals)


def _climb(
    ascent: "_Ascent",
    first: Tensor | None,
    numbers: _random.SampleGenerator,
    steps: int,
    *,
    early_stop: bool,
    larger: bool,
) -> None:
    """One run of all steps, from one start, towards one target."""
    search = ascent.search
    phases = _PHASES if larger else ((1.0, 1.0),)
    lengths = [math.ceil(share * steps) for _, share in phases[:-1]]
    lengths.append(max(steps - sum(lengths), 0))
    goal = ascent.threat
    for (factor, _), length in zip(phases, lengths, strict=True):
        ascent.threat = goal.scaled(factor) if factor != 1 else goal
        if first is None:
            point = start_of("apgd", ascent.threat, ascent.center, numbers, far=True)
        else:
            point = projected(ascent.threat, first.to(ascent.center.dtype), ascent.center)
        ascent.begin(point, fresh=first is None and not larger)
        counts = factor == 1  # points of the larger balls are no result
        for index in range(length + 1):
            if index:
                ascent.advance(index, length)
            seen, wrong = ascent.look(index)
            if counts and not early_stop:
                wrong = search.confirmed(ascent.victim, ascent.at, seen, wrong)
                search.offer(ascent.at, seen, ascent.state.values, wrong, index)
            elif counts and bool(wrong.any()):
                wrong = search.confirmed(ascent.victim, ascent.at, seen, wrong)
                search.record(ascent.at, seen, wrong, index)
                ascent.take(~wrong)
                if not len(ascent.at):
                    return
            if index and index < length:
                ascent.check(length)
        first = ascent.state.best_point  # where the next phase goes on
    ascent.spend()
    if early_stop:  # of samples that all points of the run left right, the point of largest loss
        best = visible(ascent.state.best_point, ascent.x, ascent.threat)
        search.offer(ascent.at, best, ascent.state.best_values, None, steps)


@dataclasses.dataclass
class _State:
    """What a run remembers of each sample; every tensor has one row per sample."""

    point: Tensor
    previous: Tensor
    grad: Tensor
    values: Tensor
    step_size: Tensor
    best_point: Tensor
    best_grad: Tensor
    best_values: Tensor
    checked_values: Tensor  # best loss at the last checkpoint
    halved: Tensor  # at the last checkpoint
    rises: Tensor  # since the last checkpoint
    share: Tensor  # of the entries that an L1 step moves
    spread: Tensor  # entries that the best point had moved at the last checkpoint, L1

    def take(self, kept: Tensor) -> "_State":
        """Those of some of the samples."""
        return _State(*(getattr(self, field.name)[kept] for field in dataclasses.fields(self)))


class _Ascent:
    """The samples that are still climbing in one run, `at` their rows of the batch."""

    state: _State

    def __init__(
        self, victim: Victim, search: Search, threat: Threat, objective: _Objective, at: Tensor, rho: float
    ) -> None:
        self.victim, self.search, self.objective, self.at, self.rho = victim, search, objective, at, rho
        self.x, self.threat = victim.x[at], select(threat, at)
        self.center = self.x.to(wide(self.x))
        self.sparse: Callable[..., Tensor] | None = getattr(self.threat, "sparse", None)
        self.gradients = 0  # passes that are not yet in the books, of each sample that is still climbing

    def take(self, kept: Tensor) -> None:
        """Go on with some of the samples."""
        self.spend()
        kept = places(kept)
        self.x, self.center, self.at = self.x[kept], self.center[kept], self.at[kept]
        self.objective = self.objective.take(kept)
        self.threat = select(self.threat, kept)
        self.sparse = getattr(self.threat, "sparse", None)
        self.project = around(self.threat, self.center)
        self.state = self.state.take(kept)

    def spend(self) -> None:
        """Enter the passes into the books."""
        self.search.spend(self.at, gradients=self.gradients)
        self.gradients = 0

    def begin(self, point: Tensor, *, fresh: bool) -> None:
        """Place every sample at its start."""
        self.project = around(self.threat, self.center)
        zeros = point.new_zeros(len(point), dtype=wide(point))
        step_size = (1.0 if self.sparse else 2.0) * budgets("apgd", self.threat, self.center)
        entries = float(max(1, rows(point).shape[1]))
        spread = zeros + entries if fresh else self._moved(point).to(zeros.dtype)
        share = zeros + _FIRST_SHARE if fresh else spread / entries / _DENSER
        self.state = _State(
            point=point, previous=point, grad=torch.zeros_like(point), values=zeros, step_size=step_size,
            best_point=point.clone(), best_grad=torch.zeros_like(point), best_values=zeros - math.inf,
            checked_values=zeros, halved=torch.ones_like(zeros, dtype=torch.bool), rises=zeros,
            share=share, spread=spread,
        )  # fmt: skip
        self.since_check, self.interval = 0, 0

    def look(self, index: int) -> tuple[Tensor, Tensor]:
        """Ask for loss and gradient at the current points; gives what was seen, and the mask of the misclassified."""
        state = self.state
        seen = visible(state.point, self.x, self.threat)
        values, grad, logits = self.victim.gradient(seen, self.objective.labels, self.objective.values)
        values, grad = values.to(state.rises.dtype), grad.to(state.point.dtype)
        self.gradients += self.victim.eot
        # The original compares the first step's loss with 0 instead of the start's; its step sizes depend on it.
        before = state.values if index > 1 else torch.zeros_like(values)
        state.rises = state.rises + (values > before) if index else state.rises
        improved = values > state.best_values
        if index == 0:
            improved = torch.ones_like(improved)
            state.checked_values = values
        state.values, state.grad = values, grad
        defined = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # of a start without a loss
        state.best_values = torch.where(improved, defined, state.best_values)
        state.best_point.lerp_(state.point, per_sample(improved, grad).to(grad.dtype))  # exact for shares of 0 and 1
        state.best_grad = torch.where(per_sample(improved, grad), grad, state.best_grad)
        return seen, self.search.wrong(self.at, logits)

    def advance(self, index: int, length: int) -> None:
        """One step of every sample."""
        if index == 1:
            share = _CHECK_L1 if self.sparse else _FIRST_CHECK
            self.since_check, self.interval = 0, max(int(share * length), 1)
        state = self.state
        step_size = per_sample(state.step_size.to(state.point.dtype), state.point)
        direction = self.sparse(state.grad, state.share) if self.sparse else self.threat.steepest(state.grad)
        target = self.project(torch.addcmul(state.point, direction, step_size))
        if not self.sparse and index > 1:
            inertia = (1 - _MOMENTUM) * (state.point - state.previous)
            target = self.project(inertia.add_(torch.lerp(state.point, target, _MOMENTUM)))
        state.previous, state.point = state.point, target
        self.since_check += 1

    def check(self, length: int) -> None:
        """At a checkpoint, shorten the steps of the samples that no longer get on."""
        if self.since_check < self.interval:
            return
        (self._check_sparse if self.sparse else self._check_progress)()
        if not self.sparse:
            least, sooner = (max(int(share * length), 1) for share in (_LEAST_CHECK, _SOONER))
            self.interval = max(self.interval - sooner, least)
        self.since_check = 0

    def _check_progress(self) -> None:
        state = self.state
        oscillates = state.rises <= self.interval * self.rho
        stuck = ~state.halved & (state.checked_values >= state.best_values)
        state.halved = oscillates | stuck
        state.checked_values, state.rises = state.best_values, torch.zeros_like(state.rises)
        state.step_size = torch.where(state.halved, state.step_size / 2, state.step_size)
        self._return_to_best(state.halved)

    def _check_sparse(self) -> None:
        state, largest = self.state, budgets("apgd", self.threat, self.center)
        spread = self._moved(state.best_point).to(state.spread.dtype)
        sparser = spread / state.spread < 0.95
        state.share = spread / max(1, rows(state.point).shape[1]) / _DENSER
        shorter = (state.step_size / _SHRINK).maximum(largest / _SMALLEST)
        state.step_size = torch.where(sparser, largest, shorter)
        state.spread = spread
        self._return_to_best(sparser)

    def _return_to_best(self, chosen: Tensor) -> None:
        state = self.state
        state.point = torch.where(per_sample(chosen, state.point), state.best_point, state.point)
        state.grad = torch.where(per_sample(chosen, state.grad), state.best_grad, state.grad)

    def _moved(self, point: Tensor) -> Tensor:
        """How many entries differ from the clean input."""
        return (rows(point) != rows(self.center)).sum(dim=1)
