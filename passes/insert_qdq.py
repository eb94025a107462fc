"""insert-qdq: the plan goes into the graph. Each use of a solved weight is written in the form its target chose.

After this pass the decisions live in the graph alone; the plan is empty. The opset is raised here, and only if a
chosen form needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph import activations, graph, macs, opset, qdq, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.plan import Decision
from qgraph.registry import register
from qgraph.report import Operator
from qgraph.target import Request, Writer
from qgraph.weights import Use, Weight

if TYPE_CHECKING:
    pass


@register
class InsertQdq(Pass):
    """Write every solved weight."""

    name = "insert-qdq"
    needs = frozenset({Fact.PLAN, Fact.SOLVED})
    gives = frozenset({Fact.QDQ})
    breaks = frozenset({Fact.CANONICAL, Fact.PLAN, Fact.SOLVED, Fact.STATS})
    keeps = Keeps.NOTHING

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Consume `ctx.plan`."""
        _count_operators(model, ctx)
        needed = max((self._opset(w, d, ctx) for w, d in _planned(model, ctx)), default=0)
        if needed > graph.opset(model):
            opset.raise_opset(model, needed)
        planned = _planned(model, ctx)  # raising the opset may have replaced nodes
        position = {node: index for index, node in enumerate(graph.nodes(model))}
        todo = [
            (use, form, w, d) for w, d in planned for use, form in zip(w.uses, d.forms, strict=True)
        ]
        # In graph order, so that a quantized activation that several operators share stands before the first of them.
        todo.sort(key=lambda item: position[item[0].node])
        writer = Writer(model, ctx.spool)
        regions, grids = activations.recall(model, ctx.plan, ctx.target.integers)
        placed = ctx.placed = qdq.Placed()
        for weight, decision in planned:
            if decision.activation is not None and not decision.activation.dynamic:
                assert weight.value.const_value is not None
                placed.weights[weight.name] = weight.value.const_value
                placed.uses[weight.name] = [u.node for u in weight.uses]
                solved = ctx.plan.solved[weight.name]
                ctx.plan.solved[weight.name] = qdq.with_room_for_bias(solved, weight, grids)
        for index, (use, form_name, weight, decision) in enumerate(todo):
            ctx.progress(f"writing {weight.label}", index / len(todo))
            self._write(writer, use, form_name, weight, decision, ctx)
        for weight, decision in planned:
            _record(weight, decision, ctx)
        regions, grids = activations.recall(
            model, ctx.plan, ctx.target.integers
        )  # forms may have replaced values
        needs_bias = ctx.target.integers is not None and ctx.target.integers.needs_bias
        for node in dict.fromkeys(n for nodes in placed.uses.values() for n in nodes):
            assert node.inputs[0] is not None
            correction = ctx.plan.corrections.get(str(node.outputs[0].name))
            placed.write_bias(writer, node, grids[node.inputs[0]], correction, is_needed=needs_bias)
        placed.write(writer, regions, grids)
        ctx.plan.solved.clear()
        ctx.plan.corrections.clear()
        changed = bool(todo)
        graph.remove_dead(model)
        for each in graph.graphs(model):
            each.sort()
        return changed

    def _opset(self, weight: Weight, decision: Decision, ctx: Context) -> int:
        assert decision.spec is not None and weight.value.const_value is not None
        return max(
            ctx.target.form(name).opset(
                Request(
                    use,
                    weight.dims,
                    weight.value.const_value.dtype,
                    decision.spec,
                    decision.activation,
                    weight.is_tied,
                )
            )
            for use, name in zip(weight.uses, decision.forms, strict=True)
        )

    def _write(
        self,
        writer: Writer,
        use: Use,
        form_name: str,
        weight: Weight,
        decision: Decision,
        ctx: Context,
    ) -> None:
        form = ctx.target.form(form_name)
        made = form.write(writer, weight, use, ctx.plan.solved[weight.name], decision.activation)
        record = ctx.records.setdefault(weight.name, {})
        record.setdefault("nodes", []).append(
            {"form": form_name, "node": made.name or "", "output": graph.output_name(made)}
        )


def _count_operators(model: ir.Model, ctx: Context) -> None:
    """Remember what every operator with products costs, while the model is still float."""
    is_integer = any(d.activation is not None for d in ctx.plan.quantized())
    if not is_integer or ctx.data is None or ctx.operators:
        return
    readers = {graph.output_name(u.node): w.name for w in weights.find(model) for u in w.uses}
    nodes = {graph.output_name(n): n for n in reversed(graph.nodes(model))}
    for output, count in macs.count(model, next(iter(ctx.data))).items():
        node = nodes[output]
        ctx.operators[output] = Operator(
            output, node.op_type, node.name or "", readers.get(output, ""), count
        )


def _planned(model: ir.Model, ctx: Context) -> list[tuple[Weight, Decision]]:
    found = {w.name: w for w in weights.find(model)}
    return [(found[d.value], d) for d in ctx.plan.quantized() if d.value in ctx.plan.solved]


def _record(weight: Weight, decision: Decision, ctx: Context) -> None:
    assert decision.spec is not None
    stored = ctx.target.nbytes(decision.spec, decision.forms, *weight.shape)
    ctx.records[weight.name].update(stored_bytes=stored)
