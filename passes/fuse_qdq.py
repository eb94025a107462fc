"""fuse-qdq: DequantizeLinear(constant) → operator becomes the form that the target runs best; the numbers stay.

    MatMul(x, DequantizeLinear(codes, scale))   →   MatMulNBits(x, codes', scale')      on target ort

This serves models that arrive with their own Q/DQ; what insert-qdq wrote is in the target's form already. A weight is
lowered with all its uses or not at all, since its codes would otherwise be stored twice. Where activations arrive
quantized too, their grids stay and get the form that the target fuses (`qgraph.arrived`).

Static INT8 is checked in the graph that the runtime executes and taken back where it runs in float (`qgraph.legalize`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import arrived, graph, legalize, macs, qdq, verify, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.registry import register
from qgraph.report import Entry, Operator
from qgraph.spec import QTYPES, QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Matrix, Use, Weight

_PORTABLE = "dequantize-linear"


@register
class FuseQdq(Pass):
    """Lower DequantizeLinear on constants to the target's fused operators."""

    name = "fuse-qdq"
    needs = frozenset({Fact.QDQ})
    gives = frozenset({Fact.LOWERED})
    keeps = (
        Keeps.NOTHING
    )  # the weights stay, but fused kernels may round activations (accuracy_level 4)

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        written = {n["output"] for r in ctx.records.values() for n in r.get("nodes", ())}
        writer = Writer(model, ctx.spool)
        found = [
            (w, d)
            for w, d in _arrived_quantized(model)
            if not any(graph.output_name(u.node) in written for u in w.uses)
        ]
        changed = _on_codes(writer, ctx, [w for w, _ in found if _is_on_codes(w)])
        for weight, dequantize in found:
            changed |= self._lower(writer, weight, dequantize, ctx)
        graph.remove_dead(model)
        _count(model, ctx, [w for w, _ in found if _is_on_codes(w)])
        return legalize.run(model, ctx) or changed

    def _lower(self, writer: Writer, weight: Weight, dequantize: ir.Node, ctx: Context) -> bool:
        q = _read(dequantize, weight)
        forms: list[Form] = []
        refused = ""
        if q is None:
            refused = "its blocks are no blocks of rows"
        elif _is_on_codes(weight):
            refused = "its operator's input is quantized too, and runtimes fuse the three"
        else:
            forms, refused = self._forms(weight, q, ctx, writer)
        entry = _entry(weight, q)
        ctx.records[weight.name] = {"entry": entry}
        if q is None or refused or all(f.name == _PORTABLE for f in forms):
            entry.forms = [_PORTABLE] * len(weight.uses)
            why = refused or "DequantizeLinear is the form of this target"
            entry.reason = f"arrived quantized and stays as it is: {why}"
            if _is_on_codes(weight):
                ctx.records[weight.name]["nodes"] = [
                    {"form": _PORTABLE, "node": n.name or "", "output": graph.output_name(n)}
                    for n in (u.node for u in weight.uses)
                ]
            return False
        nodes = []
        for use, form in zip(weight.uses, forms, strict=True):
            made = form.write(writer, weight, use, q, None)
            nodes.append(
                {"form": form.name, "node": made.name or "", "output": graph.output_name(made)}
            )
        ctx.records[weight.name]["nodes"] = nodes
        entry.forms = [n["form"] for n in nodes]
        entry.reason, entry.pass_name = (
            "arrived quantized; its codes and scales are kept",
            self.name,
        )
        return True

    def _forms(
        self, weight: Weight, q: QTensor, ctx: Context, writer: Writer
    ) -> tuple[list[Form], str]:
        dtype = ir.DataType["FLOAT16" if q.spec.scale_dtype == "float16" else "FLOAT"]
        requests = [
            Request(use, weight.dims, dtype, q.spec, None, weight.is_tied) for use in weight.uses
        ]
        return ctx.target.support_all(requests, graph.opset(writer.model))


def _is_on_codes(weight: Weight) -> bool:
    return any(arrived.is_on_codes(u.node) for u in weight.uses)


def _on_codes(writer: Writer, ctx: Context, found: list[Weight]) -> bool:
    """Bring Q/DQ of activations and biases into the form that the target fuses."""
    integers = ctx.target.integers
    if not found or integers is None or not integers.unsigned:
        return False
    shifted = arrived.to_unsigned(writer.model)
    moved = arrived.bound_codes(writer.model, integers)
    fused = [u.node for w in found for u in w.uses if not arrived.gap(u.node, integers)]
    biases = _biases(writer, fused)
    if shifted or moved or biases:
        text = (
            f"arrived quantized: every scale stays; {shifted} activations got uint8 codes in place of int8, "
            f"{moved} Relu apply to codes, {biases} biases are int32"
        )
        ctx.report("note", "QG510", f"target {ctx.target.name}", text)
    return bool(shifted or moved or biases)


