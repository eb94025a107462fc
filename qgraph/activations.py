"""Which activations get a static grid, which share one, and which operators then compute on codes.

The analysis is dataflow alone. It starts at the operators whose weights have an integer form and goes up from their
inputs, through operators that only move values (they share the grid of what they move), and through element-wise
operators that lie between convolutions (a residual Add). Everything else ends the region: softmax, normalisation,
GELU and whatever feeds them stay as they are.

    Conv → Relu → MaxPool → Conv      the grid lies behind the Relu; MaxPool shares it
    Conv, Conv → Add → Relu → Conv    three grids: of both branches, and behind the Relu
    LayerNorm → Reshape → MatMul      one grid, at the output of LayerNorm, for the MatMul alone

A value that an integer operator produces is quantized for all its readers (runtimes fuse the operator with the one
QuantizeLinear behind it); any other value only for the integer operators that read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qgraph import graph, weights
from qgraph.plan import QuantPlan
from qgraph.target import Integers

if TYPE_CHECKING:
    from qgraph.observers import Grid


@dataclass
class Regions:
    """What the analysis found.

    Attributes:
        operators: nodes that compute on codes, each with the numbers of its inputs that must have a grid.
        absorbed: Relu and Clip nodes whose bounds the grid behind them applies.
        moves: nodes that pass codes on unchanged.
        grids: values with a grid → the values of the same grid, all of them quantized (each its own group at least).
        produced: those of them that an integer operator produces: all their readers get the quantized value.
        refused: weighted operator → why it does not compute on codes.
    """

    operators: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict)
    absorbed: set[ir.Node] = field(default_factory=set)
    moves: set[ir.Node] = field(default_factory=set)
    grids: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    produced: set[ir.Value] = field(default_factory=set)
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def groups(self) -> list[list[ir.Value]]:
        """The values that share a grid, group by group, in graph order."""
        return list({id(members): members for members in self.grids.values()}.values())

    def roots(self, members: Iterable[ir.Value]) -> list[ir.Value]:
        """The values of a group that are not moved from another one of it: their statistics make the grid."""
        held = list(members)
        return [v for v in held if v.producer() not in self.moves]

    def reads_codes(self, node: ir.Node, index: int) -> bool:
        """Whether input `index` of a node is to be read as codes even where no integer operator produced it."""
        if node in self.operators:
            return index in self.operators[node]
        return node in self.moves and index in data_inputs(node)


def remember(regions: Regions, plan: QuantPlan) -> None:
    """Write the regions into a plan, by name."""

    def named(nodes: Iterable[ir.Node]) -> list[str]:
        return sorted(str(n.outputs[0].name) for n in nodes)

    plan.operators = {str(n.outputs[0].name): i for n, i in regions.operators.items()}
    plan.absorbed, plan.moves = named(regions.absorbed), named(regions.moves)


def recall(
    model: ir.Model, plan: QuantPlan, integers: Integers | None = None
) -> tuple[Regions, dict[ir.Value, Grid]]:
    """The regions of a plan and the grids of their values, in a model whose values still have their names."""
    values = {str(v.name): v for v in _in_order(graph.nodes(model))}
    found = Regions(
        {_producer(values[n]): i for n, i in plan.operators.items()},
        {_producer(values[n]) for n in plan.absorbed},
        {_producer(values[n]) for n in plan.moves},
    )
    grids = {values[n]: g for n, g in plan.grids.items()}
    computing = {*found.operators, *found.absorbed, *found.moves}
    if integers is None or not integers.gives_floats:
        found.produced = {v for v in grids if v.producer() in computing}
    found.grids = {v: [v] for v in grids}
    return found, grids


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def find(
    model: ir.Model,
    integers: Integers,
    candidates: Collection[ir.Node],
    blocked: Mapping[ir.Value, str] | None = None,
    only: Collection[ir.Node] | None = None,
) -> Regions:
    """The regions that compute on codes.

    Args:
        model: a canonical float model.
        integers: what the target computes on codes.
        candidates: operators whose weights have an integer form, or that multiply two activations.
        blocked: values that can have no grid, with the reason.
        only: the operators without weights that may take part; None for all.
    """
    held, reasons = dict.fromkeys(candidates), dict[ir.Node, str]()
    order = graph.nodes(model)
    barred = set[ir.Node]() if only is None else {n for n in order if n not in only}
    while True:
        regions = _Walk(integers, held, barred).run(order)
        bad = _bad(regions, blocked or {})
        if not bad:
            regions.refused = reasons
            return regions
        for node in [n for n in regions.operators if _touches(n, regions, bad)]:
            if node in held:
                reasons[node] = _why(node, regions, bad)
                del held[node]
            else:
                barred.add(node)
        barred |= {n for n in regions.moves if any(v in bad for v in _around(n))}


def _bad(regions: Regions, blocked: Mapping[ir.Value, str]) -> dict[ir.Value, str]:
    """Every value of a group in which one value can have no grid."""
    found = {}
    for group in regions.groups():
        reason = next((blocked[v] for v in group if v in blocked), "")
        if reason:
            found.update(dict.fromkeys(group, reason))
    return found


def _touches(node: ir.Node, regions: Regions, bad: Mapping[ir.Value, str]) -> bool:
    return any(node.inputs[i] in bad for i in regions.operators[node]) or (
        end_of(node) in bad and end_of(node) in regions.produced
    )


def _why(node: ir.Node, regions: Regions, bad: Mapping[ir.Value, str]) -> str:
    for index in regions.operators[node]:
        v = node.inputs[index]
        if v is not None and v in bad:
            return f"its input {v.name!r} has no static grid: {bad[v]}"
    end = end_of(node)
    return f"its output {end.name!r} has no static grid: {bad[end]}"


def _around(node: ir.Node) -> list[ir.Value]:
    held = [node.inputs[i] for i in data_inputs(node)]
    return [*(v for v in held if v is not None), *node.outputs]


def end_of(node: ir.Node) -> ir.Value:
    """The output of an operator, or that of the Relu or Clip behind it where nothing else reads the output."""
    value = node.outputs[0]
    readers = list(value.uses())
    if len(readers) == 1 and not value.is_graph_output():
        reader = readers[0][0]
        if is_bound(reader) and reader.graph is node.graph:
            return reader.outputs[0]
    return value


class _Walk:
    """Goes up from the values that are wanted as codes."""

    def __init__(
        self, integers: Integers, candidates: Iterable[ir.Node], barred: Collection[ir.Node]
    ) -> None:
        self._integers, self._barred = integers, barred
        self._found = Regions({n: activation_inputs(n) for n in candidates})
        self._emitting: set[ir.Value] = set()

    def run(self, order: Sequence[ir.Node]) -> Regions:
        """One pass of the analysis."""
        found = self._found
        self._mark_emitters(order)
        wanted: list[ir.Value] = []
        for node, indices in found.operators.items():
            wanted += [v for i in indices if (v := node.inputs[i]) is not None]
            if not self._integers.weighted[node.op_type] and not self._integers.gives_floats:
                wanted.append(end_of(node))
        seen: set[ir.Value] = set()
        while wanted:
            value = wanted.pop()
            if value not in seen:
                seen.add(value)
                wanted += self._above(value)
        self._group([v for v in _in_order(order) if v in seen])
        return found

    def _mark_emitters(self, order: Iterable[ir.Node]) -> None:
        """Find the values that come from convolutions through nothing but operators that can compute on codes."""
        for node in order:
            through = self._passes(node) or self._joins(node) or is_bound(node)
            conv = node in self._found.operators and not self._integers.weighted[node.op_type]
            if conv or (through and self._all_emitted(node)):
                self._emitting.update(node.outputs)

    def _all_emitted(self, node: ir.Node) -> bool:
        held = [node.inputs[i] for i in data_inputs(node)]
        return bool(held) and all(v is not None and v in self._emitting for v in held)

    def _passes(self, node: ir.Node) -> bool:
        known = node.domain == "" and node.op_type in self._integers.moves
        return known and node not in self._barred and _keeps_values(node)

    def _joins(self, node: ir.Node) -> bool:
        known = node.domain == "" and node.op_type in self._integers.joined
        return known and node not in self._barred

    def _above(self, value: ir.Value) -> list[ir.Value]:
        """The values that are wanted because this one is."""
        node = value.producer()
        if node is not None and is_bound(node) and node.inputs[0] is not None:
            source = node.inputs[0].producer()
            is_behind = source is not None and end_of(source) is value
            # What only moves values is no operator whose output the grid could bound.
            node = source if is_behind and source is not None and not self._passes(source) else None
        if node is None or node in self._found.operators:
            return []
        if self._joins(node) and self._all_emitted(node):
            self._found.operators[node] = tuple(data_inputs(node))
        elif self._passes(node) and value is node.outputs[0]:
            self._found.moves.add(node)
        else:
            return []
        return [v for i in data_inputs(node) if (v := node.inputs[i]) is not None]

    def _group(self, values: Sequence[ir.Value]) -> None:
        """Values that one move connects share a grid."""
        found = self._found
        parent: dict[ir.Value, ir.Value] = {v: v for v in values}

        def root(v: ir.Value) -> ir.Value:
            while parent[v] is not v:
                v = parent[v]
            return v

        for node in found.moves:
            for v in _around(node):
                if v in parent:
                    parent[root(v)] = root(node.outputs[0])
        members: dict[ir.Value, list[ir.Value]] = {}
        for v in values:
            members.setdefault(root(v), []).append(v)
            found.grids[v] = members[root(v)]
        for node in found.operators:
            end = end_of(node)
            if end in found.grids:
                found.produced.add(end)
                if end is not node.outputs[0]:
                    producer = end.producer()
                    assert producer is not None
                    found.absorbed.add(producer)
        found.produced |= {n.outputs[0] for n in found.moves}
        if self._integers.gives_floats:
            found.produced.clear()


def _in_order(order: Iterable[ir.Node]) -> list[ir.Value]:
    """All values in the order in which they are first seen."""
    listed: dict[ir.Value, None] = {}
    for node in order:
        listed.update((v, None) for v in (*node.inputs, *node.outputs) if v is not None)
    return list(listed)


def _keeps_values(node: ir.Node) -> bool:
    """Whether a move gives nothing but values that it was given, or zeros."""
    if node.op_type == "Resize":
        return bool(graph.attribute(node, "mode", "nearest") == "nearest")
    if node.op_type == "Pad" and graph.attribute(node, "mode", "constant") == "constant":
        held = node.inputs[2] if len(node.inputs) > 2 else None
        filling = graph.small_array(held)
        if held is not None and (filling is None or filling.any()):
            return False
        return float(graph.attribute(node, "value", 0.0)) == 0.0
    if node.op_type in ("Gather", "Slice", "Reshape"):
        return not graph.is_constant(node.inputs[0])
    return len(node.outputs) == 1


def activation_inputs(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of a weighted operator are activations."""
    if node.op_type == "MatMul" and not _is_weight(node, 1):
        return (0, 1)
    return (0,)


