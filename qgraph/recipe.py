"""Recipes: what to do, as strict typed data. TOML, JSON or a preset, plus `--set key=value`.

A recipe is a list of passes, options for them, and rules. The first rule that matches a weight decides; a user's
rules stand before those of the preset that they extend. Every key, name and glob that means nothing is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qgraph import errors, registry
from qgraph.spec import QuantSpec

DEFAULT_PIPELINE = (
    "canonicalize",
    "assign-precision",
    "solve-weights",
    "insert-qdq",
    "fuse-qdq",
    "cleanup",
)
FLOAT, AUTO, STATIC = "float", "auto", "static"


def static_spec(text: str) -> QuantSpec:
    """The spec of a static activation: one grid for the tensor, with a zero point unless it says `.sym`."""
    parts = text.split(".")
    spec = QuantSpec.parse(text)
    return replace(spec, block=(0, 0), symmetric="sym" in parts[1:])


# Rotations mix channels; what differs between heads, or was scaled up in one and down in the next layer, they cannot
# mix away: that is evened out before.
ROTATED_PIPELINE = (DEFAULT_PIPELINE[0], "equalize", "rotate", *DEFAULT_PIPELINE[1:])
STATIC_PIPELINE = (
    "canonicalize",
    "observe",
    "assign-precision",
    "search-ranges",
    "solve-weights",
    "correct-bias",
    "insert-qdq",
    "fuse-qdq",
    "cleanup",
)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Rule(_Strict):
    """What to do with the weights that match. Empty lists match everything."""

    id: str = ""
    """Name of the rule: in reports, and for `--set ID.field=value`."""
    ops: tuple[str, ...] = ()
    """Operator types: MatMul, Gemm, Conv, ConvTranspose, Gather, Slice, LSTM, GRU, RNN."""
    names: tuple[str, ...] = ()
    """Globs over weight labels, initializer names and node names."""
    min_elements: int = 0
    """Only weights of at least this many elements."""
    weights: tuple[str, ...] = (AUTO,)
    """Specs in order of preference: the first that the target takes. "float" keeps it, "auto" asks the target."""
    activations: str = FLOAT
    """How the operator's input is quantized: "float", "int8" or "int4" (at run time), "static" (on a calibrated grid of
    the target's own type) or "static:SPEC" (of another type: "static:int8", "static:int8.sym")."""
    solver: str = "rtn"
    """Name of the weight solver."""
    tied: bool = False
    """Only weights that are used in several ways, as a table and as a head."""
    head: bool = False
    """Only weights whose product is an output of the model."""
    ternary: bool = False
    """Only weights that are exactly ternary: each row holds -s, 0 and s alone."""
    sensitive: str = ""
    """Spec for the weights of this rule that hurt most (see qgraph.sensitivity)."""
    sensitive_share: float = 0.0
    """How much of the rule's elements may get the sensitive spec, 0..1."""
    reason: str = ""
    """What the report says."""

    @property
    def is_static(self) -> bool:
        """Whether activations are put on calibrated grids."""
        return self.activations.partition(":")[0] == STATIC

    @field_validator("ops", "names", "weights", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (
            (value,)
            if isinstance(value, str)
            else tuple(value)
            if isinstance(value, list)
            else value
        )

    @field_validator("weights")
    @classmethod
    def _specs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if text not in (FLOAT, AUTO) and QuantSpec.parse(text).qtype.bits == 16:
                raise ValueError(f"16-bit types are for activations, found weights {text!r}")
        return value

    @field_validator("sensitive")
    @classmethod
    def _sensitive(cls, value: str) -> str:
        if value:
            QuantSpec.parse(value)
        return value

    @field_validator("activations")
    @classmethod
    def _activations(cls, value: str) -> str:
        kind, colon, text = value.partition(":")
        if value not in (FLOAT, "int8", "int4") and kind != STATIC:
            raise ValueError(
                f'"float", "int8", "int4", "static" or "static:SPEC" expected, found {value!r}'
            )
        if colon:
            static_spec(text)
        return value


class Recipe(_Strict):
    """A whole recipe, resolved: nothing in it refers to another one."""

    name: str = "custom"
    summary: str = ""
    target: str = "ort"
    pipeline: tuple[str, ...] = DEFAULT_PIPELINE
    rules: tuple[Rule, ...] = ()
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options by pass name."""
    solvers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options by solver name."""
    min_elements: int = 1024
    """Weights with fewer elements stay float: they cost more nodes than they save bytes."""
    seed: int = 0

    @field_validator("pipeline", "rules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without samples: a pass observes, or a solver wants to know a weight's inputs."""
        solvers = {registry.get("solver", rule.solver) for rule in self.rules}
        observes = bool({"observe", "smooth"} & set(self.pipeline))
        return observes or any(s.statistics != "none" for s in solvers)

    @staticmethod
    def default() -> Recipe:
        """The recipe `auto`."""
        return PRESETS["auto"]

    def to_json(self) -> str:
        """The recipe as JSON that `load` reads back to an equal recipe."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


_KIND_OPS = {
    "linear": ("MatMul", "Gemm"),
    "conv": ("Conv", "ConvTranspose"),
    "embedding": ("Gather", "Slice"),
    "rnn": ("LSTM", "GRU", "RNN"),
}


def _rule(kind: str, *weights: str, **fields: Any) -> Rule:
    return Rule(id=kind, ops=_KIND_OPS[kind], weights=weights, **fields)


_TIED = Rule(
    id="tied", ops=_KIND_OPS["embedding"], tied=True, weights=("int8.g32", "int8.ch", FLOAT)
)

_TABLES = (_TIED, _rule("embedding", "int8.ch", "int8.g32", FLOAT))
_REST = (
    _rule("conv", "int8.ch", "int8.tensor", FLOAT),
    _rule("rnn", "int8.ch", "int8.tensor", FLOAT),
)


# A head that was tied to the embedding takes the gain of the last norm when the model is rotated, and is untied so.
_HEAD = Rule(id="head", ops=_KIND_OPS["linear"], head=True, weights=("int8.g32", "int8.ch", FLOAT))


def _int4(group: int, solver: str = "rtn") -> Rule:
    specs = (f"uint4.g{group}.asym", f"int4.g{group}", "int8.ch", FLOAT)
    sensitive = f"int8.g{group}"
    return _rule("linear", *specs, sensitive=sensitive, sensitive_share=0.09, solver=solver)


_NO_DATA = (
    "a convolution is faster in int8 only with activations calibrated on data: --recipe int8-static --data SAMPLES; "
    "--recipe int8-weights makes it smaller"
)
_NO_GAIN = "dynamic int8 convolutions are no faster than float on CPU; --recipe int8-weights makes them smaller"

PRESETS: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            name="auto",
            summary="the best that needs no data; with --data what measured best here, for each class of operators",
            rules=(
                _rule("embedding", AUTO),
                _rule("linear", AUTO),
                _rule("conv", FLOAT, reason=_NO_DATA),
                _rule("rnn", AUTO),
            ),
        ),
        Recipe(
            name="int8-dynamic",
            summary="int8 weights per output channel, activations quantized at run time (MatMul, Gemm)",
            rules=(
                _TIED,
                _rule("embedding", "int8.ch", "int8.g32", FLOAT),
                _rule("linear", "int8.ch", FLOAT, activations="int8"),
                _rule(
                    "conv",
                    FLOAT,
                    reason=_NO_GAIN,
                ),
                _rule("rnn", AUTO),
            ),
        ),
        Recipe(
            name="int8-static",
            summary="int8 weights, activations on grids calibrated with --data: integer kernels for Conv, Gemm, MatMul",
            pipeline=STATIC_PIPELINE,
            # A weight that callers may override has no grid; exporters list all weights as inputs for no reason.
            options={"canonicalize": {"to_gemm": True, "freeze_inputs": True}},
            rules=(
                _TIED,
                _rule("embedding", "int8.ch", "int8.g32", FLOAT, min_elements=1024),
                _rule("linear", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
                _rule("conv", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
                _rule("rnn", AUTO, min_elements=1024),
            ),
            min_elements=1,
        ),
        Recipe(
            name="int8-tensor",
            summary="as int8-static with one scale per weight tensor, channels evened out first: for simple devices",
            pipeline=("canonicalize", "equalize", *STATIC_PIPELINE[1:]),
            options={"canonicalize": {"to_gemm": True}, "equalize": {"clips": "measured"}},
            rules=(
                _rule("embedding", "int8.tensor", FLOAT, min_elements=1024),
                _rule("linear", "int8.tensor", FLOAT, activations=STATIC),
                _rule("conv", "int8.tensor", FLOAT, activations=STATIC),
                _rule("rnn", "int8.tensor", FLOAT, min_elements=1024),
            ),
            min_elements=1,
        ),
        Recipe(
            name="int8-smooth",
            summary="as int8-static, with outliers of activations moved into the weights first: for transformers",
            pipeline=("canonicalize", "smooth", *STATIC_PIPELINE[1:]),
            options={"canonicalize": {"to_gemm": True}},
            rules=(
                _TIED,
                _rule("embedding", "int8.ch", "int8.g32", FLOAT, min_elements=1024),
                _rule("linear", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
                _rule("conv", "int8.ch", "int8.tensor", FLOAT, activations=STATIC),
                _rule("rnn", AUTO, min_elements=1024),
            ),
            min_elements=1,
        ),
        Recipe(
            name="int8-weights",
            summary="int8 weights, float activations: a quarter of the size, nearly no error",
            rules=(*_TABLES, _rule("linear", "int8.g32", "int8.ch", FLOAT), *_REST),
        ),
        Recipe(
            name="int4",
            summary="4-bit weights in groups of 32; int8 for embeddings, convolutions and the most sensitive 9 %",
            rules=(*_TABLES, _int4(32), *_REST),
        ),
        Recipe(
            name="int4-g128",
            summary="as int4, in groups of 128: 0.8 bits per weight less and faster kernels, somewhat more error",
            rules=(*_TABLES, _int4(128), *_REST),
        ),
        Recipe(
            name="int4-gptq",
            summary="as int4, rounded so that errors cancel on the samples of --data (gptq, then coordinate descent)",
            rules=(*_TABLES, _int4(32, "round-descent"), *_REST),
        ),
        Recipe(
            name="w4a8",
            summary="4-bit weights in groups of 32 and int8 activations in qgraph's own operators",
            target="ort-qgraph",
            rules=(*_TABLES, _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT), *_REST),
        ),
        Recipe(
            name="w4a8-rotated",
            summary="as w4a8, behind rotations that spread outliers over channels (QuaRot's R1 and R2, folded)",
            target="ort-qgraph",
            pipeline=ROTATED_PIPELINE,
            rules=(
                *_TABLES,
                _HEAD,
                _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT),
                *_REST,
            ),
        ),
        Recipe(
            name="w4a4",
            summary="4-bit weights and activations in qgraph's own operators, rotated, where needed at run time",
            target="ort-qgraph",
            pipeline=ROTATED_PIPELINE,
            options={"rotate": {"online": 128}},
            rules=(
                *_TABLES,
                _HEAD,
                _rule("linear", "int4.g32.f16", "int4.g32", "int8.ch", FLOAT, activations="int4"),
                *_REST,
            ),
        ),
        Recipe(
            name="ternary",
            summary="exactly ternary weights in 2 bits without loss; int8 for the others",
            target="ort-qgraph",
            rules=(
                _rule("linear", "int2.ch", ternary=True, solver="ternary").model_copy(
                    update={"id": "ternary"}
                ),
                *_TABLES,
                _rule("linear", "int8.g32", "int8.ch", FLOAT),
                *_REST,
            ),
        ),
    )
}


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
