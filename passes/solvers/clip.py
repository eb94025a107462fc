"""clip: round to nearest, each group on the range that costs its outputs least.

    min over ranges r of  e G eᵀ,  e = w - round(w; r) [1, g],  G [g, g] the Gram matrix of the group's inputs

The clip search of AWQ (Lin et al. 2023, arXiv:2306.00978) on second moments instead of rows: for each group the
covering range is shrunk step by step to a half, and the grids that rtn finds, with and without the mean of x² as
weights, stand for election too. No group is worse than with rtn, under its own G.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qgraph import numerics
from qgraph.passes.solvers.rtn import Rtn
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import QTensor, QuantSpec

Doubles = npt.NDArray[np.float64]
_CHUNK = 1 << 19  # elements of a task
_LEAST = 0.5  # of the covering range


@register
class Clip(Solver):
    """Round to nearest with each group's range chosen by the error of its outputs."""

    name = "clip"
    statistics = "blocks"

    class Options(SolverOptions):
        """Options of clip."""

        steps: int = Field(10, ge=1)
        """Ranges that are tried beside those of rtn, from the covering one down to a half of it."""
        threads: int = 0
        """Threads to use; 0 is one per core."""

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Quantize w [N, K]; `error` is the sum of e G eᵀ over the groups."""
        assert isinstance(self.options, Clip.Options)
        plain = Rtn(threads=self.options.threads)
        gram = None if stats is None else stats.gram
        if stats is None or gram is None:
            return plain.solve(w, spec, stats, rng)
        known = WeightStats(importance=_importance(np.diag(gram)))
        candidates = [plain.solve(w, spec, s, rng) for s in (None, known)]
        n, k = w.shape
        blocks = _Blocks(np.asarray(gram, np.float64), spec.group or k)
        # One scale for all rows is one decision for all of them.
        rows = n if spec.is_per_tensor else max(1, min(n, _CHUNK // max(k, 1)))
        parts = [slice(i, i + rows) for i in range(0, n, max(rows, 1))]
        shrinks = 1 - (1 - _LEAST) * np.arange(self.options.steps) / self.options.steps

        def best(part: slice) -> QTensor:
            here = np.asarray(w[part], np.float32)
            held = [_rows(c, part, spec) for c in candidates]
            return _elect(here, [*held, *_shrunk(here, held[0].spec, shrinks)], blocks)

        with ThreadPoolExecutor(self.options.threads or os.cpu_count() or 1) as pool:
            found = list(pool.map(best, parts))
        return _joined(found, candidates[0])


class _Blocks:
    """The diagonal blocks of a Gram matrix [K, K], one for each group of columns."""

    def __init__(self, gram: Doubles, group: int) -> None:
        self._gram, self._group = gram, group

    def cost(self, e: Doubles) -> Doubles:
        """The costs e G eᵀ of each row and group: [N, groups]."""
        found = []
        for start in range(0, e.shape[1], max(self._group, 1)):
            own = slice(start, start + self._group)
            part = e[:, own]
            found.append(np.einsum("nk,nk->n", part @ self._gram[own, own], part))
        return np.maximum(np.stack(found, axis=1), 0) if found else np.zeros((len(e), 1))


def _shrunk(w: npt.NDArray[np.float32], spec: QuantSpec, shrinks: Doubles) -> Iterator[QTensor]:
    """The weights on grids that cover some of its range."""
    for shrink in shrinks:
        scale, zero_point = numerics.min_max_grid(w * np.float32(shrink), spec)
        yield QTensor(spec, numerics.quantize(w, scale, zero_point, spec), scale, zero_point)


def _elect(w: npt.NDArray[np.float32], candidates: list[QTensor], blocks: _Blocks) -> QTensor:
    """For each group the candidate that costs least, the first of equals."""
    spec, (n, k) = candidates[0].spec, w.shape
    least: Doubles | None = None
    codes, scale = candidates[0].codes.copy(), candidates[0].scale.copy()
    zero_point = candidates[0].zero_point
    zero_point = None if zero_point is None else zero_point.copy()
    for each in candidates:
        cost = blocks.cost(w.astype(np.float64) - each.dequantize())
        if spec.is_per_tensor:
            cost = cost.sum(keepdims=True)
        if least is None:
            least = cost
            continue
        better = cost < least
        least = np.where(better, cost, least)
        scale[better] = each.scale[better]
        if zero_point is not None and each.zero_point is not None:
            zero_point[better] = each.zero_point[better]
        wide = np.broadcast_to(numerics.expand(better, spec, n, k), (n, k))
        codes[wide] = each.codes[wide]
    assert least is not None
    return QTensor(spec, codes, scale, zero_point, float(least.sum()))


def _rows(q: QTensor, part: slice, asked: QuantSpec) -> QTensor:
    """Some rows of a solved matrix, in the codes that the asked type has."""
    own = slice(None) if asked.is_per_tensor else part
    zero_point = None if q.zero_point is None else q.zero_point[own]
    return QTensor(q.spec, q.codes[part], q.scale[own], zero_point)


def _joined(found: list[QTensor], whole: QTensor) -> QTensor:
    """Rows put together again; `whole` where there are none."""
    if not found:
        return whole
    zero_points: list[Any] = [q.zero_point for q in found if q.zero_point is not None]
    return QTensor(
        found[0].spec,
        np.concatenate([q.codes for q in found]),
        np.concatenate([q.scale for q in found]),
        np.concatenate(zero_points) if zero_points else None,
        math.fsum(q.error for q in found),
    )


def _importance(power: Doubles) -> npt.NDArray[np.float32]:
    """Mean x² [K] over a power of two, so that float32 holds its products."""
    mean = float(power.mean()) if power.size else 0.0
    scaled: npt.NDArray[np.float32] = np.ldexp(power, -math.frexp(mean)[1]).astype(np.float32)
    return scaled
