"""FAB: the nearest misclassified point, by steps onto the linearised decision boundary."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.attacks.fab_projections import shift_l1, shift_l2, shift_linf
from perceptual_at.attacks.search import Search
from perceptual_at.attacks.targets import likely_targets
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.threats import L1, L2, Linf, as_ball, budgets, check_threat, select
from perceptual_at.threats.entries import Bounds
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, misclassified, opened

_SHIFTS: dict[type, Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]] = {
    Linf: shift_linf, L2: shift_l2, L1: shift_l1,
}  # fmt: skip
_ORDERS = {Linf: torch.inf, L2: 2.0, L1: 1.0}
_DUAL_ORDERS = {Linf: 1.0, L2: 2.0, L1: torch.inf}


@overload
def fab(
    model: Model, x: Tensor, labels: Tensor, threat: Linf | L2 | L1, *, verdict: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def fab(
    model: Model, x: Tensor, labels: Tensor, threat: Linf | L2 | L1, *, verdict: Literal[True], **options: Any
) -> Verdict: ...
def fab(  # type: ignore[misc]  # the options of the overloads are checked by the call
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    steps: int = 100,
    restarts: int = 1,
    target_classes: int | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    early_stop: bool = True,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: _random.Generator | None = None,
) -> Tensor | Verdict:
    r"""Nearest misclassified points, by the fast adaptive boundary attack.

    Around the current point the model is taken as linear; the class whose boundary $w \cdot z = b$ is nearest is
    chosen, and both the current point and the clean input step onto that boundary inside the box:

    $$ x_{t+1} = (1 - \alpha) (x_t + \eta d_t) + \alpha (x + \eta d), \qquad
    \alpha = \min\Big( \frac{\|d_t\|_p}{\|d_t\|_p + \|d\|_p}, \alpha_{\max} \Big) $$

    with $d_t$ and $d$ the shortest shifts of $x_t$ and $x$ onto it. A misclassified point is noted and the search
    goes on from $x + \beta (x_{t+1} - x)$. Nothing here depends on the scale of the logits, and `eps` only decides
    which points count.

    The model is borrowed as by `pgd`. Inputs that are misclassified as they are cost one forward pass.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs inside the bounds, any floating dtype.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2` or `L1`, also with infinite bounds. A large `eps` makes it a minimum-norm attack, with
            `early_stop=False`.
        steps: number of iterations per target class and restart.
        restarts: number of runs; the first starts at `x`, others at a random point half the way to the nearest point
            found, at most `eps / 2`.
        target_classes: None considers the boundaries to all classes in every step, at one gradient each. A number
            attacks so many of the likeliest wrong classes in turn, all there are if there are fewer, at one gradient
            per step.
        alpha_max: largest share of the clean input's step.
        eta: how far to step, 1 being onto the boundary.
        beta: how far from `x` to go on once misclassified.
        early_stop: let a sample go at its first success. Without, all runs are made in full and the nearest
            misclassified point is returned.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: search on a copy of the model that costs less; see `Lane`. Every success is confirmed by the model itself.
        validate: check once that inputs are finite and inside the bounds, and labels in range.
        verdict: return a `Verdict`, whose steps count on over target classes and restarts.
        generator: source of the random starts, on the device of `x`; a `SampleGenerator` for numbers of each sample's
            own.

    Returns:
        Misclassified inputs where one was found within `eps`, else the clean ones; shape and dtype of `x`, detached,
        inside ball and box exactly. With `verdict=True` a `Verdict`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the threat none of the three.
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels or numbers out
            of range, or the model returns no logits or has no input gradient.

    Source:
        Croce and Hein 2020 (FAB), Algorithm 1; settings of AutoAttack.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.25 - x], dim=1)  # class 0 above 1/8
        >>> x, labels = torch.tensor([[0.5], [0.25]]), torch.tensor([0, 0])
        >>> fab(model, x, labels, Linf(0.25), verdict=True).success
        tensor([False,  True])
        >>> nearest = fab(model, x, labels, Linf(1.0), early_stop=False)
        >>> torch.allclose(x - nearest, torch.tensor([[0.375], [0.125]]), rtol=0.01)
        True
    """
    check_threat("fab", threat)
    as_ball("fab", threat)
    _check.count("fab", "steps", steps)
    _check.count("fab", "restarts", restarts)
    if target_classes is not None:
        _check.count("fab", "target_classes", target_classes)
    _check.number("fab", "alpha_max", alpha_max, at_least=0.0, at_most=1.0)
    _check.number("fab", "eta", eta, at_least=1.0)
    _check.number("fab", "beta", beta, at_least=0.0, at_most=1.0)
    terms = Terms(model_mode=model_mode, lane=lane, validate=validate)
    with opened("fab", model, x, labels, threat, terms) as victim:
        x, labels, eps = victim.x, victim.labels, budgets("fab", threat, x)
        numbers = _random.per_sample_generator("fab", generator, x)
        search = Search(threat.project(x, x), labels)
        if not x.numel():
            return search.result(verdict)
        everyone = torch.arange(len(x), device=x.device)
        clean_logits = victim.logits(search.x_adv)
        search.spend(everyone, forwards=1)
        search.judge(everyone, search.x_adv, clean_logits, 0)
        right, nearest = search.remaining(), torch.full_like(eps, torch.inf)
        targets = None if target_classes is None else likely_targets(clean_logits, labels, target_classes)
        settings = _Settings(steps, alpha_max, eta, beta, early_stop)
        for run in range((1 if targets is None else targets.shape[1]) * restarts):
            rank, restart = divmod(run, restarts)
            at = search.remaining() if early_stop else right
            if not len(at):
                break
            trip = _Trip(victim, search, x, labels, threat, eps, at, None if targets is None else targets[at, rank])
            if restart:
                drawn = numbers.take(at).fork(rank).fork(restart)
                trip.depart(drawn, torch.minimum(nearest[at], eps[at]) / 2)
            trip.go(nearest, settings, steps_before=run * steps)
    return search.result(verdict)


class _Settings(NamedTuple):
    steps: int
    alpha_max: float
    eta: float
    beta: float
    early_stop: bool


class _Trip:
    """One run from one start, for the samples `at` of the batch that are still travelling."""

    def __init__(
        self,
        victim: Victim,
        search: Search,
        x: Tensor,
        labels: Tensor,
        threat: Linf | L2 | L1,
        eps: Tensor,
        at: Tensor,
        targets: Tensor | None,
    ) -> None:
        self.victim, self.search, self.at, self.targets = victim, search, at, targets
        self.x, self.labels, self.eps = x[at], labels[at], eps[at]
        self.threat, self.shift, self.bounds = select(threat, at), _SHIFTS[type(threat)], threat.bounds
        self.center = self.x.to(wide(x))
        self.point = self.center
        self.order, self.dual_order = _ORDERS[type(threat)], _DUAL_ORDERS[type(threat)]
        self.gradients = self.forwards = 0  # passes that are not yet in the books, of each that is still travelling

    def depart(self, numbers: _random.SampleGenerator, reach: Tensor) -> None:
        """Start on the sphere of radius `reach` around the clean input, inside the box."""
        shape, dtype = tuple(self.x.shape), self.center.dtype
        if isinstance(self.threat, Linf):
            direction = 2 * numbers.uniform(shape, dtype=dtype) - 1
        else:
            direction = numbers.normal(shape, dtype=dtype)
        length = self.threat.norm(direction).clamp_min(torch.finfo(dtype).tiny)
        self.point = (self.center + per_sample(reach / length, direction) * direction).clamp(*self.bounds)  # type: ignore[arg-type]

    def go(self, nearest: Tensor, settings: _Settings, *, steps_before: int) -> None:
        """Take the steps; `nearest` keeps the distances of the points found so far."""
        for step in range(steps_before + 1, steps_before + settings.steps + 1):
            normal, gap = self._boundary()
            self.point = self._approach(normal, gap, settings)
            wrong, noted = self._judge(nearest, step)
            onward = torch.where(wrong, settings.beta, 1.0).to(self.point.dtype)
            self.point = torch.lerp(self.center, self.point, per_sample(onward, self.point))
            if settings.early_stop and noted:
                self._take(~self.search.success[self.at])
                if not len(self.at):
                    return
        self._spend()

    def _boundary(self) -> tuple[Tensor, Tensor]:
        """The nearest of the linearised boundaries at the current points: its normal `(B, N)` and how far to climb.

        A shift `d` reaches it where `normal @ d = gap`.
        """
        logits, pull_back = self.victim.linearized(self.point.to(self.x.dtype))
        self.forwards += 1
        if self.targets is not None:
            lead, normal = self._ahead(logits, pull_back, self.targets)
            return normal, -torch.where(lead.isfinite(), lead, 0.0)
        normal, gap = torch.zeros_like(rows(self.center)), torch.zeros_like(self.eps)
        shortest = torch.full_like(self.eps, torch.inf)
        for rival in range(classes := logits.shape[1]):
            rivals = torch.full_like(self.labels, rival)
            lead, grad = self._ahead(logits, pull_back, rivals, last=rival + 1 == classes)
            distance = lead.abs() / (_length(grad, self.dual_order) + 1e-12)
            nearer = (distance < shortest) & (self.labels != rival)
            normal, gap = torch.where(nearer[:, None], grad, normal), torch.where(nearer, -lead, gap)
            shortest = torch.where(nearer, distance, shortest)
        return normal, gap

    def _ahead(
        self, logits: Tensor, pull_back: Callable[..., Tensor], rivals: Tensor, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """How far the logits of `rivals` are ahead of the label's, and the gradient of that."""
        pair = torch.stack([rivals, self.labels], dim=1)
        ahead, behind = logits.gather(1, pair).to(self.center.dtype).unbind(dim=1)
        weights = torch.zeros_like(logits).scatter_(1, pair[:, :1], 1.0).scatter_(1, pair[:, 1:], -1.0)
        grad = pull_back(weights, last=last)
        self.gradients += 1
        return ahead - behind, rows(grad).to(self.center.dtype)

    def _approach(self, normal: Tensor, gap: Tensor, settings: _Settings) -> Tensor:
        """The next points: steps onto the boundary from here and from the clean input, mixed."""
        here, clean = rows(self.point), rows(self.center)
        both = torch.stack([here, clean])
        gaps = torch.stack([gap, gap + torch.linalg.vecdot(normal, here - clean)])
        shift = self.shift(both, normal, gaps, self.bounds)
        length, clean_length = _length(shift, self.order).clamp_min(1e-8)
        share = (length / (length + clean_length)).clamp_max(settings.alpha_max)
        arrived, clean_arrived = both.add_(shift, alpha=settings.eta)
        mixed = torch.lerp(arrived, clean_arrived, share[:, None])
        return mixed.clamp_(*self.bounds).reshape(self.point.shape)  # type: ignore[arg-type]

    def _judge(self, nearest: Tensor, step: int) -> tuple[Tensor, bool]:
        """Keep misclassified points that are inside and nearer than those before.

        Gives all that are misclassified, and whether there were points inside. Looking for some is all that waits for
        the device.
        """
        distance = _length(rows(self.point - self.center), self.order)
        inside = distance <= self.eps
        seen, some = self.point.to(self.x.dtype), bool(inside.any())
        if some:  # what is judged is what may be returned
            among = select(self.threat, inside)
            seen[inside] = among.project(self.point[inside], self.x[inside])
        wrong = misclassified(self.victim.guess(seen), self.labels)
        self.forwards += 1
        if some:
            better = wrong & inside & (distance < nearest[self.at])
            better = self.search.confirmed(self.victim, self.at, seen, better)
            self.search.record(self.at, seen, better, step)
            nearest[self.at] = torch.where(better, distance, nearest[self.at])
        return wrong, some

    def _spend(self) -> None:
        """Enter the passes into the books."""
        self.search.spend(self.at, gradients=self.gradients, forwards=self.forwards - self.gradients)
        self.gradients = self.forwards = 0

    def _take(self, kept: Tensor) -> None:
        """Go on with some of the samples."""
        if kept.all():
            return
        self._spend()
        kept = places(kept)
        self.x, self.center, self.point = self.x[kept], self.center[kept], self.point[kept]
        self.labels, self.eps, self.at = self.labels[kept], self.eps[kept], self.at[kept]
        self.targets = None if self.targets is None else self.targets[kept]
        self.threat = select(self.threat, kept)


def _length(value: Tensor, order: float) -> Tensor:
    """Norm of each row."""
    if order == 2:
        length: Tensor = torch.linalg.vector_norm(value, dim=-1)
        return length
    size = value.abs()
    return size.sum(dim=-1) if order == 1 else size.amax(dim=-1)
