"""One training step of every objective: ours plain and with its attack in the lanes, beside the release's passes.

    python benchmarks/training_steps.py --out docs/results/training_steps.json

A step is attack, loss, backward and SGD. With the bf16 lane the training passes, which stay float32, run on
channels_last weights. Memory is what the attack and the training passes each hold at their worst, on top of model and
batch.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import LANES, STEP_SIZE, STEPS, THREAT, Case, case
from passes import passes
from record import begin, parser, save
from releases import ETA, MIX, RELEASES
from timing import compared, interleaved, peak_memory
from torch import Tensor, nn
from torch.nn import functional

from perceptual_at import Lane, objectives, pgd, snapshot

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
RELEASE = "release"
BF16 = "bf16 lane, channels_last"
OBJECTIVES: dict[str, tuple[Callable[..., objectives.passes.Result], dict[str, object]]] = {
    "pgd_at": (objectives.pgd_at, {}),
    "rpat": (objectives.rpat, {}),
    "trades": (objectives.trades, {}),
    "rpat, trades": (objectives.rpat, {"base": "trades"}),
    "mart": (objectives.mart, {}),
    "rpat, mart": (objectives.rpat, {"base": "mart"}),
    "consistency_at": (objectives.consistency_at, {}),
    "rpat, consistency_at": (objectives.rpat, {"base": "consistency_at"}),
    "raat": (objectives.raat, {"mix": MIX, "eta": ETA}),
    "raat_plus_plus": (objectives.raat_plus_plus, {"mix": MIX, "eta": ETA}),
    "rebat": (objectives.rebat, {"average": None}),
    "rpat_plus_plus": (objectives.rpat_plus_plus, {"average": None}),
    "raat_sharp": (objectives.raat_sharp, {"mix": MIX, "eta": ETA, "average": None}),
}
TWO_VIEWS = ("consistency_at", "rpat, consistency_at", "raat", "raat_plus_plus", "raat_sharp")


def loss_of(name: str, model: nn.Module, steps: int, lane: Lane | None) -> Loss:
    """Our objective as a function of model, inputs (both views joined) and labels."""
    objective, options = OBJECTIVES[name]
    if "average" in options:
        options = {**options, "average": snapshot(model)}

    def attack(model: nn.Module, x: Tensor, labels: Tensor, **own: Any) -> Tensor:
        settings = {"steps": steps, "step_size": STEP_SIZE, "start": "clean", "lane": lane, **own}  # some have a start
        return pgd(model, x, labels, THREAT, **settings)

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        views = x.chunk(2) if name in TWO_VIEWS else (x,)
        return objective(model, views, labels[: len(views[0])], attack, **options)[0]

    return loss


def step(found: Case, loss: Loss) -> Callable[[], None]:
    """One step of a copy of the model in train mode, which learns nothing, so that every round is the same."""
    model = copy.deepcopy(found.model).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def run() -> None:
        value = loss(model, found.x, found.labels)
        optimizer.zero_grad()  # of what a release's attack left
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # a call leaves no memory behind

    return run


def two_views(found: Case) -> Case:
    """The first half of the images and a view of each that is hardly another, with the same labels."""
    x, labels = (part[: len(part) // 2] for part in (found.x, found.labels))
    near = (x + 1e-3 * torch.randn_like(x)).clamp(0, 1)
    return Case(found.model, torch.cat([x, near]), labels.repeat(2))


def channels_last(found: Case) -> Case:
    """The same with weights and images whose channels are innermost."""
    model = copy.deepcopy(found.model).to(memory_format=torch.channels_last)
    return Case(model, found.x.contiguous(memory_format=torch.channels_last), found.labels)


def ways(name: str, found: Case, steps: int) -> dict[str, Callable[[], None]]:
    """Every way to make the step of one objective."""
    ours = {
        way: step(found, loss_of(name, found.model, steps, lane)) for way, lane in LANES.items() if way != "bf16 lane"
    }
    last = channels_last(found)
    ours[BF16] = step(last, loss_of(name, last.model, steps, LANES["bf16 lane"]))
    if name not in RELEASES:
        return ours
    release = functools.partial(RELEASES[name], steps=steps)
    return {RELEASE: step(found, release), **ours}


def cross_entropy(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """PGD-AT's training passes without its attack."""
    return functional.cross_entropy(model(x), labels)


def memory(found: Case, steps: int) -> dict[str, dict[str, int]]:
    """Bytes that attack and training passes of PGD-AT hold at their worst, for each way."""
    held = {}
    for way, lane in LANES.items():
        here = channels_last(found) if way == "bf16 lane" else found
        attack = functools.partial(pgd, *here, THREAT, steps=steps, step_size=STEP_SIZE, start="clean", lane=lane)
        attack()
        train = step(here, cross_entropy)
        train()
        parts = {"attack": attack, "training": train}
        held[way] = {name: peak_memory(part, found.x.device) for name, part in parts.items()}
    return held


def measured(name: str, found: Case, steps: int, rounds: int) -> dict[str, object]:
    """One row of the table."""
    found = two_views(found) if name in TWO_VIEWS else found
    functions = ways(name, found, steps)
    for function in functions.values():
        function()
    counts = {way: passes(function, found.model, len(found.x)) for way, function in functions.items()}
    reference = RELEASE if RELEASE in functions else "plain"
    times = compared(interleaved(functions, rounds=rounds, device=found.x.device, warmup=0), reference)
    return {
        "name": name,
        "reference": reference,
        "ways": {way: {"passes": counts[way], **times[way]} for way in functions},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=3)
    options.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=None)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--batch", type=int, default=16, help="images, both views together")
    options = begin(options, arguments)
    if options.quick:
        options.width, options.batch = 4, 4
    steps, names = (2, ("rpat", "raat")) if options.quick else (STEPS, tuple(OBJECTIVES))
    found = case(options.batch, width=options.width, device=options.device, seed=options.seed)
    rows = []
    for name in options.objectives or names:
        rows.append(measured(name, found, steps, options.rounds))
        for way, row in rows[-1]["ways"].items():
            print(name, way, row["wall_s"], row["ratio_wall"], row["passes"])
    settings = {
        "network": "ResNet-18", "width": options.width, "batch": options.batch, "threat": repr(THREAT), "steps": steps,
    }  # fmt: skip
    save(options, settings, rows=rows, memory_bytes=memory(found, steps))


if __name__ == "__main__":
    main()
