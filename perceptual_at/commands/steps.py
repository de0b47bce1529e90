"""What the settings make of one step: its images, its learning rate, its attack and its loss."""

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import objectives
from perceptual_at.augment import random_crop_flip
from perceptual_at.commands.settings import ALIGNED, AVERAGED, TWO_VIEWS, Budget, Optimisation, Settings, keywords
from perceptual_at.schedules import rebat_learning_rate


def learning_rate(chosen: Optimisation, step: int, steps_per_epoch: int) -> float:
    """The rate of one optimiser step, counted from 0 over the whole run."""
    if chosen.schedule == "rebat":
        first, second = chosen.milestones
        progress = (step + 1) / steps_per_epoch
        return rebat_learning_rate(progress, peak=chosen.lr, factor=chosen.factor, milestones=(first, second))
    if chosen.schedule == "one_cycle":
        done = (step + 1) / (chosen.epochs * steps_per_epoch + 1)
        return chosen.lr * min(done / 0.3, (1 - done) / 0.7)
    drops = sum(step // steps_per_epoch >= milestone for milestone in chosen.milestones)
    return float(chosen.lr / chosen.factor**drops)


def stream(seed: int, what: str, number: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers of its own for each purpose, all from the one seed."""
    named = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(named[:7], "little"))


def rows_of_epoch(seed: int, images: int, batch: int, epoch: int) -> list[Tensor]:
    """The joint batches of an epoch, the same in every process; what does not fill a batch waits for another epoch."""
    order = torch.randperm(images, generator=stream(seed, "order", epoch))
    return list(torch.split(order[: images // batch * batch], batch))


Attack = Callable[..., Tensor]

LANES = {"none": None, "fp32": pat.Lane(), "bf16": pat.Lane(dtype=torch.bfloat16)}
THREATS: dict[str, Callable[[float], pat.Threat]] = {"linf": pat.Linf, "l2": pat.L2, "l1": pat.L1}


def threat_of(chosen: Budget) -> pat.Threat:
    """The threat model."""
    return THREATS[chosen.norm](chosen.eps)


def attack_of(chosen: Budget, generator: torch.Generator, *, size: float = 1.0) -> Attack:
    """The attack in training; `size` scales budget and step."""
    return functools.partial(
        pat.pgd, threat=threat_of(chosen).scaled(size), steps=chosen.steps, step_size=size * chosen.step_size,
        start=chosen.start, model_mode=chosen.model_mode, lane=LANES[chosen.lane], validate=False,
        generator=generator,
    )  # fmt: skip


LossOfStep = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def objective_of(settings: Settings, noise: torch.Generator, mixes: torch.Generator) -> LossOfStep:
    """`(model, x, labels, *, epoch, average) -> (loss, terms)`: one step's loss, augmentation included.

    `noise` draws for the samples of one process, `mixes` what all processes share. What an objective's signature asks
    for (`mix`, `generator`, `average`) it gets.
    """
    method, data, threat = settings.method, settings.data, settings.threat
    function, options = getattr(objectives, method.objective), keywords(method)
    asked = inspect.signature(function).parameters
    attack = attack_of(threat, noise)
    if "generator" in asked or method.base in ("trades", "mart"):
        options["generator"] = noise
    if method.objective in ALIGNED and method.source == "paper":
        eta = options.pop("eta", 0.1)
        options["reduced_attack"] = attack_of(threat, noise, size=eta)
    two = method.objective in TWO_VIEWS or method.base == "consistency_at"

    def views_of(x: Tensor) -> tuple[Tensor, ...]:
        views = tuple(
            random_crop_flip(
                x, padding=data.padding, padding_mode=data.padding_mode, flip=data.flip, generator=noise
            )
            for _ in range(1 + two)
        )  # fmt: skip
        if settings.running.channels_last:
            return tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
        return views

    def changing(epoch: int, average: Any) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        if "mix" in asked:
            drawn["mix"] = pat.draw_beta(fold="max" if method.source == "release" else "none", generator=mixes)
        if method.objective in AVERAGED:
            start = settings.optimisation.average_start
            # Until the end of the first epoch with averaged weights the released code leaves them in train mode.
            trap = method.source == "release" and epoch <= start
            drawn["teacher_mode"] = "as_is" if trap else "eval"
            drawn["average"] = average if epoch >= start or method.objective == "raat_sharp" else None
            if method.objective == "raat_sharp" and epoch < start:
                drawn["weight"] = 0.0
        return drawn

    def loss_of_step(
        model: nn.Module, x: Tensor, labels: Tensor, *, epoch: int, average: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = function(model, views_of(x), labels, attack, **options, **changing(epoch, average))
        return loss, terms

    return loss_of_step
