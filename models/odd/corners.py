"""Odd graphs about shapes, values and opsets."""

import numpy as np
import onnx_ir as ir

from qgraph.models.builder import FLOAT, INT64, Builder
from qgraph.models.odd.collect import WIDTH, draw, graph, input_rows, output_rows, weight

FLOAT16 = ir.DataType.FLOAT16


@graph()
def zero_d(b: Builder) -> None:
    """Scalars of rank 0 as initializer, as input and as output."""
    x, gain = input_rows(b), b.input("gain", FLOAT, [])
    h = b.op("Mul", b.op("MatMul", x, weight(b, "head.weight", WIDTH, WIDTH)), gain)
    h = b.op("Add", h, b.number("shift", 0.25))
    b.output("mean", b.op("ReduceMean", h, keepdims=0), FLOAT, [])
    output_rows(b, h)


@graph()
def dynamic_shapes(b: Builder) -> None:
    """Every dimension but the channels is symbolic, and a Reshape depends on the input's shape."""
    x = b.input("x", FLOAT, ["batch", "seq", WIDTH])
    rows = b.op("Reshape", x, b.integers("rows", -1, WIDTH))
    h = b.op("MatMul", rows, weight(b, "head.weight", WIDTH, 96))
    lead = b.op("Shape", x, end=2)
    shape = b.op("Concat", lead, b.integers("width", 96), axis=0)
    b.output("y", b.op("Reshape", h, shape), FLOAT, ["batch", "seq", 96])


@graph()
def unknown_dimensions(b: Builder) -> None:
    """The leading dimensions of input and output have no name at all."""
    x = b.input("x", FLOAT, [None, None, WIDTH])
    y = b.op("MatMul", x, weight(b, "head.weight", WIDTH, 96))
    b.output("y", y, FLOAT, [None, None, 96])


@graph()
def static_shapes(b: Builder) -> None:
    """No symbolic dimension anywhere."""
    x = b.input("x", FLOAT, [3, WIDTH])
    b.output("y", b.op("MatMul", x, weight(b, "head.weight", WIDTH, 96)), FLOAT, [3, 96])


@graph()
def empty_batch_ok(b: Builder) -> None:
    """Runs on a batch of 0 as well."""
    h = b.op("Relu", b.op("MatMul", input_rows(b), weight(b, "first.weight", WIDTH, WIDTH)))
    w, bias = weight(b, "second.weight", WIDTH, 96), weight(b, "second.bias", 96)
    output_rows(b, b.op("Gemm", h, w, bias), 96)


@graph(opset=13, ir_version=7)
def opset13(b: Builder) -> None:
    """LayerNorm in pieces: at opset 13 ReduceMean takes its axes as an attribute."""
    x = input_rows(b)
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    variance = b.op("ReduceMean", b.op("Pow", centred, b.number("two", 2.0)), axes=[-1])
    deviation = b.op("Sqrt", b.op("Add", variance, b.number("epsilon", 1e-5)))
    h = b.op("Mul", b.op("Div", centred, deviation), weight(b, "norm.weight", WIDTH))
    output_rows(b, b.op("MatMul", h, weight(b, "head.weight", WIDTH, WIDTH)))


@graph(opset=18, ir_version=8)
def opset18(b: Builder) -> None:
    """ReduceMean with axes as an input, Split with num_outputs."""
    h = b.op("MatMul", input_rows(b), weight(b, "first.weight", WIDTH, 2 * WIDTH))
    gate, up = b.ops(2, "Split", h, axis=-1, num_outputs=2)
    h = b.op("Mul", b.op("Sigmoid", gate), up)
    h = b.op("Sub", h, b.op("ReduceMean", h, b.integers("axis_last", -1)))
    output_rows(b, b.op("MatMul", h, weight(b, "second.weight", WIDTH, WIDTH)))


@graph(opset=21)
def opset21(b: Builder) -> None:
    """The first opset with 4-bit types and blocked DequantizeLinear."""
    x = input_rows(b)
    h = b.op("LayerNormalization", x, weight(b, "norm.weight", WIDTH), axis=-1)
    output_rows(b, b.op("Gelu", b.op("MatMul", h, weight(b, "head.weight", WIDTH, WIDTH))))


@graph(opset=23, ir_version=11)
def opset23_rmsnorm(b: Builder) -> None:
    """RMSNormalization as one operator."""
    h = b.op("RMSNormalization", input_rows(b), weight(b, "norm.weight", WIDTH), axis=-1)
    output_rows(b, b.op("MatMul", h, weight(b, "head.weight", WIDTH, WIDTH)))


