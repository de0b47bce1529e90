"""What a method keeps from step to step beside the network: memories, teachers, averages, a second network.

A `Companion` is four functions, each of which takes what is kept and gives it back; `begin` makes it. What is kept is
a dict of tensors, of dicts of tensors, and of networks; all of it is saved with the run's state and restored to the
last bit. A method is found by the names of its objectives, so that RPAT on TE remembers what TE does.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

import perceptual_at as pat
from perceptual_at import attacks, memories, objectives, schedules
from perceptual_at.checkpoints import load_weights
from perceptual_at.class_predictions import class_table
from perceptual_at.commands.ingredients import networks
from perceptual_at.commands.ingredients.protocol import LANES, THREATS, threat_of
from perceptual_at.commands.options.method import beside, parts
from perceptual_at.commands.options.settings import Method, Settings
from perceptual_at.commands.options.words import option
from perceptual_at.commands.training.splits import Splits, task_of
from perceptual_at.commands.training.steps import Result, Step
from perceptual_at.divergences import cross_entropy
from perceptual_at.objectives.cure import cure_gradients

if TYPE_CHECKING:
    from perceptual_at.commands.training.run import Run

Kept = dict[str, Any]
"""Tensors, dicts of tensors and networks, by name."""
Given = tuple[dict[str, Any], Kept]
"""Keywords for the objective, and what is kept."""


class Start(NamedTuple):
    """What there is before the first step."""

    settings: Settings
    parts: Splits
    model: nn.Module
    accelerator: Accelerator

    @property
    def samples(self) -> int:
        """Numbers that a sample may have: those of the second source are counted on."""
        return len(self.parts.train) + (0 if self.parts.extra is None else len(self.parts.extra))

    def network(self, *, seed: int = 0, **changes: Any) -> nn.Module:
        """Another network for the same images."""
        chosen = dataclasses.replace(self.settings.network, **changes)
        task = task_of(self.parts, chosen)
        return networks.network(chosen, task, seed=self.settings.running.seed + seed)


def _nothing(start: Start) -> Kept:  # noqa: ARG001
    return {}


def _no_keywords(run: "Run", step: Step, index: Tensor) -> Given:  # noqa: ARG001
    return {}, run.kept


def _as_it_was(run: "Run") -> Kept:
    return run.kept


def _backward(run: "Run", step: Step) -> Result:
    loss, terms = step(run.model)
    run.accelerator.backward(loss)
    return loss, terms


@dataclasses.dataclass(frozen=True)
class Companion:
    """How a method's run differs from that of an objective alone."""

    begin: Callable[[Start], Kept] = _nothing
    """What is kept before the first step."""
    supply: Callable[["Run", Step, Tensor], Given] = _no_keywords
    """Before each step, with the numbers of its samples: keywords of the objective; `attack` replaces the attack."""
    backward: Callable[["Run", Step], Result] = _backward
    """The gradients of a step, added to `.grad`; what it keeps it writes in place."""
    stepped: Callable[["Run"], Kept] = _as_it_was
    """After each step of the optimiser."""
    closed: Callable[["Run"], Kept] = _as_it_was
    """After each epoch, before it is measured."""


# TE and MMA: a row for each sample --------------------------------------------------------------------------------


def _ensemble(start: Start) -> Kept:
    return {"ensemble": torch.zeros(start.samples, start.parts.classes)}


def _temporal(run: "Run", step: Step, index: Tensor) -> Given:
    """The ensembles of these samples, moved by what is predicted now, once they have begun."""
    chosen, ensemble = beside(run.settings.method), run.kept["ensemble"]
    peak = _own(run, step).get("weight", 300.0)
    weight = schedules.te_weight(run.epoch, peak=peak, start=chosen["start"], length=chosen["length"])
    if run.epoch < chosen["start"]:
        return {"targets": None, "weight": weight}, run.kept
    with torch.no_grad(), pat.frozen(run.model) as f:
        rows = memories.gathered(index, f(step.views[0]).float())
    ensemble = memories.ensemble_update(ensemble, *rows, momentum=chosen["momentum"])
    return {"targets": memories.ensemble_targets(ensemble, index), "weight": weight}, {"ensemble": ensemble}


