"""Pictures of results. Needs matplotlib, loaded when a plot is made."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from perceptual_at import _check
from perceptual_at._extras import extra
from perceptual_at._files import check_file, written_whole
from perceptual_at.diagnostics import PerceptionGap
from perceptual_at.evaluation import Evaluation
from perceptual_at.evaluation.comparison import check_rows
from perceptual_at.metrics import nrr
from perceptual_at.published import PublishedRow

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
    _check_mapping("trade_off", "results", results)
    if not results:
        raise ValueError("trade_off: `results` is empty.")
    pairs = {method: _pairs("trade_off", "results", runs, method) for method, runs in results.items()}
    for method, found in pairs.items():
        if not found:
            raise ValueError(f"trade_off: `results` has no run for {method!r}.")
    ax = _axes("trade_off", ax)
    points = [point for runs in pairs.values() for point in runs]
    for number, (method, runs) in enumerate(pairs.items()):
        colour = f"C{number}"
        clean, robust = zip(*runs, strict=True)
        if len(runs) > 1:
            ax.scatter(clean, robust, s=14, color=colour, alpha=0.45, linewidths=0)
        center = sum(clean) / len(runs), sum(robust) / len(runs)
        ax.scatter(*center, s=80, color=colour, edgecolors="white", linewidths=1, label=method, zorder=3)
    _frame(ax, points)
    ax.set(xlabel=f"clean accuracy ({unit})", ylabel=f"{robust_name} accuracy ({unit})")
    ax.legend(frameon=False, loc="best")
    _apart(ax)
    return ax


def name_points(
    ax: Any, points: Mapping[str, Point], *, clear: Sequence[Point] = (), fontsize: float | None = None
) -> list[Any]:
    """Write a name beside each point of a plot, where it covers no point and no other name.

    A name takes the nearest free place inside the axes, with a line to its point where that is not beside it. Numbers
    on lines of equal NRR that would lie under a name go.

    Args:
        ax: matplotlib axes, with limits and layout as they shall be.
        points: by name, where the point is, in the units of the axes.
        clear: other points that no name may cover, for example some along an arrow.
        fontsize: size of the names in points; None is matplotlib's `font.size`.

    Returns:
        The names, as matplotlib's annotations, whose colour may still be set.

    Raises:
        TypeError: if `ax` are no axes, `points` is no dictionary, or a point is no pair of numbers.
        ValueError: if `fontsize` is not positive.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> means = {"PGD-AT": (84.1, 51.8), "TRADES": (82.9, 52.8)}
        >>> ax = trade_off({name: [mean] for name, mean in means.items()})
        >>> [name.get_text() for name in name_points(ax, means)]
        ['PGD-AT', 'TRADES']
    """
    _check_axes("name_points", ax)
    _check_mapping("name_points", "points", points)
    if fontsize is not None:
        _check.number("name_points", "fontsize", fontsize, above=0.0)
    places = {name: _pairs("name_points", "points", [point], name)[0] for name, point in points.items()}
    others = _pairs("name_points", "clear", clear)
    names = [_named(ax, name, place, fontsize) for name, place in places.items()]
    _apart(ax, names, list(places.values()), others)
    return names


def published_trade_offs(
    rows: Sequence[PublishedRow], *, own: Mapping[str, Evaluation] | None = None, ax: Any = None
) -> Any:
    """The papers' clean and AutoAttack accuracies, with your own evaluations on top.

    Compare like with like: give rows of one data set, norm and architecture, and evaluate with AutoAttack on
    the same test images. An evaluation counts with its worst case over the attacks it ran.

    Args:
        rows: what `published.published(...)` gave.
        own: by name, what `evaluate` gave.
        ax: matplotlib axes to draw on; a new figure is made if absent.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no row.
        ImportError: if matplotlib is not installed.

    Source:
        RPAT, Tables 1 to 6; RAAT, Tables 1, 2, 3 and 5.

    Examples:
        >>> from perceptual_at.published import published
        >>> rows = published(paper="RPAT", table=1, dataset="CIFAR-10")
        >>> own = {"mine": Evaluation(torch.tensor([True, True]), {"aa": torch.tensor([True, False])})}
        >>> ax = published_trade_offs(rows, own=own)
        >>> [text.get_text() for text in ax.texts][:2], ax.get_ylabel()
        (['PGD-AT', 'PGD-AT+RPAT'], 'AutoAttack accuracy (%)')
    """
    check_rows("published_trade_offs", rows)
    _check_mapping("published_trade_offs", "own", {} if own is None else own, Evaluation)
    ax = _axes("published_trade_offs", ax)
    points = {name: (100 * result.clean_accuracy, 100 * result.worst_case) for name, result in (own or {}).items()}
    looks = {"baseline": ("0.5", "benchmark"), "sota": ("C0", "other work"), "ours": ("C1", "RPAT, RAAT")}
    for variant, (colour, label) in looks.items():
        group = [row for row in rows if row.variant == variant]
        if group:
            ax.scatter([row.clean for row in group], [row.aa for row in group], s=22, color=colour, label=label)
    names = [_named(ax, row.method, (row.clean, row.aa), 6.0) for row in rows]
    for number, (name, point) in enumerate(points.items()):
        ax.scatter(*point, marker="*", s=140, color=f"C{number + 3}", edgecolors="white", label=name, zorder=3)
    everything = [*((row.clean, row.aa) for row in rows), *points.values()]
    _frame(ax, everything)
    ax.set(xlabel="clean accuracy (%)", ylabel="AutoAttack accuracy (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    _apart(ax, names, everything)
    return ax


def accuracy_bars(results: Evaluation | Mapping[str, Evaluation], *, ax: Any = None) -> Any:
    """Clean, robust and worst-case accuracies as bars, with their 95 % intervals.

    Args:
        results: what `evaluate` gave, or several by the name of the model, with the same attacks.
        ax: matplotlib axes to draw on; a new figure is made if absent.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no result, or they have other attacks.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> result = Evaluation(torch.tensor([True, True]), {"pgd20": torch.tensor([True, False])})
        >>> ax = accuracy_bars(result)
        >>> [float(bar.get_height()) for bar in ax.patches]
        [100.0, 50.0, 50.0]
    """
    results = {"": results} if isinstance(results, Evaluation) else results
    _check_mapping("accuracy_bars", "results", results, Evaluation)
    if not results:
        raise ValueError("accuracy_bars: `results` is empty.")
    first = next(iter(results.values())).columns
    for name, result in results.items():
        if result.columns != first:
            raise ValueError(f"accuracy_bars: {name!r} has {', '.join(result.columns)} instead of {', '.join(first)}.")
    ax = _axes("accuracy_bars", ax)
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(results.items()):
        places = [place + width * (number - (len(results) - 1) / 2) for place in range(len(first))]
        heights = [100 * result.verdicts(column).double().mean().item() for column in first]
        ends = [result.interval(column) for column in first]
        below = [max(0.0, height - 100 * end.low) for height, end in zip(heights, ends, strict=True)]
        above = [max(0.0, 100 * end.high - height) for height, end in zip(heights, ends, strict=True)]
        ax.bar(places, heights, width=0.9 * width, yerr=[below, above], capsize=3, label=name, color=f"C{number}")
    ax.set_xticks(range(len(first)), [column.replace("worst_case", "worst case") for column in first])
    ax.set(ylabel="accuracy (%)", ylim=(0, 105))
    if len(results) > 1:
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    _apart(ax)
    return ax


def perception_bars(gaps: Mapping[str, PerceptionGap], *, ax: Any = None) -> Any:
    """How far perturbations move the perception of success and failure cases, with the accuracies as lines.

    Args:
        gaps: by the name of the case (how it was trained and perturbed), what `perception_gap` measured.
        ax: matplotlib axes to draw on; a new figure is made if absent.

    Returns:
        The axes with the bars.

    Raises:
        ValueError: if `gaps` is empty.
        ImportError: if matplotlib is not installed.

    Source:
        RPAT, Fig. 2 and 5.

    Examples:
        >>> gap = PerceptionGap(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([True, True]))
        >>> [float(bar.get_height()) for bar in perception_bars({"PGD-AT, PGD-20": gap}).patches]
        [1.0, 2.0]
    """
    _check_mapping("perception_bars", "gaps", gaps, PerceptionGap)
    if not gaps:
        raise ValueError("perception_bars: `gaps` is empty.")
    ax = _axes("perception_bars", ax)
    places = range(len(gaps))
    for shift, group, colour in ((-0.2, "success", "C0"), (0.2, "failure", "C3")):
        heights = [getattr(gap, group) or 0.0 for gap in gaps.values()]
        ax.bar([place + shift for place in places], heights, width=0.4, color=colour, label=f"{group} cases", alpha=0.8)
    ax.set_xticks(list(places), list(gaps))
    ax.set_ylabel("squared movement of the logits (MSE)")
    lines = ax.twinx()
    for name, marker in (("clean", "o"), ("robust", "s")):
        shares = [100 * getattr(gap, f"{name}_accuracy") for gap in gaps.values()]
        lines.plot(places, shares, marker=marker, color="0.25", linewidth=1, label=f"{name} accuracy")
    lines.set(ylabel="accuracy (%)", ylim=(0, 105))
    handles = [*ax.get_legend_handles_labels()[0], *lines.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    _apart(ax)
    return ax


def perception_paths(alphas: Sequence[float], paths: Mapping[str, Tensor], *, ax: Any = None) -> Any:
    """Mean movement of the logits along the way from clean to adversarial; an even path is a straight line.

    Args:
        alphas: places on the path, the last of them 1: the movement there is the whole.
        paths: per model, what `perception_path` gave for them, `(len(alphas), B)`.
        ax: matplotlib axes to draw on; a new figure is made if absent.

    Returns:
        The axes.

    Raises:
        ValueError: if the last of `alphas` is not 1, or a path is not of shape `(len(alphas), B)`.
        ImportError: if matplotlib is not installed.

    Source:
        RPAT, Definition 1.

    Examples:
        >>> ax = perception_paths([0.0, 1.0], {"linear": torch.tensor([[0.0], [2.0]])})
        >>> ax.lines[0].get_ydata().tolist()
        [0.0, 1.0]
    """
    _check_mapping("perception_paths", "paths", paths, Tensor)
    alphas = _check.numbers_of("perception_paths", "alphas", alphas)
    if not alphas or not math.isclose(alphas[-1], 1, abs_tol=1e-6):
        raise ValueError(
            f"perception_paths: `alphas` must end with 1, where the movement is the whole, got {list(alphas)}."
        )
    ax = _axes("perception_paths", ax)
    for name, path in paths.items():
        if path.ndim != 2 or path.shape[0] != len(alphas):
            raise ValueError(
                f"perception_paths: {name!r} must be of shape ({len(alphas)}, B), one row per alpha, got "
                f"{tuple(path.shape)}."
            )
        mean = path.detach().double().mean(dim=1).cpu()
        ax.plot(list(alphas), (mean / mean[-1].clamp_min(1e-12)).numpy(), marker=".", label=name)
    ax.axline((0, 0), (1, 1), color="0.6", linestyle="dashed", linewidth=0.8, label="even")
    ax.set(xlabel="place on the path (0 clean, 1 adversarial)", ylabel="movement of the logits, share of the whole")
    ax.legend(frameon=False)
    return ax


def save(ax: Any, path: str | os.PathLike[str]) -> None:
    """Write the figure of some axes to a file, whole or not at all.

    Args:
        ax: matplotlib axes.
        path: file to write; its ending chooses the format.

    Raises:
        TypeError: if `ax` are no axes.
        ValueError: if the ending names no format that matplotlib writes.
        OSError: if `path` is something other than a file, or cannot be written.

    Examples:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "plot.png"
        >>> save(trade_off({"PGD-AT": [(84.1, 51.8)]}), target)
        >>> target.stat().st_size > 0
        True
    """
    _check_axes("save", ax)
    check_file("save", "path", path)
    formats = ax.figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in formats:
        known = ", ".join(f".{one}" for one in sorted(formats))
        raise ValueError(f"save: `path` must end in one of {known}, got {os.fspath(path)!r}.")
    with written_whole(path) as beside:
        ax.figure.savefig(beside, dpi=160, bbox_inches="tight")


def _matplotlib_figure(function: str) -> Any:
    canvas = extra(function, "matplotlib.backends.backend_agg", why="for plots").FigureCanvasAgg
    figure = extra(function, "matplotlib.figure", why="for plots").Figure(figsize=(6.0, 4.5), layout="constrained")
    canvas(figure)
    return figure


def _axes(function: str, ax: Any) -> Any:
    """The axes given, or new ones."""
    if ax is None:
        return _matplotlib_figure(function).add_subplot()
    _check_axes(function, ax)
    return ax


def _check_axes(function: str, ax: Any) -> None:
    if not (hasattr(ax, "scatter") and hasattr(ax, "figure")):
        raise TypeError(f"{function}: `ax` must be matplotlib axes, got {type(ax).__name__}.")


def _check_mapping(function: str, name: str, value: Any, kind: type = object) -> None:
    """Require a dictionary of one kind of thing by name."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{function}: `{name}` must be a dictionary by name, got {type(value).__name__}.")
    for key, one in value.items():
        if not isinstance(one, kind):
            raise TypeError(f"{function}: `{name}` must hold {kind.__name__}s, got {type(one).__name__} for {key!r}.")


