"""How far from exact: every attack on networks that others trained, against certificates, sample by sample.

    python benchmarks/real_networks.py FOLDER --threads 1 --out docs/results/real_networks.json

FOLDER holds published weights and images; `networks.py` says which it knows and how to define more, in a file
`networks.json` there or given as `--definitions`. What is missing is named and left out. On the images that a network
gets right run every attack of the library, the official AutoAttack, and the attacks of other libraries that are
installed. A linear relaxation certifies samples, and mixed-integer programming decides those that are neither certified
nor broken, where few enough ReLUs are open and time allows. An attack that breaks what is proved to be robust ends the
run.

The record is written after each network, and one that is on it already is not run again.
"""

import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from certificates import ALLOWANCE, Bounds, Steps, bounds_of, box, lowest_margins, steps_of
from contenders import HERE, STANDARD, Case, Counted, attacks
from evidence.books import packed
from exact import decide, matrices_of, open_relus
from networks import Definition, Network, built, definitions, images_of, loaded, weights_of
from record import begin, commit, parser, save
from torch import Tensor, nn

from perceptual_at import Linf, auto_attack, evaluate, pgd, sanity_checks
from perceptual_at.attacks import margin
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.checkpoints import read_weights, save_weights, weights_checksum

CHECKED = 150
"""How many samples the sanity checks see."""
CROSSED = 5
"""How many samples that attacks broke the programs are asked about too: none may be called robust."""
QUICK: dict[str, Definition] = {
    "tiny": {"layers": ["flatten", "linear 16 8", "relu", "linear 8 4"], "images": "tiny.npz", "eps": 0.1},
    "residual": {
        "layers": ["normalize 1", ["conv 1 2 2 2", "block 2 3 1", "flatten", "linear 12 4"]], "eps": "8/255",
        "images": "residual.npz",
    },
}  # fmt: skip


class Proof(NamedTuple):
    """What the relaxation says of the samples."""

    steps: Steps
    bounds: list[Bounds]
    lowest: Tensor
    """Lower bounds of the differences to the label's logit, `(n, K)`."""
    by_intervals: Tensor
    """Samples that bounds without relaxation certify."""
    seconds: float

    @property
    def certified(self) -> Tensor:
        """Samples that no point of the box breaks."""
        return (self.lowest > ALLOWANCE).all(dim=1)


# The attacks ------------------------------------------------------------------------------------------------------


def run(
    case: Case, name: str, library: str, attack: Callable[[], Any] | str, counted: Counted
) -> tuple[dict[str, Any], Any]:
    """One row, what an attack broke, at which cost, and whether it stayed in the ball; and what it returned."""
    row: dict[str, Any] = {"name": name, "library": library}
    counted.gradients = counted.others = 0
    torch.manual_seed(case.seed)
    began = time.process_time()
    try:
        found = "not installed" if isinstance(attack, str) else attack()
    except ImportError:
        found = "not installed"
    except Exception as error:  # what others' code cannot do is a row of the table
        if library == HERE:
            raise
        found = f"ended with {type(error).__name__}: {error}"
    if isinstance(found, str):
        return row | {"missing": found}, None
    spent, points = time.process_time() - began, points_of(found)
    robust = ~broken_at(case, points)
    outside = distance_outside(points, case.x, case.network.eps)
    return row | {
        "missing": None, "robust": int(robust.sum()), "verdicts": case.verdicts(robust), "cpu_s": round(spent, 2),
        "gradients": counted.gradients, "forwards": counted.others, "outside": int((outside > 0).sum()),
        "furthest_outside": abs(float(outside.max())), "warnings": list(getattr(found, "warnings", ())),
    }, found  # fmt: skip


def points_of(found: Tensor | Verdict) -> Tensor:
    """The adversarial inputs."""
    return (found.x_adv if isinstance(found, Verdict) else found).detach()


