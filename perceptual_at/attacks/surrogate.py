"""Surrogate gradients: an attack on networks of ReLUs whose own gradients lead nowhere."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from perceptual_at import _check, _random
from perceptual_at._rounding import wide
from perceptual_at._shapes import places
from perceptual_at.attacks.pgd import accelerated, visible
from perceptual_at.attacks.targets import likely_targets
from perceptual_at.attacks.verdict import Search, Verdict
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import Threat, ascent, budgets, check_threat, select
from perceptual_at.threats import start as start_of
from perceptual_at.victims import Lane, Model, ModelMode, Terms, Victim, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack

_UNTIL = 0.9  # share of the steps after which the gradients are the model's own
_LEAST = 1 / 150  # of the budget: the last step


class SurrogateOptions(TypedDict, total=False):
    """What `surrogate_pgd` can be given besides model, inputs, labels, threat and `verdict`."""

    steps: int
    target_classes: int
    restarts: int
    blend: float
    probes: int
    momentum: float
    model_mode: ModelMode
    lane: Lane | None
    validate: bool
    generator: _random.Generator | None


@overload
def surrogate_pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[False] = ...,
    **options: "Unpack[SurrogateOptions]",
) -> Tensor: ...
@overload
def surrogate_pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: Literal[True],
    **options: "Unpack[SurrogateOptions]",
) -> Verdict: ...
@overload
def surrogate_pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    verdict: bool,
    **options: "Unpack[SurrogateOptions]",
) -> Tensor | Verdict: ...
def surrogate_pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 200,
    target_classes: int = 9,
    restarts: int = 4,
    blend: float = 0.35,
    probes: int = 64,
    momentum: float = 0.75,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    verdict: bool = False,
    generator: _random.Generator | None = None,
) -> Tensor | Verdict:
    r"""Adversarial inputs by targeted PGD along surrogate gradients: for samples that resist because ReLUs are shut.

    A ReLU that is shut at a point hides from the gradient there what it would do when open, and small networks trained
    for certificates, or against one attack, have points around which most are. On the way back, each ReLU $j$ counts as

    $$ (1 - \lambda)\,[u_j > 0] + \lambda\, q_j, \qquad q_j = \Pr_{x' \in B(x)}\big(u_j(x') > 0\big), $$

    where the share $q_j$ is counted for each sample at random points of its ball, and $\lambda$ falls from `blend` to 0
    over nine tenths of the steps: at the end the gradients are the model's own. The way forward is always the model.
    Ascended is the difference between a wrong logit and the right one, for each of the likely classes in turn, with
    momentum and steps that fall from half the budget to nothing along a half cosine.

    Our own attack, made on twenty images of one network for which a verifier had proved that an adversarial input
    exists; see "How far from exact" for how many it breaks, and at which cost. On networks without such ReLUs, or where
    they cannot be seen (compiled and scripted models), it is a targeted PGD.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`; its ReLUs are found as it runs, as modules, functions and
            methods, also in place and as `clamp(min=0)`.
        x: clean inputs, shape `(B, ...)`, inside the bounds of the threat model.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat` and `eps`.
        steps: number of gradient steps of each run.
        target_classes: how many wrong classes to run towards, the most likely first; all where there are fewer.
        restarts: number of runs for each of them.
        blend: $\lambda$ of the first step, in [0, 1]; 0 follows the model's own gradients.
        probes: random points of each ball at which shares are counted; one forward pass each.
        momentum: decay of the sum of past gradients, each divided by its L1 norm.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: search on a copy of the model that costs less; see `Lane`. Every success is confirmed by the model itself.
        validate: check once that inputs are finite and inside the bounds, and labels in range.
        verdict: return a `Verdict`.
        generator: source of the random points, on the device of `x`: a `torch.Generator` for the batch, or a
            `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started from
            `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, detached; samples without success at the point of largest loss.
        With `verdict`, a `Verdict` with them.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels or numbers out
            of range, or the model returns no logits.

    Source:
        None; that a backward pass may be approximated where the true one misleads: Athalye et al. 2018, Sec. 4.1.

    Examples:
        >>> def model(x):  # class 1 when the unit opens, beyond 3/4: from 1/2 no gradient says so
        ...     return torch.cat([torch.full_like(x, 0.1), (x - 0.75).relu()], dim=1)
        >>> x, labels = torch.tensor([[0.5]]), torch.tensor([0])
        >>> pgd(model, x, labels, Linf(0.375), start="clean", verdict=True).success
        tensor([False])
        >>> surrogate_pgd(model, x, labels, Linf(0.375), steps=20, verdict=True).success
        tensor([True])
    """
    name = "surrogate_pgd"
    for what, value in (
        ("steps", steps), ("target_classes", target_classes), ("restarts", restarts), ("probes", probes),
    ):  # fmt: skip
        _check.count(name, what, value)
    _check.flag(name, verdict=verdict)
    _check.number(name, "blend", blend, at_least=0.0, at_most=1.0)
    _check.number(name, "momentum", momentum, at_least=0.0)
    check_threat(name, threat)
    terms = Terms(model_mode=model_mode, lane=lane, validate=validate)
    with opened(name, model, x, labels, threat, terms) as victim:
        budgets(name, threat, x)
        numbers = _random.per_sample_generator(name, generator, x)
        search = Search(victim.x, victim.labels)
        if not len(x):
            return search.result(verdict)
        clean_logits = search.begin(victim)
        gates = _Gates(victim.model)
        at = search.remaining()
        if len(at):
            gates.count(victim, victim.x[at], select(threat, at), numbers.take(at), probes)
            search.spend(at, forwards=probes)
        rivals = likely_targets(clean_logits, victim.labels, target_classes)
        for rank, restart in itertools.product(range(rivals.shape[1]), range(restarts)):
            if not len(at):
                break
            drawn = numbers.take(at).fork(1 + rank * restarts + restart)
            at = _run(victim, gates, search, at, rivals[at, rank], threat, drawn, steps, blend, momentum)
    return search.result(verdict)


def _run(
    victim: Victim,
    gates: "_Gates",
    search: Search,
    at: Tensor,
    rivals: Tensor,
    threat: Threat,
    numbers: _random.SampleGenerator,
    steps: int,
    blend: float,
    momentum: float,
) -> Tensor:
    """One climb of the samples `at` towards one class each; gives those that are left."""
    x, labels, threat = victim.x[at], victim.labels[at], select(threat, at)
    center = x.to(victim.width)
    size, point = budgets("surrogate_pgd", threat, center), start_of("surrogate_pgd", threat, center, numbers)
    velocity: Tensor | None = None
    asked = victim.asked(gates)
    for step in range(steps):
        gates.blend = blend * max(0.0, 1 - step / (_UNTIL * steps))
        seen = visible(point, x, threat)
        answer = asked.gradient(seen, labels, _ahead(rivals))
        search.spend(at, gradients=1)
        wrong = search.confirmed(victim, at, seen, search.wrong(at, answer.logits))
        search.offer(at, seen, answer.values, wrong, step)
        velocity = accelerated(answer.grad, velocity, momentum)
        if bool(wrong.any()):
            left = places(~wrong)
            at, x, labels, rivals, center, size, point, velocity = (
                one[left] for one in (at, x, labels, rivals, center, size, point, velocity)
            )
            threat = select(threat, left)
            gates.take(left)
            if not len(at):
                break
        share = (1 + math.cos(math.pi * step / steps)) / 4 + _LEAST
        point = ascent(threat, center, size * share).step(point, velocity)
    return at


def _ahead(rivals: Tensor) -> PerSampleLoss:
    """How far the logit of a class is ahead of the label's."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, rivals.long()[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    return loss


