"""Square: random search over squares of pixels, which asks for no gradient."""

import functools
import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._rounding import HOST, cast_toward
from perceptual_at._shapes import per_sample, places
from perceptual_at.attacks.targets import ascended, loss_of, margin
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import L1, L2, Linf, Threat, around, as_ball, budgets, check_threat, select
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, classified, misclassified, opened, undefined

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12
_CHUNK = 100  # proposals whose random numbers are drawn together


class SquareOptions(TypedDict, total=False):
    """What `square` can be given besides model, inputs, labels, threat and `verdict`."""

    queries: int
    p_init: float
    restarts: int
    loss: PerSampleLoss
    targets: Tensor | None
    reach_edge: bool
    early_stop: bool
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: _random.Generator | None


@overload
def square(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[SquareOptions]",
) -> Tensor: ...
@overload
def square(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: Literal[True],
    **options: "Unpack[SquareOptions]",
) -> Verdict: ...
@overload
def square(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    verdict: bool,
    **options: "Unpack[SquareOptions]",
) -> Tensor | Verdict: ...
def square(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Linf | L2 | L1,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    loss: PerSampleLoss = margin,
    targets: Tensor | None = None,
    reach_edge: bool = True,
    early_stop: bool = True,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: _random.Generator | None = None,
) -> Tensor | Verdict:
    r"""Adversarial images by random search: squares are proposed one after the other and kept if the loss grows.

    The search starts from vertical stripes at the edge of the ball (`Linf`) or from a grid of pyramids (`L2`, `L1`).
    Proposal $i$ is a square of side $s$ at a random place, which covers a share $p_i$ of the image, so
    $s = \mathrm{round}(\sqrt{p_i h w})$; $p_i$ starts at `p_init` and is halved after 10, 50, 200, 500, 1000, 2000,
    4000, 6000 and 8000 proposals. In `Linf` the square takes one sign of $\pm\epsilon$ per channel. In `L2` and `L1`
    it takes a pyramid on top of what it has, paid for by a second square that is emptied and by unspent budget.

    The model is only asked for logits, so it need not be differentiable. Every sample has squares of its own.

    Args:
        model: maps inputs `(B, C, H, W)` to logits `(B, K)`.
        x: clean images inside the bounds, any floating dtype. For other data add dimensions: `(B, N)` as
            `(B, 1, 1, N)` proposes one entry at a time.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2` or `L1`.
        queries: number of proposals per restart, at one forward pass each.
        p_init: share of the image that the first squares cover.
        restarts: number of runs, each from new stripes or pyramids.
        loss: per-sample function `(logits, labels) -> (B,)` to ascend.
        targets: classes `(B,)` to be taken for; the attack then descends the loss towards them (of DLR it ascends the
            targeted form), and success means being classified as the target.
        reach_edge: squares lie anywhere in the image, as in the paper. Those of the released code never touch the last
            row and column, which matters for small images.
        early_stop: let a sample go at its first success. Without, all queries are used, and among misclassified
            points the one of largest loss is returned.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: search on a copy of the model that costs less; see `Lane`. Every success is confirmed by the model itself.
        validate: check once that inputs are finite and inside the bounds, and labels in range.
        verdict: return a `Verdict`; its steps count forward passes after the clean one.
        generator: source of the random numbers, on the device of `x`; a `SampleGenerator` for numbers of each sample's
            own.

    Returns:
        The points found, misclassified or else of largest loss; shape and dtype of `x`, detached, inside ball and box
        exactly. With `verdict=True` a `Verdict`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the threat none of the three.
        ValueError: if `x` are no images, shapes or devices differ, inputs are outside the bounds or not finite,
            labels or numbers out of range, or the model returns no logits.

    Source:
        Andriushchenko et al. 2020 (Square Attack), Algorithms 1 to 3; Croce and Hein 2021 ("Mind the box") for L1;
        settings of AutoAttack.

    Examples:
        >>> model = lambda x: torch.stack([x.mean(dim=(1, 2, 3)), x.new_full((len(x),), 0.375)], dim=1)
        >>> x, labels = torch.tensor([0.75, 0.5]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4), torch.tensor([0, 0])
        >>> square(model, x, labels, Linf(0.25), queries=100, verdict=True).success
        tensor([False,  True])
        >>> square(model, x, labels, Linf(0.25), queries=100, early_stop=False).amax(dim=(1, 2, 3))  # all the way
        tensor([0.5000, 0.2500])
    """
    check_threat("square", threat)
    ball = as_ball("square", threat)
    _check.floating("square", x=x)
    if x.ndim != 4:
        raise ValueError(
            f"square: `x` must be images of shape (B, C, H, W), got {x.ndim} dimensions; give vectors (B, N) as "
            "(B, 1, 1, N), with a model that takes them so."
        )
    _check.flag("square", reach_edge=reach_edge, early_stop=early_stop, verdict=verdict)
    _check.count("square", "queries", queries)
    _check.number("square", "p_init", p_init, above=0.0, at_most=1.0)
    _check.count("square", "restarts", restarts)
    objective = ascended("square", loss, labels, targets)
    terms = Terms(loss, targets, "random", model_mode, lane, validate=validate)
    with opened("square", model, x, labels, threat, terms) as victim, torch.no_grad():
        x, labels = victim.x, victim.labels
        budgets("square", threat, x)  # said before the first pass
        numbers = _random.per_sample_generator("square", generator, x)
        search = Search(threat.project(x, x), labels, misclassified if targets is None else classified)
        if not x.numel():
            return search.result(verdict)
        everyone = torch.arange(len(x), device=x.device)
        held, guessed = victim.value(search.x_adv, labels, objective)  # loss of each point in `search`
        held, clean_logits = _defined(held), victim.logits(search.x_adv) if victim.confirms else guessed
        search.spend(everyone, forwards=1)
        search.judge(everyone, search.x_adv, clean_logits, 0)
        search.values, right = held, search.remaining()
        plan = _Plan(queries, p_init, reach_edge, early_stop)
        for restart in range(restarts):
            at = search.remaining() if early_stop else right
            if not len(at):
                break
            drawn = numbers.take(at).fork(restart)
            _Hunt(victim, search, ball, loss_of(objective, at), at, drawn).go(plan, restart * (queries + 1))
    return search.result(verdict)


