"""Evaluate any model, or whole run folders, under named attacks; killed at any moment, the same call goes on.

    perceptual-at evaluate --run runs/rpat-0 runs/rpat-1 --attacks pgd20 cw20 aa
    perceptual-at evaluate --model "my_package.models:build(3, wide=True)" --checkpoint model.pt --data digits
    perceptual-at evaluate --model robustbench:Wong2020Fast --root data --samples 1000
    torchrun --nproc-per-node 4 -m -- perceptual_at evaluate --run runs/rpat-0  # processes share the samples

A run folder is enough: network, weights, images and threat come from its result.json, best and final weights are both
evaluated. `--model module:function(...)` imports code, also from the working folder. Reports are report.json and
report.md, with the verdicts so far in a record (record-*.jsonl): below the run folder, or in `--out`.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import data
from perceptual_at.checkpoints import load_weights, weights_checksum, written_whole
from perceptual_at.commands import networks
from perceptual_at.commands.endings import Stopped, locked, said
from perceptual_at.commands.images import Images, batches, fingerprint, images_of, shape_of
from perceptual_at.commands.protocol import described, named_attack, takes_steps
from perceptual_at.commands.reading import parse
from perceptual_at.commands.settings import Budget, Data, Network, settings_from
from perceptual_at.commands.sharing import Processes, join, joined_processes, name_of, part_path
from perceptual_at.commands.steps import LANES, threat_of
from perceptual_at.commands.words import Amount, Number, option


@dataclasses.dataclass(frozen=True)
class Models:
    """What is evaluated."""

    run: tuple[Path, ...] = ()
    """Folders of finished runs."""
    which: Literal["both", "best", "final"] = "both"
    """Which weights of a run."""
    model: str | None = None
    """Instead of runs: `module:function(...)` with literals (imports code), `torchvision:NAME`, `timm:NAME`, a network
    of this package, or `robustbench:NAME`."""
    checkpoint: Path | None = None
    """Weights for --model: a safetensors file, or a state dict saved by torch."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """On which images."""

    data: Literal["cifar10", "cifar100", "tiny_imagenet", "folder", "tars", "npz", "digits", "random"] | None = None
    """The images; a run's own, or CIFAR-10, if left out."""
    root: Path | None = None
    """Where they are; where the run had them, or `data`, if left out."""
    split: str = "test"
    """Which part of them."""
    samples: Amount = None
    """How many, as a count or a share, of every class in proportion; all if left out."""
    stream: bool = False
    """Leave the images on the disk (folder)."""
    size: tuple[int, ...] = ()
    """Side of the images, or height and width (folder, tars)."""
    grey: bool = False
    """One channel instead of three (folder, tars)."""
    skip_damaged: bool = False
    """Leave out images that cannot be read, with a count and their names (folder, tars)."""
    layout: Literal["channels_first", "channels_last"] | None = None
    """Where the channels of an archive are, if its shape does not tell (npz)."""
    workers: int = 2
    """Processes that decode streamed images."""


