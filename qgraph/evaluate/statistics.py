"""Means with honest intervals, and results as JSON.

Predictions inside one sample (or text window) are correlated, so the bootstrap resamples whole
samples: with sums s_i over n_i predictions of sample i, the estimate is Σs_i / Σn_i.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its bootstrap 95 % interval; no interval from fewer than two samples."""

    value: float
    low: float | None
    high: float | None


@dataclass(slots=True)
class MeanMeter:
    """Collects a sum and a count per sample."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, total: float, count: int) -> None:
        """One sample; an empty one adds nothing."""
        if count:
            self.sums.append(float(total))
            self.counts.append(count)

    def mean(self) -> float:
        """The mean over all predictions; nan without any."""
        count = sum(self.counts)
        return math.fsum(self.sums) / count if count else math.nan

    def estimate(self, seed: int | None = 0) -> Estimate:
        """The mean with its interval; without a seed there is none. O(RESAMPLES x samples) time, O(samples) memory."""
        value = self.mean()
        if seed is None:
            return Estimate(value, None, None)
        sums, counts = np.asarray(self.sums, np.float64), np.asarray(self.counts, np.float64)
        if len(sums) < 2 or not np.isfinite(sums).all():
            return Estimate(value, None, None)
        rng = np.random.default_rng(seed)
        means = np.empty(RESAMPLES)
        for index in range(RESAMPLES):
            chosen = rng.integers(0, len(sums), len(sums))
            means[index] = sums[chosen].sum() / counts[chosen].sum()
        low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        return Estimate(value, float(low), float(high))


def plain(value: Any) -> Any:
    """A result as dicts, lists and numbers of strict JSON.

    Numbers that are not finite, which JSON lacks, become "inf", "-inf" or "nan".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