class _Plan(NamedTuple):
    queries: int
    p_init: float
    reach_edge: bool
    early_stop: bool


def _defined(value: Tensor) -> Tensor:
    """An undefined loss is below all others."""
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


class _Hunt:
    """One run of random search, for the samples `at` of the batch that are still in play."""

    def __init__(
        self,
        victim: Victim,
        search: Search,
        threat: Linf | L2 | L1,
        loss: PerSampleLoss,
        at: Tensor,
        numbers: _random.SampleGenerator,
    ) -> None:
        assert search.values is not None
        self.victim, self.search, self.held, self.at = victim, search, search.values, at
        self.loss, self.numbers = loss, numbers
        self.x, self.labels = victim.x[at], victim.labels[at]
        self.point = self.x.clone()
        self.values = torch.full_like(self.held[at], -math.inf)
        self.won, self.some_won = torch.zeros_like(at, dtype=torch.bool), False
        self.forwards = 0  # passes that are not yet in the books, of each sample in play
        self.unknown = torch.zeros_like(self.won)  # the model has given NaN, which is not yet in the books either
        self.order = threat.p
        self._meet(select(threat, at))
        if math.isinf(self.order):  # the smallest allowed images and the largest, one behind the other in each channel
            ends = [cast_toward(end.expand_as(self.x), self.x).flatten(2) for end in self.threat.limits(self.x)]
            self.edges = torch.cat(ends, dim=2)
        self.squares = _Squares(self.x, self.numbers)

    def _meet(self, threat: Threat) -> None:
        """Take the geometry of the threat for the samples that are still in play."""
        self.threat = as_ball("square", threat)
        self.eps, self.units = budgets("square", threat, self.x), self.threat.units(self.x)
        if not math.isinf(self.order):  # whose points are made of the corners, so that none is outside
            self.project = around(threat, self.x)

    def go(self, plan: _Plan, steps_before: int) -> None:
        """Judge the start, then one proposal per query."""
        self._judge(self._start(), steps_before + 1)
        for query in range(plan.queries):
            if plan.early_stop and self.some_won:
                self._take(~self.won)
            if not len(self.at):
                return
            side = _side(self.order, plan.p_init, query, *self.x.shape[2:])
            self.squares.draw(query, side, plan.reach_edge)
            self._judge(self._proposal(query), steps_before + query + 2)
        self._spend()
        better = self.values > self.held[self.at]
        self.search.settle(self.at, self.point, better)
        self.held[self.at] = torch.where(better & ~self.search.success[self.at], self.values, self.held[self.at])

    def _start(self) -> Tensor:
        """Stripes or a grid of pyramids, with random signs."""
        numbers = self.numbers.fork(0)
        samples, channels, height, width = self.x.shape
        if math.isinf(self.order):
            stripes = numbers.signs((samples, channels, 1, width))
            low, high = (end.reshape(self.x.shape) for end in self.edges.chunk(2, dim=2))
            return torch.where(stripes > 0, high, low)
        side, first, down, across = _grid(height, width)
        turned = numbers.fork(1).integers((samples, down * across), below=2)
        signs = numbers.signs((samples, channels, down * across, 1, 1))
        tiles = signs * self._pyramids(side)[turned][:, None]
        tiles = tiles.reshape(samples, channels, down, across, side, side)
        delta = torch.zeros_like(self.x, dtype=self.eps.dtype)
        covered = slice(first, first + down * side), slice(first, first + across * side)
        delta[:, :, covered[0], covered[1]] = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return self._allowed(delta)

    def _proposal(self, query: int) -> Tensor:
        """The current points with another square."""
        first, signs = self.squares.places(query, 0), self.squares.signs(query)
        places = first[:, None].expand(-1, self.x.shape[1], -1)
        if math.isinf(self.order):
            changed = self.edges.gather(2, places + self.edges.shape[2] // 2 * (signs > 0))
            return self.point.flatten(2).scatter(2, places, changed).reshape(self.x.shape)
        second = self.squares.places(query, 1)[:, None].expand_as(places)
        pattern = signs * self._pyramids(self.squares.side).flatten(1)[self.squares.turned(query)][:, None]
        return self._moved(places, second, pattern)

    def _moved(self, first: Tensor, second: Tensor, pattern: Tensor) -> Tensor:
        """The current points with a pyramid added in the first square, and the second one emptied."""
        order, channels = int(self.order), self.x.shape[1]
        delta = self.point.to(self.eps.dtype) - self.x
        delta = (delta if self.units is None else delta * self.units.scale.to(delta.dtype)).flatten(2)
        size = per_sample(torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1), delta)
        old = delta.gather(2, first)
        delta.scatter_(2, first, 0.0)
        freed = (old.abs() ** order).sum(dim=2, keepdim=True)
        freed = freed + (delta.gather(2, second).abs() ** order).sum(dim=2, keepdim=True)
        unspent = (per_sample(self.eps, delta) ** order - size**order).clamp_min(0) / channels
        new = pattern + old / (_length(old, order) + _TINY)
        new = new / (_length(new, order) + _TINY)
        new = new * ((unspent + freed).sqrt() if order == 2 else (unspent + freed) * channels)
        delta.scatter_(2, second, 0.0).scatter_(2, first, new)
        return self._allowed(delta.reshape(self.x.shape))

    def _allowed(self, delta: Tensor) -> Tensor:
        """Where a perturbation leads; in L2 it is scaled to the whole budget first."""
        if self.order == 2:
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
            within = self.eps * (1 - 16 * torch.finfo(length.dtype).eps)  # rounding shall not lead outside
            delta = delta * per_sample(within / (length + _TINY), delta)
        if self.units is not None:  # so far all was in units of the largest `eps`
            delta = delta * self.units.weight.to(delta.dtype)
        return self.project(self.x + delta)

    def _pyramids(self, side: int) -> Tensor:
        return _pyramids(side, int(self.order), self.eps.dtype, self.eps.device)

    def _judge(self, points: Tensor, step: int) -> None:
        """Keep points of larger loss, and the first that is misclassified."""
        values, logits = self.victim.value(points, self.labels, self.loss)
        self.forwards += 1
        unknown = undefined(logits)
        self.unknown |= unknown
        values, wrong = _defined(values), self.search.judged(logits, self.labels, unknown)
        fell = bool(wrong.any())  # the one place that waits for the device
        if not (fell or self.some_won):
            self._move(points, values, values > self.values)
            return
        wrong = self.search.confirmed(self.victim, self.at, points, wrong)
        better = torch.where(self.won, wrong & (values > self.values), wrong | (values > self.values))
        self._move(points, values, better)
        self.won, self.some_won = self.won | wrong, True
        found = better & wrong & (~self.search.success[self.at] | (values > self.held[self.at]))
        if fell:
            self.search.record(self.at, points, found, step)
            self.held[self.at] = torch.where(found, values, self.held[self.at])

    def _move(self, points: Tensor, values: Tensor, better: Tensor) -> None:
        """Go on from the points that are better."""
        self.point.lerp_(points, per_sample(better, points).to(points.dtype))  # exact for shares of 0 and 1
        self.values = torch.where(better, values, self.values)

    def _spend(self) -> None:
        """Enter the passes into the books, and for whom the model gave NaN."""
        self.search.spend(self.at, forwards=self.forwards)
        self.search.undefined[self.at] |= self.unknown
        self.forwards = 0

    def _take(self, kept: Tensor) -> None:
        """Go on with some of the samples."""
        self._spend()
        kept = places(kept)
        self.x, self.point, self.labels = self.x[kept], self.point[kept], self.labels[kept]
        self.values, self.won, self.some_won, self.at = self.values[kept], self.won[kept], False, self.at[kept]
        self.unknown = self.unknown[kept]
        self.loss = loss_of(self.loss, kept)
        self.squares.take(kept)
        if math.isinf(self.order):
            self.edges = self.edges[kept]
        self._meet(select(self.threat, kept))