class _Gates(TorchFunctionMode):
    """A model whose ReLUs have other slopes on the way back; called like the model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.blend = model, 0.0
        self.open: list[Tensor] = []
        """Share of points at which each ReLU is open, of each sample; in the order in which the model runs them."""
        self.counting = False
        self.site = 0

    def __call__(self, x: Tensor) -> Any:
        """What the model gives."""
        self.site = 0
        if not (self.counting or self.blend):
            return self.model(x)
        with self:
            return self.model(x)

    def count(self, victim: Victim, x: Tensor, threat: Threat, numbers: _random.SampleGenerator, probes: int) -> None:
        """Run the model at random points and count; a unit never seen open, or shut, keeps half a chance of it."""
        self.counting, asked = True, victim.asked(self)
        center = x.to(victim.width)
        for probe in range(probes):
            point = start_of("surrogate_pgd", threat, center, numbers.fork(-1 - probe))
            asked.guess(visible(point, x, threat))
        self.counting = False
        self.open = [(share + 0.5) / (probes + 1) for share in self.open]

    def take(self, rows: Tensor) -> None:
        """Go on with some of the samples."""
        self.open = [share[rows] for share in self.open]

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _rectifies(func, args, kwargs):
            return func(*args, **kwargs)
        units, site = args[0] if args else kwargs["input"], self.site
        self.site += 1
        if self.counting:
            opened_here = (units.detach() > 0).to(wide(units))  # bfloat16 counts to 256
            if site == len(self.open):
                self.open.append(opened_here)
            elif self.open[site].shape == opened_here.shape:
                self.open[site] += opened_here
            return func(*args, **kwargs)
        if site >= len(self.open) or self.open[site].shape != units.shape:  # a model that runs differently each time
            return func(*args, **kwargs)
        rectified = _Rectified.apply(units, self.open[site], self.blend)
        return units.copy_(rectified) if func in _IN_PLACE or kwargs.get("inplace") else rectified


class _Rectified(torch.autograd.Function):
    """A ReLU with a slope between its own and the share of points at which it is open."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, share: Tensor, blend: float) -> Tensor:
        """The ReLU itself."""
        ctx.save_for_backward((units > 0).to(units.dtype).lerp(share.to(units.dtype), blend))
        return units.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The surrogate."""
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


_IN_PLACE = {torch.relu_, Tensor.relu_, Tensor.clamp_min_, Tensor.clamp_, torch.clamp_min_, torch.clamp_}
_RELUS = {functional.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_}
_CLAMPS = {
    torch.clamp, Tensor.clamp, Tensor.clamp_, torch.clamp_, torch.clamp_min, Tensor.clamp_min, Tensor.clamp_min_,
    torch.clamp_min_,
}  # fmt: skip


def _rectifies(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call is that of a ReLU."""
    if func in _RELUS:
        return True
    if func not in _CLAMPS:
        return False
    bounds = [*args[1:3], kwargs.get("min"), kwargs.get("max")]
    given = [bound for bound in bounds if bound is not None]
    low = args[1] if len(args) > 1 else kwargs.get("min")
    return len(given) == 1 and isinstance(low, int | float) and low == 0
