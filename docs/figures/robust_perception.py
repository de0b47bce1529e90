"""Logits as the input walks from clean to adversarial: the path, its chord, and what two losses ask for.

python docs/figures/robust_perception.py
"""

import functools
from pathlib import Path

import torch
import toy
from matplotlib.figure import Figure
from style import Scheme, arrow, label, sheet, write

from perceptual_at import interpolate, pgd, robust_perception_loss

PLACES = 101
DOTS = 10


@functools.cache
def data() -> dict[str, object]:
    """The path of one sample of the three clouds through the logits of its class and of the strongest other."""
    model = toy.trained("PGD-AT", problem="clouds")
    x, labels = toy.three_clouds(300, seed=50)
    x_adv = pgd(model, x, labels, toy.THREAT, steps=20, step_size=toy.EPS / 8, start="clean")
    with torch.no_grad():
        clean, mid, adv = model(x), model(interpolate(x, x_adv, 0.5)), model(x_adv)
        losses = robust_perception_loss(clean, mid, adv, alpha=0.5, form="interpolation", reduction="none")
        row = int(losses.argmax())  # the least even of them
        steps = torch.linspace(0, 1, PLACES)
        one, one_adv = (z[row].expand(PLACES, -1) for z in (x, x_adv))
        path = model(interpolate(one, one_adv, steps))
    right = int(labels[row])
    others = path[-1].clone()
    others[right] = -torch.inf
    axes = [right, int(others.argmax())]
    return {
        "alphas": steps, "path": path[:, axes], "all_logits": path, "loss": float(losses[row]),
        "mean_loss": float(losses.mean()), "x": x[row], "x_adv": x_adv[row],
    }  # fmt: skip


def draw(scheme: Scheme) -> Figure:
    """One panel: two logits, the path between the ends and the straight line between them."""
    figure = sheet(520)
    ax = figure.subplots()
    path = data()["path"]
    clean, mid, adv = path[0], path[PLACES // 2], path[-1]
    chord = (clean + adv) / 2
    ax.plot(*zip(clean, adv, strict=True), color=scheme.muted, linewidth=1.8, linestyle=(0, (5, 3)))
    ax.plot(*path.T, color=scheme.blue)
    dots = path[:: PLACES // DOTS]
    ax.plot(*dots.T, "o", color=scheme.blue, markersize=7)
    ax.plot(*torch.stack([clean, mid, adv]).T, "o", color=scheme.blue, markersize=13)
    ax.plot(*chord, "o", color="none", markeredgecolor=scheme.green, markeredgewidth=2.6, markersize=13)
    arrow(ax, mid, chord, scheme.green, shrinkA=9, shrinkB=9, linewidth=2.8)
    arrow(ax, adv, clean, scheme.orange, shrinkA=10, shrinkB=10, connectionstyle="arc3,rad=0.36", linewidth=2.2)
    label(ax, clean, "$f(x)$", scheme.blue, (0, -26))
    label(ax, adv, r"$f(x_\mathrm{adv})$", scheme.blue, (16, 10))
    label(ax, mid, r"$f(x_{1/2})$", scheme.blue, (17, 3))
    label(ax, chord, "robust perception\npulls the middle\nonto the chord", scheme.green, (18, 26), linespacing=1.25)
    ax.annotate(
        "consistency pulls\none end onto the other", (0.05, 0.09), xycoords="axes fraction", color=scheme.orange,
        linespacing=1.25,
    )  # fmt: skip
    ax.set(xlabel="logit of the right class", ylabel="logit of the strongest other class")
    ax.margins(0.1, 0.13)
    return figure


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    return write(
        "robust_perception",
        "The path of the logits and its chord",
        "Two logits of a network as the input walks straight from clean to adversarial, in ten equal steps. The dots "
        "lie on a bent path beside the dashed chord between its ends. A short arrow, robust perception, leads from the "
        "middle of the path to the middle of the chord. A long arrow, consistency, leads from the adversarial end to "
        "the clean end.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
