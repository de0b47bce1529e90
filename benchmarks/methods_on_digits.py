"""Every training method on handwritten digits under one budget of passes, with paired tests over seeds.

    python benchmarks/methods_on_digits.py --out docs/results/methods_on_digits.json --threads 1
    python benchmarks/methods_on_digits.py --only pgd_at rpat_relative raat_adaptive rpat_raat --units 2500 --threads 1

A forward pass counts 1, an input gradient 1, a parameter gradient 2, each times the share of the batch that it was of;
passes of teachers and of averaged weights count too. A method trains until the budget is spent, so one that needs more
passes takes fewer steps. All share network, first weights, order of the images, learning rate and evaluation. Settings
of the methods are the published ones; nothing was tuned on these images but the learning rate, and that on PGD-AT.
"""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import methods_table
import record
import torch
from evidence.numbers import t_interval
from methods_table import METHODS, Method
from torch import nn

from perceptual_at import Linf, ema_update, nrr, pgd, refresh_batch_norm, snapshot, swa_update, weight_perturbation
from perceptual_at.augment import random_crop_flip
from perceptual_at.data import digits
from perceptual_at.models import DigitsCNN, fold_classes, with_cosine_logits

WHOLE = {"seeds": 5, "width": 8, "batch": 64, "eps": 0.1, "steps": 2, "units": 1000, "peak": 0.01, "test": 360}
MINIATURE = WHOLE | {"seeds": 2, "width": 4, "batch": 32, "units": 14, "test": 40}
SCORES = ("clean", "pgd20", "nrr")
TEACHERS = ("standard", "pgd_at")
"""Trained before, with a budget of their own, for the methods that have a teacher."""


@dataclasses.dataclass
class Run:
    """What a method may look at while it trains."""

    settings: dict[str, Any]
    model: nn.Module
    generator: torch.Generator
    teachers: dict[str, nn.Module]
    images: int
    average: Any = None
    index: Any = None
    progress: float = 0.0
    spent: float = 0.0
    steps: int = 0
    held: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def threat(self) -> Linf:
        return Linf(self.settings["eps"])

    def attack(self, **changes: Any) -> Callable[..., torch.Tensor]:
        usual = {"threat": self.threat, "steps": self.settings["steps"], "generator": self.generator}
        return functools.partial(pgd, validate=False, **usual | changes)

    def mix(self) -> float:
        return methods_table.draw(self.generator)


def counted(run: Run, model: nn.Module) -> None:
    """Add the passes of a model to what the run has spent."""

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], _: Any) -> None:
        trains = any(parameter.requires_grad for parameter in module.parameters())
        cost = 1 if not torch.is_grad_enabled() else 3 if trains else 2
        run.spent += cost * len(given[0]) / run.settings["batch"]

    model.register_forward_hook(count)


def trained(
    method: Method, seed: int, settings: dict[str, Any], teachers: dict[str, nn.Module]
) -> tuple[nn.Module, Run]:
    """A network trained by a method until its budget is spent."""
    torch.manual_seed(seed)
    model: nn.Module = DigitsCNN(width=settings["width"], num_classes=20 if method.dummies else 10)
    if method.cosines:
        model = with_cosine_logits(model, scale=method.cosines)
    x, labels = digits("train", seed=seed)
    run = Run(settings, model, torch.Generator().manual_seed(seed), teachers, len(x))
    for counting in (model, *{id(teacher): teacher for teacher in teachers.values()}.values()):
        counted(run, counting)
    run.average = snapshot(model)
    if method.prepare:
        method.prepare(run)
    trains = [*model.parameters(), *(p for part in run.held.get("trained", ()) for p in part.parameters())]
    optimizer = torch.optim.Adam(trains, lr=settings["peak"])
    order, averaged = torch.Generator().manual_seed(seed), 0
    while run.spent < settings["units"]:
        epoch(run, method, optimizer, x, labels, order)
        if method.swa and run.progress >= 0.5:
            run.held["swa"] = swa_update(run.held.get("swa", snapshot(model)), model, count=averaged)
            averaged += 1
    if method.swa and averaged:
        images = [x[rows] for rows in torch.arange(len(x)).split(settings["batch"])]
        model.load_state_dict(refresh_batch_norm(model, run.held["swa"], images))
    elif method.evaluates_average:
        model.load_state_dict(run.average)
    return (fold_classes(model) if method.dummies else model).eval(), run


