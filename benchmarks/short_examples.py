"""Run every short example with several seeds on the digits and record what came of it.

    python benchmarks/short_examples.py --seeds 3 --out docs/results/examples.json

The numbers in the heads of these examples come from this file's output. `--quick` is a miniature that only shows that
the script runs.
"""

import argparse
import contextlib
import importlib
import io
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import common  # noqa: E402
import torch  # noqa: E402
from record import provenance, write  # noqa: E402

from perceptual_at.data import digits  # noqa: E402
from perceptual_at.models import DigitsCNN  # noqa: E402

VIEWS = {"consistency_at": 2, "raat": 2, "raat_plus_plus": 2, "raat_sharp": 2}
EXAMPLES = (
    "pgd_at", "trades", "mart", "consistency_at", "rpat", "rpat_trades",
    "raat", "raat_plus_plus", "rebat", "rpat_plus_plus", "raat_sharp",
)  # fmt: skip
QUICK = ("pgd_at", "raat_sharp")


def run(name, seed, epochs, images=None):
    """What `python examples/NAME.py --seed SEED` prints at the end, in percent; trained on all images or a few."""
    torch.manual_seed(seed)
    model = DigitsCNN()
    order, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    x, labels = digits("train", seed=seed)
    batches = common.Batches(x[:images], labels[:images], views=VIEWS.get(name, 1), generator=order)
    with contextlib.redirect_stdout(io.StringIO()):
        trained = importlib.import_module(name).train(model, batches, noise, epochs=epochs)
    result = common.report(trained, seed=seed)
    return {key: 100 * value for key, value in result.to_dict().items() if key in ("clean", "pgd20", "mean", "nrr")}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "examples.json")
    parser.add_argument("--quick", action="store_true", help="a miniature that only shows that the script runs")
    options = parser.parse_args(arguments)
    names = QUICK if options.quick else EXAMPLES
    if options.quick:
        options.seeds, options.epochs = 2, 1
    jobs = [(name, seed, options.epochs) for name in reversed(names) for seed in range(options.seeds)]
    if options.quick:
        results = {job: run(*job, images=128) for job in jobs}
    else:
        results = common.spread(run, jobs, options.workers)
    runs = {name: [results[name, seed, options.epochs] for seed in range(options.seeds)] for name in names}
    for name, scores in runs.items():
        cells = [
            f"{key} {statistics.mean(s[key] for s in scores):.2f} ± {statistics.stdev(s[key] for s in scores):.2f}"
            for key in ("clean", "pgd20", "mean", "nrr")
        ]
        print(f"{name:<16}", "  ".join(cells))
    words = "--quick" if options.quick else f"--seeds {options.seeds} --epochs {options.epochs}"
    record = {
        "command": f"python benchmarks/short_examples.py {words}", "quick": options.quick,
        "data": "scikit-learn digits, 360 test images per seed", "threat": "Linf(eps=0.15)", "runs": runs,
        "threads_per_run": 1, **provenance(),
    }  # fmt: skip
    write(options.out, record)


if __name__ == "__main__":
    main()
