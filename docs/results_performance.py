"""The tables of docs/performance.md, from what `benchmarks/` recorded."""

from collections.abc import Callable
from typing import Any

from results_table import GAP, number, table

Run = dict[str, Any]
MINIATURE = "*Measured in miniature only, on a CPU: no GPU was at hand.*"


def attack_passes(run: Run) -> str:
    """One attack in units of its passes."""
    parts = []
    for one in run["tables"]:
        rows = []
        for row in one["rows"]:
            if row["missing"]:
                rows.append((row["name"], row["missing"], "-", "-", "-", "-"))
                continue
            same = "-" if row["same_entries"] is None else f"{100 * row['same_entries']:.2f}"
            rows.append((
                row["name"], counted(row["passes"]), number(1e3 * row["wall_s"]["median"] / one["batch"]),
                ratio(row["ratio_wall"]), ratio(row["ratio_cpu"]), same,
            ))  # fmt: skip
        head = ("attack", "F / Bx / Bp", "ms per image", "time", "CPU time", "same entries, %")
        parts.append(f"{one['network']}, width {one['width']}, batch {one['batch']}:\n\n{table(head, rows)}")
    return "\n\n".join([*parts, made(run)])


def training_steps(run: Run) -> str:
    """One training step of every objective, as a share of the release's."""
    ways = list(dict.fromkeys(way for row in run["rows"] for way in row["ways"] if way != "release"))
    rows = []
    for row in run["rows"]:
        own = row["reference"] != "release"
        theirs, plain = row["ways"].get("release"), row["ways"]["plain"]
        rows.append((
            row["name"], "-" if own else counted(theirs["passes"]), counted(plain["passes"]),
            f"{row['ways'][row['reference']]['wall_s']['median']:.2f}",
            *(ratio(row["ways"][way]["ratio_wall"]) if way in row["ways"] else "-" for way in ways),
        ))  # fmt: skip
    settings = run["settings"]
    head = ("objective", "release: F / Bx / Bp", "here", "s of the reference", *ways)
    what = f"{settings['network']}, width {settings['width']}, batch {settings['batch']} (views together)."
    return f"{table(head, rows)}\n\n{what} {made(run)}"


def costs(run: Run) -> str:
    """One training step of every objective in units of PGD-AT's."""
    rows = []
    unit = run["rows"][0]["ways"]["plain"]["wall_s"]["median"]
    for row in run["rows"]:
        ways = row["ways"]
        lanes = [way for way in ways if way.startswith("bf16")]
        rows.append((
            row["name"], counted(ways["plain"]["passes"]), f"{ways['plain']['wall_s']['median'] / unit:.2f}",
            *(f"{ways[way]['wall_s']['median'] / unit:.2f}" for way in lanes[:1]),
        ))  # fmt: skip
    head = ("objective", "passes F / Bx / Bp", "time of PGD-AT", "in a bfloat16 lane")
    return f"{table(head, rows)}\n\n{made(run)}"


def training_memory(run: Run) -> str:
    """What attack and training passes hold at their worst."""
    rows = [
        (way, *(f"{held[part] / 2**20:.0f}" for part in ("attack", "training")))
        for way, held in run["memory_bytes"].items()
    ]
    return table(("", "attack, MiB", "training passes, MiB"), rows)


def autoattack_time(run: Run) -> str:
    """AutoAttack beside the official code."""
    parts = []
    for one in run["tables"]:
        rows = [
            (
                row["name"], f"{row['robust']}", f"{100 * row['same_verdicts']:.1f}", number(row["wall_s"]["median"]),
                ratio(row["ratio_wall"]), ratio(row["ratio_cpu"]),
            )
            for row in one["rows"]
        ]  # fmt: skip
        head = ("", "robust", "same verdicts, %", "s", "time", "CPU time")
        missing = "".join(f" {name} is not installed." for name in one["missing"])
        parts.append(
            f"{one['victim']}, `{one['threat']}`, {one['images']} images of which {one['clean']} are right without "
            f"attack, {budget(one)}:{missing}\n\n{table(head, rows)}"
        )
    return "\n\n".join([*parts, made(run)])


def autoattack_shares(run: Run) -> str:
    """Where AutoAttack's time goes."""
    parts = []
    for one in run["tables"]:
        names = [name for name, _ in one["attacks"]]
        rows = []
        for row in one["rows"]:
            total = sum(part["seconds"] for part in row["attacks"].values())
            inside = sum(part["seconds"] * part["model_share"] for part in row["attacks"].values())
            cells = [row["attacks"].get(name) for name in names]
            rows.append((
                row["name"], *(share(cell["seconds"] / total, cell["model_share"]) if cell else "-" for cell in cells),
                f"{100 * inside / total:.0f}",
            ))  # fmt: skip
        parts.append(f"{one['victim']}:\n\n{table(('', *names, 'model, %'), rows)}")
    return "\n\n".join(parts)


