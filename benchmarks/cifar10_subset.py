"""PGD-AT, RPAT in both forms and RAAT on a part of CIFAR-10 that a CPU can train on: three seeds each, one record.

At alpha = 1/2 the released form of RPAT with weight 1 is Eq. 3 with weight 1/16, so both lie on one scale. Larger
weights are run as well, to see where the term begins to count, and weight 0: the passes of RPAT, which move batch
norm's statistics, without its term.

    python benchmarks/cifar10_subset.py --archive cifar10_exact_subset.npz --workers 2

The archive holds `x_train`, `y_train`, `x_test`, `y_test` (see `perceptual_at.data.npz_images`). Every run is one
`examples/train.py`; start this again after an interruption, and it goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import write
from scipy.stats import ttest_rel

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "PGD-AT": ("pgd_at", "pgd_at"),
    "+RPAT, interpolation (release)": ("rpat_interpolation", "rpat --form interpolation"),
    "+RPAT, quotient (Eq. 3)": ("rpat_quotient", "rpat --form quotient"),
    "RAAT": ("raat", "raat"),
}
OTHERS = {
    "0, with RPAT's passes": ("rpat_weight_0", "rpat --form interpolation --weight 0"),
    "16": ("rpat_quotient_16", "rpat --form quotient --weight 16"),
    "128": ("rpat_quotient_128", "rpat --form quotient --weight 128"),
}
OPTIONS = (
    "--data npz --root {archive} --model resnet18 --width 8 --stem-stride 2 --epochs 6 --batch 64 "
    "--schedule one_cycle --held-out 500 --channels-last --seed {seed} --out {out} --resume"
)
COLUMNS = ("clean", "pgd20", "mean", "nrr")


def command(recipe, archive, seed, out):
    """The words after `python` that make one run."""
    return [
        "examples/train.py",
        *recipe.split(),
        *(word.format(archive=archive, seed=seed, out=out) for word in OPTIONS.split()),
    ]


def run(name, recipe, archive, seed, out):
    """One run, in a process of one thread; its result."""
    folder = out / f"{name}-{seed}"
    if not (folder / "result.json").exists():
        words = [sys.executable, *command(recipe, archive.resolve(), seed, folder.resolve())]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads((folder / "result.json").read_text())


def verdict(runs, method, other):
    """What the differences seed by seed say about two methods."""
    pairs = [[score["nrr"] for score in runs[name]] for name in (method, other)]
    differences = [a - b for a, b in zip(*pairs, strict=True)]
    gain = statistics.mean(differences)
    shown = ", ".join(f"{difference:+.2f}" for difference in differences)
    if len(differences) < 2 or len(set(differences)) == 1:
        return f"{method} against {other}: NRR {gain:+.2f}; too few runs to tell it from noise."
    p = float(ttest_rel(*pairs).pvalue)
    said = "inside the noise" if p >= 0.05 else f"{'better' if gain > 0 else 'worse'} beyond the noise"
    return f"{method} against {other}: NRR {gain:+.2f} ({shown}); {said} (paired t-test, p = {p:.2g})."


def scores(result, which):
    """What a table shows of one run, in percent; `share` is what the last epoch's loss holds beside cross entropy."""
    tested, terms = result[which]["test"], result["log"][-1]["terms"]
    share = 100 * (1 - terms["cross_entropy"] / terms["loss"])
    kept = {name: tested[name] for name in COLUMNS}
    return {**kept, "share": share, "seed": result["seed"], "epoch": result[which]["epoch"]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "cifar10_subset", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "cifar10_subset.json")
    options = parser.parse_args(arguments)

    everything = {**METHODS, **OTHERS}
    jobs = [(title, seed) for seed in range(options.seeds) for title in everything]
    with ThreadPoolExecutor(options.workers) as pool:
        done = pool.map(lambda job: run(*everything[job[0]], options.archive, job[1], options.runs), jobs)
        results = dict(zip(jobs, done, strict=True))
    first = results[jobs[0]]
    best, final = (
        {title: [scores(results[title, seed], which) for seed in range(options.seeds)] for title in everything}
        for which in ("best", "final")
    )
    pgd_at, release, equation, _ = METHODS
    passes, *larger = OTHERS
    scale = {"0 (PGD-AT)": pgd_at, passes: passes, "1/16 (release)": release, "1 (Eq. 3)": equation}
    scale |= {weight: weight for weight in larger}
    against = [*((title, pgd_at) for title in list(METHODS)[1:]), (equation, release)]
    record = {
        "command": f"python benchmarks/cifar10_subset.py --archive {options.archive.name} --seeds {options.seeds}",
        "commands": {title: " ".join(["python", *command(recipe, options.archive.name, "SEED", "OUT")])
                     for title, (_, recipe) in everything.items()},
        "data": "CIFAR-10, exact subset", "images": first["images"], "threat": first["threat"],
        "selected_on": first["selected_on"], "epochs": first["settings"]["epochs"], "seeds": options.seeds,
        "runs": {title: best[title] for title in METHODS}, "final": {title: final[title] for title in METHODS},
        "verdicts": [verdict(best, *pair) for pair in against],
        "verdicts_final": [verdict(final, *pair) for pair in against],
        "weights": {weight: best[title] for weight, title in scale.items()},
        "terms": {title: [results[title, seed]["log"][-1]["terms"] for seed in range(options.seeds)]
                  for title in everything},
        "seconds": {title: [results[title, seed]["seconds"] for seed in range(options.seeds)] for title in everything},
        "settings": {title: results[title, 0]["settings"] for title in everything},
        **{name: first[name] for name in ("commit", "versions", "hardware")},
    }  # fmt: skip
    write(options.out, record)
    for sentence in record["verdicts"]:
        print(sentence)


if __name__ == "__main__":
    main()
