"""Gradients through convolutions and pools, in numpy: as sums over the positions of the kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qgraph.gradients.rules import Array, Gradients, Site, rule


@rule("Conv")
def _conv(site: Site, g: Gradients) -> Gradients:
    """The output is a sum over places of the kernel, of x there times the weight there."""
    x, w = site.x[:2]
    dy = g[0]
    groups = site.attribute("group", 1)
    padded, window = _padded(site, x, w.shape[2:], 0.0)
    # [batch, groups, channels of a group, ...]
    parts = padded.reshape(x.shape[0], groups, -1, *padded.shape[2:])
    above = dy.reshape(x.shape[0], groups, w.shape[0] // groups, -1)
    kernel = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    dx = np.zeros_like(parts) if site.wanted[0] else None
    dw = np.zeros_like(kernel) if site.wanted[1] else None
    for place, here in window.places():
        at: tuple[Any, ...] = (slice(None),) * 3
        if dw is not None:
            seen = parts[(*at, *here)].reshape(*parts.shape[:3], -1)
            dw[(*at, *place)] = (above @ seen.swapaxes(-1, -2)).sum(axis=0)
        if dx is not None:
            spread = kernel[(*at, *place)].swapaxes(-1, -2) @ above
            dx[(*at, *here)] += spread.reshape(*parts.shape[:3], *dy.shape[2:])
    found: list[Array | None] = [
        None if dx is None else window.inner(dx.reshape(padded.shape)),
        None if dw is None else dw.reshape(w.shape),
    ]
    if len(site.x) > 2:
        along = (0, *range(2, dy.ndim))
        found.append(dy.sum(axis=along) if site.wanted[2] else None)
    return found


@rule("MaxPool")
def _max_pool(site: Site, g: Gradients) -> Gradients:
    """The gradient goes to the first place where the largest value stands."""
    x, y = site.x[0], site.y[0]
    padded, window = _padded(site, x, site.attribute("kernel_shape"), -np.inf)
    dx = np.zeros_like(padded)
    open_ = np.ones(y.shape, bool)
    for _, here in window.places():
        at = (slice(None), slice(None), *here)
        hit = open_ & (padded[at] == y)
        dx[at] += g[0] * hit
        open_ &= ~hit
    return [window.inner(dx)]


@rule("AveragePool")
def _average_pool(site: Site, g: Gradients) -> Gradients:
    x = site.x[0]
    kernel = site.attribute("kernel_shape")
    padded, window = _padded(site, x, kernel, 0.0)
    counts = np.full(window.size, math.prod(kernel), x.dtype)
    if not site.attribute("count_include_pad", 0):
        real, _ = _padded(site, np.ones_like(x[:1, :1]), kernel, 0.0)
        counts = np.sum([real[0, 0][here] for _, here in window.places()], axis=0)
    share = g[0] / counts
    dx = np.zeros_like(padded)
    for _, here in window.places():
        dx[(slice(None), slice(None), *here)] += share
    return [window.inner(dx)]


@rule("GlobalAveragePool")
def _global_average_pool(site: Site, g: Gradients) -> Gradients:
    x = site.x[0]
    return [np.broadcast_to(g[0] / x.dtype.type(math.prod(x.shape[2:])), x.shape)]


@rule("BatchNormalization")
def _batch_norm(site: Site, g: Gradients) -> Gradients:
    """Of inference: a factor for each channel; only x has a gradient here."""
    x, gain, _, _, variance = site.x
    factor = gain / np.sqrt(variance + x.dtype.type(site.attribute("epsilon", 1e-5)))
    return [g[0] * factor.reshape(-1, *[1] * (x.ndim - 2)), None, None, None, None]


class _Window:
    """Where a kernel looks at a padded input."""

    def __init__(
        self, kernel: Sequence[int], site: Site, before: Sequence[int], inner: Sequence[int], size: Sequence[int]
    ) -> None:  # fmt: skip
        rank = len(kernel)
        self._kernel, self._before, self._inner = kernel, before, inner
        self.size = tuple(size)
        self._strides = site.attribute("strides", None) or [1] * rank
        self._dilations = site.attribute("dilations", None) or [1] * rank

    def places(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Each place of the kernel, and what it sees, one element for each of the output."""
        for place in itertools.product(*(range(int(k)) for k in self._kernel)):
            starts = [p * d for p, d in zip(place, self._dilations, strict=True)]
            yield (
                place,
                tuple(
                    slice(start, start + (n - 1) * stride + 1, stride)
                    for start, n, stride in zip(starts, self.size, self._strides, strict=True)
                ),
            )

    def inner(self, padded: Array) -> Array:
        """Without the padding."""
        cut = [slice(b, b + n) for b, n in zip(self._before, self._inner, strict=True)]
        return padded[(slice(None), slice(None), *cut)]


def _padded(site: Site, x: Array, kernel: Sequence[int], fill: float) -> tuple[Array, _Window]:
    """The input with its padding, as large as the output needs it."""
    sizes, rank = site.y[0].shape[2:], len(kernel)
    strides = site.attribute("strides", None) or [1] * rank
    dilations = site.attribute("dilations", None) or [1] * rank
    reach = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    mode = site.attribute("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        whole = [max(r - n, 0) for r, n in zip(reach, x.shape[2:], strict=True)]
        before = [w // 2 if mode == "SAME_UPPER" else w - w // 2 for w in whole]
    else:
        before = list((site.attribute("pads", None) or [0] * 2 * rank)[:rank])
    after = [max(r - n - b, 0) for r, n, b in zip(reach, x.shape[2:], before, strict=True)]
    ends = [(0, 0), (0, 0), *zip(before, after, strict=True)]
    padded = np.pad(x, ends, constant_values=fill)
    return padded, _Window([int(k) for k in kernel], site, before, x.shape[2:], sizes)
