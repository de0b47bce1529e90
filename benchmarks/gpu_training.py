"""Adversarial training on a GPU: images per second of PGD-10 AT, beside the bound of the card's own matrix rate.

    python benchmarks/gpu_training.py --out docs/results/gpu_training.json

A step is attack, loss, backward and SGD on one batch that lies on the device. The bound is the rate at which the card
multiplies large bfloat16 matrices, measured first, over the arithmetic of an image: 10 (F + Bx) + F + B, counted by
torch on the networks themselves. On a CPU the same code runs in miniature, and the record says so: such numbers say
nothing of a GPU.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import releases
import torch
from autoattack_time import measured as autoattack
from cases import STEP_SIZE, STEPS, THREAT, Case, case
from record import begin, parser, save
from timing import compared, figures, interleaved, peak_memory, spread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from victims import resnet, untrained

from perceptual_at import Lane, objectives, pgd
from perceptual_at.models import resnet18, wide_resnet28_10, wide_resnet34_10

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18, "WRN-28-10": wide_resnet28_10, "WRN-34-10": wide_resnet34_10,
}  # fmt: skip
BATCHES = (("ResNet-18", 512), ("ResNet-18", 128), ("WRN-28-10", 512), ("WRN-34-10", 512))
BF16 = torch.bfloat16
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices that torch has rules for
RELEASE = "release's passes, fp32"


class Way(NamedTuple):
    """How to make the step."""

    lane: Lane | None = None
    release: bool = False
    tf32: bool = True
    training: torch.dtype | None = None
    """Autocast of the training passes, which then run on channels_last weights."""


WAYS = {
    RELEASE: Way(release=True, tf32=False),
    "release's passes, TF32": Way(release=True),
    "release's passes, bf16": Way(release=True, training=BF16),
    "plain, fp32": Way(tf32=False),
    "plain, TF32": Way(),
    "plain, bf16": Way(training=BF16),
    "fp32 lane, TF32": Way(Lane()),
    "bf16 lane": Way(Lane(dtype=BF16), training=BF16),
    "bf16 lane, CUDA graphs": Way(Lane(dtype=BF16, cuda_graphs=True), training=BF16),
    "bf16 lane, compiled": Way(Lane(dtype=BF16, compile=True), training=BF16),
}


def chosen_ways(device: torch.device, *, compiled: bool) -> dict[str, Way]:
    """The ways that the device has."""
    graphs, casts = device.type == "cuda", device.type in AUTOCAST
    return {
        name: way for name, way in WAYS.items()
        if (way.lane is None or (way.lane.cuda_graphs <= graphs and way.lane.compile <= compiled))
        and (casts or way.training is None)
    }  # fmt: skip


def step(found: Case, way: Way, steps: int, *, objective: Callable[..., Any] = objectives.pgd_at) -> Callable[[], None]:
    """One training step on a copy of the model. Its learning rate is 0, so that every round is the same."""
    form = torch.channels_last if way.training or way.lane else torch.contiguous_format
    model = copy.deepcopy(found.model).to(memory_format=form).train()
    x, labels = found.x.contiguous(memory_format=form), found.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def attack(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, **own: Any) -> torch.Tensor:
        settings = {"steps": steps, "step_size": STEP_SIZE, "start": "clean", "lane": way.lane, **own}
        return pgd(model, x, labels, THREAT, validate=False, **settings)

    def run() -> None:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = way.tf32
        casts = torch.autocast(x.device.type, dtype=BF16) if way.training else contextlib.nullcontext()
        with casts:
            if way.release:
                loss = releases.pgd_at(model, x, labels, steps=steps)
            else:
                loss, _ = objective(model, (x,), labels, attack)
        optimizer.zero_grad()  # of what a release's attack left
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # a call leaves no memory behind
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32

    return run


def flops_per_image(model: nn.Module, side: int = 32, steps: int = STEPS) -> float:
    """Operations of one image's training step: K (F + Bx) + F + B, every multiplication and every addition counted."""
    model, x = copy.deepcopy(model).to("meta").eval(), torch.rand(1, 3, side, side, device="meta")

    def counted(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def to_input() -> None:
        image = x.clone().requires_grad_()
        model(image).sum().backward()

    train = counted(lambda: model(x).sum().backward())
    model.requires_grad_(False)
    return steps * counted(to_input) + train


def work_of_networks() -> dict[str, float]:
    """GFLOP of one image, for each network."""
    with torch.device("meta"):
        models = {name: make() for name, make in NETWORKS.items()}
    return {name: figures(flops_per_image(model) / 1e9) for name, model in models.items()}


def matrix_rate(device: torch.device, size: int, rounds: int) -> float:
    """Operations per second of the product of two large bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=BF16) for _ in range(2))
    spent = interleaved({"product": lambda: [a @ b for _ in range(10)]}, rounds=rounds, device=device, warmup=3)
    return 10 * 2 * size**3 / spread(call.wall for call in spent["product"])["median"]


def rates(network: str, found: Case, steps: int, rounds: int, rate: float, ways: dict[str, Way]) -> dict[str, Any]:
    """One table: images per second of every way that fits into memory."""
    functions, held, missing = {}, {}, {}
    for name, way in ways.items():
        function = step(found, way, steps)
        try:
            function()
            held[name] = peak_memory(function, found.x.device)
            functions[name] = function
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
    reference, batch = next(iter(functions)), len(found.x)
    times = compared(interleaved(functions, rounds=rounds, device=found.x.device), reference)
    work = flops_per_image(found.model, found.x.shape[-1], steps)
    rows = []
    for name, row in times.items():
        speed = batch / row["wall_s"]["median"]
        share = figures(speed * work / rate)
        rows.append({"name": name, "images_per_s": figures(speed), "share_of_bound": share, "peak_bytes": held[name]})
        rows[-1].update(row)
    rows += [{"name": name, "missing": why} for name, why in missing.items()]
    return {
        "network": network, "batch": batch, "reference": reference, "gflop_per_image": figures(work / 1e9),
        "bound_images_per_s": figures(rate / work), "rows": rows,
    }  # fmt: skip


def rpat_ratio(found: Case, steps: int, rounds: int, ways: dict[str, Way]) -> dict[str, Any]:
    """RPAT's step over PGD-AT's, both in the same way."""
    rows = {}
    for name, way in ways.items():
        if not way.release:
            both = {"pgd_at": step(found, way, steps), "rpat": step(found, way, steps, objective=objectives.rpat)}
            rows[name] = compared(interleaved(both, rounds=rounds, device=found.x.device, warmup=2), "pgd_at")["rpat"]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=10)
    options.add_argument("--compile", action="store_true", help="compiled lanes too: minutes to start")
    options = begin(options, arguments)
    device = torch.device(options.device)
    miniature = options.quick or device.type != "cuda"
    ways = chosen_ways(device, compiled=options.compile)
    rate = matrix_rate(device, 256 if miniature else 8192, options.rounds)
    tables, steps = [], 2 if miniature else STEPS
    for network, batch in (("ResNet-18", 4),) if miniature else BATCHES:
        size = {"width": 2, "side": 8} if miniature else {}
        found = case(batch, network=network, device=device, seed=options.seed, **size)
        tables.append(rates(network, found, steps, options.rounds, rate, ways))
        for row in tables[-1]["rows"]:
            print(network, batch, row["name"], row.get("missing") or (row["images_per_s"], row["share_of_bound"]))
    found = case(4 if miniature else 512, width=2 if miniature else 64, side=8 if miniature else 32, device=device)
    ratios = rpat_ratio(found, steps, options.rounds, ways)
    victim = untrained(4, device) if miniature else resnet(64, 256, device=device, seed=options.seed, steps=200)
    save(
        options, {"miniature": miniature, "steps": steps, "threat": repr(THREAT)},
        matrix_tflop_per_s=figures(rate / 1e12), tables=tables, rpat_over_pgd_at=ratios,
        autoattack=autoattack(victim, 0.002 if miniature else 0.1, min(options.rounds, 3), options.seed),
        gflop_per_image=work_of_networks(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