@dataclasses.dataclass(frozen=True)
class Threats:
    """Under which threat."""

    norm: Literal["linf", "l2", "l1"] | None = None
    """Norm of the perturbation; the run's own, or linf."""
    eps: Number | None = None
    """Budget in input units; the run's own, or 8/255."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """By which attacks, and how."""

    attacks: tuple[str, ...] = ("pgd20", "cw20", "aa")
    """fgsm, pgd, cw, apgd (pgd20 is PGD with 20 steps), fab, square, aa."""
    step_size: Number | None = None
    """Length of a step of pgd and cw; 2.5 eps over their steps if left out."""
    batch: int = 250
    """Samples at a time."""
    lane: Literal["none", "fp32", "bf16"] = "none"
    """Run the attacks on a copy of the model that costs less, in float32 or bfloat16; the model itself judges."""
    seed: int = 0
    """Of the attacks' noise, and of the choice of --samples."""
    cascade: bool = False
    """Worst case only: what one attack has broken, the next ones leave out."""
    repeats: int = 1
    """How often a random model is asked for each verdict."""
    checks: bool = False
    """Run the sanity checks too."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where it runs and writes."""

    against: Path | None = None
    """The report.json of another model on the same samples, to compare with."""
    cpu: bool = False
    """Stay on the CPU where there is an accelerator."""
    out: Path | None = None
    """Folder for the report; `evaluation` below a run's own folder, else `outputs/evaluate`."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """Everything that can be wished for."""

    models: Models = Models()
    images: Samples = Samples()
    threat: Threats = Threats()
    evaluation: Measures = Measures()
    running: Places = Places()


@dataclasses.dataclass(frozen=True)
class Target:
    """One model to evaluate: how to make it, on what, where the report goes."""

    name: str
    made: Callable[[Images], nn.Module]
    images: Data
    threat: pat.Threat
    out: Path


def check(wishes: Wishes) -> None:
    """Refuse wishes that contradict each other.

    Raises:
        ValueError: if they do.
    """
    if bool(wishes.models.run) == (wishes.models.model is not None):
        raise ValueError("give either --run FOLDER ... or --model.")
    if wishes.models.checkpoint is not None and wishes.models.model is None:
        raise ValueError("--checkpoint goes with --model; a run has weights of its own.")
    for name in ("batch", "repeats"):
        if getattr(wishes.evaluation, name) < 1:
            raise ValueError(f"{option(name)} must be at least 1, got {getattr(wishes.evaluation, name)}.")
    if not wishes.evaluation.attacks:
        raise ValueError("--attacks must name at least one attack.")
    for name in wishes.evaluation.attacks:
        takes_steps(name)
    if wishes.evaluation.step_size is not None:
        if not wishes.evaluation.step_size > 0:
            raise ValueError(f"--step-size must be above 0, got {wishes.evaluation.step_size:g}.")
        if not any(map(takes_steps, wishes.evaluation.attacks)):
            raise ValueError(f"--step-size has no effect with --attacks {' '.join(wishes.evaluation.attacks)}.")
    if wishes.running.against is not None:
        report_at(wishes.running.against)


# What to evaluate ---------------------------------------------------------------------------------------------------


def targets_of(wishes: Wishes) -> list[Target]:
    """Every model that was asked for."""
    if wishes.models.model is not None:
        budget = _under(Budget(), wishes.threat)
        chosen = _with_wishes(Data(), wishes.images)
        out = wishes.running.out or Path("outputs/evaluate")
        return [Target(wishes.models.model, _maker(wishes, chosen), chosen, threat_of(budget), out)]
    if wishes.running.out is not None and len(wishes.models.run) > 1:
        raise ValueError("--out is for one run; the reports of several go below their folders.")
    names = ("best", "final") if wishes.models.which == "both" else (wishes.models.which,)
    return [_of_run(folder, name, wishes) for folder in wishes.models.run for name in names]


def _of_run(folder: Path, name: str, wishes: Wishes) -> Target:
    """Weights of a finished run, with everything else as its result.json says."""
    record = read_result(folder)
    left_out = ("out", "resume", "extend", "change", "track", "init", "save_every")
    try:
        settings = settings_from({key: value for key, value in record["settings"].items() if key not in left_out})
    except ValueError as error:
        raise ValueError(f"`{folder / 'result.json'}`: {error}") from error
    channels, height, width = record["shape"]

    def made(images: Images) -> nn.Module:  # noqa: ARG001
        task = networks.Task(channels, record["classes"], torch.zeros(2, channels, height, width))
        model = networks.network(settings.network, task, seed=settings.running.seed)
        load_weights(model, folder / f"{name}.safetensors")
        return model

    out = (wishes.running.out or folder / "evaluation") / name
    return Target(
        f"{folder} ({name})",
        made,
        _with_wishes(settings.data, wishes.images),
        threat_of(_under(settings.threat, wishes.threat)),
        out,
    )


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run.

    Raises:
        ValueError: if there is none, or it is damaged or of an older form.
    """
    path = folder / "result.json"
    if not folder.is_dir():
        raise ValueError(f"there is no folder `{folder}`.")
    if not path.is_file():
        going = "its run is not finished; go on with --resume" if (folder / "states").is_dir() else "no run wrote it"
        raise ValueError(f"`{folder}` holds no result.json: {going}.")
    again = "`perceptual-at train ... --resume` writes it again."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is damaged ({error}); {again}") from error
    if not isinstance(record, dict):
        raise ValueError(f"`{path}` is damaged (it holds {type(record).__name__}); {again}")
    if missing := [name for name in ("settings", "shape", "classes", "best", "final") if name not in record]:
        raise ValueError(f"`{path}` lacks {', '.join(missing)}; {again}")
    shape = record["shape"]
    fitting = {
        "settings": isinstance(record["settings"], dict),
        "shape": isinstance(shape, list) and len(shape) == 3 and all(isinstance(side, int) for side in shape),
        "classes": isinstance(record["classes"], int),
        **{name: isinstance(record[name], dict) and isinstance(record[name].get("test"), dict)
           for name in ("best", "final")},
    }  # fmt: skip
    if wrong := [name for name, fits in fitting.items() if not fits]:
        raise ValueError(f"`{path}` is damaged in {', '.join(wrong)}; {again}")
    return record


