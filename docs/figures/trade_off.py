"""Clean against robust accuracy on lines of equal NRR: the papers' rows, and the recorded demo if there is one.

python docs/figures/trade_off.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from style import HERE, SMALL, Scheme, arrow, label, sheet, write

from perceptual_at import plotting
from perceptual_at.published import published

RECORDED = HERE.parent / "results" / "demo.json"
BASES = ("PGD-AT", "TRADES", "MART", "Consistency-AT")
Runs = dict[str, list[tuple[float, float]]]


def data() -> Runs:
    """RPAT, Table 1, CIFAR-10 with ResNet-18: per method, clean and AutoAttack accuracy in percent as printed."""
    rows = published(paper="RPAT", table=1, dataset="CIFAR-10", norm="linf", model="ResNet-18")
    return {row.method: [(float(row.printed["clean"]), float(row.printed["aa"]))] for row in rows}


def recorded(path: Path | None = None) -> Runs:
    """The runs of the demo: per method, clean and PGD-20 accuracy in percent, one pair per seed."""
    runs = json.loads((path or RECORDED).read_text(encoding="utf-8"))["runs"]
    return {method: [(run["clean"], run["pgd20"]) for run in results] for method, results in runs.items()}


def draw(scheme: Scheme) -> Figure:
    """Every base method with an arrow to its result with RPAT."""
    figure, ax, runs = *_axes(540), data()
    plotting.trade_off(runs, ax=ax, robust_name="AutoAttack")
    _restyle(ax, scheme)
    offsets = {"PGD-AT": (-14, -12), "TRADES": (-4, 20), "MART": (6, -22)}
    colours = dict(zip(BASES, (scheme.blue, scheme.orange, scheme.purple, scheme.green), strict=True))
    points = [marks for marks in ax.collections if marks.get_label() in runs]
    bends = {"PGD-AT": -0.12, "Consistency-AT": 0.22}  # around each other and the label of a line
    for base, colour in colours.items():
        start, end = runs[base][0], runs[f"{base}+RPAT"][0]
        arrow(ax, start, end, colour, shrinkA=6, shrinkB=7, connectionstyle=f"arc3,rad={bends.get(base, 0)}")
        if base == "Consistency-AT":  # beside its start there is no room
            label(ax, end, base, colour, (0, 22), ha="right")
        else:
            label(ax, start, base, colour, offsets[base])
        for marks in points:
            if marks.get_label() == base:
                marks.set(facecolor="none", edgecolor=colour, linewidth=2)
            elif marks.get_label() == f"{base}+RPAT":
                marks.set(facecolor=colour, edgecolor=colour)
    ax.get_legend().remove()
    ring = {"color": "none", "markersize": 9, "markeredgewidth": 2, "markeredgecolor": scheme.text}
    figure.legend(
        handles=[
            Line2D([], [], marker="o", label="base method", **ring),
            Line2D([], [], marker="o", label="the same with RPAT", **ring | {"markerfacecolor": scheme.text}),
            Line2D([], [], color=scheme.faint, linewidth=1.2, linestyle="dashed", label="equal NRR"),
        ],
        loc="outside lower center", ncols=3,
    )  # fmt: skip
    return figure


def draw_recorded(scheme: Scheme) -> Figure:
    """One colour per method of the demo; small marks are seeds, the large one is their mean."""
    figure, ax = _axes(540)
    plotting.trade_off(recorded(), ax=ax)
    _restyle(ax, scheme)
    ax.get_legend().remove()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _axes(height: float) -> tuple[Figure, object]:
    figure = sheet(height)
    return figure, figure.subplots()


def _restyle(ax: object, scheme: Scheme) -> None:
    for marks in ax.collections:
        if hasattr(marks, "levels"):
            marks.set(edgecolor=scheme.faint, linewidth=1.2)
            for text in marks.labelTexts:
                shown = text.get_text() != "NRR 0"  # others were out of sight because of the legend, which moves
                text.set(color=scheme.muted, fontsize=SMALL, visible=shown)
        elif len(marks.get_offsets()) == 1:  # the mean of a method
            marks.set(edgecolor=scheme.paper, sizes=[150])
        else:
            marks.set(sizes=[36], alpha=0.6)


def main(folder: Path | None = None) -> list[Path]:
    """Write the pictures."""
    paths = write(
        "trade_off",
        "Clean against robust accuracy of four methods with and without RPAT",
        "Published results on CIFAR-10 with ResNet-18, on lines of equal NRR. Adding RPAT raises both accuracies of "
        "PGD-AT and Consistency-AT, trades a little robustness for clean accuracy on TRADES, and clean accuracy for a "
        "little robustness on MART.",
        draw,
        folder,
    )
    if RECORDED.exists():
        paths += write(
            "trade_off_demo",
            "Clean against robust accuracy of the demo's methods",
            "Runs of the demo on lines of equal NRR: small marks are single seeds, large marks their means.",
            draw_recorded,
            folder,
        )
    return paths


if __name__ == "__main__":
    main()
