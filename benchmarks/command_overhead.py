"""What `perceptual-at train` adds to the bare loop over its objective: loading, augmentation, books and log.

    python benchmarks/command_overhead.py --out docs/results/command_overhead.json

Both take the same number of steps of the same objective on noise, with the same attack and optimiser.
The command serves, shifts and mirrors its batches, adds up and logs its terms and counts what it did; the bare loop has
its batches ready.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import begin, parser, save
from timing import compared, interleaved

from perceptual_at.commands.options.method import keywords, objective_named, two_views
from perceptual_at.commands.options.reading import settings_of
from perceptual_at.commands.train import train_epoch
from perceptual_at.commands.training import logs
from perceptual_at.commands.training.batches import rows_of, training_batches
from perceptual_at.commands.training.run import Run, prepare
from perceptual_at.commands.training.steps import attack_of

BARE, COMMAND = "bare loop", "perceptual-at train"
IMAGES = 64  # of --data random


def trained(objective: str, out: Path, *, width: int, batch: int, steps: int) -> Run:
    """A run of the command, ready for its first epoch, which has the given number of steps."""
    words = f"{objective} --data random --held-out {IMAGES - steps * batch} --width {width} --batch {batch} --out {out}"
    return prepare(settings_of(words.split()))


def epoch(run: Run, scalars: logs.Scalars) -> Callable[[], None]:
    """One epoch of the command, over and over again."""

    def go() -> None:
        run.batch, run.sums = 0, {}
        train_epoch(run, scalars)

    return go


def bare(run: Run) -> Callable[[], None]:
    """The same steps on a model of its own, whose batches are ready."""
    settings, model = run.settings, copy.deepcopy(run.bare).train()
    chosen, objective = settings.optimisation, objective_named(settings.method.objective)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay
    )
    served = training_batches(settings, run.parts, rows_of(run.parts, settings, 0), epoch=0, pinned=False)
    ready: list[Any] = [((x,) * (1 + two_views(settings.method)), labels) for x, labels in served]
    attack, options = attack_of(settings.threat, torch.Generator().manual_seed(0)), keywords(settings.method)

    def go() -> None:
        for views, labels in ready:
            optimizer.zero_grad()
            loss, _ = objective(model, views, labels, attack, **options)
            loss.backward()
            optimizer.step()

    return go


def measured(objective: str, rounds: int, size: dict[str, int]) -> dict[str, object]:
    """One row: the command beside the bare loop."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as last:
        run = trained(objective, Path(folder) / "run", **size)
        scalars = logs.Scalars(run)
        last.callback(scalars.close)
        functions = {BARE: bare(run), COMMAND: epoch(run, scalars)}
        return {"name": objective, "ways": compared(interleaved(functions, rounds=rounds, device="cpu"), BARE)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=7)
    options.add_argument("--objectives", nargs="+", default=["pgd_at", "rpat"])
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=3, help="of an epoch")
    options = begin(options, arguments)
    size = {"width": options.width, "batch": options.batch, "steps": options.steps}
    if options.quick:
        size = {"width": 2, "batch": 4, "steps": 2}
    rows = [measured(objective, options.rounds, size) for objective in options.objectives]
    for row in rows:
        print(row["name"], {name: way["ratio_cpu"] for name, way in row["ways"].items()})
    save(options, {"network": "ResNet-18", **size}, rows=rows)


if __name__ == "__main__":
    main()