def _is_weight(node: ir.Node, index: int) -> bool:
    v = node.inputs[index]
    if v is None:
        return False
    held = v.producer()
    if (
        held is not None
        and held.op_type == "DequantizeLinear"
        and graph.is_constant(held.inputs[0])
    ):
        return True
    return weights.source(v)[0] is not None


def data_inputs(node: ir.Node) -> list[int]:
    """Which inputs of a move, bound or element-wise operator hold activations."""
    if node.op_type in ("Concat", "Add", "Mul"):
        return list(range(len(node.inputs)))
    return [0]


def is_bound(node: ir.Node) -> bool:
    """A Relu, or a Clip with constant bounds around zero: a grid behind it cuts off what it cuts off."""
    if node.domain != "":
        return False
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip":
        return False
    bounds = bounds_of(node)
    return bounds is not None and bounds[0] <= 0 < bounds[1]


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Relu or of a Clip with constant bounds, else None."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    found = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        held = node.inputs[index] if index < len(node.inputs) else None
        if held is None:
            found.append(float(graph.attribute(node, name, default)))
            continue
        array = graph.small_array(held)
        if array is None:
            return None
        found.append(float(array.reshape(())))
    return found[0], found[1]


def observed(model: ir.Model, integers: Integers) -> list[str]:
    """Names of all values that may get a grid, whatever the weights' rules say, in graph order."""
    weighted = {u.node for w in weights.find(model) for u in w.uses if not u.reason}
    candidates = [n for n in graph.nodes(model) if n in weighted and n.op_type in integers.weighted]
    return [str(v.name) for v in find(model, integers, candidates).grids]