class _Squares:
    """Random squares of each sample: where they lie, their signs, and which way pyramids are turned.

    Numbers are drawn for many queries at a time, and so are the places that follow from them.
    """

    def __init__(self, x: Tensor, numbers: _random.SampleGenerator) -> None:
        self.channels, self.height, self.width = x.shape[1:]
        self.numbers, self.side, self.chunk = numbers, 0, -1
        self.drawn = self.corners = self.all_signs = numbers.index
        self.within = numbers.index

    def draw(self, query: int, side: int, reach_edge: bool) -> None:
        """Have the numbers of a query at hand."""
        chunk = query // _CHUNK
        if chunk == self.chunk and side == self.side:
            return
        if chunk != self.chunk:
            shape = (len(self.numbers), _CHUNK, 5 + self.channels)
            self.drawn, self.chunk = self.numbers.fork(1 + chunk).integers(shape, below=2**31), chunk
            self.all_signs = (self.drawn[..., 5:] & 1) * 2 - 1
        if side != self.side:
            steps, self.side = torch.arange(side, device=self.drawn.device), side
            self.within = (steps[:, None] * self.width + steps).flatten()
        down = self.drawn[..., 0:4:2] % max(1, self.height - side + reach_edge)
        across = self.drawn[..., 1:4:2] % max(1, self.width - side + reach_edge)
        self.corners = down * self.width + across

    def places(self, query: int, which: int) -> Tensor:
        """Where the pixels of the first or second square lie in flattened images, `(B, side * side)`."""
        return self.corners[:, query % _CHUNK, which, None] + self.within

    def signs(self, query: int) -> Tensor:
        """1 or -1 for each channel, `(B, C, 1)`."""
        return self.all_signs[:, query % _CHUNK, :, None]

    def turned(self, query: int) -> Tensor:
        """0 or 1, `(B,)`."""
        return self.drawn[:, query % _CHUNK, 4] & 1

    def take(self, kept: Tensor) -> None:
        """Go on with some of the samples."""
        self.numbers, self.drawn = self.numbers.take(kept), self.drawn[kept]
        self.corners, self.all_signs = self.corners[kept], self.all_signs[kept]


