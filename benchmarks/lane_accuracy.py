"""What a lane changes: robust accuracy measured in it, and models trained in it, over several seeds.

PGD-AT on a part of CIFAR-10, as in cifar10_subset.py, once with plain attacks and once with `--lane bf16`. Every model
trained with plain attacks is then attacked by PGD-20 plainly, in the fp32 lane and in the bf16 lane, from the same
random starts; the model itself judges all three.

    python benchmarks/lane_accuracy.py --archive cifar10_exact_subset.npz --seeds 5 --workers 2

Start this again after an interruption, and it goes on. `--quick` is a miniature on noise that only shows that the
script runs.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from cases import LANES
from cifar10_subset import ROOT, command, run, verdict
from record import write
from scipy.stats import ttest_rel

from perceptual_at import Linf, data, evaluate, frozen, models, pgd
from perceptual_at.checkpoints import load_weights
from perceptual_at.commands.main import main as command_line
from perceptual_at.divergences import cross_entropy

TRAINED = {"plain attack": ("pgd_at", "pgd_at"), "bf16 lane": ("pgd_at_bf16", "pgd_at --lane bf16")}
ATTACK = functools.partial(pgd, threat=Linf(8 / 255), steps=20, step_size=2 / 255)
QUICK = "--epochs 1 --batch 15 --held-out 10 --steps 2 --select-steps 1"


def noise(folder):
    """An archive of noise in place of the images: four of each class to train on and one to test on."""
    drawn = numpy.random.default_rng(0)
    parts = {}
    for split, count in (("train", 40), ("test", 10)):
        parts[f"x_{split}"] = drawn.integers(0, 256, (count, 3, 32, 32), dtype=numpy.uint8)
        parts[f"y_{split}"] = numpy.arange(count) % 10
    numpy.savez(folder / "noise.npz", **parts)
    return folder / "noise.npz"


def short_run(name, recipe, archive, seed, out):
    """One run of the miniature, in this process; its result."""
    folder = out / f"{name}-{seed}"
    command_line(["train", *command(recipe, archive, seed, folder)[1:], *QUICK.split()])
    return json.loads((folder / "result.json").read_text())


def slopes(model, images, lane):
    """The signs of the loss's gradient at all clean images."""
    signs = []
    with frozen(model, lane=lane) as f:
        for x, labels in images:
            x = x.requires_grad_()
            signs.append(torch.autograd.grad(cross_entropy(f(x).float(), labels).sum(), x)[0].sign())
    return torch.cat(signs)


def measured(folder, images):
    """What a lane changes for one model: PGD-20 accuracy, verdicts, and signs of the gradient at clean images."""
    model = models.resnet18(width=8, stem_stride=2)
    load_weights(model, folder / "final.safetensors")
    robust = {
        name: evaluate(model, images, {"pgd": ATTACK}, lane=lane, progress=False).robust["pgd"]
        for name, lane in LANES.items()
    }
    plain = slopes(model, images, None)
    return {
        name: {
            "robust": round(100 * mask.double().mean().item(), 4),
            "flips": round(100 * (mask != robust["plain"]).double().mean().item(), 4),
            "signs": round(100 * (slopes(model, images, LANES[name]) != plain).double().mean().item(), 4),
        }
        for name, mask in robust.items()
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="needed but for the miniature")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "lane_accuracy", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "lane_accuracy.json")
    parser.add_argument("--quick", action="store_true", help="a miniature that only shows that the script runs")
    options = parser.parse_args(arguments)
    if options.quick == (options.archive is not None):
        parser.error("give either --archive or --quick")
    if not options.quick:
        measure(options, run, f"--archive {options.archive.name} --seeds {options.seeds}")
        return
    with tempfile.TemporaryDirectory() as folder:
        options.archive, options.runs, options.seeds, options.workers = noise(Path(folder)), Path(folder), 1, 1
        measure(options, short_run, "--quick")


def measure(options, train, words):
    """Train by `train` what is not trained yet, attack it, and write the record; `words` are those of the command."""
    jobs = [(title, seed) for seed in range(options.seeds) for title in TRAINED]
    with ThreadPoolExecutor(options.workers) as pool:
        done = pool.map(lambda job: train(*TRAINED[job[0]], options.archive, job[1], options.runs), jobs)
        results = dict(zip(jobs, done, strict=True))
    images = data.loader(data.npz_images(options.archive, "test"), 128)
    attacked = [measured(options.runs / f"pgd_at-{seed}", images) for seed in range(options.seeds)]
    trained = {
        title: [{**results[title, seed]["final"]["test"], "seed": seed} for seed in range(options.seeds)]
        for title in TRAINED
    }
    differences = {name: [one[name]["robust"] - one["plain"]["robust"] for one in attacked] for name in list(LANES)[1:]}
    robust = [[score["pgd20"] for score in trained[title]] for title in TRAINED]
    gained = [lane - plain for plain, lane in zip(*robust, strict=True)]
    first = results[jobs[0]]
    record = {
        "command": f"python benchmarks/lane_accuracy.py {words}", "quick": options.quick,
        "commands": {title: " ".join(["python", *command(recipe, options.archive.name, "SEED", "OUT")])
                     for title, (_, recipe) in TRAINED.items()},
        "data": "noise" if options.quick else "CIFAR-10, exact subset",
        "images": first["images"], "threat": first["threat"],
        "epochs": first["settings"]["epochs"], "seeds": options.seeds,
        "lanes": {name: repr(lane) for name, lane in LANES.items()},
        "attacked": attacked,
        "differences": {name: {"mean": round(statistics.mean(gaps), 4), "each": [round(gap, 4) for gap in gaps]}
                        for name, gaps in differences.items()},
        "runs": trained,
        "training": {"pgd20": round(statistics.mean(gained), 4), "each": [round(gap, 4) for gap in gained],
                     "p": float(ttest_rel(*robust).pvalue) if options.seeds > 1 else None},
        "verdicts": [verdict(trained, "bf16 lane", "plain attack")],
        **{name: first[name] for name in ("commit", "versions", "hardware")},
    }  # fmt: skip
    write(options.out, record)
    print(json.dumps(record["differences"]), *record["verdicts"], sep="\n")


if __name__ == "__main__":
    main()
