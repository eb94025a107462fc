"""Gram matrices of the inputs of weights: which tensors a weight reads, and the mean of x xᵀ over the data.

A Gram matrix takes K² numbers, so they are collected for a few tensors at a time, in graph order: as many as fit.
Weights that read the same tensor share its matrix; a weight that several operators use has the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qgraph import graph
from qgraph.observers import TensorStats
from qgraph.weights import Weight

Doubles = npt.NDArray[np.float64]


def inputs_of(weight: Weight) -> tuple[str, ...] | str:
    """The tensors whose last axis the weight is multiplied with, or why its inputs have no Gram matrix here."""
    names: dict[str, None] = {}
    for use in weight.uses:
        v = use.node.inputs[0]
        if use.kind not in ("matmul", "gemm") or use.index != 1 or v is None or not v.name:
            return f"{use.node.op_type} does not multiply its weight with the last axis of an input"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "Gemm with transA=1 sums over the rows of its input"
        if use.matrix.rows != 1:
            return "a stack of matrices has one Gram matrix for each"
        names[v.name] = None
    return tuple(names)


def batches(
    wanted: Sequence[tuple[Weight, tuple[str, ...]]], max_bytes: int
) -> Iterator[list[tuple[Weight, tuple[str, ...]]]]:
    """Cut weights, in order, into runs whose distinct Gram matrices take at most `max_bytes`; at least one each."""
    held: list[tuple[Weight, tuple[str, ...]]] = []
    names: set[str] = set()
    nbytes = 0
    for weight, inputs in wanted:
        more = 8 * weight.shape[1] ** 2 * len(set(inputs) - names)
        if held and nbytes + more > max_bytes:
            yield held
            held, names, nbytes = [], set(), 0
            more = 8 * weight.shape[1] ** 2 * len(inputs)
        held.append((weight, inputs))
        names.update(inputs)
        nbytes += more
    if held:
        yield held


class Grams:
    """Means of x xᵀ by the tensors that they are over; the same array each time, so that solvers can tell."""

    def __init__(self, stats: Mapping[str, TensorStats]) -> None:
        self._stats = stats
        self._made: dict[tuple[str, ...], Doubles | None] = {}

    def of(self, inputs: tuple[str, ...]) -> Doubles | None:
        """[K, K] float64, or None where the data never reached the operator."""
        if inputs not in self._made:
            held = [self._stats[n] for n in inputs]
            seen = [s.gram for s in held if s.gram is not None]
            rows = sum(s.gram_rows for s in held)
            self._made[inputs] = np.add.reduce(seen) / rows if seen else None
        return self._made[inputs]