def broken_at(case: Case, points: Tensor) -> Tensor:
    """Which samples the network takes for another class at these points; judged alike for every attack."""
    return case.network.model(points).argmax(dim=1) != case.labels


def distance_outside(points: Tensor, x: Tensor, eps: float) -> Tensor:
    """How far each point lies outside ball or box, in double precision, where single numbers are exact; 0 inside."""
    point, center = points.double(), x.double()
    beyond = torch.stack([(point - center).abs() - eps, -point, point - 1]).amax(dim=0)
    return beyond.flatten(1).amax(dim=1).clamp_min(0)


# The proofs -------------------------------------------------------------------------------------------------------


def proved(case: Case) -> Proof:
    """The relaxation of every sample."""
    began = time.process_time()
    steps, bounds, lowest, by_intervals = steps_of(case.network.model), [], [], []
    for image, label in zip(case.x, case.labels.tolist(), strict=True):
        corners = box(image, case.network.eps)
        intervals = bounds_of(steps, *corners, relaxed=False)
        low, high = intervals[-1]
        by_intervals.append(bool((low[label] > high + ALLOWANCE).sum() == len(high) - 1))
        bounds.append(bounds_of(steps, *corners))
        lowest.append(lowest_margins(steps, bounds[-1], label))
    return Proof(steps, bounds, torch.stack(lowest), torch.tensor(by_intervals), round(time.process_time() - began, 1))


def check_points(case: Case, proof: Proof, name: str, points: Tensor) -> None:
    """No point inside the box is below a bound, and none breaks a certified sample; else the run ends here."""
    network = case.network
    logits = network.model.double()(points.double())
    network.model.float()
    reached = logits.gather(1, case.labels[:, None]) - logits
    low, high = (torch.stack([bounds[0][side] for bounds in proof.bounds]) for side in (0, 1))
    inside = ((points >= low) & (points <= high)).flatten(1).all(dim=1)
    others = torch.ones_like(reached, dtype=torch.bool).scatter(1, case.labels[:, None], False)
    # Bound and logits are sums in double precision, in another order.
    below = ((reached < proof.lowest - 1e-9 * (1 + reached.abs())) & others).any(dim=1)
    wrong = inside & (below | (broken_at(case, points) & proof.certified))
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        raise SystemExit(
            f"{network.name}: {name} beats a certificate on sample {sample} of those that are right: margin "
            f"{float(reached[sample][others[sample]].min()):.6g} where at least "
            f"{float(proof.lowest[sample].min()):.6g} was proved. Either is wrong."
        )


def decided(case: Case, proof: Proof, broken: Tensor, *, seconds: float, most_open: int) -> dict[str, Any]:
    """What is exact: verdicts by programming where neither certificates nor attacks decide, and a cross-check."""
    began, matrices = time.process_time(), matrices_of(proof.steps, case.x.shape[1:])
    opened = torch.tensor([open_relus(proof.steps, bounds) for bounds in proof.bounds])
    small = opened <= most_open

    def ask(sample: int) -> str:
        project = functools.partial(case.threat.project, x=case.x[sample][None])
        return decide(
            case.network.model, proof.steps, matrices, proof.bounds[sample], int(case.labels[sample]),
            project=project, seconds=seconds,
        ).verdict  # fmt: skip

    crossed = (broken & small).nonzero().squeeze(1).tolist()[:CROSSED]
    if any(ask(sample) == "robust" for sample in crossed):
        raise SystemExit(f"{case.network.name}: programming calls a sample robust that an attack broke.")
    robust, found = proof.certified.clone(), torch.zeros_like(broken)
    asked = (~proof.certified & ~broken & small).nonzero().squeeze(1).tolist()
    for sample in asked:
        verdict = ask(sample)
        robust[sample], found[sample] = verdict == "robust", verdict == "broken"
    undecided = ~(robust | broken | found)
    return {
        "robust": int(robust.sum()), "undecided": int(undecided.sum()),
        "too_many_open": int((undecided & ~small).sum()), "asked": len(asked), "found_broken": int(found.sum()),
        "cross_checked": len(crossed), "open_relus": [int(opened.min()), int(opened.median()), int(opened.max())],
        "verdicts": case.verdicts(robust), "not_excluded": case.verdicts(robust | undecided), "seconds": seconds,
        "cpu_s": round(time.process_time() - began, 1),
    }  # fmt: skip


