"""The plan: what shall be quantized how, and why. It lives from `assign-precision` to `insert-qdq`, nowhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from qgraph.spec import QTensor, QuantSpec

if TYPE_CHECKING:
    from qgraph.observers import Grid

Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision about one tensor.

    Attributes:
        value: name of the tensor.
        role: "weight" or "activation".
        spec: how to quantize, or None to stay float.
        solver: name of the solver (weights).
        reason: why, as the report prints it.
        by: the rule or pass that decided.
        code: diagnostic code of a "stays float" reason, "" where it is quantized.
        forms: for each use of a weight, in order, the name of the form that the target chose ("" stays float).
        activation: for a weight: how its operator's input is quantized, or None for float.
        grid: for an activation: its scale and zero point, None where it stays float.
        shares: for an activation: the first value of those that share the grid.
    """

    value: str
    role: Role
    spec: QuantSpec | None
    solver: str = ""
    reason: str = ""
    by: str = ""
    code: str = ""
    forms: tuple[str, ...] = ()
    activation: QuantSpec | None = None
    grid: Grid | None = None
    shares: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "value": self.value,
            "role": self.role,
            "spec": str(self.spec) if self.spec else None,
            "activation": str(self.activation) if self.activation else None,
            "solver": self.solver,
            "reason": self.reason,
            "by": self.by,
            "code": self.code,
            "forms": list(self.forms),
            "grid": [self.grid.scale, self.grid.zero_point] if self.grid else None,
            "shares": self.shares,
        }


@dataclass
class QuantPlan:
    """All decisions, and the solved weights until `insert-qdq` takes them.

    Attributes:
        decisions: by tensor name.
        solved: QTensor by weight name; emptied as weights are written into the graph.
        operators: first output of each operator that shall compute on codes → its inputs that have grids.
        absorbed: outputs of the Relu and Clip nodes whose bounds the grid behind them applies.
        moves: outputs of the operators that pass codes on.
        corrections: first output of an operator → what its weight's rounding adds to the mean of each output channel
            [C]; insert-qdq takes it off the bias.
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    solved: dict[str, QTensor] = field(default_factory=dict)
    operators: dict[str, tuple[int, ...]] = field(default_factory=dict)
    absorbed: list[str] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)
    corrections: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def grids(self) -> dict[str, Grid]:
        """The static grids by value name, in plan order."""
        return {d.value: d.grid for d in self.decisions.values() if d.grid is not None}

    def add(self, decision: Decision) -> None:
        """Record a decision; the last one about a tensor holds."""
        self.decisions[decision.value] = decision

    def quantized(self) -> list[Decision]:
        """The decisions that quantize a weight, in plan order."""
        return [d for d in self.decisions.values() if d.role == "weight" and d.spec is not None]

    def to_json(self) -> str:
        """The decisions as JSON, in plan order."""
        return json.dumps([d.to_json() for d in self.decisions.values()], indent=1)

    @staticmethod
    def from_json(text: str) -> QuantPlan:
        """Read what `to_json` wrote (decisions only; solved weights are not part of it)."""
        from qgraph.observers import Grid

        plan = QuantPlan()
        for entry in json.loads(text):
            for key in ("spec", "activation"):
                entry[key] = QuantSpec.parse(entry[key]) if entry[key] else None
            if entry["grid"]:
                scale, zero_point = entry["grid"]
                entry["grid"] = Grid(scale, zero_point, entry["spec"])
            plan.add(Decision(**{**entry, "forms": tuple(entry["forms"])}))
        return plan
