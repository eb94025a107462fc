"""From statistics to a grid: which range of values the codes of an activation cover.

    min-max          everything that was seen
    moving-average   the mean over samples of each sample's extremes. Krishnamoorthi 2018
                     (arXiv:1806.08342, 3.1) averages exponentially, which depends on the order of the samples
    percentile       all but the outermost share. Wu et al. 2020 (arXiv:2004.09602, 3.2)
    entropy          least KL divergence between values and clipped values. Migacz, 8-bit inference with
                     TensorRT, GTC 2017
    mse              least squared error, rounding and clipping together, clipping four times as heavy. Choukroun et
                     al. 2019 (arXiv:1902.06822) without that weight; the default: it is the error that the next
                     layer sees

A range always holds 0, so that padding and ReLU stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qgraph import errors, numerics
from qgraph.observers import entropy, mse
from qgraph.observers.histogram import Doubles, FloatHistogram
from qgraph.observers.stats import Choice, TensorStats
from qgraph.spec import QuantSpec

SENTINEL_RATIO = 2.0**8  # an empty stretch this wide parts sentinels from values
SENTINEL_SPAN = 4.0  # sentinels, with what was added to them, differ by no more than this factor
SENTINEL_LEAST = 1e3  # masks are -10000 and beyond


@dataclass(frozen=True, slots=True)
class Grid:
    """A per-tensor grid: value ≈ (code - zero_point) * scale. The scale is a float32 (or float16) value."""

    scale: float
    zero_point: int
    spec: QuantSpec

    @property
    def low(self) -> float:
        """The smallest value on the grid."""
        return (self.spec.qtype.qmin - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest value on the grid."""
        return (self.spec.qtype.qmax - self.zero_point) * self.scale


@dataclass(frozen=True, slots=True)
class NoGrid:
    """Why a tensor gets no grid."""

    reason: str


Range: TypeAlias = tuple[float, float]
Method: TypeAlias = Callable[[TensorStats, QuantSpec, float], Range]


def choose(
    stats: TensorStats,
    spec: QuantSpec,
    method: str | Choice = "mse",
    *,
    percentile: float = 99.99,
    clip_sentinels: bool = False,
) -> Grid | NoGrid:
    """The per-tensor grid of an activation.

    Args:
        stats: what was seen.
        spec: type of the codes, symmetric or not; its block is not looked at.
        method: one of METHODS; or a Choice, which holds the options that follow too (`Stats.choice`).
        percentile: share of the values that "percentile" covers, in percent.
        clip_sentinels: leave masked logits and infinities out of the range instead of refusing the tensor.

    Raises:
        errors.RecipeError: QG305 for an unknown method or a percentile outside (50, 100].
    """
    if isinstance(method, Choice):
        percentile, clip_sentinels = method.percentile, method.clip_sentinels
        method = method.method
    if method not in METHODS:
        _refuse("method", f"cannot be {method!r}", errors.nearest(method, METHODS))
    if not 50 < percentile <= 100:
        _refuse("percentile", f"is {percentile:g}", "give a number over 50, at most 100")
    if not stats.count:
        return NoGrid("calibration saw no finite value of it")
    if stats.nonfinite and not clip_sentinels:
        return NoGrid(f"{stats.nonfinite} of its values are NaN or infinite")
    limit = sentinel(stats.histogram)
    if limit is not None:
        if not clip_sentinels:
            worst = max(stats.maximum, stats.minimum, key=abs)
            return NoGrid(
                f"it holds sentinels such as {worst:.3g} (masked logits?), other values end at {limit:.3g}"
            )
        stats = without(stats, limit)
    low, high = METHODS[method](stats, spec, percentile)
    scale, zero_point = numerics.range_grid(low, high, spec)
    return Grid(scale, zero_point, spec)


