"""Evaluate any model on any data under any threat; kill it at any moment and call it again to go on.

    python examples/evaluate.py --model "perceptual_at.models:DigitsCNN(width=8)" --checkpoint model.safetensors \
        --data digits --eps 0.15 --attacks pgd20 cw20
    python examples/evaluate.py --model my_package.models:build --checkpoint model.pt --root data --attacks pgd20 aa
    python examples/evaluate.py --model robustbench:Wong2020Fast --root data --samples 1000    # needs robustbench

The report goes to `--out` as report.json and report.md, with the verdicts so far in record.jsonl. `--against` takes
the report.json of another model on the same samples, and tests which is better.
"""

import ast
import dataclasses
import functools
import importlib
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.utils.data import Subset, TensorDataset

import perceptual_at as pat
from perceptual_at import data
from perceptual_at._files import written_whole
from perceptual_at.checkpoints import load_weights

LANES = {"none": None, "fp32": pat.Lane(), "bf16": pat.Lane(dtype=torch.bfloat16)}
ATTACKS = "fgsm, pgd, cw, apgd (pgd20 is PGD with 20 steps), fab, square, aa"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate, and how."""

    model: str
    """`module:function` or `module:function(option=value)` that returns a model, or `robustbench:Name`."""
    checkpoint: Path | None = None
    """Weights for it: a safetensors file, or a state dict saved by torch."""
    data: Literal["cifar10", "cifar100", "tiny_imagenet", "folder", "npz", "digits"] = "cifar10"
    """The images."""
    root: Path = Path("data")
    """Where they are: the data set's folder, a folder of splits, or an .npz file."""
    split: str = "test"
    """Which part of them."""
    samples: int | None = None
    """How many, from the first on; all if left out."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """The threat model."""
    eps: str = "8/255"
    """Its budget: a number or a fraction."""
    attacks: tuple[str, ...] = ("pgd20", "cw20", "aa")
    """fgsm, pgd, cw, apgd (pgd20 is PGD with 20 steps), fab, square, aa."""
    step_size: str | None = None
    """Step of pgd and cw; 2.5 eps over their steps if left out."""
    batch: int = 250
    """Samples at a time."""
    lane: Literal["none", "fp32", "bf16"] = "none"
    """Run the attacks on a copy of the model that costs less, in float32 or bfloat16; the model itself judges."""
    seed: int = 0
    """Of the attacks' noise."""
    cascade: bool = False
    """Worst case only: what one attack has broken, the next ones leave out."""
    repeats: int = 1
    """How often a random model is asked for each verdict."""
    checks: bool = False
    """Run the sanity checks too."""
    against: Path | None = None
    """The report.json of another model, to compare with."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    out: Path = Path("outputs/evaluate")
    """Folder for the report."""


def model_of(settings: Settings) -> nn.Module:
    """The model, with its weights."""
    place, _, name = settings.model.partition(":")
    if not name:
        raise SystemExit(f"--model must be `module:function` or `robustbench:Name`, got {settings.model!r}.")
    if place == "robustbench":
        return robustbench_model(name, settings)
    sys.path.insert(0, str(Path.cwd()))
    call = ast.parse(name, mode="eval").body
    options: dict[str, Any] = {}
    if isinstance(call, ast.Call):
        options = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
    model: nn.Module = getattr(importlib.import_module(place), name)(**options)
    if settings.checkpoint is not None:
        load(model, settings.checkpoint)
    return model


def load(model: nn.Module, path: Path) -> None:
    """Put weights into the model, without executing anything in the file."""
    if path.suffix == ".safetensors":
        load_weights(model, path)
        return
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})


def robustbench_model(name: str, settings: Settings) -> nn.Module:
    """A model of RobustBench's zoo, which downloads its weights."""
    try:
        from robustbench.utils import load_model
    except ImportError as error:
        raise ImportError("--model robustbench:Name needs the package robustbench; install it first.") from error
    norm = {"linf": "Linf", "l2": "L2"}.get(settings.norm)
    if norm is None:
        raise SystemExit("--norm must be linf or l2 for models of RobustBench.")
    model: nn.Module = load_model(name, model_dir=str(settings.root), dataset=settings.data, threat_model=norm)
    return model


def images_of(settings: Settings) -> torch.utils.data.Dataset[Any]:
    """The images and labels."""
    if settings.data == "digits":
        images: Any = TensorDataset(*data.digits(settings.split))
    else:
        read = {"folder": data.image_folder, "npz": data.npz_images}.get(settings.data) or getattr(data, settings.data)
        images = read(settings.root, settings.split)
    return images if settings.samples is None else Subset(images, range(min(settings.samples, len(images))))


def attack_of(name: str, threat: pat.Threat, step_size: float | None) -> Any:
    """An attack by the name it has in tables."""
    plain = {"fgsm": pat.fgsm, "fab": pat.fab, "square": pat.square, "aa": pat.auto_attack}
    if name in plain:
        return functools.partial(plain[name], threat=threat, verdict=True)
    match = re.fullmatch(r"(pgd|cw|apgd)(\d*)", name)
    if match is None:
        raise SystemExit(f"--attacks knows {ATTACKS}, not {name!r}.")
    options: dict[str, Any] = {"steps": int(match[2])} if match[2] else {}
    if match[1] != "apgd" and step_size is not None:
        options["step_size"] = step_size
    function = {"pgd": pat.pgd, "cw": pat.cw, "apgd": pat.apgd}[match[1]]
    return functools.partial(function, threat=threat, **options, verdict=True)


def main(settings: Settings) -> pat.Evaluation:
    kinds = {"linf": pat.Linf, "l2": pat.L2, "l1": pat.L1}
    threat = kinds[settings.norm](float(Fraction(settings.eps)))
    step_size = None if settings.step_size is None else float(Fraction(settings.step_size))
    attacks = {name: attack_of(name, threat, step_size) for name in settings.attacks}
    images = data.loader(images_of(settings), settings.batch)
    result = pat.evaluate(
        model_of(settings).to(settings.device), images, attacks, seed=settings.seed, cascade=settings.cascade,
        repeats=settings.repeats, checks=settings.checks, lane=LANES[settings.lane],
        record=settings.out / "record.jsonl",
    )  # fmt: skip
    text = f"# {settings.model}\n\n{settings.data}, {threat!r}\n\n{result.to_markdown()}"
    if settings.against is not None:
        comparison = pat.compare(result, pat.Evaluation.from_json(settings.against), names=("this", "the other"))
        text += f"\nAgainst {settings.against}:\n\n{comparison.to_markdown()}\n"
    result.to_json(settings.out / "report.json")
    with written_whole(settings.out / "report.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    return result


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
