"""What ONNX Runtime executes: its optimized model, read back.

The session saves its optimized graph with every weight in a file beside it, and that file is the null device: only
types and shapes are read. Kernels do not pack their weights, since nothing is run. So a model costs no memory and no
disk beyond its graph.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from qgraph import graph, runtime
from qgraph.executed import ConstantInput, ExecutedGraph, ExecutedNode, Scalar, match

_WEIGHTS = "weights.data"
_WEIGHTS_APART = {
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.disable_prepacking": "1",
}
_SCALARS = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING)


def executed_graph(path: str | Path, config: Mapping[str, str] | None = None) -> ExecutedGraph:
    """The graph that ONNX Runtime executes for a model on the CPU.

    Args:
        path: the model file.
        config: session configuration entries, as they will be used when the model is served.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refused the model.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-executed-") as folder:
        saved = Path(folder) / "optimized.onnx"
        # Where the system has no links, the weights are written.
        with contextlib.suppress(OSError, NotImplementedError):
            os.symlink(os.devnull, Path(folder) / _WEIGHTS)
        runtime.session(
            path,
            threads=1,
            optimized_model_path=saved,
            config={**_WEIGHTS_APART, **(config or {})},
        )
        nodes = _read(ir.load(saved))
    return ExecutedGraph("onnxruntime", str(onnxruntime.__version__), nodes)


def inspect(path: str | Path, outputs: Sequence[str]) -> dict[str, match.Ran]:
    """What ONNX Runtime makes of the values `outputs` of a model (see `match.what_runs`)."""
    return match.what_runs(executed_graph(path), outputs, ir.load(path))


def _read(model: ir.Model) -> tuple[ExecutedNode, ...]:
    return tuple(_node(node, place) for scope, place in _scopes(model.graph, "") for node in scope)


def _scopes(scope: ir.Graph, place: str) -> list[tuple[ir.Graph, str]]:
    """A graph and every body inside it, each with the node that holds it."""
    found = [(scope, place)]
    for node in scope:
        for body in graph.bodies(node):
            found += _scopes(body, f"in {node.op_type} {node.name or node.outputs[0].name}")
    return found


def _node(node: ir.Node, place: str) -> ExecutedNode:
    attributes: dict[str, Scalar] = {
        a.name: a.value for a in node.attributes.values() if a.type in _SCALARS
    }
    words = [f"{name}={value}" for name, value in sorted(attributes.items())]
    return ExecutedNode(
        op=node.op_type,
        name=node.name or "",
        inputs=tuple(v.name or "" if v is not None else "" for v in node.inputs),
        outputs=tuple(v.name or "" for v in node.outputs),
        constants=tuple(_constant(v) for v in node.inputs if v is not None and _is_constant(v)),
        domain=node.domain,
        detail=" ".join([*words, place] if place else words),
        input_dtypes=tuple(_dtype(v) for v in node.inputs),
        attributes=attributes,
    )


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _constant(value: ir.Value) -> ConstantInput:
    tensor = value.const_value
    assert tensor is not None
    return ConstantInput(value.name or "", _name(tensor.dtype), tuple(tensor.shape.numpy()))


def _dtype(value: ir.Value | None) -> str:
    if value is None:
        return ""
    if value.const_value is not None:
        return _name(value.const_value.dtype)
    return _name(value.dtype) if value.dtype is not None else ""


def _name(dtype: ir.DataType) -> str:
    return "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
