"""ai.qgraph.MatMulInt4 and MatMulInt3: weights in tiles of 16 rows, which the native kernels read in one stream.

Codes of 3 bits are widened to 4 when a session opens: a smaller file and the same kernel, not a faster one.
Activations are rounded to int8 with a scale for each weight group (or 128 columns), as MatMulNBits with
accuracy_level 4 does; `activation_bits` 0 keeps them float.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.forms.matmul_packed import MatMulPacked
from qgraph.ops import layout
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Request, Rounding, Writer
from qgraph.weights import Weight

_WHOLE_ROW_BLOCK = 128
_LAYOUTS = {
    3: (layout.pack_int3, layout.INT3_MIDDLE),
    4: (layout.pack_int4, layout.INT4_MIDDLE),
}


class MatMulInt4(MatMulPacked):
    """MatMul and Gemm with a 4-bit weight in groups or per channel."""

    name: ClassVar[str] = "matmul-int4"
    summary: ClassVar[str] = "ai.qgraph.MatMulInt4 (native kernels; int8 activations)"
    op: ClassVar[str] = "MatMulInt4"
    takes_half_scales: ClassVar[bool] = True
    bits: ClassVar[int] = 4
    activation_bits: ClassVar[int] = 8

    def refuses(self, request: Request) -> str:
        """Its own width, in groups of 16 to 256 or per channel."""
        return refuses_spec(request.spec, self.bits) or super().refuses(request)

    def layout(self, request: Request) -> Hashable:
        """For 4 bits that of GatherInt4: a table that is also the head is stored once."""
        return tiles(request)

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """Whole tiles; zero points are bytes."""
        return packed_bytes(spec, n, k)

    def rounding(self, spec: QuantSpec) -> Rounding | None:
        """Blocks as long as the weight's groups."""
        if not self.activation_bits:
            return None
        return Rounding(self.activation_bits, spec.group or _WHOLE_ROW_BLOCK)

    def stored(
        self, writer: Writer, weight: Weight, q: QTensor
    ) -> tuple[list[ir.Value], dict[str, Any]]:
        """Codes, scales and zero points."""
        group = q.spec.group
        rounding = {
            "activation_bits": self.activation_bits,
            "activation_block": group or _WHOLE_ROW_BLOCK,
        }
        return packed_constants(writer, weight, q), {"block_size": group, **rounding}


class MatMulInt3(MatMulInt4):
    """The same with codes of 3 bits in the file."""

    name: ClassVar[str] = "matmul-int3"
    summary: ClassVar[str] = "ai.qgraph.MatMulInt3 (native kernels; int8 activations)"
    op: ClassVar[str] = "MatMulInt3"
    bits: ClassVar[int] = 3


class DynamicInt4(MatMulInt4):
    """The same with activations of 4 bits (W4A4), which want a rotated model."""

    name: ClassVar[str] = "dynamic-int4"
    summary: ClassVar[str] = "ai.qgraph.MatMulInt4 (native kernels; int4 activations)"
    activation_bits: ClassVar[int] = 4

    def rounds_as(self, activation: QuantSpec | None) -> bool:
        """4 bits, chosen at run time."""
        return activation is not None and activation.dynamic and activation.qtype.bits == 4


def refuses_spec(spec: QuantSpec, bits: int = 4) -> str:
    """Why the layout for so many bits cannot hold such codes, or "" where it can."""
    if spec.qtype.bits != bits:
        return f"takes {bits} bits, not {spec.qtype.bits}"
    if spec.is_per_tensor:
        return "has no per-tensor scale; use .ch or a group"
    if spec.group and spec.group not in layout.GROUPS:
        groups = ", ".join(map(str, layout.GROUPS))
        return f"takes groups of {groups}, not {spec.group}"
    return ""


def tiles(request: Request) -> Hashable:
    """The layout of `packed_constants`."""
    return (f"int{request.spec.qtype.bits} tiles", request.use.matrix)


def packed_bytes(spec: QuantSpec, n: int, k: int) -> int:
    """What `packed_constants` of a [n, k] matrix take; float32 scales that float16 holds take half as much."""
    rows, bits = layout.padded(n, layout.ROWS), spec.qtype.bits
    columns = layout.int4_columns(k, spec.group)
    groups = columns // spec.group if spec.group else 1
    stored = layout.padded(columns, layout.INT3_STEP) if bits == 3 else columns
    scale = 2 if spec.scale_dtype == "float16" else 4
    points = 1 if spec.symmetric else rows * groups
    return rows * stored * bits // 8 + rows * groups * scale + points


def packed_constants(writer: Writer, weight: Weight, q: QTensor) -> list[ir.Value]:
    """Codes, scales and zero points as qgraph.ops.layout says; shared by all uses of the weight."""
    q = q.stored_as(signed=False)
    group = q.spec.group
    bits = q.spec.qtype.bits
    key = (weight.name, f"int{bits}")
    pack, middle = _LAYOUTS[bits]
    points = q.zero_point

    def scales() -> np.ndarray[Any, Any]:
        half = q.scale.astype(np.float16)
        is_exact = bool((half.astype(np.float32) == q.scale).all())
        return layout.tile_groups(half if is_exact else q.scale, 0)

    def zero_points() -> np.ndarray[Any, Any]:
        if points is None:
            return np.full((1, 1, 1), middle, np.uint8)
        return layout.tile_groups(points.astype(np.uint8), middle)

    return [
        writer.constant((*key, "codes"), f"{weight.name}.codes", lambda: pack(q.codes, group)),
        writer.constant((*key, "scales"), f"{weight.name}.scale", scales),
        writer.constant(
            ("no zero points", bits) if points is None else (*key, "zero_points"),
            "no_zero_points" if points is None else f"{weight.name}.zero_point",
            zero_points,
        ),
    ]
