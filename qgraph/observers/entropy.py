"""The clipping threshold of least KL divergence. Migacz, 8-bit inference with TensorRT, GTC 2017.

|x| is counted in 2048 equal bins. For every threshold, P is the histogram up to it with everything beyond in its last
bin, Q the same histogram without the beyond, its bins averaged in `levels` groups over those that are not empty; the
threshold with the least KL(P | Q) wins.
"""

from __future__ import annotations

import numpy as np

from qgraph.observers.histogram import Doubles

BINS = 2048


def threshold(low: Doubles, high: Doubles, counts: Doubles, *, levels: int = 128) -> float:
    """The threshold for a histogram of |x|: buckets [low, high) in ascending order."""
    peak = float(high[-1])
    if peak == 0:
        return 0.0
    bins = linear(low, high, counts, peak)
    # Zeros alone (after ReLU) would decide everything; they are exact whatever the threshold.
    bins[0] = bins[1]
    levels = min(levels, BINS // 2)
    tried = np.arange(levels, BINS + 1)
    divergence = np.array([_divergence(bins, int(i), levels) for i in tried])
    return float(peak * tried[int(np.argmin(divergence))] / BINS)


def linear(low: Doubles, high: Doubles, counts: Doubles, peak: float) -> Doubles:
    """Counts in BINS equal bins over [0, peak], each bucket spread evenly over the bins that it covers."""
    after = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    edges = np.linspace(0.0, peak, BINS + 1)
    # Buckets do not overlap, but there may be empty stretches between them, where the sum stands still.
    xs = np.stack([low, high], axis=1).reshape(-1)
    ys = np.stack([after[:-1], after[1:]], axis=1).reshape(-1)
    reached = np.interp(edges, xs, ys)
    reached[0], reached[-1] = 0.0, after[-1]
    return np.diff(reached)


def _divergence(bins: Doubles, count: int, levels: int) -> float:
    """KL(P | Q) in nats for a threshold after `count` bins."""
    kept = bins[:count]
    p = kept.copy()
    p[-1] += bins[count:].sum()
    starts = np.arange(levels) * count // levels
    used = kept > 0
    total = np.add.reduceat(kept, starts)
    filled = np.maximum(np.add.reduceat(used.astype(np.float64), starts), 1)
    q = np.repeat(total / filled, np.diff(np.append(starts, count))) * used
    both = (p > 0) & (q > 0)
    if not both.any():
        return np.inf
    # Where Q has nothing (the last bin alone can be so), TensorRT's samples smooth with a small weight.
    p_sum, q_sum = p.sum(), q.sum()
    share_p, share_q = p / p_sum, q / q_sum
    lost = share_p[(p > 0) & (q <= 0)]
    value = float(np.sum(share_p[both] * np.log(share_p[both] / share_q[both])))
    return value + float(np.sum(lost * np.log(lost / 1e-4)))
