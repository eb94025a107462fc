"""`TensorStats`: what is remembered of one tensor over all samples; `Stats`: of all tensors of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.observers.histogram import FloatHistogram

Doubles = npt.NDArray[np.float64]
_GRAM_ROWS = 512
_UNIT = 149  # every float32 is a multiple of 2^-149


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to remember of a tensor beside its histogram.

    Attributes:
        channel_axis: axis of channel_absmax and channel_mean; None keeps neither.
        gram: keep Σ xᵀx over the rows of the last axis.
    """

    channel_axis: int | None = None
    gram: bool = False


@dataclass(slots=True)
class TensorStats:
    """Mergeable statistics of one tensor.

    Attributes:
        wanted: what is kept.
        histogram: counts of all finite values, extremes, number of non-finite ones.
        samples: how many samples had finite values.
        minima, maxima: sums over samples of the sample's extremes, exact, as integers in units of 2^-149.
        channel_absmax: [C] float32, or None.
        channel_sum: [C] float64, with `channel_count` values each, or None.
        gram: [K, K] float64 sum of xᵀx over `gram_rows` rows, or None.
    """

    wanted: Wanted = Wanted()
    histogram: FloatHistogram = field(default_factory=FloatHistogram)
    samples: int = 0
    minima: int = 0
    maxima: int = 0
    channel_absmax: npt.NDArray[np.float32] | None = None
    channel_sum: Doubles | None = None
    channel_count: int = 0
    gram: Doubles | None = None
    gram_rows: int = 0

    @property
    def minimum(self) -> float:
        """Smallest finite value; inf where there is none."""
        return self.histogram.minimum

    @property
    def maximum(self) -> float:
        """Largest finite value; -inf where there is none."""
        return self.histogram.maximum

    @property
    def count(self) -> int:
        """How many finite values were seen."""
        return self.histogram.total

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite."""
        return self.histogram.nonfinite

    @property
    def average_extremes(self) -> tuple[float, float]:
        """Means over samples of the sample's minimum and maximum; (inf, -inf) without samples."""
        if not self.samples:
            return float("inf"), float("-inf")
        unit = self.samples << _UNIT
        return self.minima / unit, self.maxima / unit

    @property
    def channel_mean(self) -> Doubles | None:
        """Mean of each channel [C], or None."""
        if self.channel_sum is None or not self.channel_count:
            return None
        return self.channel_sum / self.channel_count

    def update(self, values: npt.NDArray[Any], new_axes: int = 0) -> None:
        """Take in the tensor of one sample; an empty one (of a branch not taken) counts for nothing.

        `new_axes` axes stand before the tensor's own: the turns of loops.
        """
        if not values.size:
            return
        low, high = self.histogram.update(values)
        if low <= high:
            self.samples += 1
            self.minima += units([low])
            self.maxima += units([high])
        if self.wanted.channel_axis is not None and values.ndim:
            axis = self.wanted.channel_axis
            self._update_channels(values, axis + new_axes if axis >= 0 else axis)
        if self.wanted.gram and values.ndim:
            rows = values.reshape(-1, values.shape[-1])
            for start in range(0, len(rows), _GRAM_ROWS):  # no copy of all rows in float64
                part = rows[start : start + _GRAM_ROWS].astype(np.float64)
                product = part.T @ part
                self.gram = product if self.gram is None else self.gram + product
            self.gram_rows += len(rows)

    def update_extremes(self, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> None:
        """Take in the extremes [samples] of samples whose values are counted already; inf, -inf of one without any."""
        some = low <= high
        # Adding 0 makes -0.0 what `FloatHistogram.update` makes it.
        low, high = low[some] + np.float32(0), high[some] + np.float32(0)
        if low.size:
            self.histogram.widen(float(low.min()), float(high.max()))
            self.samples += low.size
            self.minima += units(low)
            self.maxima += units(high)

    def _update_channels(self, values: npt.NDArray[Any], axis: int) -> None:
        rest = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        absmax = np.maximum(values.max(axis=rest), -values.min(axis=rest)).astype(np.float32)
        total = values.sum(axis=rest, dtype=np.float64)
        self._add_channels(absmax, total, values.size // max(total.size, 1))

    def _add_channels(self, absmax: npt.NDArray[np.float32], total: Doubles, count: int) -> None:
        if self.channel_absmax is None or self.channel_sum is None:
            self.channel_absmax, self.channel_sum = absmax, total
        else:
            self.channel_absmax = np.maximum(self.channel_absmax, absmax)
            self.channel_sum = self.channel_sum + total
        self.channel_count += count

    def merge(self, other: TensorStats) -> None:
        """Take in what another shard saw. Ranges do not depend on the order; float64 sums do, in their last bits."""
        if other.wanted != self.wanted:
            raise ValueError(f"statistics of {other.wanted} cannot join those of {self.wanted}")
        self.histogram.merge(other.histogram)
        self.samples += other.samples
        self.minima += other.minima
        self.maxima += other.maxima
        if other.channel_absmax is not None and other.channel_sum is not None:
            self._add_channels(other.channel_absmax, other.channel_sum, other.channel_count)
        if other.gram is not None:
            self.gram = other.gram.copy() if self.gram is None else self.gram + other.gram
            self.gram_rows += other.gram_rows

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The same as named arrays (for files); only buckets that hold values are kept."""
        used = np.flatnonzero(self.histogram.counts)
        exact = {
            "axis": self.wanted.channel_axis, "want_gram": self.wanted.gram,
            "minimum": self.minimum, "maximum": self.maximum, "nonfinite": self.nonfinite,
            "samples": self.samples, "minima": str(self.minima), "maxima": str(self.maxima),
            "channel_count": self.channel_count, "gram_rows": self.gram_rows,
        }  # fmt: skip
        arrays: dict[str, npt.NDArray[Any]] = {
            "exact": np.frombuffer(json.dumps(exact, sort_keys=True).encode(), np.uint8),
            "buckets": used.astype(np.uint16),
            "counts": self.histogram.counts[used],
        }
        for name in ("channel_absmax", "channel_sum", "gram"):
            if (kept := getattr(self, name)) is not None:
                arrays[name] = kept
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> TensorStats:
        """The inverse of `to_arrays`."""
        exact = json.loads(arrays["exact"].tobytes())
        made = TensorStats(Wanted(exact["axis"], exact["want_gram"]))
        made.histogram.counts[arrays["buckets"]] = arrays["counts"]
        made.histogram.minimum, made.histogram.maximum = exact["minimum"], exact["maximum"]
        made.histogram.nonfinite = exact["nonfinite"]
        made.samples, made.minima, made.maxima = (
            exact["samples"], int(exact["minima"]), int(exact["maxima"]),
        )  # fmt: skip
        made.channel_count, made.gram_rows = exact["channel_count"], exact["gram_rows"]
        made.channel_absmax = arrays.get("channel_absmax")
        made.channel_sum, made.gram = arrays.get("channel_sum"), arrays.get("gram")
        return made


@dataclass(frozen=True, slots=True)
class Choice:
    """How ranges shall be chosen from statistics: the options of `qgraph.observers.choose`."""

    method: str = "mse"
    percentile: float = 99.99
    clip_sentinels: bool = False


class Stats(Mapping[str, TensorStats]):
    """Statistics by value name, and how ranges shall be chosen from them."""

    def __init__(
        self, tensors: Mapping[str, TensorStats] | None = None, choice: Choice | None = None
    ) -> None:
        self._tensors = dict(tensors or {})
        self.choice = choice or Choice()

    def __getitem__(self, name: str) -> TensorStats:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def merge(self, other: Stats) -> None:
        """Take in what another shard saw; tensors that only one of both has are kept."""
        for name, theirs in other.items():
            mine = self._tensors.setdefault(name, TensorStats(theirs.wanted))
            mine.merge(theirs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz; the same statistics give the same bytes."""
        arrays = {
            f"{index}/{part}": array
            for index, name in enumerate(sorted(self))
            for part, array in self[name].to_arrays().items()
        }
        names = np.frombuffer(json.dumps(sorted(self)).encode(), np.uint8)
        with open(path, "wb") as stream:
            np.savez(stream, names=names, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Stats:
        """Read what `save` wrote.

        Raises:
            OSError, ValueError, KeyError, zipfile.BadZipFile: it is no such file.
        """
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
        with np.load(path, allow_pickle=False) as held:
            names = json.loads(held["names"].tobytes())
            for key in held.files:
                index, _, part = key.partition("/")
                if part:
                    parts.setdefault(index, {})[part] = held[key]
        return Stats({n: TensorStats.from_arrays(parts[str(i)]) for i, n in enumerate(names)})


def units(values: npt.ArrayLike) -> int:
    """The sum of finite float32 values [n] as a multiple of 2^-149, exactly: it does not depend on their order.

    >>> units([1.0, -1.0, 3 * 2.0**-149])
    3
    """
    pattern = np.asarray(values, np.float32).view(np.int32)
    exponent, fraction = (pattern >> 23) & 0xFF, (pattern & 0x7FFFFF).astype(np.int64)
    fraction += (exponent > 0).astype(np.int64) << 23
    np.negative(fraction, where=pattern < 0, out=fraction)
    total = 0
    for each in np.unique(exponent):
        total += int(fraction[exponent == each].sum()) << max(int(each) - 1, 0)
    return total
