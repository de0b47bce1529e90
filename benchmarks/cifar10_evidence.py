"""Do the methods help? Eighteen ways of training on CIFAR-10 with their controls, two regimes, three seeds or more.

    python benchmarks/cifar10_evidence.py run --root FOLDER --work WORK          # everything, in the declared order
    python benchmarks/cifar10_evidence.py run ... --only small/raat/0            # one run
    python benchmarks/cifar10_evidence.py list --work WORK                       # what is done, running, to come
    python benchmarks/cifar10_evidence.py export all/raat/0 raat --work WORK     # a run's network into the package

FOLDER holds `train/CLASS/*` and `test/CLASS/*`; `--exact` names an .npz file with more test images. The arms and their
order stand in `evidence/design.py`, what was expected of them in `evidence/hypotheses.py`. Several processes may share
WORK (states, weights, claims) and the record: each takes the next run that nobody has. A killed run goes on after its
last epoch, with the same numbers.
AutoAttack follows when all runs of a block are trained; with `--only` and one run, as soon as that is.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from evidence import books, exporting, measuring, training
from evidence.design import CORE, QUICK, SEEDS, Design, Job, order, sweep
from evidence.images import decoded, split
from record import ROOT, provenance

from perceptual_at.checkpoints import read_weights, save_weights
from perceptual_at.models.trained_networks import FOLDER

RECORD = ROOT / "docs" / "results" / "cifar10_evidence.json"
WHICH = ("best", "final")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where things are."""

    work: Path
    record: Path
    cache: Path
    exact: Path | None
    design: Design
    device: str

    def folder(self, job: Job) -> Path:
        """Of a run."""
        return self.work / "runs" / str(job).replace("/", "-")

    def change(self, how: Callable[[dict[str, Any]], None]) -> None:
        """Change the record."""
        books.change(self.record, self.work / "record.lock", how)

    def put(self, job: Job, **found: Any) -> None:
        """Add to a run's entry."""
        self.change(lambda record: books.put(record, job, **found))

    def entry(self, job: Job) -> books.Entry:
        """A run's entry, empty if there is none."""
        return books.entry_of(books.read(self.record), job) or {}


def train(place: Place, job: Job) -> None:
    """A run, from its last state to its entry in the record."""
    folder = place.folder(job)
    commit = provenance()["commit"]
    before = place.entry(job).get("commits", [])
    place.put(
        job, status="started", command=command(place.design, job), commits=list(dict.fromkeys([*before, commit])),
        **{name: found for name, found in provenance(place.device).items() if name != "commit"},
    )  # fmt: skip
    images = split(place.cache, place.exact, place.design, job.regime)
    run = training.begin(job, place.design, images, place.device, folder / "state.pt")
    while run.epoch < run.epochs:
        training.train_epoch(run)
        measuring.select(run)
        training.save(run, folder / "state.pt")
        say(job, f"epoch {run.epoch}/{run.epochs}", run.log[-1], run.seconds)
    began = time.perf_counter()
    networks = {"best": (run.best, run.best_epoch), "final": (run.judged.state_dict(), run.epoch)}
    found: dict[str, Any] = {}
    for which, (weights, epoch) in networks.items():
        checksum = save_weights(folder / f"{which}.safetensors", weights)
        if which == "final" and epoch == run.best_epoch:
            found[which] = {"epoch": epoch, "weights": checksum, "same_as": "best"}
        else:
            model = loaded(place.design, weights).to(place.device)
            found[which] = {"epoch": epoch, "weights": checksum,
                            **measuring.report(model, images, place.design, place.device)}  # fmt: skip
    seconds = {**run.seconds, "measuring": time.perf_counter() - began}
    place.put(
        job, status="finished", seconds={name: round(spent) for name, spent in seconds.items()},
        images=len(images.train), log=run.log, **found,
    )  # fmt: skip
    say(job, "finished", {name: found["best"]["test"][name] for name in ("clean", "pgd20", "margin30")})


def attack(place: Place, job: Job) -> None:
    """AutoAttack on the networks of a run."""
    entry, folder = place.entry(job), place.folder(job)
    test = split(place.cache, None, place.design, job.regime).test
    for which in WHICH:
        if "same_as" in entry[which] or "autoattack" in entry[which]:
            continue
        began = time.perf_counter()
        model = loaded(place.design, read_weights(folder / f"{which}.safetensors")).to(place.device)
        record = str(folder / f"autoattack-{which}.jsonl")
        found = measuring.strong(model, test, place.design, place.device, record)
        found["seconds"] = round(time.perf_counter() - began)
        place.change(
            lambda record, which=which, found=found: books.entry_of(record, job)[which].update(autoattack=found)
        )
        say(job, f"AutoAttack, {which}", {name: found[name] for name in ("clean", "autoattack")})


def loaded(design: Design, weights: dict[str, Any]) -> torch.nn.Module:
    """A network with these weights, in eval mode."""
    model = training.network(design)
    model.load_state_dict(weights)
    return model.eval()


def trained(entry: books.Entry) -> bool:
    """Whether a run has its measurements."""
    return entry.get("status") == "finished"


def attacked(entry: books.Entry) -> bool:
    """Whether it has AutoAttack too."""
    return trained(entry) and all("same_as" in entry[which] or "autoattack" in entry[which] for which in WHICH)


