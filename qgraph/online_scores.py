"""Hadamard transforms of queries and keys that run with the model (R3 in SpinQuant, arXiv 2405.16406).

    Q → MatMul(Q, K')      becomes      Q → Hadamard → MatMul(Q H, (K H)')        since (Q H)(K H)' = Q K'

They stand where no rotation folds: behind a rotary embedding. The place is found by dataflow: a product of two
activations that sums over channels, which `qgraph.symmetry` follows from the weights that make them. A product that
sums over positions (the mix of values) is none of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from qgraph import graph
from qgraph.online_hadamard import Placed, block_of, transform
from qgraph.symmetry import axes
from qgraph.symmetry.channels import Channels, Dims
from qgraph.symmetry.groups import analyse

MIN_BLOCK = 8  # small heads exist, and one block is then all of a head
FUSED = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two activations that sums over channels.

    Attributes:
        node: MatMul, Einsum of two inputs, or an operator that multiplies queries and keys inside.
        dims: of every value, as far as they are known.
        reason: why its inputs cannot be transformed, or "".
        axes: which axis of each input is summed over, counted from the end.
        ranks: of the inputs.
        size: how many channels are summed over.
        block: the largest power of two that divides these, 0 if there is none.
    """

    node: ir.Node
    dims: Mapping[ir.Value, Dims]
    reason: str = ""
    axes: tuple[int, int] = (0, 0)
    ranks: tuple[int, int] = (0, 0)
    size: int = 0
    block: int = 0


def is_open(node: ir.Node) -> bool:
    """Whether a node multiplies two tensors where a runtime may quantize them."""
    return node.domain == "" and node.op_type in ("MatMul", "Einsum") and len(node.inputs) == 2


def find(model: ir.Model, largest: int) -> list[Product]:
    """Products of the main graph that sum over channels of activations, and operators that hold such ones.

    Args:
        model: canonical; left unchanged.
        largest: block size at most, a power of two; blocks divide the channels.
    """
    c = analyse(model, "rotate")
    types = _types(model)
    found = []
    moving = set(model.graph.inputs)
    for node in model.graph:
        if any(v in moving for v in node.inputs) or any(graph.bodies(node)):
            moving.update(node.outputs)
        if node.op_type in FUSED:
            found.append(Product(node, c.dims, f"{node.op_type} multiplies them inside"))
        elif is_open(node) and all(v in moving for v in node.inputs):
            made = _product(node, c, types, largest)
            if made is not None:
                found.append(made)
    return found


def insert(model: ir.Model, products: Collection[Product]) -> list[Placed]:
    """Transform both inputs of products of this model that have no reason against it.

    A transform stands as high as nothing else reads what comes out of it: above scales, transposes and repeated heads,
    below a concatenation with keys from a cache, which so keep the basis that they had.
    """
    chosen: dict[tuple[ir.Value, int], list[tuple[ir.Node, int]]] = {}
    names = graph.Names(model)
    for product in products:
        for index, axis in enumerate(product.axes):
            node, at = _place(product, index, axis) or _turn(product, index, axis, names)
            x = node.inputs[at]
            assert x is not None
            chosen.setdefault((x, product.block), []).append((node, at))
    return [transform(model, x, uses, block, names) for (x, block), uses in chosen.items()]


def _product(
    node: ir.Node, c: Channels, types: Mapping[ir.Value, ir.DataType | None], largest: int
) -> Product | None:
    summed, ranks = _summed(node), [c.rank(v) or 0 for v in node.inputs]
    if summed is None or any(r < -a for r, a in zip(ranks, summed, strict=True)):
        return None
    size = max(_width(c, v, a) for v, a in zip(node.inputs, summed, strict=True))
    if size == 1:
        return None
    reason, block = "", block_of(size, largest, MIN_BLOCK)
    if not {types.get(v) for v in node.inputs if v is not None} <= _TYPES:
        reason = "they are not known to be float32 or float16"
    elif not block:
        reason = f"no power of two from {MIN_BLOCK} to {largest} divides {size} channels"
    return Product(node, c.dims, reason, summed, (ranks[0], ranks[1]), size, block)


