"""Tables of `examples/segmentation.py`: the arms, their differences seed by seed, and how strong the attacks are."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_table import GAP, spread, table

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from evidence import numbers

Run = dict[str, Any]
ATTACKS = {"pgd": "PGD", "segpgd": "SegPGD", "cospgd": "CosPGD"}
PAIRS = (
    ("PGD-AT + RPAT", "PGD-AT"), ("RAAT, per sample", "PGD-AT"), ("RAAT, per place", "PGD-AT"),
    ("RAAT, per place", "RAAT, per sample"),
)  # fmt: skip


def values(run: Run, arm: str, score: str) -> list[float]:
    """One number per seed."""
    return [found[score]["value"] for found in run["runs"][arm]]


def scores(run: Run) -> str:
    """Means and deviations of all arms."""
    heads = {"clean": "clean", **ATTACKS, "worst": "worst of each canvas"}
    parts = []
    for unit, names in (("pixels", list(heads)), ("mIoU", ["clean", *ATTACKS])):
        rows = [(arm, *(spread(values(run, arm, f"{name} {unit}")) for name in names)) for arm in run["runs"]]
        parts.append(table((f"{unit}, %", *(heads[name] for name in names)), rows))
    where, settings = run["where"], run["settings"]
    parts.append(
        f"Means ± standard deviations over {settings['seeds']} seeds. {settings['steps']} training steps, "
        f"{settings['attack_steps']} attack steps, {settings['canvases']} canvases of the test; torch "
        f"{where['torch']}, {where['machine']}, {where['threads']} thread."
    )
    return "\n\n".join(parts)


def differences(run: Run) -> str:
    """What one arm has more than another with the same seed, and the 95 % interval of Student's t."""
    columns = {"clean mIoU": "clean, mIoU", "pgd mIoU": "PGD, mIoU", "worst pixels": "worst of each canvas, pixels"}
    rows = []
    for arm, other in PAIRS:
        apart = [
            [a - b for a, b in zip(values(run, arm, column), values(run, other, column), strict=True)]
            for column in columns
        ]
        rows.append((f"{arm}, beside {other}", *map(interval, apart)))
    return table(("points more", *columns.values()), rows)


def attacks(run: Run) -> str:
    """How much an attack leaves beside PGD: below 0 it is stronger."""
    rows = []
    for arm in run["runs"]:
        means = {
            (name, unit): statistics.mean(values(run, arm, f"{name} {unit}"))
            for name in ATTACKS for unit in ("pixels", "mIoU")
        }  # fmt: skip
        rows.append((
            arm,
            *(f"{means[name, unit] - means['pgd', unit]:+.2f}"
              for unit in ("pixels", "mIoU") for name in ("segpgd", "cospgd")),
        ))  # fmt: skip
    return table(("trained by", "SegPGD, pixels", "CosPGD, pixels", "SegPGD, mIoU", "CosPGD, mIoU"), rows)


def interval(apart: list[float]) -> str:
    """Mean and half of the interval, in bold where it leaves out 0."""
    found = numbers.t_interval(apart)
    shown = f"{found.mean:+.2f}{GAP}±{GAP}{found.half:.2f}"
    return f"**{shown}**" if abs(found.mean) > found.half else shown


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    "segmentation": ("segmentation", scores),
    "segmentation_differences": ("segmentation", differences),
    "segmentation_attacks": ("segmentation", attacks),
}
