"""Native AutoAttack, plain and in the lanes, beside the official code: time of the whole, and where it goes.

    python benchmarks/autoattack_time.py --out docs/results/autoattack_time.json

Both run the standard version, on the large network with a part of the published steps, targets and queries, the same
part of each, so that the attacks keep their shares; `--full` runs all of it. The official code gets the model as people
give it: in eval mode, with parameters that require gradients. Before the timed rounds one more run, attack by attack,
clocks the model.
"""

import contextlib
import functools
import importlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cases import LANES
from record import begin, parser, save
from timing import compared, figures, interleaved, synchronize
from torch import Tensor, nn
from victims import Victim, resnet, small, untrained

from perceptual_at import Lane, SampleGenerator, auto_attack, frozen
from perceptual_at.attacks.protocol import Composition, composition_of

OFFICIAL = "pyautoattack"
MISSING = "not installed"


def composition(share: float) -> Composition:
    """The standard version with this share of its steps and queries, and of its targets' product with the steps."""
    published = composition_of("standard", "Linf", 10)
    if share == 1:
        return published
    parts = []
    for name, options in published:
        smaller = dict(options)
        if "queries" in options:
            smaller["queries"] = round(share * options["queries"])
        else:
            smaller["steps"] = max(10, round(share * options["steps"]))
        if "target_classes" in options:
            smaller["target_classes"] = max(1, round(share * 100 * options["target_classes"] / smaller["steps"]))
        parts.append((name, smaller))
    return tuple(parts)


def native(victim: Victim, parts: Composition, seed: int, lane: Lane | None) -> Tensor:
    """Adversarial inputs by our code."""
    numbers = SampleGenerator(seed, torch.arange(len(victim.x)))
    return auto_attack(
        victim.model, victim.x, victim.labels, victim.threat, version=parts, generator=numbers, lane=lane
    )


def official(victim: Victim, parts: Composition, seed: int) -> Tensor:
    """Adversarial inputs by the official code."""
    return _suite(victim.model, victim, parts, seed)(victim.x, victim.labels)


def _suite(model: nn.Module, victim: Victim, parts: Composition, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    library = importlib.import_module("pyautoattack")
    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    suite = library.AutoAttack(
        model, norm="Linf", eps=victim.threat.eps, version="standard", device=victim.x.device, seed=seed
    )
    suite.attacks_to_run = [name for name, _ in parts]
    runners = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}
    names = {"steps": "n_iter", "target_classes": "n_target_classes", "queries": "n_queries"}
    for name, options in parts:
        for option, there in names.items():
            if option in options:
                setattr(runners[name], there, options[option])

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = suite.run_standard_evaluation(x, labels, batch_size=len(x))
        return (found[0] if isinstance(found, tuple) else found).detach()

    return attack


