"""What a run leaves behind for people: accuracies, where they came from, and on what they were chosen."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import perceptual_at as pat
from perceptual_at.averaging import Weights
from perceptual_at.commands.ingredients.images import Images, batches
from perceptual_at.commands.ingredients.protocol import described, named_attack, threat_of
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.training.run import Run


def measure(run: Run, model: nn.Module, weights: Weights, images: Images, steps: int) -> pat.Evaluation:
    """Clean and PGD accuracy of a model with the given weights, the same for any number of processes.

    Every process takes a share of the batches; the noise of a sample's attack follows from its index alone.
    """
    settings, accelerator = run.settings, run.accelerator
    name = f"pgd{steps}"
    attack = named_attack(name, threat_of(settings.threat), step_size=settings.evaluation.eval_step_size)
    rows = torch.split(torch.arange(len(images)), settings.evaluation.eval_batch)
    mine, verdicts = rows[accelerator.process_index :: accelerator.num_processes], []
    if mine:
        served = batches(images, mine, workers=settings.data.workers, pinned=accelerator.device.type == "cuda")
        with pat.frozen(model):
            part = pat.evaluate(
                functools.partial(pat.call_with, model, weights),
                ((x, labels, index) for index, (x, labels) in zip(mine, served, strict=True)), {name: attack},
                device=accelerator.device, progress=False, seed=settings.running.seed,
            )  # fmt: skip
        verdicts = [(torch.cat(mine), part.correct.cpu(), part.robust[name].cpu(), list(part.warnings))]
    gathered = gather_object(verdicts)
    index, correct, robust = (torch.cat([one[place] for one in gathered]) for place in range(3))
    order = index.argsort()
    warned = tuple(dict.fromkeys(text for one in gathered for text in one[3]))
    return pat.Evaluation(
        correct[order], {name: robust[order]}, labels=images.labels, classes=images.classes or (), warnings=warned
    )


def protocol(settings: Settings) -> dict[str, str]:
    """What the names of the report's columns mean."""
    threat, chosen = threat_of(settings.threat), settings.evaluation
    return {f"pgd{steps}": described(f"pgd{steps}", threat, step_size=chosen.eval_step_size)
            for steps in (chosen.select_steps, chosen.test_steps)}  # fmt: skip


def percent(result: pat.Evaluation) -> dict[str, float]:
    """An evaluation in percent; `mean` and `nrr` are those of clean and PGD accuracy."""
    accuracies = {"clean": result.clean_accuracy, **result.robust_accuracy, "mean": result.mean, "nrr": result.nrr}
    return {"n": len(result), **{name: round(100 * value, 4) for name, value in accuracies.items()}}


def per_class(result: pat.Evaluation) -> dict[str, dict[str, float]]:
    """The same for each class."""
    return {
        name: {column: round(value if column == "n" else 100 * value, 4) for column, value in numbers.items()}
        for name, numbers in result.per_class().items()
    }


def in_words(scores: dict[str, float]) -> str:
    """Scores in percent on one line."""
    shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if name != "n")
    return f"{shown} (%, n={scores['n']:.0f})"


def made_by(accelerator: Accelerator, settings: Settings) -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    packages = ("torch", "torchvision", "accelerate", "safetensors", "tyro")
    device = accelerator.device
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(), "perceptual_at": pat.__version__,
            **{name: version(name) for name in packages},
        },
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes, "precision": settings.running.precision,
        },
    }  # fmt: skip


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the code, with a mark where files differ from it; None outside a clone."""
    here = Path(__file__)

    def git(*words: str) -> str:
        words = ("git", "-C", str(here.parent), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment may lie in a repository of something else
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
