"""What is evaluated: a model by its name, or the models of a run folder, each with its images and its threat."""

import dataclasses
import importlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import data
from perceptual_at.checkpoints import load_weights
from perceptual_at.commands.evaluating.results import read_result
from perceptual_at.commands.evaluating.wishes import Samples, Wishes
from perceptual_at.commands.ingredients import networks
from perceptual_at.commands.ingredients.images import Images, shape_of
from perceptual_at.commands.ingredients.protocol import threat_of
from perceptual_at.commands.options.settings import Budget, Data, Network, refuse_long_step, settings_from


@dataclasses.dataclass(frozen=True)
class Target:
    """One model to evaluate: how to make it, on what, where the report goes."""

    name: str
    made: Callable[[Images], nn.Module]
    images: Data
    threat: pat.Threat
    out: Path


def targets_of(wishes: Wishes) -> list[Target]:
    """Every model that was asked for."""
    if wishes.models.model is not None:
        threat = _threat(Budget(), wishes)
        chosen = _with_wishes(Data(), wishes.images)
        out = wishes.running.out or Path("outputs/evaluate")
        return [Target(wishes.models.model, _maker(wishes, chosen), chosen, threat, out)]
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
    there = Path(str(record.get("folder", ""))) / settings.data.root  # as it was called where the run ran
    settings = settings.changed(root=there) if there.exists() else settings
    weights = folder / f"{name}.safetensors"
    if not weights.is_file():
        raise ValueError(f"there is no file `{weights}`; `perceptual-at train ... --resume` writes it again.")
    channels, height, width = record["shape"]

    def made(images: Images) -> nn.Module:
        task = networks.Task(channels, record["classes"], torch.zeros(2, channels, height, width))
        model = networks.network(settings.network, task, seed=settings.running.seed)
        load_weights(model, weights)
        if shape_of(images) != (channels, height, width):
            _try_shape(model, images, folder, record)
        _warn_of_other_classes(images, folder, record)
        return model

    out = (wishes.running.out or folder / "evaluation") / name
    return Target(
        f"{folder} ({name})",
        made,
        _with_wishes(settings.data, wishes.images),
        _threat(settings.threat, wishes),
        out,
    )


def _try_shape(model: nn.Module, images: Images, folder: Path, record: dict[str, Any]) -> None:
    """Refuse images of another shape than those of the training, where the network cannot take them."""
    try:
        with pat.frozen(model) as f, torch.no_grad():
            f(torch.zeros(2, *shape_of(images)))
    except RuntimeError as error:
        raise ValueError(
            f"the network of `{folder}` was trained on images of shape {tuple(record['shape'])} and takes none of "
            f"shape {shape_of(images)}: {error}"
        ) from error


def _warn_of_other_classes(images: Images, folder: Path, record: dict[str, Any]) -> None:
    """Say where the classes of images are called otherwise than those of the training: labels are places in a list."""
    named = record["best"].get("per_class")
    trained, given = list(named) if isinstance(named, dict) else [], list(images.classes or ())
    if given and len(trained) == record["classes"] and trained != [str(label) for label in range(len(trained))]:
        differing = [f"{new!r} for {old!r}" for old, new in itertools.zip_longest(trained, given) if new != old]
        if differing:
            warnings.warn(
                f"the classes of these images are not called as those that `{folder}` was tested on: "
                f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}. Do labels mean the same?",
                stacklevel=1,
            )


def _threat(own: Budget, wishes: Wishes) -> pat.Threat:
    """The threat of a run, or another where the words say so; a budget of 0 is one. The step has to fit it."""
    eps = own.eps if wishes.threat.eps is None else wishes.threat.eps
    chosen = dataclasses.replace(own, norm=wishes.threat.norm or own.norm, eps=eps)
    refuse_long_step("step_size", wishes.evaluation.step_size, chosen.norm)
    return threat_of(chosen)


def _with_wishes(own: Data, wishes: Samples) -> Data:
    """The images of a run, or others where the words say so."""
    plain = Samples()
    changes = {
        name: getattr(wishes, name) for name in ("data", "root", "stream", "size", "grey", "skip_damaged", "layout")
        if getattr(wishes, name) != getattr(plain, name)
    }  # fmt: skip
    base = own if wishes.data in (None, own.data) else Data()
    chosen = dataclasses.replace(base, download=wishes.download, **changes)
    if wishes.root is not None and not chosen.on_disk:
        raise ValueError(
            f"--root has no effect with --data {chosen.data}, which reads no files; all other data are read."
        )
    if wishes.workers != plain.workers and not chosen.streams:
        raise ValueError(
            f"--workers has no effect with --data {chosen.data}, whose images are held in memory; it is for streamed "
            "images, --data tars, or folder with --stream."
        )
    return chosen


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
            networks.load(model, wishes.models.checkpoint)
        elif name in networks.OWN or (
            name.startswith(("torchvision:", "timm:")) and "weights" not in name and "pretrained" not in name
        ):
            warnings.warn(f"--model {name} without --checkpoint has random weights.", stacklevel=1)
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


def chosen_rows(images: Images, wishes: Wishes) -> Tensor:
    """Which samples: all, or a choice with the same share of every class."""
    amount = wishes.images.samples
    rows = torch.arange(len(images))
    if amount is None or amount >= (len(rows) if isinstance(amount, int) else 1.0):
        return rows
    try:
        return data.hold_out((rows, images.labels), amount, seed=wishes.evaluation.seed)[1][0]
    except ValueError as error:
        raise ValueError(f"--samples: {error}") from error
