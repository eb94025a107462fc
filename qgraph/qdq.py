"""QuantizeLinear and DequantizeLinear around activations, and the int32 biases of the operators between them.

One pair per value and graph: readers of one value share it. In the body of an If or Loop a captured value is quantized
inside, since runtimes do not fuse across bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import arrived, graph, numerics, spec
from qgraph.activations import Regions
from qgraph.target import Writer

if TYPE_CHECKING:
    from qgraph.observers import Grid
    from qgraph.spec import QTensor
    from qgraph.weights import Weight

Array = npt.NDArray[Any]
_BIASED = ("Conv", "ConvTranspose", "Gemm")


@dataclass
class Placed:
    """What was written for the static grids of a model, so that some of it can be taken back.

    Attributes:
        pairs: value and its DequantizeLinear's output, in the order of insertion.
        outputs: graph outputs that were renamed: value now hidden → its own name.
        weights: float tensor of each weight, by name.
        uses: weight → the operators that read it.
        biases: operator → its float bias, None where it had none.
        added: MatMul → the Add behind it, which input of that is constant, and the constant before it was corrected.
    """

    pairs: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)
    outputs: dict[ir.Value, str] = field(default_factory=dict)
    weights: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    uses: dict[str, list[ir.Node]] = field(default_factory=dict)
    biases: dict[ir.Node, tuple[str, ir.TensorProtocol] | None] = field(default_factory=dict)
    added: dict[ir.Node, tuple[ir.Node, int, str, ir.TensorProtocol]] = field(default_factory=dict)

    def write(self, writer: Writer, regions: Regions, grids: Mapping[ir.Value, Grid]) -> None:
        """Insert the pairs around activations; what comes out of DequantizeLinear has one."""
        for value, grid in grids.items():
            if arrived.grid_of(value) is None:
                self._around(writer, regions, value, grid)

    def remove(self) -> None:
        """Take all pairs around activations back."""
        for value, dequantized in reversed(self.pairs):
            graph.replace_uses(dequantized, value)
            dequantize = dequantized.producer()
            assert dequantize is not None and dequantize.inputs[0] is not None
            quantize = dequantize.inputs[0].producer()
            assert quantize is not None
            for node in (dequantize, quantize):
                graph.owner(node).remove(node, safe=True)
            if value in self.outputs:
                dequantized.name, value.name = None, self.outputs.pop(value)
        self.pairs.clear()

    def restore(self, model: ir.Model, weight: str) -> None:
        """Give the operators of a weight their float weight and bias back."""
        names = graph.Names(model)
        made = graph.add_initializer(model.graph, names(weight), self.weights[weight])
        for node in self.uses[weight]:
            node.replace_input_with(1, made)
            if node in self.added:
                add, index, name, tensor = self.added.pop(node)
                add.replace_input_with(
                    index, graph.add_initializer(model.graph, names(name), tensor)
                )
            if node not in self.biases:
                continue
            held = self.biases.pop(node)
            if held is None:
                node.resize_inputs(2)
            else:
                bias = graph.add_initializer(model.graph, names(held[0]), held[1])
                node.replace_input_with(2, bias)

    def _around(self, writer: Writer, regions: Regions, value: ir.Value, grid: Grid) -> None:
        home = _home(writer.model, value)
        everywhere = value in regions.produced
        by_graph: dict[ir.Graph, list[tuple[ir.Node, int]]] = {}
        for node, index in value.uses():
            if everywhere or regions.reads_codes(node, index):
                by_graph.setdefault(graph.owner(node), []).append((node, index))
        source = value
        if home in by_graph or everywhere:
            floats = self._pair(writer, home, value, grid, by_graph.pop(home, []))
            if everywhere:
                source = floats
                if value.is_graph_output():
                    self.outputs[value] = str(value.name)
                    _become_output(writer, value, floats)
        for body, inside in by_graph.items():
            for node, index in inside:
                node.replace_input_with(index, source)
            wants = [(n, i) for n, i in inside if regions.reads_codes(n, i)]
            if wants:
                self._pair(writer, body, source, grid, wants)

    def _pair(
        self,
        writer: Writer,
        home: ir.Graph,
        value: ir.Value,
        grid: Grid,
        uses: Sequence[tuple[ir.Node, int]],
    ) -> ir.Value:
        """Q and DQ of a value in one graph, read by these uses; returns what DQ gives."""
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
        graph.add_node(
            quantize, "DequantizeLinear", [codes, *constants], [floats],
            name=writer.names(f"{name}.DequantizeLinear"), after=True,
        )  # fmt: skip
        for node, index in uses:
            node.replace_input_with(index, floats)
        self.pairs.append((value, floats))
        return floats

    def write_bias(
        self,
        writer: Writer,
        node: ir.Node,
        grid: Grid,
        correction: Array | None = None,
        *,
        is_needed: bool = False,
    ) -> None:
        """Turn the constant float bias of a Conv or Gemm into int32 behind DequantizeLinear, scale = s_x * s_w.

        The correction [C] is taken off it; an operator without a bias gets one for it. That of a MatMul is taken off
        what is added behind it. A Conv without either gets the smallest bias there is where one `is_needed`.
        """
        if node.op_type == "MatMul" and correction is not None:
            self._correct_added(writer, node, correction)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        is_made = bias is None and correction is None
        if node.op_type not in _BIASED or (is_made and not (is_needed and node.op_type == "Conv")):
            return
        weight = node.inputs[1]
        dequantize = weight.producer() if weight is not None else None
        assert dequantize is not None
        scales = dequantize.inputs[1]
        assert scales is not None
        values = np.zeros(1) if bias is None else graph.array(bias).astype(np.float64).reshape(-1)
        # A bias that several operators share stays shared unless they are corrected.
        owner = "" if correction is None and bias is not None else str(node.outputs[0].name)
        name = f"{owner}.bias" if bias is None else str(bias.name)
        if correction is not None:
            values = values - correction
        if is_made:
            assert dequantize.inputs[0] is not None
            values = np.zeros(graph.array(dequantize.inputs[0]).shape[0])
        per_channel = graph.array(scales).reshape(-1)
        if values.size < per_channel.size:  # Gemm broadcasts one value
            values = np.full(per_channel.size, values[0])
        elif per_channel.size > 1:  # ConvTranspose shares scales between its groups
            per_channel = np.tile(per_channel, values.size // per_channel.size)
        scale = numerics.bias_scale(grid.scale, per_channel, values.size)
        codes = np.ones(values.size, np.int32) if is_made else numerics.bias_codes(values, scale)
        key = ("bias", owner, name, grid.scale, str(scales.name))
        parts = {"int32": codes, "scale": scale, "zero_point": np.zeros(scale.shape, np.int32)}
        constants = [
            writer.constant((*key, part), f"{name}.{part}", lambda a=array: a)  # type: ignore[misc]
            for part, array in parts.items()
        ]
        out = graph.value(writer.names(f"{name}.dequantized"), ir.DataType.FLOAT, values.shape)
        graph.add_node(
            node, "DequantizeLinear", constants, [out],
            name=writer.names(f"{name}.DequantizeLinear"),
            attributes={"axis": 0} if scale.ndim else {},
        )  # fmt: skip
        node.resize_inputs(3)
        node.replace_input_with(2, out)
        if bias is not None:
            assert bias.const_value is not None
            self.biases[node] = (str(bias.name), bias.const_value)
        else:
            self.biases[node] = None

    def _correct_added(self, writer: Writer, node: ir.Node, correction: Array) -> None:
        held = bias_behind(node, correction.size)
        assert held is not None
        add, index = held
        bias = add.inputs[index]
        assert bias is not None and bias.const_value is not None
        stored = graph.array(bias)
        values = (stored.astype(np.float64) - correction).astype(stored.dtype)
        name = f"{node.outputs[0].name}.bias"
        self.added[node] = (add, index, str(bias.name), bias.const_value)
        add.replace_input_with(index, writer.constant(("added", name), name, lambda: values))


def bias_behind(node: ir.Node, columns: int) -> tuple[ir.Node, int] | None:
    """The Add that alone reads a MatMul's output, and which of its inputs is a constant with a value per column."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output():
        return None
    add, index = uses[0]
    if add.op_type != "Add" or add.domain or add.graph is not node.graph:
        return None
    other = add.inputs[1 - index]
    if other is None or other.const_value is None or not graph.is_constant(other):
        return None
    dims = [int(d) for d in other.const_value.shape.numpy()]
    is_row = bool(dims) and dims[-1] == columns == int(np.prod(dims))
    return (add, 1 - index) if is_row else None


