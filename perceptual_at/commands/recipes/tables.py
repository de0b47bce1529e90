"""The other methods of the papers' result tables."""

from perceptual_at.commands.recipes.recipe import REBAT, Recipe, recipe

RECIPES: dict[str, Recipe] = {
    "rebat": recipe("ReBAT", REBAT, objective="rebat", printed=("ReBAT",)),
}
