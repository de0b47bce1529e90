"""Misclassified, boundary and interior samples of two moons, with their reduced and full perturbations.

python docs/figures/partition.py
"""

import functools
from pathlib import Path

import torch
import toy
from boundaries import data as boundaries_data
from boundaries import panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from style import Scheme, arrow, sheet, write

from perceptual_at import boundary_partition, frozen, interpolate, pgd

ETA = 0.25  # the library's default is 0.1, too short to see here
COUNT = 400
SHOWN, APART = 6, 0.024  # of each group at most, the first ones in the window
WINDOW = {"xlim": (0.29, 0.71), "ylim": (0.39, 0.65)}


@functools.cache
def data() -> dict[str, torch.Tensor]:
    """Fresh samples, their full and reduced perturbations under the PGD-AT network, and the three masks."""
    model = toy.trained("PGD-AT")
    x, labels = toy.moons(COUNT, seed=5)
    x_adv = pgd(model, x, labels, toy.THREAT, steps=20, step_size=toy.EPS / 8, start="clean")
    reduced = interpolate(x, x_adv, ETA)
    with torch.no_grad(), frozen(model) as f:
        clean_logits, reduced_logits, adv_logits = f(x), f(reduced), f(x_adv)
        parts = boundary_partition(clean_logits, reduced_logits, labels)
    return {
        "x": x, "labels": labels, "x_adv": x_adv, "reduced": reduced, **parts._asdict(),
        "broken": (clean_logits.argmax(dim=1) == labels) & (adv_logits.argmax(dim=1) != labels),
    }  # fmt: skip


def draw(scheme: Scheme) -> Figure:
    """One panel: the middle of the plane, where the classes touch."""
    figure = sheet(570)
    ax = figure.subplots()
    found = data()
    panel(ax, boundaries_data()["PGD-AT"], scheme)
    ax.set(**WINDOW)
    groups = {
        "misclassified": ("X", scheme.red),
        "boundary": ("D", scheme.purple),
        "interior": ("o", scheme.green),
    }
    rows_shown = shown()
    for group, (marker, colour) in groups.items():
        for row in rows_shown[group]:
            start, near, end = (found[key][row] for key in ("x", "reduced", "x_adv"))
            ax.plot(*zip(start, end, strict=True), color=colour, linewidth=1.4, linestyle=(0, (3, 2)))
            ax.plot(*end, ".", color=colour, markersize=7)
            arrow(ax, start, near, colour, linewidth=2.8, arrowstyle="-|>,head_width=0.2,head_length=0.35")
            look = {"markeredgecolor": scheme.paper, "markeredgewidth": 1, "markersize": 12, "zorder": 3}
            ax.plot(*start, marker, color=colour, **look)
    plain = {"color": scheme.muted}
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=colour, marker=marker, markersize=10, label=group)
                for group, (marker, colour) in groups.items()
            ),
            Line2D([], [], **plain, linewidth=1.4, linestyle=(0, (3, 2)), marker=".", label="full perturbation"),
            Line2D([], [], **plain, linewidth=2.8, label=f"reduced, eta = {ETA}"),
        ],
        loc="outside lower center", ncols=2,
    )  # fmt: skip
    return figure


def shown() -> dict[str, list[int]]:
    """The first samples of each group that stay in the window and have some room around them."""
    found = data()
    low, high = (torch.tensor([WINDOW[axis][end] for axis in ("xlim", "ylim")]) for end in (0, 1))
    ends = torch.stack([found["x"], found["x_adv"]])
    inside = ((ends > low + 0.006) & (ends < high - 0.006)).all(dim=2).all(dim=0)
    chosen: dict[str, list[int]] = {}
    for group in ("boundary", "misclassified", "interior"):
        chosen[group] = []
        for row in (found[group] & inside).nonzero()[:, 0].tolist():
            taken = [other for rows in chosen.values() for other in rows]
            apart = all((ends[:, row] - ends[:, other]).norm(dim=1).min() > APART for other in taken)
            if apart and len(chosen[group]) < SHOWN:
                chosen[group].append(row)
    return chosen


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    counts = ", ".join(f"{int(data()[group].sum())} {group}" for group in ("misclassified", "boundary", "interior"))
    return write(
        "partition",
        "Misclassified, boundary and interior samples with their perturbations",
        "Samples of two classes beside a decision boundary. Each has a short arrow, its reduced perturbation, on the "
        "way to its full one. The reduced perturbation takes boundary samples across the line and leaves interior "
        f"samples on their side; misclassified samples start on the wrong side. Of {COUNT} samples: {counts}.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
