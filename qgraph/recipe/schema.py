"""What a recipe and a rule are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from qgraph import registry
from qgraph.budget import Budget
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
    choices: tuple[str, ...] = ()
    """Specs between which a budget or a floor chooses, weight by weight (`qgraph.mixed`); "float" keeps it."""
    reason: str = ""
    """What the report says."""

    @property
    def is_static(self) -> bool:
        """Whether activations are put on calibrated grids."""
        return self.activations.partition(":")[0] == STATIC

    @field_validator("ops", "names", "weights", "choices", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (
            (value,)
            if isinstance(value, str)
            else tuple(value)
            if isinstance(value, list)
            else value
        )

    @field_validator("weights", "choices")
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
    budget: Budget = Budget()
    """What the weights with choices may take."""
    seed: int = 0

    @field_validator("pipeline", "rules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without samples: a pass observes, or a solver wants to know a weight's inputs."""
        solvers = {registry.get("solver", rule.solver) for rule in self.rules}
        observes = bool({"observe", "smooth", "awq"} & set(self.pipeline))
        return observes or any(s.statistics != "none" for s in solvers)

    @staticmethod
    def default() -> Recipe:
        """The recipe `auto`."""
        from qgraph.recipe.presets import PRESETS

        return PRESETS["auto"]

    def to_json(self) -> str:
        """The recipe as JSON that `load` reads back to an equal recipe."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)
