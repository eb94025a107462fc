"""Which kernel computes a value, over hand-made executed graphs and real runtimes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qgraph.executed import ConstantInput, ExecutedGraph, ExecutedNode, match, openvino, ort

RNG = np.random.default_rng(0)


def node(op: str, inputs: str, outputs: str, **fields: object) -> ExecutedNode:
    return ExecutedNode(op, op.lower(), tuple(inputs.split()), tuple(outputs.split()), **fields)


def seen(*nodes: ExecutedNode, runtime: str = "onnxruntime") -> ExecutedGraph:
    return ExecutedGraph(runtime, "0", nodes)


CODES = ConstantInput("W", "int8", (64, 32))
FLOATS = ConstantInput("W", "float32", (64, 32))
MODEL = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[m, 64] x, float[64, 32] w, float[32] b) => (float[m, 32] y, float[m, 32] z) {
        h = MatMul(x, w)
        a = Add(h, b)
        y = Relu(a)
        two = MatMul(x, w)
        z = Sub(two, two)
        alone = MatMul(y, w)
        last = MatMul(alone, w)
    }""")


def ran(graph: ExecutedGraph, name: str) -> match.Ran:
    return match.what_runs(graph, [name], MODEL)[name]


def test_a_vanished_value_is_followed_to_where_it_was_fused() -> None:
    fused = seen(node("FusedGemm", "x W b", "y", constants=(FLOATS,)))
    assert ran(fused, "h").kernel == "FusedGemm float32"
    assert match.what_runs(fused, ["h"])["h"].how == "unknown", "no model, no way to follow"
    assert match.what_runs(fused, ["h"], MODEL, steps=1)["h"].how == "unknown"


def test_following_stops_at_the_next_kernel() -> None:
    assert (
        ran(seen(node("MatMul", "alone W", "last", constants=(FLOATS,))), "alone").how == "unknown"
    )


def test_the_kernel_is_found_above_the_end_of_a_chain() -> None:
    chain = seen(
        node("DynamicQuantizeLinear", "x", "q xs xz"),
        node("MatMulInteger", "q W xz", "i", constants=(CODES,)),
        node("Cast", "i", "f"),
        node("Mul", "xs s", "a"),
        node("Mul", "f a", "h"),
    )
    found = ran(chain, "h")
    assert (found.kernel, found.how, found.weight_dtype) == ("MatMulInteger", "integer", "int8")


def test_a_weight_expanded_at_run_time_is_unfused() -> None:
    graph = seen(
        node("DequantizeLinear", "W s", "wf", constants=(CODES,)),
        node("Transpose", "wf", "wt"),
        node("MatMul", "x wt", "h"),
    )
    found = ran(graph, "h")
    assert found.kernel == "MatMul float32 after DequantizeLinear (unfused)"
    assert (found.integer, found.how, found.weight_dtype) == (False, "unfused", "int8")


def test_a_dequantized_activation_is_not_an_unfused_weight() -> None:
    graph = seen(
        node("DequantizeLinear", "q s", "xf"),
        node("MatMul", "xf W", "h", constants=(FLOATS,)),
    )
    assert ran(graph, "h").how == "float"


@pytest.mark.parametrize(("level", "how"), [(0, "quantized weight"), (4, "integer")])
def test_matmul_nbits_says_its_activations(level: int, how: str) -> None:
    attributes = {"bits": 8, "accuracy_level": level}
    found = ran(seen(node("MatMulNBits", "x W s", "h", attributes=attributes)), "h")
    kind = "int8" if level == 4 else "float"
    assert found.kernel == f"MatMulNBits {kind}-activation (accuracy_level {level})"
    assert (found.how, found.weight_dtype, found.integer) == (how, "uint8", True)


@pytest.mark.parametrize(
    ("op", "inputs", "domain", "kernel"),
    [
        ("DynamicQuantizeMatMul", "x W s", "com.microsoft", "DynamicQuantizeMatMul"),
        ("QLinearConv", "x xs xz W s", "", "QLinearConv"),
        ("MatMulInt4", "x W s", "ai.qgraph", "ai.qgraph MatMulInt4"),
        ("Gather", "W i", "", "Gather int8 codes"),
    ],
)
def test_kernels_that_read_codes(op: str, inputs: str, domain: str, kernel: str) -> None:
    found = ran(seen(node(op, inputs, "h", domain=domain, constants=(CODES,))), "h")
    assert (found.kernel, found.integer, found.weight_dtype) == (kernel, True, "int8")


def test_the_gather_of_codes_wins_over_that_of_scales() -> None:
    scales = ConstantInput("s", "float32", (64, 1))
    graph = seen(
        node("Gather", "W i", "q", constants=(CODES,)),
        node("Gather", "s i", "g", constants=(scales,)),
        node("Cast", "q", "f"),
        node("Mul", "f g", "h"),
    )
    assert ran(graph, "h").kernel == "Gather int8 codes"


