"""A float model that rounds activations as its quantized form will, so that solvers see what operators compute with.

Operators that round at run time do it for themselves (`Form.rounding`); values with a static grid go through
QuantizeLinear and DequantizeLinear before each operator that computes on their codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph import graph, opset, weights
from qgraph.calibrate import instrument
from qgraph.observers import Grid
from qgraph.ops import bodies
from qgraph.plan import QuantPlan
from qgraph.target import Rounding, Target


@dataclass(frozen=True, slots=True)
class Simulated:
    """A copy of a float model whose operators read rounded values.

    Attributes:
        model: the copy.
        origins: rounded value → the value that it rounds, by name.
    """

    model: ir.Model
    origins: dict[str, str]

    def plain(self) -> ir.Model:
        """The copy without the roundings: its operators read the values themselves; what is rounded is read by none."""
        made = graph.clone(self.model)
        values = {str(v.name): v for n in graph.nodes(made) for v in n.outputs}
        for rounded, origin in self.origins.items():
            graph.replace_uses(values[rounded], _rounded_by(values[rounded], origin))
        return made


def _rounded_by(value: ir.Value, origin: str) -> ir.Value:
    """What a value rounds: found upwards, because bodies may use a name several times and have inputs of their own."""
    while value.name != origin:
        node = value.producer()
        assert node is not None and node.inputs[0] is not None
        value = node.inputs[0]
    return value


def simulate(model: ir.Model, plan: QuantPlan, target: Target) -> Simulated:
    """Round what the plan rounds.

    Args:
        model: a float model with a plan; left unchanged.
        plan: says for each weight which forms were chosen, and has the static grids.
        target: that of the plan.
    """
    copy = graph.clone(model)
    decisions = {d.value: d for d in plan.quantized()}
    wanted: list[_Wanted] = []
    for weight in weights.find(copy):
        decision = decisions.get(weight.name)
        if decision is None or decision.spec is None:
            continue
        for use, name in zip(weight.uses, decision.forms, strict=True):
            rounding = target.form(name).rounding(decision.spec) if name else None
            if rounding is not None:
                k = use.matrix.shape(weight.dims)[1]
                wanted.append(_Wanted(use.node, 0, rounding, k))
    nodes = {graph.output_name(n): n for n in reversed(graph.nodes(copy))}
    grids = plan.grids
    for output, indexes in plan.operators.items():
        for index in indexes:
            v = nodes[output].inputs[index]
            if v is not None and v.name in grids:
                wanted.append(_Wanted(nodes[output], index, grids[v.name]))
    if not wanted:
        return Simulated(copy, {})
    needed = max(_opset(each.how) for each in wanted)
    if graph.opset(copy) < needed:
        # Raising replaces nodes, and so it comes first.
        raised = graph.clone(model)
        opset.raise_opset(raised, needed)
        return simulate(raised, plan, target)
    return Simulated(copy, _Rounder(copy).all(wanted))


@dataclass(frozen=True, slots=True)
class _Wanted:
    node: ir.Node
    index: int
    how: Rounding | Grid
    columns: int = 0


def _opset(how: Rounding | Grid) -> int:
    if isinstance(how, Grid):
        return 21 if how.spec.qtype.bits == 16 else 13
    return 11 if how.block is None else bodies.MIN_OPSET


class _Rounder:
    """Writes roundings into a model; operators of one body that round a value alike share one."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names = graph.Names(model)

    def all(self, wanted: list[_Wanted]) -> dict[str, str]:
        """Let inputs of nodes be rounded; returns rounded → origin, by name."""
        place = {node: index for index, node in enumerate(graph.nodes(self._model))}
        made: dict[tuple[object, ...], ir.Value] = {}
        origins: dict[str, str] = {}
        for each in sorted(wanted, key=lambda w: place[w.node]):
            x = each.node.inputs[each.index]
            if x is None:
                continue
            key = (graph.owner(each.node), x, repr(each.how))
            if key not in made:
                made[key] = self._write(each, x)
                origins[str(made[key].name)] = str(x.name)
            each.node.replace_input_with(each.index, made[key])
        return origins

    def _write(self, each: _Wanted, x: ir.Value) -> ir.Value:
        node, how = each.node, each.how
        base = f"{x.name}.rounded"
        out = graph.value(self._names(base), x.dtype, x.shape)
        if isinstance(how, Grid):
            numbers = [
                graph.add_initializer(self._model.graph, self._names(f"{base}.{name}"), array)
                for name, array in (
                    ("scale", np.asarray(how.scale, np.float32)),
                    ("zero", np.asarray(how.zero_point, how.spec.qtype.container)),
                )
            ]
            codes = self._add(node, "QuantizeLinear", [x, *numbers], how.spec.qtype.dtype, base)
            self._put(node, "DequantizeLinear", [codes, *numbers], out)
        elif how.block is None:
            codes = graph.value(self._names(f"{base}.codes"), ir.DataType.UINT8)
            scale = graph.value(self._names(f"{base}.scale"), ir.DataType.FLOAT)
            zero = graph.value(self._names(f"{base}.zero"), ir.DataType.UINT8)
            name = self._names(f"{base}.DynamicQuantizeLinear")
            graph.add_node(node, "DynamicQuantizeLinear", [x], [codes, scale, zero], name=name)
            self._put(node, "DequantizeLinear", [codes, scale, zero], out)
        else:
            function = bodies.rounding(instrument.DOMAIN, graph.opset(self._model))
            self._model.functions.setdefault(function.identifier(), function)
            self._model.graph.opset_imports[instrument.DOMAIN] = 1
            given = {"K": each.columns, "activation_bits": how.bits, "activation_block": how.block}
            self._put(node, function.name, [x], out, domain=instrument.DOMAIN, attributes=given)
        return out

    def _add(
        self, node: ir.Node, op: str, inputs: list[ir.Value], dtype: ir.DataType, base: str
    ) -> ir.Value:
        out = graph.value(self._names(f"{base}.{op}"), dtype)
        self._put(node, op, inputs, out)
        return out

    def _put(
        self, node: ir.Node, op: str, inputs: list[ir.Value], out: ir.Value, **more: object
    ) -> None:
        name = self._names(f"{out.name}.{op}")
        graph.add_node(node, op, inputs, [out], name=name, **more)  # type: ignore[arg-type]
