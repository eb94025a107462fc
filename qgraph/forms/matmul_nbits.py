"""com.microsoft.MatMulNBits: ONNX Runtime's own operator for 2, 4 and 8 bit weights in blocks along K.

Stored as B uint8 [N, ceil(K / block), block * bits / 8], scales [N, blocks], zero points packed like B.
Emitting it directly saves memory at load over DequantizeLinear + MatMul, and needs no opset 21. Its scales have the
type of the activations; where float16 ones are asked for beside float32, a Cast follows them, which ONNX Runtime
folds when it loads the file.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph, numerics
from qgraph.spec import Codes, QTensor, QuantSpec
from qgraph.spool import Packed
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight

BLOCKS = (16, 32, 64, 128, 256)
_PART = 1 << 20  # codes packed at a time


@dataclass(frozen=True)
class MatMulNBits(Form):
    """MatMul and Gemm with a blocked weight. accuracy_level 4: ORT quantizes activations to int8 per block."""

    accuracy_level: int = 4
    name: ClassVar[str] = "matmul-nbits"
    summary: ClassVar[str] = (
        "com.microsoft.MatMulNBits (2, 4, 8 bits; int8 activations inside the kernel)"
    )
    domains: ClassVar[Mapping[str, int]] = {"com.microsoft": 1}
    takes_half_scales: ClassVar[bool] = True

    def refuses(self, request: Request) -> str:
        """A 2-D weight in blocks of 16 to 256 whose reduction axis the operator sums over."""
        spec, use = request.spec, request.use
        if request.activation is not None:
            return "its kernel quantizes activations by itself; ask for float activations"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"takes no {request.dtype.name}"
        if len(request.dims) != 2:
            return f"takes a 2-D weight, this one is {len(request.dims)}-D"
        if spec.qtype.bits in (3, 7):
            return f"takes 2, 4 or 8 bits, not {spec.qtype.bits}"
        if spec.is_per_tensor:
            return "has no per-tensor scale; use .ch or a group"
        if spec.group and spec.group not in BLOCKS:
            return f"takes groups of {', '.join(map(str, BLOCKS))}, not {spec.group}"
        if not spec.symmetric and use.in_body:
            return "ONNX Runtime 1.23 computes wrongly with zero points captured by a body"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "takes no transposed activations (Gemm transA=1)"
        if use.kind == "gemm" and graph.attribute(use.node, "alpha", 1.0) != 1.0:
            return "takes no Gemm alpha"
        return ""

    def opset(self, request: Request) -> int:
        """A contrib operator: any opset will do."""
        return 7

    def layout(self, request: Request) -> Hashable:
        """Rows of whole blocks."""
        return ("nbits", block_of(request.spec, request.use.matrix.shape(request.dims)[1]))

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """Rows of whole blocks; zero points of a row in whole bytes."""
        return packed_bytes(spec, n, k)

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace MatMul by MatMulNBits, Gemm by MatMulNBits and Add."""
        writer.require(self.domains)
        n, k = q.shape
        block = block_of(q.spec, k)
        inputs: list[ir.Value | None] = [
            use.node.inputs[0],
            *packed_constants(writer, weight, q, block),
        ]
        attributes = {"K": k, "N": n, "bits": q.spec.qtype.bits, "block_size": block}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        if use.kind == "matmul" or len(use.node.inputs) < 3 or use.node.inputs[2] is None:
            return graph.replace_node(
                use.node, "MatMulNBits", inputs, domain="com.microsoft", attributes=attributes
            )
        return self._write_gemm(writer, use, inputs, attributes)

    def _write_gemm(
        self, writer: Writer, use: Use, inputs: list[ir.Value | None], attributes: dict[str, Any]
    ) -> ir.Node:
        node = use.node
        beta = float(graph.attribute(node, "beta", 1.0))
        bias = node.inputs[2]
        assert bias is not None
        dtype = node.outputs[0].dtype or (bias.dtype or ir.DataType.FLOAT)
        if beta != 1.0:
            factor = writer.constant(
                ("scalar", beta, dtype), "beta", lambda: np.asarray(beta, dtype.numpy())
            )
            scaled = graph.value(writer.names(f"{bias.name}.scaled"), dtype)
            graph.add_node(
                node, "Mul", [bias, factor], [scaled], name=writer.names(f"{bias.name}.Mul")
            )
            bias = scaled
        product = graph.value(writer.names(f"{node.outputs[0].name}.product"), dtype)
        made = graph.add_node(
            node,
            "MatMulNBits",
            inputs,
            [product],
            name=writer.names(f"{node.name or node.outputs[0].name}.MatMulNBits"),
            domain="com.microsoft",
            attributes=attributes,
        )
        graph.replace_node(node, "Add", [product, bias])
        return made


