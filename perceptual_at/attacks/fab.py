"""FAB: the nearest misclassified point, by steps onto the linearised decision boundary."""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample, places, rows
from perceptual_at.attacks.targets import likely_targets
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.threats import L1, L2, Linf, Threat, as_ball, budgets, check_threat, select
from perceptual_at.threats.ball import Units
from perceptual_at.threats.entries import Entries, clamped, multipliable
from perceptual_at.threats.hyperplanes import SHIFTS
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, classified, misclassified, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ENDLESS = 1e15  # a slope that says no more than a direction


class FabOptions(TypedDict, total=False):
    """What `fab` can be given besides model, inputs, labels, threat and `verdict`."""

    steps: int
    restarts: int
    targets: Tensor | None
    target_classes: int | None
    clean_share: float
    overshoot: float
    backward_step: float
    early_stop: bool
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: _random.Generator | None


@overload
def fab(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[FabOptions]",
) -> Tensor: ...
@overload
def fab(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[True],
    **options: "Unpack[FabOptions]",
) -> Verdict: ...
@overload
def fab(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: bool,
    **options: "Unpack[FabOptions]",
) -> Tensor | Verdict: ...
def fab(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: Tensor | None = None,
    target_classes: int | None = None,
    clean_share: float = 0.1,
    overshoot: float = 1.05,
    backward_step: float = 0.9,
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

    $$ x_{t+1} = (1 - a) (x_t + o\, d_t) + a (x + o\, d), \qquad
    a = \min\Big( \frac{\|d_t\|_p}{\|d_t\|_p + \|d\|_p}, a_{\max} \Big) $$

    with $d_t$ and $d$ the shortest shifts of $x_t$ and $x$ onto it and $o$ the `overshoot`. A misclassified point is
    noted and the search goes on from $x + b (x_{t+1} - x)$, with $b$ the `backward_step`. Nothing here depends on the
    scale of the logits, and `eps` only decides which points count.

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
        targets: classes `(B,)` to be taken for: the boundary is that between the target and the best of the others, at
            one gradient per step, and success means being classified as the target.
        target_classes: None considers the boundaries to all classes in every step, at one gradient each. A number
            attacks so many of the likeliest wrong classes in turn, all there are if there are fewer, at one gradient
            per step.
        clean_share: largest share $a_{\max}$ of the clean input's step (alpha_max in the paper).
        overshoot: how far to step, 1 being onto the boundary (eta in the paper).
        backward_step: how far from `x` to go on once misclassified (beta in the paper).
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
    ball = as_ball("fab", threat)
    for name, value in (("steps", steps), ("restarts", restarts)):
        _check.count("fab", name, value)
    if target_classes is not None:
        _check.count("fab", "target_classes", target_classes)
        if targets is not None:
            raise ValueError("fab: `target_classes` has no effect with given `targets`; drop one of them.")
    _check.flag("fab", early_stop=early_stop, verdict=verdict)
    _check.number("fab", "clean_share", clean_share, at_least=0.0, at_most=1.0)
    _check.number("fab", "overshoot", overshoot, at_least=1.0)
    _check.number("fab", "backward_step", backward_step, at_least=0.0, at_most=1.0)
    terms = Terms(None, targets, "random", model_mode, lane, validate=validate)
    with opened("fab", model, x, labels, threat, terms) as victim:
        x, eps = victim.x, budgets("fab", threat, x)
        numbers = _random.per_sample_generator("fab", generator, x)
        judge = misclassified if targets is None else classified
        search = Search(threat.project(x, x), victim.labels, judge)
        if not x.numel():
            return search.result(verdict)
        clean_logits = search.begin(victim)
        right, nearest = search.remaining(), torch.full_like(eps, torch.inf)
        rivals: list[Tensor | None] = [victim.labels if targets is not None else None]
        if target_classes is not None:
            rivals = list(likely_targets(clean_logits, victim.labels, target_classes).unbind(dim=1))
        settings = _Settings(steps, clean_share, overshoot, backward_step, early_stop)
        for run, (rank, restart) in enumerate(itertools.product(range(len(rivals)), range(restarts))):
            at = search.remaining() if early_stop else right
            if not len(at):
                break
            rival = rivals[rank]
            trip = _Trip(victim, search, ball, eps, at, None if rival is None else rival[at])
            trip.aimed = targets is not None
            if restart:
                drawn = numbers.take(at).fork(rank).fork(restart)
                trip.depart(drawn, torch.minimum(nearest[at], eps[at]) / 2)
            trip.go(nearest, settings, steps_before=run * steps)
    return search.result(verdict)


class _Settings(NamedTuple):
    steps: int
    clean_share: float
    overshoot: float
    backward_step: float
    early_stop: bool


class _Trip:
    """One run from one start, for the samples `at` of the batch that are still travelling."""

    aimed = False
    """Whether the rivals are where to go, ahead of all others, and not only of the labels."""

    def __init__(
        self, victim: Victim, search: Search, threat: Linf | L2 | L1, eps: Tensor, at: Tensor, rivals: Tensor | None
    ) -> None:
        self.victim, self.search, self.at, self.rivals = victim, search, at, rivals
        self.x, self.labels, self.eps = victim.x[at], victim.labels[at], eps[at]
        self.center = self.x.to(wide(self.x))
        self.point = self.center
        self.gradients = self.forwards = 0  # passes that are not yet in the books, of each that is still travelling
        self._meet(select(threat, at))

    def _meet(self, threat: Threat) -> None:
        """Take the geometry of the threat for the samples that are still travelling."""
        self.threat = as_ball("fab", threat)
        self.space = _Space.of(self.threat, self.center)

    def depart(self, numbers: _random.SampleGenerator, reach: Tensor) -> None:
        """Start on the sphere of radius `reach` around the clean input, inside the box."""
        shape, dtype = tuple(self.x.shape), self.center.dtype
        cube = math.isinf(self.threat.p)
        direction = 2 * numbers.uniform(shape, dtype=dtype) - 1 if cube else numbers.normal(shape, dtype=dtype)
        direction = self.space.shortened(rows(direction)).reshape(shape)
        length = self.threat.norm(direction).clamp_min(torch.finfo(dtype).tiny)
        self.point = self.space.boxed(self.center + per_sample(reach / length, direction) * direction)

    def go(self, nearest: Tensor, settings: _Settings, *, steps_before: int) -> None:
        """Take the steps; `nearest` keeps the distances of the points found so far."""
        for step in range(steps_before + 1, steps_before + settings.steps + 1):
            normal, gap = self._boundary()
            self.point = self._approach(normal, gap, settings)
            wrong, noted = self._judge(nearest, step)
            onward = torch.where(wrong, settings.backward_step, 1.0).to(self.point.dtype)
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
        if self.rivals is not None:
            behind = _best_but(logits, self.rivals) if self.aimed else self.labels
            lead, normal = self._ahead(logits, pull_back, self.rivals, behind)
            return self._reachable(normal, -torch.where(lead.isfinite(), lead, 0.0))
        normal, gap = torch.zeros_like(rows(self.center)), torch.zeros_like(self.eps)
        shortest = torch.full_like(self.eps, torch.inf)
        for rival in range(classes := logits.shape[1]):
            rivals = torch.full_like(self.labels, rival)
            lead, grad = self._ahead(logits, pull_back, rivals, self.labels, last=rival + 1 == classes)
            distance = lead.abs() / (_length(self.space.shortened(grad), self.threat.dual) + 1e-12)
            nearer = (distance < shortest) & (self.labels != rival)
            normal, gap = torch.where(nearer[:, None], grad, normal), torch.where(nearer, -lead, gap)
            shortest = torch.where(nearer, distance, shortest)
        return self._reachable(normal, gap)

    def _ahead(
        self, logits: Tensor, pull_back: Callable[..., Tensor], rivals: Tensor, behind: Tensor, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """How far the logits of `rivals` are ahead of those of the classes `behind`, and the gradient of that."""
        pair = torch.stack([rivals, behind], dim=1)
        theirs, others = logits.gather(1, pair).to(self.center.dtype).unbind(dim=1)
        weights = torch.zeros_like(logits).scatter_(1, pair[:, :1], 1.0).scatter_(1, pair[:, 1:], -1.0)
        grad = pull_back(weights, last=last)
        self.gradients += 1
        return theirs - others, rows(grad).to(self.center.dtype)

    def _reachable(self, normal: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """The boundary; where the slope is infinite, one a tenth of the budget away in its direction.

        Taken at its word, an infinite slope puts the boundary at no distance, and nothing would move.
        """
        if normal.device.type == "cpu" and not bool(normal.abs().amax() >= _ENDLESS):  # looking is free
            return normal, gap
        endless, here = normal.abs() >= _ENDLESS, rows(self.point)
        up = normal.sign() * gap.sign()[:, None] > 0
        movable = torch.where(up, here < self.space.high, here > self.space.low)  # others are at the edge already
        normal, endless = normal.masked_fill(endless & ~movable, 0.0), endless & movable
        rises = endless.any(dim=1)
        direction = normal.sign() * endless
        far = gap.sign() * self.eps / 10 * _length(self.space.shortened(direction), self.threat.dual)
        return torch.where(rises[:, None], direction, normal), torch.where(rises, far, gap)

    def _approach(self, normal: Tensor, gap: Tensor, settings: _Settings) -> Tensor:
        """The next points: steps onto the boundary from here and from the clean input, mixed."""
        here, clean = rows(self.point), rows(self.center)
        both = torch.stack([here, clean])
        gaps = torch.stack([gap, gap + _dot(normal, here - clean)])
        shift = self.space.shift(both, normal, gaps)
        length, clean_length = _length(shift, self.threat.p).clamp_min(1e-8)
        share = (length / (length + clean_length)).clamp_max(settings.clean_share)
        arrived, clean_arrived = both.add_(self.space.shortened(shift), alpha=settings.overshoot)
        mixed = torch.lerp(arrived, clean_arrived, share[:, None])
        return self.space.boxed(mixed.reshape(self.point.shape))

    def _judge(self, nearest: Tensor, step: int) -> tuple[Tensor, bool]:
        """Keep misclassified points that are inside and nearer than those before.

        Gives all that are misclassified, and whether there were points inside. Looking for some is all that waits for
        the device.
        """
        distance = _length(self.space.stretched(rows(self.point - self.center)), self.threat.p)
        inside = distance <= self.eps
        seen, some = self.point.to(self.x.dtype), bool(inside.any())
        if some:  # what is judged is what may be returned
            among = select(self.threat, inside)
            seen[inside] = among.project(self.point[inside], self.x[inside])
        wrong = self.search.wrong(self.at, self.victim.guess(seen))
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
        self.rivals = None if self.rivals is None else self.rivals[kept]
        self._meet(select(self.threat, kept))


class _Space(NamedTuple):
    """The box and the units of a threat, in which FAB measures; rows `(B, N)` where they are tensors."""

    low: Entries
    high: Entries
    order: float
    units: Units | None

    @classmethod
    def of(cls, threat: Linf | L2 | L1, center: Tensor) -> "_Space":
        """That of a threat around some samples."""
        low, high = threat.box(center)
        if isinstance(low, Tensor):
            low, high = (rows(torch.as_tensor(bound, device=center.device).expand_as(center)) for bound in (low, high))
        units = threat.units(center)
        if units is not None:
            units = Units(*(rows(part.to(center.dtype).expand_as(center)) for part in units))
        return cls(low, high, threat.p, units)

    def shift(self, points: Tensor, normal: Tensor, gaps: Tensor) -> Tensor:
        """The shortest shifts onto hyperplanes, in units of the largest `eps`."""
        low, high = self.low, self.high
        if self.units is not None:
            low, high = (multipliable(bound, points) * self.units.scale for bound in (low, high))
        bounds = low, high
        return SHIFTS[self.order](self.stretched(points), self.shortened(normal), gaps, bounds)

    def stretched(self, way: Tensor) -> Tensor:
        """A way in units of the largest `eps`."""
        return way if self.units is None else way * self.units.scale

    def shortened(self, way: Tensor) -> Tensor:
        """A way in such units as it is in the space of the inputs; and so for slopes, the other way round."""
        return way if self.units is None else way * self.units.weight

    def boxed(self, points: Tensor) -> Tensor:
        """The points, clipped to the box."""
        return clamped(rows(points), self.low, self.high).reshape(points.shape)


def _best_but(logits: Tensor, classes: Tensor) -> Tensor:
    """The class of the largest logit apart from one."""
    return logits.scatter(1, classes[:, None], -torch.inf).argmax(dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows; autocast would have them in half precision."""
    if torch.is_autocast_enabled(a.device.type):
        return (a * b).sum(dim=-1)
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _length(value: Tensor, order: float) -> Tensor:
    """Norm of each row."""
    if order == 2:
        length: Tensor = torch.linalg.vector_norm(value, dim=-1)
        return length
    size = value.abs()
    return size.sum(dim=-1) if order == 1 else size.amax(dim=-1)
