"""Counting floats: the native function, the numpy one, and the definition agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qgraph.observers import FloatHistogram, counting

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)
ODD = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38],
    np.float32,
)


def native(x: Array, counts: Array) -> Any:
    function = counting.native_function()
    assert function is not None, "the native library is absent or too old"
    return counting.by_native(function, x, counts)


WAYS: dict[str, Callable[..., Any]] = {"native": native, "numpy": counting.by_numpy}


def cases() -> dict[str, Array]:
    patterns = RNG.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    runs = np.repeat(RNG.normal(size=3000).astype(np.float32), RNG.integers(1, 40, 3000))
    return {
        "every kind of pattern": patterns,
        "runs": runs,
        "odd": ODD,
        "nothing finite": ODD[2:6],
        "empty": ODD[:0],
        **{
            f"{n} values": RNG.normal(size=n).astype(np.float32)
            for n in (1, 3, 4095, 4096, 4097, 65537)
        },
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", cases())
def test_counts_by_definition(way: str, kind: str) -> None:
    x = cases()[kind]
    counts = np.zeros(65536, np.int64)
    counts[0x3F80] = 5  # counts are added to what is there
    with np.errstate(invalid="ignore"):
        low, high, lost = WAYS[way](x, counts)
    finite = x[np.isfinite(x)]
    expected = np.bincount(finite.view(np.uint32) >> 16, minlength=65536)
    expected[0x3F80] += 5
    assert np.array_equal(counts, expected)
    assert lost == x.size - finite.size
    assert low == (finite.min() if finite.size else np.inf)
    assert high == (finite.max() if finite.size else -np.inf)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_buckets_hold_the_values_that_they_say(dtype: type[np.generic]) -> None:
    x = (RNG.normal(size=5000) * 10.0 ** RNG.integers(-4, 4, 5000)).astype(dtype)
    histogram = FloatHistogram()
    histogram.update(x.reshape(50, 100)[:, ::2])
    x = np.sort(x.reshape(50, 100)[:, ::2].astype(np.float32).ravel())
    low, high, counts = histogram.spread()
    assert counts.sum() == histogram.total == x.size
    assert low[0] == x[0]
    assert high[-1] == x[-1]
    assert (low[1:] >= high[:-1]).all()
    assert (np.abs(high - low) <= np.maximum(np.abs(high), np.abs(low)) / 128).all()
    ends = np.cumsum(counts).astype(int)
    for first, last, a, b in zip(np.append(0, ends[:-1]), ends, low, high, strict=True):
        assert a <= x[first] <= x[last - 1] <= b
