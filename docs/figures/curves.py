"""What TensorBoard shows of a run of `perceptual-at train`: its curves by step, under their names there.

The run is the command below, COMMAND; drawing needs no more than its record.

python docs/figures/curves.py runs/rpat   # records the curves of the run, needs the extra `train`
python docs/figures/curves.py             # draws the record
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from style import HERE, SMALL, Scheme, sheet, write

RECORD = HERE.parent / "results" / "curves.json"
COMMAND = (
    "perceptual-at train rpat --form interpolation --data digits --model digits_cnn --padding 1 --no-flip "
    "--held-out 180 --eps 0.15 --step-size 0.0375 --epochs 10 --cpu --seed 0 --out runs/rpat"
)
SHOWN = (
    "train/loss", "train/cross_entropy", "train/robust_perception",
    "validation/clean", "validation/pgd10", "validation/nrr",
    "groups/boundary", "groups/misclassified", "perception/failure_mse",
)  # fmt: skip


def record(run: Path) -> None:
    """Write down the curves of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {name: [[seen.step, float(f"{seen.value:.5g}")] for seen in events.Scalars(name)] for name in SHOWN}
    RECORD.write_text(
        json.dumps({"command": __doc__.split("\n\n")[1].split("python")[0].strip(), "curves": curves}) + "\n"
    )


def draw(scheme: Scheme) -> Figure:
    """One small plot for each curve."""
    curves = json.loads(RECORD.read_text(encoding="utf-8"))["curves"]
    figure = sheet(560)
    for ax, (name, points) in zip(figure.subplots(3, 3).flat, curves.items(), strict=True):
        ax.plot(*zip(*points, strict=True), color=scheme.blue, marker=".")
        ax.set_title(name, fontsize=SMALL)
        ax.tick_params(labelsize=SMALL)
        ax.locator_params(nbins=4)
    figure.supxlabel("step", fontsize=SMALL)
    return figure


def main(folder: Path | None = None) -> list[Path]:
    """Write the picture."""
    return write(
        "curves",
        "Nine curves of a training run by step",
        "Losses, accuracies on held-out images, shares of groups and movement of the logits, as in TensorBoard.",
        draw,
        folder,
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        record(Path(sys.argv[1]))
    main()
