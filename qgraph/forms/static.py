"""Static INT8: the weight behind DequantizeLinear, its operator's activations on calibrated grids.

    DQ(Q(x)), DQ(codes), DQ(bias int32) → Conv → Q

Runtimes fuse the pairs around the operator with it. The Q/DQ around activations and the bias are written by
insert-qdq (`qgraph.qdq`), since several operators share them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import onnx_ir as ir

from qgraph import graph, weights
from qgraph.forms.dequantize import Dequantize
from qgraph.target import Request


class StaticInteger(Dequantize):
    """DequantizeLinear for an operator whose activations have static grids."""

    name: ClassVar[str] = "static-int8"
    summary: ClassVar[str] = "Q/DQ around activations and weight: integer kernels (ONNX standard)"
    with_zero_point: ClassVar[bool] = True  # ONNX Runtime fuses no Gemm without it

    def refuses(self, request: Request) -> str:
        """Static 8- or 16-bit activations, symmetric 8-bit weights per tensor or output channel."""
        spec, use, activation = request.spec, request.use, request.activation
        if activation is None or activation.dynamic:
            return "needs static activations"
        if spec.qtype.onnx_name not in ("INT8", "UINT8") or not spec.symmetric or spec.group:
            return f"takes symmetric 8-bit weights per tensor or channel, not {spec}"
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
