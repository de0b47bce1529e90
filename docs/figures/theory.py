"""The pictures of the theory pages, written as SVG: readable on light and on dark pages, the same on every run.

python docs/figures/theory.py
"""

import math
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn

from perceptual_at import theory

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, GREY = "#4c8bd6", "#e08a2e", "#3fa37c", "#d65f6a", "#8a8f98"

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "perceptual_at", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
        "axes.titlecolor": GREY, "axes.titlesize": 10, "xtick.color": GREY, "ytick.color": GREY, "text.color": GREY,
        "legend.frameon": False, "legend.labelcolor": GREY, "legend.fontsize": 9, "lines.linewidth": 1.8,
    }
)  # fmt: skip

ZERO, ONE = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)


def grid(points):
    """Uniform places on the segment, ends included."""
    return torch.linspace(0, 1, points, dtype=torch.float64)


def panels(columns, width=7.2, height=3.0):
    """A figure and its axes, side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure, name):
    """Write an SVG with no date and no background."""
    figure.savefig(HERE / f"{name}.svg", transparent=True, metadata={"Date": None})


def spiral(t):
    """At distance `t` from the start, turning once."""
    return torch.cat([t * torch.cos(2 * math.pi * t), t * torch.sin(2 * math.pi * t)], dim=1)


def spiral_and_chord():
    """Definition 1 by lengths: every second place on the spiral is as far from the start as it should be."""
    figure, (left, right) = panels(2)
    path = spiral(grid(161)[:, None])
    left.plot([0, 1], [0, 0], "--", color=GREY, linewidth=1.2)
    left.plot(path[:, 0], path[:, 1], color=BLUE)
    for alpha in (0.25, 0.5, 0.75):
        point = spiral(torch.full((1, 1), alpha).double())[0]
        left.plot([point[0], alpha], [point[1], 0], color=RED, linewidth=1)
        left.plot(alpha, 0, "o", color=GREY, markersize=5)
        left.plot(*point, "o", color=BLUE, markersize=5)
        left.annotate(f"{alpha}", point, xytext=(-8, 7), textcoords="offset points", fontsize=9)
    left.annotate("h(x)", (0, 0), xytext=(3, -14), textcoords="offset points", fontsize=9)
    left.annotate("h(x')", (1, 0), xytext=(-6, -14), textcoords="offset points", fontsize=9)
    left.margins(0.12)
    left.set(aspect="equal", xticks=[], yticks=[], title="path of two outputs, and its chord")
    left.spines[:].set_visible(False)
    places = grid(81)
    right.plot(
        places, theory.segment_residual(spiral, ZERO, ONE, places).norm(dim=2)[:, 0], color=RED, label="residual"
    )
    right.plot(places, theory.norm_defect(spiral, ZERO, ONE, places)[:, 0], color=BLUE, label="defect of the lengths")
    right.set(xlabel="place on the segment", title="what each reading measures")
    right.legend(loc="upper left")
    save(figure, "theory_spiral")


def blind_midpoint():
    """Curves whose residual at one half is zero."""
    curves = {
        "odd cubic": (lambda t: 12 * ((t - 0.5) ** 3 - (t - 0.5) / 4), BLUE),
        "sine": (lambda t: torch.sin(2 * math.pi * t), ORANGE),
        "hat of three kinks": (
            lambda t: 20 * (torch.relu(t - 0.15) - 2 * torch.relu(t - 0.2) + torch.relu(t - 0.25)), GREEN
        ),
    }  # fmt: skip
    figure, axes = panels(3, height=2.2)
    for ax, (title, (curve, color)) in zip(axes, curves.items(), strict=True):
        t = grid(121)
        ax.plot([0, 1], curve(torch.stack([ZERO, ONE])).flatten(), "--", color=GREY, linewidth=1.2)
        ax.plot(t, curve(t), color=color)
        ax.plot(0.5, curve(torch.tensor(0.5)), "o", color=RED, markersize=6)
        ax.set(title=title, xticks=[0, 0.5, 1], yticks=[], ylim=(-1.15, 1.15))
    save(figure, "theory_midpoint")


def flat_and_curved():
    """A residual that vanishes and a curvature that stays."""
    figure, (left, right) = panels(2, height=2.4)
    for n, color in ((1, BLUE), (2, ORANGE), (4, GREEN)):
        t = grid(241)
        left.plot(t, torch.cos(2 * math.pi * n * t) / n**2, color=color, label=f"n = {n}")
        bend = theory.directional_second_derivative(lambda t, n=n: torch.cos(2 * math.pi * n * t) / n**2, ZERO, ONE, t)
        right.plot(t, bend[:, 0, 0], color=color)
    left.set(title="cos(2 pi n t) / n^2: the residual shrinks", xlabel="t", yticks=[-1, 0, 1])
    right.set(title="its second derivative does not", xlabel="t")
    left.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.2, bbox_to_anchor=(0.5, 1.05))
    save(figure, "theory_flat_and_curved")


def relu_path():
    """One output of a small ReLU network along a segment: kinks, slope, and a Hessian of zero."""
    torch.manual_seed(55)
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1)).double().eval()
    x, delta = torch.randn(1, 4).double(), 4 * torch.randn(1, 4).double()
    with torch.no_grad():
        (found,) = theory.kinks(net, x, delta)
        t = torch.cat([grid(2), found.alphas]).sort().values
        values = net(x + t[:, None] * delta)[:, 0]
        fine = grid(801)
        slope = theory.directional_jacobian(net, x, delta, fine)[:, 0, 0]
        bend = theory.directional_second_derivative(net, x, delta, fine)[:, 0, 0]
    figure, (left, right) = panels(2, height=2.6)
    left.plot([0, 1], values[[0, -1]], "--", color=GREY, linewidth=1.2, label="chord")
    left.plot(t, values, color=BLUE, label="logit")
    left.plot(t[1:-1], values[1:-1], "o", color=RED, markersize=4, label="kinks")
    left.set(title="one logit of a ReLU network", xlabel="place on the segment", yticks=[])
    left.legend()
    right.plot(fine, slope, color=BLUE, label="slope")
    right.plot(fine, bend, color=RED, label="second derivative, by autograd")
    right.set(title="all curvature sits in the jumps", xlabel="place on the segment", yticks=[0])
    right.legend(loc="upper right")
    save(figure, "theory_relu")


def turning_jacobian():
    """The product of two inputs along the first axis: no residual, and a gradient that turns."""
    figure, (ax,) = panels(1, width=4.6, height=3.2)
    xs, ys = torch.meshgrid(torch.linspace(-0.3, 1.7, 60), torch.linspace(0.4, 2.1, 60), indexing="xy")
    ax.contour(xs, ys, xs * ys, levels=12, colors=GREY, linewidths=0.7, alpha=0.8)
    ax.plot([0, 1], [1, 1], color=BLUE, linewidth=2.5)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        gradient = theory.batch_jacobian(lambda x: x[:, :1] * x[:, 1:], torch.tensor([[alpha, 1.0]]))[0, 0]
        arrow = {"arrowstyle": "-|>", "color": RED, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (alpha + 0.45 * gradient[0], 1 + 0.45 * gradient[1]), (alpha, 1), arrowprops=arrow)
        ax.plot(alpha, 1, "o", color=BLUE, markersize=4)
    ax.set(
        aspect="equal",
        xlabel="first input, along the perturbation",
        ylabel="second input",
        xticks=[0, 1],
        yticks=[1, 2],
    )
    save(figure, "theory_jacobian")


def diverging_series():
    """Partial sums of the Taylor form, inside and outside the radius of convergence."""
    import mpmath

    figure, (ax,) = panels(1, width=5.2, height=2.7)
    orders = list(range(2, 41))
    for slope, color in ((1, BLUE), (2, RED)):
        with mpmath.workdps(40):
            start, step, half = mpmath.mpf(0), mpmath.mpf("0.9"), mpmath.mpf("0.5")

            def curve(t, slope=slope):
                return mpmath.tanh(slope * t + mpmath.mpf("0.3"))

            coefficients = mpmath.taylor(lambda t: curve(start + step * t), 0, max(orders))  # noqa: B023
            true = curve(step / 2) - (curve(start) + curve(step)) / 2
            sums = [sum((half**k - half) * coefficients[k] for k in range(2, order + 1)) for order in orders]
            errors = [max(1e-12, abs(float(value - true))) for value in sums]
        radius = math.hypot(0.3, math.pi / 2) / slope / 0.9
        ax.semilogy(
            orders,
            errors,
            color=color,
            label=f"tanh({'2 ' if slope == 2 else ''}t + 0.3): radius / step = {radius:.2f}",
        )
    ax.set(xlabel="terms", title="error of the Taylor form of the mixup residual, step 0.9 < 1")
    ax.legend()
    save(figure, "theory_series")


def first_order_term():
    """What DICAR compares against the budget: the printed part and the part of first order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 10)).double()
    net.eval()
    x, step = torch.rand(1, 64).double(), 0.2 * torch.randn(1, 64).double() / 8
    sign = theory.batch_jacobian(net, x)[0, 0].sign()[None]
    budgets = torch.logspace(-6, -1, 26, dtype=torch.float64)
    with torch.no_grad():
        still = theory.mixup_residual(net, x, x + step, 0.5).norm().item()
        whole = [
            theory.adversarial_mixup_identity(net, x, x + step, eps * sign, eps * sign, 0.5).left.norm().item()
            for eps in budgets
        ]
        term = [
            theory.adversarial_first_order_term(net, x, x + step, eps * sign, eps * sign, 0.5).norm().item()
            for eps in budgets
        ]
    figure, (ax,) = panels(1, width=5.2, height=2.7)
    ax.loglog(budgets, whole, color=BLUE, label="what DICAR compares", linewidth=2.4)
    ax.loglog(budgets, term, "--", color=RED, label="slope times attack, left out")
    ax.axhline(still, linestyle=":", color=ORANGE, label="the printed terms")
    ax.axvline(8 / 255, color=GREY, linewidth=0.8)
    ax.annotate("8/255", (8 / 255, min(term)), xytext=(-30, 4), textcoords="offset points", fontsize=9)
    ax.set(xlabel="attack budget", title="two views of one image, 0.2 apart")
    ax.legend()
    save(figure, "theory_first_order")


