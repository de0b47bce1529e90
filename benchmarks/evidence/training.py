"""One run: an arm trained from the weights of its seed, with a state after every epoch from which it goes on."""

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from evidence.design import ARMS, ETAS, SWEEP, Arm, Design, Job
from evidence.images import Images, batches
from perceptual_at import models, objectives, weight_perturbation
from perceptual_at._files import written_whole
from perceptual_at.augment import random_crop_flip

DRAWN = ("view 1", "view 2", "attack", "noise")


@dataclasses.dataclass
class Run:
    """A run and where it is."""

    job: Job
    design: Design
    images: Images
    device: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Averaged weights, where the arm judges those."""
    epoch: int = 0
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    best_epoch: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"training": 0.0, "training_cpu": 0.0})

    @property
    def arm(self) -> Arm:
        return {**ARMS, **SWEEP}[self.job.arm]

    @property
    def epochs(self) -> int:
        return self.design.epochs(self.job.regime)

    @property
    def judged(self) -> nn.Module:
        """The network that is measured: the one in training, or a copy with the averaged weights."""
        if not self.average:
            return self.model
        averaged = copy.deepcopy(self.model)
        averaged.load_state_dict(self.average)
        return averaged


def begin(job: Job, design: Design, images: Images, device: str, state: Path | None = None) -> Run:
    """A run before its first epoch, or after the last one in `state`."""
    model = network(design, job.seed).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=design.rate, momentum=design.momentum, weight_decay=design.weight_decay
    )
    run = Run(job, design, images, device, model, optimizer)
    if run.arm.decay:
        run.average = pat.snapshot(model)
    if state is not None and state.exists():
        held = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(held.pop("model"))
        optimizer.load_state_dict(held.pop("optimizer"))
        run = dataclasses.replace(run, **held)
    return run


def save(run: Run, state: Path) -> None:
    """Everything that the next epoch depends on; all random numbers follow from seed and epoch."""
    held = {name: getattr(run, name) for name in ("epoch", "log", "average", "best", "best_epoch", "seconds")}
    held |= {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    with written_whole(state) as beside:
        torch.save(held, beside)


def network(design: Design, seed: int = 0) -> nn.Module:
    """The network with the first weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.resnet18(width=design.width, stem_stride=design.stem_stride)
    return model.to(memory_format=torch.channels_last)