def _side(order: float, p_init: float, query: int, height: int, width: int) -> int:
    """Side of the square of a proposal; odd for pyramids, so that they have a middle."""
    share = p_init / 2 ** sum(query > after for after in _HALVINGS)
    side = round(math.sqrt(share * height * width))
    side = max(side, 1) if math.isinf(order) else max(side, 3) | 1
    return min(side, height, width)


def _grid(height: int, width: int) -> tuple[int, int, int, int]:
    """Five tiles along the shorter side: their side, where the first begins, how many fit down and across."""
    shorter = min(height, width)
    side = max(shorter // 5, 1)
    first = max(shorter - 5 * side, 0) // 2
    return side, first, (height - first) // side, (width - first) // side


@functools.lru_cache(maxsize=64)
def _pyramids(side: int, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A positive and a negative pyramid side by side, of unit length, and the same turned; `(2, side, side)`."""
    both = torch.cat([_pyramid(side // 2, side, order), -_pyramid(side - side // 2, side, order)])
    both = both / _length(both, order, dim=(0, 1))
    return torch.stack([both, both.T]).to(device, dtype)


def _pyramid(height: int, width: int, order: int) -> Tensor:
    """Sum of nested squares around the middle, the k-th with weight `1 / k^2` (`1 / k^4` in L1), of unit length."""
    down, across = (torch.arange(size, device=HOST) - size // 2 for size in (height, width))
    ring = torch.maximum(down.abs()[:, None], across.abs())
    weights = torch.arange(1, 2 + max(height // 2, width // 2), dtype=torch.float64, device=HOST) ** (-4.0 / order)
    total = weights.flip(0).cumsum(dim=0).flip(0)[ring]
    return total / _length(total, order, dim=(0, 1))


def _length(value: Tensor, order: int, dim: int | tuple[int, ...] = 2) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(value, ord=order, dim=dim, keepdim=True)
    return length
