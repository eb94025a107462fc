"""What was asked for: budgets of options and recipes, and what they need."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from qgraph import auto, errors
from qgraph.budget import Budget
from qgraph.recipe import PRESETS, Recipe


def is_mixed(recipe: Recipe) -> bool:
    """Whether a recipe leaves formats open."""
    return any(rule.choices for rule in recipe.rules)


def budgeted(recipe: Recipe, given: Mapping[str, str | int | float | None]) -> Recipe:
    """The recipe with a budget; recipe `mixed` instead of `auto`, which has nothing that a budget could choose.

    Args:
        recipe: may have a budget of its own.
        given: what takes the place of its entries; None leaves them.

    Raises:
        errors.RecipeError: QG305 for a bad value, QG330 for a budget where the recipe has nothing to choose.
    """
    held = {key: value for key, value in given.items() if value is not None}
    if held:
        if auto.is_measured(recipe):
            recipe = PRESETS["mixed"].model_copy(update={"target": recipe.target})
        recipe = recipe.model_copy(
            update={"budget": _budget({**recipe.budget.model_dump(), **held})}
        )
    if recipe.budget.is_set and not is_mixed(recipe):
        raise errors.RecipeError(
            errors.Diagnostic(
                "error", "QG330", f"{recipe.budget}",
                f"recipe {recipe.name!r} leaves no format open that a budget could choose",
                'use --recipe mixed, or give a rule choices = ["uint4.g32", "int8.g32", ...]',
            )
        )  # fmt: skip
    return recipe


def _budget(entries: Mapping[str, object]) -> Budget:
    try:
        return Budget.model_validate(entries)
    except ValidationError as e:
        raise errors.RecipeError(
            *(
                errors.Diagnostic(
                    "error", "QG305", "--" + str(p["loc"][0]).replace("_", "-"),
                    p["msg"].removeprefix("Value error, "),
                )
                for p in e.errors()
            )
        ) from e  # fmt: skip


def require_data(data: object) -> None:
    """Refuse to choose where nothing can be measured.

    Raises:
        errors.InputError: QG131.
    """
    if data is None:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG131", "mixed precision", "needs samples to measure which weights matter",
                errors.GIVE_SAMPLES,
            )
        )  # fmt: skip
