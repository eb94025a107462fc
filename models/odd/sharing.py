"""Odd graphs about who owns a weight: shared, tied, in functions, overridable, unused."""

import numpy as np
import onnx_ir as ir

from qgraph.models.builder import FLOAT, INT64, Builder
from qgraph.models.odd.collect import WIDTH, draw, graph, input_rows, output_rows, weight

FUNCTION_DOMAIN = "odd.functions"


@graph()
def shared_weight(b: Builder) -> None:
    """One initializer feeds three MatMuls."""
    x, w = input_rows(b), weight(b, "shared.weight", WIDTH, WIDTH)
    for name in ("first", "second", "third"):
        x = b.op("Tanh", b.op("MatMul", x, w, name=f"{name}/MatMul"))
    output_rows(b, x)


@graph()
def shared_via_transpose(b: Builder) -> None:
    """One weight feeds a MatMul as it is and two more through one Transpose."""
    x, w = input_rows(b), weight(b, "shared.weight", WIDTH, WIDTH)
    turned = b.op("Transpose", w, perm=[1, 0])
    x = b.op("Tanh", b.op("MatMul", x, w, name="direct/MatMul"))
    for name in ("first", "second"):
        x = b.op("Tanh", b.op("MatMul", x, turned, name=f"{name}/MatMul"))
    output_rows(b, x)


@graph()
def weight_on_both_sides(b: Builder) -> None:
    """One weight is the right operand of one MatMul and the left operand of another."""
    x, w = input_rows(b), weight(b, "shared.weight", WIDTH, WIDTH)
    right = b.op("MatMul", x, w, name="right/MatMul")
    left = b.op("MatMul", w, b.op("Transpose", x, perm=[1, 0]), name="left/MatMul")
    output_rows(b, b.op("Add", right, b.op("Transpose", left, perm=[1, 0])))


@graph()
def tied_embedding(b: Builder) -> None:
    """The table of a Gather is also, transposed, the weight of the last MatMul."""
    ids = b.input("input_ids", INT64, ["batch", "seq"])
    table = weight(b, "embedding.weight", 96, WIDTH)
    h = b.op("Tanh", b.op("Gather", table, ids, axis=0))
    logits = b.op("MatMul", h, b.op("Transpose", table, perm=[1, 0]))
    b.output("logits", logits, FLOAT, ["batch", "seq", 96])


@graph()
def gather_embedding(b: Builder) -> None:
    """A table that only a Gather reads."""
    ids = b.input("input_ids", INT64, ["batch", "seq"])
    h = b.op("Gather", weight(b, "embedding.weight", 96, WIDTH), ids, axis=0)
    b.output("y", b.op("Relu", h), FLOAT, ["batch", "seq", WIDTH])


@graph()
def function_body(b: Builder) -> None:
    """A function whose weight is an argument, and one that holds its weight as a Constant."""
    _dense(b)
    body = Builder("DenseOwn")
    x = body.input("x", FLOAT, ["batch", WIDTH])
    own = body.op("Constant", value=ir.tensor(draw("own.weight", WIDTH, WIDTH), name="own"))
    body.output("y", body.op("MatMul", x, own))
    b.function(FUNCTION_DOMAIN, "DenseOwn", body.graph())
    w, bias = weight(b, "dense.weight", WIDTH, WIDTH), weight(b, "dense.bias", WIDTH)
    h = b.ops(1, "Dense", input_rows(b), w, bias, domain=FUNCTION_DOMAIN)[0]
    output_rows(b, b.ops(1, "DenseOwn", h, domain=FUNCTION_DOMAIN)[0])


@graph()
def function_called_twice(b: Builder) -> None:
    """One function, two calls, two weights."""
    _dense(b)
    x = input_rows(b)
    for name in ("first", "second"):
        w, bias = weight(b, f"{name}.weight", WIDTH, WIDTH), weight(b, f"{name}.bias", WIDTH)
        x = b.ops(1, "Dense", x, w, bias, domain=FUNCTION_DOMAIN, name=f"{name}/Dense")[0]
    output_rows(b, x)


@graph()
def unused_initializer(b: Builder) -> None:
    """A large weight that no node reads."""
    weight(b, "unused.weight", WIDTH, WIDTH)
    output_rows(b, b.op("MatMul", input_rows(b), weight(b, "used.weight", WIDTH, WIDTH)))


@graph()
def initializer_is_output(b: Builder) -> None:
    """A weight leaves the graph as it is, besides being used."""
    w = weight(b, "head.weight", WIDTH, WIDTH)
    output_rows(b, b.op("MatMul", input_rows(b), w))
    b.output("head.weight", w, FLOAT, [WIDTH, WIDTH])


@graph()
def input_is_output(b: Builder) -> None:
    """An input leaves the graph as it is, besides being used."""
    x = input_rows(b)
    output_rows(b, b.op("MatMul", x, weight(b, "head.weight", WIDTH, WIDTH)))
    b.output("x", x, FLOAT, ["batch", WIDTH])


@graph()
def intermediate_is_output(b: Builder) -> None:
    """The value between two MatMuls leaves the graph too."""
    h = b.op("MatMul", input_rows(b), weight(b, "first.weight", WIDTH, WIDTH))
    y = b.op("MatMul", b.op("Relu", h), weight(b, "second.weight", WIDTH, WIDTH))
    b.output("hidden", h, FLOAT, ["batch", WIDTH])
    output_rows(b, y)


@graph()
def weight_is_graph_input(b: Builder) -> None:
    """A weight that is also an input: only a default, which a caller may replace."""
    x, w = input_rows(b), weight(b, "head.weight", WIDTH, WIDTH)
    b.overridable(w)
    h = b.op("MatMul", x, w, name="overridable/MatMul")
    output_rows(b, b.op("MatMul", h, weight(b, "fixed.weight", WIDTH, WIDTH)))


@graph()
def constant_nodes(b: Builder) -> None:
    """Weights as Constant nodes, the form of TorchScript exports without folding."""
    x = input_rows(b)
    w = b.op("Constant", value=ir.tensor(draw("dense.weight", WIDTH, WIDTH), name="w"))
    bias = b.op("Constant", value=ir.tensor(draw("dense.bias", WIDTH), name="bias"))
    half = b.op("Constant", value_float=0.5)
    output_rows(b, b.op("Mul", b.op("Add", b.op("MatMul", x, w), bias), half))


@graph()
def equal_weights(b: Builder) -> None:
    """Two initializers that hold the same bytes and must stay two decisions."""
    x, values = input_rows(b), draw("equal.weight", WIDTH, WIDTH)
    h = b.op("MatMul", x, b.initializer("first.weight", values), name="first/MatMul")
    w = b.initializer("second.weight", np.copy(values))
    output_rows(b, b.op("MatMul", b.op("Relu", h), w, name="second/MatMul"))


def _dense(b: Builder) -> None:
    """Add the function Dense(x, w, bias) = tanh(x w + bias)."""
    body = Builder("Dense")
    x = body.input("x", FLOAT, ["batch", WIDTH])
    w = body.input("w", FLOAT, [WIDTH, WIDTH])
    bias = body.input("bias", FLOAT, [WIDTH])
    y = body.op("Tanh", body.op("Add", body.op("MatMul", x, w), bias))
    body.output("y", y)
    b.function(FUNCTION_DOMAIN, "Dense", body.graph())
