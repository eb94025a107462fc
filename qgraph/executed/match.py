"""Which executed kernel computes each value of a model that qgraph wrote.

A runtime fuses: the value of a MatMul may vanish into the bias Add, activation or QuantizeLinear behind it, and the
node that carries its name may be the last multiplication of a chain. So a value is looked up by name; one that vanished
is followed to its only consumer, a few steps down; and from the node found there the kernel is searched a few steps up
through element-wise and layout nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qgraph import graph
from qgraph.executed import ConstantInput, ExecutedGraph, ExecutedNode

How = Literal["integer", "quantized weight", "unfused", "float", "unknown"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What computes a value.

    Attributes:
        kernel: as users know it, e.g. "MatMulNBits int8-activation (accuracy_level 4)".
        integer: the kernel reads the weight's codes itself; False for a float kernel, whatever feeds it.
        weight_dtype: type in which the weight is kept while the model is loaded, "" if there is none.
        how: "integer" multiplies integers, "quantized weight" expands codes inside the kernel, "unfused" expands the
            whole weight before a float kernel at every run, "float" has a float weight, "unknown" was not found.
        detail: more about it, for people.
    """

    kernel: str
    integer: bool
    weight_dtype: str
    how: How
    detail: str = ""


_AROUND = """
    Add Sub Mul Div Cast CastLike Reshape Transpose Squeeze Unsqueeze Flatten Identity Min Max Neg Abs Sqrt Pow
    Relu LeakyRelu Clip Sigmoid HardSigmoid HardSwish Swish Tanh Gelu FastGelu BiasGelu QuickGelu Softplus
    QuantizeLinear DequantizeLinear ReorderInput ReorderOutput SkipLayerNormalization
    Eltwise Subgraph Convert Reorder FakeQuantize"""
_SAME_VALUES = "Cast Reshape Transpose Squeeze Unsqueeze Flatten Identity ReorderInput"
_INTEGER_KERNELS = """
    DynamicQuantizeMatMul MatMulIntegerToFloat MatMulInteger QLinearMatMul QGemm QLinearConv ConvInteger
    DynamicQuantizeLSTM QAttention"""

LIGHT = frozenset(_AROUND.split())
"""Operators and OpenVINO layer types that sit around a kernel and are never the kernel themselves."""

_FORWARDING = frozenset(_SAME_VALUES.split())
_INTEGER = frozenset(_INTEGER_KERNELS.split())
_WEIGHT_INPUT = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "Gather": 0}
_CODES = ("int2", "int4", "int8", "uint2", "uint4", "uint8")
_OPENVINO_CODES = {f"{s}int{b}": f"{'u' if s else 'i'}{b}" for s in ("", "u") for b in (1, 2, 4, 8)}
_OPENVINO_CODES |= {"nf4": "nf4", "f4e2m1": "f4e2m1", "f8e4m3": "f8e4m3", "f8e5m2": "f8e5m2"}


def what_runs(
    executed: ExecutedGraph, outputs: Sequence[str], model: ir.Model | None = None, steps: int = 6
) -> dict[str, Ran]:
    """For each value of the model, the kernel that now computes it.

    Args:
        executed: the graph that the runtime executes.
        outputs: names of values in the model, usually the outputs of the nodes that use quantized weights.
        model: the model as qgraph wrote it; without it a value that vanished is not followed.
        steps: how far a value is followed down, and a kernel is searched up.
    """
    consumers = _consumers(model) if model is not None else {}
    readers = _Readers(executed, model, outputs) if model is not None else None
    found = {}
    for name in outputs:
        node = _landing(executed, name, consumers, steps)
        if node is None and readers is not None:
            node = readers.of(name)
        kernels = _kernels(executed, node, steps) if node is not None else []
        found[name] = _describe(executed, kernels or [node])
    return found


def _consumers(model: ir.Model) -> Mapping[str, list[ir.Node]]:
    found: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph.nodes(model):
        for value in {id(v): v for v in node.inputs if v is not None}.values():
            found[value.name or ""].append(node)
    return found


