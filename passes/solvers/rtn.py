"""rtn: round to nearest on the best grid that a search finds, block by block.

For each block, candidate scales around the covering one are tried; each is refitted by least squares,
s = Σ i w q / Σ i q², and the least weighted squared error wins, with the scale as it will be stored. Symmetric grids
use all 2^b codes and may have a negative scale; asymmetric ones include 0. Never worse than min-max rounding.

The search runs in the native library, rows spread over threads (`runtime_ops/kernels/rtn_*`).
Reference: the importance-weighted search of llama.cpp's quantize tool and of AutoRound's RTN mode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import native
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import QTensor, QuantSpec

_CHUNK = 1 << 20  # elements per task: few megabytes per thread, whatever the size of the matrix


@register
class Rtn(Solver):
    """Round to nearest with scale search and least-squares refit."""

    name = "rtn"

    class Options(SolverOptions):
        """Options of rtn."""

        threads: int = 0
        """Threads to use; 0 is one per core."""

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Quantize w [N, K]; `error` is Σ importance (w - q)²."""
        assert isinstance(self.options, Rtn.Options)
        n, k = w.shape
        importance = None if stats is None else stats.importance
        if spec.is_per_tensor:
            # One block: the whole matrix is a single row to the search.
            repeated = None if importance is None else np.tile(importance, n)
            found = _search(np.ascontiguousarray(w, np.float32).reshape(1, -1), spec, repeated)
            return _assemble(spec, (n, k), [found])
        rows = max(1, _CHUNK // max(k, 1))
        chunks: Iterator[slice] = (slice(start, start + rows) for start in range(0, n, rows))
        with ThreadPoolExecutor(self.options.threads or os.cpu_count() or 1) as pool:
            parts = list(
                pool.map(
                    lambda part: _search(
                        np.ascontiguousarray(w[part], np.float32), spec, importance
                    ),
                    chunks,
                )
            )
        return _assemble(spec, (n, k), parts)


_Part = tuple[
    npt.NDArray[Any], npt.NDArray[np.float32], "npt.NDArray[Any] | None", npt.NDArray[np.float64]
]


def _search(
    w: npt.NDArray[np.float32], spec: QuantSpec, importance: npt.NDArray[np.float32] | None
) -> _Part:
    return native.rtn_search(
        w,
        group=spec.group or max(w.shape[1], 1),
        bits=spec.qtype.bits,
        symmetric=spec.symmetric,
        importance=importance,
        scale_dtype=spec.scale_dtype,
        # With 8 bits the 128th negative code buys nothing, and integer kernels of some runtimes want scales > 0.
        signed_scale=spec.qtype.bits < 8,
    )


def _assemble(spec: QuantSpec, shape: tuple[int, int], parts: list[_Part]) -> QTensor:
    scale_shape = spec.scale_shape(*shape)

    def joined(index: int, want: tuple[int, int], dtype: Any) -> npt.NDArray[Any]:
        if not parts:
            return np.zeros(want, dtype)
        return np.concatenate([p[index] for p in parts]).reshape(want)

    signed = QuantSpec(
        spec.storage(signed=spec.symmetric).qtype, spec.block, spec.symmetric, spec.scale_dtype
    )
    zero_point = None if spec.symmetric else joined(2, scale_shape, np.uint8)
    error = float(sum(float(p[3].sum()) for p in parts))
    found = QTensor(
        signed,
        joined(0, shape, signed.qtype.container),
        joined(1, scale_shape, np.float32),
        zero_point,
        error,
    )
    return found.stored_as(signed=spec.qtype.is_signed)
