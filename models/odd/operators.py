"""Odd graphs about operators: Gemm forms, convolutions, recurrences, einsum, activations only."""

import numpy as np
import onnx_ir as ir

from qgraph.models.builder import FLOAT, Builder
from qgraph.models.odd.collect import WIDTH, draw, graph, input_rows, output_rows, weight


@graph()
def no_bias_gemm(b: Builder) -> None:
    """Gemm with two inputs."""
    output_rows(b, b.op("Gemm", input_rows(b), weight(b, "head.weight", WIDTH, 96)), 96)


@graph()
def gemm_transb(b: Builder) -> None:
    """Gemm with its weight stored [N, K], as torch.nn.Linear exports it."""
    w, bias = weight(b, "head.weight", 96, WIDTH), weight(b, "head.bias", 96)
    output_rows(b, b.op("Gemm", input_rows(b), w, bias, transB=1), 96)


@graph()
def gemm_transa(b: Builder) -> None:
    """Gemm with its activation transposed, and the weight as the left operand of another."""
    x = b.input("x", FLOAT, [WIDTH, "batch"])
    h = b.op("Gemm", x, weight(b, "right.weight", WIDTH, 96), transA=1, name="right/Gemm")
    w = weight(b, "left.weight", WIDTH, 96)
    b.output("y", b.op("Gemm", w, h, transB=1, name="left/Gemm"), FLOAT, [WIDTH, "batch"])


@graph()
def gemm_alpha_beta(b: Builder) -> None:
    """Gemm that scales its product and its bias."""
    w, bias = weight(b, "head.weight", WIDTH, 96), weight(b, "head.bias", 1, 96)
    output_rows(b, b.op("Gemm", input_rows(b), w, bias, alpha=0.5, beta=2.0), 96)


@graph()
def batched_weight_3d(b: Builder) -> None:
    """A MatMul weight with a head dimension, [H, K, N]."""
    x = b.input("x", FLOAT, ["batch", 4, "seq", WIDTH])
    y = b.op("MatMul", x, weight(b, "heads.weight", 4, WIDTH, 32))
    b.output("y", y, FLOAT, ["batch", 4, "seq", 32])


@graph()
def matmul_activation_only(b: Builder) -> None:
    """Attention without a projection: two MatMuls and no weight."""
    query, key, value = (b.input(n, FLOAT, ["batch", "seq", WIDTH]) for n in ("q", "k", "v"))
    scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 2, 1]), name="scores/MatMul")
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), value, name="mixed/MatMul")
    b.output("y", mixed, FLOAT, ["batch", "seq", WIDTH])


@graph()
def weight_on_left(b: Builder) -> None:
    """W x instead of x W: channels run along the first axis."""
    x = b.input("x", FLOAT, [WIDTH, "batch"])
    y = b.op("MatMul", weight(b, "head.weight", 96, WIDTH), x)
    b.output("y", y, FLOAT, [96, "batch"])


@graph()
def vector_matmul(b: Builder) -> None:
    """MatMul of a matrix with a vector weight, which removes the axis."""
    h = b.op("MatMul", input_rows(b), weight(b, "first.weight", WIDTH, WIDTH), name="first/MatMul")
    y = b.op("MatMul", h, weight(b, "score.weight", WIDTH), name="score/MatMul")
    b.output("y", y, FLOAT, ["batch"])


@graph()
def einsum_linear(b: Builder) -> None:
    """A linear layer written as Einsum."""
    x = b.input("x", FLOAT, ["batch", "seq", WIDTH])
    y = b.op("Einsum", x, weight(b, "head.weight", WIDTH, 96), equation="bsk,kn->bsn")
    b.output("y", y, FLOAT, ["batch", "seq", 96])


@graph()
def conv_bn(b: Builder) -> None:
    """Conv, BatchNormalization, Relu."""
    x = _image(b)
    x = b.op("Conv", x, _kernel(b, "conv.weight", 32, 16, 3, 3), pads=[1, 1, 1, 1])
    x = _normalize(b, "bn", x, 32)
    b.output("y", b.op("Relu", x), FLOAT, ["batch", 32, "height", "width"])


@graph()
def conv_depthwise(b: Builder) -> None:
    """Depthwise Conv with a bias, then a pointwise one, Clip with one bound left out."""
    x = _image(b)
    w, bias = _kernel(b, "depthwise.weight", 16, 1, 3, 3), weight(b, "depthwise.bias", 16)
    x = b.op("Conv", x, w, bias, pads=[1, 1, 1, 1], group=16, name="depthwise/Conv")
    x = b.op("Clip", x, None, b.number("six", 6.0))
    x = b.op("Conv", x, _kernel(b, "pointwise.weight", 64, 16, 1, 1), name="pointwise/Conv")
    b.output("y", x, FLOAT, ["batch", 64, "height", "width"])


@graph()
def conv_grouped(b: Builder) -> None:
    """Conv in two groups, strided, dilated, padded on one side."""
    w = _kernel(b, "conv.weight", 32, 8, 3, 3)
    x, bias = _image(b), weight(b, "conv.bias", 32)
    pads = [0, 2, 1, 2]
    x = b.op("Conv", x, w, bias, strides=[2, 1], dilations=[1, 2], pads=pads, group=2)
    b.output("y", x, FLOAT, ["batch", 32, None, None])


