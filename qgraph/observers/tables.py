"""Histograms that the native library fills while a session runs (`ai.qgraph.calibration::Observe`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors, native
from qgraph.observers.histogram import FloatHistogram


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native library where it can fill tables, else None (said by `qgraph doctor`)."""
    try:
        dll = native.load().dll
    except errors.RuntimeFailure:
        return None
    if not hasattr(dll, "qg_table_open"):
        return None
    dll.qg_table_open.restype = ctypes.c_int64
    dll.qg_table_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    dll.qg_table_close.restype = ctypes.c_int32
    dll.qg_table_close.argtypes = [ctypes.c_int64]
    return dll


@contextmanager
def opened(
    histograms: Iterable[FloatHistogram],
) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
    """Tables that fill histograms: their keys, and totals [tables, 2] of values not finite and of all values.

    Nodes add counts and totals; extremes are what they give, and for the caller to take in.
    """
    filled = list(histograms)
    dll = library()
    if filled and dll is None:
        raise AssertionError("tables are asked for only where the library has them")
    totals = np.zeros((len(filled), 2), np.int64)
    keys: list[int] = []
    try:
        for histogram, total in zip(filled, totals, strict=True):
            keys.append(_open(dll, histogram, total))
        yield keys, totals
    finally:
        for key in keys:
            dll.qg_table_close(key)  # type: ignore[union-attr]
        for histogram, total in zip(filled, totals, strict=True):
            histogram.nonfinite += int(total[0])


def _open(dll: Any, histogram: FloatHistogram, total: npt.NDArray[np.int64]) -> int:
    key: int = dll.qg_table_open(histogram.counts.ctypes.data, total.ctypes.data)
    if not key:
        raise MemoryError("the native library has no memory for a table")
    return key
