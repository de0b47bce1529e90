"""Did training do what the theorems promise? PGD-AT, RPAT and RAAT on real digits, measured along PGD perturbations.

    python examples/theory_report.py                                # trains four models, about a minute
    python examples/theory_report.py --checkpoint mine=weights.pt   # reads state dicts of a DigitsCNN instead

For every model: the residual after each layer (RAAT, Definition 1) and at the logits (RPAT, Equation 5), second
differences (Theorem 1), units that flip, the change of the Jacobian along the perturbation and in full (Theorem 2),
the local Lipschitz bound (Equation 12). Writes report.json and report.png to --out.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from unittest import mock

import common
import pgd_at
import raat
import rpat
import torch

from perceptual_at import Linf, pgd, plotting, theory
from perceptual_at.checkpoints import written_whole
from perceptual_at.data import digits
from perceptual_at.models import DigitsCNN

THREAT = Linf(eps=0.15)
# The short example of each method, its views, and constants to change: Equation 3 weighs the residual at 1/2 by 16.
RECIPES = {
    "PGD-AT": (pgd_at, 1, {}),
    "RPAT": (rpat, 1, {}),
    "RPAT, Eq. 3": (rpat, 1, {"WEIGHT": 16.0}),
    "RAAT": (raat, 2, {}),
}
STAGES = ("layer1", "layer2", "layer3", "linear")
QUARTERS = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
PLACES = torch.linspace(0, 1, 21, dtype=torch.float64)[1:-1]


def train(module, views, constants, seed, epochs):
    """The recipe of one of the short examples."""
    torch.manual_seed(seed)
    order, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    batches = common.Batches(*digits("train", seed=seed), views=views, generator=order)
    with mock.patch.dict(vars(module), constants):
        return module.train(DigitsCNN(), batches, noise, epochs=epochs)


def load(path):
    """A DigitsCNN from a state dict, whatever its width."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    classes, features = weights["linear.weight"].shape
    model = DigitsCNN(width=features // 2, num_classes=classes)
    model.load_state_dict(weights)
    return model


def size(values):
    """Length over the outputs, mean over the samples."""
    return values.flatten(2).norm(dim=2).mean(dim=1).tolist()


def measure(model, x, labels, noise):
    """Everything the report shows of one model, in float64 and eval mode."""
    model = model.eval().double()
    x_adv = pgd(model, x, labels, THREAT, steps=20, generator=noise)
    delta = x_adv - x
    with torch.no_grad():
        clean, adv = model(x), model(x_adv)
        change = (adv - clean).norm(dim=1)
        layers = theory.layer_residuals(model, x, delta, PLACES, layers=STAGES, relative=True)
        bends = theory.second_difference(model, x, delta, PLACES, step=0.05) / change[:, None]
        flips = theory.count_activation_flips(model, x, delta, points=65)
        slopes = theory.directional_jacobian(model, x, delta, torch.cat([torch.zeros(1), PLACES]))
    gap = theory.directional_gap(model, x, delta, QUARTERS)
    bound = theory.local_lipschitz_bound(model, x, delta, QUARTERS)
    return {
        "clean": (clean.argmax(1) == labels).double().mean().item(),
        "pgd20": (adv.argmax(1) == labels).double().mean().item(),
        "change": change.mean().item(),
        "residual": {name: size(residual) for name, residual in layers.items()},
        "largest_residual": layers["linear"].norm(dim=2).amax(0).tolist(),
        "second_difference": size(bends),
        "slope_change": size((slopes[1:] - slopes[0]) / change[:, None]),
        "flips": flips.double().mean().item(),
        "full_gap": (gap.right / change).mean(1).tolist(),
        "share_of_step": (gap.left / gap.right).mean().item(),
        "steepest": bound.left.mean().item(),
        "lipschitz_bound": bound.right.mean().item(),
        "hessian_is_vacuous": theory.hessian_is_vacuous(model, x, delta),
    }


LINES = {
    "clean accuracy": lambda m: f"{m['clean']:.1%}",
    "PGD-20 accuracy": lambda m: f"{m['pgd20']:.1%}",
    "change of the logits": lambda m: f"{m['change']:.2f}",
    "largest residual / change": lambda m: f"{sum(m['largest_residual']) / len(m['largest_residual']):.3f}",
    "  after layer 1, at 1/2": lambda m: f"{m['residual']['layer1'][len(PLACES) // 2]:.3f}",
    "  after layer 3, at 1/2": lambda m: f"{m['residual']['layer3'][len(PLACES) // 2]:.3f}",
    "second difference / change": lambda m: f"{max(m['second_difference']):.2f}",
    "units that flip": lambda m: f"{m['flips']:.0f}",
    "slope change / change": lambda m: f"{max(m['slope_change']):.2f}",
    "Jacobian change / change": lambda m: f"{max(m['full_gap']):.2f}",
    "  share along the step": lambda m: f"{m['share_of_step']:.2f}",
    "steepest on the segment": lambda m: f"{m['steepest']:.2f}",
    "local Lipschitz bound": lambda m: f"{m['lipschitz_bound']:.2f}",
    "Hessian checks are vacuous": lambda m: "yes" if m["hessian_is_vacuous"] else "no",
}


def table_text(results):
    width = max(len(line) for line in LINES)
    rows = [" " * width + "".join(f"{name:>12}" for name in results)]
    for line, cell in LINES.items():
        rows.append(f"{line:<{width}}" + "".join(f"{cell(result):>12}" for result in results.values()))
    return "\n".join(rows)


def verdict(results, name, baseline="PGD-AT"):
    """Whether a model's path is straighter than the baseline's, image by image."""
    pairs = [torch.tensor(results[key]["largest_residual"]) for key in (name, baseline)]
    difference = pairs[0] - pairs[1]
    error = (difference.std() / len(difference) ** 0.5).item()  # of the mean over images, for this one training run
    text = f"{name}: the largest residual is {pairs[0].mean():.3f} of the change, {baseline} {pairs[1].mean():.3f}"
    if difference.mean().abs() < 2 * error:
        return f"{text}; the difference is inside the noise (+- {error:.3f} over images)."
    word = "straighter" if difference.mean() < 0 else "more bent"
    return f"{text}; {word} beyond the noise of +- {error:.3f} over images."


def draw(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    names = list(results)
    curves = {
        "residual of the logits / change": lambda m: (PLACES, m["residual"]["linear"]),
        "second difference / change (step 0.05)": lambda m: (PLACES, m["second_difference"]),
        "change of the slope / change": lambda m: (PLACES, m["slope_change"]),
        "change of the whole Jacobian / change": lambda m: (QUARTERS, m["full_gap"]),
    }
    for ax, (title, curve) in zip(axes, curves.items(), strict=False):
        for number, name in enumerate(names):
            ax.plot(*curve(results[name]), color=f"C{number}", label=name, marker="o" if "whole" in title else None)
        ax.set(title=title, xlabel="place on the segment", xlim=(0, 1))
        ax.set_ylim(bottom=0)
    axes[0].legend()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * width
        middle = [results[name]["residual"][stage][len(PLACES) // 2] for stage in STAGES]
        axes[4].bar([i + shift for i in range(len(STAGES))], middle, width, color=f"C{number}")
        axes[5].bar([number], [results[name]["steepest"]], 0.6, color=f"C{number}")
        axes[5].plot([number - 0.3, number + 0.3], [results[name]["lipschitz_bound"]] * 2, color="0.3", linewidth=2)
    axes[4].set(title="residual at 1/2, layer by layer / its change", xticks=range(len(STAGES)), xticklabels=STAGES)
    axes[5].set(title="steepest place on the segment, and its bound", xticks=range(len(names)), xticklabels=names)
    plotting.save(axes[0], path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", metavar="NAME=FILE", help="read a model; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="epochs per model (default 10)")
    parser.add_argument("--images", type=int, default=64, help="test images to measure on (default 64)")
    parser.add_argument("--out", type=Path, default=Path("outputs/theory_report"), help="folder for the results")
    options = parser.parse_args()

    began = time.perf_counter()
    if options.checkpoint:
        files = dict(entry.split("=", 1) for entry in options.checkpoint)
        models = {name: load(path) for name, path in files.items()}
    else:
        models = {}
        for name, recipe in RECIPES.items():
            print(f"training {name}")
            models[name] = train(*recipe, options.seed, options.epochs)
    x, labels = digits("test", seed=options.seed)
    x, labels = x[: options.images].double(), labels[: options.images]
    results = {}
    for name, model in models.items():
        results[name] = measure(model, x, labels, torch.Generator().manual_seed(options.seed))

    print(f"\n{len(x)} digits, PGD-20 in {THREAT}; lengths over the logits, means over the images\n")
    print(table_text(results), "", sep="\n")
    if "PGD-AT" in results:
        for name in results:
            if name != "PGD-AT":
                print(verdict(results, name))
    report = {
        "settings": {"seed": options.seed, "epochs": options.epochs, "images": len(x), "threat": repr(THREAT)},
        "places": PLACES.tolist(),
        "models": results,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - began, 1),
    }
    with written_whole(options.out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2))
    draw(results, options.out / "report.png")
    print(f"\n{report['seconds']} s; wrote {options.out / 'report.json'} and {options.out / 'report.png'}")


if __name__ == "__main__":
    main()
