"""The balls of the threat models, cut by the box; where outside points are projected to; the steepest step.

python docs/figures/threats.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon, Rectangle
from style import SMALL, TEXT, Scheme, arrow, bare, sheet, write

from perceptual_at import L1, L2, Linf

CENTER = torch.tensor([0.70, 0.62], dtype=torch.float64)
OUTSIDE = torch.tensor([[1.33, 0.42], [1.36, 1.08], [0.52, 1.22], [0.06, 0.80]], dtype=torch.float64)
GRADIENT = torch.tensor([-0.5, -0.9], dtype=torch.float64)
THREATS = {
    "Linf": Linf(0.36),
    "L1": L1(0.62),
    'L2, projection="box_ball"': L2(0.44),
    'L2, projection="ball_box"': L2(0.44, projection="ball_box"),
}


def data() -> dict[str, dict[str, torch.Tensor]]:
    """Per threat model, where the outside points go and where the steepest step of length `eps` ends."""
    centers = CENTER.expand_as(OUTSIDE)
    return {
        name: {
            "projected": threat.project(OUTSIDE, centers),
            "stepped": (CENTER + threat.eps * threat.steepest(GRADIENT[None]))[0],
        }
        for name, threat in THREATS.items()
    }


def draw(scheme: Scheme) -> Figure:
    """Four panels: Linf and L1, and L2 with its two orders of clipping and shrinking."""
    figure = sheet(740)
    for ax, (name, found) in zip(figure.subplots(2, 2).flat, data().items(), strict=True):
        threat = THREATS[name]
        bare(ax, xlim=(-0.02, 1.42), ylim=(-0.02, 1.32))
        ax.set_title(name, fontsize=TEXT)
        box = Rectangle((0, 0), 1, 1, fill=False, edgecolor=scheme.muted, linewidth=1.6)
        ax.add_patch(box)
        inside = _ball(threat, facecolor=scheme.blue, alpha=0.28, linewidth=0)
        ax.add_patch(inside)
        inside.set_clip_path(box)
        ax.add_patch(_ball(threat, fill=False, edgecolor=scheme.blue, linewidth=1.6, linestyle=(0, (5, 3))))
        reach = CENTER + 0.62 * GRADIENT / GRADIENT.norm()
        ax.plot(*zip(CENTER, reach, strict=True), color=scheme.muted, linewidth=1.6, linestyle=(0, (1, 2)))
        arrow(ax, CENTER, found["stepped"], scheme.orange, linewidth=2.6)
        for start, end in zip(OUTSIDE, found["projected"], strict=True):
            arrow(ax, start, end, scheme.green, shrinkA=5)
            ax.plot(*start, "o", color="none", markeredgecolor=scheme.green, markeredgewidth=1.8, markersize=9)
            ax.plot(*end, "o", color=scheme.green, markersize=6)
        ax.plot(*CENTER, "o", color=scheme.text, markersize=8)
        ax.annotate("x", CENTER, xytext=(9, 7), textcoords="offset points", style="italic")
        ax.annotate("box", (0.03, 0.03), color=scheme.muted, fontsize=SMALL)
    figure.legend(
        handles=[
            Patch(facecolor=scheme.blue, alpha=0.28, label="allowed: in ball and box"),
            Line2D([], [], color=scheme.blue, linewidth=1.6, linestyle=(0, (5, 3)), label="edge of the ball"),
            Line2D([], [], color=scheme.green, marker="o", markersize=6, label="outside point and its projection"),
            Line2D([], [], color=scheme.orange, linewidth=2.6, label="steepest step of length eps"),
            Line2D([], [], color=scheme.muted, linewidth=1.6, linestyle=(0, (1, 2)), label="direction of the gradient"),
        ],
        loc="outside lower center", ncols=2,
    )  # fmt: skip
    return figure


def _ball(threat: Linf | L1 | L2, **look: object) -> Rectangle | Circle | Polygon:
    (a, b), eps = CENTER.tolist(), threat.eps
    if isinstance(threat, Linf):
        return Rectangle((a - eps, b - eps), 2 * eps, 2 * eps, **look)
    if isinstance(threat, L2):
        return Circle((a, b), eps, **look)
    return Polygon([(a + eps, b), (a, b + eps), (a - eps, b), (a, b - eps)], **look)


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    return write(
        "threats",
        "The balls of Linf, L1 and L2, cut by the box",
        "Four panels. In each, a ball around a point is cut by a box, arrows lead from four outside points to their "
        "projections, and one arrow is the steepest step: to a corner for Linf, along an axis for L1, along the "
        "gradient for L2. The two orders of L2 put the point beyond the corner of the box in different places.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
