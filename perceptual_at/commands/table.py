"""The papers' table from run folders: mean and deviation over seeds, NRR, paired tests, the printed row beside.

    perceptual-at table runs/*                                  # Markdown
    perceptual-at table runs/* --format latex --plot table.png

Runs that differ in their seed alone are one method. Numbers come from `perceptual-at evaluate --run` where it has been
run, else from the run's own test. Methods are compared with the first one, seed by seed.
"""

import csv
import dataclasses
import io
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from scipy import stats

from perceptual_at import Evaluation, metrics, plotting
from perceptual_at._tables import escaped, latex_table, markdown_table
from perceptual_at.checkpoints import written_whole
from perceptual_at.commands.endings import collected, said
from perceptual_at.commands.evaluating.results import read_result, report_at
from perceptual_at.commands.ingredients.protocol import threat_of
from perceptual_at.commands.options.reading import parse
from perceptual_at.commands.options.recipes import RECIPES
from perceptual_at.commands.options.recipes.rows import DATA, NETWORKS
from perceptual_at.commands.options.settings import FREE, GROUP_OF, Budget, Settings, settings_from
from perceptual_at.published import PublishedRow, published


@dataclasses.dataclass(frozen=True)
class Tabulating:
    """What becomes a table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of finished runs."""
    which: Literal["best", "final"] = "best"
    """Which weights."""
    format: Literal["markdown", "latex", "csv"] = "markdown"
    """What the table is written as."""
    printed: bool = True
    """The papers' printed rows beside the methods that they are of; --no-printed leaves them out."""
    out: Path | None = None
    """A file for the table; it is printed too."""
    plot: Path | None = None
    """A file for a plot of clean against robust accuracy."""


USUAL = "2.5 eps / steps"
"""Length of a step where nothing else was said."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """One run: its settings, and its scores in percent by column."""

    folder: Path
    settings: dict[str, Any]
    scores: dict[str, float]
    steps: dict[str, str] = dataclasses.field(default_factory=dict)
    """Length of a step of each attack that has one, as it was called."""
    threats: dict[str, str] = dataclasses.field(default_factory=dict)
    """Threat of each attack whose call is known."""
    images: tuple[int, str | None] = (0, None)
    """On how many images, and their fingerprint where it is known."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One method: runs that differ in their seed alone."""

    name: str
    runs: tuple[Scored, ...]
    rows: tuple[PublishedRow, ...]

    def of_seeds(self, column: str) -> dict[int, float]:
        """The scores of one column by seed."""
        return {run.settings["seed"]: run.scores[column] for run in self.runs if column in run.scores}


def scored(folder: Path, which: str) -> Scored:
    """The scores of a run: of its evaluation where there is one, else of its own test."""
    record = read_result(folder)
    try:
        settings_from({name: value for name, value in record["settings"].items() if name in GROUP_OF})
    except ValueError as error:
        raise ValueError(f"`{folder / 'result.json'}`: {error}") from error
    settings = Settings().flat() | record["settings"]
    own = repr(threat_of(Budget(norm=settings["norm"], eps=settings["eps"])))
    report = folder / "evaluation" / which / "report.json"
    if report.is_file():
        result = report_at(report)
        if result.provenance.get("weights", record[which].get("weights")) != record[which].get("weights"):
            raise ValueError(
                f"`{report}` is of other weights than the run has now; `perceptual-at evaluate --run {folder}` again."
            )
        shown = {"clean": result.clean_accuracy, **result.robust_accuracy}
        scores = {name: 100 * value for name, value in shown.items()}
        images = (len(result), result.provenance.get("data"))
        calls = {name: str(result.provenance.get(f"attack {name!r}")) for name in result.robust}
        steps = {name: found[1] for name, call in calls.items() if (found := re.search(r"step_size=([^,)]+)", call))}
        threats = {
            name: found[1] for name, call in calls.items() if (found := re.search(r"threat=(\w+\([^()]*\))", call))
        }
        _warn_of_other_tests(report, (record[which]["test"]["n"], f"{settings['data']}, test", own), result, threats)
        if result.cascade:
            names = list(result.robust)
            steps |= {name: f"{steps.get(name, USUAL)} on what {', '.join(names[:place])} left"
                      for place, name in enumerate(names) if place}  # fmt: skip
    else:
        test = record[which]["test"]
        scores = {name: value for name, value in test.items() if name not in ("n", "mean", "nrr")}
        images = (test["n"], None)
        chosen = settings["eval_step_size"]
        steps = {} if chosen is None else {name: str(chosen) for name in scores if name != "clean"}
        threats = {name: own for name in scores if name != "clean"}
    return Scored(folder, settings, scores, steps, threats, images)


