"""rtn: round to nearest on the best grid that a search finds, block by block.

For each block, candidate scales around the covering one are tried; each is refitted by least squares,
s = Σ i w q / Σ i q², and the least weighted squared error wins, with the scale as it will be stored. Symmetric grids
use all 2^b codes and may have a negative scale; asymmetric ones include 0. Never worse than min-max rounding.

The search runs in the native library, rows spread over threads (`runtime_ops/kernels/rtn_*`).
Reference: the importance-weighted search of llama.cpp's quantize tool and of AutoRound's RTN mode.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import native
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import Codes, QTensor, QuantSpec

_CHUNK = 1 << 19  # elements per task: a few megabytes per thread, whatever the size of the matrix
_BAND = 128
_PADDING = 16


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
            result = _Result(spec, 1, n * k)
            repeated = None if importance is None else np.tile(importance, n)
            result.search(slice(0, 1), _Reader(w, n)(slice(0, n)).reshape(1, -1), repeated)
            return result.tensor((n, k))
        result = _Result(spec, n, k)
        rows = min(n, max(1, _CHUNK // max(k, 1)))
        read = _Reader(w, rows)
        parts = [slice(start, start + rows) for start in range(0, n, max(rows, 1))]
        with ThreadPoolExecutor(self.options.threads or os.cpu_count() or 1) as pool:
            for _ in pool.map(lambda part: result.search(part, read(part), importance), parts):
                pass
        return result.tensor((n, k))


@register
class RtnImportance(Rtn):
    """The same with the mean of x² of each input channel as importance: where inputs are large, weights are exact."""

    name = "rtn-importance"
    statistics = "importance"


class _Result:
    """Codes, scales and zero points of a matrix, filled by the rows."""

    def __init__(self, spec: QuantSpec, n: int, k: int) -> None:
        # The search makes signed codes for symmetric grids and unsigned ones for the others.
        self._asked = spec
        self._spec = replace(spec, qtype=spec.storage(signed=spec.symmetric).qtype)
        blocks = spec.scale_shape(n, k)
        container: Any = self._spec.qtype.container
        self._codes: Codes = np.empty((n, k), container)
        self._scale = np.empty(blocks, np.float32)
        self._zero_point = None if spec.symmetric else np.empty(blocks, np.uint8)
        self._error = np.empty(n, np.float64)

    def search(
        self,
        part: slice,
        w: npt.NDArray[np.float32],
        importance: npt.NDArray[np.float32] | None,
    ) -> None:
        """Solve some rows."""
        spec = self._spec
        codes, scale, zero_point, error = native.rtn_search(
            w,
            group=spec.group or max(w.shape[1], 1),
            bits=spec.qtype.bits,
            symmetric=spec.symmetric,
            importance=importance,
            scale_dtype=spec.scale_dtype,
            # With 8 bits the 128th negative code buys nothing, and integer kernels of some runtimes want scales > 0.
            signed_scale=spec.qtype.stored_bits < 8,
        )
        self._codes[part], self._scale[part], self._error[part] = codes, scale, error
        if zero_point is not None and self._zero_point is not None:
            self._zero_point[part] = zero_point

    def tensor(self, shape: tuple[int, int]) -> QTensor:
        """What was found, as a matrix of that shape, in the type that was asked for."""
        codes: Codes = self._codes.reshape(shape)
        error = float(self._error.sum())
        found = QTensor(self._spec, codes, self._scale, self._zero_point, error)
        return found.stored_as(signed=self._asked.qtype.is_signed)


class _Reader(threading.local):
    """Reads rows of w as contiguous float32, each thread into memory of its own that it uses again and again.

    A MatMul's weight is stored [K, N], so these are columns of the file. They are read in bands of a few of its rows,
    through a buffer whose padded rows do not fight for one set of the cache: five times the speed of a plain copy.
    """

    def __init__(self, w: npt.NDArray[np.floating[Any]], most: int) -> None:
        self._w = w
        self._is_turned = w.strides[0] < w.strides[1]
        self._rows = np.empty((most, w.shape[1]), np.float32)
        self._band = np.empty((_BAND, most + _PADDING), np.float32)

    def __call__(self, part: slice) -> npt.NDArray[np.float32]:
        """Some rows, at most `most`; they hold until the next call."""
        w = self._w[part]
        rows = self._rows[: len(w)]
        if not self._is_turned:
            rows[:] = w
            return rows
        for start in range(0, w.shape[1], _BAND):
            columns = slice(start, start + _BAND)
            band = self._band[: w[:, columns].shape[1], : len(w)]
            band[:] = w[:, columns].T
            rows[:, columns] = band.T
        return rows
