"""LSTM with integer products: com.microsoft DynamicQuantizeLSTM, one node for both of its weights.

    LSTM(X, W [D, 4H, I], R [D, 4H, H], B, lengths, h0, c0, P)
        →  DynamicQuantizeLSTM(X, Wq [D, I, 4H], Rq [D, H, 4H], B, lengths, h0, c0, P, sW, zW, sR, zR)

D is the number of directions. The kernel quantizes X once per run, over all steps and rows, and the hidden state at
every step, each with one uint8 scale; gates, biases, peepholes and states stay float. Scales are [D] per tensor and
[D, 4H] per channel; zero points have the same shape, and the kernel takes them per channel only if all are alike.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight

W, R = 1, 2
MIN_ELEMENTS, MIN_HIDDEN = 1 << 15, 32
ONE_ROW = 3 << 15
"""From these sizes on the kernel is no slower than the float LSTM, measured in ONNX Runtime 1.23.2 and 1.31.1.

A direction has 4H * (I + H) elements. Speed over float, one thread, int8 weights per channel, in both versions:
I = H = 32 (8192) 0.76 to 1.06, I = 39 and H = 48 (16704) 0.92 to 1.17, I = H = 64 (32768) 1.23 to 1.45 for sequences
and 0.95 to 0.98 for one step of one row, I = H = 128 (131072) 1.7 to 2.0 and 1.18, I = H = 512 3.2 to 8.7 and 2.8.
The recurrent product alone must pay too: I = 512 and H = 16 (33792) gives 1.0.
"""
_ATTRIBUTES = frozenset(
    [
        "activation_alpha",
        "activation_beta",
        "activations",
        "clip",
        "direction",
        "hidden_size",
        "input_forget",
    ]
)
_QUANTIZED = {W: (8, 9), R: (10, 11)}
"""Where the scale and the zero point of a weight stand."""


class DynamicLstm(Form):
    """DynamicQuantizeLSTM in the place of LSTM."""

    name: ClassVar[str] = "dynamic-lstm"
    summary: ClassVar[str] = (
        "com.microsoft DynamicQuantizeLSTM (integer products, activations quantized at each step)"
    )
    domains: ClassVar[Mapping[str, int]] = {"com.microsoft": 1}

    def refuses(self, request: Request) -> str:
        """LSTM with time first; 8-bit weights per tensor, or symmetric per channel; large enough to gain."""
        spec, node = request.spec, request.use.node
        if node.op_type != "LSTM":
            return f"ONNX Runtime has no integer kernel for {node.op_type}"
        if request.activation is None or not request.activation.dynamic:
            return "needs dynamic int8 activations"
        if spec.qtype.bits != 8 or spec.group or not (spec.symmetric or spec.is_per_tensor):
            return f"takes 8-bit weights per tensor, or symmetric ones per channel, not {spec}"
        if request.dtype != ir.DataType.FLOAT:
            return f"takes float32 activations, not {request.dtype.name}"
        if graph.attribute(node, "layout", 0):
            return "takes sequences with time first (layout 0)"
        unknown = sorted(set(node.attributes) - _ATTRIBUTES - {"layout"})
        return f"has no attribute {', '.join(unknown)}" if unknown else _too_small(request)

    def opset(self, request: Request) -> int:
        """LSTM has had these inputs since opset 7."""
        return 7

    def layout(self, request: Request) -> Hashable:
        """[D, K, 4H]."""
        return self.name

    def partners(self, use: Use) -> tuple[int, ...]:
        """W and R are quantized together."""
        return (R if use.index == W else W,)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Put the weight into the DynamicQuantizeLSTM; the first of the two replaces the LSTM by it."""
        writer.require(self.domains)
        if q.zero_point is None:
            q = q.stored_as(signed=True)
        n, k = q.shape
        directions = _directions(use.node)
        gates = n // directions
        node = writer.memo((self.name, use.node), lambda: _opened(use.node, gates // 4))[
            0
        ].producer()
        assert node is not None
        grain = (directions,) if q.spec.is_per_tensor else (directions, gates)

        def spread(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.array(np.broadcast_to(values.reshape(-1), math.prod(grain))).reshape(grain)

        zero_point = np.zeros((1, 1), np.int8) if q.zero_point is None else q.zero_point
        key, kind = (weight.name, self.name, directions), q.spec.qtype.dtype
        at_scale, at_point = _QUANTIZED[use.index]
        codes = writer.packed(
            (*key, "codes"),
            f"{weight.name}.codes",
            lambda: np.ascontiguousarray(q.codes.reshape(directions, gates, k).swapaxes(1, 2)),
            kind,
        )
        scale = writer.constant((*key, "scale"), f"{weight.name}.scale", lambda: spread(q.scale))
        point = writer.packed(
            (*key, "zero_point"), f"{weight.name}.zero_point", lambda: spread(zero_point), kind
        )
        for index, value in ((use.index, codes), (at_scale, scale), (at_point, point)):
            node.replace_input_with(index, value)
        return node


def _opened(node: ir.Node, hidden: int) -> tuple[ir.Value, ...]:
    """Put a DynamicQuantizeLSTM without quantized weights into the place of an LSTM; returns its outputs."""
    held = list(node.inputs)
    inputs = [*held, *[None] * (max(max(i) for i in _QUANTIZED.values()) + 1 - len(held))]
    attributes = {a.name: a.value for a in node.attributes.values() if a.name in _ATTRIBUTES}
    made = graph.replace_node(
        node,
        "DynamicQuantizeLSTM",
        inputs,
        domain="com.microsoft",
        attributes={**attributes, "hidden_size": hidden},
    )
    return tuple(made.outputs)


def _directions(node: ir.Node) -> int:
    return 2 if graph.attribute(node, "direction", "forward") == "bidirectional" else 1


def _too_small(request: Request) -> str:
    """Why the integer kernel would be slower than the float one, or ""."""
    node, (n, k) = request.use.node, request.use.matrix.shape(request.dims)
    gates = n // _directions(node)
    hidden = gates // 4
    x, w = node.inputs[0], node.inputs[W]
    width = k if request.use.index == W else _last(w)
    elements = gates * (width + hidden)
    steps = None if x is None or x.shape is None else x.shape[:2]
    is_one_row = steps is not None and list(steps) == [1, 1]
    least = ONE_ROW if is_one_row else MIN_ELEMENTS
    if hidden >= MIN_HIDDEN and elements >= least:
        return ""
    text = f"hidden size {hidden} and {elements} elements in a direction are too little for it to be faster than float"
    sizes = f"it takes {MIN_HIDDEN} and {least}" + (
        " for one step of one row" if is_one_row else ""
    )
    return f"{text} ({sizes})"


def _last(v: ir.Value | None) -> int:
    """The last dimension of a weight, 0 where it is not known."""
    if v is None:
        return 0
    if v.const_value is not None:
        return int(v.const_value.shape.numpy()[-1])
    size = v.shape[-1] if v.shape is not None and len(v.shape) else 0
    return size if isinstance(size, int) else 0
