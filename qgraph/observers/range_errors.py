"""Errors of many grids over one histogram: the native library's function, or numpy where it is absent.

Both add eight sums side by side, each in the order of the edges, and those pairwise: the same bits, so that a range
does not depend on where it was searched.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors, native

SUMS = 8
_AT_ONCE = 16  # grids whose errors numpy finds together: their arrays stay in the cache

Doubles = npt.NDArray[np.float64]
_pointer, _int64, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Task(ctypes.Structure):
    """QgRangeErrors of runtime_ops/qgraph_ops.h."""

    _fields_ = [
        *((name, _pointer) for name in ("at", "weight")),
        *((name, _int64) for name in ("edges", "ranges")),
        ("grids", _pointer),
        *((name, _double) for name in ("outside", "within", "step")),
        ("errors", _pointer),
    ]


@dataclass(frozen=True, slots=True)
class Area:
    """The area under the error from 0 to t, where t lies n + (t - n) steps from it.

        outside (t - n)³ - within clip(t - n, -½, ½)³ + step n

    Attributes:
        outside, within, step: the three factors.
    """

    outside: float
    within: float
    step: float


def sums(at: Doubles, weight: Doubles, grids: Doubles, area: Area) -> Doubles:
    """Σ weight · area(at / scale) for each grid [m], in units of its scale cubed.

    Args:
        at: [edges] float64, their number a multiple of `SUMS`.
        weight: [edges] float64.
        grids: [3, m] float64: one over the scale, the least and the largest code less the zero point.
        area: its factors.
    """
    function = native_function()
    if function is None:
        return by_numpy(at, weight, grids, area)
    return by_native(function, at, weight, grids, area)


@functools.cache
def native_function() -> Callable[..., int] | None:
    """The library's function, or None where the library is absent or too old (said by `qgraph doctor`)."""
    try:
        dll = native.load().dll
    except errors.RuntimeFailure:
        return None
    function: Any = getattr(dll, "qg_range_errors", None)
    if function is None:
        return None
    function.restype = ctypes.c_int32
    function.argtypes = [ctypes.c_int32, ctypes.c_void_p]
    return function  # type: ignore[no-any-return]


def by_native(
    function: Callable[..., int],
    at: Doubles,
    weight: Doubles,
    grids: Doubles,
    area: Area,
    isa: int = -1,
) -> Doubles:
    """`sums` in the native library; `isa` is a number of `native.Native.isas`, -1 for the one in use."""
    found = np.empty(grids.shape[1])
    task = _Task(
        _address(at), _address(weight), at.size, found.size, _address(grids),
        area.outside, area.within, area.step, _address(found),
    )  # fmt: skip
    status = function(isa, ctypes.byref(task))
    if status:
        raise AssertionError(f"qg_range_errors refuses {at.size} edges: status {status}")
    return found


def _address(array: Doubles) -> int:
    assert array.dtype == np.float64 and array.flags.c_contiguous
    return array.ctypes.data


def by_numpy(at: Doubles, weight: Doubles, grids: Doubles, area: Area) -> Doubles:
    """`sums` in numpy: many times slower, the same bits."""
    found = np.empty(grids.shape[1])
    for start in range(0, found.size, _AT_ONCE):
        inverse, low, high = grids[:, start : start + _AT_ONCE, None]
        t = at * inverse
        n = np.rint(np.minimum(np.maximum(t, low), high))
        t -= n
        inside = np.minimum(np.maximum(t, -0.5), 0.5)
        each = t * t * t * area.outside - inside * inside * inside * area.within
        each += n * area.step
        each *= weight
        for index, row in enumerate(each, start):
            side = np.add.reduce(row.reshape(-1, SUMS), axis=0)
            while side.size > 1:
                side = side[: side.size // 2] + side[side.size // 2 :]
            found[index] = side[0]
    return found