def with_room_for_bias(q: QTensor, weight: Weight, grids: Mapping[ir.Value, Grid]) -> QTensor:
    """Raise the scales of channels whose bias would not fit into int32 steps of s_x * s_w.

    Channels that training switched off have weights near zero and all that is left of them is the bias.
    """
    least = np.zeros_like(q.scale)
    for use in weight.uses:
        node = use.node
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        if (
            x is None
            or x not in grids
            or bias is None
            or not graph.is_constant(bias)
            or q.spec.group
        ):
            continue
        size = np.abs(graph.array(bias).astype(np.float64)).reshape(-1)
        if q.spec.is_per_tensor or size.size != least.size:
            size = np.full(1, size.max(initial=0.0))
        needed = size / (grids[x].scale * 2.0**30)
        least = np.maximum(least, needed.reshape(-1, 1).astype(np.float32))
    if (q.scale >= least).all():
        return q
    scale = np.maximum(q.scale, least)
    codes = numerics.quantize(q.dequantize(), scale, q.zero_point, q.spec)
    return spec.QTensor(q.spec, codes, scale, q.zero_point)


def _home(model: ir.Model, value: ir.Value) -> ir.Graph:
    producer = value.producer()
    if producer is not None:
        return graph.owner(producer)
    return value.graph if isinstance(value.graph, ir.Graph) else model.graph


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