def epoch(
    run: Run,
    method: Method,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Generator,
) -> None:
    """All whole batches once, or fewer where the budget is spent before."""
    batch, units = run.settings["batch"], run.settings["units"]
    shuffled = torch.randperm(len(x), generator=order)[: len(x) // batch * batch]
    for rows in shuffled.split(batch):
        if run.spent >= units:
            break
        run.progress, run.index = run.spent / units, rows
        for group in optimizer.param_groups:
            group["lr"] = run.settings["peak"] * (1 + math.cos(math.pi * min(1.0, run.progress))) / 2
        run.model.train()
        views = tuple(
            random_crop_flip(x[rows], padding=1, flip=False, generator=order) for _ in range(1 + method.two_views)
        )
        step(run, method, optimizer, views, labels[rows])
        run.steps += 1
        decay = method.decay if run.progress >= method.average_from else 0.0
        run.average = ema_update(run.average, run.model, decay=decay)
        if method.after:
            method.after(run)


def step(run: Run, method: Method, optimizer: torch.optim.Optimizer, views: Any, labels: torch.Tensor) -> None:
    """One step of the optimiser, at perturbed weights where the method says so."""
    if method.step:
        method.step(run, optimizer, views, labels)
        return
    attack = method.attack(run)
    if not method.perturbation:
        loss = method.loss(run, views, labels, attack)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return
    answered = weight_perturbation.once(attack, calls=method.attacks)
    loss_of = functools.partial(method.loss, run, views, labels, answered)
    moved = weight_perturbation.ascend(run.model, loss_of, size=method.perturbation)
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()
    weight_perturbation.restore(run.model, moved, form="awp")


def measured(model: nn.Module, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Clean and PGD-20 accuracy in percent, and their two means."""
    x, labels = (part[: settings["test"]] for part in digits("test", seed=seed))
    noise = torch.Generator().manual_seed(seed)
    x_adv = pgd(model, x, labels, Linf(settings["eps"]), steps=20, generator=noise)
    with torch.no_grad():
        clean, robust = (100 * (model(at).argmax(dim=1) == labels).double().mean().item() for at in (x, x_adv))
    return {"clean": clean, "pgd20": robust, "mean": (clean + robust) / 2, "nrr": nrr(clean, robust)}


def paired(ours: list[dict[str, float]], theirs: list[dict[str, float]], score: str) -> dict[str, float]:
    """Mean difference over seeds with its 95 % interval (paired t test)."""
    found = t_interval([a[score] - b[score] for a, b in zip(ours, theirs, strict=True)])
    return {"difference": found.mean, "low": found.low, "high": found.high}


def teachers_of(seed: int, settings: dict[str, Any]) -> dict[str, nn.Module]:
    """Frozen networks for the methods with teachers, from other first weights."""
    made = {}
    for name in TEACHERS:
        model, _ = trained(METHODS[name], seed + 1000, settings, {})
        made[name] = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        made[name]._forward_hooks.clear()
    return made


def main(arguments: list[str] | None = None) -> None:
    options = record.parser(__file__, __doc__, rounds=1)
    options.add_argument("--only", nargs="+", choices=list(METHODS), help="these methods, and what they compare with")
    options.add_argument("--units", type=int, help="the budget of passes, if another")
    chosen = record.begin(options, arguments)
    settings = MINIATURE if chosen.quick else WHOLE
    settings = settings if chosen.units is None else settings | {"units": chosen.units}
    names = list(METHODS)
    if chosen.only:
        names = [n for n in names if n in {*chosen.only, *(METHODS[name].against for name in chosen.only)}]
    began, runs = time.perf_counter(), {name: [] for name in names}
    for seed in range(chosen.seed, chosen.seed + settings["seeds"]):
        teachers = teachers_of(seed, settings)
        for name in names:
            model, run = trained(METHODS[name], seed, settings, copy.deepcopy(teachers))
            found = measured(model, seed, settings)
            runs[name].append({**found, "steps": run.steps, "spent": run.spent})
            clean, robust = found["clean"], found["pgd20"]
            print(f"seed {seed}  {name:24s} clean {clean:5.1f}  pgd20 {robust:5.1f}  steps {run.steps}", flush=True)
    tests = {}
    for name in names:
        other = METHODS[name].against
        if other in runs and other != name:
            tests[name] = {"against": other, **{s: paired(runs[name], runs[other], s) for s in SCORES}}
    titles = {name: METHODS[name].title for name in names}
    seconds = time.perf_counter() - began
    record.save(chosen, settings, data="digits", titles=titles, runs=runs, paired=tests, seconds=seconds)


if __name__ == "__main__":
    main()
