"""hqq: half-quadratic scales and zero points: a p-norm of the error, p < 1, that a few large weights cannot rule.

In units of the scale and with z as a float, q = round(w/s + z) and the p-norm's shrinkage of w/s - (q - z) take turns.
z is then the mean of q - t, t = w/s less what the shrinkage left, and s the least-squares scale of t. No target of
qgraph stores float zero points (ONNX Runtime expands the weight at each run for them), so z is rounded; as a rounded
z alone seldom moves, s is fitted too, which the source does not do. Blocks keep what `rtn` made of them where that has
the lower norm, or where the squared error would be above that of the covering grid.
Reference: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qgraph import errors, numerics
from qgraph.passes.solvers.rtn import Rtn
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import Codes, Floats, QTensor, QuantSpec

_CHUNK = 1 << 20  # elements of a task


@register
class Hqq(Solver):
    """Round on zero points that lower a p-norm of the error."""

    name = "hqq"

    class Options(SolverOptions):
        """Options of hqq."""

        norm: float = Field(0.7, gt=0, le=1)
        """p of Σ |w - q|^p, of a weight in units of its scale."""
        rounds: int = Field(20, ge=1)
        """How often rounding and shrinking take turns."""
        threads: int = 0
        """Threads to use; 0 is one per core."""

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Quantize w [N, K]; `error` is Σ (w - q)²."""
        assert isinstance(self.options, Hqq.Options)
        if spec.symmetric or spec.is_per_tensor:
            what = f"hqq moves zero points, and {spec} has none" if spec.symmetric else "per tensor"
            raise errors.RecipeError(
                errors.Diagnostic("error", "QG402", "solver hqq", what, "use uint4.g32.asym or rtn")
            )
        start = Rtn(threads=self.options.threads).solve(w, spec, None, rng).stored_as(signed=False)
        size = max(1, _CHUNK // max(w.shape[1], 1))
        parts = [slice(first, first + size) for first in range(0, len(w), size)]
        with ThreadPoolExecutor(self.options.threads or os.cpu_count() or 1) as pool:
            found = list(pool.map(lambda part: self._rows(w[part], _part(start, part)), parts))
        assert start.zero_point is not None
        codes = np.concatenate([start.codes[:0], *(q.codes for q in found)])
        points = [q.zero_point for q in found if q.zero_point is not None]
        zero = np.concatenate([start.zero_point[:0], *points])
        error = float(sum(q.error for q in found))
        scale = np.concatenate([start.scale[:0], *(q.scale for q in found)])
        solved = QTensor(start.spec, codes, scale, zero, error)
        return solved.stored_as(signed=spec.qtype.is_signed)

    def _rows(self, w: npt.NDArray[np.floating[Any]], start: QTensor) -> QTensor:
        """Some rows, from what rtn made of them."""
        assert isinstance(self.options, Hqq.Options) and start.zero_point is not None
        plain = np.array(w, np.float32)
        spec, k = start.spec, plain.shape[1]
        high, scale = float(spec.qtype.qmax), start.scale[:, :, None]
        # In units of the scale a rounding error is at most a half, whatever the size of the weights.
        x, used = _blocks(plain, spec), _blocks(np.ones_like(plain), spec) > 0
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = np.where(used, x / scale, 0).astype(np.float32)
            x = np.clip(np.nan_to_num(x), -2 * high, 2 * high)
        count = np.maximum(used.sum(2, keepdims=True), 1)
        z = start.zero_point[:, :, None].astype(np.float32)
        factor = np.ones_like(z)
        sharpness = 10.0
        for step in range(self.options.rounds + 1):
            if step == self.options.rounds:
                z = np.clip(np.rint(z), 0, high)  # one more turn for the scale that goes with it
            q = np.clip(np.rint(x / factor + z), 0, high)
            off = x / factor - (q - z)
            # The shrinkage of |.|^p, in steps of the grid; small errors vanish, large ones stay.
            size = np.abs(off)
            power = np.maximum(size, 1e-6) ** (self.options.norm - 1)
            target = x - factor * np.sign(off) * np.maximum(size - power / sharpness, 0)
            if step < self.options.rounds:
                z = np.where(used, q - target / factor, 0).sum(2, keepdims=True) / count
            away = np.where(used, q - z, 0)
            square = np.square(away).sum(2, keepdims=True)
            fitted = (target * away).sum(2, keepdims=True) / np.maximum(square, 1e-6)
            factor = np.where(square > 0, np.clip(fitted, 0.5, 2), factor)
            sharpness *= 1.01
        zero: Codes = z[:, :, 0].astype(np.uint8)
        with np.errstate(over="ignore", under="ignore"):
            scales = (start.scale * factor[:, :, 0]).astype(spec.scale_dtype).astype(np.float32)
        scales = np.where(np.isfinite(scales) & (scales > 0), scales, start.scale)
        moved = QTensor(spec, numerics.quantize(plain, scales, zero, spec), scales, zero)
        with np.errstate(over="ignore", invalid="ignore"):
            covering = numerics.min_max_grid(plain, spec)
            bound = _squares(
                plain, QTensor(spec, numerics.quantize(plain, *covering, spec), *covering)
            )
        takes = self.norms(plain, moved) < self.norms(plain, start)
        takes &= _squares(plain, moved) <= np.nan_to_num(bound, nan=np.inf)
        chosen = np.repeat(takes, spec.group or k, axis=1)[:, :k]
        codes = np.where(chosen, moved.codes, start.codes)
        zero = np.where(takes, zero, start.zero_point)
        result = QTensor(spec, codes, np.where(takes, scales, start.scale), zero)
        return replace(result, error=float(_squares(plain, result).sum()))

    def norms(self, w: Floats, q: QTensor) -> npt.NDArray[np.float64]:
        """Σ |w - q|^p of each block [N, G], float64: what this solver lowers."""
        assert isinstance(self.options, Hqq.Options)
        off = _blocks(np.abs(w.astype(np.float64) - q.dequantize()), q.spec)
        total: npt.NDArray[np.float64] = np.power(off, self.options.norm).sum(2)
        return total


def _part(q: QTensor, rows: slice) -> QTensor:
    assert q.zero_point is not None
    return QTensor(q.spec, q.codes[rows], q.scale[rows], q.zero_point[rows])


def _blocks(a: npt.NDArray[Any], spec: QuantSpec) -> npt.NDArray[Any]:
    """[N, G, group] of [N, K]; the last block filled up with zeros."""
    n, k = a.shape
    groups = spec.scale_shape(n, k)[1]
    group = spec.group or k
    padded = np.zeros((n, groups * group), a.dtype)
    padded[:, :k] = a
    return padded.reshape(n, groups, group)


def _squares(w: Floats, q: QTensor) -> npt.NDArray[np.float64]:
    """Σ (w - q)² of each block [N, G]."""
    total: npt.NDArray[np.float64] = np.square(
        _blocks(w.astype(np.float64) - q.dequantize(), q.spec)
    ).sum(2)
    return total
