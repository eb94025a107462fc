"""A histogram of floats whose buckets are known before the data: the upper 16 bits of the float32 pattern.

Sign, exponent and 7 bits of mantissa make 65536 buckets, each at most 1/128 of its value wide. No range is needed in
advance, so the model runs once; counts are integers, so merging is exact and the order of the data means nothing.
(HdrHistogram uses the same trick for latencies: https://hdrhistogram.org.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.observers import counting

BUCKETS = 1 << 16
Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(slots=True)
class FloatHistogram:
    """Counts of the finite values of a tensor; memory is touched only where there are values.

    Attributes:
        counts: [65536] int64, by the upper 16 bits of the float32 pattern.
        minimum, maximum: of the finite values, exact; inf and -inf where there are none.
        nonfinite: how many values were NaN or infinite.
    """

    counts: Counts = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    minimum: float = float("inf")
    maximum: float = float("-inf")
    nonfinite: int = 0

    def update(self, values: npt.NDArray[Any]) -> tuple[float, float]:
        """Count a tensor of any shape and float type; its own finite (minimum, maximum)."""
        with np.errstate(over="ignore"):  # float64 beyond float32 counts as infinite
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        low, high, lost = counting.count(flat, self.counts)
        self.widen(low, high)
        self.nonfinite += lost
        return low, high

    def widen(self, low: float, high: float) -> None:
        """Take in the extremes of values that are counted."""
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def merge(self, other: FloatHistogram) -> None:
        """Add another histogram's counts."""
        used = np.flatnonzero(other.counts)
        self.counts[used] += other.counts[used]
        self.widen(other.minimum, other.maximum)
        self.nonfinite += other.nonfinite

    @property
    def total(self) -> int:
        """How many finite values were counted."""
        return int(self.counts.sum())

    def spread(self) -> tuple[Doubles, Doubles, Doubles]:
        """The buckets that hold values, in ascending order: lower edges, upper edges, counts.

        Edges are cut at the exact minimum and maximum, so the outermost buckets do not reach past the data.
        """
        used = np.flatnonzero(self.counts)
        split = int(np.searchsorted(used, BUCKETS // 2))
        used = np.concatenate([used[: split - 1 if split else None : -1], used[:split]])
        inner, outer = _magnitudes()
        magnitude, is_negative = used & 0x7FFF, used >= BUCKETS // 2
        low = np.where(is_negative, -outer[magnitude], inner[magnitude])
        high = np.where(is_negative, -inner[magnitude], outer[magnitude])
        return (
            np.clip(low, self.minimum, self.maximum),
            np.clip(high, self.minimum, self.maximum),
            self.counts[used].astype(np.float64),
        )


@functools.cache
def _magnitudes() -> tuple[Doubles, Doubles]:
    """The edges of each finite bucket that is not negative, the inner and the outer one."""
    edge = (np.arange(0x7F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    edge[-1] = float(2**128)  # the pattern of infinity: one past the largest finite bucket
    return edge[:-1], edge[1:]
