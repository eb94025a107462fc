"""Types of values that a model does not state: exporters rarely say them inside bodies."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qgraph import graph

_LARGE = 1024  # bytes; larger weights decide no type


def infer(model: ir.Model) -> dict[str, ir.DataType]:
    """Types by value name: stated ones, else what ONNX's inference finds; values of unknown type are left out.

    Weights are not copied: for the inference they become inputs.
    """
    copy = graph.clone(model)
    main = copy.graph
    for value in list(main.initializers.values()):
        if value.const_value is None or value.const_value.nbytes > _LARGE:
            del main.initializers[value.name or ""]
            if not value.is_graph_input():
                main.inputs.append(value)
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(copy)))
    known: dict[str, ir.DataType | None] = {}
    for each in (inferred, model):  # what the model states comes last and counts
        for body in graph.graphs(each):
            for v in (*body.inputs, *(v for node in body for v in node.outputs)):
                if v.name and v.dtype is not None:
                    # Bodies side by side may use one name for two values.
                    same = each is model or known.get(v.name, v.dtype) == v.dtype
                    known[v.name] = v.dtype if same else None
    return {name: dtype for name, dtype in known.items() if dtype is not None}
