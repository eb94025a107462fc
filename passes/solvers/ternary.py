"""ternary: weights that already are {-s, 0, s} per row → their codes and scales, exactly.

For models that were trained ternary (BitNet b1.58): nothing is rounded, whatever the scale. Any other weight is an
error; a rule with `ternary = true` selects those that are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors, ternary
from qgraph.registry import register
from qgraph.solver import Solver, WeightStats
from qgraph.spec import QTensor, QuantSpec


@register
class Ternary(Solver):
    """Read off the codes of exactly ternary weights."""

    name = "ternary"

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Codes -1, 0, 1 and a scale per row; `error` is 0."""
        found = ternary.decompose(w)
        if found is None or spec.block != (1, 0) or not spec.symmetric:
            what = f"the weight is not ternary, or {spec} is not a symmetric spec per channel"
            raise errors.RecipeError(
                errors.Diagnostic(
                    "error", "QG402", "solver ternary", what, "select with ternary = true, int2.ch"
                )
            )
        codes, scale = found
        signed = QuantSpec(spec.storage(signed=True).qtype, spec.block, True, "float32")
        return QTensor(signed, codes, scale, None, 0.0).stored_as(signed=spec.qtype.is_signed)