def _landing(
    executed: ExecutedGraph, name: str, consumers: Mapping[str, list[ir.Node]], steps: int
) -> ExecutedNode | None:
    """The executed node that carries a value's name, or that of the value it was fused into."""
    for _ in range(steps + 1):
        node = executed.producer(name)
        if node is not None:
            return node
        users = consumers.get(name, [])
        if len(users) != 1 or users[0].op_type not in LIGHT or len(users[0].outputs) != 1:
            return None
        name = users[0].outputs[0].name or ""
    return None


class _Readers:
    """Finds the executed node by what keeps its name: layout changes rename values, but neither nodes nor constants."""

    def __init__(self, executed: ExecutedGraph, model: ir.Model, outputs: Sequence[str]) -> None:
        self._executed = executed
        self._codes: dict[str, str] = {}
        self._nodes: dict[str, ir.Node] = {}
        self._uses: dict[str, list[str]] = defaultdict(list)
        asked = set(outputs)
        for node in graph.nodes(model):
            name = graph.output_name(node)
            if name not in asked:
                continue
            self._nodes[name] = node
            codes = _weight_codes(node)
            if codes:
                self._codes[name] = codes
                self._uses[codes].append(name)

    def of(self, output: str) -> ExecutedNode | None:
        """The node for the operator with that output; where several read its codes, the one of the same rank."""
        codes = self._codes.get(output)
        if codes is None:
            return None
        found = _reading(self._executed, codes)
        if len(found) == len(self._uses[codes]):
            return found[self._uses[codes].index(output)]
        return self._by_node(self._nodes[output])

    def _by_node(self, node: ir.Node) -> ExecutedNode | None:
        """OpenVINO lists the names of nodes too; the QuantizeLinear behind an operator always has one."""
        for _ in range(4):
            found = self._executed.producer(node.name or "")
            if found is not None:
                return found
            readers = node.outputs[0].consumers()
            if len(readers) != 1 or readers[0].op_type not in LIGHT:
                return None
            node = readers[0]
        return None