def _under(own: Budget, wishes: Threats) -> Budget:
    """The threat of a run, or another where the words say so; a budget of 0 is one."""
    eps = own.eps if wishes.eps is None else wishes.eps
    return dataclasses.replace(own, norm=wishes.norm or own.norm, eps=eps)


def _with_wishes(own: Data, wishes: Samples) -> Data:
    """The images of a run, or others where the words say so."""
    plain = Samples()
    changes = {
        name: getattr(wishes, name) for name in ("data", "root", "stream", "size", "grey", "skip_damaged", "layout")
        if getattr(wishes, name) != getattr(plain, name)
    }  # fmt: skip
    base = own if wishes.data in (None, own.data) else Data()
    return dataclasses.replace(base, download=False, **changes)


def _maker(wishes: Wishes, chosen: Data) -> Callable[[Images], nn.Module]:
    """What makes the model that --model names."""

    def made(images: Images) -> nn.Module:
        name = wishes.models.model or ""
        if name.startswith("robustbench:"):
            model = _of_robustbench(name.partition(":")[2], wishes, chosen)
        else:
            classes = len(images.classes) if images.classes else int(images.labels.max()) + 1
            task = networks.Task(shape_of(images)[0], classes, torch.zeros(2, *shape_of(images)))
            model = networks.network(Network(model=name), task, seed=0)
        if wishes.models.checkpoint is not None:
            load_weights(model, wishes.models.checkpoint)
        return model

    return made


def _of_robustbench(name: str, wishes: Wishes, chosen: Data) -> nn.Module:
    """A model of RobustBench's zoo, which downloads its weights."""
    norm = {"linf": "Linf", "l2": "L2"}.get(wishes.threat.norm or "linf")
    if norm is None:
        raise ValueError("--norm must be linf or l2 for models of RobustBench.")
    try:
        zoo = importlib.import_module("robustbench.utils")
    except ImportError as error:
        raise ImportError(f"--model robustbench:NAME needs the package robustbench; install it ({error}).") from error
    model: nn.Module = zoo.load_model(name, model_dir=str(chosen.root), dataset=chosen.data, threat_model=norm)
    return model


# Evaluating ---------------------------------------------------------------------------------------------------------