def evaluation_time(run: Run) -> str:
    """PGD-20 of an evaluation."""
    parts = []
    for one in run["tables"]:
        rows = [
            (
                row["name"], f"{100 * row['same_flags']:.1f}", number(row["wall_s"]["median"]),
                ratio(row["ratio_wall"]), ratio(row["ratio_cpu"]),
            )
            for row in one["rows"]
        ]  # fmt: skip
        head = ("", "same flags, %", "s", "time", "CPU time")
        what = f"{one['victim']}, `{one['threat']}`, {one['images']} images of which {one['robust']} are robust"
        parts.append(f"{what}:\n\n{table(head, rows)}")
    return "\n\n".join([*parts, made(run)])


def scaling(run: Run) -> str:
    """Slopes of the curves."""
    rows = []
    for curve in run["curves"]:
        name, ends = curve["name"], (curve["rows"][0], curve["rows"][-1])
        times, sizes = (
            [f"{read(row) / row['images']:.3g}" for row in ends]
            for read in (lambda row: 1e3 * row["wall_s"]["median"], lambda row: row["peak_bytes"] / 2**20)
        )
        rows.append((
            name, curve["lane"], f"{ends[0][name]} to {ends[1][name]}", " to ".join(times),
            f"{curve['time']['slope']:.2f}", f"{curve['time']['last_slope']:.2f}", f"{curve['time']['r2']:.3f}",
            " to ".join(sizes), f"{curve['memory']['slope']:.2f}", f"{curve['memory']['last_slope']:.2f}",
        ))  # fmt: skip
    head = (
        "", "attack", "from, to", "ms per image", "slope of the time", "at the end", "R²", "MiB per image",
        "slope of the memory", "at the end",
    )  # fmt: skip
    return f"{table(head, rows)}\n\n{made(run)}"


def gpu_training(run: Run) -> str:
    """Images per second on a GPU; a miniature on a CPU says nothing of one, so it shows no times."""
    if run["settings"]["miniature"]:
        return MINIATURE
    parts = []
    for one in run["tables"]:
        rows = [
            (row["name"], row["missing"], "-", "-", "-") if row.get("missing") else
            (
                row["name"], f"{row['images_per_s']:.0f}", ratio(row["ratio_wall"]),
                f"{100 * row['share_of_bound']:.0f}", f"{row['peak_bytes'] / 2**30:.1f}",
            )
            for row in one["rows"]
        ]  # fmt: skip
        head = ("", "images/s", "time", "of the bound, %", "GiB")
        bound = f"{one['gflop_per_image']:.4g} GFLOP per image bound it to {one['bound_images_per_s']:.0f} images/s"
        parts.append(f"{one['network']}, batch {one['batch']}; {bound}:\n\n{table(head, rows)}")
    return "\n\n".join([*parts, made(run)])


def gpu_work(run: Run) -> str:
    """Arithmetic of an image, which needs no GPU to count."""
    rows = [(name, f"{work:.4g}") for name, work in run["gflop_per_image"].items()]
    return table(("network", "GFLOP per image"), rows)


def lane_accuracy(run: Run) -> str:
    """PGD-20 accuracy in the lanes, and of models trained in them."""
    plain = [one["plain"]["robust"] for one in run["attacked"]]
    rows = [
        (
            name, f"{sum(one[name]['robust'] for one in run['attacked']) / len(plain):.2f}", f"{found['mean']:+.2f}",
            ", ".join(f"{gap:+.2f}" for gap in found["each"]),
            *(f"{sum(one[name][what] for one in run['attacked']) / len(plain):.2f}" for what in ("flips", "signs")),
        )
        for name, found in run["differences"].items()
    ]  # fmt: skip
    first = ("plain", f"{sum(plain) / len(plain):.2f}", "-", "-", "-", "-")
    head = ("attacked in", "PGD-20, %", "difference", "seed by seed", "other verdicts, %", "other signs, %")
    said = "\n".join(f"- {sentence}" for sentence in run["verdicts"])
    training = run["training"]
    gaps = ", ".join(f"{gap:+.2f}" for gap in training["each"])
    what = (
        f"{run['data']}, {run['images']['test']} test images, {run['threat']}, {run['seeds']} seeds, "
        f"{run['epochs']} epochs: `{run['command']}`."
    )
    trained = f"- Trained in the bf16 lane, PGD-20 accuracy differs by {training['pgd20']:+.2f} points ({gaps})."
    return f"{table(head, [first, *rows])}\n\n{trained}\n{said}\n\n{what}"


