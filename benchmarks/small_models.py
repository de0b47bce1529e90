"""Where a pass costs next to nothing: PGD on a two-layer network beside torchattacks, L1 PGD on images beside foolbox.

    python benchmarks/small_models.py --out docs/results/small_models.json

What a step costs is the difference between calls of 100 and of 10 steps, which what a call does once is not in. Where
the other library is not installed, its part of a row says so.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers import MISSING, Attack, prepared
from record import begin, parser, save
from timing import compared, figures, interleaved, spread
from torch import nn

from perceptual_at import L1, Linf, pgd

SHAPES = ((20,), (1, 8, 8), (3, 32, 32))
FEW, MANY = 10, 100


def two_layers(shape: tuple[int, ...], images: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of 32 hidden units, and noise."""
    inputs = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    return model, torch.rand(images, *shape), torch.arange(images) % 10


def steps_of_linf(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One row: a step and a call of ten steps, in shares of torchattacks'."""
    model, x, labels = two_layers(shape, 16)
    calls: dict[str, Callable[[], object]] = {}
    for steps in (FEW, MANY):
        theirs = prepared(torchattacks, model, x, labels, steps)
        if not isinstance(theirs, str):
            calls[f"torchattacks {steps}"] = theirs
        calls[f"pgd {steps}"] = functools.partial(pgd, model, x, labels, Linf(8 / 255), steps=steps, step_size=2 / 255)
    spent = interleaved(calls, rounds=rounds, device="cpu", warmup=3)
    cpu = {name: [call.cpu for call in own] for name, own in spent.items()}

    def per_step(name: str) -> list[float]:
        return [
            (many - few) / (MANY - FEW) for few, many in zip(cpu[f"{name} {FEW}"], cpu[f"{name} {MANY}"], strict=True)
        ]

    step = spread(per_step("pgd"))["median"]
    row = {"shape": list(shape), "step_us": figures(1e6 * step)}
    if len(cpu) == 2:
        return {**row, "missing": MISSING}
    calls_of_ten = {name: spent[name] for name in (f"pgd {FEW}", f"torchattacks {FEW}")}
    return {
        **row,
        "step_ratio": figures(step / spread(per_step("torchattacks"))["median"]),
        "call_ratio": compared(calls_of_ten, f"torchattacks {FEW}")[f"pgd {FEW}"]["ratio_cpu"],
    }


def torchattacks(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int) -> Attack:
    attack = importlib.import_module("torchattacks").PGD(model, eps=8 / 255, alpha=2 / 255, steps=steps)
    return functools.partial(attack, x, labels)


def calls_of_l1(side: int, rounds: int) -> dict[str, Any]:
    """One row: ten steps on four images, beside foolbox."""
    features = nn.Sequential(nn.Conv2d(3, 4, 7, stride=8), nn.ReLU(), nn.Flatten())
    x, labels = torch.rand(4, 3, side, side), torch.arange(4)
    model = nn.Sequential(features, nn.Linear(features(x).shape[1], 10)).eval()
    calls: dict[str, Callable[[], object]] = {"pgd": lambda: pgd(model, x, labels, L1(12.0), steps=FEW)}
    theirs = prepared(foolbox, model, x, labels)
    if not isinstance(theirs, str):
        calls = {"foolbox": theirs, **calls}
    row = compared(interleaved(calls, rounds=rounds, device="cpu"), next(iter(calls)))["pgd"]
    return {"shape": [4, 3, side, side], **({"missing": MISSING} if len(calls) == 1 else {}), **row}


def foolbox(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Attack:
    library = importlib.import_module("foolbox")
    attack, wrapped = library.attacks.L1PGD(steps=FEW), library.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return lambda: attack.run(wrapped, x, library.criteria.Misclassification(labels), epsilon=12.0)


def main(arguments: Sequence[str] | None = None) -> None:
    options = begin(parser(__file__, __doc__, rounds=21), arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say while they load is theirs
        rows = [steps_of_linf(shape, options.rounds) for shape in (SHAPES[:1] if options.quick else SHAPES)]
        l1 = calls_of_l1(32 if options.quick else 224, min(options.rounds, 5))
    print(*rows, l1, sep="\n")
    save(options, {"threats": [repr(Linf(8 / 255)), repr(L1(12.0))]}, rows=rows, l1=l1)


if __name__ == "__main__":
    main()
