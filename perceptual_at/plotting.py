"""Pictures of results. Needs matplotlib (`pip install 'perceptual-at[plot]'`), loaded when a plot is made."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from perceptual_at._files import written_whole
from perceptual_at.metrics import nrr

Point = tuple[float, float]


def trade_off(
    results: Mapping[str, Sequence[Point]], *, ax: Any = None, unit: str = "%", robust_name: str = "PGD-20"
) -> Any:
    """Clean against robust accuracy, one colour per method, on contour lines of equal NRR.

    Small marks are single runs; the large mark is their mean. Up and to the right is better, and along a dashed
    line the harmonic mean stays the same.

    Args:
        results: per method, a sequence of `(clean, robust)` accuracies, one per run.
        ax: matplotlib axes to draw on; a new figure is made if absent.
        unit: printed behind the axis names.
        robust_name: what the robust accuracy is.

    Returns:
        The axes.

    Raises:
        ValueError: if a method has no run.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> ax = trade_off({"PGD-AT": [(84.1, 51.8), (84.4, 51.5)], "TRADES": [(82.9, 52.8)]})
        >>> ax.get_xlabel()
        'clean accuracy (%)'
    """
    for method, runs in results.items():
        if not runs:
            raise ValueError(f"trade_off: `results` has no run for {method!r}.")
    if ax is None:
        figure = _matplotlib_figure()
        ax = figure.add_subplot()
    points = [point for runs in results.values() for point in runs]
    for number, (method, runs) in enumerate(results.items()):
        colour = f"C{number}"
        clean, robust = zip(*runs, strict=True)
        if len(runs) > 1:
            ax.scatter(clean, robust, s=14, color=colour, alpha=0.45, linewidths=0)
        center = sum(clean) / len(runs), sum(robust) / len(runs)
        ax.scatter(*center, s=80, color=colour, edgecolors="white", linewidths=1, label=method, zorder=3)
    low_x, high_x = _padded([clean for clean, _ in points])
    low_y, high_y = _padded([robust for _, robust in points])
    ax.set(xlim=(low_x, high_x), ylim=(low_y, high_y))
    _nrr_lines(ax, (low_x, high_x), (low_y, high_y))
    ax.set(xlabel=f"clean accuracy ({unit})", ylabel=f"{robust_name} accuracy ({unit})")
    ax.legend(frameon=False, loc="best")
    return ax


def save(ax: Any, path: str | os.PathLike[str]) -> None:
    """Write the figure of some axes to a file, whole or not at all.

    Args:
        ax: matplotlib axes.
        path: file to write; its ending chooses the format.

    Examples:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "plot.png"
        >>> save(trade_off({"PGD-AT": [(84.1, 51.8)]}), target)
        >>> target.stat().st_size > 0
        True
    """
    with written_whole(path) as beside:
        ax.figure.savefig(beside, dpi=160, bbox_inches="tight")


def _matplotlib_figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting: matplotlib is not installed; run `pip install 'perceptual-at[plot]'`.") from error
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _padded(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.02 * max(1.0, abs(high))
    return max(0.0, low - margin), high + margin


def _nrr_lines(ax: Any, x_range: Point, y_range: Point, *, resolution: int = 80) -> None:
    """Dashed lines of equal NRR across the visible part."""
    xs = [x_range[0] + (x_range[1] - x_range[0]) * i / (resolution - 1) for i in range(resolution)]
    ys = [y_range[0] + (y_range[1] - y_range[0]) * i / (resolution - 1) for i in range(resolution)]
    grid = [[nrr(x, y) for x in xs] for y in ys]
    lines = ax.contour(xs, ys, grid, levels=6, colors="0.6", linewidths=0.8, linestyles="dashed", zorder=0)
    ax.clabel(lines, fmt=lambda value: f"NRR {value:g}", fontsize=7)
