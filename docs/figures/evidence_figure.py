"""Clean against robust accuracy of the evidence benchmark, with an arrow from each control to what is tested.

python docs/figures/evidence_figure.py
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

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
Points = dict[str, tuple[tuple[float, float], tuple[float, float]]]


def points(record: dict, regime: str) -> Points:
    """Per arm its mean of clean and PGD-20 accuracy, and half the interval of each (0 with one seed)."""
    runs = numbers.finished(record)
    found: Points = {}
    for arm in ARMS:
        columns = [numbers.scores(runs, regime, arm, column) for column in ("clean", "pgd20")]
        if columns[0]:
            means = tuple(map(statistics.mean, columns))
            halves = tuple(numbers.t_interval(values).half if len(values) > 1 else 0.0 for values in columns)
            found[arm] = (means, halves)
    return found


def before(ax: Axes, start: Sequence[float], end: Sequence[float]) -> list[tuple[float, float]]:
    """Where the head of an arrow is."""
    here, there = ax.transData.transform([start, end])
    way = (here - there) / np.linalg.norm(here - there)
    return [tuple(place) for place in ax.transData.inverted().transform([there + 10 * way, there + 18 * way])]


def draw(scheme: Scheme, record: dict) -> Figure:
    """One panel for each regime that has runs."""
    panels = {regime: found for regime in REGIMES if (found := points(record, regime))}
    figure = sheet(470 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    colours = (scheme.blue, scheme.orange, scheme.green, scheme.purple)
    colour_of = dict(zip(ARROWS, colours, strict=True))
    for ax, (regime, found) in zip(axes, panels.items(), strict=True):
        plotting.trade_off({ARMS[arm].title: [means] for arm, (means, _) in found.items()}, ax=ax)
        ax.get_legend().remove()
        ax.set_title(NAMES[regime], fontsize=SMALL, loc="left")
        for marks in ax.collections:
            if hasattr(marks, "levels"):
                marks.set(edgecolor=scheme.faint, linewidth=1.2)
                for text in marks.labelTexts:
                    text.set(color=scheme.muted, fontsize=SMALL)
            else:
                marks.set(facecolor=scheme.text, edgecolor=scheme.paper, sizes=[90])
        for means, halves in found.values():
            if any(halves):
                ax.errorbar(*means, xerr=halves[0], yerr=halves[1], color=scheme.muted, linewidth=1.4, capsize=3)
        heads = []
        for control, tested in ARROWS.items():
            for arm in tested:
                if control in found and arm in found:
                    start, end = found[control][0], found[arm][0]
                    arrow(ax, start, end, colour_of[control], shrinkA=6, shrinkB=7)
                    heads += before(ax, start, end)
        names = {ARMS[arm].title: means for arm, (means, _) in found.items()}
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
        "Means over seeds on lines of equal NRR, with 95 % intervals where there are two seeds or more. Arrows lead "
        "from PGD-AT to RPAT's passes and to two views, and from each of these to the methods that add a term.",
        lambda scheme: draw(scheme, record),
        folder,
    )


if __name__ == "__main__":
    main()
