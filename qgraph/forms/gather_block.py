"""com.microsoft.GatherBlockQuantized: embedding tables in 4 or 8 bits, in blocks along the embedding axis.

Codes are uint8 [V, D * bits / 8]. A table that is also the head (tied) reads the very codes of MatMulNBits,
[V, blocks, block * bits / 8], in place; only its scales go through a Reshape (docs/notes/forms.md, section 5).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
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
    summary: ClassVar[str] = (
        "com.microsoft.GatherBlockQuantized (4, 8 bits; shares codes with a tied MatMulNBits)"
    )
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
            return (
                f"takes rows of whole blocks; {request.dims[1]} is not a multiple of {spec.group}"
            )
        if spec.qtype.bits == 4 and not spec.symmetric:
            return "ONNX Runtime 1.23 gathers 4-bit rows with zero points wrongly"
        indices = request.use.node.inputs[1]
        if request.tied and (indices is None or indices.shape is None):
            return "the rank of the indices is unknown"
        return ""

    def opset(self, request: Request) -> int:
        """A contrib operator: any opset will do."""
        return 7

    def layout(self, request: Request) -> Hashable:
        """Those of MatMulNBits."""
        return ("nbits", request.spec.group)

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """That of MatMulNBits."""
        return matmul_nbits.packed_bytes(spec, n, k)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace the Gather."""
        writer.require(self.domains)
        block, bits = q.spec.group, q.spec.qtype.bits
        n, k = q.shape
        stored = matmul_nbits.packed_constants(writer, weight, q, block)
        node, indices = use.node, use.node.inputs[1]
        attributes: dict[str, Any] = {"gather_axis": 0, "block_size": block, "bits": bits}
        if not _shares_codes(weight):
            for value, columns in zip(
                stored, (k * bits // 8, k // block, k // block * bits // 8), strict=False
            ):
                _reshape_constant(value, (n, columns))
            return graph.replace_node(
                node,
                "GatherBlockQuantized",
                [stored[0], indices, *stored[1:]],
                domain="com.microsoft",
                attributes={**attributes, "quantize_axis": 1},
            )
        dtype = weight.value.dtype or ir.DataType.FLOAT
        base = str(node.outputs[0].name)
        scale_shape = writer.constant(
            ("shape", n, k // block, 1), "shape", lambda: np.asarray([n, k // block, 1], np.int64)
        )
        scales = graph.value(writer.names(f"{base}.scales"), dtype)
        graph.add_node(
            node,
            "Reshape",
            [stored[1], scale_shape],
            [scales],
            name=writer.names(f"{base}.Reshape"),
        )
        rows = graph.value(writer.names(f"{base}.blocks"), dtype)
        made = graph.add_node(
            node,
            "GatherBlockQuantized",
            [stored[0], indices, scales],
            [rows],
            name=writer.names(f"{base}.GatherBlockQuantized"),
            domain="com.microsoft",
            attributes={**attributes, "quantize_axis": 2},
        )
        whole = [0] * _rank(indices) + [k]
        row_shape = writer.constant(("shape", *whole), "shape", lambda: np.asarray(whole, np.int64))
        graph.replace_node(node, "Reshape", [rows, row_shape])
        return made


def _shares_codes(weight: Weight) -> bool:
    """MatMulNBits uses the same table: its B [V, blocks, bytes] is then the only copy."""
    return any(u.kind in ("matmul", "gemm") for u in weight.uses)


def _rank(indices: ir.Value | None) -> int:
    assert indices is not None and indices.shape is not None
    return len(indices.shape)


def _reshape_constant(value: ir.Value, shape: tuple[int, ...]) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(
        np.asarray(value.const_value.numpy()).reshape(shape), name=value.name
    )
    value.shape = ir.Shape(shape)
