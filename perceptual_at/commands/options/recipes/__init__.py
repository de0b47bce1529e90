"""The papers' settings by name, one module per family of methods.

A family's module holds `RECIPES`, from name to `recipe(title, start, printed=..., **options)`: the settings to start
from, the options that differ, and what the result tables call the method. A new family gets a line in `FAMILIES`.
"""

from types import ModuleType

from perceptual_at.commands.options.recipes import baselines, raat, rpat, staples, tables
from perceptual_at.commands.options.recipes.recipe import Recipe

FAMILIES: dict[str, ModuleType] = {
    "bases": baselines,
    "RPAT": rpat,
    "RAAT": raat,
    "other methods of the papers' tables": tables,
    "further methods": staples,
}
"""The modules by what their methods have in common, in the order that help shows them in."""

RECIPES: dict[str, Recipe] = {name: made for family in FAMILIES.values() for name, made in family.RECIPES.items()}
"""Every recipe by name."""
