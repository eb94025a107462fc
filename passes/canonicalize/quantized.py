"""QuantizeLinear of a constant → its codes: what quantization-aware training exports, weights stored in float.

QuantizeLinear(W, s, z)   →   codes     per tensor, per axis or in blocks; not a bit changes
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, numerics
from qgraph.spec import QTYPES, QType, QuantSpec

Array = npt.NDArray[Any]


def fold_quantize(model: ir.Model) -> bool:
    """Replace QuantizeLinear of a float32 constant on a constant grid by an initializer of its codes."""
    names = graph.Names(model)
    folded: dict[Any, ir.Value] = {}
    changed = False
    for node in graph.nodes(model):
        if node.op_type != "QuantizeLinear" or node.domain != "" or len(node.inputs) < 2:
            continue
        qtype = _type(node)
        w, scale, *rest = node.inputs
        zero = rest[0] if rest else None
        constants = [v for v in (w, scale, zero) if v is not None]
        if qtype is None or not all(map(graph.is_constant, constants)):
            continue
        assert w is not None and scale is not None
        if w.dtype != ir.DataType.FLOAT or node.outputs[0].is_graph_output():
            continue
        key = (*constants, str(node.attributes))
        if key not in folded:
            codes = _codes(node, qtype, w, scale, zero)
            folded[key] = graph.add_initializer(model.graph, names(f"{w.name}.codes"), codes)
        graph.replace_uses(node.outputs[0], folded[key])
        graph.owner(node).remove(node, safe=True)
        changed = True
    return changed


def _type(node: ir.Node) -> QType | None:
    """The integer type that a QuantizeLinear gives, or None where it gives another kind or that is not known."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        dtype = zero.const_value.dtype if zero.const_value is not None else None
    else:
        dtype = ir.DataType(int(graph.attribute(node, "output_dtype", 0)) or ir.DataType.UINT8)
    return None if dtype is None else QTYPES.get(dtype.name.lower())


def _codes(
    node: ir.Node, qtype: QType, w: ir.Value, scale: ir.Value, zero: ir.Value | None
) -> ir.TensorProtocol:
    """A lazy tensor of the codes. Its operands are captured now: the node goes away."""
    tensors = [None if v is None else v.const_value for v in (w, scale, zero)]
    axis = int(graph.attribute(node, "axis", 1))
    block = int(graph.attribute(node, "block_size", 0))
    held = tensors[0]
    assert held is not None

    def compute() -> Array:
        data, s, z = (None if t is None else np.asarray(t.numpy()) for t in tensors)
        assert data is not None and s is not None
        points = np.zeros(s.shape, np.int8) if z is None else z
        found = quantize(data, s, points.astype(qtype.container), qtype, axis, block)
        return found.astype(qtype.dtype.numpy())

    return graph.lazy(compute, qtype.dtype, held.shape.numpy(), f"{w.name}.codes")


def quantize(w: Array, scale: Array, zero: Array, qtype: QType, axis: int, block: int) -> Array:
    """QuantizeLinear on a tensor of any rank: the matrix of `numerics` has the axis last in blocks, first otherwise."""
    if block:
        turned = np.moveaxis(w, axis, -1)
        grain, grid = (1, block), [np.moveaxis(a, axis, -1) for a in (scale, zero)]
        rows = [a.reshape(-1, a.shape[-1]) for a in grid]
    elif scale.size == 1:
        turned, grain, rows = w.reshape(1, -1), (0, 0), [a.reshape(1, 1) for a in (scale, zero)]
    else:
        turned = np.moveaxis(w, axis, 0)
        grain, rows = (1, 0), [a.reshape(-1, 1) for a in (scale, zero)]
    matrix = turned.reshape(-1, turned.shape[-1]) if block else turned.reshape(len(turned), -1)
    spec = QuantSpec(qtype, grain, symmetric=False)
    codes = numerics.quantize(matrix, rows[0].astype(np.float32), rows[1], spec)
    found = codes.reshape(turned.shape)
    if scale.size == 1 and not block:
        return found.reshape(w.shape)
    return np.ascontiguousarray(np.moveaxis(found, -1 if block else 0, axis))
