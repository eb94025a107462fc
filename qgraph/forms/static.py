"""Static INT8: the weight behind DequantizeLinear, its operator's activations on calibrated grids.

    DQ(Q(x)), DQ(codes), DQ(bias int32) → Conv → Q

Runtimes fuse the pairs around the operator with it. The Q/DQ around activations and the bias are written by
insert-qdq (`qgraph.qdq`), since several operators share them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph, numerics, weights
from qgraph.forms.dequantize import Dequantize
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Request, Writer
from qgraph.weights import Use, Weight


class StaticInteger(Dequantize):
    """DequantizeLinear for an operator whose activations have static grids."""

    name: ClassVar[str] = "static-int8"
    summary: ClassVar[str] = "Q/DQ around activations and weight: integer kernels (ONNX standard)"
    with_zero_point: ClassVar[bool] = True  # ONNX Runtime fuses no Gemm without it

    def __init__(self, *, unsigned: bool = True) -> None:
        """`unsigned`: the runtime computes on uint8 weights too."""
        self.unsigned = unsigned

    def refuses(self, request: Request) -> str:
        """Static activations, 7- or 8-bit weights per tensor or output channel with one zero point for all."""
        spec, use, activation = request.spec, request.use, request.activation
        if activation is None or activation.dynamic:
            return "needs static activations"
        if spec.qtype.stored_bits != 8 or spec.group:
            return f"takes 8-bit weights per tensor or channel, not {spec}"
        if not spec.symmetric and (spec.qtype.is_signed or not spec.is_per_tensor):
            return (
                f"takes symmetric weights, or uint8 with one zero point for all of them, not {spec}"
            )
        if not spec.qtype.is_signed and not self.unsigned:
            return f"takes signed weights, not {spec}: the runtime expands unsigned ones to float"
        if request.dtype != ir.DataType.FLOAT:
            return f"takes float32 activations, not {request.dtype.name}"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "takes no transposed activations (Gemm transA=1)"
        if use.kind == "gemm" and graph.attribute(use.node, "alpha", 1.0) != 1.0:
            return "takes no Gemm alpha"
        if use.index != 1:
            return "takes the weight as second input only"
        return _bias_problem(request) or super().refuses(replace(request, activation=None))

    def opset(self, request: Request) -> int:
        """As DequantizeLinear; 21 for 16-bit activations."""
        assert request.activation is not None
        wide = request.activation.qtype.bits == 16
        return max(21 if wide else 10, super().opset(replace(request, activation=None)))

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """As DequantizeLinear; unsigned codes stay unsigned, with their middle as zero point."""
        if not q.spec.qtype.is_signed and q.zero_point is None:
            middle = np.full(q.scale.shape, numerics.midpoint(q.spec), q.spec.qtype.container)
            spec = replace(q.spec, symmetric=False)
            q = QTensor(spec, q.codes, q.scale, middle, q.error)
        return super().write(writer, weight, use, q, activation)


def _bias_problem(request: Request) -> str:
    """Why the bias of an operator has no int32 form, or ""."""
    node = request.use.node
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or request.use.kind == "matmul":
        return ""
    if not graph.is_constant(bias):
        return "takes a constant bias, not a computed one"
    n = request.use.matrix.shape(request.dims)[0]
    if request.use.kind == "conv_transpose":
        n *= int(graph.attribute(node, "group", 1))
    shape = weights.tensor_shape(bias)
    if request.use.kind == "gemm" and graph.attribute(node, "beta", 1.0) != 1.0:
        return "takes no Gemm beta"
    taken = {(n,), (1, n), (), (1,), (1, 1)} if request.use.kind == "gemm" else {(n,)}
    return "" if shape in taken else f"takes a bias of shape [{n}], not {list(shape)}"