# What the library says of the network -----------------------------------------------------------------------------


def suspicions(case: Case, whole: Any) -> dict[str, Any]:
    """What `evaluate` calls suspicious after PGD on two losses and AutoAttack, which is not run a second time."""

    @functools.wraps(auto_attack)
    def again(model: nn.Module, x: Tensor, labels: Tensor, threat: Linf, **options: Any) -> Verdict:  # noqa: ARG001
        return whole

    steps = 3 if case.quick else 20
    given = {
        "PGD": functools.partial(pgd, threat=case.threat, steps=steps),
        "margin PGD": functools.partial(pgd, threat=case.threat, steps=steps, loss=margin),
        "AutoAttack": functools.partial(again, threat=case.threat),
    }
    result = evaluate(case.network.model, [(case.x, case.labels)], given, seed=case.seed, progress=False)
    marked = torch.stack(list(result.suspicious.values())).any(dim=0)
    return {
        "rate": result.suspicion_rate, "resist": case.verdicts(result.verdicts("worst_case")),
        "by_reason": {reason: int(mask.sum()) for reason, mask in result.suspicious.items()},
        "verdicts": case.verdicts(marked),
    }  # fmt: skip


def checks(case: Case) -> list[dict[str, Any]]:
    """The sanity checks on the first samples."""
    options = {"steps": 2, "queries": 5} if case.quick else {}
    found = sanity_checks(
        case.network.model, case.x[:CHECKED], case.labels[:CHECKED], case.threat, seed=case.seed, **options
    )
    return [{"name": one.name, "passed": one.passed, "applies": one.applies, "found": one.found} for one in found]


# The run ----------------------------------------------------------------------------------------------------------


def measured(network: Network, chosen: Any, seconds: float) -> dict[str, Any]:
    """Everything about one network."""
    began, right = time.process_time(), network.model(network.x).argmax(dim=1) == network.labels
    if not bool(right.any()):
        raise SystemExit(f"{network.name}: gets none of {len(right)} images right; definition or images do not fit.")
    case = Case(network, right, network.x[right], network.labels[right], chosen.seed, chosen.quick)
    counted, proof, rows = Counted(network.model).eval(), proved(case), []
    certified = int(proof.certified.sum())
    print(f"{network.name}: {len(case.x)} of {len(right)} right, {certified} certified, {proof.seconds} s", flush=True)
    broken, found = torch.zeros(len(case.x), dtype=torch.bool), {}
    for (library, name), attack in attacks(case, counted, found).items():
        row, found[name] = run(case, name, library, attack, counted)
        rows.append(row)
        print(f"  {name}: {row['missing'] or (row['robust'], row['cpu_s'], row['outside'])}", flush=True)
        if not row["missing"]:
            points = points_of(found[name])
            check_points(case, proof, name, points)
            broken |= broken_at(case, points) & (distance_outside(points, case.x, network.eps) == 0)
    programmed = decided(case, proof, broken, seconds=seconds, most_open=chosen.most_open)
    print(f"  exact: {programmed['robust']} robust, {programmed['undecided']} undecided", flush=True)
    if network.proven == "broken" and programmed["robust"]:
        raise SystemExit(f"{network.name}: {programmed['robust']} samples are certified that are known to break.")
    return {
        "images": len(right), "clean": len(case.x), "right": packed(right.tolist()), "rows": rows,
        "broken_by_any": int(broken.sum()),
        "relaxation": {
            "robust": certified, "verdicts": case.verdicts(proof.certified),
            "robust_by_intervals": int(proof.by_intervals.sum()), "cpu_s": proof.seconds,
        },
        "exact": programmed, "checks": checks(case), "suspicious": suspicions(case, found[STANDARD]),
        "cpu_s": round(time.process_time() - began),
    }  # fmt: skip