def _warn_of_other_tests(report: Path, own: tuple[int, str, str], result: Evaluation, threats: dict[str, str]) -> None:
    """Say where a run was evaluated on fewer or other images than its test set, or under another threat."""
    count, images, threat = own
    found = [
        (f"{len(result)} images", f"{count:g} images"),
        (result.provenance.get("images", images), images),
        *((other, threat) for other in dict.fromkeys(threats.values())),
    ]
    differing = [f"{other} (its run: {expected})" for other, expected in found if other != expected]
    if differing:
        warnings.warn(f"`{report}` is of {', '.join(differing)}.", stacklevel=1)


def strongest(runs: Sequence[Scored]) -> str | None:
    """Of the attacks that all runs have AutoAttack, else the one that leaves the least; None if they share none."""
    shared = [name for name in runs[0].scores if name != "clean" and all(name in run.scores for run in runs)]
    return "aa" if "aa" in shared else min(
        shared, key=lambda name: statistics.fmean(run.scores[name] for run in runs), default=None
    )  # fmt: skip


def summarised(runs: Sequence[Scored]) -> list[Scored]:
    """Runs with the mean and the NRR of their clean accuracy and that under the strongest attack."""
    robust = strongest(runs)
    if robust is None:
        return list(runs)
    found = []
    for run in runs:
        pair = run.scores["clean"], run.scores[robust]
        more = {"mean": metrics.mean_score(*pair), "nrr": metrics.nrr(*pair)}
        found.append(dataclasses.replace(run, scores=run.scores | more))
    return found


def one_meaning(runs: Sequence[Scored]) -> None:
    """Refuse a column whose name means different attacks, or different images of one data set.

    Raises:
        ValueError: if an attack of one name had steps of different lengths, or different budgets on runs of one, or
            runs on one data set were measured on other images.
    """
    measured: dict[str, list[Scored]] = {}
    for run in runs:
        for other in measured.setdefault(run.settings["data"], []):
            (count, data), (count_other, data_other) = run.images, other.images
            if count != count_other or (None not in (data, data_other) and data != data_other):
                raise ValueError(
                    f"`{other.folder}` was measured on {count_other} images and `{run.folder}` on {count}, which are "
                    "not the same; evaluate both alike."
                )
        measured[run.settings["data"]].append(run)
    met: dict[str, tuple[str, Path]] = {}
    under: dict[tuple[Any, ...], tuple[str, Path]] = {}
    for run in runs:
        for name, threat in run.threats.items():
            first, folder = under.setdefault((name, run.settings["norm"], run.settings["eps"]), (threat, run.folder))
            if first != threat:
                raise ValueError(
                    f"{name} is under {first} in `{folder}` and under {threat} in `{run.folder}`; evaluate both alike."
                )
        for name in run.scores.keys() - {"clean", "mean", "nrr"}:
            step = run.steps.get(name, USUAL)
            first, folder = met.setdefault(name, (step, run.folder))
            if first != step:
                raise ValueError(
                    f"{name} has steps of {first} in `{folder}` and of {step} in `{run.folder}`; evaluate both alike."
                )


def grouped(runs: Sequence[Scored]) -> list[Group]:
    """Runs by method, in the order in which they came; a method's name says in what it differs from its namesakes."""
    held: dict[str, list[Scored]] = {}
    for run in runs:
        alike = held.setdefault(repr(sorted(_fixed(run.settings).items())), [])
        for other in alike:
            if other.settings["seed"] == run.settings["seed"]:
                raise ValueError(
                    f"`{other.folder}` and `{run.folder}` are of one method and one seed; leave one of them out."
                )
        alike.append(run)
    short = {key: _short(group[0].settings) for key, group in held.items()}
    groups = []
    for key, group in held.items():
        namesakes = [other for other in held if other != key and short[other] == short[key]]
        own, others = _fixed(group[0].settings), [_fixed(held[other][0].settings) for other in namesakes]
        differing = sorted({name for one in others for name in own | one if one.get(name) != own.get(name)})
        more = ", ".join(f"{name} {own.get(name)}" for name in differing[:4])
        groups.append(
            Group(f"{short[key]} ({more})" if more else short[key], tuple(group), _printed(group[0].settings))
        )
    return groups


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a run's method; of weights to begin with and teachers, which each seed may have its own, if any."""
    fixed = {name: value for name, value in settings.items() if name not in (*FREE, "seed")}
    fixed |= {name: "given" if settings.get(name) else None for name in ("init", "teacher")}
    return fixed | {"extra": Path(settings["extra"]).name if settings.get("extra") else None}


def _short(settings: dict[str, Any]) -> str:
    name = str(settings["objective"])
    if settings.get("base"):
        name += f" on {settings['base']}"
    return f"{name} + AWP" if settings.get("awp") else name