def _pairs(function: str, argument: str, runs: Any, method: str = "") -> list[Point]:
    """Points, which may be rows of an array or a tensor; those of a method's runs, if they are."""
    try:
        found = [_check.numbers_of(function, argument, run) for run in runs]
    except TypeError:
        found = [()]
    if any(len(run) != 2 for run in found):
        owner = f" for {method!r}" if method else ""
        raise TypeError(f"{function}: `{argument}` must hold pairs (clean, robust){owner}, got {runs!r}.")
    return [(run[0], run[1]) for run in found]


def _apart(ax: Any, names: Sequence[Any] = (), points: Sequence[Point] = (), clear: Sequence[Point] = ()) -> None:
    """Let no label cover another: names of points move, words on the axis turn, those on lines of equal NRR go."""
    ax.figure.canvas.figure.draw_without_rendering()
    agg = extra("plotting", "matplotlib.backends.backend_agg", why="for plots")  # measures words for any canvas
    renderer, scale = agg.RendererAgg(*ax.figure.bbox.size, ax.figure.dpi), ax.figure.dpi / 72
    taken = [_around(ax.transData.transform(point), 4 * scale) for point in points]
    taken += [_around(ax.transData.transform(point), scale) for point in clear]
    for name in names:
        taken.append(_moved(name, taken, ax.bbox, renderer))
    legend = ax.get_legend()
    taken += [legend.get_window_extent()] if legend else []
    for text in [text for marks in ax.collections for text in getattr(marks, "labelTexts", ())]:
        box = text.get_window_extent()
        inside = ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max)
        text.set_visible(inside and not any(box.overlaps(other) for other in taken))
        taken += [box] if text.get_visible() else []
    _turned(ax)