def _margins(start: Start) -> Kept:
    return {"margins": torch.zeros(start.samples)}


def _max_margin(run: "Run", step: Step, index: Tensor) -> Given:
    """Points at the boundary, searched from where it was found the last time."""
    chosen, budget, margins = beside(run.settings.method), run.settings.threat, run.kept["margins"]
    search = functools.partial(
        pat.pgd, steps=budget.steps, start=budget.start, model_mode=budget.model_mode, lane=LANES[budget.lane],
        validate=False, generator=run.sources.noise,
    )  # fmt: skip
    x, largest = step.views[0], step.keywords["largest"]
    clean = run.model(x)
    found = attacks.find_margins(
        run.model, x, clean, step.labels, search, ball=THREATS[budget.norm], before=margins[index],
        largest=1.05 * largest, **chosen,
    )  # fmt: skip
    kept = {"margins": memories.write(margins, *memories.gathered(index, found.margins))}
    given = {"attack": lambda *_, **__: found.x_adv, "margins": found.margins}
    # Where the weights are perturbed, the clean pass belongs to other weights and is made again.
    return given if run.perturbs else given | {"clean_logits": clean}, kept


# HAT, KD+SWA, CURE, LBGAT: other networks -------------------------------------------------------------------------

TEACHERS = {
    "hat": {"helper": "standard"},
    "kd": {"standard_teacher": "standard", "robust_teacher": "pgd_at"},
    "cure": {"first": "standard"},
}
"""The networks that a method learns from, and the objectives that they are trained by."""


def teachers(settings: Settings) -> dict[str, str]:
    """The teachers of a method, by what they are called in it.

    Raises:
        ValueError: if there are more or fewer files of weights.
    """
    found = {name: by for part in parts(settings.method) for name, by in TEACHERS.get(part, {}).items()}
    if "first" in found and settings.network.init is not None:
        del found["first"]
    given = len(settings.network.teacher)
    if given not in (0, len(found)):
        wanted = f"takes {len(found)}: {', '.join(found)}" if found else "has no teacher"
        raise ValueError(f"--teacher: {settings.method.objective} {wanted}; {given} given.")
    return found


def first_runs(settings: Settings) -> Iterator[Settings]:
    """The runs that train the teachers, each in a folder below the run's own, which begin or go on.

    Raises:
        ValueError: if a folder holds a teacher that was trained with other settings.
    """
    found = teachers(settings)
    if settings.network.teacher:
        return
    plain = {field.name: field.default for field in dataclasses.fields(Method)}
    around = {
        "awp": None,
        "awp_start": 0,
        "awp_form": "awp",
        "average_decay": None,
        "averaging": "ema",
        "average_start": 0,
    }
    for name, by in found.items():
        out = settings.running.out / name
        first = settings.changed(
            **plain | around | {"objective": by}, out=out, resume=True, extend=False, change=(), track=(),
            attack="pgd", patience=(), attack_noise=0.0,
        )  # fmt: skip
        if not (out / "result.json").is_file():
            yield first
            continue
        saved = json.loads((out / "result.json").read_text())["settings"]
        free = {*plain, "epochs", *settings.running.may_change}
        other = [f"{key} {saved.get(key)!r} -> {value!r}" for key, value in first.fixed().items()
                 if key not in free and saved.get(key) != value]  # fmt: skip
        if other:
            raise ValueError(
                f"the {name} in `{out}` was trained with other settings: {', '.join(other)}. Take another --out, or "
                "give its weights as --teacher."
            )


def _taught(start: Start) -> Kept:
    """The teachers, which learn nothing any more."""
    kept = {}
    for place, name in enumerate(teachers(start.settings)):
        files = start.settings.network.teacher
        path = files[place] if files else start.settings.running.out / name / "final.safetensors"
        kept[name] = _loaded(start, path).eval().requires_grad_(requires_grad=False)
    return kept


def _loaded(start: Start, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"{option('teacher')}: there is no file `{path}`.")
    model = start.network()
    load_weights(model, path)
    return model


