"""How the tables of recorded runs are written."""

import statistics
from collections.abc import Iterable, Sequence

GAP = "\N{NO-BREAK SPACE}"


def spread(values: Iterable[float]) -> str:
    """Mean and sample deviation."""
    values = list(values)
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean}{GAP}±{GAP}{statistics.stdev(values):.2f}" if len(values) > 1 else mean


def number(value: float | None) -> str:
    """Three digits that count."""
    return "-" if value is None else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
