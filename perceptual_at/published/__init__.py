r"""The result tables of both papers as data: every printed number, and which of them do not follow from the others.

185 rows: RPAT Tables 1 to 6, RAAT Tables 1, 2, 3 and 5 (its Table 4 lists objectives). All numbers are percentages and
kept as the strings that were printed; floats and the two summaries are computed from them.

Two kinds of printed numbers are derived from others, and a few of those do not follow (`disagreements` computes the
list):

- NRR: one value, printed in both papers. MAIL on CIFAR-10 with PreActResNet-18 (79.50 and 39.60) has 52.86650, a shade
  below the tie, and is printed as 52.867. Rounding of its inputs explains it. No Mean disagrees.
- RAAT's rows of relative improvements, best of RAAT and RAAT++ over best of the four benchmarks: 16 of 45 disagree, and
  rounding explains 5 of these. The largest: Clean on Tiny-ImageNet with WideResNet-28-10 is -3.56 %, printed -1.41;
  C&W on CIFAR-10 in $\ell_2$ is +1.42 %, printed +0.04, which is RAAT's instead of the better one's.

Two more things to know before comparing rows. MMA and SOVR have the same CIFAR-100 numbers under ResNet-18 (RAAT Table
2) and PreActResNet-18 (both Tables 3). The row RPAT in RAAT's Table 3 is lower than RPAT++ in RPAT's Table 3.

Names: `method` is as printed, with `*` for CutMix augmentation, `$` for the larger training budget of RPAT's Table 6,
`[...]` for the perception layer of RPAT's Table 5. RAAT writes Cons-AT for Consistency-AT.
"""

import csv
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import resources
from typing import Any, NamedTuple

from perceptual_at._values import FrozenDict
from perceptual_at.metrics import mean_score, nrr

METRICS = ("clean", "pgd10", "pgd20", "pgd100", "cw", "aa")
"""Accuracies: without attack, under PGD with 10, 20, 100 steps, C&W, AutoAttack."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of a result table.

    Examples:
        >>> (row,) = published(paper="RPAT", table=1, dataset="CIFAR-10", method="PGD-AT+RPAT")
        >>> row.printed["clean"], row.printed["aa"], row.printed["nrr"]
        ('83.20', '48.00', '60.878')
        >>> row.clean, row.aa, round(row.nrr, 3)
        (83.2, 48.0, 60.878)
    """

    paper: str
    """`"RPAT"` or `"RAAT"`."""
    table: int
    """Number of the table in that paper."""
    dataset: str
    norm: str
    """`"linf"` or `"l2"`."""
    model: str
    method: str
    variant: str
    """`"baseline"` (the four benchmarks), `"sota"` (other work) or `"ours"` (the paper's own)."""
    venue: str
    """Where the method was published, as printed; empty for benchmarks and for the paper's own."""
    printed: Mapping[str, str] = field(hash=False)
    """The printed numbers by metric, `"mean"` and `"nrr"` included; of the best checkpoint where there are two."""
    printed_std: Mapping[str, str] = field(hash=False)
    """The printed deviations over three runs; empty where there are none."""
    printed_final: Mapping[str, str] = field(hash=False)
    """The printed numbers of the last checkpoint; empty where there are none."""

    def __getitem__(self, metric: str) -> float:
        """The printed number as a float, `row["pgd20"]`."""
        if metric not in self.printed:
            raise KeyError(
                f"{self.paper} Table {self.table} prints no {metric!r} for {self.method}; it has "
                f"{', '.join(self.printed)}."
            )
        return float(self.printed[metric])

    @property
    def clean(self) -> float:
        """Clean accuracy."""
        return self["clean"]

    @property
    def aa(self) -> float:
        """Accuracy under AutoAttack."""
        return self["aa"]

    @property
    def mean(self) -> float:
        """Mean of clean and AutoAttack accuracy, computed."""
        return mean_score(self.clean, self.aa)

    @property
    def nrr(self) -> float:
        """Harmonic mean of clean and AutoAttack accuracy, computed."""
        return nrr(self.clean, self.aa)


