"""com.microsoft.GatherBlockQuantized: embedding tables in 4 or 8 bits, in blocks along the embedding axis.

Codes are uint8 [V, D * bits / 8]. A table that is also the head (tied) shares its codes with MatMulNBits: the same
bytes, seen through a Reshape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.forms import matmul_nbits
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight


class GatherBlock(Form):
    """Gather of a blocked 4 or 8 bit table."""

    name: ClassVar[str] = "gather-block"
    summary: ClassVar[str] = "com.microsoft.GatherBlockQuantized (4, 8 bits; shares codes with a tied MatMulNBits)"
    domains: ClassVar[Mapping[str, int]] = {"com.microsoft": 1}

    def refuses(self, request: Request) -> str:
        """A 2-D table whose rows are whole blocks."""
        spec = request.spec
        if spec.qtype.bits not in (4, 8):
            return f"takes 4 or 8 bits, not {spec.qtype.bits}"
        if len(request.dims) != 2:
            return f"takes a 2-D table, this one is {len(request.dims)}-D"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"takes no {request.dtype.name}"
        if request.use.through is not None:
            return "reads the table through a Transpose"
        if spec.group not in matmul_nbits.BLOCKS:
            return f"takes groups of {', '.join(map(str, matmul_nbits.BLOCKS))}, not {spec.group or 'whole rows'}"
        if request.dims[1] % spec.group:
            return f"takes rows of whole blocks; {request.dims[1]} is not a multiple of {spec.group}"
        return ""

    def opset(self, request: Request) -> int:
        """A contrib operator: any opset will do."""
        return 7

    def write(self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None) -> ir.Node:
        """Replace the Gather."""
        writer.require(self.domains)
        block, bits = q.spec.group, q.spec.qtype.bits
        n, k = q.shape
        stored = matmul_nbits.packed_constants(writer, weight, q, block)
        flat = self._flat(writer, weight, use, stored, [n, k * bits // 8], block)
        inputs: list[ir.Value | None] = [flat[0], use.node.inputs[1], *flat[1:]]
        attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
        return graph.replace_node(use.node, "GatherBlockQuantized", inputs, domain="com.microsoft", attributes=attributes)

    def _flat(self, writer: Writer, weight: Weight, use: Use, stored: list[ir.Value], shape: list[int], block: int) -> list[ir.Value]:
        """2-D views of the tensors that MatMulNBits stores: by Reshape where it uses them, else stored 2-D."""
        blocks = shape[0], -1
        tied = any(u.kind in ("matmul", "gemm") for u in weight.uses)
        wanted = [shape, list(blocks), list(blocks)][: len(stored)]
        views = []
        for value, want in zip(stored, wanted, strict=True):
            tensor = value.const_value
            assert tensor is not None
            if not tied:
                data = np.asarray(tensor.numpy()).reshape(want)
                value.const_value = ir.tensor(data, name=value.name)
                value.shape = ir.Shape(data.shape)
                views.append(value)
                continue
            dims = writer.constant(("shape", *want), "shape", lambda w=want: np.asarray(w, np.int64))  # type: ignore[misc]
            out = graph.value(writer.names(f"{value.name}.rows"), tensor.dtype)
            graph.add_node(use.node, "Reshape", [value, dims], [out], name=writer.names(f"{value.name}.Reshape"))
            views.append(out)
        return views