@graph()
def conv_1d(b: Builder) -> None:
    """Conv over one spatial axis."""
    x = b.input("x", FLOAT, ["batch", 16, "seq"])
    w, bias = _kernel(b, "conv.weight", 64, 16, 3), weight(b, "conv.bias", 64)
    b.output("y", b.op("Conv", x, w, bias, pads=[1, 1]), FLOAT, ["batch", 64, "seq"])


@graph()
def conv_transpose(b: Builder) -> None:
    """ConvTranspose, whose weight is [inputs, outputs, ...]."""
    w, bias = _kernel(b, "up.weight", 16, 32, 2, 2), weight(b, "up.bias", 32)
    y = b.op("ConvTranspose", _image(b), w, bias, strides=[2, 2])
    b.output("y", y, FLOAT, ["batch", 32, None, None])


@graph()
def nhwc_conv(b: Builder) -> None:
    """Conv between two Transposes and a bias added after them, the form tf2onnx writes."""
    x = b.input("x", FLOAT, ["batch", "height", "width", 16])
    x = b.op("Transpose", x, perm=[0, 3, 1, 2])
    x = b.op("Conv", x, _kernel(b, "conv.weight", 32, 16, 3, 3), auto_pad="SAME_UPPER")
    x = b.op("Add", b.op("Transpose", x, perm=[0, 2, 3, 1]), weight(b, "conv.bias", 32))
    b.output("y", x, FLOAT, ["batch", "height", "width", 32])


@graph()
def dynamic_conv_weight(b: Builder) -> None:
    """Conv whose weight is computed from an input."""
    gain = b.input("gain", FLOAT, [32, 1, 1, 1])
    w = b.op("Mul", _kernel(b, "conv.weight", 32, 16, 3, 3), gain)
    b.output("y", b.op("Conv", _image(b), w), FLOAT, ["batch", 32, None, None])


@graph()
def lstm(b: Builder) -> None:
    """LSTM in both directions, with optional inputs left out in the middle."""
    x, hidden = b.input("x", FLOAT, ["seq", "batch", WIDTH]), 32
    w, r = weight(b, "lstm.W", 2, 4 * hidden, WIDTH), weight(b, "lstm.R", 2, 4 * hidden, hidden)
    start = b.initializer("lstm.h0", np.zeros((2, 1, hidden), np.float32))
    batch = b.op("Shape", x, start=1, end=2)
    shape = b.op("Concat", b.integers("two", 2), batch, b.integers("hidden", hidden), axis=0)
    start = b.op("Expand", start, shape)
    bias = weight(b, "lstm.B", 2, 8 * hidden)
    y, last, _ = b.ops(
        3, "LSTM", x, w, r, bias, None, start, direction="bidirectional", hidden_size=hidden
    )
    b.output("y", y, FLOAT, ["seq", 2, "batch", hidden])
    b.output("h_final", last, FLOAT, [2, "batch", hidden])


@graph()
def gru(b: Builder) -> None:
    """GRU as torch exports it: linear_before_reset."""
    x, hidden = b.input("x", FLOAT, ["seq", "batch", WIDTH]), 32
    w, r = weight(b, "gru.W", 1, 3 * hidden, WIDTH), weight(b, "gru.R", 1, 3 * hidden, hidden)
    bias = weight(b, "gru.B", 1, 6 * hidden)
    y = b.ops(2, "GRU", x, w, r, bias, hidden_size=hidden, linear_before_reset=1)[0]
    b.output("y", b.op("Squeeze", y, b.integers("axis_1", 1)), FLOAT, ["seq", "batch", hidden])


@graph()
def already_qdq(b: Builder) -> None:
    """One MatMul comes quantized from elsewhere, the next one is still float."""
    scale = b.initializer("first.scale", np.full(WIDTH, 0.01, np.float32))
    zero = b.initializer("first.zero_point", np.zeros(WIDTH, np.int8))
    codes = np.rint(draw("first.weight", WIDTH, WIDTH) * 300).clip(-128, 127).astype(np.int8)
    w = b.op("DequantizeLinear", b.initializer("first.codes", codes), scale, zero, axis=1)
    h = b.op("MatMul", input_rows(b), w, name="first/MatMul")
    y = b.op("MatMul", h, weight(b, "second.weight", WIDTH, WIDTH), name="second/MatMul")
    output_rows(b, y)


def _image(b: Builder) -> ir.Value:
    return b.input("x", FLOAT, ["batch", 16, "height", "width"])


def _kernel(b: Builder, name: str, *shape: int) -> ir.Value:
    """Return a drawn initializer scaled by its fan-in."""
    values = np.random.default_rng(len(name)).standard_normal(shape)
    fan_in = max(1, int(np.prod(shape[1:])))
    return b.initializer(name, (values * fan_in**-0.5).astype(np.float32))


def _normalize(b: Builder, key: str, x: ir.Value, width: int) -> ir.Value:
    gain, bias = 1 + draw(f"{key}.gain", width), draw(f"{key}.bias", width)
    mean, variance = draw(f"{key}.mean", width), np.abs(draw(f"{key}.var", width)) + 0.5
    return b.op(
        "BatchNormalization",
        x,
        b.initializer(f"{key}.weight", gain),
        b.initializer(f"{key}.bias", bias),
        b.initializer(f"{key}.running_mean", mean),
        b.initializer(f"{key}.running_var", variance),
    )
