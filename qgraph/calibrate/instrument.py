"""Bringing values out of a graph, from wherever they are, as outputs of the main graph; or counting them in place.

A value inside an If is a further output of the If: the branch that it is not in gives an empty tensor, which counts for
nothing. A value inside a Loop or Scan is a further scan output: the turns, stacked on a new first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qgraph import errors, graph

DOMAIN = "ai.qgraph.calibration"
CONTROL = "ai.qgraph.calibration.control"
# The same values in another shape or order.
_REARRANGING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Tapped:
    """One observed value.

    Attributes:
        name: its own.
        value: the value of the main graph that holds it.
        new_axes: how many axes stand before its own.
        is_lifted: it comes out of a body.
    """

    name: str
    value: ir.Value
    new_axes: int = 0
    is_lifted: bool = False


def find(model: ir.Model, names: Iterable[str]) -> dict[str, ir.Value]:
    """Values by name, of all scopes.

    Raises:
        errors.InputError: QG140 for a name that no computed value has.
    """
    known: dict[str, ir.Value] = {}
    for each in graph.graphs(model):
        for v in (*each.inputs, *(v for node in each for v in node.outputs)):
            known.setdefault(v.name or "", v)
    missing = [n for n in names if n not in known]
    if missing:
        raise errors.InputError(
            *(
                errors.Diagnostic(
                    "error", "QG140", n, "there is no such activation", errors.nearest(n, known)
                )
                for n in missing
            )
        )
    return {n: known[n] for n in names}


def rearranged(model: ir.Model, names: Iterable[str]) -> dict[str, str]:
    """Those of the values that hold what another of them holds, in another shape or order, by the name of that.

    Raises:
        errors.InputError: QG140 for a name that no computed value has.
    """
    found = find(model, names)
    first: dict[ir.Value, str] = {}
    return {n: held for n, v in found.items() if (held := first.setdefault(_source(v), n)) != n}


def tap(model: ir.Model, names: Sequence[str]) -> list[Tapped]:
    """Bring values out, changing the model: bodies get outputs, the main graph gets none yet."""
    holders = {body: node for node in graph.nodes(model) for body in graph.bodies(node)}
    fresh = graph.Names(model)
    return [_lift(name, v, holders, fresh) for name, v in find(model, names).items()]


def count(model: ir.Model, keys: Mapping[str, int], threads: int) -> list[Tapped]:
    """Put a node beside each value that counts it into a table, changing the model.

    The model gets an input, `CONTROL`, with a row for each value: see runtime_ops/observe_op.cc.

    Args:
        model: one to change.
        keys: of open tables (`qgraph.observers.tables`), by value name; the values are float, float16 or double.
        threads: that a node may use.

    Returns:
        What the nodes give, float32 [parts, 4], brought out.
    """
    fresh = graph.Names(model)
    control = graph.value(CONTROL, ir.DataType.INT64, [len(keys), 3])
    model.graph.inputs.append(control)
    seen: dict[str, str] = {}
    for row, (name, v) in enumerate(find(model, keys).items()):
        node, body = v.producer(), _scope(v)
        seen[name] = fresh(f"{name}.seen")
        made: list[ir.Node] = []
        # Not float16 values: ONNX Runtime would drop the cast with the one that rounded to float16.
        if v.dtype == ir.DataType.DOUBLE:
            single = graph.value(fresh(f"{name}.float"), ir.DataType.FLOAT, v.shape)
            to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            made.append(ir.Node("", "Cast", [v], [to], outputs=[single]))
            v = single
        attributes = {"table": keys[name], "threads": threads, "row": row}
        given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        out = graph.value(seen[name], ir.DataType.FLOAT, [None, 4])
        made.append(ir.Node(DOMAIN, "Observe", [v, control], given, outputs=[out], name=out.name))
        if node is not None:
            body.insert_after(node, made)
        elif len(body):
            body.insert_before(body[0], made)
        else:
            body.extend(made)
    model.graph.opset_imports[DOMAIN] = 1
    brought = tap(model, list(seen.values()))
    return [replace(t, name=name) for name, t in zip(seen, brought, strict=True)]


def _source(v: ir.Value) -> ir.Value:
    """The value of the same graph, so computed as often, that this one is only a rearrangement of; or itself."""
    while (node := v.producer()) is not None and node.op_type in _REARRANGING and not node.domain:
        held = node.inputs[0]
        if held is None or held.is_initializer() or _scope(held) is not node.graph:
            break
        v = held
    return v


def _lift(name: str, v: ir.Value, holders: dict[ir.Graph, ir.Node], fresh: graph.Names) -> Tapped:
    axes, is_lifted = 0, False
    body = _scope(v)
    while (node := holders.get(body)) is not None:
        if node.op_type == "If":
            v = _out_of_if(node, body, v, fresh)
        elif node.op_type in ("Loop", "Scan"):
            v = _out_of_loop(node, body, v, fresh)
            axes += 1
        else:
            raise errors.UnsupportedError(
                errors.Diagnostic(
                    "error", "QG141", name, f"lies in a body of {graph.where(node)}",
                    "leave it out: values in If, Loop and Scan can be observed",
                )
            )  # fmt: skip
        body, is_lifted = graph.owner(node), True
    return Tapped(name, v, axes, is_lifted)


def _scope(v: ir.Value) -> ir.Graph:
    node = v.producer()
    if node is not None:
        return graph.owner(node)
    if not isinstance(v.graph, ir.Graph):
        raise TypeError(f"{v.name!r} belongs to no graph")
    return v.graph


def _out_of_if(node: ir.Node, body: ir.Graph, v: ir.Value, fresh: graph.Names) -> ir.Value:
    dtype = v.dtype or ir.DataType.FLOAT
    rank = None if v.shape is None else len(v.shape)
    for each in graph.bodies(node):
        if each is body:
            # A copy: the branch may give the value already, and a name may be given only once.
            out = graph.value(fresh(f"{v.name}.tap"), v.dtype, v.shape)
            each.append(ir.Node("", "Identity", [v], outputs=[out]))
        else:
            empty = ir.tensor(np.zeros([0] * (rank or 1), np.float32))
            dims = list(empty.shape.numpy())
            out = graph.value(fresh(f"{v.name}.none"), ir.DataType.FLOAT, dims)
            each.append(ir.Node("", "Constant", [], [ir.AttrTensor("value", empty)], outputs=[out]))
            if dtype != ir.DataType.FLOAT:
                cast = graph.value(fresh(f"{v.name}.none"), dtype, dims)
                each.append(
                    ir.Node("", "Cast", [out], [ir.AttrInt64("to", int(dtype))], outputs=[cast])
                )
                out = cast
        each.outputs.append(out)
    return _new_output(node, v, fresh)


def _out_of_loop(node: ir.Node, body: ir.Graph, v: ir.Value, fresh: graph.Names) -> ir.Value:
    out = graph.value(fresh(f"{v.name}.tap"), v.dtype, v.shape)
    body.append(ir.Node("", "Identity", [v], outputs=[out]))
    body.outputs.append(out)
    for name in ("scan_output_axes", "scan_output_directions"):
        held = node.attributes.get(name)
        if held is not None:
            node.attributes[name] = ir.AttrInt64s(name, [*held.as_ints(), 0])
    return _new_output(node, v, fresh)


def _new_output(node: ir.Node, v: ir.Value, fresh: graph.Names) -> ir.Value:
    node.resize_outputs(len(node.outputs) + 1)
    made = node.outputs[-1]
    made.name = fresh(f"{v.name}.out")
    if v.dtype is not None:
        made.type = ir.TensorType(v.dtype)
    return made
