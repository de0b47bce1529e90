"""Attacks that only training uses: one noisy step, steps that stop at the boundary, distances to the boundary."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from perceptual_at import _check, _random
from perceptual_at._random import Generator, SampleGenerator
from perceptual_at._rounding import wide
from perceptual_at._shapes import lacks_variance, per_sample
from perceptual_at.attacks.pgd import REACH, Climb, climbed
from perceptual_at.attacks.targets import ascended
from perceptual_at.divergences import PerSampleLoss, cross_entropy, soft_logit_margin
from perceptual_at.threats import Threat, budget, check_threat, projected
from perceptual_at.threats import start as start_of
from perceptual_at.threats.entries import Bounds, box_over, checked_bounds, clamped
from perceptual_at.victims import Lane, Model, ModelMode, Terms, check_arguments, check_lane, lent


def n_fgsm(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    noise: float = 2.0,
    loss: PerSampleLoss = cross_entropy,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    generator: Generator | None = None,
) -> Tensor:
    r"""Inputs for single-step training: noise beyond the ball, then one full step, and no way back into the ball.

    $$ \tilde x = \Pi_{\mathrm{box}}\big( x_\eta + \epsilon\, \mathrm{steepest}(\nabla_{x_\eta} \ell) \big), \qquad
       x_\eta = \Pi_{\mathrm{box}}(x + \eta), \quad \eta \text{ uniform within } 2 \epsilon $$

    The result is meant for training and **lies outside the threat model**: up to `1 + noise` budgets from `x`, inside
    the box. Do not evaluate with it. The step is one budget, not the 1.25 of FGSM from a random start, which is
    `pgd(..., steps=1, step_size=1.25 * eps)`.

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`; one forward and one input-gradient pass.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: the threat model one trains for; the noise is its `random_start`, scaled.
        noise: size of the noise in budgets; 2, and 3 on SVHN at 12/255.
        loss: per-sample function `(logits, labels) -> (B,)`.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands. The released code attacks in train mode:
            `"as_is"`.
        lane: run the steps on a copy of the model that costs less, for example `Lane(dtype=torch.bfloat16)`; see
            `Lane`.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the device
            once; skipped while compiling or capturing.
        generator: source of the noise, on the device of `x`: a `torch.Generator` for the batch, or a `SampleGenerator`
            with numbers of each sample's own. None uses a stream of the library's own, started from
            `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Inputs to train on, shape and dtype of `x`, detached.

    Raises:
        TypeError: if an argument is of the wrong kind (float class indices, integer inputs, no threat model, ...).
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or `noise` is not positive.

    Source:
        de Jorge et al. 2022, Algorithm 1, and its released code.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)
        >>> x_adv = n_fgsm(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.125))
        >>> bool(((x_adv >= 0.5 - 3 * 0.125) & (x_adv <= 0.5 + 0.125)).all())  # noise of 2, a step down of 1
        True
    """
    _check.floating("n_fgsm", x=x)
    _check.number("n_fgsm", "noise", noise, above=0.0)
    check_threat("n_fgsm", threat)
    _random.check("n_fgsm", generator, x)
    noisy = threat.scaled(noise)
    if isinstance(generator, SampleGenerator) and not getattr(noisy, "draws_per_sample", False):
        start = start_of("n_fgsm", noisy, x.detach(), generator)
    else:
        start = noisy.random_start(x.detach(), generator=generator)
    terms = Terms(loss, None, start, model_mode, lane, validate=validate, judged=False, even=True)
    climb = Climb(steps=1, step_size=budget("n_fgsm", threat))
    return cast("Tensor", climbed("n_fgsm", model, x, labels, threat.scaled(noise + 1), terms, climb))


def friendly_pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    patience: int | Tensor = 0,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    noise: float = 0.0,
    loss: PerSampleLoss = cross_entropy,
    start: Literal["random", "clean"] | Tensor = "random",
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    generator: Generator | None = None,
) -> Tensor:
    r"""Adversarial inputs that are wrong, but not more so than needed: FAT's early-stopped PGD.

    Steps are those of `pgd`. Before each, a sample that is misclassified stops where it is for good, unless it has
    patience left; then it spends one and goes on. What never becomes wrong goes all the way, and the last iterate is
    not looked at. A random start that is wrong already is returned as it is if the patience is 0.

    The batch keeps its order and nothing waits for the device, so stopped samples still go through the model: K
    forward and K input-gradient passes, as `pgd`. (The released code drops them from the batch, and returns it
    reordered.)

    Args:
        model: maps inputs `(B, ...)` to logits `(B, K)`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat`.
        patience: how many steps a sample goes on after it became wrong, called tau in the paper; one number or
            integers `(B,)`. It grows over training: 0, 1, 2 after epochs 50 and 90 of 120.
        steps: number of gradient steps at most.
        step_size: length s of a step in input units, one number or one per sample `(B,)`; None means
            `2.5 * eps / steps`, 2/255 for ten steps at 8/255.
        noise: standard deviation of Gaussian noise added after each step, before a projection; 0.001 in FAT on PGD-AT.
        loss: per-sample function `(logits, labels) -> (B,)`.
        start: `"random"` (the threat's `random_start`), `"clean"`, or a tensor to start from, which is projected first.
        model_mode: `"eval"`, or `"as_is"` to attack the model as it stands.
        lane: run the steps on a copy of the model that costs less, for example `Lane(dtype=torch.bfloat16)`; see
            `Lane`. Who is wrong is then the lane's opinion.
        validate: check once that inputs are finite and inside the bounds, and labels in range. Waits for the device
            once; skipped while compiling or capturing.
        generator: source of the random start and of the noise, on the device of `x`: a `torch.Generator` for the batch,
            or a `SampleGenerator` with numbers of each sample's own. None uses a stream of the library's own, started
            from `torch.initial_seed()` once per process and seed; pass a generator to repeat a call.

    Returns:
        Adversarial inputs, shape and dtype of `x`, in its order, detached.

    Raises:
        TypeError: if an argument is of the wrong kind, `patience` is no integer or `labels` no class indices.
        ValueError: if shapes or devices differ, inputs are outside the bounds or not finite, labels out of range,
            numbers out of range, the model returns no logits, or `patience` or `noise` is negative.

    Source:
        Zhang et al. 2020 (FAT), Algorithm 1, and its released code.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.5], [0.875]]), torch.tensor([0, 0])
        >>> attack = functools.partial(friendly_pgd, threat=Linf(0.5), steps=4, step_size=0.125, start="clean")
        >>> attack(model, x, labels)  # the first crosses with its third step
        tensor([[0.1250],
                [0.3750]])
        >>> attack(model, x, labels, patience=1)[0] < 0.125
        tensor([True])
    """
    name = "friendly_pgd"
    check_arguments(name, model, x, labels, threat, Terms(loss, None, start, model_mode, validate=validate))
    check_lane(name, model, model_mode, lane)
    ascended(name, loss, labels, None)
    _check.count(name, "steps", steps)
    _check.number(name, "noise", noise, at_least=0.0)
    _random.check(name, generator, x)
    left = _patience(name, patience, x)
    center = x.detach()
    if isinstance(start, Tensor):
        point = projected(threat, start.detach(), center)
    else:
        point = start_of(name, threat, center, generator) if start == "random" else center
    if not len(x):
        return point
    if step_size is None:
        step_size = REACH * budget(name, threat) / steps
    wrong: list[Tensor] = []

    def watched(logits: Tensor, aims: Tensor) -> Tensor:
        wrong.append(logits.detach().argmax(dim=1) != aims)
        return loss(logits, aims.clone())  # which it may write to

    stopped = torch.zeros_like(labels, dtype=torch.bool)
    with lent(name, model, model_mode=model_mode, lane=lane) as f:
        for step in range(steps):
            terms = Terms(watched, None, point, model_mode, validate=validate and step == 0, judged=False)
            moved = cast("Tensor", climbed(name, f, x, labels, threat, terms, Climb(1, step_size)))
            stopped = stopped | (wrong[-1] & (left == 0))
            left = left - (wrong[-1] & ~stopped).to(left.dtype)
            if noise:
                draws = _random.draws(name, _numbers(generator, step + 1), x)
                shaken = moved.to(wide(x)) + noise * draws.normal(tuple(x.shape), dtype=wide(x))
                moved = projected(threat, shaken, center)
            point = torch.where(per_sample(stopped, x), point, moved)
    return point


def _patience(function: str, patience: int | Tensor, x: Tensor) -> Tensor:
    """Steps that each sample may still go on, `(B,)`."""
    if not isinstance(patience, Tensor) or not patience.ndim:
        _check.count(function, "patience", patience, at_least=0)
        return torch.full((x.shape[0],), int(patience), device=x.device)
    _check.labels(function, patience, name="patience", x=x)
    return patience.long()


def _numbers(generator: Generator | None, purpose: int) -> Generator | None:
    """Numbers for each step, from 1; those of a sample have no state and are told apart by purpose."""
    return generator.fork(purpose) if isinstance(generator, SampleGenerator) else generator


class Margins(NamedTuple):
    """Points at the decision boundary, and how far they are; by sample.

    Examples:
        >>> found = Margins(torch.zeros(2, 3), torch.tensor([0.1, 0.0]), torch.tensor([True, False]))
        >>> found.margins[found.right]
        tensor([0.1000])
        >>> found.x_adv.shape
        torch.Size([2, 3])
    """

    x_adv: Tensor
    """The boundary points of samples that are right; the clean inputs of the others."""
    margins: Tensor
    """Distances `(B,)`, 0 for samples that are not right: what to write into the memory."""
    right: Tensor
    """Boolean `(B,)`: whose soft logit margin at the clean input is negative."""


def find_margins(
    model: nn.Module,
    x: Tensor,
    clean_logits: Tensor,
    labels: Tensor,
    attack: Callable[..., Tensor],
    *,
    ball: Callable[[Tensor], Threat],
    before: Tensor,
    largest: float,
    smallest: float = 0.005,
    search_steps: int = 10,
    clip: bool = True,
) -> Margins:
    r"""Each sample's distance from the decision boundary: one attack gives a direction, bisection the length.

    A sample that is right is attacked inside a ball of its previous margin $d$, which gives the direction
    $(x' - x) / d$; along it, `bisect_margins` looks for the point between 0 and `largest` where the soft logit margin
    changes its sign. Nothing has a gradient. Waits for the device once, to count who is right.

    Passes, of the samples that are right: the attack, one forward and `search_steps` of the bisection, in the mode the
    model is in: in train mode they move batch norm, as in the released code. A single right sample that batch norm
    then has no variance of stays where it is, with a margin of 0.

    Args:
        model: maps inputs to logits.
        x: clean inputs, shape `(B, ...)`.
        clean_logits: $f(x)$, shape `(B, K)`; the same pass serves the loss.
        labels: class indices `(B,)`.
        attack: `(model, x, labels, threat=..., loss=...) -> x_adv`, such as `functools.partial(pgd, steps=10)`; threat
            and loss are given here, and its step size follows from the threat.
        ball: makes a threat of one budget per sample: `Linf`, `L2`, or `functools.partial(Linf, bounds=...)`.
        before: previous margins of these samples, shape `(B,)`: rows of a memory that starts at zero. Smaller ones
            count as `smallest`.
        largest: how far to look; 1.05 times the margin that is trained for in MMA's code.
        smallest: smallest budget of the attack: 0.005 for Linf and 0.5 for L2 in MMA's code.
        search_steps: steps of the bisection, each halves the interval.
        clip: keep the points inside the bounds of the threat. The released code clips during the bisection only, so
            that it may train on points outside the box: `clip=False`.

    Returns:
        `Margins(x_adv, margins, right)`.

    Raises:
        TypeError: if `attack` or `ball` is no function, `labels` are no integers, or `attack` has a threat or loss of
            its own.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Ding et al. 2020 (MMA), Algorithm 1, and its released code.

    Examples:
        >>> model = nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0], [-1.0]])), model.bias.zero_()
        >>> x, labels = torch.tensor([[0.25]]), torch.tensor([0])  # 0.25 from the boundary
        >>> attack, ball = functools.partial(pgd, steps=5), functools.partial(Linf, bounds=(-1, 1))
        >>> found = find_margins(model, x, model(x), labels, attack, ball=ball, before=torch.zeros(1), largest=0.5)
        >>> round(found.margins.item(), 2), abs(found.x_adv.item()) < 0.001
        (0.25, True)
    """
    name = "find_margins"
    _check.floating(name, x=x)
    _check.logits(name, clean_logits=clean_logits)
    labels = _check.labels(name, labels, classes=clean_logits.shape[1], x=x)
    for what, value in (("model", model), ("attack", attack), ("ball", ball)):
        if not callable(value):
            raise TypeError(f"{name}: `{what}` must be a function, got {type(value).__name__}.")
    _refuse_own(name, attack, "threat", "loss")
    _check_margins(name, "before", before, x)
    _check.number(name, "largest", largest, above=0.0)
    _check.number(name, "smallest", smallest, above=0.0, at_most=largest)
    _check.count(name, "search_steps", search_steps)
    _check.flag(name, clip=clip)
    right = soft_logit_margin(clean_logits.detach(), labels) < 0
    rows = right.nonzero().squeeze(1)
    margins = torch.zeros_like(before)
    if not rows.shape[0]:
        return Margins(x, margins, right)
    some, their_labels, budget = x[rows], labels[rows], before[rows].clamp(smallest, largest)
    threat = ball(budget)
    bounds = getattr(threat, "bounds", (0.0, 1.0))
    try:
        found = attack(model, some, their_labels, threat=threat, loss=soft_logit_margin).detach()
        with torch.no_grad():
            at_found = soft_logit_margin(model(found), their_labels)
    except (ValueError, RuntimeError) as error:
        if len(rows) > 1 or not lacks_variance(error):
            raise
        return Margins(x, margins, right)
    directions = (found - some) / per_sample(budget.to(x.dtype), x)
    reached = bisect_margins(
        model, some, their_labels, directions=directions, before=budget, before_margin=at_found, largest=largest,
        steps=search_steps, bounds=bounds,
    )  # fmt: skip
    points = some + per_sample(reached.to(x.dtype), x) * directions
    x_adv = x.index_copy(0, rows, clamped(points, *_ends(name, bounds, some)) if clip else points)
    return Margins(x_adv, margins.index_copy(0, rows, reached), right)


def bisect_margins(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    directions: Tensor,
    before: Tensor,
    before_margin: Tensor,
    largest: float,
    steps: int = 10,
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """Where the soft logit margin changes its sign along a direction from each sample, by bisection from a guess.

    Args:
        model: maps inputs to logits; its present mode counts.
        x: clean inputs that are right, shape `(B, ...)`.
        labels: class indices `(B,)`.
        directions: one per sample, the shape of `x`.
        before: distances to start from, shape `(B,)`, at most `largest`.
        before_margin: soft logit margins at those, shape `(B,)`.
        largest: end of the interval, which begins at 0.
        steps: number of forward passes; each halves the interval.
        bounds: the points are clipped to them before the model sees them; numbers, or tensors as those of a threat.

    Returns:
        Distances `(B,)` in [0, largest].

    Raises:
        TypeError: if an input is no floating-point tensor, or `labels` no integers.
        ValueError: if shapes do not fit or a number is out of range.

    Source:
        Ding et al. 2020 (MMA), released code.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 0.25
        >>> given = {"directions": -torch.ones(1, 1), "before": torch.tensor([0.5]), "largest": 1.0}
        >>> x, labels = torch.tensor([[0.75]]), torch.tensor([0])
        >>> bisect_margins(model, x, labels, before_margin=torch.tensor([0.0]), steps=20, **given)
        tensor([0.5000])
        >>> sure = lambda x: torch.cat([x + 9, x], dim=1)  # class 0 everywhere
        >>> bisect_margins(sure, x, labels, before_margin=torch.tensor([-9.0]), **given)
        tensor([0.9995])
    """
    name = "bisect_margins"
    _check.model(name, model)
    _check.same_shape(name, x=x, directions=directions)
    labels = _check.labels(name, labels, x=x)
    for what, value in (("before", before), ("before_margin", before_margin)):
        _check_margins(name, what, value, x)
    _check.number(name, "largest", largest, above=0.0)
    _check.count(name, "steps", steps)
    ends = _ends(name, checked_bounds(name, bounds), x)
    distance, margin = before, before_margin
    low, high = torch.zeros_like(distance), torch.full_like(distance, largest)
    with torch.no_grad():
        for _ in range(steps):
            inside = margin < 0
            low = torch.where(inside, distance, low).maximum(low)
            high = torch.where(inside, high, distance).minimum(high)
            distance = (low + high) / 2
            points = clamped(x + per_sample(distance.to(x.dtype), x) * directions, *ends)
            margin = soft_logit_margin(model(points), labels)
    return distance


def _ends(name: str, bounds: Bounds, x: Tensor) -> Bounds:
    """Bounds that points can be clamped to: two numbers or two tensors."""
    return box_over(name, bounds, x) if any(isinstance(bound, Tensor) for bound in bounds) else bounds


def _check_margins(function: str, name: str, value: Tensor, x: Tensor) -> None:
    _check.floating(function, **{name: value})
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: `{name}` must be of shape ({x.shape[0]},), one per sample, got shape {tuple(value.shape)}; "
            "from a memory take the batch's rows, margins[index]."
        )
    _check.same_device(function, name, value.device, "x", x.device)


def _refuse_own(function: str, attack: Any, *options: str) -> None:
    """Refuse an attack that was made with options that are given to it here."""
    own = getattr(attack, "keywords", {})
    for option in options:
        if option in own:
            raise TypeError(
                f"{function}: `attack` has a `{option}` of its own, which would have no effect; leave it out."
            )
