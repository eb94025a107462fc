"""Counting floats into buckets in one pass: the native library's function, or numpy where it is absent."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors, native

_CHUNK = 1 << 16  # floats; the temporary arrays of the numpy way stay in the cache
_INFINITE = 0x7F80
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def count(values: Floats, counts: Counts) -> tuple[float, float, int]:
    """Add the finite values [n] to counts [65536], by the upper 16 bits of their pattern.

    Returns:
        The smallest and the largest finite value (inf and -inf where there are none), and how many were not finite.
    """
    function = native_function()
    low, high, lost = (
        by_numpy(values, counts) if function is None else by_native(function, values, counts)
    )
    return low + 0.0, high + 0.0, lost  # never -0.0, which both ways may find or not


@functools.cache
def native_function() -> Callable[..., int] | None:
    """The library's function, or None where the library is absent or too old (said by `qgraph doctor`)."""
    try:
        dll = native.load().dll
    except errors.RuntimeFailure:
        return None
    function: Any = getattr(dll, "qg_count_floats", None)
    if function is None:
        return None
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return function  # type: ignore[no-any-return]


def by_native(
    function: Callable[..., int], values: Floats, counts: Counts
) -> tuple[float, float, int]:
    """`count` in the native library."""
    extremes = np.empty(2, np.float32)
    lost = function(values.ctypes.data, values.size, counts.ctypes.data, extremes.ctypes.data)
    return float(extremes[0]), float(extremes[1]), int(lost)


def by_numpy(values: Floats, counts: Counts) -> tuple[float, float, int]:
    """`count` in numpy: several times slower, the same numbers."""
    low, high, lost = float("inf"), float("-inf"), 0
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        bucket = (chunk.view(np.uint32) >> 16).astype(np.uint16)
        finite = (bucket & _INFINITE) != _INFINITE
        if not finite.all():
            lost += int(finite.size - np.count_nonzero(finite))
            chunk, bucket = chunk[finite], bucket[finite]
        if not chunk.size:
            continue
        found = np.bincount(bucket, minlength=0)
        used = np.flatnonzero(found)
        counts[used] += found[used]
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    return low, high, lost