def compiled_pgd(run: Run) -> str:
    """One attack, compiled in several ways."""
    settings = run["settings"]
    what = (
        f"`{settings['network']}` of width {settings['width']}, {settings['batch']} images, {settings['threat']}, "
        f"{settings['steps']} steps."
    )
    return f"{compiled(run['ways'])}\n\n{what} {made(run)}"


def compiled_pgd_starts(run: Run) -> str:
    """The same from many starts."""
    settings = run["settings"]
    what = f"{settings['starts']} starts of {settings['images']} images, without batch norm (folded by a lane)."
    return f"{compiled(run['starts'])}\n\n{what}"


def compiled(rows: dict[str, Run]) -> str:
    """Seconds to start and per call, and how many entries of the result differ from the first way's."""
    return table(
        ("", "first call, s", "s", "time", "CPU time", "entries that differ, %"),
        [
            (
                name, number(row["first_call_s"]), number(row["wall_s"]["median"]), ratio(row["ratio_wall"]),
                ratio(row["ratio_cpu"]), number(100 * row["entries_that_differ"]),
            )
            for name, row in rows.items()
        ],
    )  # fmt: skip


def hard_samples(run: Run) -> str:
    """What each attack breaks of samples that are known to be breakable."""
    rows = [
        (row["name"], f"{row['broken']} of {run['settings']['images']}", f"{row['gradients']:,.0f}",
         f"{row['forwards'] - row['gradients']:,.0f}", f"{row['cpu_s']:.0f}")
        for row in run["rows"]
    ]  # fmt: skip
    head = ("attack", "broken", "gradients per sample", "other forward passes", "CPU seconds")
    hardware, commit = run["hardware"], run["commit"]
    return (
        f"{table(head, rows)}\n\nOne run, seed {run['seed']}: `{run['command']}`; {hardware['cpu']}, "
        f"{hardware['threads']} thread(s), torch {run['versions']['torch']}, commit `{commit[:7]}`."
    )


TABLES: dict[str, tuple[str, Callable[[Run], str]]] = {
    "attack_passes": ("attack_passes", attack_passes),
    "training_steps": ("training_steps", training_steps),
    "costs": ("training_steps", costs),
    "training_steps_wide": ("training_steps_wide", training_steps),
    "training_memory": ("training_steps", training_memory),
    "autoattack_time": ("autoattack_time", autoattack_time),
    "autoattack_shares": ("autoattack_time", autoattack_shares),
    "evaluation_time": ("evaluation_time", evaluation_time),
    "scaling": ("scaling", scaling),
    "gpu_training": ("gpu_training", gpu_training),
    "gpu_work": ("gpu_training", gpu_work),
    "lane_accuracy": ("lane_accuracy", lane_accuracy),
    "compiled_pgd": ("compiled_pgd", compiled_pgd),
    "compiled_pgd_starts": ("compiled_pgd", compiled_pgd_starts),
    "hard_samples": ("hard_samples", hard_samples),
}


def made(run: Run) -> str:
    """What made the numbers."""
    hardware, commit = run["hardware"], run["commit"]
    device = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    threads = f", {hardware['threads']} threads" if hardware["device"] == "cpu" else ""
    return (
        f"Medians of {run['rounds']} rounds, quartiles in brackets: `{run['command']}`; {device}{threads}, torch "
        f"{run['versions']['torch']}" + (f", commit `{commit[:7]}`." if commit else ".")
    )


def ratio(found: dict[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"{found['median']:.2f}{GAP}({found['q1']:.2f}-{found['q3']:.2f})"


def counted(passes: list[float] | None) -> str:
    """Passes F / Bx / Bp."""
    return "-" if passes is None else f"{GAP}/{GAP}".join(f"{count:.4g}" for count in passes)


def share(part: float, inside: float) -> str:
    """Share of the whole time, and how much of it passes in the model."""
    return f"{100 * part:.0f}{GAP}%{GAP}({100 * inside:.0f}{GAP}%)"


def budget(one: Run) -> str:
    """How much of AutoAttack was run."""
    if one["share"] == 1:
        return "published budgets"
    options = dict(one["attacks"])
    targeted, square = options["apgd-t"], options["square"]
    return f"{targeted['steps']} steps, {targeted['target_classes']} targets, {square['queries']} queries"
