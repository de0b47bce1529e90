"""What a run says while it runs: one line an epoch, a bar on a terminal, TensorBoard, further trackers."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import perceptual_at as pat
from perceptual_at import diagnostics
from perceptual_at.checkpoints import written_whole
from perceptual_at.commands.ingredients.images import batches
from perceptual_at.commands.ingredients.protocol import threat_of
from perceptual_at.commands.training.run import Run

SHOWN_EVERY = 20  # steps between two looks at the loss terms, each of which waits for the device
LOOKED_AT = 256  # images whose groups and perception are looked at after every epoch


class Scalars:
    """TensorBoard and further trackers of the leading process; nothing in the others.

    On the disk is everything up to the newest saved state: `flush` comes before each of them, and a run that goes on
    purges what it had logged after it.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.writer = run, None
        if run.settings.running.track:
            flat = {name: value if isinstance(value, (int, float, str, bool)) else str(value)
                    for name, value in run.settings.flat().items()}  # fmt: skip
            run.accelerator.init_trackers("perceptual-at", config=flat)
        if run.leader:
            folder = run.settings.running.out / "tensorboard"
            _wait_for_a_later_name(folder)
            self.writer = SummaryWriter(folder, purge_step=run.step + 1)

    def add(self, kind: str, values: dict[str, float], step: int) -> None:
        """Numbers of one step, under `kind/name`."""
        if self.writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)
        if self.run.settings.running.track:
            self.run.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        """Everything so far onto the disk."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End of the run."""
        if self.writer is not None:
            self.writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Files of events are read in the order of their names, which begin with the second they were made in."""
    seconds = [name.name.split(".")[3] for name in folder.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in seconds if second.isdigit()), default=0)
    while newest <= time.time() < newest + 1:
        time.sleep(0.05)


def bar_of(run: Run, total: int) -> Any:
    """A bar over the steps of an epoch, on a terminal only."""
    epochs = run.settings.optimisation.epochs
    return tqdm(
        total=total, initial=run.batch, desc=f"epoch {run.epoch + 1}/{epochs}", unit="step", leave=False,
        disable=not (run.leader and sys.stderr.isatty()),
    )  # fmt: skip


def line_of(entry: dict[str, Any], selected_on: str, epochs: int) -> str:
    """One epoch on one line: terms, scores, time, remaining time, images a second."""
    terms = ", ".join(f"{name} {value:.3f}" for name, value in entry["terms"].items())
    scores = ", ".join(f"{name} {value:.2f}" for name, value in entry[selected_on].items()
                       if name not in ("n", "mean", "nrr"))  # fmt: skip
    best = "  best" if entry["best"] else ""
    return (
        f"epoch {entry['epoch']:3d}/{epochs}  {terms}  {selected_on}: {scores}  lr {entry['learning_rate']:.3g}  "
        f"{duration(entry['epoch_seconds'])}, {duration(entry['remaining_seconds'])} left, "
        f"{entry['images_per_second']:.0f} images/s{best}"
    )


def duration(seconds: float) -> str:
    """Seconds for people: `41 s`, `5:03 min`, `2:07 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def looks(run: Run) -> dict[str, dict[str, float]]:
    """Who is misclassified, at the boundary, inside, and how far perception moves, on a few images of the selection.

    Every process computes the same; the weights are those that are measured.
    """
    settings = run.settings
    count = min(LOOKED_AT, len(run.parts.select))
    rows = torch.linspace(0, len(run.parts.select) - 1, count).round().long()
    device = run.accelerator.device
    ((x, labels),) = batches(run.parts.select, [rows], workers=0)
    x, labels = x.to(device), labels.to(device)
    threat, seed = threat_of(settings.threat), settings.running.seed
    weights, model = run.evaluated(), run.measured
    with pat.frozen(model):

        def f(inputs: Tensor) -> Tensor:
            return pat.call_with(model, weights, inputs)

        def attacked(size: float) -> Tensor:
            noise = pat.SampleGenerator(seed, rows.to(device))
            return pat.pgd(f, x, labels, threat.scaled(size), steps=settings.evaluation.select_steps, generator=noise)

        x_adv, reduced = attacked(1.0), attacked(settings.method.eta or 0.1)
        with torch.no_grad():
            parts = pat.boundary_partition(f(x), f(reduced), labels, adv_logits=f(x_adv))
        gap = diagnostics.perception_gap(f, [(x, labels)], lambda model, x, labels: x_adv)  # noqa: ARG005
    shares = {name: mask.float().mean().item() for name, mask in parts._asdict().items()}
    moved = {"success_mse": gap.success, "failure_mse": gap.failure}
    return {
        "groups": shares,
        "perception": {name: value for name, value in moved.items() if value is not None},
    }


def write_log(run: Run) -> None:
    """The log, one line of JSON per epoch."""
    with written_whole(run.settings.running.out / "log.jsonl") as path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in run.log))
