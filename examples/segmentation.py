"""Adversarial training of a dense prediction: which digit does each pixel belong to?

    python examples/segmentation.py --seeds 5 --out segmentation.json --figure segmentation.png

Canvases of two handwritten digits, a U-Net of 118,475 parameters, Linf 0.05. PGD-AT, with RPAT, and RAAT in both
readings of a reduced perturbation where a sample's places disagree. Attacked by PGD, SegPGD and CosPGD.
"""

import argparse
import functools
import json
import platform
import statistics
from pathlib import Path

import torch

from perceptual_at import Linf, draw_beta, frozen, objectives, pgd
from perceptual_at.attacks import cospgd_loss, segpgd_loss
from perceptual_at.data import digit_canvases
from perceptual_at.evaluation import bootstrap_interval
from perceptual_at.metrics import confusion_counts, mean_iou, pixel_accuracy
from perceptual_at.models import UNet

THREAT, CLASSES = Linf(0.05), 11
CANVAS = {"size": 16, "per_canvas": 2}
ARMS = {
    "PGD-AT": (objectives.pgd_at, {}),
    "PGD-AT + RPAT": (objectives.rpat, {}),
    "RAAT, per sample": (objectives.raat, {"reduce_per": "sample"}),
    "RAAT, per place": (objectives.raat, {"reduce_per": "place"}),
}


def two_views(x, generator):
    """The same canvases in two exposures: nothing moves, so both views show the same at each place."""
    gains = 0.7 + 0.3 * torch.rand(2, len(x), 1, 1, 1, generator=generator)
    return x * gains[0], x * gains[1]


def train(arm, seed, steps, batch_size=16):
    """One network, trained for some steps on 500 canvases."""
    objective, options = ARMS[arm]
    torch.manual_seed(seed)
    model, generator = UNet(width=16, num_classes=CLASSES), torch.Generator().manual_seed(seed)
    x, labels = digit_canvases(500, "train", seed=seed, **CANVAS)
    attack = functools.partial(pgd, threat=THREAT, steps=3, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=generator)
        views = two_views(x[rows], generator)
        if objective is objectives.raat:
            drawn = {"mix": draw_beta(fold="max", generator=generator)}
        else:
            drawn, views = {}, views[:1]
        loss, _ = objective(model, views, labels[rows], attack, **options, **drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def seg_pgd(model, x, labels, *, steps, generator):
    """SegPGD: a step of PGD at a time, each with its own weight of the places that are wrong already."""
    x_adv = THREAT.random_start(x, generator=generator)
    for step in range(steps):
        loss = functools.partial(segpgd_loss, wrong_weight=step / (2 * steps))
        x_adv = pgd(model, x, labels, THREAT, steps=1, step_size=2.5 * THREAT.eps / steps, start=x_adv, loss=loss)
    return x_adv


def measure(model, x, labels, steps):
    """Counts of (label, prediction) of every canvas, `(N, K, K)`, and accuracies: without attack and under each."""
    noise = {name: torch.Generator().manual_seed(0) for name in ("pgd", "segpgd", "cospgd")}
    attacked = {
        "clean": x,
        "pgd": pgd(model, x, labels, THREAT, steps=steps, generator=noise["pgd"]),
        "segpgd": seg_pgd(model, x, labels, steps=steps, generator=noise["segpgd"]),
        "cospgd": pgd(model, x, labels, THREAT, steps=steps, loss=cospgd_loss, generator=noise["cospgd"]),
    }
    with torch.no_grad(), frozen(model) as f:
        logits = {name: f(x_adv) for name, x_adv in attacked.items()}
    accuracies = {name: pixel_accuracy(z, labels) for name, z in logits.items()}
    accuracies["worst"] = torch.stack([accuracies[name] for name in noise]).amin(dim=0)  # of each canvas
    counts = {name: confusion_counts(z, labels) for name, z in logits.items()}
    return accuracies, counts, {name: z.argmax(dim=1) for name, z in logits.items()}


def report(accuracies, counts):
    """The numbers of one network, in percent, with intervals over the canvases."""
    found = {}
    for name, each in accuracies.items():
        low, high = bootstrap_interval(each)
        found[f"{name} pixels"] = {"value": 100 * float(each.mean()), "interval": [100 * low, 100 * high]}
    for name, each in counts.items():
        low, high = bootstrap_interval(each, statistic=lambda some: mean_iou(some.sum(dim=0)))
        found[f"{name} mIoU"] = {"value": 100 * float(mean_iou(each.sum(dim=0))), "interval": [100 * low, 100 * high]}
    return found


def draw(path, x, labels, guesses):
    """A canvas in each row: image, labels, then what each network sees without attack and under PGD."""
    import matplotlib.pyplot as plt

    columns = {"image": x[:, 0], "labels": labels}
    for arm, seen in guesses.items():
        columns |= {f"{arm}\nclean": seen["clean"], f"{arm}\nPGD": seen["pgd"]}
    figure, axes = plt.subplots(3, len(columns), figsize=(1.6 * len(columns), 5.2), squeeze=False)
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=8)
        for ax, picture in zip(column, pictures, strict=False):
            ax.imshow(
                picture.numpy(),
                cmap="gray" if title == "image" else "tab20",
                vmin=0,
                vmax=1 if title == "image" else 10,
            )
            ax.set_axis_off()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description="Segment handwritten digits robustly; see the head of the file.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--canvases", type=int, default=60, help="of the test")
    parser.add_argument("--out", type=Path, help="where to write the numbers, as JSON")
    parser.add_argument("--figure", type=Path, help="where to draw predictions of seed 0")
    options = parser.parse_args()

    torch.set_num_threads(1)
    x, labels = digit_canvases(options.canvases, "test", **CANVAS)
    runs, guesses = {}, {}
    for arm in ARMS:
        for seed in range(options.seeds):
            accuracies, counts, seen = measure(train(arm, seed, options.steps), x, labels, options.attack_steps)
            runs.setdefault(arm, []).append(report(accuracies, counts))
            guesses.setdefault(arm, seen)
            print(
                arm, f"seed {seed}:", ", ".join(f"{k} {v['value']:.1f}" for k, v in runs[arm][-1].items()), flush=True
            )
    for arm, found in runs.items():
        row = []
        for name in found[0]:
            values = [one[name]["value"] for one in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{name} {statistics.mean(values):.1f}{spread}")
        print(f"{arm}: {', '.join(row)}")
    if options.out:
        settings = {name: value for name, value in vars(options).items() if isinstance(value, int)}
        where = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        record = {"settings": settings, "where": where, "runs": runs}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        draw(options.figure, x, labels, guesses)


if __name__ == "__main__":
    main()
