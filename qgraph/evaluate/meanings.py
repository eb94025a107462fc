"""Whether a value of two models that has one name means one thing.

Folding a normalisation, smoothing and rotating change what a value holds and leave its name; its distance from the
float model then says nothing. Told apart from noise by what would explain the difference, per channel c:

    y_c ≈ a_c x_c + b_c      a fold, or smoothing: a fit for each channel explains 99 % of the difference, or 90 %
                             of a large one (and y does not vanish)
    |y| ≈ |x|, y · x ≈ 0     a rotation or permutation: lengths are kept within 5 %, directions are not

Noise does neither. A channel needs a few elements to be judged; without them the name is believed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEAST = 8  # elements of a channel
EXPLAINED, EXPLAINED_LARGE = 0.01, 0.1
LARGE = 0.25  # of the value's power: 6 dB
SAME_LENGTH, SAME_DIRECTION = 0.05, 0.5


class Meaning:
    """Takes pairs of one value; keeps sums per channel along axis 1 and the last axis."""

    def __init__(self) -> None:
        self._sums: dict[int, Array] = {}
        self._xx = self._yy = self._xy = self._lengths = 0.0

    def add(self, reference: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> None:
        """One sample; of one shape."""
        x, y = np.asarray(reference, np.float64), np.asarray(other, np.float64)
        if x.ndim < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
            return
        for axis in {1, x.ndim - 1}:
            rows = [np.moveaxis(each, axis, -1).reshape(-1, x.shape[axis]) for each in (x, y)]
            sums = _moments(*rows)
            kept = self._sums.get(axis)
            if kept is not None and kept.shape != sums.shape:
                continue  # the axis is one of time
            self._sums[axis] = sums if kept is None else kept + sums
        self._xx, self._yy = self._xx + float((x * x).sum()), self._yy + float((y * y).sum())
        self._xy += float((x * y).sum())
        gap = np.linalg.norm(x, axis=-1) - np.linalg.norm(y, axis=-1)
        self._lengths += float((gap * gap).sum())

    def is_other(self) -> bool:
        """True where the two hold different things."""
        noise = self._xx + self._yy - 2 * self._xy
        if not self._xx > 0 or not noise > 0:
            return False
        cosine = self._xy / math.sqrt(self._xx * self._yy) if self._yy > 0 else 0.0
        if self._lengths < SAME_LENGTH**2 * self._xx and cosine < SAME_DIRECTION:
            return True
        allowed = EXPLAINED_LARGE if noise > LARGE * self._xx else EXPLAINED
        most = allowed * min(noise, self._yy)
        return any(_unexplained(sums) < most for sums in self._sums.values() if sums[0, 0] >= LEAST)


def _moments(x: Array, y: Array) -> Array:
    """[6, channels]: n, Σx, Σy, Σxx, Σyy, Σxy of rows [n, channels]."""
    count = np.full(x.shape[1], float(len(x)))
    return np.stack([count, *(m.sum(axis=0) for m in (x, y, x * x, y * y, x * y))])


def _unexplained(sums: Array) -> float:
    """Σ over channels of what the best a x + b leaves of y."""
    n, x, y, xx, yy, xy = sums
    own, others, shared = xx - x * x / n, yy - y * y / n, xy - x * y / n
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.where(own > 1e-12 * xx, shared * shared / own, 0.0)
    return float(np.maximum(others - fitted, 0.0).sum())
