"""Build step of the documentation: `<!-- results: NAME -->` becomes a table of a recorded run, from docs/results.

`<!-- printed: METHOD -->` becomes what the papers' tables print for a method.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # this file is loaded by its path
import results_evidence
import results_methods
import results_networks
import results_performance
import results_segmentation
from results_table import number, spread, table

from perceptual_at.published import published

RESULTS = Path(__file__).parent / "results"
MARK = re.compile(r"^<!-- results: (\w+) -->$", re.MULTILINE)
PRINTED = re.compile(r"^<!-- printed: (\S+) -->$", re.MULTILINE)
MISSING = "*Not recorded yet.*"
Run = dict[str, Any]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables of a page."""
    home = "../" * page.file.src_uri.count("/") + "results/"
    return PRINTED.sub(lambda match: printed(match[1]), MARK.sub(lambda match: filled(match[1], home), markdown))


def filled(name: str, home: str = "results/", folder: Path = RESULTS) -> str:
    """The table of that name, or a line that says there is none; `home` is where the page finds the files."""
    if name == "files":
        return listing(home, folder)
    stem, write = TABLES[name]
    path = folder / f"{stem}.json"
    if not path.exists():
        return MISSING
    return f"{write(json.loads(path.read_text(encoding='utf-8')))}\n\n[{path.name}]({home}{path.name})"


def printed(method: str) -> str:
    """The printed rows of a method, with NRR computed from them."""
    rows = [
        (f"{row.paper} {row.table}", row.dataset, row.norm.capitalize(), row.model, row.printed["clean"],
         row.printed["aa"], f"{row.nrr:.2f}")
        for row in published(method=method)
    ]  # fmt: skip
    return table(("printed in", "images", "norm", "network", "clean, %", "AA, %", "NRR"), rows)


def listing(home: str, folder: Path) -> str:
    """All recorded files."""
    files = sorted(folder.rglob("*.json"))
    return "\n".join(f"- [{p.relative_to(folder)}]({home}{p.relative_to(folder)})" for p in files) or MISSING


def demo(run: Run) -> str:
    """Methods of the demo and its verdicts."""
    settings, versions, hardware = run["settings"], run["versions"], run["hardware"]
    made = (
        f"{settings['seeds']} seeds, {settings['epochs']} epochs, {run['threat']}; torch {versions['torch']}, "
        f"{hardware['machine']}, {run['seconds']:.0f} s with {hardware['workers']} processes."
    )
    said = "\n".join(f"- {sentence}" for sentence in run["verdicts"])
    return f"{scores(run, 'trained by')}\n\n{said}\n\n{made}"


def examples(run: Run) -> str:
    """The example files, one row each."""
    seeds = len(next(iter(run["runs"].values())))
    return f"{scores(run, 'example')}\n\n{run['data']}; {run['threat']}; {seeds} seeds: `{run['command']}`."


def subset(run: Run) -> str:
    """Methods on a part of CIFAR-10: the weights chosen on validation images."""
    images, hardware = run["images"], run["hardware"]
    made = (
        f"{run['data']}: {images['train']} images to train on, {images['select']} to choose `best` on, "
        f"{images['test']} to test on; {run['threat']}; {run['seeds']} seeds, {run['epochs']} epochs; torch "
        f"{run['versions']['torch']}, {hardware['device']} ({hardware['threads']} thread per run), commit "
        f"`{run['commit'][:7]}`."
    )
    said = "\n".join(f"- {sentence}" for sentence in run["verdicts"])
    return f"{scores(run, 'trained by')}\n\n{said}\n\n{made}"


def subset_final(run: Run) -> str:
    """The same runs after their last epoch, where nothing was chosen."""
    said = "\n".join(f"- {sentence}" for sentence in run["verdicts_final"])
    return f"{scores({'runs': run['final']}, 'trained by')}\n\n{said}"


def subset_weights(run: Run) -> str:
    """RPAT with one weight after another, and what the term then adds to the loss in the last epoch."""
    columns = ("clean", "pgd20", "mean", "nrr")
    rows = [
        (
            weight,
            *(spread([score[column] for score in runs]) for column in columns),
            f"{statistics.mean(score['share'] for score in runs):.2g}",
        )
        for weight, runs in run["weights"].items()
    ]
    return table(("weight in Eq. 3", "clean, %", "PGD-20, %", "mean", "NRR", "share of the loss, %"), rows)


