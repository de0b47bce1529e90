"""Samples that resist for the wrong reason: how many of them each attack breaks, at which cost in passes.

    python benchmarks/hard_samples.py --folder FOLDER --out docs/results/hard_samples.json

FOLDER holds `madry_tiny.safetensors`, a small network of others (two convolutions, two linear layers, MNIST), and
`madry_tiny_breakable.npz` with images `x` (bytes) and labels `y` for which a complete verifier proved that an
adversarial input exists. A miniature makes a network and images of its own.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import begin, parser, save
from torch import Tensor, nn

from perceptual_at import Linf, auto_attack, pgd
from perceptual_at.attacks import surrogate_pgd
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.checkpoints import read_weights

THREAT = Linf(0.3)
Attack = Callable[..., Verdict]


def network() -> nn.Sequential:
    """The network whose weights are read."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(4, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(392, 128), nn.ReLU(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


def attacks(quick: bool) -> dict[str, tuple[Attack, dict[str, Any]]]:
    """Attacks by name, with their options."""
    if quick:
        few = [("apgd-ce", {"steps": 2}), ("square", {"queries": 2})]
        return {
            "PGD-2": (pgd, {"steps": 2}),
            "AutoAttack, quick": (auto_attack, {"version": few}),
            "surrogate PGD": (surrogate_pgd, {"steps": 2, "restarts": 1, "probes": 2}),
        }
    return {
        "PGD-100, 20 restarts": (pgd, {"steps": 100, "restarts": 20, "keep": "best", "early_stop": True}),
        "AutoAttack standard": (auto_attack, {"version": "standard"}),
        "AutoAttack plus": (auto_attack, {"version": "plus"}),
        "surrogate PGD, blend 0": (surrogate_pgd, {"blend": 0.0}),
        "surrogate PGD": (surrogate_pgd, {}),
        "surrogate PGD, 16 restarts": (surrogate_pgd, {"restarts": 16}),
    }


def samples(folder: Path | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, images and labels."""
    model = network()
    if folder is None:
        x = torch.rand(3, 1, 28, 28)
        return model, x, model(x).argmax(dim=1)
    model.load_state_dict(read_weights(folder / "madry_tiny.safetensors"))
    with np.load(folder / "madry_tiny_breakable.npz") as found:
        return model, torch.from_numpy(found["x"]).float() / 255, torch.from_numpy(found["y"]).long()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and record."""
    options = parser(__file__, __doc__ or "", rounds=1)
    options.add_argument("--folder", type=Path, help="where weights and images lie")
    chosen = begin(options, arguments)
    if chosen.folder is None and not chosen.quick:
        options.error("--folder is needed, but for --quick")
    chosen.command = chosen.command.replace(str(chosen.folder), "FOLDER")  # where it was is nobody's business
    model, x, labels = samples(chosen.folder)
    rows = []
    for name, (attack, wishes) in attacks(chosen.quick).items():
        began = time.process_time()
        generator = torch.Generator().manual_seed(chosen.seed)
        found = attack(model, x, labels, THREAT, verdict=True, generator=generator, **wishes)
        rows.append({
            "name": name, "broken": int(found.success.sum()), "samples": found.success.nonzero().flatten().tolist(),
            "gradients": float(found.gradients.float().mean()), "forwards": float(found.forwards.float().mean()),
            "cpu_s": round(time.process_time() - began, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    save(chosen, {"images": len(x), "threat": repr(THREAT), "network": "madry_tiny"}, rows=rows)


if __name__ == "__main__":
    main()
