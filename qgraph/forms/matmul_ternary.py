"""ai.qgraph.MatMulTernary: weights of {-s, 0, s} per channel in 2 bits, without loss.

Activations are rounded to int8 with one scale per row, as BitNet b1.58 models are trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import ternary
from qgraph.forms.matmul_packed import MatMulPacked
from qgraph.ops import layout
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Request, Rounding, Writer
from qgraph.weights import Weight


@dataclass(frozen=True)
class MatMulTernary(MatMulPacked):
    """MatMul and Gemm with an exactly ternary weight."""

    activation_bits: int = 8
    name: ClassVar[str] = "matmul-ternary"
    summary: ClassVar[str] = "ai.qgraph.MatMulTernary (native kernels; int8 activations)"
    op: ClassVar[str] = "MatMulTernary"

    def refuses(self, request: Request) -> str:
        """2-bit symmetric weights per channel or per tensor, whose values are ternary."""
        spec = request.spec
        if spec.qtype.bits != 2 or not spec.symmetric:
            return f"takes symmetric 2-bit weights, not {spec}"
        if spec.group:
            return f"takes a scale per channel or per tensor, not groups of {spec.group}"
        refused = super().refuses(request)
        if refused:
            return refused
        if not ternary.is_ternary(request.use):
            return "the weight has other values than -s, 0 and s in a row"
        return ""

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """At most: whole tiles, and a scale for each row where rows have different ones."""
        tiles = layout.padded(n, layout.ROWS) * layout.padded(k, layout.TERNARY_STEP)
        return tiles // 4 + 4 * n

    def rounding(self, spec: QuantSpec) -> Rounding | None:
        """Whole rows."""
        return Rounding(self.activation_bits, 0) if self.activation_bits else None

    def stored(
        self, writer: Writer, weight: Weight, q: QTensor
    ) -> tuple[list[ir.Value], dict[str, Any]]:
        """Codes, and one scale where all rows have the same."""
        q = q.stored_as(signed=True)
        if q.codes.size and q.codes.min() < -1:
            raise ValueError(f"{weight.label} has codes below -1; solve it with solver ternary")
        scale = q.scale.reshape(-1)
        if bool((scale == scale[0]).all()):
            scale = scale[:1]
        key = (weight.name, "ternary")
        constants = [
            writer.constant(
                (*key, "codes"), f"{weight.name}.codes", lambda: layout.pack_ternary(q.codes)
            ),
            writer.constant(
                (*key, "scale"),
                f"{weight.name}.scale",
                lambda: np.ascontiguousarray(scale, np.float32),
            ),
        ]
        return constants, {"activation_bits": self.activation_bits, "activation_block": 0}
