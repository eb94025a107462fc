"""How many multiplications each operator does, counted on the shapes of one sample."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import files, graph, runtime

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

Shape = tuple[int, ...]


def count(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of one run, by the first output of each operator in `COUNTED`.

    Operators in bodies of If, Loop and Scan are left out: how often they run is no matter of shapes.

    Args:
        model: a float model; it runs once, on a copy.
        feeds: one sample.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refused the model.
    """
    found = [n for n in model.graph if n.op_type in COUNTED and n.domain == ""]
    shapes = _shapes(model, {v for n in found for v in _needed(n)}, feeds) if found else {}
    return {graph.output_name(n): _macs(n, shapes) for n in found}


def _needed(node: ir.Node) -> list[ir.Value]:
    held = [node.inputs[0], node.inputs[1]]
    if node.op_type not in _GATES:
        held.append(node.outputs[0])
    return [v for v in held if v is not None and v.const_value is None]


def _shapes(model: ir.Model, wanted: set[ir.Value], feeds: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of these values in one run."""
    names = sorted(str(v.name) for v in wanted)
    work = graph.clone(model)
    values = {
        str(v.name): v for v in (*work.graph.inputs, *(o for n in work.graph for o in n.outputs))
    }
    fresh = graph.Names(work)
    outputs = []
    for name in names:
        out = graph.value(fresh(f"{name}.shape"), ir.DataType.INT64)
        work.graph.append(ir.Node("", "Shape", [values[name]], outputs=[out]))
        outputs.append(out)
    work.graph.outputs[:] = outputs
    with tempfile.TemporaryDirectory(prefix="qgraph-macs-") as folder:
        path = files.save(work, Path(folder) / "shapes.onnx")
        got = runtime.session(path).run(None, dict(feeds))
    return {n: tuple(int(d) for d in s) for n, s in zip(names, got, strict=True)}


def _macs(node: ir.Node, shapes: Mapping[str, Shape]) -> int:
    def shape(v: ir.Value | None) -> Shape:
        assert v is not None
        if v.const_value is not None:
            return tuple(int(d) for d in v.const_value.shape.numpy())
        return shapes[str(v.name)]

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
