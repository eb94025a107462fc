"""How many multiplications each operator does, counted on the shapes of one sample."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, runtime
from qgraph.calibrate import instrument

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

Shape = tuple[int, ...]


def count(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of one run, by the first output of each operator in `COUNTED`, bodies included.

    What lies in a branch that is not taken counts nothing; in a Loop or Scan all turns are added up. Left out are
    operators in bodies inside a Loop or Scan, since what they do may differ from turn to turn, and operators whose
    output has the name of another's in an outer or earlier graph.

    Args:
        model: a float model; it runs once, on a copy.
        feeds: one sample.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refused the model.
    """
    holders = {body: node for node in graph.nodes(model) for body in graph.bodies(node)}
    work = graph.clone(model)
    fresh = graph.Names(work)
    found: dict[str, tuple[ir.Node, dict[ir.Value, str]]] = {}
    for node, copy in zip(graph.nodes(model), graph.nodes(work), strict=True):
        is_counted = node.op_type in COUNTED and node.domain == "" and _can_tell(node, holders)
        if is_counted and graph.output_name(node) not in found:
            names = [_add_shape(copy, v, fresh) for v in _needed(copy)]
            found[graph.output_name(node)] = (node, dict(zip(_needed(node), names, strict=True)))
    shapes = _run(work, [name for _, taps in found.values() for name in taps.values()], feeds)
    return {
        output: sum(
            _macs(node, dict(zip(taps, turn, strict=True)))
            for turn in zip(*(shapes[name] for name in taps.values()), strict=True)
        )
        for output, (node, taps) in found.items()
    }


def _can_tell(node: ir.Node, holders: Mapping[ir.Graph, ir.Node]) -> bool:
    """Whether shapes can be brought out of all bodies around a node: only the innermost may be a Loop or Scan."""
    around = []
    holder = holders.get(graph.owner(node))
    while holder is not None:
        around.append(holder.op_type)
        holder = holders.get(graph.owner(holder))
    return all(op == "If" for op in around[1:]) and set(around[:1]) <= {"If", "Loop", "Scan"}


def _needed(node: ir.Node) -> list[ir.Value]:
    """The values whose shapes say how often an operator runs and how much it multiplies."""
    output = next(v for v in node.outputs if v.name)
    held = (node.inputs[0], node.inputs[1], output)
    return list(dict.fromkeys(v for v in held if v is not None and v.const_value is None))


def _add_shape(node: ir.Node, value: ir.Value, fresh: graph.Names) -> str:
    """Put a Shape beside an operator; it gives one shape for each time the operator runs."""
    out = graph.value(fresh(f"{value.name}.shape"), ir.DataType.INT64)
    graph.owner(node).append(ir.Node("", "Shape", [value], outputs=[out]))
    return str(out.name)


def _run(work: ir.Model, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, list[Shape]]:
    """The shapes that each of these values held in one run."""
    if not names:
        return {}
    work.graph.outputs[:] = [tapped.value for tapped in instrument.tap(work, names)]
    with tempfile.TemporaryDirectory(prefix="qgraph-macs-") as folder:
        path = files.save(work, Path(folder) / "shapes.onnx")
        got = runtime.session(path).run(None, dict(feeds))
    return {name: _rows(found) for name, found in zip(names, got, strict=True)}


def _rows(found: npt.NDArray[Any]) -> list[Shape]:
    """One shape per turn; none where the branch was not taken."""
    rows = found.reshape(-1, found.shape[-1]) if found.size else ()
    return [tuple(int(d) for d in row) for row in rows]


def _macs(node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> int:
    def shape(v: ir.Value | None) -> Shape:
        assert v is not None
        if v.const_value is not None:
            return tuple(int(d) for d in v.const_value.shape.numpy())
        return shapes[v]

    x, w = shape(node.inputs[0]), shape(node.inputs[1])
    if node.op_type in _GATES:
        steps, hidden = _size(x[:-1]), w[1] // _GATES[node.op_type]
        return steps * w[0] * w[1] * (x[-1] + hidden)
    y = shape(node.outputs[0])
    if node.op_type == "Conv":
        return _size(y) * _size(w[1:])
    if node.op_type == "ConvTranspose":
        return _size(x) * _size(w[1:])
    inner = x[0] if graph.attribute(node, "transA", 0) else x[-1]
    return _size(y) * int(inner)


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