def has_networks(place: Place, job: Job) -> bool:
    """Whether its networks are in WORK."""
    return (place.folder(job) / "best.safetensors").exists()


def steps(seeds: int) -> Iterator[tuple[str, Job]]:
    """All pieces of work in order: a block's runs, then AutoAttack on them; the sweep behind the core arms."""
    blocks = list(order(seeds))
    behind = sum(block[0].arm in CORE for block in blocks)
    for number, block in enumerate(blocks):
        if number == behind:
            yield from (("train", job) for job in sweep())
        yield from (("train", job) for job in block)
        yield from (("attack", job) for job in block)


def work_off(place: Place, chosen: Callable[[Job], bool], seeds: int) -> None:
    """Take the next piece of work that nobody has, until there is none."""
    do: dict[str, Callable[[Place, Job], None]] = {"train": train, "attack": attack}
    is_done = {"train": trained, "attack": attacked}

    def once() -> bool:
        record = books.read(place.record)
        for kind, job in steps(seeds):
            entry = books.entry_of(record, job) or {}
            ready = kind == "train" or (trained(entry) and has_networks(place, job))
            if not chosen(job) or is_done[kind](entry) or not ready:
                continue
            with books.claimed(place.folder(job) / "claim") as mine:
                if mine and not is_done[kind](place.entry(job)):
                    do[kind](place, job)
                    return True
        return False

    while once():
        pass


def command(design: Design, job: Job) -> str:
    """What makes a run again."""
    defaults = dataclasses.asdict(Design())
    changed = [f"--set {name}={value}" for name, value in dataclasses.asdict(design).items() if value != defaults[name]]
    return " ".join(["python benchmarks/cifar10_evidence.py run --root FOLDER --exact NPZ --work WORK", *changed,
                     f"--only {job}"])  # fmt: skip


def say(job: Job, *words: Any) -> None:
    """A line for whoever watches."""
    print(time.strftime("%H:%M:%S"), job, *words, flush=True)


def listing(place: Place, seeds: int) -> str:
    """State of every run."""
    lines = []
    for block in (*order(seeds), sweep()):
        for job in block:
            entry = place.entry(job)
            state = place.folder(job) / "state.pt"
            epoch = torch.load(state, weights_only=True)["epoch"] if state.exists() else 0
            said = "with AutoAttack" if attacked(entry) else entry.get("status", "to come")
            if said == "finished" and not has_networks(place, job):
                said += ", its networks are not in WORK: no AutoAttack without them"
            lines.append(f"{job!s:32} {said}" + (f", epoch {epoch}" if said == "started" else ""))
    return "\n".join(lines)


def export_run(place: Place, run: str | None, name: str | None) -> None:
    """Put the best network of a run into the package."""
    jobs = {str(job): job for block in order(100) for job in block}
    if run not in jobs or name is None:
        raise SystemExit("export needs a run, such as all/raat/0, and a name for its network.")
    entry, weights = place.entry(jobs[run]), place.folder(jobs[run]) / "best.safetensors"
    if not trained(entry) or not weights.exists():
        raise SystemExit(f"{run} is not finished, or its weights are not in `{place.work}`.")
    print(exporting.export(entry, weights, name, place.design, FOLDER))


def design_of(options: argparse.Namespace) -> Design:
    """The declared design, or another one that the options make of it."""
    design = QUICK if options.quick else Design()
    for setting in options.set:
        name, _, value = setting.partition("=")
        if name not in Design.__dataclass_fields__:
            raise SystemExit(
                f"--set: there is no setting {name!r}; there are {', '.join(Design.__dataclass_fields__)}."
            )
        design = dataclasses.replace(design, **{name: type(getattr(design, name))(value)})
    return design


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("run", "list", "export"))
    parser.add_argument("run", nargs="?", help="the run to export: REGIME/ARM/SEED")
    parser.add_argument("name", nargs="?", help="what to call its network")
    parser.add_argument("--root", type=Path, help="folder of the images")
    parser.add_argument("--exact", type=Path, help="more test images, an .npz file")
    parser.add_argument("--work", type=Path, required=True, help="folder of states, weights and claims")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--only", action="append", help="the beginning of the runs to make: small, all/raat, all/raat/0"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the design"
    )
    parser.add_argument("--quick", action="store_true", help="a miniature that only shows that the script runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    design = design_of(options)
    place = Place(options.work, options.record, options.work / "images.npz", options.exact, design, options.device)
    if options.do == "list":
        print(listing(place, options.seeds))
        return
    if options.do == "export":
        export_run(place, options.run, options.name)
        return
    if options.root is None and not place.cache.exists():
        raise SystemExit("--root is needed: the folder that holds train/CLASS and test/CLASS.")
    with books.locked(options.work / "images.lock"):
        decoded(options.root, place.cache)
    agree(place)
    chosen = tuple(f"{part}/".replace("//", "/") for part in options.only or [""])
    work_off(place, lambda job: options.only is None or f"{job}/".startswith(chosen), options.seeds)


def agree(place: Place) -> None:
    """Refuse a record of another design."""
    settings = dataclasses.asdict(place.design)
    held = books.read(place.record).get("design", settings)
    if held != settings:
        other = {name: value for name, value in held.items() if settings.get(name) != value}
        raise SystemExit(f"`{place.record}` holds runs of another design ({other}); give another --record.")
    place.change(lambda record: record.setdefault("design", settings))


if __name__ == "__main__":
    main()
