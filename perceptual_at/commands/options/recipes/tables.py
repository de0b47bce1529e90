"""The other methods of the papers' result tables, with the settings of their released codes where these could be read.

What they remember, and the networks that they learn from, is in `perceptual_at.commands.training.companions`.
"""

from typing import Any

from perceptual_at.commands.options.recipes.recipe import LONG, PLAIN, REBAT, Recipe, recipe

_UNCHECKED = "a documented variant whose agreement with the paper nobody has checked"
_WA: dict[str, Any] = {"objective": "pgd_at", "schedule": "steps", "factor": 10.0, **LONG}
# AWP's code: PreActResNet-18, 200 epochs, gamma 0.01 from the first epoch; 0.005 from epoch 10 on TRADES.
_AWP: dict[str, Any] = {"model": "preact_resnet18", **LONG}
_FLOOR: dict[str, Any] = {"eps": 0.031, "step_size": 0.007}  # what TRADES' code and its descendants attack with
_GAIRAT = PLAIN.changed(epochs=120, weight_decay=2e-4, **_FLOOR)
_MAIL: dict[str, Any] = {
    "objective": "mail", "epochs": 120, "milestones": (75, 90, 100), "lr": 0.01, "weight_decay": 3.5e-3,
    "options": ("weighted=False",), "later": ("76:weighted=True",), **_FLOOR,
}  # fmt: skip
# Rade's code: one rising and falling rate with its peak at 0.21, Nesterov's momentum, 50 epochs.
_HAT: dict[str, Any] = {"objective": "hat", "epochs": 50, "schedule": "one_cycle", "lr": 0.21, "nesterov": True}
# ADR's code attacks in train mode and averages from the first step on.
_ADR: dict[str, Any] = {
    "objective": "adr", "model": "resnet18", "nesterov": True, "model_mode": "as_is", "average_decay": 0.995, **LONG,
}  # fmt: skip
_DUCAT: dict[str, Any] = {
    "objective": "ducat", "dummies": True, "epochs": 130, "options": ("dummies=False",),
    "later": ("105:dummies=True",),
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "rebat": recipe("ReBAT", REBAT, objective="rebat", printed=("ReBAT",)),
    "wa": recipe("WA, PGD-AT with averaged weights", REBAT, printed=("WA",), **_WA),
    "awp": recipe("AWP on PGD-AT, gamma 0.01", awp=0.01, printed=("AWP",), **_AWP),
    "trades_awp": recipe("AWP on TRADES, gamma 0.005", objective="trades", awp=0.005, awp_start=10, **_AWP),
    # All weights are 1 for the first half.
    "gairat": recipe(
        "GAIRAT", _GAIRAT, objective="gairat", options=("offset=1e999",), later=("60:offset=-1.0",),
        printed=("GAIRAT",),
    ),
    "mail": recipe("MAIL on PGD-AT", printed=("MAIL",), **_MAIL),
    "mail_trades": recipe("MAIL on TRADES", base="trades", **_MAIL),
    "mail_mart": recipe("MAIL on MART", base="mart", **_MAIL),
    # The drops of the rate are ours; so is the network, which was a WideResNet-28-4.
    "mma": recipe(
        "MMA, d_max 12/255", objective="mma", model="preact_resnet18", lr=0.3, epochs=128, milestones=(64, 96),
        options=("largest=0.047059",), printed=("MMA",),
    ),
    "te": recipe("TE on PGD-AT", objective="te", weight=300.0, printed=("TE",), **LONG),
    "te_trades": recipe("TE on TRADES", objective="te", base="trades", weight=300.0, **LONG),
    "hat": recipe("HAT on TRADES", beta=2.5, weight=0.5, printed=("HAT",), **_HAT),
    "hat_pgd_at": recipe("HAT on PGD-AT", base="pgd_at", **_HAT),
    "kd_swa": recipe(
        "KD+SWA", objective="kd", model_mode="as_is", epochs=200, milestones=(50, 150), averaging="swa",
        average_start=55, printed=("KD+SWA",),
    ),
    "adr": recipe("ADR on PGD-AT", printed=("ADR",), **_ADR),
    "adr_trades": recipe("ADR on TRADES", base="trades", **_ADR),
    "adr_awp": recipe(
        "ADR on PGD-AT with SAM's form of AWP", awp=0.005, awp_form="sam",
        **{**_ADR, "options": ("temperature_end=1.5", "trust_end=0.85")},
    ),
    "cure": recipe(
        "CURE", objective="cure", model="resnet18", beta=5.0, weight=1.0, printed=("CURE",), **_FLOOR, **LONG
    ),
    "ducat": recipe("DUCAT on PGD-AT", **_DUCAT),
    "ducat_trades": recipe("DUCAT on TRADES", base="trades", **_DUCAT),
    "ducat_mart": recipe("DUCAT on MART", base="mart", **_DUCAT),
    "ducat_consistency_at": recipe("DUCAT on Consistency-AT", base="consistency_at", **_DUCAT),
    "ewat": recipe(f"EWAT, {_UNCHECKED}", objective="ewat", printed=("EWAT",)),
    "sovr": recipe(f"SOVR, {_UNCHECKED}", objective="sovr", printed=("SOVR",)),
    "piat": recipe(f"PIAT, {_UNCHECKED}", objective="piat", printed=("PIAT",)),
}  # fmt: skip