def scores(run: Run, what: str) -> str:
    """Accuracies of several runs of several methods, mean and deviation."""
    columns = ("clean", "pgd20", "mean", "nrr")
    rows = [
        (method, *(spread([score[column] for score in runs]) for column in columns))
        for method, runs in run["runs"].items()
    ]
    return table((what, "clean, %", "PGD-20, %", "mean", "NRR"), rows)


def perception(run: Run) -> str:
    """How far perturbations move the logits of samples that resist and of samples that give in."""
    perturbed = {"standard": "noise", "random": "noise"}
    rows = []
    for name, gap in run["perception"].items():
        success, failure = (gap[key] for key in ("success_mse", "failure_mse"))
        ratio = f"{failure / success:.2f}" if success and failure is not None else "-"
        rows.append((
            name, perturbed.get(name, "PGD-20"), number(success), number(failure), ratio,
            f"{100 * gap['clean']:.2f}", f"{100 * gap['robust']:.2f}",
        ))  # fmt: skip
    head = ("trained on", "perturbed by", "held: MSE", "broken: MSE", "broken / held", "clean, %", "perturbed, %")
    return f"{table(head, rows)}\n\n{provenance(run)}"


def groups(run: Run) -> str:
    """PGD-AT with another perturbation for one group of samples."""
    rows = [(name, *map(spread, zip(*pairs, strict=True))) for name, pairs in run["groups"].items()]
    return f"{table(('perturbation', 'clean, %', 'PGD-20, %'), rows)}\n\n{provenance(run)}"


def thresholds(run: Run) -> str:
    """PGD-AT with boundary samples at the threshold, for several thresholds."""
    rows = [(eta, *map(spread, zip(*pairs, strict=True))) for eta, pairs in run["thresholds"].items()]
    return f"{table(('eta', 'clean, %', 'PGD-20, %'), rows)}\n\n{provenance(run)}"


def autoattack(run: Run) -> str:
    """Native AutoAttack beside the official code."""
    rows = []
    for row in run["rows"]:
        ours, theirs = ([100 * share for share in row[key]] for key in ("robust_native", "robust_official"))
        agreed, itself = (row[key] for key in ("agreement", "agreement_of_the_official_with_itself"))
        rows.append((
            row["version"], f"`{row['threat']}`", spread(ours), spread(theirs), f"{100 * min(agreed):.1f}",
            f"{100 * min(itself):.1f}" if itself else "-",
            f"{row['cpu_seconds_native']:.0f} / {row['cpu_seconds_official']:.0f}",
        ))  # fmt: skip
    head = (
        "attacks", "threat", "robust here, %", "robust, official, %", "agreement, %", "with itself, %", "CPU s",
    )  # fmt: skip
    made = (
        f"{run['data']}, {run['model']}, clean accuracy {100 * run['clean']:.2f} %; {run['hardware']}, torch "
        f"{run['versions']['torch']}. Accuracies over seeds, the smallest agreement of all seeds, median times (here / "
        f"official): `{run['command']}`."
    )
    gaps = [
        100 * abs(statistics.mean(row["robust_native"]) - statistics.mean(row["robust_official"]))
        for row in run["rows"] if row["version"] == "standard"
    ]  # fmt: skip
    said = f"Over the seeds the robust accuracies of the whole differ by {max(gaps):.2f} points at most."
    return f"{table(head, rows)}\n\n{said}\n\n{made}"


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    "autoattack": ("autoattack", autoattack),
    "demo": ("demo", demo),
    "examples": ("examples", examples),
    "perception": ("perception_gap", perception),
    "groups": ("perception_gap", groups),
    "thresholds": ("perception_gap", thresholds),
    "subset": ("cifar10_subset", subset),
    "subset_final": ("cifar10_subset", subset_final),
    "subset_weights": ("cifar10_subset", subset_weights),
    **results_methods.TABLES,
    **results_networks.TABLES,
    **results_performance.TABLES,
    **results_segmentation.TABLES,
    **results_evidence.TABLES,
}


def provenance(run: Run) -> str:
    """What was run."""
    return f"{run['data']}, {run['threat']}, {run['seeds']} seeds, {run['epochs']} epochs."
