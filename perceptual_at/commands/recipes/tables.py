"""The other methods of the papers' result tables.

What a recipe cannot do from the command line its title says: a method that begins in the middle of training begins here
at the first epoch. TE, MMA, HAT, KD+SWA, ADR, CURE and DUCAT need a memory, a second network, a schedule or a step of
their own; their loops are on the page of the methods, and in `examples/`.
"""

from typing import Any

from perceptual_at.commands.recipes.recipe import LONG, REBAT, Recipe, recipe

_WA: dict[str, Any] = {"objective": "pgd_at", "schedule": "steps", "factor": 10.0, **LONG}
# AWP's code: PreActResNet-18, 200 epochs, gamma 0.01 from the first epoch; 0.005 from epoch 10 on TRADES.
_AWP: dict[str, Any] = {"model": "preact_resnet18", **LONG}
_MAIL: dict[str, Any] = {
    "objective": "mail", "epochs": 120, "milestones": (75, 90, 100), "lr": 0.01, "weight_decay": 3.5e-3,
    "eps": 0.031, "step_size": 0.007,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "rebat": recipe("ReBAT", REBAT, objective="rebat", printed=("ReBAT",)),
    "wa": recipe("WA, PGD-AT with averaged weights", REBAT, printed=("WA",), **_WA),
    "awp": recipe("AWP on PGD-AT, gamma 0.01", awp=0.01, printed=("AWP",), **_AWP),
    "trades_awp": recipe("AWP on TRADES, gamma 0.005", objective="trades", awp=0.005, awp_start=10, **_AWP),
    "gairat": recipe(
        "GAIRAT, weighted from the first epoch", objective="gairat", epochs=120, weight_decay=2e-4,
        eps=0.031, step_size=0.007,
    ),
    "mail": recipe("MAIL on PGD-AT, weighted from the first epoch", **_MAIL),
    "mail_trades": recipe("MAIL on TRADES, weighted from the first epoch", options=("base=trades",), **_MAIL),
    "mail_mart": recipe("MAIL on MART, weighted from the first epoch", options=("base=mart",), **_MAIL),
    "ewat": recipe("EWAT, a documented variant that nobody checked", objective="ewat"),
    "sovr": recipe("SOVR, a documented variant that nobody checked", objective="sovr"),
    "piat": recipe("PIAT's loss, a documented variant that nobody checked", objective="piat"),
}  # fmt: skip
