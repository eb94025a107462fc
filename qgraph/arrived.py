"""Models that arrive with Q/DQ of their own (quantization-aware training): every scale stays, every number stays.

    Q/DQ int8, zero point z        →   Q/DQ uint8, zero point z + 128      the same grid in other codes
    Conv → Relu → Q(zero point z)  →   Conv → Q → Clip(codes, min z)       ReLU on codes, bit for bit the same

ONNX Runtime pools, adds and concatenates uint8 alone, and fuses an operator with the QuantizeLinear behind it only
where nothing stands between them; it drops a Relu by itself where the grid starts at 0.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph import activations, graph, numerics
from qgraph.observers import Grid
from qgraph.spec import QTYPES, WIDE_QTYPES, QuantSpec
from qgraph.target import Integers


def to_unsigned(model: ir.Model) -> int:
    """Give activations on per-tensor int8 grids uint8 codes; returns how many QuantizeLinear that were."""
    names = graph.Names(model)
    shifted: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in graph.nodes(model):
        if not _is_step(node, "QuantizeLinear") or graph.is_constant(node.inputs[0]):
            continue
        zero = _zero_point(node, ir.DataType.INT8)
        codes = node.outputs[0]
        readers = list(codes.uses())
        if zero is None or codes.is_graph_output():
            continue
        steps = [n for n, index in readers if index == 0 and _is_step(n, "DequantizeLinear")]
        if len(steps) < len(readers) or any(_number(n) != _number(node) for n in steps):
            continue
        if zero not in shifted:
            moved = np.asarray(graph.array(zero).astype(np.int16) + 128, np.uint8)
            shifted[zero] = graph.add_initializer(
                model.graph, names(f"{zero.name}.unsigned"), moved
            )
        for each in (node, *steps):
            each.replace_input_with(2, shifted[zero])
        codes.type = ir.TensorType(ir.DataType.UINT8)
        count += 1
    return count


def bound_codes(model: ir.Model, integers: Integers) -> int:
    """Move Relu behind the QuantizeLinear that follows it, onto codes; returns how many were."""
    if graph.opset(model) < 12:  # Clip of uint8
        return 0
    names = graph.Names(model)
    count = 0
    for node in graph.nodes(model):
        zero = _zero_point(node, ir.DataType.UINT8) if _is_step(node, "QuantizeLinear") else None
        relu = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if zero is None or relu is None or not int(graph.array(zero).reshape(())):
            continue
        source = relu.inputs[0] if relu.op_type == "Relu" and relu.domain == "" else None
        computed = source.producer() if source is not None else None
        if computed is None or source is None or computed.domain != "":
            continue
        has_kernel = computed.op_type in integers.weighted or computed.op_type in integers.joined
        if not has_kernel or not (_is_private(source, node) and _is_private(relu.outputs[0], node)):
            continue
        codes = node.outputs[0]
        if codes.is_graph_output():
            continue
        least = graph.add_initializer(
            model.graph, names(f"{zero.name}.least"), np.asarray(graph.array(zero)).reshape(())
        )
        readers = list(codes.uses())
        bounded = graph.value(names(f"{codes.name}.bounded"), ir.DataType.UINT8, codes.shape)
        graph.add_node(
            node, "Clip", [codes, least], [bounded], name=names(f"{codes.name}.Clip"), after=True
        )
        for reader, index in readers:
            reader.replace_input_with(index, bounded)
        node.replace_input_with(0, source)
        graph.owner(relu).remove(relu, safe=True)
        count += 1
    return count


def is_on_codes(node: ir.Node) -> bool:
    """Whether an operator's activation comes out of DequantizeLinear, so that it may compute on codes."""
    x = node.inputs[0] if node.inputs else None
    producer = x.producer() if x is not None else None
    return producer is not None and _is_step(producer, "DequantizeLinear")


def grid_of(value: ir.Value | None) -> Grid | None:
    """The grid that a value has from the DequantizeLinear that it comes out of, if there is one for all of it."""
    step = value.producer() if value is not None else None
    if step is None or not _is_step(step, "DequantizeLinear") or len(step.inputs) < 3:
        return None
    _, scale, zero = step.inputs
    if not graph.is_constant(scale) or not graph.is_constant(zero):
        return None
    assert scale is not None and zero is not None and zero.const_value is not None
    name = zero.const_value.dtype.name.lower()
    known = QTYPES | WIDE_QTYPES
    if name not in known or graph.array(scale).size != 1:
        return None
    point = int(graph.array(zero).reshape(-1)[0])
    plain = QuantSpec(known[name], (0, 0))
    spec = replace(plain, symmetric=point == numerics.midpoint(plain))
    return Grid(float(graph.array(scale).reshape(-1)[0]), point, spec)


def gap(node: ir.Node, integers: Integers) -> str:
    """What an operator that arrived quantized lacks for an integer kernel, or ""."""
    if node.op_type not in integers.weighted:
        return f"the target has no integer kernel for {node.op_type}"
    if not is_on_codes(node):
        return "its input is float"
    end = activations.end_of(node)
    readers = [n for n, _ in end.uses()]
    is_quantized = bool(readers) and all(_is_step(n, "QuantizeLinear") for n in readers)
    if not integers.weighted[node.op_type] and (end.is_graph_output() or not is_quantized):
        return "nothing quantizes its result, and the kernel gives nothing but codes"
    return ""


def _is_step(node: ir.Node, op: str) -> bool:
    return node.op_type == op and node.domain == ""


def _zero_point(node: ir.Node, dtype: ir.DataType) -> ir.Value | None:
    """The constant zero point of one grid for the whole tensor, if its type is that."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or not graph.is_constant(zero) or zero.const_value is None:
        return None
    return zero if zero.const_value.dtype == dtype and zero.const_value.size == 1 else None


def _number(node: ir.Node) -> int | None:
    zero = _zero_point(node, ir.DataType.INT8)
    return None if zero is None else int(graph.array(zero).reshape(()))


def _is_private(value: ir.Value, near: ir.Node) -> bool:
    """Read once, in the same graph, and no output."""
    producer = value.producer()
    beside = producer is not None and producer.graph is near.graph
    return beside and len(value.uses()) == 1 and not value.is_graph_output()