def _teaching(run: "Run", step: Step, index: Tensor) -> Given:  # noqa: ARG001
    return dict(run.kept), run.kept


def _own_average(start: Start) -> Kept:
    """CURE: begins with a network that was trained without attacks, and averages it in its own way."""
    for teacher in _taught(start).values():
        start.model.load_state_dict(teacher.state_dict())
    return {"average": pat.snapshot(start.model)}


def _revised(run: "Run", step: Step) -> Result:
    """CURE's gradients; as a base of another objective, its loss alone."""
    if run.settings.method.objective != "cure":
        return _backward(run, step)
    own = {name: value for name, value in beside(run.settings.method).items() if name not in ("update_share", "decay")}
    return step(run.model, function=cure_gradients, **own)


def _now_and_then(run: "Run") -> Kept:
    chosen = beside(run.settings.method)
    if torch.rand((), generator=run.sources.mixes) >= chosen["update_share"]:
        return run.kept
    decay = min(1 - 1 / (run.step + 1), chosen["decay"])
    return {"average": pat.ema_update(run.kept["average"], run.model, decay=decay, buffers="keep")}


def _second_network(start: Start) -> Kept:
    second = start.settings.network.second
    return {"teacher": start.network(seed=1, **({} if second is None else {"model": second})).train()}


# ADR, IKL, PIAT, Free-AT ------------------------------------------------------------------------------------------


def _rectified(run: "Run", step: Step, index: Tensor) -> Given:  # noqa: ARG001
    """Temperature and trust on their way."""
    chosen = beside(run.settings.method)
    total = run.settings.optimisation.epochs * run.steps_per_epoch
    given = {}
    for name, first in (("temperature", 2.5), ("trust", 0.7)):
        start = _own(run, step).get(name, first)
        given[name] = schedules.cosine_between(run.step, steps=total, start=start, end=chosen[f"{name}_end"])
    return given, run.kept


def _even_table(start: Start) -> Kept:
    classes = start.parts.classes
    return {"table": torch.full((classes, classes), 1 / classes), "sums": torch.zeros(classes, classes)}


def _class_weights(run: "Run", step: Step, index: Tensor) -> Given:  # noqa: ARG001
    return ({} if "table" in step.keywords else dict(run.kept)), run.kept


def _new_table(run: "Run") -> Kept:
    if run.accelerator.num_processes > 1:
        distributed.all_reduce(run.kept["sums"])
    table = class_table(run.kept["sums"], run.kept["table"])
    return {"table": table, "sums": torch.zeros_like(table)}


def _epoch_start(start: Start) -> Kept:
    return {"start": pat.snapshot(start.model)}


def _back_to_the_start(run: "Run") -> Kept:
    """PIAT: at the end of an epoch, some of the way back to its first weights."""
    past = run.epoch - beside(run.settings.method)["warmup"]
    if past >= 0:
        run.bare.load_state_dict(pat.ema_update(run.kept["start"], run.model, decay=schedules.piat_decay(past)))
    return {"start": pat.snapshot(run.model)}


def _perturbation(start: Start) -> Kept:
    rows = start.settings.optimisation.batch // start.accelerator.num_processes
    return {"delta": torch.zeros(rows, *start.parts.shape)}


def _free(run: "Run", step: Step) -> Result:
    """Free-AT: one gradient for the weights and for the perturbation, which outlives the batch."""
    x, delta, threat = step.views[0], run.kept["delta"], threat_of(run.settings.threat)
    x_adv = threat.project(x + delta, x).requires_grad_()
    loss = cross_entropy(run.model(x_adv), step.labels).mean()
    run.accelerator.backward(loss)
    assert x_adv.grad is not None
    moved = x_adv.detach() + run.settings.threat.step_size * threat.steepest(x_adv.grad)
    delta.copy_(threat.project(moved, x) - x)
    return loss, {"cross_entropy": loss.detach()}


