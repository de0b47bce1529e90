"""The papers' settings by name: networks, schedules and threats as their released codes ran them."""

import dataclasses
from typing import Any

from training.settings import Settings

L2: dict[str, Any] = {"norm": "l2", "eps": 128 / 255, "step_size": 32 / 255}
LONG: dict[str, Any] = {"epochs": 200, "milestones": (100, 150)}

# RPAT, Sec. 5.2, and RAAT, Sec. 5.1: 110 epochs, drops at 100 and 105, the network called "ResNet-18" there.
_PLAIN = Settings(model="resnet26_bottleneck")
# ReBAT's code, which RPAT++ and RAAT# run on: mild drops, averaged weights, attacks in train mode.
_REBAT = Settings(
    objective="rebat", model="preact_resnet18", normalize=True, padding_mode="reflect", model_mode="as_is",
    schedule="rebat", factor=1.5, average_decay=0.999, average_start=105, **LONG,
)  # fmt: skip


def _with(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, **changes)


_METHODS: dict[str, tuple[str, Settings]] = {
    "pgd_at": ("PGD-AT", _PLAIN),
    "trades": ("TRADES, beta 6", _with(_PLAIN, objective="trades")),
    "mart": ("MART, beta 6", _with(_PLAIN, objective="mart")),
    "consistency_at": ("Consistency-AT", _with(_PLAIN, objective="consistency_at")),
    "rpat": ("RPAT on PGD-AT", _with(_PLAIN, objective="rpat")),
    "rpat_trades": ("RPAT on TRADES", _with(_PLAIN, objective="rpat", base="trades")),
    "rpat_mart": ("RPAT on MART", _with(_PLAIN, objective="rpat", base="mart")),
    "rpat_consistency_at": ("RPAT on Consistency-AT", _with(_PLAIN, objective="rpat", base="consistency_at")),
    "raat": ("RAAT", _with(_PLAIN, objective="raat")),
    "raat_plus_plus": ("RAAT++", _with(_PLAIN, objective="raat_plus_plus")),
}
_ON_REBAT: dict[str, tuple[str, Settings]] = {
    "rebat": ("ReBAT", _REBAT),
    "rpat_plus_plus": ("RPAT++ (on ReBAT)", _with(_REBAT, objective="rpat_plus_plus")),
    "raat_sharp": ("RAAT# (on ReBAT)", _with(_REBAT, objective="raat_sharp")),
}

_PAPER = {
    "rpat_paper": ("RPAT on PGD-AT by Eq. 3", _with(_PLAIN, objective="rpat", source="paper")),
    "raat_paper": ("RAAT by the paper's formulas", _with(_PLAIN, objective="raat", source="paper")),
}


def _named(
    methods: dict[str, tuple[str, Settings]], ending: str = "", **changes: Any
) -> dict[str, tuple[str, Settings]]:
    """Methods under other settings, each with a line that says so."""
    named = {}
    for name, (title, made) in methods.items():
        changed = _with(made, **changes)
        budget = "Linf 8/255" if changed.norm == "linf" else "L2 128/255"
        named[name + ending] = (f"{title}: {budget}, {changed.epochs} epochs", changed)
    return named


RECIPES: dict[str, tuple[str, Settings]] = {
    **_named(_METHODS),
    **_named(_METHODS, "_200", **LONG),
    **_named(_METHODS, "_l2", **L2),
    **_named(_ON_REBAT),
    **_named(_PAPER),
}
"""Description and settings by name."""
