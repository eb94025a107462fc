"""QuantizeLinear and DequantizeLinear around activations, and the int32 biases of the operators between them.

One pair per value and graph: readers of one value share it. In the body of an If or Loop a captured value is quantized
inside, since runtimes do not fuse across bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qgraph import graph, numerics
from qgraph.activations import Regions
from qgraph.target import Writer

if TYPE_CHECKING:
    from qgraph.observers import Grid


def write(
    writer: Writer, regions: Regions, grids: Mapping[ir.Value, Grid]
) -> dict[str, list[ir.Node]]:
    """Insert the pairs; returns the Q and DQ nodes made for each value, by name."""
    made: dict[str, list[ir.Node]] = {}
    for value, grid in grids.items():
        made[str(value.name)] = _around(writer, regions, value, grid)
    return made


def _around(writer: Writer, regions: Regions, value: ir.Value, grid: Grid) -> list[ir.Node]:
    home = _home(writer.model, value)
    everywhere = value in regions.produced
    is_output = value.is_graph_output()
    uses = [
        (node, index)
        for node, index in value.uses()
        if everywhere or regions.reads_codes(node, index)
    ]
    by_graph: dict[ir.Graph, list[tuple[ir.Node, int]]] = {}
    for node, index in uses:
        by_graph.setdefault(graph.owner(node), []).append((node, index))
    nodes: list[ir.Node] = []
    if everywhere and (is_output or home not in by_graph):
        by_graph[home] = by_graph.get(home, [])
    source = value
    if home in by_graph:
        pair = _pair(writer, home, value, grid, by_graph[home])
        nodes += pair
        if everywhere:
            source = pair[1].outputs[0]
            if is_output:
                _become_output(writer, value, source)
    for body, inside in by_graph.items():
        if body is home:
            continue
        wants = [(n, i) for n, i in inside if regions.reads_codes(n, i)]
        for node, index in inside:
            node.replace_input_with(index, source)
        if wants:
            nodes += _pair(writer, body, source, grid, wants)
    return nodes


def _home(model: ir.Model, value: ir.Value) -> ir.Graph:
    producer = value.producer()
    if producer is not None:
        return graph.owner(producer)
    return value.graph if isinstance(value.graph, ir.Graph) else model.graph


def _pair(
    writer: Writer,
    home: ir.Graph,
    value: ir.Value,
    grid: Grid,
    uses: Sequence[tuple[ir.Node, int]],
) -> list[ir.Node]:
    """Q and DQ of a value in one graph, read by these uses."""
    name, qtype = str(value.name), grid.spec.qtype
    constants = [
        writer.constant(
            ("grid", grid.scale), f"{name}.scale", lambda: np.asarray(grid.scale, np.float32)
        ),
        writer.constant(
            ("grid", qtype.name, grid.zero_point),
            f"{name}.zero_point",
            lambda: np.asarray(grid.zero_point, qtype.container),
        ),
    ]
    codes = graph.value(writer.names(f"{name}.codes"), qtype.dtype, value.shape)
    floats = graph.value(writer.names(f"{name}.dequantized"), value.dtype, value.shape)
    producer = value.producer()
    after = producer is not None and producer.graph is home
    anchor = producer if after else home[0]
    assert anchor is not None
    quantize = graph.add_node(
        anchor, "QuantizeLinear", [value, *constants], [codes],
        name=writer.names(f"{name}.QuantizeLinear"), after=after,
    )  # fmt: skip
    dequantize = graph.add_node(
        quantize, "DequantizeLinear", [codes, *constants], [floats],
        name=writer.names(f"{name}.DequantizeLinear"), after=True,
    )  # fmt: skip
    for node, index in uses:
        node.replace_input_with(index, floats)
    return [quantize, dequantize]


def _become_output(writer: Writer, old: ir.Value, new: ir.Value) -> None:
    """The graph gives `new` away in the place of `old`, under the same name."""
    home = old.graph
    assert home is not None
    for index, out in enumerate(home.outputs):
        if out is old:
            home.outputs[index] = new
    name = str(old.name)
    old.name = writer.names(f"{name}.float")
    new.name = name
    new.type, new.shape = old.type, old.shape


def write_bias(writer: Writer, node: ir.Node, grid: Grid) -> str:
    """Turn the float bias of a Conv or Gemm into int32 behind DequantizeLinear, scale = s_x * s_w.

    Returns:
        "" or why the bias stays float.
    """
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return ""
    weight = node.inputs[1]
    dequantize = weight.producer() if weight is not None else None
    values = graph.small_array(bias, 1 << 24)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or values is None:
        return "its bias is not constant"
    scales = dequantize.inputs[1]
    assert scales is not None
    scale = numerics.bias_scale(grid.scale, graph.array(scales).reshape(-1), values.size)
    codes = numerics.bias_codes(values.reshape(-1), scale)
    key = ("bias", str(bias.name), grid.scale, str(scales.name))
    constants = [
        writer.constant((*key, "codes"), f"{bias.name}.codes", lambda: codes),
        writer.constant((*key, "scale"), f"{bias.name}.scale", lambda: scale),
        writer.constant(
            (*key, "zero"), f"{bias.name}.zero_point", lambda: np.zeros(scale.shape, np.int32)
        ),
    ]
    out = graph.value(writer.names(f"{bias.name}.dequantized"), bias.dtype, values.reshape(-1).shape)
    graph.add_node(
        node, "DequantizeLinear", constants, [out],
        name=writer.names(f"{bias.name}.DequantizeLinear"),
        attributes={"axis": 0} if scale.ndim else {},
    )  # fmt: skip
    node.replace_input_with(2, out)
    return ""


