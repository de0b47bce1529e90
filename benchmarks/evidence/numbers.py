"""Every number that pages quote, computed from the verdicts and logs on record."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scipy import stats

from evidence.books import Entry, unpacked
from evidence.design import SEEDS, Job
from evidence.hypotheses import MARGIN, Hypothesis
from perceptual_at import mean_score, nrr
from perceptual_at.evaluation import mcnemar

COLUMNS = ("clean", "pgd20", "margin30", "autoattack", "mean", "nrr")
JUDGED = {"clean": "test", "pgd20": "test", "margin30": "test", "autoattack": "autoattack"}
"""In which part of an entry the verdicts of a column stand."""


def finished(record: dict[str, Any]) -> dict[Job, Entry]:
    """The runs that have their measurements."""
    return {
        Job(*(entry[key] for key in Job._fields)): entry for entry in record["runs"] if entry["status"] == "finished"
    }


def verdicts(entry: Entry, column: str, which: str = "best") -> list[bool] | None:
    """Verdicts of a column, image by image; None where it was not measured."""
    part = entry[entry[which].get("same_as", which)].get(JUDGED[column])
    return None if part is None else unpacked(part["verdicts"][column])


def score(entry: Entry, column: str, which: str = "best") -> float | None:
    """A column in percent. `mean` and `nrr` are those of clean accuracy and PGD-20."""
    if column in ("mean", "nrr"):
        clean, robust = (score(entry, name, which) for name in ("clean", "pgd20"))
        return (mean_score if column == "mean" else nrr)(clean, robust)
    found = verdicts(entry, column, which)
    return None if found is None else 100 * sum(found) / len(found)


def held_out(entry: Entry) -> dict[str, float]:
    """Accuracies on the held-out images after the epoch that they chose, and their NRR."""
    found = entry["log"][entry["best"]["epoch"] - 1]["held_out"]
    return {**found, "nrr": nrr(found["clean"], found["pgd10"])}


def scores(runs: dict[Job, Entry], regime: str, arm: str, column: str, which: str = "best") -> list[float]:
    """A column of an arm, seed by seed, as far as it was measured."""
    found = [score(entry, column, which) for job, entry in sorted(runs.items()) if job[:2] == (regime, arm)]
    return [value for value in found if value is not None]


class Interval(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of a mean: infinitely wide for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(confidence, len(values) - 1) * standard_error(values)
    return Interval(mean, mean - half, mean + half)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def detectable(values: Sequence[float], power: float = 0.8) -> float:
    """The true difference that a test at 5 % finds with this power, if differences scatter as these do."""
    return found_with(power, len(values)) * standard_error(values)


def seeds_for(points: float, values: Sequence[float], power: float = 0.8) -> int:
    """How many seeds would find a true difference of so many points, if differences scatter as these do."""
    seeds = 2
    while found_with(power, seeds) * statistics.stdev(values) / math.sqrt(seeds) > points:
        seeds += 1
    return seeds


def found_with(power: float, seeds: int) -> float:
    """The true difference in standard errors that a test at 5 % finds with this power."""
    return t_quantile(0.95, seeds - 1) + t_quantile(2 * power - 1, seeds - 1)


def t_quantile(confidence: float, degrees: int) -> float:
    """How far Student's t stays from zero, on either side, with this probability."""
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


class Pair(NamedTuple):
    """An arm and its control with one seed."""

    seed: int
    difference: float
    p: float | None
    """Of McNemar's exact test on the images; None for columns that are no verdicts."""


def pairs(runs: dict[Job, Entry], regime: str, arm: str, control: str, column: str, which: str = "best") -> list[Pair]:
    """Differences in points, arm minus control, for the seeds that have both."""
    found = []
    for job, entry in sorted(runs.items()):
        other = runs.get(job._replace(arm=control))
        if job[:2] != (regime, arm) or other is None:
            continue
        a, b = (score(one, column, which) for one in (entry, other))
        if a is not None and b is not None:
            found.append(Pair(job.seed, a - b, image_test(entry, other, column, which)))
    return found


def image_test(entry: Entry, other: Entry, column: str, which: str) -> float | None:
    """McNemar's p-value of one seed."""
    if column not in JUDGED:
        return None
    a, b = (verdicts(one, column, which) for one in (entry, other))
    only_a, only_b = (sum(x and not y for x, y in zip(*both, strict=True)) for both in ((a, b), (b, a)))
    return mcnemar(only_a, only_b)


def judgement(hypothesis: Hypothesis, differences: Iterable[float]) -> str:
    """What the differences seed by seed say about a hypothesis, once the declared seeds are in: of intervals that are
    looked at after every seed, more than the stated share errs.
    """
    found = list(differences)
    if not found:
        return "not run yet"
    if len(found) < SEEDS:
        return "too early"
    interval = t_interval(found)
    if hypothesis.sign == 0:
        if interval.low > -MARGIN and interval.high < MARGIN:
            return "borne out"
        return "refuted" if interval.low > MARGIN or interval.high < -MARGIN else "open"
    low, high = sorted((hypothesis.sign * interval.low, hypothesis.sign * interval.high))
    return "borne out" if low > 0 else "refuted" if high < 0 else "open"
