"""Clean against robust accuracy of the evidence benchmark, with an arrow from each control to what is tested.

python docs/figures/evidence_figure.py
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import HERE, SMALL, Scheme, arrow, sheet, write

from perceptual_at import plotting

sys.path.append(str(HERE.parents[1] / "benchmarks"))
from evidence import numbers
from evidence.design import ARMS, REGIMES

RECORDED = HERE.parent / "results" / "cifar10_evidence.json"
ARROWS = {
    "pgd_at": ("rpat_weight_0", "pgd_at_two_views"),
    "rpat_weight_0": ("rpat_release", "rpat_eq3"),
    "pgd_at_two_views": ("raat", "consistency_at"),
    "consistency_at": ("consistency_at_rpat",),
}
NAMES = {"all": "49,000 images", "small": "8,000 images"}
PLANE = ("clean", "pgd20")


class Place(NamedTuple):
    """Where an arm is drawn, in clean and PGD-20 accuracy, and half the interval of its difference to the control."""

    at: tuple[float, ...]
    halves: tuple[float, ...] | None


def places(record: dict, regime: str) -> dict[str, Place]:
    """Each arm's place: its control's, moved by the mean of the differences seed by seed.

    Arms that have the same seeds stand where their own means are. While some have fewer, their means would mix what the
    method does with what the missing seeds do. An arm whose control has no run stands at its own.
    """
    runs = numbers.finished(record)
    control_of = {arm: control for control, tested in ARROWS.items() for arm in tested}
    found: dict[str, Place] = {}
    for arm in dict.fromkeys((*ARROWS, *ARMS)):  # controls first, each behind its own
        control = control_of.get(arm)
        own = [numbers.scores(runs, regime, arm, column) for column in PLANE]
        if not own[0]:
            continue
        if control not in found:
            found[arm] = Place(tuple(map(statistics.mean, own)), None)
            continue
        pairs = [numbers.pairs(runs, regime, arm, control, column) for column in PLANE]
        moved = [numbers.t_interval([pair.difference for pair in column]) for column in pairs if column]
        if moved:
            halves = tuple(one.half for one in moved) if len(pairs[0]) > 1 else None
            found[arm] = Place(tuple(a + one.mean for a, one in zip(found[control].at, moved, strict=True)), halves)
    return found


def before(ax: Axes, start: Sequence[float], end: Sequence[float]) -> list[tuple[float, float]]:
    """Where the head of an arrow is."""
    here, there = ax.transData.transform([start, end])
    way = (here - there) / np.linalg.norm(here - there)
    return [tuple(place) for place in ax.transData.inverted().transform([there + 10 * way, there + 18 * way])]


def draw(scheme: Scheme, record: dict) -> Figure:
    """One panel for each regime that has runs."""
    panels = {regime: found for regime in REGIMES if (found := places(record, regime))}
    figure = sheet(470 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    colours = (scheme.blue, scheme.orange, scheme.green, scheme.purple)
    colour_of = dict(zip(ARROWS, colours, strict=True))
    for ax, (regime, found) in zip(axes, panels.items(), strict=True):
        plotting.trade_off({ARMS[arm].title: [place.at] for arm, place in found.items()}, ax=ax)
        ax.get_legend().remove()
        ax.set_title(NAMES[regime], fontsize=SMALL, loc="left")
        for marks in ax.collections:
            if hasattr(marks, "levels"):
                marks.set(edgecolor=scheme.faint, linewidth=1.2)
                for text in marks.labelTexts:
                    text.set(color=scheme.muted, fontsize=SMALL)
            else:
                marks.set(facecolor=scheme.text, edgecolor=scheme.paper, sizes=[90])
        heads = []
        for control, tested in ARROWS.items():
            colour = colour_of[control]
            for arm in tested:
                if control in found and arm in found:
                    start, (end, halves) = found[control].at, found[arm]
                    arrow(ax, start, end, colour, shrinkA=6, shrinkB=7)
                    heads += before(ax, start, end)
                    if halves:
                        ax.errorbar(
                            *end, xerr=halves[0], yerr=halves[1], color=colour, alpha=0.4, linewidth=1.4, capsize=3
                        )
        names = {ARMS[arm].title: place.at for arm, place in found.items()}
        for name in plotting.name_points(ax, names, clear=heads, fontsize=SMALL):  # shafts may pass behind them
            name.set(color=scheme.text, bbox={"facecolor": scheme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1})
    return figure


def main(folder: Path | None = None, path: Path = RECORDED) -> list[Path]:
    """Write the picture, if any run has finished."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    if not numbers.finished(record):
        return []
    return write(
        "evidence_figure",
        "Clean against robust accuracy of the evidence runs, with arrows from each control",
        "Means over seeds on lines of equal NRR. Arrows lead from PGD-AT to RPAT's passes and to two views, and from "
        "each of these to the methods that add a term: the mean of the differences seed by seed, with its 95 % "
        "intervals where there are two seeds or more.",
        lambda scheme: draw(scheme, record),
        folder,
    )


if __name__ == "__main__":
    main()
