"""The loop behind `pgd`, `fgsm` and `cw`."""

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import Generator
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, rows
from perceptual_at.attacks.arguments import check_arguments, check_values, plain
from perceptual_at.attacks.freeze import Model, ModelMode, check_lane, frozen
from perceptual_at.attacks.lanes import Lane
from perceptual_at.attacks.queries import Queries, classified, misclassified, visible
from perceptual_at.attacks.search import Search, places
from perceptual_at.attacks.starts import random_start
from perceptual_at.attacks.steps import ascended
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import Threat, budget, select


def ascend(
    function: str,
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float | Tensor | None,
    reach: float,
    loss: PerSampleLoss,
    targets: Tensor | None,
    start: str | Tensor,
    restarts: int,
    momentum: float,
    eot: int,
    keep: str,
    early_stop: bool,
    model_mode: ModelMode,
    lane: Lane | None,
    validate: bool,
    verdict: bool,
    generator: Generator | None,
) -> Tensor | Verdict:
    """The attacks. Errors speak of `function`; all steps together go `reach` budgets far by default."""
    judged = verdict or early_stop
    check_arguments(function, model, x, labels, threat, loss, start, restarts, targets=targets, verdict=judged)
    _check.count(function, "steps", steps)
    _check.count(function, "eot", eot)
    _check.number(function, "momentum", momentum, at_least=0.0)
    _check.choice(function, "keep", keep, ("last", "best"))
    _check.choice(function, "model_mode", model_mode, ("eval", "as_is"))
    check_lane(function, model, model_mode, lane)
    if step_size is None:
        step_size = reach * budget(function, threat) / steps
    elif not isinstance(step_size, Tensor):
        _check.number(function, "step_size", step_size, above=0.0)
    if early_stop and keep != "best":
        raise ValueError(
            f"{function}: `early_stop` returns the first misclassified iterate, which keep={keep!r} does not; pass "
            "keep='best', or drop it."
        )
    scored = keep == "best" or restarts > 1 or verdict  # then each run takes a forward pass that only judges

    with torch.inference_mode(False), torch.enable_grad(), frozen(model, model_mode=model_mode, lane=lane) as f:
        x, labels = plain(x), plain(labels)
        aims = labels if targets is None else plain(targets)
        search = Search(x, aims, misclassified if targets is None else classified)
        if not len(x):
            return search.result(verdict)
        label_range = check_values(function, x, aims, threat, start) if validate else None
        queries = Queries(function, f, label_range, eot=eot, labels_are="labels" if targets is None else "targets")
        objective: PerSampleLoss = loss if targets is None else (lambda logits, aims: -loss(logits, aims))
        for restart in range(restarts):
            run = _Run(x, aims, threat, step_size, momentum)
            run.point = _start(function, start, run.center, threat, generator, restart)
            if early_stop and restart:
                run.take(~search.success)
            inside = not isinstance(start, Tensor)  # a given start may be outside the set
            for index in range(steps):
                if not len(run.x):
                    break
                seen = visible(run.point, run.x, run.threat)
                answer = queries.gradient(seen, run.aims, objective)
                grad = answer.grad
                if scored:
                    search.spend(run.at, gradients=eot)
                if keep == "best" and inside:
                    wrong = search.judged(answer.logits, run.aims) if judged else None
                    if early_stop and wrong is not None:
                        wrong = search.confirmed(queries, run.at, seen, wrong)
                    search.offer(run.at, seen, answer.values, wrong, index)
                    if early_stop and wrong is not None:
                        grad = grad[run.take(~wrong)]
                run.advance(grad)
                inside = True
            if len(run.x):
                last = visible(run.point, run.x, run.threat)
                if not scored:
                    return last
                values, logits = queries.value(last, run.aims, objective)
                search.spend(run.at, forwards=eot)
                search.offer(run.at, last, values, search.judged(logits, run.aims) if judged else None, steps)
        if judged and queries.confirms:
            search.rejudge(queries, steps)
    return search.result(verdict)


class _Run:
    """One run from one start, for the samples `at` of the batch that are still in it."""

    point: Tensor

    def __init__(self, x: Tensor, aims: Tensor, threat: Threat, step_size: float | Tensor, momentum: float) -> None:
        self.x, self.aims, self.threat, self.step_size, self.momentum = x, aims, threat, step_size, momentum
        self.center = x.to(wide(x))
        self.at = torch.arange(len(x), device=x.device)
        self.velocity: Tensor | None = None

    def advance(self, grad: Tensor) -> None:
        """One step along a gradient, or along the decaying sum of all so far."""
        direction = _accelerated(grad.to(self.center.dtype), self.velocity, self.momentum)
        self.velocity = direction if self.momentum else None
        self.point = ascended(self.threat, self.point, self.center, direction, self.step_size)

    def take(self, kept: Tensor) -> Tensor:
        """Go on with some of the samples; gives their places."""
        left = places(kept)
        self.x, self.center, self.aims, self.point, self.at = (
            value[left] for value in (self.x, self.center, self.aims, self.point, self.at)
        )
        self.threat = select(self.threat, left)
        self.velocity = None if self.velocity is None else self.velocity[left]
        if isinstance(self.step_size, Tensor) and self.step_size.ndim:
            self.step_size = self.step_size[left]
        return left


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
