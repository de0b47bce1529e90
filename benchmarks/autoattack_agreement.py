"""Native AutoAttack beside the official code: verdicts sample by sample, robust accuracy, time.

    python benchmarks/autoattack_agreement.py --out docs/results/autoattack.json

A small network is trained on handwritten digits by PGD-AT, then attacked with the published budgets: by the whole
ensemble with several seeds, and by each of its attacks alone. The official code is compared with itself too, from
another seed: no reimplementation can agree with it better than that where attacks are random. `--quick` is a miniature
that only shows that the script runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from record import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from perceptual_at import L1, L2, Linf, SampleGenerator, auto_attack
from perceptual_at.attacks.protocol import versions
from perceptual_at.data import digits
from perceptual_at.models import DigitsCNN
from tests.robust_model import robust_digits

THREATS = (Linf(0.15), L2(0.75), L1(1.5))
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
QUICK = [("apgd-ce", {"steps": 3}), ("square", {"queries": 10})]


def attacked(model, x, labels, threat, composition, seed, backend):
    """Verdict and seconds of CPU time."""
    numbers, start = SampleGenerator(seed, torch.arange(len(x))), time.process_time()
    options = {"version": composition, "backend": backend, "generator": numbers}
    found = auto_attack(model, x, labels, threat, **options, verdict=True)
    return found, time.process_time() - start


def agreement(a, b):
    """Share of samples with the same verdict."""
    return round((a.success == b.success).double().mean().item(), 4)


def compare(model, x, labels, threat, name, composition, seeds):
    """One row of the table: both codes from every seed, taking turns."""
    runs = {backend: [] for backend in ("native", "pyautoattack")}
    for seed in range(seeds):
        for backend, done in runs.items():
            done.append(attacked(model, x, labels, threat, composition, seed, backend))
    ours, theirs = ([found for found, _ in runs[backend]] for backend in ("native", "pyautoattack"))
    return {
        "threat": repr(threat),
        "version": name,
        "seeds": seeds,
        "robust_native": [round(found.robust.double().mean().item(), 4) for found in ours],
        "robust_official": [round(found.robust.double().mean().item(), 4) for found in theirs],
        "agreement": [agreement(a, b) for a, b in zip(ours, theirs, strict=True)],
        "agreement_of_the_official_with_itself": [agreement(theirs[0], other) for other in theirs[1:]],
        "cpu_seconds_native": round(statistics.median(seconds for _, seconds in runs["native"]), 1),
        "cpu_seconds_official": round(statistics.median(seconds for _, seconds in runs["pyautoattack"]), 1),
        "warnings": sorted({warning for found in ours for warning in found.warnings}),
    }


def untrained():
    """A network with its first weights, a few digits, and what it takes them for."""
    torch.manual_seed(0)
    model, x = DigitsCNN(width=2).eval(), digits("test")[0][:8]
    return model, x, model(x).argmax(dim=1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="outputs/autoattack.json")
    parser.add_argument("--quick", action="store_true", help="a miniature that only shows that the script runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        (model, x, labels), trained = untrained(), "DigitsCNN(width=2), not trained"
        compositions, options.seeds, words = {"quick": QUICK}, 2, "--quick"
    else:
        (model, x, labels), trained = robust_digits(), "DigitsCNN(width=8), PGD-AT in Linf(0.15), 8 epochs, seed 0"
        compositions, words = {"standard": "standard", **{name: [name] for name in ATTACKS}}, f"--seeds {options.seeds}"
    rows = []
    for name, composition in compositions.items():
        for threat in THREATS:
            rows.append(compare(model, x, labels, threat, name, composition, 2 if name in ATTACKS else options.seeds))
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": f"python benchmarks/autoattack_agreement.py {words}",
        "quick": options.quick,
        "data": f"handwritten digits, {len(x)} test images",
        "model": trained,
        "clean": round((model(x).argmax(dim=1) == labels).double().mean().item(), 4),
        "hardware": f"{platform.machine()}, one thread",
        "versions": versions(),
        "rows": rows,
    }
    write(options.out, record)


if __name__ == "__main__":
    main()
