"""Histograms that the native library fills while a session runs (`ai.qgraph.calibration::Observe`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

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
def opened(histograms: Iterable[FloatHistogram]) -> Iterator[list[int]]:
    """Keys of tables, one for each histogram: what nodes count under a key is in the histogram afterwards.

    Counts and the number of non-finite values only; extremes are what the nodes give.
    """
    filled = list(histograms)
    dll = library()
    if filled and dll is None:
        raise AssertionError("tables are asked for only where the library has them")
    lost = np.zeros(len(filled), np.int64)
    keys: list[int] = []
    try:
        for index, histogram in enumerate(filled):
            keys.append(_open(dll, histogram, lost[index:]))
        yield keys
    finally:
        for key in keys:
            dll.qg_table_close(key)  # type: ignore[union-attr]
        for histogram, count in zip(filled, lost, strict=True):
            histogram.nonfinite += int(count)


def _open(dll: Any, histogram: FloatHistogram, lost: Any) -> int:
    key: int = dll.qg_table_open(histogram.counts.ctypes.data, lost.ctypes.data)
    if not key:
        raise MemoryError("the native library has no memory for a table")
    return key
