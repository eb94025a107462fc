"""Hadamard transforms that run with the model: before linear operators whose input channels nothing can be folded into.

    X → MatMul(W)      becomes      X → Hadamard → MatMul(H' W)

The input of a gated unit's last projection is the case that matters (R4 in QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, ops, weights
from qgraph.ops import hadamard
from qgraph.spool import Spool
from qgraph.weights import Use, Weight

MIN_BLOCK = 16
_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Placed:
    """A transform that was inserted: the activation, the block size, the operators behind it."""

    activation: str
    block: int
    readers: tuple[str, ...]


def block_of(k: int, largest: int, least: int = MIN_BLOCK) -> int:
    """The largest power of two up to `largest` that divides a row of k; under `least` there is none: 0."""
    block = min(k & -k, largest)
    return block if block >= least else 0


def insert(
    model: ir.Model, rotated: Collection[ir.Node], largest: int, *, spool: Spool | None = None
) -> list[Placed]:
    """Transform the input of every MatMul and Gemm with a weight of its own that is not among `rotated`.

    Args:
        model: changed in place.
        rotated: operators whose input is rotated by its writers already.
        largest: block size at most, a power of two; blocks divide the row.
        spool: keeps new weights; without one they are computed on reading.
    """
    chosen: dict[ir.Value, list[tuple[Weight, Use, int]]] = {}
    for weight in weights.find(model):
        if not is_linear(weight) or any(u.node in rotated for u in weight.uses):
            continue
        block = block_of(weight.shape[1], largest)
        for use in weight.uses if block else ():
            x = use.node.inputs[0]
            assert x is not None
            chosen.setdefault(x, []).append((weight, use, block))
    done: set[str] = set()
    for readers in chosen.values():
        for weight, _, block in readers:
            if weight.name not in done:
                done.add(weight.name)
                _fold(weight, block, spool)
    names = graph.Names(model)
    return [
        transform(model, x, [(use.node, 0) for _, use, _ in readers], readers[0][2], names)
        for x, readers in chosen.items()
    ]


def is_linear(weight: Weight) -> bool:
    """Whether all that reads a weight is products with it on the right, in the main graph."""
    if weight.others or weight.is_output or weight.value.is_graph_input():
        return False
    return (
        all(
            u.kind in ("matmul", "gemm")
            and u.index == 1
            and not u.reason
            and not u.in_body
            and u.matrix == weight.matrix
            and not graph.attribute(u.node, "transA", 0)
            for u in weight.uses
        )
        and len(weight.dims) == 2
    )


def _fold(weight: Weight, block: int, spool: Spool | None) -> None:
    """W [N, K] ← W H' along K, block by block."""
    tensor, matrix, dims = weight.value.const_value, weight.matrix, weight.dims
    assert tensor is not None
    h = hadamard.sylvester(block).astype(np.float64) / np.sqrt(block)

    def compute() -> npt.NDArray[np.generic]:
        held = matrix.of(tensor.numpy())
        out = np.empty(held.shape, held.dtype)
        rows = max(1, _ROWS // held.shape[1])
        for i in range(0, len(held), rows):
            part = np.asarray(held[i : i + rows], np.float64)
            out[i : i + rows] = (part.reshape(-1, block) @ h).reshape(part.shape)
        return matrix.back(out, dims)

    name = str(weight.value.name)
    if spool is None:
        weight.value.const_value = graph.lazy(compute, tensor.dtype, dims, name)
    else:
        weight.value.const_value = ir.Tensor(spool.keep(compute()), dtype=tensor.dtype, name=name)


def transform(
    model: ir.Model,
    x: ir.Value,
    uses: Sequence[tuple[ir.Node, int]],
    block: int,
    names: graph.Names,
) -> Placed:
    """One Hadamard along the last axis of `x`, for these uses of it (nodes of the main graph, input indices)."""
    ops.require(model, "Hadamard")
    factor = model.graph.initializers.get("hadamard.factor")
    if factor is None:
        factor = graph.add_initializer(model.graph, "hadamard.factor", np.ones((1, 1), np.float32))
    out = graph.value(names(f"{x.name}.hadamard"), x.dtype, x.shape)
    first = min((node for node, _ in uses), key=list(model.graph).index)
    graph.add_node(
        first, "Hadamard", [x, factor], [out], name=names(f"{x.name}.Hadamard"),
        domain=ops.DOMAIN, attributes={"block_size": block},
    )  # fmt: skip
    for node, index in uses:
        node.replace_input_with(index, out)
    return Placed(str(x.name), block, tuple(str(node.name) for node, _ in uses))
