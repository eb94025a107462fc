"""The range of least squared error, from a histogram.

In units of the scale, a value t becomes round(t) clipped to [n0, n1]. With n that integer,

    ∫ (t - n)² dt = n/12 + (t - n)³/3        continuous over rounding and over clipping alike,

so the error of values spread evenly over a bucket is a difference of two such terms: exact, where a bucket may be wider
than a step of the grid and its middle would stand for nothing.
"""

from __future__ import annotations

import numpy as np

from qgraph import numerics
from qgraph.observers.histogram import Doubles, FloatHistogram
from qgraph.spec import QuantSpec

_COARSE = 48  # shares of the full range that are tried first
_LEAST = 2.0**-8  # the smallest of them
_ROUNDS = 3  # of refinement, each between the neighbours of the best so far
_FINE = 9


def best_range(histogram: FloatHistogram, spec: QuantSpec) -> tuple[float, float]:
    """The (low, high) within [minimum, maximum] whose grid has the least squared error.

    Both ends shrink together first, then each alone (only the larger one matters for a symmetric grid), each search
    from coarse to fine.
    """
    low, high, counts = histogram.spread()
    edges = (low, high, counts)
    full = np.array([min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)])
    if full[0] == full[1]:
        return float(full[0]), float(full[1])
    best = np.ones(2)
    turns = [np.array([1, 1])]
    if not spec.symmetric and full[0] < 0 < full[1]:
        turns += [np.array([1, 0]), np.array([0, 1])] * 2
    for turn in turns:
        best = _search(edges, full, best, turn, spec)
    return float(full[0] * best[0]), float(full[1] * best[1])


def _search(
    edges: tuple[Doubles, Doubles, Doubles],
    full: Doubles,
    start: Doubles,
    turn: Doubles,
    spec: QuantSpec,
) -> Doubles:
    """The best shares of the full range when only the ends in `turn` move."""
    floor = _LEAST if turn.all() else _LEAST / 16
    shares = np.geomspace(floor, 1.0, _COARSE)
    best, least = start, np.inf
    for _ in range(1 + _ROUNDS):
        tried = np.where(turn, shares[:, None], start)
        error = squared_errors(edges, tried * full, spec)
        index = int(np.argmin(error))
        if error[index] < least:
            best, least = tried[index], float(error[index])
        around = shares[max(index - 1, 0)], shares[min(index + 1, shares.size - 1)]
        shares = np.linspace(*around, _FINE)
    if turn.all():
        return best
    # The ends that stood where they were are a candidate too.
    stood = squared_errors(edges, (start * full)[None], spec)[0]
    return start if stood <= least else best


def squared_errors(
    edges: tuple[Doubles, Doubles, Doubles], ranges: Doubles, spec: QuantSpec
) -> Doubles:
    """Sum of squared errors of each of the ranges [m, 2], on the grids that `numerics` makes of them."""
    low, high, counts = edges
    # A bucket with no width is one value: its error is that of a short stretch around it.
    shorter = np.maximum(np.abs(low), np.abs(high)) * 1e-6
    narrow = high - low < shorter
    a, b = np.where(narrow, low - shorter, low), np.where(narrow, high + shorter, high)
    density = np.divide(counts, b - a, out=np.zeros_like(counts), where=b > a)
    # Neighbouring buckets share an edge, so each edge is looked at once, with the difference of both densities.
    at, where = np.unique(np.concatenate([a, b]), return_inverse=True)
    weight = np.bincount(where, np.concatenate([-density, density]), at.size)
    found = np.empty(len(ranges))
    for index, (first, last) in enumerate(ranges):
        scale, zero_point = numerics.range_grid(float(first), float(last), spec)
        n0, n1 = spec.qtype.qmin - zero_point, spec.qtype.qmax - zero_point
        t = at / scale
        n = np.rint(t)
        np.clip(n, n0, n1, out=n)
        t -= n
        area = t * t
        area *= t
        area /= 3
        n /= 12
        area += n
        found[index] = np.dot(weight, area) * scale**3
    return found
