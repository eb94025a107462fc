"""Recipes: what to do, as strict typed data. TOML, JSON or a preset, plus `--set key=value`.

A recipe is a list of passes, options for them, and rules. The first rule that matches a weight decides; a user's
rules stand before those of the preset that they extend. Every key, name and glob that means nothing is an error.
"""

from qgraph.recipe.loading import load
from qgraph.recipe.presets import PRESETS, ROTATED_PIPELINE, STATIC_PIPELINE
from qgraph.recipe.schema import AUTO, DEFAULT_PIPELINE, FLOAT, STATIC, Recipe, Rule, static_spec

__all__ = [
    "AUTO",
    "DEFAULT_PIPELINE",
    "FLOAT",
    "PRESETS",
    "ROTATED_PIPELINE",
    "STATIC",
    "STATIC_PIPELINE",
    "Recipe",
    "Rule",
    "load",
    "static_spec",
]