@dataclass(frozen=True, slots=True)
class Uplift:
    """A printed row of relative improvements: best of RAAT and RAAT++ over best of the four benchmarks, in percent.

    Examples:
        >>> (row,) = uplifts(dataset="Tiny-ImageNet", model="WideResNet-28-10")
        >>> row.printed["clean"], round(row.computed("clean"), 2)
        ('-1.41', -3.56)
        >>> row.printed["pgd100"], round(row.computed("pgd100"), 2)
        ('+0.35', 0.35)
    """

    paper: str
    table: int
    dataset: str
    norm: str
    model: str
    printed: Mapping[str, str] = field(hash=False)
    """The printed percentages by metric, with their sign."""

    def best(self, metric: str) -> tuple[PublishedRow, PublishedRow]:
        """The best of RAAT and RAAT++ and the best benchmark in the same block of the table."""
        rows = published(paper=self.paper, table=self.table, dataset=self.dataset, norm=self.norm, model=self.model)
        ours = max((row for row in rows if row.variant == "ours"), key=lambda row: row[metric])
        return ours, max((row for row in rows if row.variant == "baseline"), key=lambda row: row[metric])

    def computed(self, metric: str) -> float:
        """The relative improvement that follows from the rows above it, in percent."""
        ours, base = self.best(metric)
        return 100 * (ours[metric] - base[metric]) / base[metric]


class Disagreement(NamedTuple):
    """A printed number more than half a unit of its last digit away from what the numbers beside it give."""

    row: PublishedRow | Uplift
    metric: str
    """`"mean"`, `"nrr"`, or the metric of an uplift."""
    printed: str
    computed: float
    explained_by_rounding: bool
    """Whether some inputs that round to the printed ones give the printed result."""


def published(
    *,
    paper: str | Collection[str] | None = None,
    table: int | Collection[int] | None = None,
    dataset: str | Collection[str] | None = None,
    norm: str | Collection[str] | None = None,
    model: str | Collection[str] | None = None,
    method: str | Collection[str] | None = None,
    variant: str | Collection[str] | None = None,
) -> tuple[PublishedRow, ...]:
    """The published results, all of them or those that match.

    Args:
        paper: `"RPAT"`, `"RAAT"`; each argument also takes several values.
        table: number of the table.
        dataset: `"CIFAR-10"`, `"CIFAR-100"`, `"Tiny-ImageNet"`.
        norm: `"linf"`, `"l2"`.
        model: `"ResNet-18"`, `"PreActResNet-18"`, `"WideResNet-28-10"`, `"WideResNet-34-10"`.
        method: a name as printed, such as `"PGD-AT+RPAT"`.
        variant: `"baseline"`, `"sota"`, `"ours"`.

    Returns:
        The rows, in the order of the tables. Combinations that no table has give an empty tuple.

    Raises:
        ValueError: if a value occurs in no row; the message lists those that do.

    Examples:
        >>> len(published())
        185
        >>> best = max(published(dataset="CIFAR-10", norm="linf", model="ResNet-18"), key=lambda row: row.nrr)
        >>> best.paper, best.method, best.printed["clean"], best.printed["aa"]
        ('RPAT', 'Consistency-AT+RPAT', '84.12', '48.98')
    """
    wanted = {
        "paper": paper, "table": table, "dataset": dataset, "norm": norm, "model": model, "method": method,
        "variant": variant,
    }  # fmt: skip
    rows = _results()
    for name, value in wanted.items():
        if value is None:
            continue
        several = isinstance(value, Iterable) and not isinstance(value, str)
        values: tuple[Any, ...] = tuple(value) if several else (value,)  # type: ignore[arg-type]  # see `several`
        known = tuple(dict.fromkeys(getattr(row, name) for row in _results()))
        for unknown in (one for one in values if one not in known):
            raise ValueError(
                f"published: no row has `{name}` {unknown!r}; there are {', '.join(repr(one) for one in known)}."
            )
        rows = tuple(row for row in rows if getattr(row, name) in values)
    return rows


def uplifts(*, dataset: str | None = None, norm: str | None = None, model: str | None = None) -> tuple[Uplift, ...]:
    """The rows of relative improvements that RAAT's Tables 1 and 5 print, kept apart from the results.

    Args:
        dataset: `"CIFAR-10"`, `"CIFAR-100"`, `"Tiny-ImageNet"`.
        norm: `"linf"`, `"l2"`.
        model: `"ResNet-18"`, `"WideResNet-28-10"`.

    Returns:
        The rows that match, in the order of the tables.

    Raises:
        ValueError: if a value occurs in no row; the message lists those that do.

    Examples:
        >>> len(uplifts())
        9
        >>> uplifts(dataset="CIFAR-10", norm="l2")[0].printed["cw"]
        '+0.04'
    """
    rows = _uplifts()
    for name, value in {"dataset": dataset, "norm": norm, "model": model}.items():
        known = tuple(dict.fromkeys(getattr(row, name) for row in _uplifts()))
        if value is not None and value not in known:
            raise ValueError(
                f"uplifts: no row has `{name}` {value!r}; there are {', '.join(repr(one) for one in known)}."
            )
        rows = tuple(row for row in rows if value is None or getattr(row, name) == value)
    return rows


