"""What a recipe is, and the settings that many of them share."""

from typing import Any, NamedTuple

from perceptual_at.commands.options.settings import Budget, Settings


class Recipe(NamedTuple):
    """The settings of a method as its released code ran it."""

    title: str
    settings: Settings
    printed: tuple[str, ...] = ()
    """What the papers' tables call the method; a row of that name is made by this recipe."""


# RPAT, Sec. A, and RAAT, Sec. D.1: 110 epochs, drops at 100 and 105, the network called "ResNet-18" there.
PLAIN = Settings().changed(model="resnet26_bottleneck")
L2: dict[str, Any] = {"norm": "l2", "eps": 128 / 255, "step_size": 32 / 255}
LONG: dict[str, Any] = {"epochs": 200, "milestones": (100, 150)}
# ReBAT's code, which RPAT++ and RAAT# run on: mild drops, averaged weights, attacks in train mode.
REBAT = Settings().changed(
    model="preact_resnet18", normalize="cifar10", padding_mode="reflect", model_mode="as_is", schedule="rebat",
    factor=1.5, average_decay=0.999, average_start=105, **LONG,
)  # fmt: skip


def recipe(title: str, start: Settings = PLAIN, *, printed: tuple[str, ...] = (), **changes: Any) -> Recipe:
    """A recipe that differs from `start` in the options named, with a title that says budget and length."""
    settings = start.changed(**changes)
    return Recipe(f"{title}: {_budget(settings.threat)}, {settings.optimisation.epochs} epochs", settings, printed)


def variants(recipes: dict[str, Recipe], ending: str, **changes: Any) -> dict[str, Recipe]:
    """The same methods under other settings, under names with an ending. Rows of tables stay with the originals."""
    return {
        name + ending: recipe(made.title.partition(":")[0], made.settings, **changes) for name, made in recipes.items()
    }


def _budget(threat: Budget) -> str:
    shown = f"{round(threat.eps * 255, 2):g}/255" if threat.norm != "l1" else f"{threat.eps:g}"
    return f"{threat.norm.capitalize()} {shown}"
