"""Dynamic INT8: the activation is quantized when it arrives, the product is computed in integers.

    xq, sx, zx = DynamicQuantizeLinear(x)            one per activation, shared by all its readers
    y = Cast(MatMulInteger(xq, W, zx)) * (sx * sw)   W int8 [K, N], sw per tensor or per output channel

ONNX Runtime fuses the chain into DynamicQuantizeMatMul or MatMulIntegerToFloat; other runtimes run it as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Rounding, Writer
from qgraph.weights import Matrix, Use, Weight


class DynamicInteger(Form):
    """DynamicQuantizeLinear + MatMulInteger for MatMul and Gemm."""

    name: ClassVar[str] = "dynamic-int8"
    summary: ClassVar[str] = (
        "DynamicQuantizeLinear + MatMulInteger (integer arithmetic, ONNX standard)"
    )
    domains: ClassVar[Mapping[str, int]] = {"": 0}

    def refuses(self, request: Request) -> str:
        """8-bit dynamic activations, 8-bit symmetric weights per tensor or channel, 2-D."""
        spec, use = request.spec, request.use
        activation = request.activation
        if activation is None or not activation.dynamic or activation.qtype.bits != 8:
            return "needs dynamic int8 activations"
        if spec.qtype.stored_bits != 8 or not spec.symmetric or spec.group:
            return f"takes symmetric 8-bit weights per tensor or channel, not {spec}"
        if len(request.dims) != 2:
            return f"takes a 2-D weight, this one is {len(request.dims)}-D"
        if request.dtype != ir.DataType.FLOAT:
            return f"takes float32 activations, not {request.dtype.name}"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "takes no transposed activations (Gemm transA=1)"
        if use.kind == "gemm" and graph.attribute(use.node, "alpha", 1.0) != 1.0:
            return "takes no Gemm alpha"
        return ""

    def opset(self, request: Request) -> int:
        """DynamicQuantizeLinear came with opset 11."""
        return 11

    def layout(self, request: Request) -> Hashable:
        """[K, N], as MatMul reads them."""
        n, k = request.use.matrix.shape(request.dims)
        return ("qdq", Matrix((1, 0)), (k, n))

    def rounding(self, spec: QuantSpec) -> Rounding | None:
        """DynamicQuantizeLinear."""
        return Rounding(8)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace MatMul or Gemm by the integer chain."""
        q = q.stored_as(signed=True)
        node, x = use.node, use.node.inputs[0]
        assert x is not None
        n, k = q.shape
        turned = Matrix((1, 0))
        key = (weight.name, "qdq", turned, (k, n))  # [K, N], as MatMul reads it
        codes = writer.packed(
            (*key, "codes"),
            f"{weight.name}.codes",
            lambda: turned.back(q.codes, (k, n)),
            q.spec.qtype.dtype,
        )
        scale_shape = () if q.spec.is_per_tensor else (n,)
        scale = writer.constant(
            (*key, "scale"), f"{weight.name}.scale", lambda: q.scale.reshape(scale_shape)
        )
        base = str(node.outputs[0].name)
        quantized, x_scale, x_zero = self._quantized(writer, node, x)

        def step(
            op: str,
            inputs: list[ir.Value | None],
            kind: ir.DataType,
            suffix: str,
            **attributes: int,
        ) -> ir.Value:
            out = graph.value(writer.names(f"{base}.{suffix}"), kind)
            graph.add_node(
                node, op, inputs, [out], name=writer.names(f"{base}.{op}"), attributes=attributes
            )
            return out

        product = step("MatMulInteger", [quantized, codes, x_zero], ir.DataType.INT32, "int32")
        floats = step("Cast", [product], ir.DataType.FLOAT, "floats", to=int(ir.DataType.FLOAT))
        scales = step("Mul", [x_scale, scale], ir.DataType.FLOAT, "scales")
        if use.kind == "matmul" or len(node.inputs) < 3 or node.inputs[2] is None:
            return graph.replace_node(node, "Mul", [floats, scales])
        bias = node.inputs[2]
        beta = float(graph.attribute(node, "beta", 1.0))
        if beta != 1.0:
            factor = writer.constant(
                ("scalar", beta, "float32"), "beta", lambda: np.asarray(beta, np.float32)
            )
            bias = step("Mul", [bias, factor], ir.DataType.FLOAT, "bias")
        scaled = step("Mul", [floats, scales], ir.DataType.FLOAT, "product")
        return graph.replace_node(node, "Add", [scaled, bias])

    def _quantized(
        self, writer: Writer, node: ir.Node, x: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The quantized activation; shared by all readers in one body, placed before the first of them."""
        body = graph.owner(node)
        kinds = (
            ("quantized", ir.DataType.UINT8),
            ("scale", ir.DataType.FLOAT),
            ("zero_point", ir.DataType.UINT8),
        )

        def make() -> tuple[ir.Value, ...]:
            made = [graph.value(writer.names(f"{x.name}.{name}"), dtype) for name, dtype in kinds]
            name = writer.names(f"{x.name}.DynamicQuantizeLinear")
            graph.add_node(node, "DynamicQuantizeLinear", [x], made, name=name)
            return tuple(made)

        quantized, scale, zero_point = writer.memo(("dynamic", id(body), x), make)
        return quantized, scale, zero_point