def _summed(node: ir.Node) -> tuple[int, int] | None:
    """The axes that a product sums over, from the end; None where that is not one axis."""
    if node.op_type == "MatMul":
        return -1, -2
    left, _, out = str(graph.attribute(node, "equation", "")).replace(" ", "").partition("->")
    terms = left.split(",")
    if "..." in left or not out or any(len(set(t)) < len(t) for t in terms):
        return None
    letters = (set(terms[0]) & set(terms[1])) - set(out)
    if len(letters) != 1:
        return None
    letter = letters.pop()
    return terms[0].index(letter) - len(terms[0]), terms[1].index(letter) - len(terms[1])


def _width(c: Channels, v: ir.Value | None, axis: int) -> int:
    """How many channels lie along an axis of an activation; 1 where none are followed."""
    held = c.layout(v)
    if held is not None:
        return int(held.labels.shape[axis]) if held.labels.ndim >= -axis else 1
    joined = c.joined.get(v) if v is not None else None
    if joined is None or joined.spans[axis] != 1:
        return 1
    return int(joined.labels.shape[sum(joined.spans[:axis])])


def _types(model: ir.Model) -> dict[ir.Value, ir.DataType | None]:
    """Types of the values that nodes of the main graph make and take, inferred on a copy."""
    copy = graph.clone(model)
    onnx_ir.passes.common.ShapeInferencePass()(copy)
    found = {v: v.dtype for v in model.graph.inputs}
    for ours, theirs in zip(model.graph, copy.graph, strict=True):
        for v, inferred in zip(ours.outputs, theirs.outputs, strict=True):
            found[v] = v.dtype or inferred.dtype
    return found


def _place(product: Product, index: int, axis: int) -> tuple[ir.Node, int] | None:
    """The highest use on the way to an input where the channels are the last axis, if there is one."""
    node, best = product.node, (product.node, index) if axis == -1 else None
    while True:
        v = node.inputs[index]
        if (
            v is None
            or v.is_graph_output()
            or len([n for n, _ in v.uses() if n.op_type != "Shape"]) > 1
        ):
            return best
        above = _above(v, axis, product)
        if above is None:
            return best
        node, index, axis = above
        if axis == -1:
            best = node, index


def _above(v: ir.Value, axis: int, product: Product) -> tuple[ir.Node, int, int] | None:
    """The operator that makes `v` if it treats all channels alike, its data input, and where they lie in that."""
    node, dims = v.producer(), product.dims
    if node is None or node.domain != "" or node.graph is not product.node.graph:
        return None
    if node.op_type in ("Mul", "Div"):
        for index in (0, 1) if node.op_type == "Mul" else (0,):
            if _is_number(node.inputs[1 - index], dims):
                return node, index, axis
        return None
    x = node.inputs[0] if node.inputs else None
    before, after = (None if x is None else dims.get(x)), dims.get(v)
    if before is None or after is None:
        return None
    if node.op_type == "Transpose":
        order = graph.attribute(node, "perm", list(reversed(range(len(before)))))
        return node, 0, int(order[axis]) - len(before)
    if node.op_type == "Expand" and len(before) >= -axis and before[axis] == product.size:
        return node, 0, axis
    if node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        shape = [product.size if a == len(after) + axis else 1 for a in range(len(after))]
        found = axes.reshaped(np.arange(product.size).reshape(shape), after, before)
        if found is None or max(found.spans) > 1 or product.size not in found.labels.shape:
            return None
        return node, 0, found.labels.shape.index(product.size) - len(before)
    return None


def _is_number(v: ir.Value | None, dims: Mapping[ir.Value, Dims]) -> bool:
    if v is None:
        return False
    if graph.is_constant(v):
        assert v.const_value is not None
        return v.const_value.size == 1 and len(v.const_value.shape) <= 1
    return dims.get(v) == ()


def _turn(product: Product, index: int, axis: int, names: graph.Names) -> tuple[ir.Node, int]:
    """Two Transposes in front of an input, between which the channels are the last axis; the use between them."""
    node = product.node
    x = node.inputs[index]
    assert x is not None
    order = list(range(product.ranks[index]))
    order[axis], order[-1] = order[-1], order[axis]
    for side in ("turned", "back"):
        out = graph.value(names(f"{x.name}.{side}"), x.dtype)
        made = graph.add_node(
            node, "Transpose", [node.inputs[index]], [out],
            name=names(f"{node.name}.{side}"), attributes={"perm": order},
        )  # fmt: skip
        node.replace_input_with(index, out)
    return made, 0
