"""The bases: PGD-AT, TRADES, MART, Consistency-AT, as RPAT's and RAAT's released codes ran them."""

from perceptual_at.commands.options.recipes.recipe import L2, LONG, Recipe, recipe, variants

_BASES = {
    "pgd_at": recipe("PGD-AT", printed=("PGD-AT",)),
    "trades": recipe("TRADES, beta 6", objective="trades", printed=("TRADES",)),
    "mart": recipe("MART, beta 6", objective="mart", printed=("MART",)),
    "consistency_at": recipe("Consistency-AT", objective="consistency_at", printed=("Consistency-AT", "Cons-AT")),
}

RECIPES: dict[str, Recipe] = {**_BASES, **variants(_BASES, "_200", **LONG), **variants(_BASES, "_l2", **L2)}