def miniature(folder: Path) -> None:
    """Networks with the weights they start from, and images that they get right."""
    x = torch.rand(6, 1, 4, 4)
    for name, definition in QUICK.items():
        model = built(definition["layers"]).eval()
        save_weights(weights_of(name, definition, folder), model)
        np.savez(folder / definition["images"], x=x.numpy(), y=model(x).argmax(dim=1).numpy())


def chosen_definitions(chosen: Any) -> dict[str, Definition]:
    """What to run: all whose weights and images are there."""
    known = QUICK if chosen.quick else definitions(chosen.folder, chosen.definitions)
    unknown = sorted(set(chosen.only or ()) - set(known))
    if unknown:
        raise SystemExit(f"real_networks: no definition of {', '.join(unknown)}; known are {', '.join(known)}.")
    wanted = {name: one for name, one in known.items() if not chosen.only or name in chosen.only}
    complete = {}
    for name, one in wanted.items():
        needed = weights_of(name, one, chosen.folder), images_of(one, chosen.folder)
        missing = [path.name for path in needed if not path.exists()]
        if missing:
            print(f"{name}: no {' and no '.join(missing)} in the folder, left out", flush=True)
        else:
            complete[name] = one
    return complete


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and record."""
    options = parser(__file__, __doc__ or "", rounds=1)
    options.add_argument("folder", type=Path, nargs="?", help="where weights and images lie")
    options.add_argument("--definitions", type=Path, help="a JSON file of further networks")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these networks only")
    options.add_argument("--images", type=int, help="of each network, at most")
    options.add_argument("--seconds", type=float, default=10.0, help="of programming for each sample")
    options.add_argument("--most-open", type=int, default=250, help="open ReLUs of a sample that is programmed")
    chosen = begin(options, arguments)
    if chosen.folder is None and not chosen.quick:
        options.error("FOLDER is needed, but for --quick")
    for path, word in ((chosen.definitions, "FILE"), (chosen.folder, "FOLDER")):  # where it was is nobody's business
        chosen.command = chosen.command.replace(str(path), word) if path else chosen.command
    with tempfile.TemporaryDirectory() as made:
        if chosen.quick:
            chosen.folder = Path(made)
            miniature(chosen.folder)
        run_all(chosen)


def run_all(chosen: Any) -> None:
    """All networks that are not on record yet, with the record written after each."""
    settings = {"seconds": chosen.seconds, "most_open": chosen.most_open, "allowance": ALLOWANCE, "checked": CHECKED}
    held = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    entries = {one["name"]: one for one in held.get("networks", ())}
    wanted = chosen_definitions(chosen)
    for name, definition in wanted.items():
        known = stamp(name, definition, chosen, settings)
        if entries.get(name, {}).get("stamp") == known:
            print(f"{name}: on record", flush=True)
            continue
        network = loaded(name, definition, chosen.folder, chosen.images)
        about = {
            "name": name, "stamp": known, "commit": commit(), "eps": str(definition["eps"]),
            "data": definition["images"],
        }  # fmt: skip
        found = measured(network, chosen, definition.get("seconds", chosen.seconds))
        entries[name] = {**about, "proven": network.proven, **found}
        save(chosen, settings, networks=list(entries.values()))


def stamp(name: str, definition: Definition, chosen: Any, settings: dict[str, Any]) -> str:
    """What decides an entry: definition, weights, images and options."""
    weights = weights_checksum(read_weights(weights_of(name, definition, chosen.folder)))
    text = json.dumps([definition, weights, chosen.seed, chosen.images, chosen.quick, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
