"""Exactly ternary weights: each row of the matrix [N, K] holds -s, 0 and s alone, whatever its s."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import graph
from qgraph.spec import Codes, Floats
from qgraph.weights import Use

_CHUNK = 1 << 22  # elements looked at together


def decompose(w: npt.NDArray[np.floating[Any]]) -> tuple[Codes, Floats] | None:
    """Codes [N, K] in {-1, 0, 1} and scales [N, 1] with w = codes * scales exactly, or None.

    A row of zeros has the scale of the first row that has one.

    >>> decompose(np.array([[0.5, -0.5, 0], [0, 2, 2]]))[1].tolist()
    [[0.5], [2.0]]
    >>> decompose(np.array([[0.5, 0.25]])) is None
    True
    """
    n, k = w.shape
    codes = np.empty((n, k), np.int8)
    scales = np.empty((n, 1), np.float32)
    rows = max(1, _CHUNK // max(k, 1))
    for start in range(0, n, rows):
        part = np.asarray(w[start : start + rows])
        peak = np.abs(part).max(axis=1, keepdims=True, initial=0)
        sign = np.sign(part)
        if not np.isfinite(peak).all() or not (part == sign * peak).all():
            return None
        codes[start : start + rows] = sign
        scales[start : start + rows] = peak
    used = scales[scales > 0]
    scales[scales == 0] = used[0] if used.size else 1
    return codes, scales


def is_ternary(use: Use) -> bool:
    """Whether the constant that an operator reads is an exactly ternary matrix."""
    value = use.node.inputs[use.index] if use.through is None else use.through.inputs[0]
    if not graph.is_constant(value):
        return False
    assert value is not None
    w = use.matrix.of(graph.array(value))
    # Most weights fail in their first row.
    return decompose(w[:1]) is not None and decompose(w) is not None