def evaluated(target: Target, wishes: Wishes, processes: Processes) -> pat.Evaluation | None:
    """The report on one target, written and given by the leading process."""
    protocol, threat = wishes.evaluation, target.threat
    attacks = {name: named_attack(name, threat, step_size=protocol.step_size) for name in protocol.attacks}
    images = images_of(target.images, wishes.images.split)
    present = torch.accelerator.is_available() and not wishes.running.cpu  # a build for CUDA names it without one
    device = (torch.accelerator.current_accelerator() if present else None) or torch.device("cpu")
    model = target.made(images).to(device)
    weights, leader = weights_checksum(model), processes.rank == 0
    rows = torch.split(chosen_rows(images, wishes), protocol.batch)
    whole = target.out / name_of(weights, fingerprint(images), wishes.images.samples, threat, _decisive(protocol))

    def judged(rows: Sequence[Tensor], record: Path, *, checks: bool) -> pat.Evaluation:
        served = batches(images, rows, workers=wishes.images.workers)
        return pat.evaluate(
            model, ((x, labels, index) for index, (x, labels) in zip(rows, served, strict=True)), attacks,
            device=device, progress=leader and sys.stderr.isatty(), seed=protocol.seed, cascade=protocol.cascade,
            repeats=protocol.repeats, checks=checks, classes=images.classes, lane=LANES[protocol.lane], record=record,
        )  # fmt: skip

    with locked(target.out, "--out") if leader else contextlib.nullcontext():
        part, mine = part_path(whole, processes), rows[processes.rank :: processes.ranks]
        if mine and processes.ranks > 1:
            judged(mine, part, checks=False)
        processes.meet()
        if not leader:
            return None
        join(whole)
        result = judged(rows, whole, checks=protocol.checks)
        result = dataclasses.replace(result, provenance={**result.provenance, "weights": weights})
        write_result(result, target, wishes)
    return result


def _decisive(protocol: Measures) -> Measures:
    """The part of the protocol that verdicts depend on."""
    return dataclasses.replace(protocol, batch=Measures.batch, checks=False)


def chosen_rows(images: Images, wishes: Wishes) -> Tensor:
    """Which samples: all, or a choice with the same share of every class."""
    amount = wishes.images.samples
    rows = torch.arange(len(images))
    if amount is None or amount == 1.0 or (isinstance(amount, int) and amount >= len(rows)):
        return rows
    return data.hold_out((rows, images.labels), amount, seed=wishes.evaluation.seed)[1][0]


def write_result(result: pat.Evaluation, target: Target, wishes: Wishes) -> None:
    """report.json and report.md."""
    names = wishes.evaluation.attacks
    meant = {name: described(name, target.threat, step_size=wishes.evaluation.step_size) for name in names}
    lines = [f"# {target.name}", "", f"{target.images.data}, {target.threat!r}", "", result.to_markdown()]
    lines += ["", "What the columns mean:", "", *(f"- {name}: {text}" for name, text in meant.items()), ""]
    result.to_json(target.out / "report.json")  # before what else may be wrong
    if wishes.running.against is not None:
        other = report_at(wishes.running.against)
        comparison = pat.compare(result, other, names=("this", "the other"))
        lines += [f"Against {wishes.running.against}:", "", comparison.to_markdown(), ""]
    text = "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # names of files need not be text
    with written_whole(target.out / "report.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text, flush=True)


def report_at(path: Path) -> pat.Evaluation:
    """A report.json, or the one in a folder.

    Raises:
        ValueError: if it is none.
    """
    found = path / "report.json" if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"there is no report `{found}`; `perceptual-at evaluate` writes them.")
    try:
        return pat.Evaluation.from_json(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{found}` is no report of an evaluation ({error}).") from error


def main(wishes: Wishes) -> list[pat.Evaluation | None]:
    """Evaluate everything that was asked for.

    Raises:
        Stopped: if something cannot be evaluated.
    """
    check(wishes)
    with joined_processes(cpu=wishes.running.cpu) as processes:
        try:
            return [evaluated(target, wishes, processes) for target in targets_of(wishes)]
        except NotImplementedError as error:  # torch's: a network without `forward`, an operation a device lacks
            raise Stopped(str(error)) from error


def command(arguments: list[str]) -> None:
    """`perceptual-at evaluate`: settings from the command line, errors as one line."""
    with said("perceptual-at evaluate", "The same call goes on where it stopped."):
        wishes = parse(arguments, Wishes, Wishes(), "perceptual-at evaluate", description=__doc__ or "")
        main(wishes)
