"""The clipping threshold of least KL divergence. Migacz, 8-bit inference with TensorRT, GTC 2017.

|x| is counted in 2048 equal bins. For every threshold, P is the histogram up to it with everything beyond in its last
bin, Q the same histogram without the beyond, its bins averaged in `levels` groups over those that are not empty; the
threshold with the least KL(P | Q) wins.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from qgraph.observers.histogram import Doubles

BINS = 2048
_NOTHING = 1e-4  # the share of Q in a bin that it leaves empty


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
    return float(peak * tried[int(np.argmin(_divergences(bins, tried, levels)))] / BINS)


def linear(low: Doubles, high: Doubles, counts: Doubles, peak: float) -> Doubles:
    """Counts in BINS equal bins over [0, peak], each bucket spread evenly over the bins that it covers."""
    after = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    edges = np.linspace(0.0, peak, BINS + 1)
    # Buckets do not overlap, but there may be empty stretches between them, where the sum stands still.
    xs = np.stack([low, high], axis=1).reshape(-1)
    ys = np.stack([after[:-1], after[1:]], axis=1).reshape(-1)
    # Whole counts: sparse tails leave bins empty, as they would if the values themselves were counted.
    reached = np.rint(np.interp(edges, xs, ys))
    reached[0], reached[-1] = 0.0, after[-1]
    return np.diff(reached)


def _divergences(bins: Doubles, tried: npt.NDArray[np.int64], levels: int) -> Doubles:
    """KL(P | Q) in nats for each threshold, given as a number of bins.

    Q is constant over the filled bins of a group, so Σ p log q is a sum over groups, and all sums are differences of
    cumulative ones: no loop over thresholds. Most groups are those of several thresholds and are looked at once.
    """
    total = bins.sum()
    sums, filled, p_log_p = (
        np.concatenate([[0.0], np.cumsum(each)]) for each in (bins, bins > 0, _x_log_x(bins))
    )
    first, end, groups = _groups(int(tried[0]), tried.size, levels)
    mass, used = sums[end] - sums[first], filled[end] - filled[first]
    log_mean = np.log(np.maximum(mass, 1e-300) / np.maximum(used, 1))
    kept, last = sums[tried], bins[tried - 1]
    beyond = total - kept
    log_kept = np.log(np.maximum(kept, 1e-300))
    inside = (mass * log_mean)[groups].sum(axis=1) - kept * log_kept
    share_q = log_mean[groups[:, -1]] - log_kept
    # The last bin of P also holds what is beyond. Where Q has nothing there, it counts as a small weight.
    is_filled = last > 0
    own = (
        p_log_p[tried]
        - _x_log_x(last)
        + np.where(is_filled, _x_log_x(last + beyond), _x_log_x(beyond))
    )
    cross = inside + beyond * np.where(is_filled, share_q, np.log(_NOTHING))
    divergence: Doubles = np.where(kept > 0, (own - cross) / total - np.log(total), np.inf)
    return divergence


@functools.cache
def _groups(
    least: int, count: int, levels: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """All groups, and which of them `least` bins have, one more, ...: first bins, ends and [count, levels] indices."""
    tried = np.arange(least, least + count)
    edges = np.arange(levels + 1) * tried[:, None] // levels
    both, index = np.unique(edges[:, :-1] * (BINS + 1) + edges[:, 1:], return_inverse=True)
    first, end = np.divmod(both, BINS + 1)
    return first.astype(np.int32), end.astype(np.int32), index.reshape(count, -1).astype(np.int32)


def _x_log_x(x: Doubles) -> Doubles:
    product: Doubles = x * np.log(np.maximum(x, 1e-300))
    return product
