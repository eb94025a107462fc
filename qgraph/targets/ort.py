"""Target `ort`: stock ONNX Runtime, 1.23 or newer, on CPU.

Measured (docs/notes/forms.md): MatMulNBits with accuracy_level 4 is the only weight-only form whose kernel is fast,
for 4 and for 8 bits, and it scales activations per block, so one outlier channel does not spoil the others.
DequantizeLinear + Gather dequantizes the whole table at each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.forms.dequantize import Dequantize
from qgraph.forms.dynamic import DynamicInteger
from qgraph.forms.gather_block import GatherBlock
from qgraph.forms.gather_rows import GatherRows
from qgraph.forms.lstm import DynamicLstm
from qgraph.forms.matmul_nbits import MatMulNBits
from qgraph.forms.static import StaticInteger
from qgraph.registry import register
from qgraph.target import MOVES, Integers, Request, Target

_INT8 = (
    "8-bit blocks in MatMulNBits: the fastest form without calibration that keeps its accuracy where "
    "activations have outliers (dynamic int8 has one scale for the whole activation)"
)
_PORTABLE = (
    "int8 weights; this layout has no fused kernel in ONNX Runtime, so it is smaller but not faster"
)
_LSTM = "LSTM has an integer kernel, which is faster than the float one from this size on"
_RECURRENT = (
    "behind DequantizeLinear it would be slower than float (0.4 to 0.98 of its speed); "
    "--recipe int8-weights makes it smaller all the same"
)


class Unfused(Dequantize):
    """DequantizeLinear for what has no kernel: ONNX Runtime expands the weight at each run."""

    def refuses(self, request: Request) -> str:
        """As Dequantize, and no zero points in bodies: without them MatMulNBits has a kernel there."""
        is_linear = request.use.kind in ("matmul", "gemm")
        if is_linear and request.use.in_body and not request.spec.symmetric:
            return "would be expanded at each run of the body; symmetric codes have a kernel"
        return super().refuses(request)


def inspect(path: str, outputs: Sequence[str]) -> Mapping[str, Any]:
    """What ONNX Runtime executes for each of these values of the model at `path`."""
    from qgraph.executed import ort

    return ort.inspect(path, outputs)


INTEGERS = Integers(
    weighted={"Conv": False, "Gemm": True, "MatMul": True},
    joined=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}),
    moves=MOVES,
    types=("uint8.tensor.asym", "int8.tensor.asym"),
    unsigned=True,
)

ORT = register(
    Target(
        name="ort",
        summary="stock ONNX Runtime >= 1.23 on CPU",
        forms={
            "matmul": (DynamicInteger(), MatMulNBits(), Unfused(), StaticInteger()),
            "gemm": (DynamicInteger(), MatMulNBits(), Unfused(), StaticInteger()),
            "conv": (Dequantize(), StaticInteger()),
            "conv_transpose": (Dequantize(),),
            "gather": (GatherRows(tied=False), GatherBlock(), GatherRows()),
            "slice": (GatherRows(),),
            "rnn": (DynamicLstm(), Dequantize()),
        },
        auto={
            "matmul": (("int8.g128", "float", _INT8), ("int8.ch", "float", _PORTABLE)),
            "gemm": (("int8.g128", "float", _INT8), ("int8.ch", "float", _PORTABLE)),
            "slice": (
                ("int8.ch", "float", "an int8 table with a scale per row is a quarter of the size"),
            ),
            "gather": (
                ("int8.ch", "float", "an int8 table with a scale per row is a quarter of the size"),
            ),
            "tied": (
                ("int8.g32", "float", "one int8 table serves the embedding and the head"),
                ("int8.ch", "float", "one int8 table for all its uses"),
            ),
            "rnn": (("int8.ch", "int8", _LSTM), ("float", "float", _RECURRENT)),
        },
        inspect=inspect,
        timed=True,
        integers=INTEGERS,
        notes={
            "matmul-nbits": (
                "MatMulNBits is written with accuracy_level 4: its kernel rounds activations to int8, block by block.",
            )
        },
    )
)
