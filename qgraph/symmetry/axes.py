"""Reshape: which axes hold the same positions before and after.

    [batch, heads, seq, d] -> [batch * heads, seq, d]

Where the products of the sizes from some axis to the last one are equal, before and after, there the axes are cut into
segments that are reshaped each by itself. Sizes are numbers, names, or products of such ("4*batch"). Within a segment,
one unknown size at the front may be joined with known ones: such an axis keeps its parts, so that they can be parted
again (see `joined`).
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

import numpy as np

from qgraph.symmetry.channels import Dims, Joined, Labels

Segment: TypeAlias = tuple[list[int], list[int]]
Monomial: TypeAlias = tuple[int, tuple[str, ...]]


def reshaped(labels: Labels, before: Dims, after: Dims) -> Joined | None:
    """Labels after a reshape, or None where sizes that matter are unknown."""
    if len(before) != labels.ndim or 0 in (*before, *after):
        return None
    wide = [1] * len(before)
    shape: list[int] = []
    dims: list[int | str | None] = []
    spans: list[int] = []
    for old, new in _cut(labels, before, after):
        done = _one(labels, old, before, [after[a] for a in new])
        if done is None:
            return None
        for a, n in zip(old, done[0], strict=True):
            wide[a] = n
        shape += done[1]
        dims += done[2]
        spans += done[3]
    return Joined(np.broadcast_to(labels, wide).reshape(shape), tuple(dims), tuple(spans))


def _one(
    labels: Labels, old: list[int], before: Dims, after: list[int | str | None]
) -> tuple[list[int], list[int], list[int | str | None], list[int]] | None:
    """One segment: sizes that labels are broadcast to; shape of labels, sizes and spans of the axes they become."""
    if all(labels.shape[a] == 1 for a in old):
        return [1] * len(old), [1] * len(after), after, [1] * len(after)
    sizes = [before[a] for a in old]
    known = [d for d in sizes if isinstance(d, int)], [d for d in after if isinstance(d, int)]
    if len(known[0]) == len(sizes) and len(known[1]) == len(after):
        return known[0], known[1], after, [1] * len(after)
    is_front = (
        len(known[0]) == len(sizes) - 1
        and len(known[1]) == len(after) - 1
        and not isinstance(sizes[0], int)
        and not isinstance(after[0], int)
        and labels.shape[old[0]] == 1
    )
    p, t = math.prod(known[0]), math.prod(known[1])
    if not is_front or max(p, t) % min(p, t):
        return None
    if t >= p:  # the unknown axis gives up a factor, or keeps its size
        return [t // p, *known[0]], [1, *known[1]], after, [1] * len(after)
    parts: list[int | str | None] = [sizes[0], p // t]
    return [1, *known[0]], [1, p // t, *known[1]], parts + after[1:], [2] + [1] * len(known[1])


def _cut(labels: Labels, before: Dims, after: Dims) -> list[Segment]:
    """Segments; those that only a guess can cut further are cut by the order of their unknown sizes."""
    result: list[Segment] = []
    for old, new in _segments(before, after):
        count = [
            sum(not isinstance(d[a], int) for a in own) for d, own in ((before, old), (after, new))
        ]
        is_hard = max(count) > 1 and any(labels.shape[a] > 1 for a in old)
        guess = (
            _in_order(tuple(before[a] for a in old), tuple(after[a] for a in new))
            if is_hard
            else None
        )
        if guess is None:
            result.append((old, new))
        else:
            result += [([old[i] for i in a], [new[j] for j in b]) for a, b in guess]
    return result


def _segments(before: Dims, after: Dims) -> list[Segment]:
    """Groups of axes, before and after, that are sure to hold the same positions, as fine as can be told."""
    ends = _products(before, "before"), _products(after, "after")
    i, j = len(before), len(after)
    result: list[Segment] = []
    while i or j:
        x, y = next(
            (a, b)
            for a, b in sorted(itertools.product(range(i + 1), range(j + 1)), key=lambda p: -sum(p))
            if (a, b) != (i, j) and (a == b == 0 or ends[0][a] == ends[1][b])
        )
        result.append((list(range(x, i)), list(range(y, j))))
        i, j = x, y
    return result[::-1]


def _products(dims: Dims, side: str) -> list[Monomial]:
    """Products of the sizes from each axis to the last, and 1; a size without a name is like no other."""
    result: list[Monomial] = [(1, ())]
    for axis in reversed(range(len(dims))):
        dim = dims[axis]
        factor, names = result[-1]
        for part in [f"?{side}{axis}"] if dim is None else str(dim).split("*"):
            if part.strip().isdigit():
                factor *= int(part)
            else:
                names = tuple(sorted((*names, part.strip())))
        result.append((factor, names))
    return result[::-1]


def _in_order(before: Dims, after: Dims) -> list[Segment] | None:
    """Segments where unknown sizes are taken to be the same ones in order; None where that cannot be."""
    result: list[Segment] = []
    i = j = 0
    while i < len(before) or j < len(after):
        a = before[i] if i < len(before) else 1
        b = after[j] if j < len(after) else 1
        if isinstance(a, int) and isinstance(b, int):
            found = _static(before[i:], after[j:])
        elif a == 1:
            found = (1, 0)
        elif b == 1:
            found = (0, 1)
        else:
            found = _unknown(before[i:], after[j:])
        if found is None:
            return None
        result.append((list(range(i, i + found[0])), list(range(j, j + found[1]))))
        i, j = i + found[0], j + found[1]
    return result


def _static(before: Dims, after: Dims) -> tuple[int, int] | None:
    """How many axes of known size at the front have the same product."""
    i, j, a, b = 0, 0, 1, 1
    while a != b or i + j == 0:
        is_left = a <= b and i < len(before)
        dims, k = (before, i) if is_left else (after, j)
        size = dims[k] if k < len(dims) else None
        if not isinstance(size, int):
            return None
        if is_left:
            a, i = a * size, i + 1
        else:
            b, j = b * size, j + 1
    return i, j


def _unknown(before: Dims, after: Dims) -> tuple[int, int] | None:
    """How many axes the segment has that begins with an unknown size.

    Where both sides have equally many unknown sizes they are the same ones in order; else the segment reaches to the
    known sizes at the end.
    """
    x, y = before[0], after[0]
    unknown = [[d for d in dims if not isinstance(d, int)] for dims in (before, after)]
    if not isinstance(x, int) and not isinstance(y, int) and len(unknown[0]) == len(unknown[1]):
        crossed = x != y and (x in unknown[1] or y in unknown[0]) and None not in (x, y)
        return None if crossed else (1, 1)
    i, j = len(before), len(after)
    while i > 1 and j > 1:
        tail = _static(before[i - 1 : 0 : -1], after[j - 1 : 0 : -1])
        if tail is None:
            break
        i, j = i - tail[0], j - tail[1]
    return i, j
