"""What the rest of a graph demands of an input: a breadth-first walk from the input to the operators that constrain it.

`Trace.limit` is the smallest table that the input's integers index, `Trace.role` says which harmless values fit where
they are used as a shape or a bound, `Trace.sizes` are dimensions that weights or tables fix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qgraph import graph

STEPS = 400  # a longer walk means that the input is ordinary data

# Operators whose outputs hold the same integers as their input, possibly elsewhere.
CARRIERS = {
    "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Concat",
    "Slice", "Split", "Tile", "Where", "Max", "Min", "Clip", "Gather", "GatherElements", "GatherND",
    "Add", "Sub", "Mod", "Abs", "Compress", "CastLike", "Floor", "Round",
}  # fmt: skip
# Operators that leave every dimension of the input where it is.
PLAIN = {
    "Cast", "Identity", "Relu", "Sigmoid", "Tanh", "Neg", "Sqrt", "Exp", "Log", "Abs", "Clip", "LeakyRelu", "Elu",
    "Erf", "Dropout", "QuantizeLinear", "DequantizeLinear", "Softmax", "Gelu",
}  # fmt: skip
# (operator, input) -> role of an integer that arrives there.
ROLES = {
    ("Reshape", 1): "reshape", ("Expand", 1): "ones", ("Tile", 1): "ones", ("ConstantOfShape", 0): "few",
    ("Slice", 1): "zeros", ("Slice", 2): "many", ("Slice", 3): "axes", ("Slice", 4): "ones",
    ("Pad", 1): "zeros", ("TopK", 1): "ones", ("OneHot", 1): "few", ("Loop", 0): "few",
    ("Range", 0): "zeros", ("Range", 1): "few", ("Range", 2): "ones", ("Trilu", 1): "zeros",
    ("Unsqueeze", 1): "axes", ("GroupQueryAttention", 5): "last", ("GroupQueryAttention", 6): "total",
}  # fmt: skip


@dataclass(slots=True)
class Trace:
    """What the graph demands of one input; None and empty where it demands nothing."""

    limit: int | None = None
    role: str | None = None
    rank: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)


def trace(value: ir.Value, model: ir.Model) -> Trace:
    """Follow an input through the graph, its bodies and its functions."""
    found = Trace()
    _trace_shape(value, found)
    is_float = value.dtype is not None and value.dtype.is_floating_point()
    seen = {value}
    # The flag says whether integers arrive there: a float input indexes nothing before it is cast.
    todo = deque([(value, not is_float)])
    while todo and len(seen) < STEPS:
        at, is_integer = todo.popleft()
        for use in at.uses():
            if is_integer:
                _demand(use.node, use.idx, found)
            if (use.node.op_type not in CARRIERS) and not _enters(use.node, model):
                continue
            casts = use.node.op_type == "Cast" and _is_cast_to_integer(use.node)
            for after in _next(use.node, use.idx, model):
                if after not in seen:
                    seen.add(after)
                    todo.append((after, is_integer or casts))
    return found


def _demand(node: ir.Node, index: int, found: Trace) -> None:
    limit = _table_size(node, index)
    if limit is not None and limit > 0:
        found.limit = limit if found.limit is None else min(found.limit, limit)
    elif found.role is None:
        found.role = ROLES.get((node.op_type, index))


def _table_size(node: ir.Node, index: int) -> int | None:
    """How many entries the table has that input `index` of the node points into; 1 where that is not known."""
    op = node.op_type
    if op in ("Gather", "GatherElements", "GatherBlockQuantized") and index == 1:
        axis = graph.attribute(node, "gather_axis" if op == "GatherBlockQuantized" else "axis", 0)
        return _dim(node.inputs[0], axis)
    if op in ("GatherND", "ScatterND") and index == 1:
        return _smallest(node.inputs[0])
    if op == "ScatterElements" and index == 1:
        return _dim(node.inputs[0], graph.attribute(node, "axis", 0))
    if op == "EmbedLayerNormalization" and index in (0, 1):
        return _dim(node.inputs[2 if index == 0 else 4], 0)
    return None


def _trace_shape(value: ir.Value, found: Trace) -> None:
    """Dimensions and rank that the first weights behind the input fix."""
    todo, seen = [value], {value}
    while todo:
        at = todo.pop()
        for node, index in at.uses():
            for axis, size in _fixed(node, index):
                found.sizes.setdefault(axis, size)
            if found.rank is None:
                found.rank = _needed_rank(node, index)
            if node.op_type in PLAIN and index == 0:
                todo.extend(v for v in node.outputs[:1] if v not in seen)
                seen.update(node.outputs[:1])


def _fixed(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
    """(axis, size) pairs of input `index` that the node's other inputs settle."""
    op = node.op_type
    sizes: list[tuple[int, int | None]] = []
    if op == "MatMul" and len(node.inputs) > 1:
        sizes = [(-1, _dim(node.inputs[1], -2))] if index == 0 else [(-2, _dim(node.inputs[0], -1))]
    elif op == "Gemm" and index == 0:
        side = -2 if graph.attribute(node, "transA", 0) else -1
        sizes = [(side, _dim(node.inputs[1], 1 if graph.attribute(node, "transB", 0) else 0))]
    elif op == "Conv" and index == 0:
        channels = _dim(node.inputs[1], 1)
        if channels is not None:
            sizes = [(1, channels * graph.attribute(node, "group", 1))]
    elif op in ("ConvTranspose", "BatchNormalization", "InstanceNormalization") and index == 0:
        sizes = [(1, _dim(node.inputs[1], 0))]
    elif op in ("LSTM", "GRU", "RNN") and index == 0:
        sizes = [(2, _dim(node.inputs[1], 2))]
    elif (
        op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
        and index == 0
    ):
        sizes = [(-1, _dim(node.inputs[1], -1))]
    elif op in ("Add", "Sub", "Mul", "Div") and len(node.inputs) > 1:
        other = node.inputs[1 - index]
        if other is not None and other.const_value is not None and len(other.const_value.shape):
            sizes = [(-1, _dim(other, -1))]
    elif op == "MatMulNBits" and index == 0:
        sizes = [(-1, graph.attribute(node, "K", 0))]
    for axis, size in sizes:
        if size is not None and size > 1:
            yield axis, size