def disagreements() -> tuple[Disagreement, ...]:
    """All derived numbers that do not follow from the numbers beside them, computed in decimal arithmetic.

    Returns:
        18 entries: one NRR, printed in two tables, and 16 uplifts.

    Examples:
        >>> [(found.row.method, found.row.paper, found.printed) for found in disagreements() if found.metric == "nrr"]
        [('MAIL', 'RPAT', '52.867'), ('MAIL', 'RAAT', '52.867')]
        >>> sum(isinstance(found.row, Uplift) for found in disagreements())
        16
    """
    return tuple(_disagreements())


def _disagreements() -> Iterator[Disagreement]:
    for row in _results():
        clean, robust = row.printed["clean"], row.printed["aa"]
        exact = {"mean": _mean(Decimal(clean), Decimal(robust)), "nrr": _nrr(Decimal(clean), Decimal(robust))}
        for metric, value in exact.items():
            if metric in row.printed and _differs(row.printed[metric], value, value):
                formula = _mean if metric == "mean" else _nrr
                low = formula(Decimal(clean) - _half(clean), Decimal(robust) - _half(robust))
                high = formula(Decimal(clean) + _half(clean), Decimal(robust) + _half(robust))
                explained = not _differs(row.printed[metric], low, high)
                yield Disagreement(row, metric, row.printed[metric], float(value), explained)
    for uplift in _uplifts():
        for metric, printed in uplift.printed.items():
            ours, base = (row.printed[metric] for row in uplift.best(metric))
            value = _uplift(Decimal(ours), Decimal(base))
            if _differs(printed, value, value):
                low = _uplift(Decimal(ours) - _half(ours), Decimal(base) + _half(base))
                high = _uplift(Decimal(ours) + _half(ours), Decimal(base) - _half(base))
                yield Disagreement(uplift, metric, printed, float(value), not _differs(printed, low, high))


def _mean(clean: Decimal, robust: Decimal) -> Decimal:
    return (clean + robust) / 2


def _nrr(clean: Decimal, robust: Decimal) -> Decimal:
    return 2 * clean * robust / (clean + robust)


def _uplift(ours: Decimal, base: Decimal) -> Decimal:
    return 100 * (ours - base) / base


def _half(printed: str) -> Decimal:
    """Half a unit of the last printed digit: 0.005 for `"79.50"`."""
    return Decimal((0, (5,), int(Decimal(printed).as_tuple().exponent) - 1))


def _differs(printed: str, low: Decimal, high: Decimal) -> bool:
    """Whether no number between `low` and `high` rounds to what is printed, ties in either direction."""
    return high < Decimal(printed) - _half(printed) or low > Decimal(printed) + _half(printed)


def _read(name: str) -> Iterator[dict[str, str]]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    yield from csv.DictReader(text.splitlines())


@functools.cache
def _results() -> tuple[PublishedRow, ...]:
    def cells(line: dict[str, str], suffix: str) -> Mapping[str, str]:
        names = (*METRICS, "mean", "nrr")
        return FrozenDict({name: line[name + suffix] for name in names if line.get(name + suffix)})

    return tuple(
        PublishedRow(
            paper=line["paper"],
            table=int(line["table"]),
            dataset=line["dataset"],
            norm=line["norm"],
            model=line["model"],
            method=line["method"],
            variant=line["variant"],
            venue=line["venue"],
            printed=cells(line, ""),
            printed_std=cells(line, "_std"),
            printed_final=cells(line, "_final"),
        )
        for line in _read("results.csv")
    )


@functools.cache
def _uplifts() -> tuple[Uplift, ...]:
    return tuple(
        Uplift(
            paper=line["paper"],
            table=int(line["table"]),
            dataset=line["dataset"],
            norm=line["norm"],
            model=line["model"],
            printed=FrozenDict({name: line[name] for name in METRICS if line.get(name)}),
        )
        for line in _read("uplifts.csv")
    )
