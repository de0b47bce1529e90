"""Every option of `evaluate`, in groups."""

import dataclasses
from pathlib import Path
from typing import Literal

from perceptual_at.commands.evaluating.results import report_at
from perceptual_at.commands.ingredients.protocol import takes_steps
from perceptual_at.commands.options.words import Amount, Number, option


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
    download: bool = False
    """Fetch CIFAR if it is not there."""
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


def check(wishes: Wishes) -> None:
    """Refuse wishes that contradict each other.

    Raises:
        ValueError: if they do.
    """
    if bool(wishes.models.run) == (wishes.models.model is not None):
        raise ValueError("give either --run FOLDER ... or --model.")
    if wishes.models.checkpoint is not None and wishes.models.model is None:
        raise ValueError("--checkpoint goes with --model; a run has weights of its own.")
    if wishes.models.model is not None and wishes.models.which != "both":
        raise ValueError("--which has no effect with --model; it is for runs, which have best and final weights.")
    if wishes.models.checkpoint is not None and not wishes.models.checkpoint.is_file():
        raise ValueError(f"--checkpoint: there is no file `{wishes.models.checkpoint}`.")
    if wishes.images.samples is not None and wishes.images.samples <= 0:
        raise ValueError(f"--samples must be a count of at least 1, or a share, got {wishes.images.samples}.")
    for name in ("batch", "repeats"):
        if getattr(wishes.evaluation, name) < 1:
            raise ValueError(f"{option(name)} must be at least 1, got {getattr(wishes.evaluation, name)}.")
    if wishes.images.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {wishes.images.workers}.")
    if not wishes.evaluation.attacks:
        raise ValueError("--attacks must name at least one attack.")
    for name in wishes.evaluation.attacks:
        takes_steps(name)
        if wishes.evaluation.attacks.count(name) > 1:
            raise ValueError(f"--attacks names {name} twice.")
    if wishes.evaluation.step_size is not None:
        if not wishes.evaluation.step_size > 0:
            raise ValueError(f"--step-size must be above 0, got {wishes.evaluation.step_size:g}.")
        if not any(map(takes_steps, wishes.evaluation.attacks)):
            raise ValueError(f"--step-size has no effect with --attacks {' '.join(wishes.evaluation.attacks)}.")
    if wishes.running.against is not None:
        report_at(wishes.running.against)
