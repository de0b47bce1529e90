"""Whether one model is better than another: paired tests on the samples that both were evaluated on.

perceptual-at compare runs/rpat-0/evaluation/best runs/pgd_at-0/evaluation/best
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import perceptual_at as pat
from perceptual_at.commands.endings import collected, said
from perceptual_at.commands.evaluating.results import report_at
from perceptual_at.commands.options.reading import parse


@dataclasses.dataclass(frozen=True)
class Comparing:
    """What is compared."""

    reports: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Two reports: report.json, or folders that hold one."""
    names: tuple[str, ...] = ()
    """What to call the two; their paths if left out."""
    latex: bool = False
    """A LaTeX table instead of Markdown."""


def command(arguments: list[str]) -> None:
    """`perceptual-at compare`: two reports, one table."""
    with said("perceptual-at compare"), collected():
        chosen = parse(arguments, Comparing, Comparing(), "perceptual-at compare", description=__doc__ or "")
        if len(chosen.reports) != 2:
            raise ValueError(f"give two reports, got {len(chosen.reports)}.")
        if len(chosen.names) not in (0, 2):
            raise ValueError(f"--names takes two names, got {len(chosen.names)}.")
        first, second = chosen.names or map(str, chosen.reports)
        a, b = map(report_at, chosen.reports)
        comparison = pat.compare(a, b, names=(first, second))
        print(comparison.to_latex() if chosen.latex else comparison.to_markdown())
