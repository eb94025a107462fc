"""Distributions over classes: KL divergence and top-1 agreement of two models.

    KL(p || q) = Σ_c p_c (log p_c - log q_c)        in nats, p of the float model, float64

An output is taken for probabilities where the float model's first sample is non-negative and sums
to 1 over the last axis, else for logits (log-softmax). Probabilities are floored at 2^-24, what
float32 cannot tell from 0 beside 1, because quantized ones may be exactly 0; then normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.evaluate import statistics

Floats = npt.NDArray[np.float64]

FLOOR = 2.0**-24
CHUNK = 1 << 22  # elements that are widened to float64 at a time: 32 MB


def log_softmax(logits: npt.ArrayLike) -> Floats:
    """Log-probabilities over the last axis, in float64.

    >>> log_softmax([0.0, 0.0]).round(4).tolist()
    [-0.6931, -0.6931]
    """
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def is_probability(values: npt.NDArray[Any]) -> bool:
    """True where every last-axis row is non-negative and sums to 1 within 1e-3 (for float16)."""
    if not values.size or float(values.min()) < 0:
        return False
    sums = values.sum(axis=-1, dtype=np.float64)
    return bool(np.abs(sums - 1).max() < 1e-3)


def log_probabilities(values: npt.ArrayLike, *, is_logits: bool) -> Floats:
    """Log-probabilities over the last axis of logits or of probabilities."""
    if is_logits:
        return log_softmax(values)
    x = np.maximum(np.asarray(values, np.float64), FLOOR)
    return np.asarray(np.log(x / x.sum(axis=-1, keepdims=True)))


def kl_divergence(log_p: Floats, log_q: Floats) -> Floats:
    """KL(p || q) over the last axis; a class with p = 0 adds nothing, one with only q = 0 inf."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0)
    return np.asarray(terms.sum(axis=-1))


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far the second model's predictions are from the first's, in nats per prediction."""

    kl_mean: statistics.Estimate
    kl_p99: float
    kl_max: float
    agreement: statistics.Estimate
    predictions: int


@dataclass(slots=True)
class DivergenceMeter:
    """Takes pairs of outputs sample by sample; keeps one number per prediction."""

    is_logits: bool | None = None
    _kl: list[Floats] = field(default_factory=list)
    _mean: statistics.MeanMeter = field(default_factory=statistics.MeanMeter)
    _same: statistics.MeanMeter = field(default_factory=statistics.MeanMeter)

    def add(self, p: npt.NDArray[Any], q: npt.NDArray[Any]) -> None:
        """Outputs [..., classes] of the float and the quantized model for one sample."""
        if self.is_logits is None:
            self.is_logits = not is_probability(p)
        p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
        same = 0
        kl = np.empty(len(p))
        for rows in row_chunks(*p.shape):
            log_p = log_probabilities(p[rows], is_logits=self.is_logits)
            log_q = log_probabilities(q[rows], is_logits=self.is_logits)
            kl[rows] = kl_divergence(log_p, log_q)
            same += int((p[rows].argmax(axis=-1) == q[rows].argmax(axis=-1)).sum())
        self._kl.append(kl)
        self._mean.add(float(kl.sum()), len(kl))
        self._same.add(same, len(kl))

    def result(self, seed: int | None = 0) -> Divergence:
        """What the samples so far say; without a seed no intervals, which cost more than a small model's run."""
        kl = np.concatenate(self._kl) if self._kl else np.full(1, np.nan)
        return Divergence(
            kl_mean=self._mean.estimate(seed),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            agreement=self._same.estimate(seed),
            predictions=sum(self._mean.counts),
        )


def row_chunks(rows: int, classes: int) -> Iterator[slice]:
    """Slices over rows whose float64 copies stay small."""
    step = max(1, CHUNK // max(classes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