def _weight_codes(node: ir.Node) -> str:
    """The name of the codes behind the DequantizeLinear that an operator reads its weight from."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    source = weight.producer() if weight is not None else None
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0] is None:
        return ""
    return (source.inputs[0].name or "") if graph.is_constant(source.inputs[0]) else ""


def _reading(executed: ExecutedGraph, name: str) -> list[ExecutedNode]:
    """The kernels that read a constant, through layout changes and DequantizeLinear."""
    found: list[ExecutedNode] = []
    for node in executed.nodes:
        if name not in node.inputs:
            continue
        if node.op not in LIGHT:
            found.append(node)
            continue
        passed = [node.name] if executed.runtime == "openvino" else node.outputs
        found += [n for each in passed if each != name for n in _reading(executed, each)]
    return found


def _kernels(executed: ExecutedGraph, start: ExecutedNode, steps: int) -> list[ExecutedNode]:
    """The nodes at or above `start` that are kernels rather than something around one, nearest first."""
    level, kernels = [start], []
    for _ in range(steps + 1):
        kernels += [node for node in level if node.op not in LIGHT]
        around = [node for node in level if node.op in LIGHT]
        above = [_source(executed, name) for node in around for name in node.inputs]
        level = [node for node in above if node is not None]
    return kernels


def _source(executed: ExecutedGraph, name: str) -> ExecutedNode | None:
    """The node behind an input, which OpenVINO names by node and ONNX Runtime by value."""
    if executed.runtime != "openvino":
        return executed.producer(name)
    return next((node for node in executed.nodes if node.name == name), None)


def _describe(executed: ExecutedGraph, kernels: Sequence[ExecutedNode | None]) -> Ran:
    """The nearest kernel; where rows are gathered, the gather of the codes rather than that of their scales."""
    node = kernels[0]
    if node is None:
        text = "no executed node carries it: folded, removed, or in a body that the runtime does not show"
        return Ran("not found", False, "", "unknown", text)
    if node.op in ("If", "Loop", "Scan", "TensorIterator"):
        return Ran(f"inside {node.op}", False, "", "unknown", "computed by one of its bodies")
    describe = _openvino if executed.runtime == "openvino" else _ort
    found = [
        describe(executed, n) for n in kernels if n is not None and n.op == node.op == "Gather"
    ]
    return next((r for r in found if r.integer), describe(executed, node))


def _ort(executed: ExecutedGraph, node: ExecutedNode) -> Ran:
    if node.op == "MatMulNBits":
        level = node.attributes.get("accuracy_level", 0)
        how: How = "integer" if level == 4 else "quantized weight"
        activation = "int8-activation" if level == 4 else "float-activation"
        dtype = f"uint{node.attributes.get('bits', 4)}"
        kernel = f"MatMulNBits {activation} (accuracy_level {level})"
        return Ran(kernel, True, dtype, how, node.detail)
    if node.op == "GatherBlockQuantized":
        return Ran(node.op, True, _gathered(node), "quantized weight", node.detail)
    weight = node.constant(_WEIGHT_INPUT.get(node.op, 1))
    if node.domain == "ai.qgraph":
        dtype = weight.dtype if weight else ""
        return Ran(f"ai.qgraph {node.op}", True, dtype, "quantized weight", node.detail)
    if node.op in _INTEGER:
        return Ran(node.op, True, weight.dtype if weight else "", "integer", node.detail)
    if node.op == "Gather" and weight is not None and weight.dtype in _CODES:
        kernel = f"Gather {weight.dtype} codes"
        return Ran(kernel, True, weight.dtype, "quantized weight", node.detail)
    expanded = _run_time_codes(executed, node)
    if expanded is not None:
        kernel = f"{node.op} float32 after DequantizeLinear (unfused)"
        return Ran(kernel, False, expanded.dtype, "unfused", node.detail)
    dtype = weight.dtype if weight else ""
    return Ran(f"{node.op} {dtype or 'float32'}", False, dtype, "float", node.detail)


def _gathered(node: ExecutedNode) -> str:
    table = node.constant(0)
    if table is None or table.dtype != "uint8":
        return table.dtype if table else ""
    return f"uint{node.attributes.get('bits', 4)}"


def _run_time_codes(executed: ExecutedGraph, node: ExecutedNode) -> ConstantInput | None:
    """The constant codes that a DequantizeLinear expands for this node at every run, if there is one."""
    for name in node.inputs:
        above = executed.producer(name)
        while above is not None and above.op in _FORWARDING and above.inputs:
            above = executed.producer(above.inputs[0])
        if above is not None and above.op == "DequantizeLinear":
            codes = above.constant(0)
            if codes is not None:
                return codes
    return None


def _openvino(executed: ExecutedGraph, node: ExecutedNode) -> Ran:
    index = 0 if node.op == "Gather" else 1
    dtypes = node.input_dtypes
    dtype = dtypes[index] if index < len(dtypes) else ""
    if node.op == "RNNSeq":
        dtype = node.constants[0].dtype if node.constants else ""
    code = _OPENVINO_CODES.get(dtype, "")
    if code and node.op != "Gather" and dtypes[0] in ("int8", "uint8"):
        activation = _OPENVINO_CODES[dtypes[0]]
        kernel = f"{node.op} {activation} activations, {code} weights"
        return Ran(kernel, True, dtype, "integer", node.detail)
    if code:
        return Ran(f"{node.op} {code} weights", True, dtype, "quantized weight", node.detail)
    if index < len(node.inputs) and _is_expanded(executed, node, index):
        kernel = f"{node.op} {dtype} after Convert (unfused)"
        return Ran(kernel, False, dtype, "unfused", node.detail)
    return Ran(f"{node.op} {dtype}".rstrip(), False, dtype, "float", node.detail)


def _is_expanded(executed: ExecutedGraph, node: ExecutedNode, index: int, steps: int = 4) -> bool:
    """True where a weight is computed, through element-wise nodes, from constant codes."""
    if node.constant(index) is not None:
        return False
    level = [_source(executed, node.inputs[index])]
    for _ in range(steps):
        present = [n for n in level if n is not None and n.op in LIGHT]
        if any(c.dtype in _OPENVINO_CODES for n in present for c in n.constants):
            return True
        level = [_source(executed, name) for n in present for name in n.inputs]
    return False
