"""PGD-20 of an evaluation: on all images, on those that are right, and only as long as they are right.

    python benchmarks/evaluation_time.py --out docs/results/evaluation_time.json

An image counts as broken when the model is wrong on any iterate, so all ways without a lane must give the same flags;
the record says how far they do.
"""

import functools
from collections.abc import Callable, Sequence

from cases import LANES, STEP_SIZE
from record import begin, parser, save
from timing import compared, interleaved
from torch import Tensor
from victims import Victim, resnet, small, untrained

from perceptual_at import Lane, evaluate, pgd

ALL = "pgd on all images"
OPTIONS = {"steps": 20, "start": "clean", "keep": "best", "verdict": True}


def all_images(victim: Victim, *, early_stop: bool = False) -> Tensor:
    """Robust flags of `pgd` on every image, those that are wrong without attack included."""
    return ~pgd(*victim[1:], step_size=_step(victim), early_stop=early_stop, **OPTIONS).success


def by_evaluate(victim: Victim, lane: Lane | None, *, early_stop: bool) -> Tensor:
    """Robust flags from `evaluate`, which attacks only what is right without attack."""
    attack = functools.partial(pgd, threat=victim.threat, step_size=_step(victim), early_stop=early_stop, **OPTIONS)
    result = evaluate(victim.model, [(victim.x, victim.labels)], {"pgd20": attack}, lane=lane, progress=False)
    return result.robust["pgd20"].to(victim.x.device)


def _step(victim: Victim) -> float:
    return victim.threat.eps * STEP_SIZE * 255 / 8


def measured(victim: Victim, rounds: int) -> dict[str, object]:
    """One table: every way to the same flags."""
    ways: dict[str, Callable[[], Tensor]] = {
        ALL: functools.partial(all_images, victim),
        "pgd, early_stop": functools.partial(all_images, victim, early_stop=True),
        "evaluate": functools.partial(by_evaluate, victim, None, early_stop=False),
        **{
            "evaluate, early_stop" + (f", {name}" if lane else ""): functools.partial(
                by_evaluate, victim, lane, early_stop=True
            )
            for name, lane in LANES.items()
        },
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
    options = parser(__file__, __doc__, rounds=3)
    options.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    options.add_argument("--images", type=int, default=32, help="for the ResNet-18")
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