def gaussian_samples():
    """Robust error against unlabelled samples, and the threshold against the dimension."""
    figure, (left, right) = panels(2, height=2.8)
    c, eps = 0.6, 0.9
    generator = torch.Generator().manual_seed(0)
    counts = [10 ** (k / 20) for k in range(4, 71)]
    for d, color in ((10**3, BLUE), (10**4, ORANGE), (10**5, GREEN)):
        sigma = c * d**0.25
        curve = [theory.predicted_error(d, sigma, eps=eps, unlabeled=m) for m in counts]
        left.semilogx(counts, curve, color=color, label=f"d = {d:,}")
    d, sigma = 10**4, c * 10
    x = 1 + sigma * torch.randn(1, d, generator=generator)
    for m in (10, 100, 1000):
        copies = x + torch.randn(m, d, generator=generator)
        w = theory.consistency_estimator(x, torch.ones(1), copies)
        error = theory.robust_error(w, torch.ones(d), sigma, eps=eps).item()
        left.plot(m, error, "x", color=RED, markersize=7, label="augmented copies" if m == 10 else None)
    left.set(xlabel="unlabelled samples", title="robust error", ylim=(-0.03, 1.06))
    left.legend(loc="center right", fontsize=8)
    dimensions = [1000, 3162, 10_000, 31_623, 100_000]
    right.loglog(
        dimensions, [theory.half_error_threshold(d, c, eps) for d in dimensions], color=GREY, label="closed form"
    )
    simulated = [theory.simulated_half_error_threshold(d, c, eps, generator=generator) for d in dimensions]
    right.loglog(dimensions, simulated, "o", color=RED, markersize=5, label="simulation")
    right.set(
        xlabel="dimension", title="samples for a robust error of 1/2", yticks=[20, 50, 100], yticklabels=[20, 50, 100]
    )
    right.minorticks_off()
    right.legend()
    save(figure, "theory_gaussian")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for picture in (
        spiral_and_chord, blind_midpoint, flat_and_curved, relu_path, turning_jacobian, diverging_series,
        first_order_term, gaussian_samples,
    ):  # fmt: skip
        picture()
        print(picture.__name__)