def test_a_body_is_not_a_kernel() -> None:
    assert ran(seen(node("If", "c", "h")), "h").kernel == "inside If"


@pytest.mark.parametrize(
    ("dtypes", "kernel", "how"),
    [
        (("float32", "uint4"), "FullyConnected u4 weights", "quantized weight"),
        (("uint8", "int8"), "FullyConnected u8 activations, i8 weights", "integer"),
        (("float32", "float32"), "FullyConnected float32", "float"),
    ],
)
def test_openvino_kernels(dtypes: tuple[str, ...], kernel: str, how: str) -> None:
    layer = node("FullyConnected", "x W", "h", input_dtypes=dtypes, constants=(CODES,))
    found = ran(seen(layer, runtime="openvino"), "h")
    assert (found.kernel, found.how) == (kernel, how)


def test_openvino_weights_converted_at_run_time() -> None:
    codes = ConstantInput("W", "f8e4m3", (64, 32))
    graph = seen(
        node("Convert", "W", "wc", constants=(codes,)),
        node("Eltwise", "convert s", "wf"),
        node("FullyConnected", "x eltwise", "h", input_dtypes=("float32", "float32")),
        runtime="openvino",
    )
    assert ran(graph, "h").kernel == "FullyConnected float32 after Convert (unfused)"


STATIC = """g (float[m, 64] x) => (float[m, 32] y) {
    xq = QuantizeLinear(x, xs, xz)
    xf = DequantizeLinear(xq, xs, xz)
    wf = DequantizeLinear <axis = 1> (W, s)
    h = MatMul(xf, wf)
    hq = QuantizeLinear(h, xs, xz)
    y = DequantizeLinear(hq, xs, xz) }"""
DYNAMIC = """g (float[m, 64] x) => (float[m, 32] y) {
    xq, xs, xz = DynamicQuantizeLinear(x)
    i = MatMulInteger(xq, W, xz)
    f = Cast <to = 1> (i)
    a = Mul(xs, s)
    h = Mul(f, a)
    y = Add(h, b) }"""
PER_CHANNEL = """g (float[m, 64] x) => (float[m, 32] y) {
    wf = DequantizeLinear <axis = 0> (W, s)
    y = Gemm <transB = 1> (x, wf, b) }"""
ROWS = """g (int64[n] i) => (float[n, 64] y) {
    q = Gather(W, i)
    f = Cast <to = 1> (q)
    r = Gather(s, i)
    y = Mul(f, r) }"""
INT8 = RNG.integers(-127, 128, (64, 32)).astype(np.int8)
SCALE = np.full(32, 0.01, np.float32)
BIAS = np.ones(32, np.float32)
STEPS = {"xs": np.float32(0.05), "xz": np.uint8(128)}
CASES = {
    "static": (
        STATIC,
        {"W": INT8, "s": SCALE, **STEPS},
        "h",
        "QLinearMatMul",
        "FullyConnected u8 activations, i8 weights",
    ),
    "dynamic": (
        DYNAMIC,
        {"W": INT8, "s": SCALE, "b": BIAS},
        "h",
        "DynamicQuantizeMatMul",
        "FullyConnected float32",
    ),
    "per channel": (
        PER_CHANNEL,
        {"W": np.ascontiguousarray(INT8.T), "s": SCALE, "b": BIAS},
        "y",
        "Gemm float32 after DequantizeLinear (unfused)",
        "FullyConnected i8 weights",
    ),
    "int4": (
        PER_CHANNEL.replace("axis = 0", "axis = 1, block_size = 32"),
        {
            "W": RNG.integers(-8, 8, (32, 64)).astype(ml_dtypes.int4),
            "s": np.full((32, 2), 0.01, np.float32),
            "b": BIAS,
        },
        "y",
        "Gemm float32 after DequantizeLinear (unfused)",
        "FullyConnected i4 weights",
    ),
    "rows": (
        ROWS,
        {"W": np.ascontiguousarray(INT8.T), "s": np.full((32, 1), 0.01, np.float32)},
        "y",
        "Gather int8 codes",
        "Gather i8 weights",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_real_onnxruntime(case: str, write) -> None:
    text, weights, value, kernel, _ = CASES[case]
    assert ort.inspect(write(text, **weights), [value])[value].kernel == kernel


@pytest.mark.skipif(not openvino.is_available(), reason="openvino is not installed")
@pytest.mark.parametrize("case", CASES)
def test_real_openvino(case: str, write) -> None:
    text, weights, value, _, kernel = CASES[case]
    assert openvino.inspect(write(text, **weights), [value])[value].kernel == kernel
