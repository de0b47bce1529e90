"""Friendly adversarial inputs: PGD that lets go of a sample once it is wrong."""

from typing import Literal

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._random import Generator, SampleGenerator
from perceptual_at._rounding import wide
from perceptual_at._shapes import per_sample
from perceptual_at.attacks.pgd import pgd
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, budget, check_threat
from perceptual_at.victims import Lane, Model, ModelMode, frozen


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
        model: see `pgd`.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: see `pgd`.
        patience: how many steps a sample goes on after it became wrong, called tau in the paper; one number or
            integers `(B,)`. It grows over training: 0, 1, 2 after epochs 50 and 90 of 120.
        steps: number of gradient steps at most.
        step_size: see `pgd`.
        noise: standard deviation of Gaussian noise added after each step, before a projection; 0.001 in FAT on PGD-AT.
        loss: per-sample function `(logits, labels) -> (B,)`.
        start: see `pgd`; a tensor is projected first.
        model_mode: see `pgd`.
        lane: see `pgd`; who is wrong is then the lane's opinion.
        validate: see `pgd`.
        generator: source of the random start and of the noise; see `pgd`.

    Returns:
        Adversarial inputs, shape and dtype of `x`, in its order, detached.

    Raises:
        TypeError: see `pgd`; if `patience` is no integer or `labels` no class indices.
        ValueError: see `pgd`; if `patience` or `noise` is negative.

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
    _check.floating(name, x=x)
    _check.labels(name, labels, x=x)
    _check.count(name, "steps", steps)
    _check.number(name, "noise", noise, at_least=0.0)
    check_threat(name, threat)
    left = _patience(name, patience, x)
    center = x.detach()
    if isinstance(start, Tensor):
        _check.same_shape(name, x=x, start=start)
        point = threat.project(start.detach(), center)
    else:
        _check.choice(name, "start", start, ("random", "clean"))
        point = threat.random_start(center, generator=_numbers(generator, 0)) if start == "random" else center
    if not len(x):
        return point
    if step_size is None:
        step_size = 2.5 * budget(name, threat) / steps
    wrong: list[Tensor] = []

    def watched(logits: Tensor, aims: Tensor) -> Tensor:
        wrong.append(logits.detach().argmax(dim=1) != aims)
        return loss(logits, aims)

    stopped = torch.zeros_like(labels, dtype=torch.bool)
    with frozen(model, model_mode=model_mode, lane=lane) as f:
        for step in range(steps):
            moved = pgd(
                f, x, labels, threat, steps=1, step_size=step_size, start=point, loss=watched, model_mode=model_mode,
                validate=validate and step == 0,
            )  # fmt: skip
            stopped = stopped | (wrong[-1] & (left == 0))
            left = left - (wrong[-1] & ~stopped).to(left.dtype)
            if noise:
                draws = _random.draws(name, _numbers(generator, step + 1), x)
                shaken = moved.to(wide(x)) + noise * draws.normal(tuple(x.shape), dtype=wide(x))
                moved = threat.project(shaken, center)
            point = torch.where(per_sample(stopped, x), point, moved)
    return point


def _patience(function: str, patience: int | Tensor, x: Tensor) -> Tensor:
    """Steps that each sample may still go on, `(B,)`."""
    if not isinstance(patience, Tensor):
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f"{function}: `patience` must be an integer, got {type(patience).__name__} {patience!r}.")
        _check.number(function, "patience", patience, at_least=0)
        return torch.full((x.shape[0],), patience, device=x.device)
    _check.labels(function, patience, name="patience", x=x)
    return patience.long()


def _numbers(generator: Generator | None, purpose: int) -> Generator | None:
    """Numbers for the start (0) and for each step; those of a sample have no state and are told apart by purpose."""
    return generator.fork(purpose) if isinstance(generator, SampleGenerator) else generator
