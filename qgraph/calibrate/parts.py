"""Parts of a model as models of their own, and which values can go from one to the next by file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

# Types that ONNX Runtime takes from numpy.
_PLAIN = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL, ir.DataType.INT8,
        ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.UINT32,
        ir.DataType.INT64, ir.DataType.UINT64,
    }
)  # fmt: skip
Types = Mapping[str, ir.DataType]
"""What `types.infer` finds."""


def can_be_kept(value: ir.Value, types: Types) -> bool:
    """Whether arrays of numpy hold the value."""
    return _type(value, types) in _PLAIN


def extract(
    model: ir.Model, starts: Sequence[ir.Value], outputs: Sequence[ir.Value], types: Types
) -> ir.Model:
    """The nodes from some values to others.

    Args:
        model: not changed; weights are shared with it.
        starts: values that are given; those that nothing needs become no inputs.
        outputs: values that are computed.
        types: of the model.
    """
    part = ir.convenience.extract(model.graph, starts, outputs)
    found = {str(v.name): v for v in starts}
    used = [v for v in part.inputs if v.uses() or v.is_graph_output()]
    for v in used:
        # Stated shapes of values inside a model are often wrong, and those of inputs are held to.
        v.type = ir.TensorType(_type(found[str(v.name)], types) or ir.DataType.FLOAT)
        v.shape = None
    part.inputs[:] = used
    return ir.Model(part, ir_version=model.ir_version, functions=list(model.functions.values()))


def _type(value: ir.Value, types: Types) -> ir.DataType | None:
    return value.dtype or types.get(str(value.name))
