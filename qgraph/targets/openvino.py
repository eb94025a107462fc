"""Target `openvino`: QDQ forms that OpenVINO's CPU plugin keeps compressed.

Its FullyConnected takes i8/u8/i4/u4 weights from DequantizeLinear + MatMul, per channel or in blocks that divide K;
it quantizes activations by itself (DYNAMIC_QUANTIZATION_GROUP_SIZE). Convolution weights are expanded at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qgraph.forms.dequantize import Dequantize
from qgraph.forms.static import StaticInteger
from qgraph.registry import register
from qgraph.target import MOVES, Integers, Request, Target


class WholeBlocks(Dequantize):
    """DequantizeLinear whose blocks divide K: OpenVINO's reader refuses others.

    Dynamic activations need nothing in the file: OpenVINO quantizes those of compressed MatMuls by itself.
    """

    def refuses(self, request: Request) -> str:
        """As Dequantize, and blocks must divide K; 2-bit ONNX types are unknown to OpenVINO."""
        k = request.use.matrix.shape(request.dims)[1]
        if request.spec.group and k % request.spec.group:
            return f"OpenVINO wants blocks that divide K; {k} is not a multiple of {request.spec.group}"
        if request.spec.qtype.bits == 2:
            return "OpenVINO does not read 2-bit ONNX types"
        if request.use.kind == "gather" and request.spec.group:
            return (
                "OpenVINO expands tables in blocks to float; it keeps one scale per row compressed"
            )
        if request.activation is not None and request.activation.dynamic:
            request = replace(request, activation=None)
        return super().refuses(request)


def inspect(path: str, outputs: Sequence[str]) -> Mapping[str, Any]:
    """What OpenVINO executes for each of these values of the model at `path` (in a child process)."""
    from qgraph.executed import openvino

    return openvino.inspect(path, outputs)


_INT8 = "int8 weights per output channel stay compressed; OpenVINO quantizes activations by itself"
_RECURRENT = (
    "where activations are quantized, OpenVINO 2026.4 may keep the codes as weights of LSTM and GRU, for which it has "
    "no kernel, and refuses the model (expects Constant)"
)

OPENVINO = register(
    Target(
        name="openvino",
        summary="OpenVINO >= 2025 on CPU",
        forms={
            **{
                kind: (WholeBlocks(), StaticInteger(unsigned=False))
                for kind in ("matmul", "gemm", "conv", "conv_transpose")
            },
            **{kind: (WholeBlocks(),) for kind in ("gather", "slice", "rnn")},
        },
        integers=Integers(
            weighted={"Conv": False, "ConvTranspose": False, "Gemm": True, "MatMul": True},
            joined=frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"}),
            moves=MOVES,
            types=("uint8.tensor.asym", "int8.tensor.asym"),
            floats={"LSTM": _RECURRENT, "GRU": _RECURRENT},
            centred=frozenset({"ConvTranspose"}),
            # A Conv without a bias that a quantized Conv and the Add behind it read comes out as noise (0.4 dB),
            # and a bias of zeros is folded away; with any other one it is right.
            needs_bias=True,
            # It also loses the epsilon of a LayerNormalization behind a sum with dequantized values.
            gives_floats=True,
        ),
        auto={
            "matmul": (("int8.ch", "float", _INT8), ("int8.tensor", "float", _INT8)),
            "gemm": (("int8.ch", "float", _INT8), ("int8.tensor", "float", _INT8)),
            "slice": (("int8.ch", "float", "smaller file; OpenVINO expands it at load"),),
            "gather": (
                ("int8.ch", "float", "an int8 table with a scale per row stays compressed"),
            ),
            "tied": (("int8.ch", "float", "one int8 table serves the embedding and the head"),),
            "rnn": (("int8.ch", "float", "smaller file; OpenVINO expands it at load"),),
        },
        inspect=inspect,
        notes={
            "dequantize-linear": (
                "OpenVINO rounds activations of compressed MatMuls, unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0.",
            )
        },
    )
)
