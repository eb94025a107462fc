"""Every "no" of a form or target, with the text that ends up in the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

from qgraph import registry
from qgraph.forms.dequantize import Dequantize
from qgraph.forms.dynamic import DynamicInteger
from qgraph.forms.gather_block import GatherBlock
from qgraph.forms.gather_rows import GatherRows
from qgraph.forms.lstm import DynamicLstm
from qgraph.forms.matmul_nbits import MatMulNBits
from qgraph.passes.assign_precision import DYNAMIC
from qgraph.spec import QuantSpec
from qgraph.target import Request
from qgraph.weights import Matrix, Use

FLOAT, HALF, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE


def request(
    op: str = "MatMul",
    spec: str = "int8.ch",
    dims: tuple[int, ...] = (64, 40),
    dtype: ir.DataType = FLOAT,
    *,
    dynamic: bool = False,
    tied: bool = False,
    in_body: bool = False,
    turned: bool = False,
    indices: ir.Shape | None = None,
    **attributes: float,
) -> Request:
    table = op in ("Gather", "Slice")
    x = ir.Value(name="x", shape=indices) if table else ir.Value(name="x")
    w = ir.Value(name="w")
    held = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    node = ir.Node("", op, [w, x] if table else [x, w], held)
    kind = {"MatMul": "matmul", "Gemm": "gemm", "Conv": "conv", "LSTM": "rnn"}.get(op, op.lower())
    if table:
        matrix = Matrix(tuple(range(len(dims))), len(dims) - 1)
    elif op == "Conv":
        matrix = Matrix(tuple(range(len(dims))))
    elif op == "LSTM":
        matrix = Matrix((0, 1, 2), 2)
    else:
        rank = len(dims)
        matrix = Matrix((*range(rank - 2), rank - 1, rank - 2), rank - 1)
    through = ir.Node("", "Transpose", [w]) if turned else None
    use = Use(node, 0 if table else 1, kind, matrix, through, in_body=in_body)
    wanted = DYNAMIC if dynamic else None
    return Request(use, dims, dtype, QuantSpec.parse(spec), wanted, tied)


def lstm(dims: tuple[int, ...] = (1, 512, 128), *, dynamic: bool = True, **given: Any) -> Request:
    return request("LSTM", dims=dims, dynamic=dynamic, **given)


@pytest.mark.parametrize(
    ("form", "asked", "reason"),
    [
        (Dequantize(), request(dynamic=True), "quantizes weights only"),
        (Dequantize(), request(dtype=DOUBLE), "gives no DOUBLE"),
        (Dequantize(), request(spec="uint3.g32"), "ONNX has no type for uint3"),
        (MatMulNBits(), request(spec="int3.g32"), "takes 2, 4 or 8 bits, not 3"),
        (GatherBlock(), request("Gather", "int3.g32"), "takes 4 or 8 bits, not 3"),
        (Dequantize(), request("Conv", "int4.g16", (8, 6, 3, 3)), "ONNX blocks one axis"),
        (Dequantize(), request("MatMul", "int8.g32"), ""),
        (DynamicInteger(), request(), "needs dynamic int8 activations"),
        (DynamicInteger(), request(spec="int4.ch", dynamic=True), "symmetric 8-bit weights"),
        (DynamicInteger(), request(spec="int8.g32", dynamic=True), "symmetric 8-bit weights"),
        (DynamicInteger(), request(spec="uint8.ch", dynamic=True), "symmetric 8-bit weights"),
        (DynamicInteger(), request(dims=(2, 64, 40), dynamic=True), "takes a 2-D weight"),
        (DynamicInteger(), request(dtype=HALF, dynamic=True), "float32 activations, not FLOAT16"),
        (DynamicInteger(), request("Gemm", dynamic=True, transA=1), "transA=1"),
        (DynamicInteger(), request("Gemm", dynamic=True, alpha=0.5), "no Gemm alpha"),
        (DynamicInteger(), request("Gemm", dynamic=True, transB=1, beta=2.0), ""),
        (DynamicLstm(), lstm(dynamic=False), "needs dynamic int8 activations"),
        (DynamicLstm(), lstm(spec="int4.ch"), "takes 8-bit weights per tensor, or symmetric ones"),
        (DynamicLstm(), lstm(spec="uint8.ch"), "takes 8-bit weights per tensor, or symmetric ones"),
        (DynamicLstm(), lstm(spec="int8.g32"), "takes 8-bit weights per tensor, or symmetric ones"),
        (DynamicLstm(), lstm(dtype=HALF), "float32 activations, not FLOAT16"),
        (DynamicLstm(), lstm(dtype=DOUBLE), "float32 activations, not DOUBLE"),
        (DynamicLstm(), lstm(layout=1), "time first"),
        (DynamicLstm(), lstm(output_sequence=1), "has no attribute output_sequence"),
        (DynamicLstm(), lstm(dims=(1, 124, 1024)), "hidden size 31"),
        (DynamicLstm(), lstm(spec="uint8.tensor"), ""),
        (DynamicLstm(), lstm(), ""),
        (MatMulNBits(), request(dynamic=True), "quantizes activations by itself"),
        (MatMulNBits(), request(dtype=DOUBLE), "takes no DOUBLE"),
        (MatMulNBits(), request(dims=(2, 64, 40)), "takes a 2-D weight"),
        (MatMulNBits(), request(spec="int8.tensor"), "no per-tensor scale"),
        (MatMulNBits(), request(spec="int4.g24"), "takes groups of 16, 32, 64, 128, 256, not 24"),
        (MatMulNBits(), request(spec="uint4.g32", in_body=True), "captured by a body"),
        (MatMulNBits(), request("Gemm", "int4.g32", transA=1), "transA=1"),
        (MatMulNBits(), request("Gemm", "int4.g32", alpha=0.5), "no Gemm alpha"),
        (MatMulNBits(), request(spec="int4.g32", in_body=True), ""),
        (GatherRows(), request("Gather", "int4.ch"), "gathers 8-bit codes only"),
        (GatherRows(), request("Gather", "int8.g32"), "one symmetric scale per row"),
        (GatherRows(), request("Gather", "uint8.ch"), "one symmetric scale per row"),
        (GatherRows(), request("Gather", dtype=DOUBLE), "takes no DOUBLE"),
        (GatherRows(), request("Gather", turned=True), "through a Transpose"),
        (GatherRows(tied=False), request("Gather", tied=True), "codes of a tied table twice"),
        (GatherRows(), request("Gather", tied=True), ""),
        (GatherBlock(), request("Gather", "int2.g32"), "takes 4 or 8 bits, not 2"),
        (GatherBlock(), request("Gather", "int8.g32", (9, 4, 64)), "takes a 2-D table"),
        (GatherBlock(), request("Gather", "int8.g32", dtype=DOUBLE), "takes no DOUBLE"),
        (GatherBlock(), request("Gather", "int8.g32", turned=True), "through a Transpose"),
        (GatherBlock(), request("Gather", "int8.ch"), "not whole rows"),
        (GatherBlock(), request("Gather", "int8.g32", (64, 40)), "40 is not a multiple of 32"),
        (GatherBlock(), request("Gather", "uint4.g32", (9, 64)), "1.23 gathers 4-bit rows"),
        (GatherBlock(), request("Gather", "int8.g32", (9, 64), tied=True), "rank of the indices"),
        (GatherBlock(), request("Gather", "int8.g32", (9, 64)), ""),
    ],
)
def test_form_answers(form, asked, reason):
    answer = form.refuses(asked)
    assert reason in answer and bool(reason) == bool(answer)


@pytest.mark.parametrize(
    ("target", "asked", "reason"),
    [
        ("openvino", request(spec="int4.g32", dims=(40, 64)), "40 is not a multiple of 32"),
        ("openvino", request(spec="int2.g32"), "does not read 2-bit"),
        ("openvino", request("Gather", "int8.g32", (9, 64)), "expands tables in blocks"),
        ("onnx", request("Gather", "int8.ch", (9, 64), dtype=DOUBLE), "takes no DOUBLE"),
        ("onnx", request("Gather", "int4.ch", (9, 64)), "no Gather of int4"),
        ("ort", request("Conv", "int8.g32", (8, 6, 3, 3)), "dequantize-linear: blocks would run"),
    ],
)
def test_target_refuses(target, asked, reason):
    answer = registry.get("target", target).support(asked, 25)
    assert answer.form is None and reason in answer.reason


@pytest.mark.parametrize(
    ("target", "asked", "form"),
    [
        ("onnx", request(dynamic=True), "dynamic-int8"),
        ("ort", request(spec="int4.g32"), "matmul-nbits"),
        ("ort", request("Gather", "int8.ch", (9, 64)), "gather-rows"),
        ("ort", request("Gather", "int8.g32", (9, 64), tied=False), "gather-block"),
        # OpenVINO quantizes the activations of compressed weights by itself.
        ("openvino", request(dynamic=True), "dequantize-linear"),
    ],
)
def test_target_takes_its_best_form(target, asked, form):
    answer = registry.get("target", target).support(asked, 25)
    assert answer.form is not None and answer.form.name == form


def test_target_names_the_opset_that_is_missing():
    onnx = registry.get("target", "onnx")
    asked = request(spec="int4.g32", dims=(64, 40))
    assert "needs opset 21, this model can be raised to 18 only" in onnx.support(asked, 18).reason
    low = replace(onnx, max_opset=20)
    assert "needs opset 21, target onnx stays at 20" in low.support(asked, 23).reason


def test_target_without_a_form_for_an_operator_says_so():
    onnx = replace(registry.get("target", "onnx"), forms={})
    assert onnx.support(request(), 21).reason == "target onnx has no quantized form for MatMul"


@pytest.mark.parametrize(
    ("spec", "dims", "dtype", "opset"),
    [
        ("int8.tensor", (64, 40), FLOAT, 10),
        ("int8.ch", (64, 40), FLOAT, 13),
        ("int8.g32", (64, 40), FLOAT, 21),
        ("int4.ch", (64, 40), FLOAT, 21),
        ("int2.ch", (64, 40), FLOAT, 25),
        ("int8.ch", (64, 40), HALF, 19),
        ("int8.ch", (2, 64, 40), FLOAT, 21),
    ],
)
def test_dequantize_linear_needs_an_opset(spec, dims, dtype, opset):
    assert Dequantize().opset(request("MatMul", spec, dims, dtype)) == opset