def sentinel(histogram: FloatHistogram) -> float | None:
    """The largest magnitude of ordinary values where others lie far beyond them, else None.

    Sentinels are of magnitude 1000 or more, within a factor of 4 of each other, and nothing lies between them and
    1/256 of them: masked logits (-10000, -1e9, -3.4e38), with attention scores added to them or not.
    """
    low, high, _ = histogram.spread()
    # Of buckets [low, high) below zero, the upper edge is the inner one.
    inner = np.sort(np.minimum(np.abs(low), np.abs(high)))
    outer = np.sort(np.maximum(np.abs(low), np.abs(high)))
    if inner.size < 2:
        return None
    gaps = np.flatnonzero(
        (inner[1:] >= SENTINEL_RATIO * outer[:-1])
        & (inner[1:] >= SENTINEL_LEAST)
        & (inner[1:] * SENTINEL_SPAN >= outer[-1])
        & (
            outer[:-1] > 1e-30
        )  # exact zeros alone (a mask that was not added yet) need no other grid
    )
    return float(outer[gaps[0]]) if gaps.size else None


def without(stats: TensorStats, limit: float) -> TensorStats:
    """The statistics of the values within ±limit alone; averages over samples become the extremes of all."""
    kept = TensorStats()
    low, high, counts = stats.histogram.spread()
    inside = np.maximum(np.abs(low), np.abs(high)) <= limit
    kept.histogram.minimum, kept.histogram.maximum = (
        float(low[inside].min()),
        float(high[inside].max()),
    )
    numbers = np.ascontiguousarray((low[inside] + high[inside]) / 2, np.float32)
    kept.histogram.counts[numbers.view(np.uint32) >> 16] = counts[inside]
    return kept


def _min_max(stats: TensorStats, spec: QuantSpec, percentile: float) -> Range:
    return stats.minimum, stats.maximum


def _moving_average(stats: TensorStats, spec: QuantSpec, percentile: float) -> Range:
    return stats.average_extremes if stats.samples else (stats.minimum, stats.maximum)


def _percentile(stats: TensorStats, spec: QuantSpec, percentile: float) -> Range:
    low, high, counts = stats.histogram.spread()
    tail = (100 - percentile) / 100
    if spec.symmetric:
        cut = quantile(*folded(low, high, counts), 1 - tail)
        return -cut, cut
    # A tensor without negative values (after ReLU) has one tail.
    share = tail / 2 if stats.minimum < 0 < stats.maximum else tail
    lowest = quantile(low, high, counts, share) if stats.minimum < 0 else 0.0
    highest = quantile(low, high, counts, 1 - share) if stats.maximum > 0 else 0.0
    return lowest, highest


def _entropy(stats: TensorStats, spec: QuantSpec, percentile: float) -> Range:
    threshold = entropy.threshold(
        *folded(*stats.histogram.spread()), levels=2 ** (spec.qtype.bits - 1)
    )
    return max(stats.minimum, -threshold), min(stats.maximum, threshold)


def _mse(stats: TensorStats, spec: QuantSpec, percentile: float) -> Range:
    return mse.best_range(stats.histogram, spec)


METHODS: Mapping[str, Method] = {
    "mse": _mse,
    "min-max": _min_max,
    "moving-average": _moving_average,
    "percentile": _percentile,
    "entropy": _entropy,
}


def folded(low: Doubles, high: Doubles, counts: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """The histogram of |x|, ascending, from that of x."""
    inner, outer = np.minimum(np.abs(low), np.abs(high)), np.maximum(np.abs(low), np.abs(high))
    order = np.argsort(inner, kind="stable")
    return inner[order], outer[order], counts[order]


def quantile(low: Doubles, high: Doubles, counts: Doubles, share: float) -> float:
    """The value below which `share` of the counts lie; values are spread evenly over their bucket."""
    after = np.cumsum(counts)
    target = share * after[-1]
    index = int(np.searchsorted(after, target))
    index = min(index, counts.size - 1)
    into = (target - (after[index] - counts[index])) / counts[index]
    return float(low[index] + into * (high[index] - low[index]))


def _refuse(option: str, message: str, hint: str) -> None:
    raise errors.RecipeError(
        errors.Diagnostic("error", "QG305", f"observe.{option}", message, hint)
    )