@graph()
def weight_through_mul(b: Builder) -> None:
    """The weight is multiplied by constant channel gains before it is used."""
    w = b.op("Mul", weight(b, "head.weight", WIDTH, WIDTH), weight(b, "head.gain", WIDTH))
    output_rows(b, b.op("MatMul", input_rows(b), w))


@graph()
def weight_through_cast_f16(b: Builder) -> None:
    """The weight is stored as float16 and cast."""
    w = b.initializer("head.weight", draw("head.weight", WIDTH, WIDTH).astype(np.float16))
    output_rows(b, b.op("MatMul", input_rows(b), b.op("Cast", w, to=FLOAT)))


@graph()
def weight_through_reshape(b: Builder) -> None:
    """The weight is stored flat."""
    w = weight(b, "head.weight", WIDTH * WIDTH)
    w = b.op("Reshape", w, b.integers("weight_shape", WIDTH, WIDTH))
    output_rows(b, b.op("MatMul", input_rows(b), w))


@graph()
def weight_through_identity(b: Builder) -> None:
    """The weight passes two Identities; a third one is the graph's output."""
    w = b.op("Identity", b.op("Identity", weight(b, "head.weight", WIDTH, WIDTH)))
    output_rows(b, b.op("Identity", b.op("MatMul", input_rows(b), w)))


@graph()
def float16_graph(b: Builder) -> None:
    """Everything is float16."""
    x = b.input("x", FLOAT16, ["batch", WIDTH])
    w = b.initializer("head.weight", draw("head.weight", WIDTH, WIDTH).astype(np.float16))
    b.output("y", b.op("MatMul", x, w), FLOAT16, ["batch", WIDTH])


@graph()
def odd_k(b: Builder) -> None:
    """K = 37 and N = 5: multiples of nothing."""
    output_rows(b, b.op("MatMul", input_rows(b, 37), weight(b, "head.weight", 37, 5)), 5)


@graph()
def single_row(b: Builder) -> None:
    """K = 1, then N = 1."""
    h = b.op("MatMul", input_rows(b, 1), weight(b, "wide.weight", 1, WIDTH), name="wide/MatMul")
    y = b.op("MatMul", h, weight(b, "narrow.weight", WIDTH, 1), name="narrow/MatMul")
    output_rows(b, y, 1)


@graph()
def all_zero_weight(b: Builder) -> None:
    """A weight without any information."""
    w = b.initializer("head.weight", np.zeros((WIDTH, WIDTH), np.float32))
    output_rows(b, b.op("MatMul", input_rows(b), w))


@graph()
def constant_channel(b: Builder) -> None:
    """One output channel is all zeros, one all the same number, one input row is zero."""
    values = draw("head.weight", WIDTH, WIDTH)
    values[:, 3], values[:, 7], values[11, :] = 0.0, 0.125, 0.0
    output_rows(b, b.op("MatMul", input_rows(b), b.initializer("head.weight", values)))


@graph()
def outlier_weight(b: Builder) -> None:
    """Channels that differ by seven orders of magnitude, and one element above all."""
    values = draw("head.weight", WIDTH, WIDTH) * np.logspace(-4, 3, WIDTH, dtype=np.float32)
    values[5, 9] = 1e4
    output_rows(b, b.op("MatMul", input_rows(b), b.initializer("head.weight", values)))


@graph()
def subnormal_weight(b: Builder) -> None:
    """Values so small that their scale is subnormal."""
    values = draw("head.weight", WIDTH, WIDTH) * np.float32(1e-38)
    output_rows(b, b.op("MatMul", input_rows(b), b.initializer("head.weight", values)))


@graph()
def awkward_names(b: Builder) -> None:
    """Names with spaces, glob characters and non-ASCII letters; unnamed nodes."""
    w = b.initializer("modèle/ [0]*?::w", draw("head.weight", WIDTH, WIDTH))
    h = b.op("MatMul", input_rows(b), w, name="a b/[c]*")
    y = b.op("MatMul", h, weight(b, "second.weight", WIDTH, WIDTH))
    for node in (h.producer(), y.producer()):
        if node is not None and node.name == "/MatMul":
            node.name = ""
    output_rows(b, y)


@graph()
def int_only(b: Builder) -> None:
    """No floating point anywhere."""
    ids = b.input("input_ids", INT64, ["batch", "seq"])
    table = b.initializer("table", np.arange(96, dtype=np.int64)[::-1].copy())
    total = b.op("Add", b.op("Gather", table, ids, axis=0), b.initializer("one", np.int64(1)))
    b.output("y", total, INT64, ["batch", "seq"])


@graph()
def no_nodes(b: Builder) -> None:
    """The input is the output."""
    x = input_rows(b)
    b.output("x", x, FLOAT, ["batch", WIDTH])
