"""The range of least squared error, from a histogram.

In units of the scale, a value t becomes round(t) clipped to [n0, n1]. With n that integer,

    ∫ (t - n)² dt = n/12 + (t - n)³/3        continuous over rounding and over clipping alike,

so the error of values spread evenly over a bucket is a difference of two such terms: exact, where a bucket may be wider
than a step of the grid and its middle would stand for nothing.

What is clipped counts four times. Rounding errors have either sign and are independent from one tensor to the next; a
clipped value is always too small, and where it is large the tensors behind it are large and clipped as well, so these
errors add up on the way to the outputs (measured: docs/notes/static_int8.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph import numerics
from qgraph.observers import range_errors
from qgraph.observers.histogram import Doubles, FloatHistogram
from qgraph.spec import QuantSpec

CLIPPED = 4.0  # weight of squared errors of clipped values
_COARSE = 48  # shares of the full range that are tried first
_LEAST = 2.0**-8  # the smallest of them
_ROUNDS = 2  # of refinement, each between the neighbours of the best so far
_FINE = 17


@dataclass(frozen=True, slots=True)
class Density:
    """A histogram as a function that is constant between edges: `weight` is its jump at each of the edges `at`."""

    at: Doubles
    weight: Doubles

    @staticmethod
    def of(histogram: FloatHistogram) -> Density:
        """Neighbouring buckets share an edge, so that each edge is looked at once."""
        low, high, counts = histogram.spread()
        # A bucket with no width is one value: its error is that of a short stretch around it.
        shorter = np.maximum(np.maximum(np.abs(low), np.abs(high)) * 1e-6, 1e-300)
        narrow = high - low < shorter
        a, b = np.where(narrow, low - shorter, low), np.where(narrow, high + shorter, high)
        density = counts / (b - a)
        at, where = np.unique(np.concatenate([a, b]), return_inverse=True)
        jumps = np.bincount(where, np.concatenate([-density, density]), at.size)
        # Edges without a jump fill the last row of sums.
        none = -at.size % range_errors.SUMS
        return Density(np.append(at, np.zeros(none)), np.append(jumps, np.zeros(none)))

    def squared_errors(self, ranges: Doubles, spec: QuantSpec) -> Doubles:
        """Sum of squared errors [m], clipped ones weighted, on the grids of the ranges [m, 2]."""
        scales, zero_points = numerics.range_grids(ranges, spec)
        ends = spec.qtype.qmin - zero_points, spec.qtype.qmax - zero_points
        area = range_errors.Area(CLIPPED / 3, (CLIPPED - 1) / 3, 1 / 12)
        found = range_errors.sums(self.at, self.weight, np.stack([1 / scales, *ends]), area)
        return found * scales**3


def best_range(histogram: FloatHistogram, spec: QuantSpec) -> tuple[float, float]:
    """The (low, high) within [minimum, maximum] whose grid has the least squared error, clipping weighted.

    Both ends shrink together first, then each alone (only the larger one matters for a symmetric grid), each search
    from coarse to fine.
    """
    full = np.array([min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)])
    if full[0] == full[1]:
        return float(full[0]), float(full[1])
    density = Density.of(histogram)
    best = np.ones(2)
    turns = [np.array([True, True])]
    if not spec.symmetric and full[0] < 0 < full[1]:
        turns += [np.array([True, False]), np.array([False, True])] * 2
    for turn in turns:
        best = _search(density, full, best, turn, spec)
    return float(full[0] * best[0]), float(full[1] * best[1])


def _search(
    density: Density, full: Doubles, start: Doubles, turn: npt.NDArray[np.bool_], spec: QuantSpec
) -> Doubles:
    """The best shares of the full range when only the ends in `turn` move; `start` itself is tried too."""
    shares = np.geomspace(_LEAST if turn.all() else _LEAST / 16, 1.0, _COARSE)
    best, least = start, float(density.squared_errors((start * full)[None], spec)[0])
    for _ in range(1 + _ROUNDS):
        tried = np.where(turn, shares[:, None], start)
        error = density.squared_errors(tried * full, spec)
        index = int(np.argmin(error))
        if error[index] < least:
            best, least = tried[index], float(error[index])
        shares = np.linspace(
            shares[max(index - 1, 0)], shares[min(index + 1, shares.size - 1)], _FINE
        )
    return best
