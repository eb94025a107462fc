"""What each form writes: operators, attributes, and how the constants lie."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.forms.dequantize import Dequantize
from qgraph.forms.dynamic import DynamicInteger
from qgraph.forms.gather_block import GatherBlock
from qgraph.forms.gather_rows import GatherRows
from qgraph.forms.matmul_nbits import MatMulNBits

MATMUL = "g (float[m, 64] x) => (float[m, 40] y) { y = MatMul(x, W) }"
GATHER = "g (int64[b] i) => (float[b, 64] y) { y = Gather(W, i) }"
TIED = """g (int64[b, s] i) => (float[b, s, 40] y)
    { h = Gather(W, i) t = Transpose<perm=[1, 0]>(W) y = MatMul(h, t) }"""
BODY = """g (bool c, float[m, 64] x) => (float[m, 40] y) {
  y = If(c) <then_branch = then () => (float[m, 40] a) { a = MatMul(x, W) },
             else_branch = other () => (float[m, 40] b) { b = Identity(x2) }>
}"""


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("spec", "opset", "attributes", "constants"),
    [
        ("int8.tensor", 17, {}, {"W.codes": ("INT8", (64, 40)), "W.scale": ("FLOAT", ())}),
        ("int8.ch", 17, {}, {"W.codes": ("INT8", (64, 40)), "W.scale": ("FLOAT", (40,))}),
        (
            "uint8.ch",
            17,
            {},
            {
                "W.codes": ("UINT8", (64, 40)),
                "W.scale": ("FLOAT", (40,)),
                "W.zero_point": ("UINT8", (40,)),
            },
        ),
        (
            "uint4.g32",
            21,
            {"axis": 0, "block_size": 32},
            {
                "W.codes": ("UINT4", (64, 40)),
                "W.scale": ("FLOAT", (2, 40)),
                "W.zero_point": ("UINT4", (2, 40)),
            },
        ),
        (
            "int2.g16",
            25,
            {"axis": 0, "block_size": 16},
            {"W.codes": ("INT2", (64, 40)), "W.scale": ("FLOAT", (4, 40))},
        ),
    ],
)
def test_dequantize_linear(write, spec, opset, attributes, constants):
    written = write(Dequantize(), spec, MATMUL, W=weight(64, 40))
    assert written.ops() == ["DequantizeLinear", "MatMul"]
    assert written.attributes("DequantizeLinear") == attributes
    assert written.constants() == constants
    assert written.model.graph.opset_imports[""] == opset  # raised only where the form needs it


def test_codes_behind_a_transpose_are_stored_as_the_operator_reads_them(write):
    text = (
        "g (float[m, 64] x) => (float[m, 40] y) { t = Transpose<perm=[1,0]>(W) y = MatMul(x, t) }"
    )
    written = write(Dequantize(), "int8.ch", text, W=weight(40, 64))
    assert written.ops() == ["DequantizeLinear", "MatMul"]
    assert written.constants()["W.codes"] == ("INT8", (64, 40))


def test_a_tied_table_is_stored_once_as_it_lies(write):
    forms = {"matmul": (Dequantize(),), "gather": (GatherRows(),)}
    written = write(forms, "int8.ch", TIED, W=weight(40, 64))
    assert written.ops().count("Transpose") == 1
    assert [s for k, s in written.constants().items() if "codes" in k] == [("INT8", (40, 64))]
    # Without a zero point ONNX Runtime 1.23 takes the codes for uint8 when it moves the Transpose.
    assert written.constants()["W.zero_point"] == ("INT8", (40,))


def test_one_dequantize_linear_for_each_use_and_one_copy_of_the_codes(write):
    text = """g (float[m, 40] x) => (float[m, 40] y)
        { a = MatMul(x, W) b = Relu(a) y = MatMul(b, W) }"""
    written = write(Dequantize(), "int8.ch", text, W=weight(40, 40))
    assert written.ops() == ["DequantizeLinear", "MatMul", "Relu", "DequantizeLinear", "MatMul"]
    assert sorted(written.constants()) == ["W.codes", "W.scale"]


def test_a_body_that_alone_uses_a_weight_gets_its_codes(write):
    written = write(Dequantize(), "int8.ch", BODY.replace("x2", "x"), W=weight(64, 40))
    body = written.node("If").attributes["then_branch"].as_graph()
    assert sorted(body.initializers) == ["W.codes", "W.scale"]
    assert [n.op_type for n in body] == ["DequantizeLinear", "MatMul"]
    assert not written.model.graph.initializers


def test_a_weight_of_two_graphs_is_dequantized_outside(write):
    text = BODY.replace("x2", "x").replace("}>\n}", "}> \n z = MatMul(x, W) }")
    text = text.replace("=> (float[m, 40] y)", "=> (float[m, 40] y, float[m, 40] z)", 1)
    written = write(Dequantize(), "int8.ch", text, W=weight(64, 40))
    assert [n.op_type for n in written.model.graph].count("DequantizeLinear") == 2
    body = written.node("If").attributes["then_branch"].as_graph()
    assert [n.op_type for n in body] == ["MatMul"]


def test_dynamic_int8_shares_the_quantized_activation(write):
    text = """g (float[m, 64] x) => (float[m, 40] y, float[m, 40] z)
        { y = MatMul(x, W) z = MatMul(x, V) }"""
    written = write(
        DynamicInteger(), "int8.ch", text, activations="int8", W=weight(64, 40), V=weight(64, 40)
    )
    assert written.ops().count("DynamicQuantizeLinear") == 1
    assert written.ops().count("MatMulInteger") == 2
    # The order that ONNX Runtime fuses: the activation's scale times the weight's.
    product = next(n for n in written.model.graph if n.op_type == "Mul")
    assert [v.producer() is None for v in product.inputs] == [False, True]


def test_matmul_nbits(write):
    written = write(MatMulNBits(), "uint4.g32", MATMUL, W=weight(64, 40))
    assert written.ops() == ["MatMulNBits"]
    assert written.node("MatMulNBits").domain == "com.microsoft"
    wanted = {"K": 64, "N": 40, "bits": 4, "block_size": 32, "accuracy_level": 4}
    assert written.attributes("MatMulNBits") == wanted
    assert written.constants() == {
        "W.codes": ("UINT8", (40, 2, 16)),
        "W.scale": ("FLOAT", (40, 2)),
        "W.zero_point": ("UINT8", (40,)),
    }
    assert written.model.graph.opset_imports[""] == 17


def test_half_scales_are_widened_once_for_all_uses(write):
    text = (
        "g (float[m, 64] x) => (float[m, 40] y) { a = MatMul(x, W) b = MatMul(x, W) y = Add(a, b) }"
    )
    written = write(MatMulNBits(), "uint4.g32.asym.f16", text, W=weight(64, 40))
    assert written.ops() == ["Cast", "MatMulNBits", "MatMulNBits", "Add"]
    assert written.constants() == {
        "W.codes": ("UINT8", (40, 2, 16)),
        "W.scale": ("FLOAT16", (40, 2)),
        "W.zero_point": ("UINT8", (40,)),
    }


def test_matmul_nbits_pads_the_last_block_with_zeros_of_the_grid(write):
    written = write(MatMulNBits(), "int4.g32", MATMUL.replace("64", "60"), W=weight(60, 40))
    codes = written.model.graph.initializers["W.codes"].const_value.numpy()
    assert codes.shape == (40, 2, 16)
    assert (codes[:, 1, 14:] == 0x88).all()


def test_whole_rows_are_blocks_that_repeat_their_scale(write):
    written = write(MatMulNBits(), "int4.ch", MATMUL.replace("64", "300"), W=weight(300, 40))
    assert written.attributes("MatMulNBits")["block_size"] == 128
    scales = written.model.graph.initializers["W.scale"].const_value.numpy()
    assert scales.shape == (40, 3)
    assert (scales == scales[:, :1]).all()


def test_a_gemm_keeps_its_bias_as_an_add(write):
    text = "g (float[m, 64] x) => (float[m, 40] y) { y = Gemm(x, W, C) }"
    written = write(MatMulNBits(), "int4.g32", text, W=weight(64, 40), C=weight(40))
    assert written.ops() == ["MatMulNBits", "Add"]
    assert str(written.node("Add").outputs[0].name) == "y"


def test_gather_of_rows(write):
    written = write(GatherRows(), "int8.ch", GATHER, W=weight(37, 64))
    assert written.ops() == ["Gather", "Cast", "Gather", "Mul"]
    wanted = {"W.codes": ("INT8", (37, 64)), "W.row_scale": ("FLOAT", (37, 1))}
    assert written.constants() == wanted


def test_gather_of_blocks(write):
    written = write(GatherBlock(), "int4.g32", GATHER, W=weight(37, 64))
    assert written.ops() == ["GatherBlockQuantized"]
    wanted = {"W.codes": ("UINT8", (37, 32)), "W.scale": ("FLOAT", (37, 2))}
    assert written.constants() == wanted
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 32, "bits": 4}
    assert written.attributes("GatherBlockQuantized") == attributes
