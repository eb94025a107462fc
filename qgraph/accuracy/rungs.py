"""What a quantized weight may be given back, from a little to all of it.

4-bit weights               → 8-bit weights                    → float
8-bit static activations    → 16 bits, where the target has them → the target's weight-only form → float
8-bit dynamic activations   → the target's weight-only form    → float
8-bit weights                                                  → float

Each of them is a rule like those that a person writes.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass

from qgraph.plan import Decision
from qgraph.recipe import AUTO, FLOAT, STATIC, Rule
from qgraph.report import Entry
from qgraph.spec import WIDE_QTYPES
from qgraph.target import Target

RULE = "accuracy"
"""Name of the rules that accuracy control puts in front of a recipe's own."""

BITS, WIDE, FORM, FLOATS = 1, 2, 3, 4
"""Stages: more bits for weights, wider activations, float activations, float."""

_LINEAR = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to give something back.

    Attributes:
        weights: specs in order of preference, as in a rule.
        activations: as in a rule.
        name: what it is, for people.
    """

    weights: tuple[str, ...]
    activations: str
    name: str

    def rule(self, weight: str, solver: str, reason: str) -> Rule:
        """A rule that gives one weight just this."""
        return Rule(
            id=RULE,
            names=(glob.escape(weight),),
            weights=self.weights,
            activations=self.activations,
            solver=solver,
            reason=reason,
        )


NOTHING = Rung((FLOAT,), FLOAT, "float")


def of(decision: Decision) -> Rung:
    """What a weight has now."""
    assert decision.spec is not None
    return Rung((str(decision.spec),), _activations(decision), str(decision.spec))


def _activations(decision: Decision) -> str:
    if decision.activation is None:
        return FLOAT
    if decision.activation.dynamic:
        return f"int{decision.activation.qtype.bits}"
    return f"{STATIC}:{decision.activation}"


def above(decision: Decision, entry: Entry, target: Target) -> dict[int, Rung]:
    """The rungs above a decision, by stage; not every decision has one at every stage.

    Weights climb stage by stage together, so that none is in float where others could do with 8 bits. A convolution
    with integer activations has only float above it (no kernel computes on its 8-bit weights alone), at the stage
    where products leave theirs.
    """
    assert decision.spec is not None
    found = {FLOATS: NOTHING}
    held = _activations(decision)
    if decision.spec.qtype.stored_bits < 8:
        is_narrow = decision.activation is not None and decision.activation.qtype.bits < 8
        found[BITS] = Rung(("int8.g32", "int8.ch"), FLOAT if is_narrow else held, "8-bit weights")
    if decision.activation is None:
        return found
    wide = _wide(target)
    if held.startswith(STATIC) and wide:
        found[WIDE] = Rung((str(decision.spec),), f"{STATIC}:{wide}", "16-bit activations")
    if _LINEAR & set(entry.operators) and "matmul" in target.auto:
        found[FORM] = Rung((AUTO, FLOAT), FLOAT, "8-bit weights, float activations")
    else:
        found[FORM] = NOTHING
    return found


def _wide(target: Target) -> str:
    """The target's 16-bit type of static activations, "" where it has none."""
    types = target.integers.types if target.integers is not None else ()
    for text in types:
        if text.split(".")[0] in WIDE_QTYPES:
            return text
    return ""