def _printed(settings: dict[str, Any]) -> tuple[PublishedRow, ...]:
    """The rows of the papers that are of this method, data set, norm and network."""
    sets = {chosen["data"]: name for name, chosen in DATA.items()}
    models = {short: name for name, short in NETWORKS.items()}
    alike = [
        made.printed for made in RECIPES.values()
        if made.printed and all(
            made.settings.flat()[name] == settings.get(name)
            for name in ("objective", "base", "source", "cutmix", "awp", "boundary_perturbation")
        ) and bool(made.settings.optimisation.average_decay) == bool(settings.get("average_decay"))
    ]  # fmt: skip
    if not alike or settings["data"] not in sets or settings["model"] not in models:
        return ()
    if settings.get("extra") or settings.get("init"):  # the papers' networks had neither
        return ()
    names = {name for printed in alike for name in printed}
    rows = published(dataset=sets[settings["data"]], norm=settings["norm"]) if settings["norm"] != "l1" else ()
    return tuple(row for row in rows if row.method in names and row.model == models[settings["model"]])


# Tests ------------------------------------------------------------------------------------------------------------


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test: how often chance alone gives a mean difference this far from 0.

    Examples:
        >>> round(paired_t([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    count = len(differences)
    if count < 2:
        return math.nan
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0 if differences[0] else 1.0
    t = statistics.fmean(differences) / (spread / math.sqrt(count))
    return float(2 * stats.t.sf(abs(t), count - 1))


def compared(first: Group, other: Group, column: str) -> tuple[float, float] | None:
    """Mean difference of a method from the first one over the seeds that both have, and its p-value."""
    a, b = first.of_seeds(column), other.of_seeds(column)
    differences = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
    return (statistics.fmean(differences), paired_t(differences)) if differences else None


# The table --------------------------------------------------------------------------------------------------------


def columns_of(groups: Sequence[Group]) -> list[str]:
    """Clean first, attacks as they come, mean and NRR last."""
    found = dict.fromkeys(name for group in groups for run in group.runs for name in run.scores)
    return [name for name in found if name not in ("mean", "nrr")] + [n for n in ("mean", "nrr") if n in found]


def cells(groups: Sequence[Group], *, printed: bool) -> list[list[str]]:
    """Head and rows: methods, their printed rows, and the differences from the first method."""
    columns = columns_of(groups)
    rows = [["method", "seeds", *columns]]
    for group in groups:
        values = [list(group.of_seeds(column).values()) for column in columns]
        rows.append([group.name, str(len(group.runs)), *(_mean_and_deviation(value) for value in values)])
        rows += [
            [f"printed: {row.paper} Table {row.table}, {row.method}", "", *(_printed_cell(row, c) for c in columns)]
            for row in (group.rows if printed else ())
        ]
    for group in groups[1:]:
        found = [compared(groups[0], group, column) for column in columns]
        rows.append([
            f"{group.name} - {groups[0].name}", "",
            *("" if pair is None else f"{pair[0]:+.2f}" + ("" if math.isnan(pair[1]) else f" (p {pair[1]:.3f})")
              for pair in found),
        ])  # fmt: skip
    return rows


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _printed_cell(row: PublishedRow, column: str) -> str:
    spread = f" ± {row.printed_std[column]}" if column in row.printed_std else ""
    return f"{row.printed[column]}{spread}" if column in row.printed else ""


def table_text(rows: Sequence[Sequence[str]], kind: str) -> str:
    """Rows as Markdown, LaTeX or CSV."""
    if kind == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue()
    head, *body = rows
    if kind == "markdown":
        return markdown_table(head, body) + "\n"
    return latex_table([escaped(cell) for cell in head], body)


def command(arguments: list[str]) -> None:
    """`perceptual-at table`: run folders in, a table out."""
    with said("perceptual-at table"), collected():
        chosen = parse(arguments, Tabulating, Tabulating(), "perceptual-at table", description=__doc__ or "")
        if not chosen.runs:
            raise ValueError("give the folders of finished runs.")
        if chosen.out is not None and (chosen.out.is_dir() or chosen.out == chosen.plot):
            raise ValueError(f"--out must be a file of its own, got `{chosen.out}`.")
        runs = [scored(folder, chosen.which) for folder in chosen.runs]
        one_meaning(runs)
        groups = grouped(summarised(runs))
        text = table_text(cells(groups, printed=chosen.printed), chosen.format)
        if chosen.plot is not None:  # may be refused, so nothing is printed before
            _draw(groups, chosen.plot)
        if chosen.out is not None:
            with written_whole(chosen.out) as path:
                path.write_text(text, encoding="utf-8")
        print(text, end="")


def _draw(groups: Sequence[Group], path: Path) -> None:
    """Clean against the strongest attack that all runs have."""
    robust = strongest([run for group in groups for run in group.runs])
    if robust is None:
        raise ValueError("--plot needs an attack that all runs were evaluated with.")
    points = {group.name: [(run.scores["clean"], run.scores[robust]) for run in group.runs] for group in groups}
    plotting.save(plotting.trade_off(points, robust_name=robust), path)
