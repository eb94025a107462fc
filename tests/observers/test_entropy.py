"""The KL threshold, against a plain implementation on the values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qgraph.observers import TensorStats, entropy, ranges

RNG = np.random.default_rng(5)
VALUES = {
    "normal": RNG.normal(size=200_000),
    "laplace": RNG.laplace(size=200_000),
    "relu": np.maximum(RNG.normal(size=200_000), 0),
    "tails": RNG.standard_t(4, size=200_000),
    "outlier": np.append(RNG.normal(size=200_000), 60.0),
}


def plain(bins: npt.NDArray[np.float64], levels: int = 128) -> int:
    """Migacz's pseudo-code, slide by slide: after how many bins to clip."""
    bins = bins.copy()
    bins[0] = bins[1]
    best, least = 0, np.inf
    for i in range(levels, len(bins) + 1):
        reference = bins[:i].copy()
        reference[i - 1] += bins[i:].sum()
        quantized = np.zeros(i)
        for level in range(levels):
            first, last = level * i // levels, (level + 1) * i // levels
            part = bins[first:last]
            used = part > 0
            if used.any():
                quantized[first:last][used] = part.sum() / used.sum()
        p, q = reference / reference.sum(), quantized / quantized.sum()
        q[q == 0] = 1e-4
        found = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if found < least:
            best, least = i, found
    return best


@pytest.mark.parametrize("kind", VALUES)
def test_threshold_is_that_of_the_plain_algorithm(kind: str) -> None:
    x = VALUES[kind].astype(np.float32)
    stats = TensorStats()
    stats.update(x)
    folded = ranges.folded(*stats.histogram.spread())
    peak = float(np.abs(x).max())
    found = entropy.threshold(*folded)
    assert found == pytest.approx(plain(entropy.linear(*folded, peak)) * peak / entropy.BINS)
    # Counted from the values themselves, bins are noisier than buckets spread evenly over them.
    of_values = np.histogram(np.abs(x), entropy.BINS, (0, peak))[0].astype(float)
    assert found == pytest.approx(plain(of_values) * peak / entropy.BINS, rel=0.25)


def test_zero_alone() -> None:
    stats = TensorStats()
    stats.update(np.zeros(5, np.float32))
    assert entropy.threshold(*ranges.folded(*stats.histogram.spread())) == 0