def _biases(writer: Writer, nodes: list[ir.Node]) -> int:
    """Float biases of operators on codes → int32 with scale s_x * s_w, where they fit; returns how many."""
    count = 0
    for node in nodes:
        grid = arrived.grid_of(node.inputs[0])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        weight = node.inputs[1].producer() if node.inputs[1] is not None else None
        if grid is None or bias is None or weight is None or not graph.is_constant(bias):
            continue
        scales = weight.inputs[1] if weight.op_type == "DequantizeLinear" else None
        if scales is None or not graph.is_constant(scales):
            continue
        sizes, steps = np.abs(graph.array(bias)).reshape(-1), graph.array(scales).reshape(-1)
        alike = steps.size == 1 or steps.size == sizes.size
        if alike and (sizes < 2.0**30 * grid.scale * steps).all():
            qdq.Placed().write_bias(writer, node, grid)
            count += 1
    return count


def _count(model: ir.Model, ctx: Context, found: list[Weight]) -> None:
    """Remember what the operators of a model cost that arrived with its own grids, and what they lack."""
    if not found or ctx.target.integers is None or ctx.operators:
        return
    feeds = next(iter(ctx.data)) if ctx.data is not None else verify.sample_feeds(model, 1)[0]
    readers = {graph.output_name(u.node): (w.name, u.node) for w in found for u in w.uses}
    nodes = {graph.output_name(n): n for n in model.graph}
    for output, cost in macs.count(model, feeds).items():
        node = nodes[output]
        weight = readers[output][0] if output in readers else ""
        gap = arrived.gap(node, ctx.target.integers)
        reason = f"arrived quantized; {gap}" if output in readers and gap else gap
        ctx.operators[output] = Operator(
            output, node.op_type, node.name or "", weight, cost, reason=reason
        )


def _arrived_quantized(model: ir.Model) -> list[tuple[Weight, ir.Node]]:
    """Constants behind DequantizeLinear whose every reader is an operator that may have them in another form."""
    found: list[tuple[Weight, ir.Node]] = []
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in graph.nodes(model):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" and node.domain == "" else None
        if codes is not None and graph.is_constant(codes) and len(weights.tensor_shape(codes)) >= 2:
            groups.setdefault(codes, []).append(node)
    for codes, dequantizers in groups.items():
        uses = _uses(codes, dequantizers)
        alike = len({(id(d.inputs[1]), str(sorted(d.attributes))) for d in dequantizers}) == 1
        if uses and alike and len({u.matrix for u in uses}) == 1:
            found.append(
                (Weight(codes, str(codes.name).removesuffix(".codes"), uses), dequantizers[0])
            )
    return found


def _uses(codes: ir.Value, dequantizers: list[ir.Node]) -> list[Use]:
    """All uses of the dequantized weight, or none where any reader is no operator with a weight there."""
    uses: list[Use] = []
    if any(node not in dequantizers for node, _ in codes.uses()):
        return []
    for dequantize in dequantizers:
        for node, index in dequantize.outputs[0].uses():
            readers: list[tuple[ir.Node, int, ir.Node | None]] = [(node, index, None)]
            if node.op_type == "Transpose":
                readers = [(n, i, node) for n, i in node.outputs[0].uses()]
            for reader, place, through in readers:
                use = weights.use_of(reader, place, len(weights.tensor_shape(codes)), through)
                if use is None or use.reason:
                    return []
                uses.append(use)
        if dequantize.outputs[0].is_graph_output():
            return []
    return uses


def _entry(weight: Weight, q: QTensor | None) -> Entry:
    operators = dict(Counter(u.node.op_type for u in weight.uses))
    entry = Entry(weight.name, weight.label, operators, weight.dims, weight.nbytes, weight.nbytes)
    entry.by = "the model"
    entry.spec = str(q.spec) if q is not None else "quantized"
    return entry


def _read(dequantize: ir.Node, weight: Weight) -> QTensor | None:
    """The QTensor of a DequantizeLinear, or None where its granularity is no [N, K] block."""
    matrix, dims = weight.matrix, weight.dims
    codes, scale = dequantize.inputs[:2]
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if not graph.is_constant(scale) or (zero is not None and not graph.is_constant(zero)):
        return None
    assert codes is not None and scale is not None
    assert codes.const_value is not None and scale.const_value is not None
    name = codes.const_value.dtype.name.lower()
    if name not in QTYPES:
        return None
    qtype = QTYPES[name]
    axis = int(graph.attribute(dequantize, "axis", 1)) % len(dims)
    block = int(graph.attribute(dequantize, "block_size", 0))
    grain = _grain(matrix, dims, graph.array(scale).size, axis, block)
    if grain is None:
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
    return QTensor(
        QuantSpec(qtype, grain, symmetric, kind),
        held,
        per_block(scale).astype(np.float32),
        zero_point,
    )


def _grain(
    matrix: Matrix, dims: tuple[int, ...], scales: int, axis: int, block: int
) -> tuple[int, int] | None:
    n_axes, k_axes = matrix.perm[: matrix.rows], matrix.perm[matrix.rows :]
    if scales == 1 and not block:
        return (0, 0)
    if not block and (axis,) == n_axes:
        return (1, 0)
    if block and (axis,) == k_axes:
        return (1, 0 if block >= dims[axis] else block)
    return None