class Clock(nn.Module):
    """A model that keeps the seconds spent in it, forward and backward."""

    def __init__(self, model: Callable[[Tensor], Tensor], device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device
        self.seconds = self.begun = 0.0

    def forward(self, x: Tensor) -> Tensor:
        inside = x.view_as(x)
        self.start()
        logits = self.model(inside)
        self.stop()
        if inside.requires_grad and logits.requires_grad:
            logits.register_hook(self.start)
            inside.register_hook(self.stop)
        return logits

    def start(self, _: object = None) -> None:
        synchronize(self.device)
        self.begun = time.perf_counter()

    def stop(self, _: object = None) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.begun


def shares(victim: Victim, parts: Composition, seed: int, lane: Lane | str | None) -> dict[str, dict[str, float]]:
    """Seconds of each attack on what is left by those before, and how many of them were spent in the model."""
    rows, remaining = {}, torch.arange(len(victim.x), device=victim.x.device)
    with borrowed(victim.model, lane) as model:
        model(victim.x[:1])  # which makes a lane's twin
        clock = Clock(model, victim.x.device)
        for part in parts:
            left = victim._replace(model=clock, x=victim.x[remaining], labels=victim.labels[remaining])
            clock.seconds, begun = 0.0, time.perf_counter()
            if not len(remaining):
                continue
            if lane == OFFICIAL:
                x_adv = _suite(clock, left, (part,), seed)(left.x, left.labels)
            else:
                x_adv = native(left, (part,), seed, None)
            synchronize(victim.x.device)
            spent = time.perf_counter() - begun
            rows[part[0]] = {"seconds": figures(spent), "model_share": figures(clock.seconds / spent)}
            remaining = remaining[right(victim.model, x_adv, left.labels)]
    return rows


@contextlib.contextmanager
def borrowed(model: nn.Module, lane: Lane | str | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the attack runs: the model itself for the official code, else as `auto_attack` would prepare it."""
    if lane == OFFICIAL:
        yield model
    else:
        with frozen(model, lane=lane) as f:
            yield f


def right(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Which images the model takes for what they are."""
    with torch.no_grad():
        return model(x).argmax(dim=1) == labels


def measured(victim: Victim, share: float, rounds: int, seed: int) -> dict[str, Any]:
    """One table: every way to run the same attacks."""
    parts = composition(share)
    functions: dict[str, Callable[[], Tensor]] = {
        f"native, {name}": functools.partial(native, victim, parts, seed, lane) for name, lane in LANES.items()
    }
    try:
        importlib.import_module("pyautoattack")
        if victim.x.device.type in ("cpu", "cuda"):  # it mixes others with the CPU
            functions = {OFFICIAL: functools.partial(official, victim, parts, seed), **functions}
    except ImportError:
        pass
    reference = next(iter(functions))
    lanes = {OFFICIAL: OFFICIAL, **{f"native, {name}": lane for name, lane in LANES.items()}}
    parts_of = {name: shares(victim, parts, seed, lanes[name]) for name in functions}
    withstood: dict[str, Tensor] = {}

    def run(name: str) -> None:
        withstood[name] = right(victim.model, functions[name](), victim.labels)

    runs = {name: functools.partial(run, name) for name in functions}
    times = compared(interleaved(runs, rounds=rounds, device=victim.x.device, warmup=0), reference)
    clean = right(victim.model, victim.x, victim.labels)
    return {
        "victim": victim.name, "threat": repr(victim.threat), "images": len(victim.x), "clean": int(clean.sum()),
        "share": share, "attacks": [[name, dict(options)] for name, options in parts], "reference": reference,
        "missing": [] if reference == OFFICIAL else [OFFICIAL],
        "rows": [
            {
                "name": name, "robust": int(withstood[name].sum()),
                "same_verdicts": round((withstood[name] == withstood[reference]).double().mean().item(), 4),
                "attacks": parts_of[name], **times[name],
            }
            for name in functions
        ],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=3)
    options.add_argument("--full", action="store_true", help="the published budgets everywhere: hours on a CPU")
    options.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    options.add_argument("--images", type=int, default=6, help="for the ResNet-18")
    options.add_argument("--share", type=float, default=1 / 30, help="of the published budgets, for the ResNet-18")
    options.add_argument("--only", choices=("small", "resnet"), help="one of the two networks")
    options = begin(options, arguments)
    if options.quick:
        victims = ((untrained(4, options.device), 0.002),)
    else:
        victims = ()
        if options.only != "resnet":
            victims += ((small(options.device).of(120), 1.0),)
        if options.only != "small":
            large = resnet(options.width, options.images, device=options.device, seed=options.seed)
            victims += ((large, options.share),)
    tables = []
    for victim, share in victims:
        tables.append(measured(victim, 1.0 if options.full else share, options.rounds, options.seed))
        for row in tables[-1]["rows"]:
            print(victim.name, row["name"], row["robust"], row["wall_s"], row["ratio_wall"], row["attacks"])
    save(options, {"version": "standard", "official": OFFICIAL}, tables=tables)


if __name__ == "__main__":
    main()
