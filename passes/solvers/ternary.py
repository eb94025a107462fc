"""ternary: weights → codes -1, 0, 1 and a scale per row.

Exactly, by default: weights that already are {-s, 0, s} per row (BitNet b1.58) are read off whatever the scale; any
other weight is an error, and a rule with `ternary = true` selects those that are. With `fit`, any weight: "absmean" as
BitNet trains, s = mean |w|, codes round(w / s); or "least-squares", the codes and scale of least Σ i (w - s q)². For a
given s a code is best where |w| > s / 2, so the largest |w| of a row are kept, and of each number of these the best
scale and error are known from sums: Σ i w² - (Σ kept i |w|)² / Σ kept i.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qgraph import errors, ternary
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import Codes, Floats, QTensor, QuantSpec


@register
class Ternary(Solver):
    """Read off the codes of exactly ternary weights; by option, fit them to any."""

    name = "ternary"

    class Options(SolverOptions):
        """Options of ternary."""

        fit: Literal["exact", "absmean", "least-squares"] = "exact"
        """Refuse weights that are not ternary, or what to make of them."""

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Codes -1, 0, 1 and a scale per row; `error` is Σ importance (w - q)²."""
        assert isinstance(self.options, Ternary.Options)
        found = ternary.decompose(w)
        error = 0.0
        if found is None and self.options.fit != "exact":
            importance = None if stats is None else stats.importance
            rows = np.asarray(w, np.float32)
            weights = np.ones(w.shape[1], np.float32) if importance is None else importance
            found = _absmean(rows) if self.options.fit == "absmean" else _fitted(rows, weights)
            off = np.square(rows.astype(np.float64) - found[0] * found[1])
            error = float((off * weights).sum())
        if found is None or spec.block != (1, 0) or not spec.symmetric:
            what = f"the weight is not ternary, or {spec} is not a symmetric spec per channel"
            raise errors.RecipeError(
                errors.Diagnostic(
                    "error",
                    "QG402",
                    "solver ternary",
                    what,
                    "select with ternary = true, int2.ch, or set fit",
                )
            )
        codes, scale = found
        signed = QuantSpec(spec.storage(signed=True).qtype, spec.block, True, "float32")
        return QTensor(signed, codes, scale, None, error).stored_as(signed=spec.qtype.is_signed)


def _absmean(w: Floats) -> tuple[Codes, Floats]:
    scale = np.abs(w).mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    scale[scale == 0] = 1
    return np.clip(np.rint(w / scale), -1, 1).astype(np.int8), scale


def _fitted(w: Floats, importance: Floats) -> tuple[Codes, Floats]:
    """Codes [N, K] and scales [N, 1] of least weighted error."""
    size = np.abs(w).astype(np.float64)
    order = np.argsort(-size, axis=1, kind="stable")
    weights = np.asarray(importance, np.float64)[order]
    along = np.cumsum(weights * np.take_along_axis(size, order, 1), axis=1)
    square = np.cumsum(weights, axis=1)
    gain = np.divide(along**2, square, out=np.zeros_like(along), where=square > 0)
    best = gain.argmax(axis=1)[:, None]
    at = np.take_along_axis(along, best, 1), np.take_along_axis(square, best, 1)
    scale = np.divide(*at, out=np.ones_like(at[0]), where=(at[0] > 0) & (at[1] > 0))
    stored = np.maximum(scale.astype(np.float32), np.finfo(np.float32).tiny)
    return np.where(size > scale / 2, np.sign(w), 0).astype(np.int8), stored
