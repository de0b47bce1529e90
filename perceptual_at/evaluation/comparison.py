"""Evaluations beside each other: two models on the same samples, several seeds, the papers' tables."""

import dataclasses
import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._tables import escaped, latex_table, markdown_table
from perceptual_at.evaluation.report import Evaluation
from perceptual_at.evaluation.statistics import Interval, mcnemar, paired_interval
from perceptual_at.published import METRICS, PublishedRow


@dataclasses.dataclass(frozen=True)
class Difference:
    """One accuracy of two models on the same samples.

    Examples:
        >>> found = Difference("clean", a=0.75, b=0.5, only_a=30, only_b=5, n=100)
        >>> found.difference, found.p < 0.001
        (0.25, True)
    """

    name: str
    """`"clean"`, `"worst_case"` or the name of an attack."""
    a: float
    b: float
    only_a: int
    """Samples that only the first gets right; for scores, those on which the first is better."""
    only_b: int
    n: int
    spread: float | None = None
    """Standard deviation of the difference of scores; None for right and wrong."""

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            _check.number("Difference", name, getattr(self, name), at_least=0.0, at_most=1.0)
        _check.count("Difference", "n", self.n)
        _check.count("Difference", "only_a", self.only_a, at_least=0, at_most=self.n)
        _check.count("Difference", "only_b", self.only_b, at_least=0, at_most=self.n - self.only_a)

    @property
    def difference(self) -> float:
        """First minus second, a fraction."""
        return self.a - self.b

    @property
    def p(self) -> float:
        """Exact p-value of McNemar's test; for scores, of the sign test, which is the same."""
        return mcnemar(self.only_a, self.only_b)

    @property
    def interval(self) -> Interval:
        """95 % interval of the difference."""
        if self.spread is None:
            return paired_interval(self.only_a, self.only_b, self.n)
        half = statistics.NormalDist().inv_cdf(0.975) * self.spread / math.sqrt(self.n)
        return Interval(max(-1.0, self.difference - half), min(1.0, self.difference + half))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side; p-values are of each row alone, not corrected for their number.

    Examples:
        >>> better = Evaluation(torch.tensor([True] * 8), {})
        >>> worse = Evaluation(torch.tensor([True] * 2 + [False] * 6), {})
        >>> print(compare(better, worse))
        clean 100.00 against 25.00: +75.00 points (95 % interval +18.89 to +100.00), p = 0.031
    """

    rows: tuple[Difference, ...]
    names: tuple[str, str] = ("a", "b")

    def __getitem__(self, name: str) -> Difference:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"Comparison: `name` must be one of {', '.join(row.name for row in self.rows)}, got {name!r}.")

    def __str__(self) -> str:
        return "\n".join(
            f"{row.name} {100 * row.a:.2f} against {100 * row.b:.2f}: {100 * row.difference:+.2f} points (95 % "
            f"interval {100 * row.interval.low:+.2f} to {100 * row.interval.high:+.2f}), p = {row.p:.2g}"
            for row in self.rows
        )

    def to_markdown(self) -> str:
        """The rows as a table, in percent."""
        return markdown_table(self._head(), self._cells())

    def to_latex(self) -> str:
        """The rows as a `tabular`, in percent."""
        return latex_table([escaped(cell) for cell in self._head()], self._cells())

    def to_dict(self) -> dict[str, Any]:
        """The rows by name, for JSON."""
        more = ("difference", "p", "interval")
        return {row.name: {**dataclasses.asdict(row), **{key: getattr(row, key) for key in more}} for row in self.rows}

    def _head(self) -> tuple[str, ...]:
        a, b = self.names
        return ("", f"{a}, %", f"{b}, %", "difference", "95 % interval", "p")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name.replace("worst_case", "worst case"), f"{100 * row.a:.2f}", f"{100 * row.b:.2f}",
                f"{100 * row.difference:+.2f}", f"{100 * row.interval.low:+.2f} to {100 * row.interval.high:+.2f}",
                f"{row.p:.2g}",
            )
            for row in self.rows
        ]  # fmt: skip


def compare(a: Evaluation, b: Evaluation, *, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Whether one model is better than another: paired tests on the samples both were evaluated on.

    For clean accuracy, every attack that both evaluations have, and the worst case if they have the same attacks.
    Samples are matched by their index. Of scores it is asked on how many samples each model is the better one. Attacks
    of one name that were called in two ways, and two kinds of scores, are compared with a warning.

    Args:
        a: evaluation of the first model.
        b: of the second, on the same samples.
        names: what to call them in tables.

    Returns:
        A `Comparison`: accuracies, their difference with a 95 % interval, and the p-value of McNemar's exact test.

    Raises:
        ValueError: if the evaluations are of other samples, one in cascade and one not, or both and a column counts
            what withstood other attacks.

    Source:
        McNemar 1947; Bonett and Price 2012 for the interval.

    Examples:
        >>> a = Evaluation(torch.tensor([True] * 6), {})
        >>> b = Evaluation(torch.tensor([False] * 6), {})
        >>> compare(a, b)["clean"].p  # six of six: 2 / 2^6
        0.03125
    """
    for name, value in (("a", a), ("b", b)):
        _check_evaluation("compare", name, value)
    _check.names("compare", "names", names)
    if len(names) != 2:
        raise TypeError(f"compare: `names` must be a pair, got {names!r}.")
    places_a, places_b = _matched(a, b)
    shared = [name for name in a.robust if name in b.robust]
    if shared and a.cascade != b.cascade:
        raise ValueError("compare: one evaluation is in cascade and one not, so their columns count different things.")
    for name in shared:
        _check_alike("compare", name, a, b)
    _warn_unlike("compare", shared, a, b)
    same = list(a.robust) == shared and len(b.robust) == len(shared)
    rows = []
    for name in ("clean", *shared, *(("worst_case",) if same and shared else ())):
        score_a, score_b = a.verdicts(name)[places_a].double(), b.verdicts(name)[places_b].double()
        only_a, only_b = int((score_a > score_b).sum()), int((score_b > score_a).sum())
        spread = None if a.counts and b.counts else float((score_a - score_b).std()) if len(a) > 1 else math.inf
        rows.append(
            Difference(name, score_a.mean().item(), score_b.mean().item(), only_a, only_b, len(a), spread=spread)
        )
    return Comparison(tuple(rows), (names[0], names[1]))


