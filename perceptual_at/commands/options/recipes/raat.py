"""RAAT, RAAT++, RAAT by the paper's formulas, and RAAT#."""

from perceptual_at.commands.options.recipes.recipe import L2, LONG, REBAT, Recipe, recipe, variants

_RAAT = {
    "raat": recipe("RAAT", objective="raat", printed=("RAAT",)),
    "raat_plus_plus": recipe("RAAT++", objective="raat_plus_plus", printed=("RAAT++",)),
}

RECIPES: dict[str, Recipe] = {
    **_RAAT,
    **variants(_RAAT, "_200", **LONG),
    **variants(_RAAT, "_l2", **L2),
    # The paper's ResNet-18; it chooses the best weights by PGD-10 (Sec. 5.1), as the code does.
    "raat_paper": recipe("RAAT by the paper's formulas", objective="raat", source="paper", model="resnet18"),
    "raat_sharp": recipe("RAAT# (on ReBAT)", REBAT, objective="raat_sharp", printed=("RAAT#",)),
}
