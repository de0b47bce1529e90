"""Two views, their adversarial versions, the mixed input, and the two predictions that DICAR compares.

python docs/figures/dicar.py
"""

import functools
import math
from pathlib import Path

import torch
import toy
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from style import SMALL, Scheme, arrow, bare, label, sheet, write

from perceptual_at import dicar_loss, interpolate, pgd

MIX = 0.65
VIEWS = torch.tensor([[0.36, 0.50], [0.50, 0.46]])  # both of the first class
X_RANGE, Y_RANGE = (0.2, 0.68), (0.26, 0.70)
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])


@functools.cache
def data() -> dict[str, torch.Tensor]:
    """Inputs and predictions of one pair of views under a network trained with PGD-AT on three clouds."""
    model = toy.trained("PGD-AT", problem="clouds")
    labels = torch.zeros(2, dtype=torch.long)
    x_adv = pgd(model, VIEWS, labels, toy.THREAT, steps=20, step_size=toy.EPS / 8, start="clean")
    mixed = interpolate(x_adv[1:], x_adv[:1], MIX)
    with torch.no_grad():
        logits, mixed_logits = model(VIEWS), model(mixed)
        loss = dicar_loss(mixed_logits, logits[:1], logits[1:], mix=MIX)
        ticks = torch.linspace(0.15, 0.75, 161)
        scores = model(torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1))
    clean = logits.softmax(dim=1)
    return {
        "x_adv": x_adv, "mixed": mixed[0], "clean": clean, "prediction": mixed_logits.softmax(dim=1)[0],
        "target": MIX * clean[0] + (1 - MIX) * clean[1], "loss": loss, "ticks": ticks, "scores": scores,
    }  # fmt: skip


def draw(scheme: Scheme) -> Figure:
    """The inputs on the left, the predictions on the simplex of three classes on the right."""
    figure = sheet(385)
    left, right = figure.subplots(1, 2)
    _inputs(left, scheme)
    _predictions(right, scheme)
    return figure


def _inputs(ax: object, scheme: Scheme) -> None:
    found, colours = data(), (scheme.blue, scheme.orange, scheme.green)
    bare(ax, xlim=X_RANGE, ylim=Y_RANGE, title="inputs")
    ticks, scores = found["ticks"].numpy(), found["scores"]
    for number, colour in enumerate(colours):
        others = torch.cat([scores[..., :number], scores[..., number + 1 :]], dim=-1).amax(dim=-1)
        lead = (scores[..., number] - others).numpy()
        ax.contourf(ticks, ticks, lead, levels=[0, float("inf")], colors=[colour], alpha=0.16)
    ax.plot(*found["x_adv"].T, color=scheme.muted, linewidth=1.8, linestyle=(0, (5, 3)))
    for number, (view, adversarial) in enumerate(zip(VIEWS, found["x_adv"], strict=True), start=1):
        corner = (view - toy.EPS).tolist()
        look = {"edgecolor": scheme.text, "linewidth": 1.3, "linestyle": (0, (2, 2))}
        ax.add_patch(Rectangle(corner, 2 * toy.EPS, 2 * toy.EPS, fill=False, **look))
        arrow(ax, view, adversarial, scheme.text, shrinkA=5, shrinkB=5)
        ax.plot(*view, "o", color=scheme.text, markersize=9)
        ax.plot(*adversarial, "s", color=scheme.text, markersize=8)
        label(ax, view, f"$x_{number}$", scheme.text, (0, -16))
        label(ax, adversarial, rf"$x_{number}^\mathrm{{adv}}$", scheme.text, ((0, 20), (13, 6))[number - 1])
    ax.plot(*found["mixed"], "D", color=scheme.red, markersize=11)
    label(ax, found["mixed"], "mixed", scheme.red, (0, 29))
    for place, number in (((0.225, 0.285), 1), ((0.655, 0.285), 2), ((0.225, 0.675), 3)):
        align = {"ha": "left" if place[0] < 0.5 else "right", "va": "center", "fontsize": SMALL}
        ax.annotate(f"class {number}", place, color=colours[number - 1], **align)


def _predictions(ax: object, scheme: Scheme) -> None:
    found, colours = data(), (scheme.blue, scheme.orange, scheme.green)
    bare(ax, xlim=(-0.12, 1.12), ylim=(-0.16, 0.977), title="predictions")
    ax.add_patch(Polygon(CORNERS.tolist(), fill=False, edgecolor=scheme.muted, linewidth=1.6))
    for number, (corner, shift) in enumerate(zip(CORNERS, ((0, -16), (0, -16), (0, 14)), strict=True)):
        label(ax, corner, f"class {number + 1}", colours[number], shift, fontsize=SMALL)
    clean, target, prediction = (found[key] @ CORNERS for key in ("clean", "target", "prediction"))
    ax.plot(*clean.T, color=scheme.muted, linewidth=1.8, linestyle=(0, (5, 3)))
    ax.plot(*clean.T, "o", color=scheme.text, markersize=9)
    label(ax, clean[0], "$p(x_1)$", scheme.text, (-13, 0))
    label(ax, clean[1], "$p(x_2)$", scheme.text, (12, -4))
    arrow(ax, prediction, target, scheme.red, arrowstyle="<|-|>,head_width=0.28,head_length=0.55", shrinkA=9, shrinkB=9)
    ax.plot(*target, "o", color="none", markeredgecolor=scheme.red, markeredgewidth=2.6, markersize=13)
    ax.plot(*prediction, "D", color=scheme.red, markersize=11)
    label(ax, prediction, r"$p(\mathrm{mixed})$", scheme.red, (-14, 5))
    label(ax, (prediction + target) / 2, f"JS = {float(found['loss']):.2f}", scheme.red, (14, 0))
    label(ax, target, "mixture", scheme.red, (18, 12))


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    return write(
        "dicar",
        "What DICAR compares",
        "Left, inputs: two views of class 1 with their balls, an arrow from each to its adversarial version on the "
        "edge of its ball, and the mixed input on the line between the two. Right, the triangle of predictions over "
        "three classes: the mixture lies on the line between the predictions of the two clean views, the prediction at "
        f"the mixed input away from it, near class 3. Their Jensen-Shannon divergence is {float(data()['loss']):.2f}.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
