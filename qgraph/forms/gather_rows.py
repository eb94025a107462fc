"""Embedding tables in 8 bits: gather the codes of a row and its scale, then multiply. Standard operators only.

    Gather(W, i)   →   Cast(Gather(codes, i)) * Gather(scale, i)        codes int8 [V, ..., D], scale [V, ..., 1]

The same for a Slice of rows (learned positions).

DequantizeLinear before Gather would dequantize the whole table at every run; no runtime fuses that pair.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight


@dataclass(frozen=True)
class GatherRows(Form):
    """Gather or Slice of an 8-bit table with one scale per row. `tied`: also of tables that have other uses."""

    tied: bool = True

    name: ClassVar[str] = "gather-rows"
    summary: ClassVar[str] = (
        "Gather of int8 codes and of row scales, then Mul (ONNX standard, any runtime)"
    )
    domains: ClassVar[Mapping[str, int]] = {"": 0}

    def refuses(self, request: Request) -> str:
        """8 bits, symmetric, one scale per row or tensor, not tied to a MatMul in another layout."""
        spec = request.spec
        if spec.qtype.stored_bits != 8:
            return f"gathers 8-bit codes only; runtimes have no Gather of {spec.qtype.name}"
        if spec.group or not spec.symmetric:
            return f"wants one symmetric scale per row, not {spec}"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"takes no {request.dtype.name}"
        if request.use.through is not None:
            return "reads the table through a Transpose"
        if request.tied and not self.tied:
            return "would store the codes of a tied table twice"
        return ""

    def opset(self, request: Request) -> int:
        """Gather of int8 and Cast are old."""
        return 7

    def layout(self, request: Request) -> Hashable:
        """As the table lies."""
        return ("qdq", request.use.matrix, request.dims)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace the Gather."""
        q = q.stored_as(signed=True)
        assert weight.value.const_value is not None
        dtype = weight.value.const_value.dtype
        dims = weight.dims
        key = (
            weight.name,
            "qdq",
            use.matrix,
            dims,
        )  # codes as DequantizeLinear stores them, so that a tied head shares them
        codes = writer.packed(
            (*key, "codes"),
            f"{weight.name}.codes",
            lambda: use.matrix.back(q.codes, dims),
            q.spec.qtype.dtype,
        )
        rows = (*dims[:-1], 1)
        scale = writer.constant(
            (weight.name, "rows", "scale"),
            f"{weight.name}.row_scale",
            lambda: (
                np.ascontiguousarray(np.broadcast_to(q.scale, (q.shape[0], 1)))
                .reshape(rows)
                .astype(dtype.numpy())
            ),
        )
        node, selection = use.node, list(use.node.inputs[1:])
        base = str(node.outputs[0].name)

        def step(
            op: str,
            inputs: list[ir.Value | None],
            kind: ir.DataType,
            suffix: str,
            **attributes: Any,
        ) -> ir.Value:
            out = graph.value(writer.names(f"{base}.{suffix}"), kind)
            graph.add_node(
                node, op, inputs, [out], name=writer.names(f"{base}.{op}"), attributes=attributes
            )
            return out

        selecting = {a.name: a.value for a in node.attributes.values()}
        picked = step(node.op_type, [codes, *selection], ir.DataType.INT8, "codes", **selecting)
        floats = step("Cast", [picked], dtype, "floats", to=int(dtype))
        scales = step(node.op_type, [scale, *selection], dtype, "scales", **selecting)
        return graph.replace_node(node, "Mul", [floats, scales])
