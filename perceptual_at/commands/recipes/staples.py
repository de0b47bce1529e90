"""Methods of the field that the papers' tables do not print."""

from perceptual_at.commands.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {}