def block_of(spec: QuantSpec, k: int) -> int:
    """The block that stands for the spec: its group, or for whole rows a block with repeated scales."""
    if spec.group:
        return spec.group
    return next((b for b in BLOCKS if b >= k), 128)


def packed_bytes(spec: QuantSpec, n: int, k: int) -> int:
    """What `packed_constants` of a [n, k] matrix take."""
    block = block_of(spec, k)
    blocks = -(-k // block)
    whole = replace(spec, block=(1, block), symmetric=True)
    points = 0 if spec.symmetric else n * -(-blocks * spec.qtype.stored_bits // 8)
    return whole.nbytes(n, blocks * block) + points


def packed_constants(writer: Writer, weight: Weight, q: QTensor, block: int) -> list[ir.Value]:
    """B, scales and, for asymmetric weights, zero points; shared by all uses of the weight."""
    if q.zero_point is not None:
        q = q.stored_as(signed=False)
    n, k = q.shape
    bits = q.spec.qtype.bits
    blocks = -(-k // block)
    # The operator's codes are unsigned: 2^(bits-1) more than signed ones, which flips their highest bit.
    half = 2 ** (bits - 1) if q.spec.qtype.is_signed else 0
    flip = np.uint8(half * (255 // (2**bits - 1)))

    def codes() -> np.ndarray[Any, Any] | ir.TensorProtocol:
        shape = (n, blocks, block * bits // 8)
        if isinstance(q, Packed) and blocks * block == k:
            # Already in the operator's layout: nothing is written twice.
            stored = q.packed.reshape(shape)
            if not flip:
                return ir.tensor(stored)
            return graph.lazy(lambda: stored ^ flip, ir.DataType.UINT8, shape, "")
        packed = np.empty(shape, np.uint8)
        rows = max(1, _PART // max(k, 1))
        for start in range(0, n, rows):
            part: Codes = q.codes[start : start + rows]
            if blocks * block != k:
                padding = ((0, 0), (0, blocks * block - k))
                part = np.pad(part, padding, constant_values=numerics.midpoint(q.spec))  # type: ignore[assignment]
            flat = numerics.pack(part, bits) ^ flip
            packed[start : start + rows] = flat.reshape(-1, *shape[1:])
        return packed

    def per_block(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.broadcast_to(values, (n, blocks))

    def scales() -> np.ndarray[Any, Any] | ir.TensorProtocol:
        if q.scale.shape == (n, blocks) and q.spec.scale_dtype == q.scale.dtype:
            return ir.tensor(q.scale)
        return np.array(per_block(q.scale), q.spec.scale_dtype)

    key = (weight.name, "nbits", block)
    made = [
        writer.constant((*key, "B"), f"{weight.name}.codes", codes),
        _widened(
            writer, weight, key, writer.constant((*key, "scales"), f"{weight.name}.scale", scales)
        ),
    ]
    if q.zero_point is not None:
        zero_point = q.zero_point

        def points() -> np.ndarray[Any, Any]:
            row = -(-blocks * bits // 8)
            padded = np.zeros((n, row * 8 // bits), np.uint8)
            padded[:, :blocks] = per_block(zero_point)
            return numerics.pack(padded, bits)

        made.append(writer.constant((*key, "zero_points"), f"{weight.name}.zero_point", points))
    return made


def _widened(
    writer: Writer, weight: Weight, key: tuple[Hashable, ...], scale: ir.Value
) -> ir.Value:
    """float16 scales in the type of the activations; those that arrived with codes have it already."""
    assert weight.value.const_value is not None
    dtype = weight.value.const_value.dtype
    if scale.dtype == dtype or dtype not in graph.FLOATS:
        return scale

    def make() -> tuple[ir.Value, ...]:
        wide = graph.value(writer.names(f"{scale.name}.wide"), dtype, scale.shape)
        # All uses read it, bodies too: in front of everything.
        first = next(iter(writer.model.graph))
        attributes = {"to": int(dtype)}
        name = writer.names(f"{scale.name}.Cast")
        graph.add_node(first, "Cast", [scale], [wide], name=name, attributes=attributes)
        return (wide,)

    return writer.memo((*key, "wide"), make)[0]
