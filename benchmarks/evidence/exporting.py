"""A trained network of the record as a part of the package: weights with their card."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from evidence.books import Entry
from evidence.design import ARMS, Design, Job
from evidence.numbers import COLUMNS, score
from perceptual_at._files import written_whole
from perceptual_at.checkpoints import read_weights, save_weights, weights_checksum

LARGEST = 3_000_000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LIMITS = (
    "Narrow, and trained for minutes to hours on a CPU: accuracies are far below those of published networks.",
    "Trained and tested on a JPEG copy of CIFAR-10; the scores say how it does on the original images where known.",
    "AutoAttack ran on 1,000 of the 10,000 test images.",
    "Robust, as far as measured, within Linf 8/255 only; other threats were not part of training or test.",
    "For tutorials, tests and first attacks, not for use.",
)


def export(entry: Entry, weights: Path, name: str, design: Design, folder: Path) -> Path:
    """Write `NAME.safetensors` and `NAME.json` into a folder; the weights have to be those of the entry."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise SystemExit(f"a name has small letters, digits and underscores only, got {name!r}.")
    tensors = read_weights(weights)
    if weights_checksum(tensors) != entry["best"]["weights"]:
        raise SystemExit(f"`{weights}` does not hold the weights that the record describes.")
    path = folder / f"{name}.safetensors"
    save_weights(path, tensors)
    if path.stat().st_size >= LARGEST:
        path.unlink()
        raise SystemExit(f"`{weights}` has more than {LARGEST} bytes.")
    with written_whole(folder / f"{name}.json") as beside:
        beside.write_text(json.dumps(card(entry, path, design), indent=1) + "\n", encoding="utf-8")
    return path


def card(entry: Entry, path: Path, design: Design) -> dict[str, Any]:
    """What the network is, how it was made, how good it is, and what it is not for."""
    arm, best = ARMS[entry["arm"]], entry["best"]
    measured = {column: score(entry, column) for column in COLUMNS}
    exact = {} if "exact" not in best else {"exact_images": {
        column: best["exact"][column] for column in ("n", "clean", "pgd20", "margin30")
    }}  # fmt: skip
    return {
        "network": "resnet18",
        "options": {"num_classes": len(CLASSES), "width": design.width, "stem_stride": design.stem_stride},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "classes": CLASSES,
        "trained_by": arm.title,
        "data": f"CIFAR-10, JPEG copy: {entry['images']} images",
        "threat": "Linf(8 / 255)",
        "run": str(Job(*(entry[key] for key in Job._fields))),
        "epoch": best["epoch"],
        "command": entry["command"],
        "commits": entry["commits"],
        "versions": entry["versions"],
        "scores": {name: round(value, 2) for name, value in measured.items() if value is not None},
        **exact,
        "limits": LIMITS,
    }