class MeanStd(NamedTuple):
    """Mean and sample standard deviation over seeds.

    Examples:
        >>> str(MeanStd(0.5, 0.0125))
        '50.00 ± 1.25'
    """

    mean: float
    std: float
    """NaN for a single evaluation."""

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.std:.2f}" if math.isfinite(self.std) else f"{100 * self.mean:.2f}"


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """Several evaluations of one method, as one row of the papers' tables.

    Examples:
        >>> runs = [Evaluation(torch.tensor([True] * right + [False] * (8 - right)), {}) for right in (4, 6)]
        >>> print(aggregate(runs))
        clean 62.50 ± 17.68, worst_case 62.50 ± 17.68, mean 62.50 ± 17.68, nrr 62.50 ± 17.68 (%, 2 seeds)
    """

    numbers: Mapping[str, MeanStd]
    """By name: clean, the attacks, worst case, mean, NRR; fractions."""
    seeds: int

    def __getitem__(self, name: str) -> MeanStd:
        return self.numbers[name]

    def __str__(self) -> str:
        return f"{', '.join(f'{name} {number}' for name, number in self.numbers.items())} (%, {self.seeds} seeds)"

    def to_markdown(self, *, method: str = "") -> str:
        """A table of one row, in percent."""
        return markdown_table(("method", *self.numbers), [(method, *(str(number) for number in self.numbers.values()))])

    def to_latex(self, *, method: str = "") -> str:
        """The same as a `tabular`."""
        head = ("method", *(escaped(name.replace("_", " ")) for name in self.numbers))
        return latex_table(head, [(method, *(str(number) for number in self.numbers.values()))])

    def to_dict(self) -> dict[str, Any]:
        """Mean and deviation by name, for JSON."""
        return {"seeds": self.seeds} | {name: number._asdict() for name, number in self.numbers.items()}