def _needed_rank(node: ir.Node, index: int) -> int | None:
    op = node.op_type
    if op in ("Conv", "ConvTranspose") and index == 0:
        weight = node.inputs[1]
        shape = None if weight is None else graph.static_shape(weight)
        return None if shape is None else len(shape)
    if op == "Gemm" and index < 2:
        return 2
    return 3 if op in ("LSTM", "GRU", "RNN") and index == 0 else None


def _next(node: ir.Node, index: int, model: ir.Model) -> Iterator[ir.Value]:
    """The values that carry on what arrives at input `index`: outputs, body inputs, function inputs."""
    function = model.functions.get(node.op_identifier())
    if function is not None:
        if index < len(function.inputs):
            yield function.inputs[index]
        return
    if node.op_type in ("Loop", "Scan"):
        for body in graph.bodies(node):
            if index < len(body.inputs):
                yield body.inputs[index]
        return
    if node.op_type == "Gather" and index == 1:
        return
    yield from node.outputs


def _enters(node: ir.Node, model: ir.Model) -> bool:
    return node.op_type in ("Loop", "Scan") or node.op_identifier() in model.functions


def _is_cast_to_integer(node: ir.Node) -> bool:
    to = graph.attribute(node, "to", 0)
    return to in (ir.DataType.INT32, ir.DataType.INT64)


def _dim(value: ir.Value | None, axis: int) -> int | None:
    """A dimension of a table or weight; 1 for a table whose shape is unknown would be a guess, so None."""
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def _smallest(value: ir.Value | None) -> int | None:
    if value is None or value.shape is None:
        return None
    sizes = [d for d in value.shape if isinstance(d, int)]
    return int(np.min(sizes)) if sizes else None
