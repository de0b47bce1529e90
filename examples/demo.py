"""Standard training, PGD-AT, PGD-AT+RPAT and RAAT on real digits: one table, one plot, one honest sentence.

    python examples/demo.py                        # five seeds, about two minutes on two CPU cores
    python examples/demo.py --seeds 2 --epochs 2   # a short form that still trains

Every method sees the same images, augmentation, network, order and number of epochs for a seed, so the
differences between methods are compared seed by seed. Writes table.json and trade_off.png to --out.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import common
import torch
from scipy.stats import ttest_rel
from torch.nn.functional import cross_entropy

import perceptual_at as pat
from perceptual_at import objectives, plotting
from perceptual_at.augment import random_crop_flip
from perceptual_at.checkpoints import written_whole
from perceptual_at.data import digits
from perceptual_at.models import DigitsCNN

THREAT = pat.Linf(eps=0.15)
EPOCHS, BATCH, LEARNING_RATE = 10, 128, 0.1
COLUMNS = ("clean", "pgd20", "mean", "nrr")


def standard(model, views, labels, attack, mix):
    """Cross entropy on clean inputs: what is lost by not training adversarially."""
    loss = cross_entropy(model(views[0]), labels)
    return loss, {"cross_entropy": loss.detach()}


def pgd_at(model, views, labels, attack, mix):
    return objectives.pgd_at(model, views[:1], labels, attack)


def rpat(model, views, labels, attack, mix):
    return objectives.rpat(model, views[:1], labels, attack, alpha=0.5, form="interpolation")


def raat(model, views, labels, attack, mix):
    return objectives.raat(model, views, labels, attack, mix=mix, eta=0.1)


METHODS = {"standard": standard, "PGD-AT": pgd_at, "PGD-AT+RPAT": rpat, "RAAT": raat}


def train(method, seed, epochs, device):
    """One model, trained with everything but the objective equal for all methods."""
    torch.manual_seed(seed)
    model = DigitsCNN().to(device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    attack = functools.partial(pat.pgd, threat=THREAT, steps=10, generator=noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    milestones = [round(epochs * 0.75), round(epochs * 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    x_train, labels_train = digits("train", seed=seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x_train), generator=generator).split(BATCH):
            views = [random_crop_flip(x_train[rows], padding=1, flip=False, generator=generator) for _ in range(2)]
            mix = pat.draw_beta(fold="max", generator=generator)
            views, labels = tuple(view.to(device) for view in views), labels_train[rows].to(device)
            loss, _ = METHODS[method](model, views, labels, attack, mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


def measure(model, seed, device):
    """Clean and PGD-20 accuracy on the test images, in percent."""
    noise = torch.Generator(device).manual_seed(seed)
    pgd20 = functools.partial(pat.pgd, threat=THREAT, steps=20, generator=noise)
    result = pat.evaluate(model, [digits("test", seed=seed)], {"pgd20": pgd20}, device=device, progress=False)
    scores = {"clean": result.clean_accuracy, "pgd20": result.robust_accuracy["pgd20"]}
    scores |= {"mean": result.mean, "nrr": result.nrr}
    return {name: 100 * value for name, value in scores.items()}


def run(method, seed, epochs, device):
    """Train and measure one model."""
    return measure(train(method, seed, epochs, device), seed, device)


def run_all(seeds, epochs, device, workers):
    """Every method with every seed, slowest method first."""
    jobs = [(method, seed, epochs, device) for method in reversed(METHODS) for seed in range(seeds)]
    scores = common.spread(run, jobs, workers)
    return {method: [scores[method, seed, epochs, device] for seed in range(seeds)] for method in METHODS}


def verdict(runs, method, baseline="PGD-AT"):
    """What the paired differences in NRR to the baseline allow us to say."""
    pairs = [[run["nrr"] for run in runs[name]] for name in (method, baseline)]
    differences = [a - b for a, b in zip(*pairs, strict=True)]
    gain = statistics.mean(differences)
    text = f"{method} against {baseline}: NRR {gain:+.2f} points over {len(differences)} seeds"
    if len(differences) < 2 or not any(differences):
        return f"{text}; too few runs to tell it from noise."
    p = 1.0 if len(set(differences)) == 1 else float(ttest_rel(*pairs).pvalue)
    test = "paired t-test, p < 0.001" if p < 0.001 else f"paired t-test, p = {p:.2g}"
    if p >= 0.05:
        return f"{text}; this is inside the noise ({test})."
    return f"{text}, {'better' if gain > 0 else 'worse'} beyond the noise ({test})."


def table_text(runs):
    """The table, mean +- standard deviation over seeds, in percent."""
    lines = [f"{'method':<12}" + "".join(f"{name.upper():>16}" for name in COLUMNS)]
    for method, scores in runs.items():
        cells = []
        for name in COLUMNS:
            values = [score[name] for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        lines.append(f"{method:<12}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs per model (default {EPOCHS})")
    parser.add_argument("--device", default="cpu", help="where to train (default cpu)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for the results")
    options = parser.parse_args()
    if min(options.seeds, options.epochs, options.workers) < 1:
        parser.error("--seeds, --epochs and --workers must be at least 1")

    began = time.perf_counter()
    runs = run_all(options.seeds, options.epochs, options.device, options.workers)
    seconds = time.perf_counter() - began

    sentences = [verdict(runs, method) for method in ("PGD-AT+RPAT", "RAAT")]
    print(f"\nDigits (360 test images per seed), {THREAT}, accuracies in percent, mean ± std over seeds\n")
    print(table_text(runs), "", *sentences, sep="\n")
    result = {
        "data": "scikit-learn digits",
        "threat": repr(THREAT),
        "settings": {"seeds": options.seeds, "epochs": options.epochs, "batch": BATCH, "lr": LEARNING_RATE},
        "runs": runs,
        "verdicts": sentences,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "perceptual_at": pat.__version__},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "workers": options.workers},
    }
    with written_whole(options.out / "table.json") as path:
        path.write_text(json.dumps(result, indent=2))
    points = {method: [(s["clean"], s["pgd20"]) for s in runs[method]] for method in METHODS if method != "standard"}
    ax = plotting.trade_off(points)
    ax.set_title(f"Digits, {THREAT}")
    plotting.save(ax, options.out / "trade_off.png")
    print(f"\n{seconds:.0f} s; wrote {options.out / 'table.json'} and {options.out / 'trade_off.png'}")


if __name__ == "__main__":
    main()
