"""Target `ort-qgraph`: ONNX Runtime 1.23 or newer on CPU with qgraph's native operators.

Products of 3 and 4 bits, ternary products and 4-bit tables become ai.qgraph operators; everything else is written as
for target `ort`. A file for this target also runs without the native library, through the function bodies that it
carries: slower, and with float weights in memory.
"""

from __future__ import annotations

from qgraph.forms.gather_int4 import GatherInt4
from qgraph.forms.matmul_int4 import DynamicInt4, MatMulInt3, MatMulInt4
from qgraph.forms.matmul_ternary import MatMulTernary
from qgraph.registry import register
from qgraph.target import Target
from qgraph.targets.ort import ORT, inspect

_NATIVE = (MatMulTernary(), MatMulInt4(), DynamicInt4(), MatMulInt3())

ORT_QGRAPH = register(
    Target(
        name="ort-qgraph",
        summary="ONNX Runtime >= 1.23 on CPU with qgraph's native operators",
        forms={
            **ORT.forms,
            "matmul": (*_NATIVE, *ORT.forms["matmul"]),
            "gemm": (*_NATIVE, *ORT.forms["gemm"]),
            "gather": (GatherInt4(tied=True), *ORT.forms["gather"], GatherInt4(tied=False)),
        },
        max_opset=ORT.max_opset,
        auto=ORT.auto,
        inspect=inspect,
        timed=True,
        integers=ORT.integers,
        notes={
            "matmul-int4": ("MatMulInt4 rounds activations to int8, group by group.",),
            "matmul-int3": (
                "MatMulInt3 is widened to 4 bits in memory, and rounds activations to int8, group by group.",
            ),
            "dynamic-int4": ("MatMulInt4 rounds activations to int4, group by group.",),
            "matmul-ternary": ("MatMulTernary rounds activations to int8, row by row.",),
            **ORT.notes,
        },
    )
)
