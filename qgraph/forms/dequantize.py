"""DequantizeLinear(codes, scale[, zero point]) → operator: the portable QDQ form, per tensor, channel or block.

One DequantizeLinear per use, in the user's own body: runtimes fuse pairs, not fans. Codes and scales are shared.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Matrix, Use, Weight


class Dequantize(Form):
    """Weight-only QDQ. `direct` wants the codes stored as the operator reads them, without a Transpose between."""

    name: ClassVar[str] = "dequantize-linear"
    summary: ClassVar[str] = "DequantizeLinear before the operator (ONNX standard, any runtime)"
    domains: ClassVar[Mapping[str, int]] = {"": 0}
    with_zero_point: ClassVar[bool] = False
    """Write zero points also where they are all zero."""

    def refuses(self, request: Request) -> str:
        """Activations must be float; the granularity must have an ONNX form."""
        if request.activation is not None:
            return "quantizes weights only"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"DequantizeLinear gives no {request.dtype.name}"
        if not request.spec.qtype.onnx_name:
            return f"ONNX has no type for {request.spec.qtype.name}"
        matrix, dims = _stored(request.use, request.dims, request.tied)
        form = matrix.onnx_form(request.spec, dims)
        return form if isinstance(form, str) else ""

    def opset(self, request: Request) -> int:
        """10 per tensor, 13 per axis, 21 for blocks and 4 bits, 25 for 2 bits, 19 for float16."""
        matrix, dims = _stored(request.use, request.dims, request.tied)
        form = matrix.onnx_form(request.spec, dims)
        assert not isinstance(form, str)
        axis, block, _ = form
        needs = [10]
        if axis is not None:
            needs.append(21 if block else 13)
        needs.append({8: 10, 4: 21, 2: 25}[request.spec.qtype.stored_bits])
        if request.dtype == ir.DataType.FLOAT16:
            needs.append(19)
        return max(needs)

    def layout(self, request: Request) -> Hashable:
        """As the operator reads them; a tied table as it lies."""
        return ("qdq", *_stored(request.use, request.dims, request.tied))

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Insert the DequantizeLinear in front of the use."""
        matrix, dims = _stored(use, weight.dims, weight.is_tied)
        untransposed = use.through is not None and weight.is_tied
        home, anchor = writer.place(weight, use)
        # ONNX Runtime moves a Transpose before the DequantizeLinear; without a zero point 1.23 takes codes for uint8.
        values = constants(
            writer,
            weight,
            q,
            matrix,
            dims,
            home,
            with_zero_point=untransposed or self.with_zero_point,
        )
        form = matrix.onnx_form(q.spec, dims)
        assert not isinstance(form, str)
        axis, block, _ = form
        attributes: dict[str, Any] = {}
        if axis is not None and (axis != 1 or block):
            attributes["axis"] = axis
        if block:
            attributes["block_size"] = block
        assert weight.value.const_value is not None
        dtype = weight.value.const_value.dtype
        out = graph.value(writer.names(f"{weight.name}.dequantized"), dtype, dims)
        graph.add_node(
            anchor,
            "DequantizeLinear",
            values,
            [out],
            name=writer.names(f"{weight.name}.DequantizeLinear"),
            attributes=attributes,
        )
        if untransposed:
            assert use.through is not None
            turned = graph.value(
                writer.names(f"{weight.name}.transposed"),
                dtype,
                [dims[p] for p in _perm(use.through, len(dims))],
            )
            graph.add_node(
                anchor,
                "Transpose",
                [out],
                [turned],
                name=writer.names(f"{weight.name}.Transpose"),
                attributes={"perm": _perm(use.through, len(dims))},
            )
            out = turned
        use.node.replace_input_with(use.index, out)
        return use.node


def _perm(transpose: ir.Node, rank: int) -> list[int]:
    return [int(p) for p in graph.attribute(transpose, "perm", list(reversed(range(rank))))]


def _stored(use: Use, dims: tuple[int, ...], tied: bool) -> tuple[Matrix, tuple[int, ...]]:
    """Layout and shape of the codes: as the operator reads them, or as the table lies where that is shared."""
    if use.through is None or tied:
        return use.matrix, dims
    perm = _perm(use.through, len(dims))
    return Matrix(tuple(perm.index(p) for p in use.matrix.perm), use.matrix.rows), tuple(
        dims[p] for p in perm
    )


def constants(
    writer: Writer,
    weight: Weight,
    q: QTensor,
    matrix: Matrix,
    dims: tuple[int, ...],
    home: ir.Graph,
    *,
    with_zero_point: bool = False,
) -> list[ir.Value]:
    """Codes, scale and, where needed or wanted, zero point as DequantizeLinear reads them; shared between uses."""
    zero_point = q.zero_point
    if zero_point is None:
        q = q.stored_as(signed=True)
        if with_zero_point:
            zero_point = np.zeros(q.scale.shape, np.int8)
    form = matrix.onnx_form(q.spec, dims)
    assert not isinstance(form, str)
    _, block, scale_shape = form
    key = (weight.name, "qdq", matrix, dims)

    def spread(per_block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # Blocked scales lie like the tensor itself, with the blocked axis shortened.
        return matrix.back(per_block, scale_shape) if block else per_block.reshape(scale_shape)

    values = [
        writer.packed(
            (*key, "codes"),
            f"{weight.name}.codes",
            lambda: matrix.back(q.codes, dims),
            q.spec.qtype.dtype,
            home,
        ),
        writer.constant(
            (*key, "scale"),
            f"{weight.name}.scale",
            lambda: spread(q.scale).astype(q.spec.scale_dtype),
            home,
        ),
    ]
    if zero_point is not None:
        points = zero_point
        values.append(
            writer.packed(
                (*key, "zero_point"),
                f"{weight.name}.zero_point",
                lambda: spread(points),
                q.spec.qtype.dtype,
                home,
            )
        )
    return values
