"""ai.qgraph.GatherInt4: embedding rows in 4 bits, from the very bytes that MatMulInt4 reads for a tied head.

A row is spread over its tile of 16 rows. Where the table has no other use, rows that lie together are read faster
(docs/notes/native_operators.md). The operator gives float32; a float16 model has a Cast after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qgraph import graph, ops
from qgraph.forms import matmul_int4
from qgraph.forms.matmul_packed import MAX_K, float_type
from qgraph.ops import bodies
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight


@dataclass(frozen=True)
class GatherInt4(Form):
    """Gather of a 4-bit table in groups or per channel. `tied`: of tables that have other uses, or of those without."""

    tied: bool

    name: ClassVar[str] = "gather-int4"
    summary: ClassVar[str] = "ai.qgraph.GatherInt4 (shares everything with a tied MatMulInt4)"
    domains: ClassVar[Mapping[str, int]] = {bodies.DOMAIN: bodies.VERSION}
    takes_half_scales: ClassVar[bool] = True

    def refuses(self, request: Request) -> str:
        """A 2-D table whose rows the operator picks as they are stored."""
        refused = matmul_int4.refuses_spec(request.spec)
        if refused:
            return refused
        if request.tied != self.tied:
            return f"is for tables {'with' if self.tied else 'without'} other uses"
        if len(request.dims) != 2:
            return f"takes a 2-D table, this one is {len(request.dims)}-D"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"takes no {request.dtype.name}"
        if request.use.through is not None:
            return "reads the table through a Transpose"
        if request.dims[1] > MAX_K:
            return f"has rows of at most {MAX_K}, not {request.dims[1]}"
        return ""

    def opset(self, request: Request) -> int:
        """The operator's body is written for this opset."""
        return bodies.MIN_OPSET

    def layout(self, request: Request) -> Hashable:
        """That of MatMulInt4."""
        return matmul_int4.tiles(request)

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """That of MatMulInt4."""
        return matmul_int4.packed_bytes(spec, n, k)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace the Gather."""
        writer.require(self.domains)
        ops.require(writer.model, "GatherInt4")
        n, k = q.shape
        node, dtype = use.node, float_type(use)
        inputs = [node.inputs[1], *matmul_int4.packed_constants(writer, weight, q)]
        attributes = {"N": n, "K": k, "block_size": q.spec.group}
        if dtype == ir.DataType.FLOAT:
            return graph.replace_node(
                node, "GatherInt4", inputs, domain=bodies.DOMAIN, attributes=attributes
            )
        base = node.outputs[0].name
        rows = graph.value(writer.names(f"{base}.rows"), ir.DataType.FLOAT)
        made = graph.add_node(
            node,
            "GatherInt4",
            inputs,
            [rows],
            name=writer.names(f"{node.name or base}.GatherInt4"),
            domain=bodies.DOMAIN,
            attributes=attributes,
        )
        graph.replace_node(node, "Cast", [rows], attributes={"to": int(dtype)})
        return made