def aggregate(evaluations: Sequence[Evaluation]) -> Aggregate:
    """Mean and standard deviation over evaluations of one method with several seeds.

    Each number is computed per evaluation and then averaged, NRR too. The deviation has `len(evaluations) - 1` in its
    denominator; it is the spread of single runs, not the uncertainty of the mean. Attacks of one name that were called
    in two ways, and two kinds of scores, are averaged with a warning.

    Args:
        evaluations: one per seed, with the same attacks.

    Returns:
        An `Aggregate`.

    Raises:
        ValueError: if there is none, or they have other attacks, also as a cascade counts them.

    Source:
        RPAT, Sec. 5.1 and RAAT, Sec. 5.1, which report averages of three runs.

    Examples:
        >>> runs = [Evaluation(torch.tensor([True] * right + [False] * (8 - right)), {}) for right in (4, 6)]
        >>> aggregate(runs)["clean"].mean
        0.625
    """
    if not isinstance(evaluations, Sequence):
        raise TypeError(f"aggregate: `evaluations` must be a sequence, got {type(evaluations).__name__}.")
    if not evaluations:
        raise ValueError("aggregate: `evaluations` is empty.")
    for place, evaluation in enumerate(evaluations):
        _check_evaluation("aggregate", f"evaluations[{place}]", evaluation)
    tables = [evaluation.to_dict() for evaluation in evaluations]
    for table in tables:
        if table.keys() != tables[0].keys():
            raise ValueError(f"aggregate: `evaluations` have other attacks: {list(tables[0])} and {list(table)}.")
    for evaluation in evaluations[1:]:
        for name in evaluation.robust:
            _check_alike("aggregate", name, evaluations[0], evaluation)
        _warn_unlike("aggregate", list(evaluation.robust), evaluations[0], evaluation)
    numbers = {}
    for name in tables[0]:
        values = [table[name] for table in tables]
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        numbers[name] = MeanStd(statistics.fmean(values), std)
    del numbers["n"]
    return Aggregate(numbers, len(tables))


@dataclasses.dataclass(frozen=True)
class PublishedDifference:
    """One number of an evaluation beside a printed one; both in percent.

    Examples:
        >>> PublishedDifference("PGD-AT", "clean", own=84.0, printed=83.5, interval=Interval(83.3, 84.7)).agrees
        True
    """

    method: str
    metric: str
    own: float
    printed: float
    interval: Interval
    """95 % interval of the own number."""

    @property
    def agrees(self) -> bool:
        """Whether the printed number lies in the interval of the own one."""
        return self.interval.low <= self.printed <= self.interval.high


def against_published(evaluation: Evaluation, rows: Sequence[PublishedRow]) -> tuple[PublishedDifference, ...]:
    """An evaluation beside rows of the papers' tables, number by number; all of the same data, threat and network.

    Attacks are matched by name: call yours as the tables do, `pgd10`, `pgd20`, `pgd100`, `cw`, `aa`. The interval is
    that of the test samples alone. Seeds, epochs and the choice of the checkpoint differ on top of it.

    Args:
        evaluation: what `evaluate` gave.
        rows: what `published.published(...)` gave.

    Returns:
        A `PublishedDifference` for each row and number that both have, in the order of the rows.

    Raises:
        ValueError: if there is no row, or rows are of several data sets, threats or networks.

    Source:
        RPAT, Tables 1 to 6; RAAT, Tables 1, 2, 3 and 5.

    Examples:
        >>> from perceptual_at.published import published
        >>> rows = published(paper="RPAT", table=1, dataset="CIFAR-10", method="PGD-AT+RPAT")
        >>> (clean,) = against_published(Evaluation(torch.tensor([True] * 4 + [False]), {}), rows)
        >>> clean.own, clean.printed, clean.agrees
        (80.0, 83.2, True)
    """
    _check_evaluation("against_published", "evaluation", evaluation)
    check_rows("against_published", rows)
    settings = dict.fromkeys((row.dataset, row.norm, row.model) for row in rows)
    if len(settings) > 1:
        raise ValueError(
            "against_published: `rows` must be of one data set, threat and network, those of the evaluation, got "
            f"{', '.join(' / '.join(one) for one in settings)}; choose with published(dataset=, norm=, model=)."
        )
    found = []
    for row in rows:
        for metric in METRICS:
            if metric in row.printed and metric in ("clean", *evaluation.robust):
                low, high = evaluation.interval(metric)
                own = 100 * evaluation.verdicts(metric).double().mean().item()
                interval = Interval(100 * low, 100 * high)
                found.append(PublishedDifference(row.method, metric, own, row[metric], interval))
    return tuple(found)


