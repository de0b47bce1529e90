"""PGD-20 of an evaluation: on all images, on those that are right, and only as long as they are right.

    python benchmarks/evaluation_time.py --out docs/results/evaluation_time.json

An image counts as broken when the model is wrong on any iterate, so all ways without a lane must give the same flags;
the record says how far they do.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from cases import LANES, STEP_SIZE
from record import begin, parser, save
from timing import compared, interleaved
from torch import Tensor
from torch.nn.functional import cross_entropy
from victims import Victim, resnet, small, untrained

from perceptual_at import Lane, evaluate, frozen, pgd

ALL = "pgd on all images"
OPTIONS = {"steps": 20, "start": "clean", "keep": "best", "verdict": True}


def all_images(victim: Victim) -> Tensor:
    """Robust flags, every step taken with every image."""
    return ~pgd(*victim[1:], step_size=_step(victim), **OPTIONS).success


def by_evaluate(victim: Victim, lane: Lane | None) -> Tensor:
    """Robust flags from `evaluate`, which attacks only what is right."""
    attack = functools.partial(pgd, threat=victim.threat, step_size=_step(victim), **OPTIONS)
    result = evaluate(victim.model, [(victim.x, victim.labels)], {"pgd20": attack}, lane=lane, progress=False)
    return result.robust["pgd20"].to(victim.x.device)


def active_set(victim: Victim) -> Tensor:
    """Robust flags of a loop that leaves out every image as soon as it is broken."""
    point, alive = victim.x.clone(), torch.arange(len(victim.x), device=victim.x.device)
    with frozen(victim.model) as f:
        for _ in range(OPTIONS["steps"]):
            x = point[alive].requires_grad_()
            logits = f(x)
            stays = logits.argmax(dim=1) == victim.labels[alive]
            (slope,) = torch.autograd.grad(cross_entropy(logits, victim.labels[alive], reduction="sum"), x)
            alive = alive[stays]
            moved = point[alive] + _step(victim) * slope[stays].sign()
            point[alive] = victim.threat.project(moved, victim.x[alive])
        with torch.no_grad():
            alive = alive[f(point[alive]).argmax(dim=1) == victim.labels[alive]]
    return torch.zeros(len(point), dtype=torch.bool, device=point.device).index_fill(0, alive, True)


def _step(victim: Victim) -> float:
    return victim.threat.eps * STEP_SIZE * 255 / 8


def measured(victim: Victim, rounds: int) -> dict[str, object]:
    """One table: every way to the same flags."""
    ways: dict[str, Callable[[], Tensor]] = {
        ALL: functools.partial(all_images, victim),
        **{f"evaluate, {name}": functools.partial(by_evaluate, victim, lane) for name, lane in LANES.items()},
        "a loop that leaves out what is broken": functools.partial(active_set, victim),
    }
    flags = {name: way() for name, way in ways.items()}
    times = compared(interleaved(ways, rounds=rounds, device=victim.x.device, warmup=0), ALL)
    same = {name: round((found == flags[ALL]).double().mean().item(), 4) for name, found in flags.items()}
    return {
        "victim": victim.name, "threat": repr(victim.threat), "images": len(victim.x),
        "robust": int(flags[ALL].sum()),
        "rows": [{"name": name, "same_flags": same[name], **times[name]} for name in ways],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=5)
    options.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    options.add_argument("--images", type=int, default=64, help="for the ResNet-18")
    options = begin(options, arguments)
    if options.quick:
        victims = [untrained(4, options.device)]
    else:
        victims = [
            small(options.device),
            resnet(options.width, options.images, device=options.device, seed=options.seed),
        ]
    tables = [measured(victim, options.rounds) for victim in victims]
    for table in tables:
        for row in table["rows"]:
            print(table["victim"], table["robust"], row["name"], row["same_flags"], row["wall_s"], row["ratio_wall"])
    save(options, {"steps": OPTIONS["steps"], "start": OPTIONS["start"]}, tables=tables)


if __name__ == "__main__":
    main()
