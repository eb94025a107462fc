"""fuse-qdq: DequantizeLinear(constant) → operator becomes the form that the target runs best; the numbers stay.

    MatMul(x, DequantizeLinear(codes, scale))   →   MatMulNBits(x, codes', scale')      on target ort

Works on what insert-qdq wrote and on models that arrive with their own Q/DQ. A pair that the target has no better
form for stays as it is, and a note says why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.registry import register
from qgraph.spec import QTYPES, QTensor, QuantSpec
from qgraph.target import Request, Writer
from qgraph.weights import Matrix, Use, Weight


@register
class FuseQdq(Pass):
    """Lower DequantizeLinear on constants to the target's fused operators."""

    name = "fuse-qdq"
    needs = frozenset({Fact.QDQ})
    gives = frozenset({Fact.LOWERED})
    keeps = Keeps.FLOAT_EQUAL

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        writer = Writer(model, ctx.spool)
        changed = False
        for node in graph.nodes(model):
            for index, v in enumerate(node.inputs):
                found = _quantized_weight(node, index, v)
                if found is not None and self._lower(writer, *found, ctx):
                    changed = True
                    break  # the node is gone
        graph.remove_dead(model)
        return changed

    def _lower(self, writer: Writer, weight: Weight, use: Use, q: QTensor, ctx: Context) -> bool:
        dtype = ir.DataType["FLOAT16" if q.spec.scale_dtype == "float16" else "FLOAT"]
        support = ctx.target.support(
            Request(use, weight.dims, dtype, q.spec, None), graph.opset(writer.model)
        )
        if support.form is None:
            ctx.report(
                "missed",
                "QG501",
                weight.label,
                f"stays DequantizeLinear + {use.node.op_type}: {support.reason}",
            )
            return False
        if support.form.name == "dequantize-linear":
            return False
        output = str(use.node.outputs[0].name)
        made = support.form.write(writer, weight, use, q, None)
        record = next(
            (
                r
                for r in ctx.records.values()
                if any(n["output"] == output for n in r.get("nodes", ()))
            ),
            None,
        )
        if record is None:
            record = ctx.records.setdefault(weight.name, {"spec": str(q.spec), "from_model": True})
        nodes = [n for n in record.get("nodes", []) if n["output"] != output]
        record["nodes"] = [
            *nodes,
            {
                "form": support.form.name,
                "node": made.name or "",
                "output": str(made.outputs[0].name),
            },
        ]
        return True


def _quantized_weight(
    node: ir.Node, index: int, v: ir.Value | None
) -> tuple[Weight, Use, QTensor] | None:
    """The weight behind a DequantizeLinear of constants, as a matrix for this use of it."""
    producer = v.producer() if v is not None else None
    if (
        v is None
        or producer is None
        or producer.op_type != "DequantizeLinear"
        or producer.domain != ""
    ):
        return None
    layout = weights.LAYOUTS.get((node.domain, node.op_type, index))
    codes = producer.inputs[0]
    if layout is None or codes is None or not graph.is_constant(codes):
        return None
    assert codes.const_value is not None
    dims = tuple(codes.const_value.shape.numpy())
    kind, rule = layout
    matrix = rule(node, len(dims))
    if isinstance(matrix, str):
        return None
    q = _read(producer, matrix, dims)
    if q is None:
        return None
    weight = Weight(codes, str(codes.name))
    use = Use(node, index, kind, matrix)
    weight.uses.append(use)
    return weight, use, q


def _read(dequantize: ir.Node, matrix: Matrix, dims: tuple[int, ...]) -> QTensor | None:
    """The QTensor of a DequantizeLinear, or None where its granularity is no [N, K] block."""
    codes, scale = dequantize.inputs[:2]
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if not graph.is_constant(scale) or (zero is not None and not graph.is_constant(zero)):
        return None
    assert (
        codes is not None
        and scale is not None
        and codes.const_value is not None
        and scale.const_value is not None
    )
    name = codes.const_value.dtype.name.lower()
    if name not in QTYPES:
        return None
    qtype = QTYPES[name]
    axis = int(graph.attribute(dequantize, "axis", 1)) % max(len(dims), 1)
    block = int(graph.attribute(dequantize, "block_size", 0))
    n_axes, k_axes = matrix.perm[: matrix.rows], matrix.perm[matrix.rows :]
    grain: tuple[int, int]
    if graph.array(scale).size == 1 and not block:
        grain = (0, 0)
    elif not block and (axis,) == n_axes:
        grain = (1, 0)
    elif block and (axis,) == k_axes:
        grain = (1, 0 if block >= dims[axis] else block)
    else:
        return None

    def per_block(constant: ir.Value) -> npt.NDArray[Any]:
        values = graph.array(constant)
        if block:
            return np.ascontiguousarray(matrix.of(values))
        return values.reshape((1, 1) if grain == (0, 0) else (-1, 1))

    # No zero point means 0 to DequantizeLinear; a QTensor without one means the middle of an unsigned type.
    points = np.zeros_like(per_block(scale), qtype.container) if zero is None else per_block(zero)
    middle = 0 if qtype.is_signed else 2 ** (qtype.bits - 1)
    symmetric = bool((points == middle).all())
    kind = "float16" if scale.const_value.dtype == ir.DataType.FLOAT16 else "float32"
    held: Any = np.ascontiguousarray(matrix.of(graph.array(codes))).astype(qtype.container)
    zero_point: Any = None if symmetric else points.astype(qtype.container)
    spec = QuantSpec(qtype, grain, symmetric, kind)
    return QTensor(spec, held, per_block(scale).astype(np.float32), zero_point)
