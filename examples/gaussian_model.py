"""How many unlabelled samples robustness takes in the Gaussian model (RAAT, Theorem 1): one figure, a few seconds.

    python examples/gaussian_model.py --out outputs/gaussian_model

Left: robust error against the number m of samples labelled by a classifier that has seen one label. Copies of that
one sample, as augmentation makes them, change nothing. Right: the m that brings the error to one half, against the
dimension d, with the fitted exponent beside the predicted 1/2.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch

from perceptual_at import plotting, theory
from perceptual_at.checkpoints import written_whole

C, EPS = 0.6, 0.9  # noise sigma = C d^(1/4), budget of the l_inf attack
DIMENSIONS = (1_000, 10_000, 100_000)
COPIES_AT = 10_000


def errors(d, counts, runs, generator):
    """Median robust error of the estimator for each number of unlabelled samples, and its closed form."""
    theta, sigma = torch.ones(d), C * d**0.25
    rows = []
    for m in counts:
        drawn = theory.sample_estimators(theta, sigma, unlabeled=m, runs=runs, generator=generator)
        simulated = theory.robust_error(drawn.consistency, theta, sigma, eps=EPS).median().item()
        rows.append(
            {"m": m, "simulated": simulated, "predicted": theory.predicted_error(d, sigma, eps=EPS, unlabeled=m)}
        )
    return rows


def errors_of_copies(d, counts, runs, generator):
    """The same with m noisy copies of the labelled sample instead of m new samples."""
    theta, sigma, rows = torch.ones(d), C * d**0.25, []
    for m in counts:
        found = []
        for _ in range(runs):
            x = theta + sigma * torch.randn(d, generator=generator)
            copies = x + torch.randn(m, d, generator=generator)
            w = theory.consistency_estimator(x[None], torch.ones(1), copies)
            found.append(theory.robust_error(w, theta, sigma, eps=EPS).item())
        rows.append({"m": m, "simulated": sorted(found)[runs // 2]})
    return rows


def fitted_slope(thresholds):
    """Least-squares slope of log m against log d."""
    log_d, log_m = (torch.tensor([row[key] for row in thresholds]).double().log() for key in ("d", "simulated"))
    centred = log_d - log_d.mean()
    return (centred @ log_m / (centred @ centred)).item()


def draw(result, path):
    from matplotlib.figure import Figure

    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    for color, (d, rows) in zip(("C0", "C1", "C2"), result["errors"].items(), strict=True):
        m = [row["m"] for row in rows]
        fine = [10 ** (k / 50) for k in range(15, 201)]
        sigma = C * int(d) ** 0.25
        curve = [theory.predicted_error(int(d), sigma, eps=EPS, unlabeled=k) for k in fine]
        left.plot(fine, curve, color=color, label=f"d = {int(d):,}")
        left.plot(m, [row["simulated"] for row in rows], "o", color=color, markersize=4)
    copies = result["copies"]
    left.plot(
        [row["m"] for row in copies], [row["simulated"] for row in copies], "x", color="C1",
        label=f"copies of one sample,\nd = {COPIES_AT:,}",
    )  # fmt: skip
    left.axhline(0.5, color="0.6", linewidth=0.8)
    left.set(xscale="log", xlabel="unlabelled samples m", ylabel=f"robust error, eps = {EPS}", ylim=(-0.03, 1.03))
    left.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1, 0.95))
    d = [row["d"] for row in result["thresholds"]]
    right.plot(d, [row["predicted"] for row in result["thresholds"]], color="C3", label="closed form, exponent 1/2")
    right.plot(
        d, [row["simulated"] for row in result["thresholds"]], "o", color="C3",
        label=f"simulated, exponent {result['slope']:.3f}",
    )  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="m for a robust error of one half")
    right.legend(fontsize="small")
    plotting.save(left, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="repetitions behind every point (default 21)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/gaussian_model"), help="folder for the results")
    options = parser.parse_args()

    began = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    counts = [round(10 ** (k / 6)) for k in range(2, 25)]
    grid = [round(10 ** (3 + k / 4)) for k in range(9)]
    thresholds = [
        {
            "d": d,
            "simulated": theory.simulated_half_error_threshold(d, C, EPS, runs=options.runs, generator=generator),
            "predicted": theory.half_error_threshold(d, C, EPS),
        }
        for d in grid
    ]
    result = {
        "settings": {"c": C, "eps": EPS, "runs": options.runs, "seed": options.seed},
        "errors": {str(d): errors(d, counts, options.runs, generator) for d in DIMENSIONS},
        "copies": errors_of_copies(COPIES_AT, [3, 10, 30, 100, 300], min(options.runs, 5), generator),
        "thresholds": thresholds,
        "slope": fitted_slope(thresholds),
        "gap_limit": 1 - theory.predicted_error(10**15, C * 10**3.75),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    result["seconds"] = round(time.perf_counter() - began, 1)

    print(f"sigma = {C} d^(1/4), eps = {EPS}, medians of {options.runs} runs\n")
    print(f"{'d':>8} {'m for one half':>16} {'closed form':>12}")
    for row in thresholds:
        print(f"{row['d']:>8} {row['simulated']:>16} {row['predicted']:>12.1f}")
    worst = max(abs(math.log(row["simulated"] / row["predicted"])) for row in thresholds)
    fresh, copied = result["errors"][str(COPIES_AT)][-1], result["copies"][-1]
    print(f"\nfitted exponent {result['slope']:.3f}, 1/2 in the limit;", end=" ")
    print(f"at most {math.exp(worst) - 1:.1%} off the closed form")
    print(f"d = {COPIES_AT:,}: {fresh['m']} new samples leave a robust error of {fresh['simulated']:.3f},", end=" ")
    print(f"{copied['m']} copies of the labelled one {copied['simulated']:.3f}")
    print(f"the gap between robust and standard error never exceeds {result['gap_limit']:.4f}")
    with written_whole(options.out / "gaussian_model.json") as path:
        path.write_text(json.dumps(result, indent=2))
    draw(result, options.out / "gaussian_model.png")
    print(
        f"\n{result['seconds']} s; wrote {options.out / 'gaussian_model.json'} and {options.out / 'gaussian_model.png'}"
    )


if __name__ == "__main__":
    main()
