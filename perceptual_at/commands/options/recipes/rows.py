"""From a printed row to the settings that made it, as the released codes ran them."""

from typing import Any

from perceptual_at.commands.options.recipes.recipe import L2, Recipe
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.options.words import meant
from perceptual_at.published import PublishedRow, published

DATA: dict[str, dict[str, Any]] = {
    "CIFAR-10": {"data": "cifar10"},
    "CIFAR-100": {"data": "cifar100"},
    "Tiny-ImageNet": {"data": "tiny_imagenet", "stem_stride": 2},
}
NETWORKS = {
    "ResNet-18": "resnet26_bottleneck",  # what the released codes train under that name
    "PreActResNet-18": "preact_resnet18",
    "WideResNet-28-10": "wide_resnet28_10",
    "WideResNet-34-10": "wide_resnet34_10",
}
# What stands behind a method's name, and what it changes: ReBAT's options for these rows, and RPAT's Table 5.
MARKS: dict[str, dict[str, Any]] = {
    "*": {"cutmix": True, "factor": 4.0, "beta": 2.0},
    "$": {"strong_attack_from": 100, "factor": 1.7},
    "[second-to-last]": {"perceive": "second_to_last"},
    "[third-to-last]": {"perceive": "third_to_last"},
}
# What a method's code sets otherwise for other images, and its paper for another network.
ELSEWHERE: dict[tuple[str, str], dict[str, Any]] = {
    ("ADR", "CIFAR-100"): {"options": ("temperature=1.5", "temperature_end=1.0")},
    ("CURE", "WideResNet-34-10"): {
        "weight": 0.5, "options": ("share=0.5", "natural_weight=0.3", "robust_weight=0.7"),
    },
}  # fmt: skip


def key_of(row: PublishedRow) -> str:
    """How a row is named: paper, table, data set, norm, network, method."""
    return "/".join((row.paper, str(row.table), row.dataset, row.norm, row.model, row.method))


def row_named(key: str) -> PublishedRow:
    """The row of that name.

    Raises:
        ValueError: if no row has it.
    """
    rows = {key_of(row): row for row in published()}
    if key not in rows:
        raise ValueError(
            f"--row {key!r}: rows are named PAPER/TABLE/DATASET/NORM/NETWORK/METHOD, as "
            f"RAAT/1/CIFAR-10/linf/ResNet-18/RAAT{meant(key, rows)}."
        )
    return rows[key]


def settings_of_row(row: PublishedRow, recipes: dict[str, Recipe]) -> tuple[str, Settings]:
    """The recipe that makes a row and its settings: network, data, norm, and selection on the test set by PGD-10.

    Raises:
        ValueError: if no recipe has the method's name.
    """
    printed = {name: recipe for recipe, made in recipes.items() for name in made.printed}
    changes: dict[str, Any] = {"model": NETWORKS[row.model], "select_on": "test", **DATA[row.dataset]}
    name = row.method
    if name not in printed:
        for mark, changed in MARKS.items():
            if name.endswith(mark):
                name = name.removesuffix(mark)
                changes |= changed
    if (row.paper, name) == ("RAAT", "RPAT"):  # what RAAT's Table 3 calls so is RPAT++
        name = "RPAT++"
    if name not in printed:
        raise ValueError(f"--row {key_of(row)!r}: no recipe makes {row.method!r}.")
    for place in (row.dataset, row.model):
        changes |= ELSEWHERE.get((name, place), {})
    if row.norm == "l2":
        changes |= L2
    if row.paper == "RAAT" and row.dataset == "Tiny-ImageNet" and row.model.startswith("WideResNet"):
        changes.pop("stem_stride")
    return printed[name], recipes[printed[name]].settings.changed(**changes)
