"""Time per image of a PGD attack against batch size, steps, classes, image size and width, from the recorded run.

python docs/figures/scaling.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from style import HERE, Scheme, sheet, write

RECORDED = HERE.parent / "results" / "scaling.json"
PANELS = {"batch": "batch size", "steps": "steps", "classes": "classes", "side": "image side", "width": "width"}
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def data(path: Path | None = None) -> Curves:
    """By what grows and by lane: its value, and milliseconds per image."""
    found: Curves = {name: {} for name in PANELS}
    for curve in json.loads((path or RECORDED).read_text(encoding="utf-8"))["curves"]:
        name = curve["name"]
        found[name][curve["lane"]] = [
            (row[name], 1e3 * row["wall_s"]["median"] / row["images"]) for row in curve["rows"]
        ]
    return found


def draw(scheme: Scheme) -> Figure:
    """A panel for each, axes logarithmic and a decade high at least; dashed: growth in proportion."""
    figure, curves = sheet(520), data()
    axes = figure.subplots(2, 3).flat
    for ax, (name, title) in zip(axes, PANELS.items(), strict=False):
        for (lane, points), colour in zip(
            curves[name].items(), (scheme.blue, scheme.orange, scheme.green), strict=False
        ):
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=lane)
        if name in ("steps", "width"):
            (start, time), (end, _) = (next(iter(curves[name].values()))[place] for place in (0, -1))
            power = 2 if name == "width" else 1
            ax.plot(
                (start, end), (time, time * (end / start) ** power), color=scheme.faint, linestyle="dashed", zorder=0
            )
        values = [value for value, _ in next(iter(curves[name].values()))]
        ax.set(xscale="log", yscale="log", title=title)
        ax.set_xticks((values[0], values[-1]), (f"{values[0]}", f"{values[-1]}"))
        times = [time for points in curves[name].values() for _, time in points]
        low, high = min(times), max(times)
        room = max(1.3, (12 * low / high) ** 0.5)  # a decade at least, so that what is flat looks flat
        ax.set_ylim(low / room, high * room)
        ax.set_yticks((low, high), (f"{low:.3g}", f"{high:.3g}"))
        ax.minorticks_off()
    rest = axes[len(PANELS)]
    rest.set_axis_off()
    rest.legend(*next(iter(figure.axes)).get_legend_handles_labels(), loc="center", title="ms per image")
    return figure


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture, if there is a record."""
    if not RECORDED.exists():
        return []
    return write(
        "scaling",
        "Time per image of a PGD attack against five sizes",
        "Logarithmic panels for batch size, steps, classes, image side and width of a ResNet-18, each with one line "
        "for the plain attack and one for every lane that was recorded, in milliseconds per image.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