def stream(seed: int, what: str, epoch: int, device: str = "cpu") -> torch.Generator:
    """Random numbers of one purpose in one epoch: the same for every arm, whatever else an arm draws."""
    named = hashlib.sha256(f"{seed} {what} {epoch}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(named[:7], "little"))


def lane_of(design: Design) -> pat.Lane:
    """How models run while they are attacked."""
    return pat.Lane(dtype=getattr(torch, design.lane))


def rate(design: Design, step: int, steps: int) -> float:
    """Learning rate of a step counted from 0: one cycle."""
    done = (step + 1) / (steps + 1)
    return design.rate * min(done / 0.3, (1 - done) / 0.7)


class Attack:
    """PGD of the design, which remembers what it returned last."""

    def __init__(self, design: Design, generator: torch.Generator) -> None:
        self.pgd = functools.partial(
            pat.pgd, threat=pat.Linf(design.eps), steps=design.steps, step_size=design.step_size,
            lane=lane_of(design), validate=False, generator=generator,
        )  # fmt: skip
        self.x_adv = torch.empty(0)

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        self.x_adv = self.pgd(*given, **options)
        return self.x_adv


def train_epoch(run: Run) -> None:
    """One epoch, and its line in the log but for the scores."""
    began = clock()
    design, arm, seed = run.design, run.arm, run.job.seed
    draws = {what: stream(seed, what, run.epoch, run.device) for what in DRAWN}
    mixes = stream(seed, "mix", run.epoch)
    attack = Attack(design, draws["attack"])
    order = torch.randperm(len(run.images.train), generator=stream(seed, "order", run.epoch))
    per_epoch = len(order) // design.batch
    loader = batches(run.images.train, order[: per_epoch * design.batch], size=design.batch, device=run.device)
    sums: dict[str, Tensor] = {}
    weighed = []
    run.model.train()
    for number, (x, labels, _) in enumerate(loader):
        lr = rate(design, run.epoch * per_epoch + number, run.epochs * per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        views = tuple(
            random_crop_flip(x, generator=draws[f"view {view + 1}"]).contiguous(memory_format=torch.channels_last)
            for view in range(arm.views)
        )
        options = options_of(arm, draws["noise"])
        if "raat" in arm.objective:
            options["mix"] = pat.draw_beta(fold="max", generator=mixes)
        before = copy.deepcopy(run.model) if number in (per_epoch // 2, per_epoch - 1) and arm.silenced else None
        loss, terms = step(run, views, labels, attack, options)
        if before is not None:
            weighed.append(gradient_share(before, arm, views, labels, attack.x_adv, options))
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0.0) + value
    terms = {name: figures(total.item() / per_epoch) for name, total in sums.items()}
    run.epoch += 1
    spend(run, began)
    run.log.append({"epoch": run.epoch, "rate": figures(lr), "terms": terms, **shares(arm, terms, weighed)})


def step(
    run: Run, views: Sequence[Tensor], labels: Tensor, attack: Callable[..., Tensor], options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of the optimiser, where the weights are at their worst nearby if the arm says so."""
    arm = run.arm
    answered = weight_perturbation.once(attack) if arm.perturbation else attack
    compute = functools.partial(objective_of(arm), run.model, views, labels, answered, **options)
    if arm.perturbation:
        moved = weight_perturbation.ascend(run.model, lambda: compute()[0], size=arm.perturbation)
    loss, terms = compute()
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    if arm.perturbation:
        weight_perturbation.restore(run.model, moved, form="awp")
    if arm.decay:
        run.average = pat.ema_update(run.average, run.model, decay=arm.decay)
    return loss, terms


def objective_of(arm: Arm) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The objective of an arm."""
    return raat_adaptive if arm.objective == "raat_adaptive" else getattr(objectives, arm.objective)


def raat_adaptive(
    model: nn.Module, views: Sequence[Tensor], labels: Tensor, attack: Callable[..., Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """RAAT whose reduction is chosen for each image: the smallest of a few that breaks it."""
    x, twice = torch.cat(list(views)), labels.repeat(len(views))
    x_adv = attack(model, x, twice)
    with torch.no_grad(), pat.frozen(model) as f:
        path = torch.stack([f(pat.interpolate(x, x_adv, eta)) for eta in ETAS])
    eta = pat.adaptive_eta(path, twice, etas=ETAS)
    return objectives.raat(model, views, labels, lambda *_, **__: x_adv, eta=eta, **options)


def clock() -> tuple[float, float]:
    """Time on the wall and of this process."""
    return time.perf_counter(), time.process_time()


def spend(run: Run, began: tuple[float, float]) -> None:
    """Add the time since then to the run's."""
    spent = (now - then for now, then in zip(clock(), began, strict=True))
    run.seconds = {name: run.seconds[name] + more for name, more in zip(run.seconds, spent, strict=True)}


def options_of(arm: Arm, noise: torch.Generator) -> dict[str, Any]:
    """The keywords of an arm's objective."""
    options = dict(arm.options)
    return {**options, "generator": noise} if arm.objective in ("trades", "mart") else options


def gradient_share(
    model: nn.Module, arm: Arm, views: Sequence[Tensor], labels: Tensor, x_adv: Tensor, options: dict[str, Any]
) -> tuple[float, float]:
    """Of the gradient of a step, norm of the regulariser's part over that of the whole, and the cosine of its angle
    to the rest. `model` is as it was before the step.
    """
    if "generator" in options:  # draws a start that the ready attack does not use
        options = {**options, "generator": torch.Generator(x_adv.device).manual_seed(0)}
    found = []
    for silent in (False, True):
        given = {**options, **(arm.silenced or {})} if silent else options
        spent = copy.deepcopy(model)  # running statistics, which decide RAAT's partition, move in every pass
        loss, _ = objective_of(arm)(spent, views, labels, lambda *_, **__: x_adv, **given)
        parts = torch.autograd.grad(loss, list(spent.parameters()), allow_unused=True, materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in parts]).double())
    whole, rest = found
    term = whole - rest
    cosine = torch.nn.functional.cosine_similarity(term, rest, dim=0)
    return (term.norm() / whole.norm()).item(), cosine.item()


def shares(arm: Arm, terms: dict[str, float], weighed: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What the regulariser makes of the epoch's loss, and of the gradient in the mean over the batches looked at."""
    if not weighed:
        return {}
    norm, cosine = (figures(sum(column) / len(weighed)) for column in zip(*weighed, strict=True))
    loss = figures(arm.weight * terms.get(arm.regulariser, 0.0) / terms["loss"])
    return {"share_of_loss": loss, "share_of_gradient": norm, "cosine_to_the_rest": cosine}


def figures(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