def check_rows(function: str, rows: Any) -> None:
    """Require rows of the papers' tables, at least one."""
    if not isinstance(rows, Sequence) or not all(isinstance(row, PublishedRow) for row in rows):
        raise TypeError(f"{function}: `rows` must be a sequence of what `published.published` gives.")
    if not rows:
        raise ValueError(f"{function}: `rows` is empty; no table has that combination.")


def _check_evaluation(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Evaluation):
        raise TypeError(f"{function}: `{name}` must be an Evaluation, got {type(value).__name__}.")


def _check_alike(function: str, name: str, a: Evaluation, b: Evaluation) -> None:
    """Require that an attack's column counts what withstood the same attacks: in cascade, those before it too."""
    counted = []
    for one in (a, b):
        names = list(one.robust)
        counted.append(names[: names.index(name) + 1] if one.cascade else [name])
    if set(counted[0]) != set(counted[1]):
        first, second = (", ".join(names) for names in counted)
        raise ValueError(
            f"{function}: {name!r} counts what withstood {first} in one evaluation and {second} in another, because of "
            "`cascade`; evaluate both alike."
        )


def _warn_unlike(function: str, names: Sequence[str], a: Evaluation, b: Evaluation) -> None:
    """Warn where attacks of one name are known to have been called in two ways, or scores differ; seeds may."""
    scores = [one.provenance.get("score", "whether the class is right") for one in (a, b)]
    if a.provenance and b.provenance and scores[0] != scores[1]:
        warnings.warn(
            f"{function}: what counts as right is not the same in both evaluations: {scores[0]} and {scores[1]}; "
            "evaluate both with one `score`.",
            stacklevel=3,
        )
    for name in names:
        calls = [one.provenance.get(f"attack {name!r}") for one in (a, b)]
        first, second = (re.sub(r"Generator\(seed=-?\d+\)", "Generator()", str(call)) for call in calls)
        if first != second and None not in calls:
            warnings.warn(
                f"{function}: {name!r} is not the same attack in both evaluations: {first} and {second}; evaluate both "
                "alike.",
                stacklevel=3,
            )


def _matched(a: Evaluation, b: Evaluation) -> tuple[Tensor, Tensor]:
    """The order in which the samples of each are the same."""
    places = []
    for one in (a, b):
        index = torch.arange(len(one), device="cpu") if one.index is None else one.index
        places.append((index.argsort(), index, one.labels))
    (order_a, index_a, labels_a), (order_b, index_b, labels_b) = places
    same = torch.equal(index_a[order_a], index_b[order_b])
    if same and labels_a is not None and labels_b is not None:
        same = torch.equal(labels_a[order_a], labels_b[order_b])
    data = [one.provenance.get("data") for one in (a, b)]
    if not same or (None not in data and data[0] != data[1]):
        raise ValueError(
            f"compare: the evaluations are of other samples, {len(a)} and {len(b)}; a paired test needs the same ones "
            "in both, in one dtype, and in one order or with the index that the loader gives of each."
        )
    return order_a, order_b
