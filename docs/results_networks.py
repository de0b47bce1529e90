"""Tables of "How far from exact", computed from the verdicts on record."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from results_table import table

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from evidence.books import unpacked

Run = dict[str, Any]
STEM = "real_networks"
STANDARD, THOROUGH, OFFICIAL = "AutoAttack standard", "AutoAttack thorough", "official AutoAttack"
HERE = "perceptual_at"


def count(one: Run, bits: Sequence[bool]) -> str:
    """Share of the images of a network, in percent."""
    return f"{100 * sum(bits) / one['images']:.1f}"


def rows_of(one: Run) -> dict[str, Run]:
    """The attacks that ran on a network, by name."""
    return {row["name"]: row for row in one["rows"] if not row["missing"]}


def held(one: Run, name: str) -> list[bool]:
    """What resists an attack, image by image."""
    return unpacked(rows_of(one)[name]["verdicts"])


def left(one: Run) -> list[bool]:
    """What resists all of them."""
    return [all(verdicts) for verdicts in zip(*(held(one, name) for name in rows_of(one)), strict=True)]


def range_of(one: Run) -> str:
    """The exact robust accuracy, or between what it lies."""
    low, high = (count(one, unpacked(one["exact"][name])) for name in ("verdicts", "not_excluded"))
    if one["proven"] == "broken":
        return "0.0"
    return low if low == high else f"{low} to {high}"


def exact(run: Run) -> str:
    """Each network: what is proved from below, what is exact, what attacks leave."""
    rows = []
    for one in run["networks"]:
        attacks, programmed = rows_of(one), one["exact"]
        rows.append((
            one["name"], str(one["images"]), one["eps"], count(one, unpacked(one["right"])),
            f"{100 * one['relaxation']['robust_by_intervals'] / one['images']:.1f}",
            count(one, unpacked(one["relaxation"]["verdicts"])), range_of(one),
            *(count(one, held(one, name)) if name in attacks else "-" for name in (THOROUGH, STANDARD, OFFICIAL)),
            f"{programmed['undecided']} ({programmed['too_many_open']})" if one["proven"] is None else "-",
        ))  # fmt: skip
    head = (
        "network", "images", "eps", "clean, %", "intervals, %", "relaxation, %", "exact, %", "thorough, %",
        "AutoAttack, %", "official, %", "undecided (too many open ReLUs)",
    )  # fmt: skip
    return f"{table(head, rows)}\n\n{made(run)}"


def programs(run: Run) -> str:
    """What mixed-integer programming was asked, and what it cost."""
    rows = [
        (
            one["name"], " / ".join(map(str, one["exact"]["open_relus"])), str(one["exact"]["asked"]),
            f"{one['exact']['seconds']:g}", str(one["exact"]["found_broken"]), str(one["exact"]["undecided"]),
            str(one["exact"]["cross_checked"]), f"{one['relaxation']['cpu_s']:.0f}", f"{one['exact']['cpu_s']:.0f}",
        )
        for one in run["networks"]
    ]  # fmt: skip
    head = (
        "network", "open ReLUs: least / median / most", "asked", "seconds each", "broken by it alone", "undecided",
        "cross-checked", "CPU s, relaxation", "CPU s, programs",
    )  # fmt: skip
    return table(head, rows)


def names(run: Run) -> list[str]:
    """Of the attacks that ran somewhere, in order."""
    return list(dict.fromkeys(name for one in run["networks"] for name in rows_of(one)))


def attacks(run: Run) -> str:
    """What each attack leaves, in percent of the images."""
    rows = [
        (name, *(count(one, held(one, name)) if name in rows_of(one) else "-" for one in run["networks"]))
        for name in names(run)
    ]
    everything = ("all of them", *(count(one, left(one)) for one in run["networks"]))
    proved = ("**exact**", *(range_of(one) for one in run["networks"]))
    missing = sorted({f"{row['name']} ({row['missing']})" for one in run["networks"] for row in one["rows"]
                      if row["missing"]})  # fmt: skip
    said = f"\n\nDid not run: {', '.join(missing)}." if missing else ""
    return table(("robust, %", *(one["name"] for one in run["networks"])), [*rows, everything, proved]) + said


def costs(run: Run) -> str:
    """What each attack costs: passes for an image that the network gets right, and processor time."""
    rows = []
    for name in names(run):
        cells = []
        for one in run["networks"]:
            row, right = rows_of(one).get(name), one["clean"]
            cells.append(
                f"{row['gradients'] / right:,.0f} + {row['forwards'] / right:,.0f}; {row['cpu_s']:.1f}" if row else "-"
            )
        rows.append((name, *cells))
    return table(("gradients + other passes; CPU s", *(one["name"] for one in run["networks"])), rows)


def against(one: Run, name: str) -> tuple[int, int]:
    """How many samples an attack breaks that the reference does not, and the other way round."""
    reference = held(one, OFFICIAL if OFFICIAL in rows_of(one) else STANDARD)
    pairs = list(zip(held(one, name), reference, strict=True))
    return sum(not ours and theirs for ours, theirs in pairs), sum(ours and not theirs for ours, theirs in pairs)


def agreement(run: Run) -> str:
    """Other verdicts than the official AutoAttack's, sample by sample."""
    rows = []
    for name in names(run):
        cells = []
        for one in run["networks"]:
            more, fewer = against(one, name) if name in rows_of(one) else (0, 0)
            cells.append(f"+{more} -{fewer}" if more or fewer else "same" if name in rows_of(one) else "-")
        rows.append((name, *cells))
    return table(("broken beside the official", *(one["name"] for one in run["networks"])), rows)


