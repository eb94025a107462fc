"""Odd graphs with bodies: If, Loop, Scan."""

import numpy as np
import onnx_ir as ir

from qgraph.models.builder import BOOL, FLOAT, INT64, Builder
from qgraph.models.odd.collect import WIDTH, draw, graph, input_rows, output_rows, weight


@graph()
def if_outer_weight(b: Builder) -> None:
    """One branch uses a weight of the outer graph, the other one of its own."""
    x, shared = input_rows(b), weight(b, "outer.weight", WIDTH, WIDTH)
    then, other = Builder("then"), Builder("else")
    then.output("then_out", then.op("MatMul", x, shared))
    own = weight(other, "else.weight", WIDTH, WIDTH)
    other.output("else_out", other.op("Relu", other.op("MatMul", x, own)))
    output_rows(b, b.op("MatMul", _choose(b, _is_positive(b, x), then, other), shared))


@graph()
def nested_if(b: Builder) -> None:
    """An If inside an If; the innermost body reaches two scopes out."""
    x, far = input_rows(b), weight(b, "far.weight", WIDTH, WIDTH)
    flag = b.input("flag", BOOL, [])
    outer, other = Builder("outer_then"), Builder("outer_else")
    near = weight(outer, "near.weight", WIDTH, WIDTH)
    h = outer.op("MatMul", x, near, name="near/MatMul")
    inner, rest = Builder("inner_then"), Builder("inner_else")
    inner.output("inner_then_out", inner.op("MatMul", h, far, name="inner_then/MatMul"))
    rest.output("inner_else_out", rest.op("MatMul", h, near, name="inner_else/MatMul"))
    outer.output("outer_then_out", _choose(outer, flag, inner, rest, name="inner/If"))
    other.output("outer_else_out", other.op("MatMul", x, far, name="far/MatMul"))
    output_rows(b, _choose(b, _is_positive(b, x), outer, other))


@graph()
def duplicate_names_in_subgraph_scopes(b: Builder) -> None:
    """Two branches use the same value, weight and node names for different things."""
    x = input_rows(b)
    then, other = Builder("then"), Builder("else")
    for branch, label in ((then, "first"), (other, "second")):
        w = branch.initializer("branch.weight", draw(label, WIDTH, WIDTH))
        branch.output("branch_out", branch.op("MatMul", x, w, name="branch/MatMul"))
    output_rows(b, _choose(b, _is_positive(b, x), then, other))


@graph()
def loop_outer_weight(b: Builder) -> None:
    """A loop body multiplies by a weight of the outer graph, then by one of its own."""
    x, outer = input_rows(b), weight(b, "outer.weight", WIDTH, WIDTH)
    body = Builder("body")
    body.input("iteration", INT64, [])
    going = body.input("going", BOOL, [])
    state = body.input("state", FLOAT, ["batch", WIDTH])
    h = body.op("Tanh", body.op("MatMul", state, outer, name="outer/MatMul"))
    h = body.op("MatMul", h, weight(body, "body.weight", WIDTH, WIDTH), name="body/MatMul")
    body.output("going_out", body.op("Identity", going))
    body.output("state_out", h)
    trips, start = b.initializer("trips", np.int64(3)), b.initializer("start", np.bool_(True))
    output_rows(b, b.op("Loop", trips, start, x, body=body.graph()))


@graph()
def scan_body(b: Builder) -> None:
    """A recurrent cell as a Scan over time, both weights from the outer graph."""
    x = b.input("x", FLOAT, ["seq", "batch", WIDTH])
    start = b.input("h0", FLOAT, ["batch", WIDTH])
    from_input = weight(b, "cell.input_weight", WIDTH, WIDTH)
    from_state = weight(b, "cell.state_weight", WIDTH, WIDTH)
    body = Builder("cell")
    state = body.input("state", FLOAT, ["batch", WIDTH])
    step = body.input("step", FLOAT, ["batch", WIDTH])
    mixed = body.op(
        "Add", body.op("MatMul", step, from_input), body.op("MatMul", state, from_state)
    )
    h = body.op("Tanh", mixed)
    copy = body.op("Identity", h)
    body.output("state_out", h)
    body.output("step_out", copy)
    final, steps = b.ops(2, "Scan", start, x, body=body.graph(), num_scan_inputs=1)
    b.output("h_final", final, FLOAT, ["batch", WIDTH])
    b.output("y", steps, FLOAT, ["seq", "batch", WIDTH])


def _is_positive(b: Builder, x: ir.Value) -> ir.Value:
    """Return whether the sum of `x` is positive, []: both branches come up in practice."""
    total = b.op("ReduceSum", x, keepdims=0)
    return b.op("Greater", total, b.number("zero", 0.0))


def _choose(
    b: Builder, condition: ir.Value, then: Builder, other: Builder, name: str = ""
) -> ir.Value:
    return b.op("If", condition, name=name, then_branch=then.graph(), else_branch=other.graph())
