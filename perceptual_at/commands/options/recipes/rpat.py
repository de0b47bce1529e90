"""RPAT on each base, RPAT by the paper's formula, and RPAT++."""

from perceptual_at.commands.options.recipes.recipe import L2, LONG, REBAT, Recipe, recipe, variants

_RPAT = {
    "rpat": recipe("RPAT on PGD-AT", objective="rpat", printed=("PGD-AT+RPAT", "PGD-AT+RPAT[logits]")),
    "rpat_trades": recipe("RPAT on TRADES", objective="rpat", base="trades", printed=("TRADES+RPAT",)),
    "rpat_mart": recipe("RPAT on MART", objective="rpat", base="mart", printed=("MART+RPAT",)),
    "rpat_consistency_at": recipe(
        "RPAT on Consistency-AT", objective="rpat", base="consistency_at", printed=("Consistency-AT+RPAT",)
    ),
}

RECIPES: dict[str, Recipe] = {
    **_RPAT,
    **variants(_RPAT, "_200", **LONG),
    **variants(_RPAT, "_l2", **L2),
    # The paper's ResNet-18 and its choice of the best weights, by PGD-20 (Sec. 5.1), instead of the code's.
    "rpat_paper": recipe(
        "RPAT on PGD-AT by Eq. 3", objective="rpat", source="paper", model="resnet18", select_steps=20
    ),
    "rpat_plus_plus": recipe("RPAT++ (on ReBAT)", REBAT, objective="rpat_plus_plus", printed=("RPAT++",)),
}
