"""The papers' settings by name: networks, schedules and threats as their released codes ran them."""

import dataclasses
from typing import Any

from training.settings import Settings

L2 = {"norm": "l2", "eps": 128 / 255, "step_size": 32 / 255}
LONG: dict[str, Any] = {"epochs": 200, "milestones": (100, 150)}

# RPAT, Sec. 5.2, and RAAT, Sec. 5.1: 110 epochs, drops at 100 and 105, the network called "ResNet-18" there.
_PLAIN = Settings(model="resnet26_bottleneck")
# ReBAT's code, which RPAT++ and RAAT# run on: mild drops, averaged weights, attacks in train mode.
_REBAT = Settings(
    objective="rebat", model="preact_resnet18", normalize=True, padding_mode="reflect", model_mode="keep",
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

RECIPES: dict[str, tuple[str, Settings]] = {
    **{name: (f"{title}: Linf 8/255, 110 epochs", made) for name, (title, made) in _METHODS.items()},
    **{f"{name}_200": (f"{title}: Linf 8/255, 200 epochs", _with(made, **LONG)) for name, (title, made) in _METHODS.items()},
    **{f"{name}_l2": (f"{title}: L2 128/255, 110 epochs", _with(made, **L2)) for name, (title, made) in _METHODS.items()},
    **{name: (f"{title}: Linf 8/255, 200 epochs", made) for name, (title, made) in _ON_REBAT.items()},
    "rpat_paper": ("RPAT on PGD-AT with Eq. 3: Linf 8/255, 110 epochs", _with(_PLAIN, objective="rpat", source="paper")),
    "raat_paper": ("RAAT by the paper's formulas: Linf 8/255, 110 epochs", _with(_PLAIN, objective="raat", source="paper")),
}  # fmt: skip