def outside(run: Run) -> str:
    """Samples whose point is outside ball or box, in exact arithmetic."""
    rows = []
    for name in names(run):
        found = [rows_of(one)[name] for one in run["networks"] if name in rows_of(one)]
        count_all = sum(one["clean"] for one in run["networks"] if name in rows_of(one))
        furthest = max(row["furthest_outside"] for row in found)
        rows.append((
            name, f"{sum(row['outside'] for row in found)} of {count_all}", f"{furthest:.1e}" if furthest else "-",
        ))  # fmt: skip
    return table(("attack", "points outside", "furthest"), rows)


def suspicious(run: Run) -> str:
    """What `evaluate` marks, and what is known of the marked and of the others."""
    rows = []
    for one in run["networks"]:
        found = one["suspicious"]
        marked, resist = unpacked(found["verdicts"]), unpacked(found["resist"])
        robust, broken = unpacked(one["exact"]["verdicts"]), [not verdict for verdict in left(one)]
        broken = [True] * len(broken) if one["proven"] == "broken" else broken
        reasons = ", ".join(f"{reason} {number}" for reason, number in found["by_reason"].items() if number)
        chosen = [mark and stays for mark, stays in zip(marked, resist, strict=True)]
        others = [stays and not mark for mark, stays in zip(marked, resist, strict=True)]
        rows.append((
            one["name"], str(sum(resist)), f"{sum(chosen)}", f"{100 * found['rate']:.1f}", reasons or "none",
            *(str(sum(a and b for a, b in zip(which, truth, strict=True)))
              for which in (chosen, others) for truth in (robust, broken)),
        ))  # fmt: skip
    sums = [sum(int(row[column]) for row in rows) for column in (1, 2, 5, 6, 7, 8)]
    share = f"{100 * sums[1] / max(1, sums[0]):.1f}"
    rows.append(("all networks", str(sums[0]), str(sums[1]), share, "", *map(str, sums[2:])))
    head = (
        "network", "resist", "of these suspicious", "rate, %", "reasons", "suspicious, proved robust",
        "suspicious, breakable", "not suspicious, proved robust", "not suspicious, breakable",
    )  # fmt: skip
    return table(head, rows)


def checks(run: Run) -> str:
    """What the sanity checks say."""
    rows = []
    for one in run["networks"]:
        ran = [check for check in one["checks"] if check["applies"]]
        failed = [f"`{check['name']}`: {check['found']}" for check in ran if not check["passed"]]
        warnings = rows_of(one)[STANDARD]["warnings"]
        rows.append((
            one["name"], f"{sum(check['passed'] for check in ran)} of {len(ran)}", "; ".join(failed) or "-",
            " ".join(warnings) or "-",
        ))  # fmt: skip
    return table(("network", "checks passed", "failed", "warnings of AutoAttack"), rows)


def findings(run: Run) -> str:
    """What follows, counted."""
    ours = [(one, name, row) for one in run["networks"] for name, row in rows_of(one).items()]
    proved = sum(one["exact"]["robust"] for one in run["networks"])
    points = sum(one["clean"] for one, _, _ in ours)
    inside = sum(row["outside"] for _, _, row in ours if row["library"] == HERE)
    attacks_run = len({name for _, name, _ in ours})
    beaten = (
        f"{points:,} points of {attacks_run} attacks on {len(run['networks'])} networks: none breaks one of the "
        f"{proved} samples that are proved to be robust, and none lies below a bound."
    )
    said = [beaten, f"Points of the library outside ball or box: {inside}."]
    both = [one for one in run["networks"] if OFFICIAL in rows_of(one)]
    if both:
        apart = [against(one, STANDARD) for one in both]
        more, fewer = (sum(numbers) for numbers in zip(*apart, strict=True))
        images = sum(one["images"] for one in both)
        said.append(
            f"Native and official AutoAttack differ on {more + fewer} of {images:,} images: {more} are broken by the "
            f"native one alone, {fewer} by the official one alone."
        )
    for one in run["networks"]:
        robust, open_ = (unpacked(one["exact"][name]) for name in ("verdicts", "not_excluded"))
        if one["proven"] == "broken":
            broken = {name: one["images"] - sum(held(one, name)) for name in rows_of(one)}
            best = ", ".join(
                f"{broken[name]} by {'the ' if name == OFFICIAL else ''}{name}"
                for name in (STANDARD, OFFICIAL, THOROUGH) if name in broken
            )  # fmt: skip
            said.append(f"{one['name']}: all {one['images']} have an adversarial input; {best}.")
        elif sum(open_) - sum(robust) <= 0.01 * one["images"]:
            missed = sum(a and not b for a, b in zip(held(one, STANDARD), open_, strict=True))
            left = sum(open_) - sum(robust)
            said.append(
                f"{one['name']}: {f'all but {left}' if left else 'all'} of {one['images']:,} images are decided. Of "
                f"those that have an adversarial input, native AutoAttack misses {missed or 'none'}."
            )
    return "\n".join(f"- {sentence}" for sentence in said)


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    "networks_exact": (STEM, exact),
    "networks_programs": (STEM, programs),
    "networks_attacks": (STEM, attacks),
    "networks_costs": (STEM, costs),
    "networks_agreement": (STEM, agreement),
    "networks_outside": (STEM, outside),
    "networks_suspicious": (STEM, suspicious),
    "networks_checks": (STEM, checks),
    "networks_findings": (STEM, findings),
}


def made(run: Run) -> str:
    """What made the numbers."""
    hardware, versions = run["hardware"], run["versions"]
    peers = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("python", HERE))
    commits = dict.fromkeys(f"`{(one.get('commit') or 'unknown')[:7]}`" for one in run["networks"])
    return (
        f"One run of each, seed {run['seed']}: `{run['command']}`; {hardware['cpu']}, {hardware['threads']} thread; "
        f"{peers}; commit {', '.join(commits)}."
    )