def _named(ax: Any, name: str, point: Point, fontsize: float | None) -> Any:
    """A name on a line to its point."""
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    return ax.annotate(name, point, (4, 4), textcoords="offset points", arrowprops=line, fontsize=fontsize)


def _turned(ax: Any) -> None:
    """Turn the words on the horizontal axis where they meet."""
    words = [word for word in ax.get_xticklabels() if word.get_text()]
    boxes = [word.get_window_extent() for word in words]
    if not any(a.x1 + a.height / 2 > b.x0 for a, b in itertools.pairwise(boxes)):
        return
    between = min((b.x0 + b.x1 - a.x0 - a.x1) / 2 for a, b in itertools.pairwise(boxes))
    slanted = between > 2.2 * boxes[0].height  # at 30 degrees lines are half as far from each other
    for word in words:
        word.set_rotation(30 if slanted else 90)
        word.set(ha="right" if slanted else "center", rotation_mode="anchor" if slanted else "default")


def _moved(name: Any, taken: Sequence[Any], inside: Any, renderer: Any) -> Any:
    """Put the name of a point where nothing is yet, as near as that can be had; gives its place."""
    for distance in (5, 9, 15, 22, 30, 40, 55, 75, 100):
        for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            name.set(
                position=(x * distance, y * distance),
                ha=("center", "left", "right")[x], va=("center", "bottom", "top")[y],
            )  # fmt: skip
            name.arrow_patch.set_visible(distance > 9)
            box = _text_box(name, renderer)
            if inside.contains(*box.min) and inside.contains(*box.max) and not any(map(box.overlaps, taken)):
                return box
    return box


def _text_box(name: Any, renderer: Any) -> Any:
    """Where the words of an annotation are, without its line."""
    name.update_positions(renderer)
    return extra("plotting", "matplotlib.text", why="for plots").Text.get_window_extent(name, renderer)


def _around(place: Any, radius: float) -> Any:
    """A box around a mark."""
    bounding = extra("plotting", "matplotlib.transforms", why="for plots").Bbox
    x, y = place
    return bounding.from_extents(x - radius, y - radius, x + radius, y + radius)


def _frame(ax: Any, points: Sequence[Point]) -> None:
    """Limits around the points, and lines of equal NRR between them."""
    x_range, y_range = (_padded(values) for values in zip(*points, strict=True))
    ax.set(xlim=x_range, ylim=y_range)
    _nrr_lines(ax, x_range, y_range)


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
