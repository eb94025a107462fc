"""An Add of a constant behind a linear operator → its bias.

    Add(Conv(x, W, b), c)    →   Conv(x, W, b + c)     c one value, or one per output channel
    Add(MatMul(x, W), c)     →   Gemm(x, W, c)         x of rank 2, c one value per output channel

Integer kernels take the bias inside: what is added outside costs a pass over floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph

Array = npt.NDArray[Any]
_KEEP_RANK = frozenset(
    {
        "Cast", "Clip", "Dropout", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization",
        "LeakyRelu", "LogSoftmax", "Relu", "Selu", "Sigmoid", "Softmax", "Sqrt", "Tanh", "Transpose",
    }
)  # fmt: skip


def fold(model: ir.Model, *, to_gemm: bool) -> bool:
    """Fold what can be folded; MatMul becomes Gemm only where asked."""
    names = graph.Names(model)
    changed = False
    for node in graph.nodes(model):
        if node.op_type != "Add" or node.domain != "" or len(node.inputs) != 2:
            continue
        for index in (0, 1):
            source, added = node.inputs[index], node.inputs[1 - index]
            linear = source.producer() if source is not None else None
            if linear is None or added is None or not graph.is_constant(added):
                continue
            if linear.domain != "" or linear.graph is not node.graph:
                continue
            assert source is not None
            if len(source.uses()) != 1 or source.is_graph_output():
                continue
            if linear.op_type in ("Conv", "ConvTranspose"):
                changed |= _into_conv(model, linear, node, added, names)
            elif linear.op_type == "MatMul" and to_gemm:
                changed |= _into_gemm(model, linear, node, added, names)
            break
    return changed


def _into_conv(
    model: ir.Model, conv: ir.Node, add: ir.Node, added: ir.Value, names: graph.Names
) -> bool:
    weight = conv.inputs[1]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    values = graph.small_array(added)
    if weight is None or not graph.is_constant(weight) or values is None:
        return False
    assert weight.const_value is not None
    shape = weight.const_value.shape.numpy()
    group = int(graph.attribute(conv, "group", 1))
    channels = int(shape[0] if conv.op_type == "Conv" else shape[1] * group)
    per_channel = _per_channel(values, channels, len(shape))
    held = None if bias is None else graph.small_array(bias)
    if per_channel is None or (bias is not None and held is None):
        return False
    total = per_channel if held is None else held.astype(np.float64) + per_channel
    dtype = weight.const_value.dtype.numpy()
    name = names(f"{weight.name}.bias" if bias is None else f"{bias.name}.sum")
    made = graph.add_initializer(model.graph, name, np.asarray(total, np.float64).astype(dtype))
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    conv.replace_input_with(2, made)
    _drop(add, conv)
    return True


def _per_channel(values: Array, channels: int, rank: int) -> Array | None:
    """An added constant as one value per channel [C], or None where it is something else."""
    if values.ndim > rank:
        return None
    if values.size == 1:
        return np.full(channels, values.reshape(()), np.float64)
    aligned = (1,) * (rank - values.ndim) + values.shape
    if values.size != channels or aligned[1] != channels:
        return None
    return values.reshape(channels).astype(np.float64)


def _into_gemm(
    model: ir.Model, matmul: ir.Node, add: ir.Node, added: ir.Value, names: graph.Names
) -> bool:
    x, weight = matmul.inputs
    if x is None or weight is None or not graph.is_constant(weight) or _rank(x) != 2:
        return False
    assert weight.const_value is not None and added.const_value is not None
    shape, held = weight.const_value.shape.numpy(), added.const_value.shape.numpy()
    if len(shape) != 2 or tuple(held) not in ((shape[1],), (1, shape[1])):
        return False
    if added.const_value.dtype != weight.const_value.dtype:
        return False
    bias = added
    if len(held) == 2:
        values = np.array(graph.array(added)).reshape(-1)
        bias = graph.add_initializer(model.graph, names(f"{added.name}.flat"), values)
    gemm = graph.replace_node(matmul, "Gemm", [x, weight, bias])
    _drop(add, gemm)
    return True


def _rank(v: ir.Value | None, depth: int = 32) -> int | None:
    """The rank of a value, as far as it is known; many models declare no shapes."""
    node = v.producer() if v is not None else None
    if v is None or v.shape is not None:
        return None if v is None or v.shape is None else len(v.shape)
    if node is None or node.domain != "" or depth == 0:
        return None
    if node.op_type in ("Flatten", "Gemm"):
        return 2
    if node.op_type == "Reshape" and node.inputs[1] is not None:
        shape = graph.small_array(node.inputs[1])
        return None if shape is None else shape.size
    if node.op_type in _KEEP_RANK:
        return _rank(node.inputs[0], depth - 1)
    if node.op_type in ("Add", "Mul", "Sub", "Div", "MatMul"):
        ranks = [_rank(x, depth - 1) for x in node.inputs]
        known = [r for r in ranks if r is not None]
        if len(known) < len(ranks) or (node.op_type == "MatMul" and min(known) < 2):
            return None
        return max(known)
    return None


def _drop(add: ir.Node, linear: ir.Node) -> None:
    """Let the linear operator take the place of the Add behind it, under the Add's name."""
    old, new = add.outputs[0], linear.outputs[0]
    name, type_, shape = old.name, old.type, old.shape
    graph.replace_uses(old, new)
    graph.owner(add).remove(add, safe=True)
    new.name, new.type, new.shape = name, type_, shape
