"""What is measured of a trained network."""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from evidence.books import packed
from evidence.design import Design
from evidence.images import Images, batches, stratified
from evidence.training import Run, clock, figures, lane_of, spend
from perceptual_at import diagnostics
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks import margin
from perceptual_at.data import TensorImages

REDUCED = 0.1
"""Size of the perturbation that tells boundary samples, as in RAAT."""


def attacks(design: Design) -> dict[str, Callable[..., Any]]:
    """The attacks of the report. An image is broken when the network itself is wrong on any iterate."""
    both = functools.partial(
        pat.pgd, threat=pat.Linf(design.eps), step_size=design.step_size, keep="best", early_stop=True, verdict=True
    )
    return {"pgd20": functools.partial(both, steps=20), "margin30": functools.partial(both, steps=30, loss=margin)}


def judged(model: nn.Module, loader: Iterable[Any], which: dict[str, Any], design: Design, **more: Any) -> Any:
    """An evaluation with the search in the lane and verdicts in float32."""
    return pat.evaluate(model, loader, which, lane=lane_of(design), progress=False, **more)


def select(run: Run) -> None:
    """Judge the epoch on the held-out images, and keep its weights if none withstood PGD-10 better."""
    began = clock()
    ten = functools.partial(attacks(run.design)["pgd20"], steps=10)
    model = run.judged
    result = judged(model, batches(run.images.held_out, device=run.device), {"pgd10": ten}, run.design)
    run.log[-1]["held_out"] = percent(result)
    if all(result.robust_accuracy["pgd10"] * 100 >= line["held_out"]["pgd10"] - 1e-9 for line in run.log):
        run.best, run.best_epoch = pat.snapshot(model), run.epoch
    spend(run, began)


def percent(result: Any) -> dict[str, float]:
    """Accuracies in percent."""
    return {name: round(100 * share, 4) for name, share in
            {"clean": result.clean_accuracy, **result.robust_accuracy}.items()}  # fmt: skip


def verdicts(result: Any) -> dict[str, str]:
    """Verdicts of every column, packed."""
    return {name: packed(found.tolist()) for name, found in {"clean": result.correct, **result.robust}.items()}


def report(model: nn.Module, images: Images, design: Design, device: str) -> dict[str, Any]:
    """Everything but AutoAttack."""
    which = attacks(design)
    twenty = {"pgd20": which["pgd20"]}
    found: dict[str, Any] = {}
    for name, part in {"test": images.test, "exact": images.exact}.items():
        if part is not None:
            result = judged(model, batches(part, device=device), which, design)
            found[name] = {"n": len(part), **percent(result), "verdicts": verdicts(result)}
    seen = stratified(images.train, design.probed)
    found["train"] = percent(judged(model, batches(images.train, seen, device=device), twenty, design))
    found["batch_norm"] = batch_norm(model, images, design, device)
    looked = list(batches(images.test, stratified(images.test, design.probed), device=device))
    found["perception_gap"] = {
        name: {key: None if value is None else figures(value) for key, value in gap.to_dict().items()}
        for name, gap in gaps(model, looked, design).items()
    }
    found["groups"] = {
        "test": groups(model, looked, design),
        "train": groups(model, list(batches(images.train, seen, device=device)), design),
    }
    return found


def strong(model: nn.Module, test: TensorImages, design: Design, device: str, record: str) -> dict[str, Any]:
    """AutoAttack on a part of the test images; `record` takes the verdicts of finished batches."""
    version = ["apgd-ce"] if design.autoattack == "quick" else design.autoattack
    attack = functools.partial(pat.auto_attack, threat=pat.Linf(design.eps), version=version, verdict=True)
    loader = batches(test, stratified(test, design.strong), size=100, device=device)
    result = judged(model, loader, {"autoattack": attack}, design, record=record)
    return {"n": len(result), **percent(result), "verdicts": verdicts(result), "warnings": list(result.warnings)}


# Batch norm -------------------------------------------------------------------------------------------------------


