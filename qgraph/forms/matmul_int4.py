"""ai.qgraph.MatMulInt4: 4-bit weights in tiles of 16 rows, which the native kernels read in one stream.

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


class MatMulInt4(MatMulPacked):
    """MatMul and Gemm with a 4-bit weight in groups or per channel."""

    name: ClassVar[str] = "matmul-int4"
    summary: ClassVar[str] = "ai.qgraph.MatMulInt4 (native kernels; int8 activations)"
    op: ClassVar[str] = "MatMulInt4"
    takes_half_scales: ClassVar[bool] = True
    activation_bits: ClassVar[int] = 8

    def refuses(self, request: Request) -> str:
        """4 bits, in groups of 16 to 256 or per channel."""
        return refuses_spec(request.spec) or super().refuses(request)

    def layout(self, request: Request) -> Hashable:
        """That of GatherInt4: a table that is also the head is stored once."""
        return tiles(request)

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


class DynamicInt4(MatMulInt4):
    """The same with activations of 4 bits (W4A4), which want a rotated model."""

    name: ClassVar[str] = "dynamic-int4"
    summary: ClassVar[str] = "ai.qgraph.MatMulInt4 (native kernels; int4 activations)"
    activation_bits: ClassVar[int] = 4

    def rounds_as(self, activation: QuantSpec | None) -> bool:
        """4 bits, chosen at run time."""
        return activation is not None and activation.dynamic and activation.qtype.bits == 4


def refuses_spec(spec: QuantSpec) -> str:
    """Why the layout cannot hold such codes, or "" where it can."""
    if spec.qtype.bits != 4:
        return f"takes 4 bits, not {spec.qtype.bits}"
    if spec.is_per_tensor:
        return "has no per-tensor scale; use .ch or a group"
    if spec.group and spec.group not in layout.GROUPS:
        groups = ", ".join(map(str, layout.GROUPS))
        return f"takes groups of {groups}, not {spec.group}"
    return ""


def tiles(request: Request) -> Hashable:
    """The layout of `packed_constants`."""
    return ("int4 tiles", request.use.matrix)


def packed_constants(writer: Writer, weight: Weight, q: QTensor) -> list[ir.Value]:
    """Codes, scales and zero points as qgraph.ops.layout says; shared by all uses of the weight."""
    q = q.stored_as(signed=False)
    group = q.spec.group
    key = (weight.name, "int4")
    points = q.zero_point

    def scales() -> np.ndarray[Any, Any]:
        half = q.scale.astype(np.float16)
        is_exact = bool((half.astype(np.float32) == q.scale).all())
        return layout.tile_groups(half if is_exact else q.scale, 0)

    def zero_points() -> np.ndarray[Any, Any]:
        if points is None:
            return np.full((1, 1, 1), layout.INT4_MIDDLE, np.uint8)
        return layout.tile_groups(points.astype(np.uint8), layout.INT4_MIDDLE)

    return [
        writer.constant(
            (*key, "codes"), f"{weight.name}.codes", lambda: layout.pack_int4(q.codes, group)
        ),
        writer.constant((*key, "scales"), f"{weight.name}.scale", scales),
        writer.constant(
            ("no zero points",) if points is None else (*key, "zero_points"),
            "no_zero_points" if points is None else f"{weight.name}.zero_point",
            zero_points,
        ),
    ]
