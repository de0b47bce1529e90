"""How time and memory of a PGD attack grow with batch size, steps, classes, image size and width.

    python benchmarks/scaling.py --out docs/results/scaling.json

One number changes at a time, the points of a curve take turns. The slope is that of the line of least squares through
the logarithms: 1 means proportional, 0 means no influence.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence

from cases import LANES, STEP_SIZE, THREAT, case
from record import begin, parser, save
from timing import interleaved, peak_memory, spread

from perceptual_at import pgd

BASE = {"batch": 32, "steps": 10, "classes": 10, "side": 32, "width": 16}
CURVES = {
    "batch": (1, 4, 16, 64, 256),
    "steps": (1, 3, 10, 30),
    "classes": (10, 32, 100, 316, 1000),
    "side": (32, 64, 128, 224),
    "width": (8, 16, 32, 64),
}
QUICK_BASE = {"batch": 2, "steps": 1, "classes": 10, "side": 16, "width": 2}
QUICK_CURVES = {"batch": (1, 2), "steps": (1, 2), "classes": (10, 20), "side": (8, 16), "width": (2, 4)}
FEWER = {"side": {"batch": 4, "steps": 3}, "width": {"batch": 16, "steps": 3}}
"""Points of these curves are large, so they are measured with less of the rest."""


def attack(chosen: dict[str, int], lane: str, device: str, seed: int) -> Callable[[], object]:
    """The attack at one point."""
    found = case(
        chosen["batch"], width=chosen["width"], classes=chosen["classes"], side=chosen["side"], device=device, seed=seed
    )
    return functools.partial(
        pgd, *found, THREAT, steps=chosen["steps"], step_size=STEP_SIZE, start="clean", lane=LANES[lane]
    )


def curve(
    name: str, values: Sequence[int], base: dict[str, int], lane: str, rounds: int, device: str, seed: int
) -> dict[str, object]:
    """One curve: per value, seconds of a call and bytes at its worst, and how they grow."""
    points = {value: {**base, name: value} for value in values}
    functions = {str(value): attack(chosen, lane, device, seed) for value, chosen in points.items()}
    spent = interleaved(functions, rounds=rounds, device=device)
    rows = [
        {
            name: value,
            "images": chosen["batch"],
            "wall_s": spread(call.wall for call in spent[str(value)]),
            "cpu_s": spread(call.cpu for call in spent[str(value)]),
            "peak_bytes": peak_memory(functions[str(value)], device),
        }
        for value, chosen in points.items()
    ]
    return {
        "name": name, "lane": lane, "base": {**base, name: None}, "rows": rows,
        "time": fitted(values, [row["wall_s"]["median"] for row in rows]),
        "memory": fitted(values, [row["peak_bytes"] for row in rows]),
    }  # fmt: skip


def fitted(values: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Slope of the logarithms and share of their variance that the line explains; and the slope at the upper end."""
    x, y = ([math.log(number) for number in numbers] for numbers in (values, found))
    line = statistics.linear_regression(x, y)
    explained = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {"slope": round(line.slope, 3), "r2": round(explained, 4), "last_slope": round(last, 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=5)
    options.add_argument("--lanes", nargs="+", choices=LANES, default=["plain", "fp32 lane"])
    options = begin(options, arguments)
    base, curves, fewer = (QUICK_BASE, QUICK_CURVES, {}) if options.quick else (BASE, CURVES, FEWER)
    found = []
    for lane in options.lanes:
        for name, values in curves.items():
            chosen = {**base, **fewer.get(name, {})}
            found.append(curve(name, values, chosen, lane, options.rounds, options.device, options.seed))
            print(lane, name, found[-1]["time"], found[-1]["memory"])
    save(options, {"network": "ResNet-18", "attack": "pgd", "threat": repr(THREAT)}, curves=found)


if __name__ == "__main__":
    main()
