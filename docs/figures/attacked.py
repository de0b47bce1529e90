"""Three pictures of one recorded run on digits: attacked images, a training log, and how logits move under attack.

python docs/figures/attacked.py --train   # trains three networks, a minute on a free core, and records the run
python docs/figures/attacked.py           # draws the record
"""

import functools
import json
import platform
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from style import HERE, SMALL, Scheme, sheet, write
from torch.nn.functional import cross_entropy

from perceptual_at import Linf, evaluate, objectives, pgd
from perceptual_at.augment import random_crop_flip
from perceptual_at.data import TensorImages, digits, loader
from perceptual_at.diagnostics import perception_path
from perceptual_at.models import DigitsCNN

RECORD = HERE.parent / "results" / "attacked.json"
THREAT, SEED, EPOCHS, WIDTH, SHOWN = Linf(0.15), 0, 8, 16, 6
ALPHAS = [i / 8 for i in range(9)]
METHODS = ("standard", "PGD-AT", "PGD-AT+RPAT")


def trained(method: str) -> tuple[DigitsCNN, list[dict[str, float]]]:
    """A network and its log: loss, clean and PGD-10 accuracy on held-out images after each epoch."""
    torch.manual_seed(SEED)
    noise = torch.Generator().manual_seed(SEED)
    attack = functools.partial(pgd, threat=THREAT, steps=10, generator=noise)
    model, data, held_out = DigitsCNN(width=WIDTH), TensorImages(*digits("train")), digits("validation")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 7])
    log = []
    for _ in range(EPOCHS):
        model.train()
        for x, labels in loader(data, 128, shuffle=True):
            x = random_crop_flip(x, padding=1, flip=False)
            if method == "standard":
                loss = cross_entropy(model(x), labels)
            else:
                objective = objectives.rpat if method == "PGD-AT+RPAT" else objectives.pgd_at
                loss, _ = objective(model, (x,), labels, attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        watch = functools.partial(pgd, threat=THREAT, steps=10)
        seen = evaluate(model, [held_out], {"pgd10": watch}, progress=False)
        log.append({"loss": float(loss), "clean": seen.clean_accuracy, "pgd10": seen.robust_accuracy["pgd10"]})
    return model.eval(), log


def record() -> None:
    """Train and write what the pictures show."""
    x, labels = digits("test")
    run = {"command": "python docs/figures/attacked.py --train", "threat": str(THREAT), "seed": SEED, "methods": {}}
    run["versions"] = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
    for method in METHODS:
        model, log = trained(method)
        generator = torch.Generator().manual_seed(SEED)
        x_adv = pgd(model, x, labels, THREAT, steps=20, generator=generator)
        with torch.no_grad():
            before, after = model(x).argmax(1), model(x_adv).argmax(1)
        run["methods"][method] = {
            "log": log,
            "moved": [round(float(value), 4) for value in perception_path(model, x, x_adv, ALPHAS).mean(dim=1)],
            "images": [
                {
                    "clean": (16 * x[i, 0]).round().int().tolist(),
                    "attacked": [[round(float(value), 3) for value in row] for row in x_adv[i, 0]],
                    "label": int(labels[i]), "before": int(before[i]), "after": int(after[i]),
                }
                for i in range(SHOWN)
            ],
        }  # fmt: skip
        print(method, log[-1])
    RECORD.write_text(json.dumps(run) + "\n", encoding="utf-8")


def recorded() -> dict[str, dict[str, object]]:
    """What was recorded of each method."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["methods"]


def draw_images(scheme: Scheme) -> Figure:
    """Clean, perturbation, adversarial, one column per test image, against the standard network."""
    figure, images = sheet(400), recorded()["standard"]["images"]
    axes = figure.subplots(3, SHOWN)
    for column, image in zip(axes.T, images, strict=True):
        clean, attacked = torch.tensor(image["clean"]) / 16, torch.tensor(image["attacked"])
        change = attacked - clean
        for ax, pixels, low, high, colours in (
            (column[0], clean, 0, 1, "gray"),
            (column[1], change, -0.15, 0.15, "RdBu_r"),
            (column[2], attacked, 0, 1, "gray"),
        ):  # fmt: skip
            ax.pcolormesh(pixels, cmap=colours, vmin=low, vmax=high)
            ax.set(xticks=[], yticks=[], aspect="equal")
            ax.invert_yaxis()
        column[0].set_title(f"{image['before']}", color=scheme.green, fontsize=SMALL)
        wrong = image["after"] != image["label"]
        column[2].set_xlabel(f"{image['after']}", color=scheme.red if wrong else scheme.green, fontsize=SMALL)
    for ax, name in zip(axes[:, 0], ("clean", "change", "attacked"), strict=True):
        ax.set_ylabel(name, fontsize=SMALL)
    return figure


def draw_log(_: Scheme) -> Figure:
    """Clean (dashed) and PGD-10 accuracy on held-out images by epoch."""
    figure = sheet(400)
    ax = figure.subplots()
    for number, (method, run) in enumerate(recorded().items()):
        epochs = range(1, len(run["log"]) + 1)
        ax.plot(epochs, [100 * entry["clean"] for entry in run["log"]], color=f"C{number}", linestyle="dashed")
        ax.plot(epochs, [100 * entry["pgd10"] for entry in run["log"]], color=f"C{number}", label=method)
    ax.set(xlabel="epoch", ylabel="accuracy, %", ylim=(-2, 102))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_paths(scheme: Scheme) -> Figure:
    """How far the logits have moved at each place of the path, on average over the test images."""
    figure = sheet(400)
    ax = figure.subplots()
    for method, run in recorded().items():
        (line,) = ax.plot(ALPHAS, run["moved"], label=method)
        ax.plot([0, 1], [0, run["moved"][-1]], color=line.get_color(), linewidth=1, linestyle="dotted")
    ax.set(xlabel="place on the path, alpha", ylabel="logits moved by")
    ax.text(0.02, 0.97, "dotted: even movement", transform=ax.transAxes, va="top", color=scheme.muted, fontsize=SMALL)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(folder: Path | None = None) -> list[Path]:
    """Write the pictures."""
    return [
        *write(
            "attacked",
            "Digits before and after PGD-20 against a standard network",
            "Six test digits, the change that the attack made to each, and the result: the change is at most 0.15 per "
            "pixel, and the predictions under the attacked digits differ from those above the clean ones.",
            draw_images,
            folder,
        ),
        *write(
            "training_log",
            "Held-out accuracy by epoch of three ways to train",
            "Accuracy on held-out digits after every epoch, clean dashed and under PGD-10 solid. Standard training is "
            "accurate and not robust; PGD-AT and PGD-AT with RPAT are both.",
            draw_log,
            folder,
        ),
        *write(
            "perception_paths",
            "How far logits move on the way to an attacked digit",
            "Mean movement of the logits at nine places between clean and attacked test digits for three networks, "
            "each beside the straight line of even movement.",
            draw_paths,
            folder,
        ),
    ]


if __name__ == "__main__":
    if "--train" in sys.argv:
        record()
    main()
