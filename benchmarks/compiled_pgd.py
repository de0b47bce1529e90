"""PGD in one compiled graph beside PGD as it comes: seconds to start, seconds per call, and whether the result differs.

    python benchmarks/compiled_pgd.py --out docs/results/compiled_pgd.json

The network is that of the digits, small enough that the attack around it shows. Starts run on fewer images: one after
another, or all of them through `torch.vmap`. Most of the time goes into compiling.
"""

import functools
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch._inductor.config
from record import begin, parser, save
from timing import compared, interleaved, synchronize
from torch import Tensor, nn

from perceptual_at import Lane, Linf, frozen, pgd, pure_pgd
from perceptual_at.models import DigitsCNN
from perceptual_at.victims import FastModel

THREAT = Linf(0.15)
STEP_SIZE = 0.0375
FULL = {"width": 32, "batch": 128, "steps": 10, "starts": 5, "images": 16}
QUICK = {"width": 2, "batch": 4, "steps": 2, "starts": 2, "images": 2}

Attack = Callable[[], Tensor]


def ways(model: nn.Module, x: Tensor, labels: Tensor, steps: int, backend: str) -> dict[str, Attack]:
    """Ways to make the same steps from the clean inputs; the model is frozen."""
    compile_ = functools.partial(torch.compile, backend=backend)
    plain = functools.partial(pgd, threat=THREAT, steps=steps, step_size=STEP_SIZE, start="clean")
    fast = FastModel(model, Lane(), "pgd")  # as `frozen` makes it, but for longer than a block
    fast(x)
    pure, in_lane = (functools.partial(pure_pgd, f, x, labels, THREAT, step_size=STEP_SIZE) for f in (model, fast))
    step = compile_(functools.partial(pure, steps=1), fullgraph=True)

    def by_steps() -> Tensor:
        point = x
        for _ in range(steps):
            point = step(point)
        return point

    compiled_lane = functools.partial(plain, model, x, labels, lane=Lane(compile=True))
    return {
        "pgd": functools.partial(plain, model, x, labels),
        "pgd of the compiled model": functools.partial(plain, compile_(model), x, labels),
        "pure_pgd": functools.partial(pure, x, steps=steps),
        "pure_pgd, a compiled step": by_steps,
        "pure_pgd, one graph": functools.partial(compile_(functools.partial(pure, steps=steps), fullgraph=True), x),
        "pgd in a lane": functools.partial(plain, model, x, labels, lane=Lane()),
        **({"pgd in a compiled lane": compiled_lane} if backend == "inductor" else {}),  # the one that lanes use
        "pure_pgd in a lane, one graph": functools.partial(
            compile_(functools.partial(in_lane, steps=steps), fullgraph=True), x
        ),
    }


def ways_with_starts(
    f: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, starts: Tensor, steps: int, backend: str
) -> dict[str, Attack]:
    """Ways to make the same steps from each of many starts."""
    pure = functools.partial(pure_pgd, f, x, labels, THREAT, steps=steps, step_size=STEP_SIZE)
    mapped = torch.vmap(pure)
    return {
        "one after another": lambda: torch.stack([pure(start) for start in starts]),
        "vmap": lambda: mapped(starts),
        "vmap, one graph": functools.partial(torch.compile(mapped, fullgraph=True, backend=backend), starts),
    }


def measured(functions: dict[str, Attack], rounds: int, device: str) -> dict[str, dict[str, object]]:
    """First calls, then calls in turns; the first of the ways is the reference."""
    reference = next(iter(functions))
    first, results = {}, {}
    for name, function in functions.items():
        begun = time.perf_counter()
        results[name] = function()
        synchronize(device)
        first[name] = round(time.perf_counter() - begun, 3)
        print(f"{name}: first call {first[name]} s", flush=True)
    rows = compared(interleaved(functions, rounds=rounds, device=device), reference)
    for name, row in rows.items():
        far = (results[name] - results[reference]).abs() > 1e-6
        row |= {"first_call_s": first[name], "entries_that_differ": far.float().mean().item()}
        print(f"{name}: {row['wall_s']} {row['ratio_cpu']} {row['entries_that_differ']:.2g}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=15)
    options.add_argument("--backend", default="inductor", help="of torch.compile")
    options = begin(options, arguments)
    size = QUICK if options.quick else FULL
    model = DigitsCNN(width=size["width"]).to(options.device)
    x = torch.rand(size["batch"], 1, 8, 8, device=options.device)
    labels = torch.randint(10, (size["batch"],), device=options.device)
    few, few_labels = x[: size["images"]], labels[: size["images"]]
    generator = torch.Generator(options.device).manual_seed(options.seed)
    starts = torch.stack([THREAT.random_start(few, generator=generator) for _ in range(size["starts"])])
    how = size["steps"], options.backend
    # A first call must compile, not find on the disk what another run left there.
    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        with frozen(model) as f:
            one = measured(ways(f, x, labels, *how), options.rounds, options.device)
        with frozen(model, lane=Lane(channels_last=False)) as f:  # torch.vmap has no rule for batch norm in a graph
            f(few)
            many = measured(ways_with_starts(f, few, few_labels, starts, *how), options.rounds, options.device)
    settings = {
        "network": "DigitsCNN", "inputs": [1, 8, 8], "threat": repr(THREAT), "backend": options.backend,
        **size,
    }  # fmt: skip
    save(options, settings, ways=one, starts=many)


if __name__ == "__main__":
    main()
