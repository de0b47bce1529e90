"""Tables of "What the terms do", computed from the verdicts on record."""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_table import GAP, number, table

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from evidence import numbers
from evidence.design import ARMS, REGIMES, SEEDS, SWEEP, Job, order
from evidence.hypotheses import HYPOTHESES, Hypothesis

Run = dict[str, Any]
STEM = "cifar10_evidence"
FIGURES = Path(__file__).parent / "figures"
COLUMNS = {
    "clean": "clean", "pgd20": "PGD-20", "margin30": "margin PGD-30", "autoattack": "AutoAttack", "mean": "Mean",
    "nrr": "NRR",
}  # fmt: skip
NOTHING = "No run has finished yet."


def interval(values: list[float], signed: bool = False) -> str:
    """Mean and half of its 95 % interval, which takes two seeds."""
    if not values:
        return "-"
    found = numbers.t_interval(values)
    mean = f"{found.mean:{'+' if signed else ''}.2f}"
    return f"{mean}{GAP}±{GAP}{found.half:.2f}" if math.isfinite(found.half) else mean


def arms_of(runs: Run, regime: str) -> dict[str, list[Any]]:
    """The entries of each arm, seed by seed."""
    found: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for job, entry in sorted(runs.items()):
        if job.regime == regime and job.arm in ARMS:
            found[job.arm].append(entry)
    return {arm: entries for arm, entries in found.items() if entries}


def scores(regime: str, which: str) -> Callable[[Run], str]:
    """Accuracies of all arms of a regime."""

    def write(record: Run) -> str:
        runs = numbers.finished(record)
        rows = [
            (
                ARMS[arm].title, str(len(entries)),
                *(interval(numbers.scores(runs, regime, arm, column, which)) for column in COLUMNS),
                f"{statistics.mean(entry['seconds']['training_cpu'] for entry in entries) / 3600:.1f}",
            )
            for arm, entries in arms_of(runs, regime).items()
        ]  # fmt: skip
        return table(("trained by", "seeds", *COLUMNS.values(), "core hours"), rows) if rows else NOTHING

    return write


def expected(record: Run) -> list[tuple[Hypothesis, str, list[float]]]:
    """The expectations that runs have something to say about, in a regime, with the differences seed by seed."""
    runs = numbers.finished(record)
    found = [
        (one, regime, [pair.difference for pair in numbers.pairs(runs, regime, one.arm, one.control, one.column)])
        for one in HYPOTHESES for regime in one.regimes
    ]  # fmt: skip
    return [(one, regime, differences) for one, regime, differences in found if differences]


def named(one: Hypothesis, regime: str) -> tuple[str, str, str]:
    """What is compared, in which column, on which images."""
    return minus(one.arm, one.control), COLUMNS[one.column], regime


def minus(arm: str, control: str) -> str:
    """A difference in words."""
    return f"{ARMS[arm].title} minus {ARMS[control].title}"


def hypotheses(record: Run) -> str:
    """What was expected, and what came."""
    signs = {1: "above 0", -1: "below 0", 0: "none"}
    rows = [
        (
            *named(one, regime), signs[one.sign], interval(found, signed=True), str(len(found)),
            numbers.judgement(one, found),
        )
        for one, regime, found in expected(record)
    ]  # fmt: skip
    head = ("difference", "column", "images", "expected", "found", "seeds", "")
    return table(head, rows) if rows else NOTHING


def differences(record: Run) -> str:
    """Each arm minus its control, in every column of verdicts, with the test on the images of each seed."""
    runs = numbers.finished(record)
    rows = []
    for arm, control in dict.fromkeys((one.arm, one.control) for one in HYPOTHESES):
        for regime in REGIMES:
            found = [numbers.pairs(runs, regime, arm, control, column) for column in numbers.JUDGED]
            if any(found):
                rows.append((minus(arm, control), regime, *map(tested, found)))
    head = ("difference (p)", "images", *(COLUMNS[column] for column in numbers.JUDGED))
    return table(head, rows) if rows else NOTHING


def tested(found: list[numbers.Pair]) -> str:
    """A mean difference, and the p-value of every seed."""
    if not found:
        return "-"
    mean = interval([pair.difference for pair in found], signed=True)
    return f"{mean} ({', '.join(f'{pair.p:.2g}' for pair in found)})"


def power(record: Run) -> str:
    """What the design could have found, which takes two seeds to say."""
    rows = [
        (*named(one, regime), f"{numbers.detectable(found):.2f}", f"{numbers.seeds_for(1.0, found)}")
        for one, regime, found in expected(record)
        if len(found) > 1
    ]
    head = ("difference", "column", "images", "found with 80 %", "seeds for a point")
    return table(head, rows) if rows else "No difference has two seeds yet."


def terms(record: Run) -> str:
    """What the regularisers make of loss and gradient in the last epoch, in percent."""
    rows = []
    for regime in REGIMES:
        for arm, entries in arms_of(numbers.finished(record), regime).items():
            lasts = [entry["log"][-1] for entry in entries]
            if "share_of_loss" in lasts[0]:
                loss, gradient = (
                    number(100 * statistics.mean(last[f"share_of_{of}"] for last in lasts))
                    for of in ("loss", "gradient")
                )
                cosine = statistics.mean(last["cosine_to_the_rest"] for last in lasts)
                rows.append((ARMS[arm].title, regime, f"`{ARMS[arm].regulariser}`", loss, gradient, f"{cosine:+.2f}"))
    head = ("trained by", "images", "regulariser", "of the loss, %", "of the gradient, %", "cosine to the rest")
    return table(head, rows) if rows else NOTHING


