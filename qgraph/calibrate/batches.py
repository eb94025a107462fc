"""Several samples of one shape in one run, where that changes nothing.

A run over a few rows mostly waits for weights, and each further row is nearly free. But the numbers must be those of
runs of one sample each, to the last bit. How a kernel rounds depends on shapes and not on values; so once a shape has
been seen a few times, its next samples run alone and together, the bits of every value are compared, and only where all
agree do the later samples of that shape run together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, graph

MOST = 8  # samples in one run: twice as many are hardly faster
EARLY = 8  # samples of a shape that run alone: rarer shapes are not worth the comparison
_WAITING = 64  # samples that wait for others of their shape
# Their output depends on values in its shape, or on chance.
_UNSTEADY = frozenset(
    {
        "Bernoulli", "Compress", "Multinomial", "NonMaxSuppression", "NonZero", "RandomNormal", "RandomNormalLike",
        "RandomUniform", "RandomUniformLike", "StringSplit", "Unique",
    }
)  # fmt: skip

Feeds: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = npt.NDArray[np.float32]
Key: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
# Feeds, control [values, 3] and the sample's number, for messages → rows [sum of parts, 4] of the counting nodes.
Run: TypeAlias = Callable[[Feeds, npt.NDArray[np.int64], int], Rows]


def is_possible(model: ir.Model) -> bool:
    """Samples may be joined at all: every input has an open first dimension and no value decides what runs."""
    nodes = graph.nodes(model)
    is_steady = all(
        n.op_type not in _UNSTEADY and next(graph.bodies(n), None) is None for n in nodes
    )
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return is_steady and all(
        v.shape is not None and len(v.shape) > 0 and not isinstance(v.shape[0], int) for v in inputs
    )


class Batches:
    """Runs samples, alone or together.

    Args:
        run: see `Run`.
        size: how many values are counted.
        seen: how many elements were counted so far.
        limit: elements of counted values that one run may have.
    """

    def __init__(self, run: Run, size: int, seen: Callable[[], int], limit: int) -> None:
        self._run = run
        self._size = size
        self._seen = seen
        self._limit = limit
        self._early: Counter[Key] = Counter()
        self._waiting: dict[Key, list[tuple[int, Feeds]]] = {}
        self._first: dict[
            Key, tuple[int, Feeds, Rows]
        ] = {}  # the first sample of the comparison, until that is made
        self._most: dict[Key, int] = {}  # how many samples of a shape run together; 1: alone
        self._single: dict[
            Key, npt.NDArray[np.bool_]
        ] = {}  # proven shapes: values without a sample axis

    def results(self, samples: Iterator[Feeds]) -> Iterator[Sequence[Rows]]:
        """What the nodes give for each sample [values, 4], a few samples at a time and in any order."""
        for number, feeds in enumerate(samples):
            key = tuple((name, np.shape(feeds[name])) for name in sorted(feeds))
            if key not in self._most:
                self._early[key] += 1
                if self._early[key] <= EARLY:
                    yield [self._alone(feeds, number)]
                else:
                    yield [self._start(key, number, feeds)]
                continue
            if self._most[key] == 1:
                yield [self._alone(feeds, number)]
                continue
            group = self._waiting.setdefault(key, [])
            group.append((number, feeds))
            if len(group) + (key in self._first) == self._most[key]:
                yield from self._together(key, self._waiting.pop(key))
            elif sum(map(len, self._waiting.values())) > _WAITING:
                yield from self._each(self._waiting.pop(next(iter(self._waiting))))
        for group in self._waiting.values():
            yield from self._each(group)

    def _start(self, key: Key, number: int, feeds: Feeds) -> Rows:
        """The first sample of the comparison: it tells how many fit into a run."""
        before = self._seen()
        rows = self._alone(feeds, number, checksums=True)
        elements = max(self._seen() - before, 1)
        most = max(min(MOST, self._limit // elements), 1)
        is_joinable = len({shape[0] if shape else 0 for _, shape in key}) == 1 and key[0][1][0] > 0
        self._most[key] = most if is_joinable else 1
        if self._most[key] > 1:
            self._first[key] = (number, feeds, rows)
        return rows

    def _each(self, group: Sequence[tuple[int, Feeds]]) -> Iterator[list[Rows]]:
        for number, feeds in group:
            yield [self._alone(feeds, number)]

    def _together(self, key: Key, group: list[tuple[int, Feeds]]) -> Iterator[Sequence[Rows]]:
        if key in self._first:
            yield from self._prove(key, group)
            return
        single = self._single[key]
        count = len(group)
        control = self._control(count, 1, 0)
        control[single] = 1, count, 0
        rows = self._run(_joined([feeds for _, feeds in group]), control, group[0][0])
        starts = np.cumsum(control[:, 0]) - control[:, 0]
        yield [rows[starts + np.where(single, 0, i)] for i in range(count)]

    def _prove(self, key: Key, group: list[tuple[int, Feeds]]) -> Iterator[Sequence[Rows]]:
        """Run a group alone, and learn whether it could have run together."""
        number, first, rows = self._first.pop(key)
        alone = [rows]
        for index, feeds in group:
            alone.append(self._alone(feeds, index, checksums=True))
            yield alone[-1:]
        joined = _joined([first, *(feeds for _, feeds in group)])
        sums = np.stack([_checksums(each) for each in alone], axis=1)  # [values, samples]
        count = len(alone)
        self._most[key] = 1
        try:
            parts = self._run(joined, self._control(count, 0, 1), number)
            is_joined = (_checksums(parts).reshape(self._size, count) == sums).all(axis=1)
            is_single = ~is_joined
            if is_single.any():
                whole = self._run(joined, self._control(1, 0, 1), number)
                is_single = (_checksums(whole)[:, None] == sums).all(axis=1)
        except errors.RuntimeFailure:
            return  # the model does not take several samples, whatever its inputs say
        if (is_joined | is_single).all():
            self._most[key] = count
            self._single[key] = is_single & ~is_joined

    def _alone(self, feeds: Feeds, number: int, *, checksums: bool = False) -> Rows:
        return self._run(feeds, self._control(1, 1, checksums), number)

    def _control(self, parts: int, weight: int, checksums: int) -> npt.NDArray[np.int64]:
        return np.tile(np.array([parts, weight, checksums], np.int64), (self._size, 1))


def _joined(samples: Sequence[Feeds]) -> dict[str, Any]:
    return {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}


def _checksums(rows: Rows) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(rows[:, 2:]).view(np.uint64)[:, 0]