COMPANIONS = {
    "te": Companion(_ensemble, _temporal),
    "mma": Companion(_margins, _max_margin),
    "hat": Companion(_taught, _teaching),
    "kd": Companion(_taught, _teaching),
    "adr": Companion(supply=_rectified),
    "cure": Companion(_own_average, _teaching, _revised, _now_and_then),
    "ikl": Companion(_even_table, _class_weights, closed=_new_table),
    "lbgat": Companion(_second_network, _teaching),
    "piat": Companion(_epoch_start, closed=_back_to_the_start),
}
"""The companions of objectives, also where these are the base of another."""


def companion_of(settings: Settings) -> Companion:
    """The companion of a method; one that does nothing where it needs none."""
    if settings.threat.attack == "free":
        return Companion(_perturbation, backward=_free)
    return COMPANIONS.get(_owner(settings.method) or "", Companion())


def _owner(method: Method) -> str | None:
    """Which of a method's objectives has a companion."""
    return next((name for name in parts(method) if name in COMPANIONS), None)


def _own(run: "Run", step: Step) -> dict[str, Any]:
    """The keywords that the owner of the companion was given; as a base it has none, because names are shared."""
    return step.keywords if _owner(run.settings.method) == run.settings.method.objective else {}


def supplied(run: "Run", step: Step, index: Tensor) -> Kept:
    """Hand the step what its method keeps; gives what is kept from now on."""
    given, kept = companion_of(run.settings).supply(run, step, index)
    step.attack = given.pop("attack", step.attack)
    if given and _owner(run.settings.method) != run.settings.method.objective:
        step.keywords["base"] = _bound(step.keywords["base"], given)
    else:
        step.keywords |= given
    return kept


def _bound(base: Any, given: dict[str, Any]) -> Any:
    """The base with keywords of its own, or DICAR on it."""
    if isinstance(base, functools.partial) and "base" in base.keywords:
        return functools.partial(base, base=_bound(base.keywords["base"], given))
    return functools.partial(getattr(objectives, base) if isinstance(base, str) else base, **given)


# What is kept, as tensors -----------------------------------------------------------------------------------------


def begun(start: Start) -> Kept:
    """What a method keeps before the first step, on the run's device."""
    device = start.accelerator.device
    kept = companion_of(start.settings).begin(start)
    return {
        name: {key: part.to(device) for key, part in value.items()} if isinstance(value, dict) else value.to(device)
        for name, value in kept.items()
    }


def trained_along(kept: Kept) -> list[nn.Parameter]:
    """Parameters of other networks that the optimiser moves too."""
    found = [value for value in kept.values() if isinstance(value, nn.Module)]
    return [parameter for network in found for parameter in network.parameters() if parameter.requires_grad]


def share_gradients(run: "Run") -> None:
    """The mean over all processes of gradients that did not pass through the distributed wrapper."""
    if run.accelerator.num_processes == 1:
        return
    method = run.settings.method
    around = run.settings.network.dummies or method.objective == "cure" or method.perceive not in (None, "logits")
    for parameter in [*(run.bare.parameters() if around else ()), *trained_along(run.kept)]:
        if parameter.grad is not None:
            parameter.grad.copy_(run.accelerator.reduce(parameter.grad, "mean"))


def statistics(run: "Run") -> Iterator[Tensor]:
    """Batch norm's statistics among what is kept, which each process collects from its own batches."""
    names = dict(run.bare.named_buffers())
    for value in run.kept.values():
        if isinstance(value, nn.Module):
            yield from value.buffers()
        elif isinstance(value, dict):
            yield from (value[name] for name in names)


def flat_state(kept: Kept) -> dict[str, Tensor]:
    """Everything that is kept as tensors by name."""
    tensors: dict[str, Tensor] = {}
    for name, value in kept.items():
        held = value.state_dict() if isinstance(value, nn.Module) else value
        tensors |= {f"{name}/{key}": part for key, part in held.items()} if isinstance(held, dict) else {name: held}
    return tensors


def refilled(kept: Kept, tensors: dict[str, Tensor]) -> Kept:
    """The same with the values that `flat_state` wrote down."""
    with torch.no_grad():
        for name, own in flat_state(kept).items():
            own.copy_(tensors[name])
    return kept
