"""What a run leaves behind for people: accuracies, where they came from, and on what they were chosen."""

import functools
import os
import platform
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
from perceptual_at.commands.settings import Settings
from perceptual_at.commands.steps import threat_of
from perceptual_at.data import TensorImages


def measure(
    accelerator: Accelerator, settings: Settings, model: nn.Module, weights: Weights, images: TensorImages, steps: int
) -> pat.Evaluation:
    """Clean and PGD accuracy of a model with the given weights, the same for any number of processes.

    Every process takes a share of the batches; the noise of a sample's attack follows from its index alone.
    """
    attack = functools.partial(
        pat.pgd, threat=threat_of(settings.threat), steps=steps, step_size=settings.threat.step_size
    )
    batches = torch.split(torch.arange(len(images)), settings.evaluation.eval_batch)
    mine, verdicts = batches[accelerator.process_index :: accelerator.num_processes], []
    if mine:
        with pat.frozen(model):
            part = pat.evaluate(
                functools.partial(pat.call_with, model, weights), ((*images[rows], rows) for rows in mine),
                {"pgd": attack}, device=accelerator.device, progress=False, seed=settings.running.seed,
            )  # fmt: skip
        verdicts = [(torch.cat(mine), part.correct, part.robust["pgd"])]
    index, correct, robust = (torch.cat(parts) for parts in zip(*gather_object(verdicts), strict=True))
    order = index.argsort()
    return pat.Evaluation(correct[order], {f"pgd{steps}": robust[order]})


def percent(result: pat.Evaluation) -> dict[str, float]:
    """An evaluation in percent; `mean` and `nrr` are those of clean and PGD accuracy."""
    accuracies = {"clean": result.clean_accuracy, **result.robust_accuracy, "mean": result.mean, "nrr": result.nrr}
    return {"n": len(result), **{name: round(100 * value, 4) for name, value in accuracies.items()}}


def made_by(accelerator: Accelerator, settings: Settings) -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    packages = ("torch", "torchvision", "accelerate", "safetensors", "tyro")
    device = accelerator.device
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(), "perceptual_at": pat.__version__,
            **{name: metadata.version(name) for name in packages},
        },
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "processes": accelerator.num_processes, "precision": settings.running.precision,
        },
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the code, with a mark where files differ from it; None outside a clone."""
    home = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", home, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
