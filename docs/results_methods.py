"""The table of `benchmarks/methods_on_digits.py`: every method under one budget of passes, with paired tests."""

import statistics
from collections.abc import Callable
from typing import Any

from results_table import spread, table

Run = dict[str, Any]


def methods(run: Run) -> str:
    """Scores of all methods, and what differs from what they compare with by more than the noise."""
    titles, runs, tests = run["titles"], run["runs"], run["paired"]
    rows = []
    for name, scores in runs.items():
        test = tests.get(name)
        rows.append((
            titles[name], f"{statistics.mean(score['steps'] for score in scores):.0f}",
            *(spread([score[column] for score in scores]) for column in ("clean", "pgd20", "nrr")),
            "" if test is None else titles[test["against"]],
            "" if test is None else _difference(test["nrr"]),
        ))  # fmt: skip
    settings, hardware = run["settings"], run["hardware"]
    made = (
        f"Handwritten digits, Linf {settings['eps']:g}, {settings['seeds']} seeds, {settings['units']} passes of a "
        f"batch of {settings['batch']} per run; means ± standard deviations in percent. `{run['command']}`, torch "
        f"{run['versions']['torch']}, {hardware['cpu']}, {hardware['threads']} thread, {run['seconds'] / 60:.0f} "
        f"minutes on a machine that did other things too, commit `{run['commit'][:7]}`."
    )
    heads = ("trained by", "steps", "clean", "PGD-20", "NRR", "beside", "NRR, difference and 95 % interval")
    return f"{table(heads, rows)}\n\n{verdict(run)}\n\n{made}"


def verdict(run: Run) -> str:
    """Which differences are outside the noise, and how many would be by chance."""
    titles, tests = run["titles"], run["paired"]
    ahead = [name for name, test in tests.items() if test["nrr"]["low"] > 0]
    behind = [name for name, test in tests.items() if test["nrr"]["high"] < 0]
    inside = len(tests) - len(ahead) - len(behind)

    def named(names: list[str]) -> str:
        return ", ".join(f"{titles[name]} (beside {titles[tests[name]['against']]})" for name in names) or "none"

    return (
        f"NRR above what it is compared with, beyond the noise of {run['settings']['seeds']} seeds: {named(ahead)}. "
        f"Below: {named(behind)}. Inside the noise: the other {inside} of {len(tests)}. Of {len(tests)} comparisons "
        f"about {len(tests) * 0.05:.0f} would be outside by chance alone."
    )


def _difference(test: dict[str, float]) -> str:
    shown = f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"
    return f"**{shown}**" if test["low"] > 0 or test["high"] < 0 else shown


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    "methods": ("methods_on_digits", methods),
    "methods_longer": ("methods_on_digits_longer", methods),
}