def sweep(record: Run) -> str:
    """RPAT's term at several weights with one seed, on the held-out images that chose the epoch."""
    runs = numbers.finished(record)
    weighed = {"rpat_weight_0": 0, "rpat_release": 1, **{name: arm.weight for name, arm in SWEEP.items()}}
    rows = []
    for arm, weight in weighed.items():
        entry = runs.get(Job("all", arm, 0))
        if entry is not None:
            held, last = numbers.held_out(entry), entry["log"][-1]
            share = f"{100 * last['share_of_gradient']:.2g}" if "share_of_gradient" in last else "0"
            rows.append((str(weight), share, *(f"{held[column]:.2f}" for column in ("clean", "pgd10", "nrr"))))
    head = ("weight", "of the gradient, %", "clean, held out", "PGD-10, held out", "NRR, held out")
    return table(head, rows) if rows else NOTHING


def statistics_of(record: Run) -> str:
    """Accuracies with batch-norm statistics of other images, and how far training accuracy lies above."""
    rows = []
    for regime in REGIMES:
        for arm, entries in arms_of(numbers.finished(record), regime).items():
            finals = [entry[entry["final"].get("same_as", "final")] for entry in entries]
            gap = statistics.mean(final["train"]["pgd20"] - final["test"]["pgd20"] for final in finals)
            parts = [[entry["best"]["batch_norm"][name] for entry in entries] for name in ("own", "clean", "attacked")]
            shown = [
                " / ".join(f"{statistics.mean(one[column] for one in part):.2f}" for column in ("clean", "pgd20"))
                for part in parts
            ]
            shifts = (f"{statistics.mean(one['shift'] for one in part):.2f}" for part in parts[1:])
            rows.append((ARMS[arm].title, regime, *shown, *shifts, f"{gap:+.2f}"))
    head = (
        "trained by", "images", "own statistics", "of clean images", "of attacked images", "shift, clean",
        "shift, attacked", "PGD-20, training minus test, final",
    )  # fmt: skip
    return table(head, rows) if rows else NOTHING


def figures_of(record: Run) -> str:
    """RPAT's Fig. 2 and RAAT's groups on the networks of the record."""
    rows = []
    for regime in REGIMES:
        for arm, entries in arms_of(numbers.finished(record), regime).items():
            gaps = [entry["best"]["perception_gap"]["pgd20"] for entry in entries]
            moved = [mean_of([gap[name] for gap in gaps]) for name in ("success_mse", "failure_mse")]
            groups = [entry["best"]["groups"]["test"] for entry in entries]
            shares = (f"{statistics.mean(group[name] for group in groups):.1f}"
                      for name in ("misclassified", "boundary", "interior"))  # fmt: skip
            rows.append((ARMS[arm].title, regime, *map(number, moved), *shares))
    head = (
        "trained by", "images", "held: MSE", "broken: MSE", "misclassified, %", "boundary, %", "interior, %",
    )  # fmt: skip
    return table(head, rows) if rows else NOTHING


def mean_of(values: list[float | None]) -> float | None:
    """Mean of what is there."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def state(record: Run) -> str:
    """How far the experiment is."""
    declared = [job for block in order(SEEDS) for job in block]
    done = sum(job in declared for job in numbers.finished(record))
    if not done:
        return f"**No run has finished yet**, of {len(declared)} declared: this page shows a design, and no result."
    return f"**{done} of {len(declared)} declared runs have finished.**"


def progress(record: Run) -> str:
    """Which runs there are, and on what they were made."""
    runs = numbers.finished(record)
    begun = {Job(e["regime"], e["arm"], e["seed"]) for e in record["runs"] if e["status"] == "started"}
    declared = [job for block in order(SEEDS) for job in block]

    def seeds(arm: str, regime: str) -> str:
        own = [job for job in declared if job[:2] == (regime, arm)]
        if not own:
            return "-"
        busy = ", one begun" if any(job in begun for job in own) else ""
        return f"{sum(job in runs for job in own)} of {len(own)}{busy}"

    rows = [(arm.title, *(seeds(name, regime) for regime in REGIMES)) for name, arm in ARMS.items()]
    made = {(e["hardware"]["cpu"], e["hardware"]["device"], e["versions"]["torch"]) for e in runs.values()}
    lines = [f"Made on {cpu}, {device}, torch {torch}." for cpu, device, torch in sorted(made)]
    return "\n\n".join([table(("seeds of", *REGIMES), rows), *lines])


def picture(record: Run) -> str:
    """The trade-off, where it has been drawn."""
    if not numbers.finished(record) or not (FIGURES / "evidence_figure-light.svg").exists():
        return NOTHING
    words = "Clean against PGD-20 accuracy of all arms, with an arrow from each control to what is compared with it"
    return "\n".join(
        f"![{words}](../figures/evidence_figure-{scheme}.svg#only-{scheme})" for scheme in ("light", "dark")
    )


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    **{
        f"evidence_{regime}_{which}": (STEM, scores(regime, which)) for regime in REGIMES for which in ("best", "final")
    },
    "evidence_hypotheses": (STEM, hypotheses),
    "evidence_differences": (STEM, differences),
    "evidence_power": (STEM, power),
    "evidence_terms": (STEM, terms),
    "evidence_sweep": (STEM, sweep),
    "evidence_statistics": (STEM, statistics_of),
    "evidence_figures": (STEM, figures_of),
    "evidence_state": (STEM, state),
    "evidence_progress": (STEM, progress),
    "evidence_picture": (STEM, picture),
}