def batch_norm(model: nn.Module, images: Images, design: Design, device: str) -> dict[str, Any]:
    """Accuracies with the network's own statistics, and with statistics of clean and of attacked training images."""
    sources = list(batches(images.train, stratified(images.train, 2 * design.probed), size=design.batch, device=device))
    attack = noisy(design, steps=design.steps)
    restated_on = {
        "own": None,
        "clean": [x for x, _, _ in sources],
        "attacked": [attack(model, x, labels, rows) for x, labels, rows in sources],
    }
    seen = stratified(images.test, 2 * design.probed)
    twenty = {"pgd20": attacks(design)["pgd20"]}
    found = {}
    for name, inputs in restated_on.items():
        changed = model if inputs is None else restated(model, inputs)
        result = judged(changed, batches(images.test, seen, device=device), twenty, design)
        found[name] = {"n": len(seen), **percent(result), "shift": figures(shift(model, changed))}
    return found


def restated(model: nn.Module, inputs: Iterable[Tensor]) -> nn.Module:
    """A copy whose running statistics are the mean over these batches."""
    model = copy.deepcopy(model).train()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for x in inputs:
            model(x.contiguous(memory_format=torch.channels_last))
    return model.eval()


def shift(model: nn.Module, other: nn.Module) -> float:
    """How far the running means of two networks lie apart, in standard deviations of the first: root mean square."""
    pairs = [
        (a, b) for a, b in zip(model.modules(), other.modules(), strict=True) if isinstance(a, nn.BatchNorm2d)
    ]  # fmt: skip
    apart = [(a.running_mean - b.running_mean).square() / (a.running_var + a.eps) for a, b in pairs]
    return torch.cat(apart).mean().sqrt().item()


# The papers' figures ----------------------------------------------------------------------------------------------


def noisy(design: Design, *, steps: int) -> Callable[..., Tensor]:
    """PGD in the lane, whose noise follows from the index of each image: `(model, x, labels, rows) -> x_adv`."""

    def attack(model: nn.Module, x: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return pat.pgd(
            model, x, labels, pat.Linf(design.eps), steps=steps, step_size=design.step_size, lane=lane_of(design),
            generator=SampleGenerator(0, rows),
        )  # fmt: skip

    return attack


def gaps(model: nn.Module, looked: list[Any], design: Design) -> dict[str, diagnostics.PerceptionGap]:
    """RPAT, Fig. 2: how far noise and PGD-20 move the logits of images that hold and of those that break."""
    rows = iter([rows for *_, rows in looked] * 2)
    attack = noisy(design, steps=20)
    drawn = torch.Generator(looked[0][0].device).manual_seed(0)
    perturb = {
        "pgd20": lambda _, x, labels: attack(model, x, labels, next(rows)),
        "random": functools.partial(diagnostics.random_noise, threat=pat.Linf(design.eps), generator=drawn),
    }
    pairs = [(x, labels) for x, labels, _ in looked]
    return {name: diagnostics.perception_gap(model, pairs, how) for name, how in perturb.items()}


def groups(model: nn.Module, looked: list[Any], design: Design) -> dict[str, float]:
    """RAAT, Fig. 2: the share of each group in percent, and how much of it withstands the attack of training."""
    attack = noisy(design, steps=design.steps)
    held, parts = [], []
    for x, labels, rows in looked:
        x_adv = attack(model, x, labels, rows)
        with pat.frozen(model) as f, torch.no_grad():
            clean, near, far = (f(inputs) for inputs in (x, pat.interpolate(x, x_adv, REDUCED), x_adv))
        parts.append(pat.boundary_partition(clean, near, labels))
        held.append(far.argmax(dim=1) == labels)
    right = torch.cat(held)
    found = {}
    for name in ("misclassified", "boundary", "interior"):
        mask = torch.cat([getattr(part, name) for part in parts])
        found[name] = round(100 * mask.double().mean().item(), 4)
        found[f"{name}, held"] = round(100 * right[mask].double().mean().item(), 4) if mask.any() else None
    return found
