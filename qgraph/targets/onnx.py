"""Target `onnx`: portable QDQ and standard operators only; any runtime that knows the opset runs it."""

from __future__ import annotations

from qgraph.forms.dequantize import Dequantize
from qgraph.forms.dynamic import DynamicInteger
from qgraph.forms.gather_rows import GatherRows
from qgraph.forms.static import StaticInteger
from qgraph.registry import register
from qgraph.target import MOVES, Integers, Target

_WEIGHTS = "int8 weights per output channel: nearly no error on any runtime; how fast they run is the runtime's affair"

ONNX = register(
    Target(
        name="onnx",
        summary="portable: DequantizeLinear and other standard operators only",
        forms={
            "matmul": (DynamicInteger(), Dequantize(), StaticInteger()),
            "gemm": (DynamicInteger(), Dequantize(), StaticInteger()),
            "conv": (Dequantize(), StaticInteger()),
            "conv_transpose": (Dequantize(), StaticInteger()),
            "gather": (GatherRows(),),
            "slice": (GatherRows(),),
            "rnn": (Dequantize(),),
        },
        max_opset=25,
        integers=Integers(
            weighted={"Conv": False, "ConvTranspose": False, "Gemm": True, "MatMul": True},
            joined=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"}),
            moves=MOVES,
            types=(
                "uint8.tensor.asym",
                "int8.tensor.asym",
                "uint16.tensor.asym",
                "int16.tensor.sym",
            ),
        ),
        auto={
            "matmul": (("int8.ch", "float", _WEIGHTS), ("int8.tensor", "float", _WEIGHTS)),
            "gemm": (("int8.ch", "float", _WEIGHTS), ("int8.tensor", "float", _WEIGHTS)),
            "slice": (
                ("int8.ch", "float", "an int8 table with a scale per row is a quarter of the size"),
            ),
            "gather": (
                ("int8.ch", "float", "an int8 table with a scale per row is a quarter of the size"),
            ),
            "tied": (("int8.ch", "float", "one int8 table serves the embedding and the head"),),
            "rnn": (("int8.ch", "float", _WEIGHTS), ("int8.tensor", "float", _WEIGHTS)),
        },
    )
)
