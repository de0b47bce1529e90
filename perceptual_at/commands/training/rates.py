"""The learning rate of a step, and the random numbers of a run."""

import hashlib
import math

import torch
from torch import Tensor

from perceptual_at.commands.options.settings import Optimisation
from perceptual_at.schedules import one_cycle_learning_rate, rebat_learning_rate, triangular_learning_rate


def learning_rate(chosen: Optimisation, step: int, steps_per_epoch: int) -> float:
    """The rate of one optimiser step, counted from 0 over the whole run."""
    if chosen.schedule == "rebat":
        first, second = chosen.milestones
        progress = (step + 1) / steps_per_epoch
        return rebat_learning_rate(progress, peak=chosen.lr, factor=chosen.factor, milestones=(first, second))
    if chosen.schedule == "one_cycle":
        done = (step + 1) / (chosen.epochs * steps_per_epoch + 1)
        return chosen.lr * min(done / 0.3, (1 - done) / 0.7)
    if chosen.schedule == "triangular":
        total = chosen.epochs * steps_per_epoch
        return triangular_learning_rate(step, total=total, peak=chosen.lr, peak_at=chosen.peak_at)
    if chosen.schedule == "warm_cosine":
        return one_cycle_learning_rate(step // steps_per_epoch, steps=chosen.epochs, peak=chosen.lr)
    if chosen.schedule == "cosine":
        return chosen.lr * (1 + math.cos(math.pi * step / (chosen.epochs * steps_per_epoch))) / 2
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
