"""Decision regions and robust domains on two moons, after four ways of training.

python docs/figures/boundaries.py
"""

import functools
from pathlib import Path

import torch
import toy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from style import SMALL, Scheme, bare, sheet, write
from torch.nn.functional import max_pool2d

CELLS = 200  # of the grid, per side of the unit square
Y_RANGE = (0.17, 0.83)
HEADS = {"standard": "standard training"}


@functools.cache
def data() -> dict[str, dict[str, object]]:
    """Per method: accuracies on 2000 fresh points, the fate of the training points, and fields on a grid."""
    x, labels = toy.moons(160, seed=0)
    fresh, fresh_labels = toy.moons(2000, seed=100)
    return {method: _measured(toy.trained(method), x, labels, fresh, fresh_labels) for method in toy.METHODS}


def _measured(
    model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, fresh: torch.Tensor, fresh_labels: torch.Tensor
) -> dict[str, object]:
    ticks = torch.linspace(0, 1, CELLS + 1)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    with torch.no_grad():
        margin = (model(grid).diff(dim=-1))[..., 0]  # logit of class 1 minus logit of class 0
        right = model(x).argmax(dim=1) == labels
    reach = round(toy.EPS * CELLS)
    pool = functools.partial(max_pool2d, kernel_size=2 * reach + 1, stride=1, padding=reach)
    return {
        **toy.accuracies(model, fresh, fresh_labels),
        "x": x,
        "labels": labels,
        "right": right,
        "robust": toy.holds_everywhere(model, x, labels),
        "fresh_robust": 100 * toy.holds_everywhere(model, fresh, fresh_labels).double().mean().item(),
        "ticks": ticks,
        "margin": margin,
        "highest": pool(margin[None])[0],  # over the ball around each point
        "lowest": -pool(-margin[None])[0],
    }


def draw(scheme: Scheme) -> Figure:
    """Four panels, one per way of training."""
    figure = sheet(665)
    for ax, (method, found) in zip(figure.subplots(2, 2).flat, data().items(), strict=True):
        panel(ax, found, scheme)
        head = f"{HEADS.get(method, method)}\nclean {found['clean']:.1f} %, PGD-20 {found['pgd20']:.1f} %"
        ax.set_title(head, fontsize=SMALL)
        x, labels, right, robust = (found[key] for key in ("x", "labels", "right", "robust"))
        for value, colour in enumerate((scheme.blue, scheme.orange)):
            own = labels == value
            held, broken, wrong = own & robust, own & right & ~robust, own & ~right
            ax.scatter(*x[held].T, s=22, color=colour, linewidths=0)
            ax.scatter(*x[broken].T, s=22, facecolors="none", edgecolors=colour, linewidths=1.5)
            ax.scatter(*x[wrong].T, s=30, marker="x", color=colour, linewidths=1.9)
        side = 2 * toy.EPS
        ax.add_patch(Rectangle((0.03, 0.2), side, side, fill=False, edgecolor=scheme.text, linewidth=1.4))
        ax.annotate("ball", (0.03 + toy.EPS, 0.2 + toy.EPS), ha="center", va="center", fontsize=SMALL)
    figure.legend(handles=_legend(scheme), loc="outside lower center", ncols=2)
    return figure


def panel(ax: object, found: dict[str, object], scheme: Scheme) -> None:
    """Shade the plane: strongly where a whole ball keeps its prediction, weakly where it does not."""
    bare(ax, xlim=(0, 1), ylim=Y_RANGE)
    rows = (found["ticks"] >= Y_RANGE[0] - 0.01) & (found["ticks"] <= Y_RANGE[1] + 0.01)
    fields = {key: found[key][rows].numpy() for key in ("margin", "highest", "lowest")}
    place = found["ticks"].numpy(), found["ticks"][rows].numpy()
    ends = float("inf")
    ax.contourf(*place, fields["highest"], levels=[-ends, 0], colors=[scheme.blue], alpha=0.33)
    ax.contourf(*place, fields["lowest"], levels=[0, ends], colors=[scheme.orange], alpha=0.33)
    ax.contourf(*place, fields["margin"], levels=[-ends, 0, ends], colors=[scheme.blue, scheme.orange], alpha=0.13)
    ax.contour(*place, fields["margin"], levels=[0], colors=[scheme.text], linewidths=1.8)


def _legend(scheme: Scheme) -> list[Line2D | Patch]:
    mark = {"color": "none", "markeredgecolor": scheme.text, "markersize": 7}
    return [
        Line2D([], [], color=scheme.text, linewidth=1.8, label="decision boundary"),
        Patch(facecolor=scheme.muted, alpha=0.5, label="prediction holds in the whole ball"),
        Patch(facecolor=scheme.muted, alpha=0.18, label="boundary is within reach"),
        Line2D([], [], **mark | {"color": scheme.text}, marker="o", linestyle="", label="right in the whole ball"),
        Line2D([], [], **mark, marker="o", linestyle="", markeredgewidth=1.5, label="right, but not in the whole ball"),
        Line2D([], [], **mark, marker="x", linestyle="", markeredgewidth=1.9, label="wrong"),
    ]


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    measured = "; ".join(
        f"{method}: clean {found['clean']:.1f}, PGD-20 {found['pgd20']:.1f}" for method, found in data().items()
    )
    return write(
        "boundaries",
        "Decision regions and robust domains after four ways of training",
        "Four panels of the same two-moons problem. Standard training winds the boundary between the points and passes "
        "close to many; the three adversarial trainings give up points in the middle, keep more whole balls on one "
        f"side, and look much alike. Accuracies on 2000 fresh points in percent. {measured}.",
        draw,
        folder,
    )


if __name__ == "__main__":
    main()
