"""Recipes from presets, files, dicts and reports, with `--set key=value`; what means nothing is an error."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qgraph import errors
from qgraph.recipe.presets import PRESETS
from qgraph.recipe.schema import Recipe, Rule


def load(
    source: str | os.PathLike[str] | dict[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe from a preset's name, a .toml or .json file, a dict or a Recipe, with `key=value` overrides applied.

    A report in JSON is taken for the recipe that it tells, whatever was given back or measured for it included.

    Raises:
        errors.RecipeError: QG303 unknown preset, QG308 unreadable file, QG305 unknown key or bad value.
    """
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.model_dump()
    elif isinstance(source, dict):
        data = _extend(dict(source), "the recipe")
    else:
        data = _named(os.fspath(source))
    for override in overrides:
        _apply(data, override)
    return _validated(data, str(source) if isinstance(source, (str, os.PathLike)) else "the recipe")


def _named(source: str) -> dict[str, Any]:
    if source in PRESETS:
        return PRESETS[source].model_dump()
    path = Path(source)
    if path.suffix not in (".toml", ".json"):
        hint = errors.nearest(source, PRESETS) + "; or give a .toml or .json file"
        raise errors.RecipeError(errors.Diagnostic("error", "QG303", source, "is no recipe", hint))
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, ValueError) as e:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error",
                "QG308",
                source,
                f"cannot be read as a recipe: {e}",
                "see docs/guide.md for the format",
            )
        ) from e
    if isinstance(data, dict) and isinstance(data.get("resolved_recipe"), dict):
        data = dict(data["resolved_recipe"])  # a report: the recipe that made its model
    data.setdefault("name", path.stem)
    return _extend(data, source)


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _extend(data: dict[str, Any], where: str) -> dict[str, Any]:
    base = data.pop("extends", None)
    if base is None:
        return data
    if base not in PRESETS:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error",
                "QG303",
                f"{where}: extends = {base!r}",
                "is no recipe",
                errors.nearest(str(base), PRESETS),
            )
        )
    merged = PRESETS[base].model_dump()
    rules = [*data.pop("rules", ()), *merged["rules"]]
    for key in ("options", "solvers"):
        for name, values in data.pop(key, {}).items():
            merged[key].setdefault(name, {}).update(values)
    return {**merged, **data, "rules": rules}


def _apply(data: dict[str, Any], override: str) -> None:
    """`seed=1`, `linear.weights=int4.g64`, `options.canonicalize.fold_batch_norm=false`, `rtn.steps=8`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error", "QG305", f"--set {override}", "has no value", "write --set key=value"
            )
        )
    value = _parse(text)
    parts = key.split(".")
    rules = [dict(r) for r in data.get("rules", ())]
    data["rules"] = rules
    if len(parts) == 2:
        chosen = [r for r in rules if r.get("id") == parts[0]]
        if chosen:
            for rule in chosen:
                rule[parts[1]] = value
            return
    if len(parts) == 1 and key in Recipe.model_fields:
        data[key] = value
        return
    if len(parts) == 2 and parts[0] == "budget":
        data["budget"] = {**data.get("budget", {}), parts[1]: value}
        return
    if len(parts) == 3 and parts[0] in ("options", "solvers"):
        section = {k: dict(v) for k, v in data.get(parts[0], {}).items()}
        section.setdefault(parts[1], {})[parts[2]] = value
        data[parts[0]] = section
        return
    ids = [f"{r['id']}.{f}" for r in rules if r.get("id") for f in Rule.model_fields]
    hint = (
        errors.nearest(key, [*Recipe.model_fields, *ids])
        + "; passes: options.PASS.KEY, solvers: solvers.SOLVER.KEY"
    )
    raise errors.RecipeError(
        errors.Diagnostic("error", "QG305", f"--set {key}", "is no key of the recipe", hint)
    )


def _parse(text: str) -> Any:
    """A value as TOML would read it; bare words are strings, and commas make a list."""
    try:
        return _toml(f"x = {text}")["x"]
    except ValueError:
        return [part.strip() for part in text.split(",")] if "," in text else text


def _validated(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        found = []
        for problem in e.errors():
            path = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                last = str(problem["loc"][-1])
                known = Rule.model_fields if problem["loc"][0] == "rules" else Recipe.model_fields
                found.append(
                    errors.Diagnostic(
                        "error",
                        "QG305",
                        f"{where}: {path}",
                        "is no key of a recipe",
                        errors.nearest(last, known),
                    )
                )
            else:
                found.append(
                    errors.Diagnostic(
                        "error",
                        "QG305",
                        f"{where}: {path}",
                        f"{problem['msg']}, found {problem['input']!r}",
                        "see docs/guide.md for the format",
                    )
                )
        raise errors.RecipeError(*found) from e
