"""A model on tape: run forward in ONNX Runtime, with everything kept that the way back needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qgraph import graph, runtime
from qgraph.gradients.rules import RULES, Array, Site

# Threads that spin between runs would take the processor from the way back.
_CONFIG = {"session.disable_quant_qdq": "1", "session.intra_op.allow_spinning": "0"}
# Their outputs do not move with small changes of their inputs.
_FLAT = frozenset(
    {
        "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less",
        "LessOrEqual", "NonZero", "Round", "Shape", "Sign", "Size",
    }
)  # fmt: skip


class Tape:
    """Outputs of a float model and their gradients by some of its weights.

    The weights become inputs of the session, so that other values are a feed and not another session. Memory: all
    values between the weights and the outputs, of one sample at a time.

    Attributes:
        outputs: names of the model's outputs.
        stops: operators that gradients do not pass, because there is no rule for them.
        reached: the weights that gradients reach; those that stand before a stop only are not among them.

    Args:
        model: left unchanged; its opset is 13 at least.
        weights: names of initializers of the main graph to differentiate by, float32.
        origins: value → the value that it rounds, by name: gradients pass from one to the other as if they were the
            same (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
        threads: of ONNX Runtime; 0 is one per core.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Sequence[str],
        origins: Mapping[str, str] | None = None,
        threads: int = 0,
    ) -> None:
        copy = graph.clone(model)
        self.outputs = tuple(str(v.name) for v in copy.graph.outputs)
        self._origins = dict(origins or {})
        values = {str(v.name): v for _, v in graph.initializers(copy)}
        self._weights = [values[name] for name in weights]
        self.stops: list[ir.Node] = []
        self._way = self._find_way(copy)
        read = {v for node in self._way for v in node.inputs}
        self.reached = tuple(str(v.name) for v in self._weights if v in read)
        self._constants = _constants(self._way, {v.name for v in self._weights})
        for v in self._weights:
            held = v.const_value
            assert held is not None
            v.shape, v.type = ir.Shape(held.shape.numpy()), ir.TensorType(held.dtype)
            copy.graph.initializers.pop(str(v.name))
            v.const_value = None
            if v not in copy.graph.inputs:
                copy.graph.inputs.append(v)
        self._fetched = self._keep(copy)
        self._session = runtime.session(
            copy, threads=threads or None, optimize="basic", config=_CONFIG
        )

    def _find_way(self, model: ir.Model) -> list[ir.Node]:
        """The nodes between the weights and the outputs, in order."""
        depends = set(self._weights)
        forward = []
        for node in model.graph:
            reads = {v for v in node.inputs if v is not None}
            if node.domain == "" and node.op_type in _FLAT:
                continue
            inner = {v for body in graph.bodies(node) for n in body for v in n.inputs}
            if reads & depends or inner & depends:
                depends.update(node.outputs)
                forward.append(node)
        needed = set(model.graph.outputs)
        named = {str(v.name): v for n in model.graph for v in n.outputs} | {
            str(v.name): v for v in model.graph.inputs
        }
        way = []
        for node in reversed(forward):
            if not needed.isdisjoint(node.outputs):
                rounded = [o for o in node.outputs if o.name in self._origins]
                if rounded:
                    needed.update(named[self._origins[str(o.name)]] for o in rounded)
                    continue
                if node.domain not in ("", "ai.onnx") or node.op_type not in RULES:
                    self.stops.append(node)
                    continue
                way.append(node)
                needed.update(v for v in node.inputs if v is not None)
        self._active = depends
        return way[::-1]

    def _keep(self, model: ir.Model) -> list[str]:
        """Make everything that rules read an output."""
        outputs = list(model.graph.outputs)
        for node in self._way:
            for v in (*node.inputs, *node.outputs):
                if v is None or not v.name or v.name in self._constants or v in self._weights:
                    continue
                if v not in outputs and not v.is_graph_input():
                    outputs.append(v)
        model.graph.outputs[:] = outputs
        return [str(v.name) for v in outputs]

    def run(self, feeds: Mapping[str, Array], weights: Mapping[str, Array]) -> Run:
        """Run forward.

        Args:
            feeds: of one sample.
            weights: values of the weights, by name.
        """
        given = {**feeds, **weights}
        found = self._session.run(self._fetched, given)
        return Run(
            self, {**self._constants, **given, **dict(zip(self._fetched, found, strict=True))}
        )

    def back(self, held: Mapping[str, Array], seeds: Mapping[str, Array]) -> dict[str, Array]:
        """dL/dw for each weight, from dL/dy of outputs."""
        gradients: dict[str, Array] = dict(seeds)

        def add(name: str, g: Array) -> None:
            before = gradients.get(name)
            gradients[name] = g if before is None else before + g

        for node in reversed(self._way):
            g = [gradients.pop(str(o.name), None) for o in node.outputs]
            if all(each is None for each in g):
                continue
            wanted = [v in self._active for v in node.inputs]
            x = [held[str(v.name)] if v is not None else None for v in node.inputs]
            y = [held.get(str(o.name)) for o in node.outputs]
            site = Site(node, x, y, wanted)  # type: ignore[arg-type]
            for v, dx in zip(node.inputs, RULES[node.op_type](site, g), strict=False):
                if v is not None and dx is not None and v in self._active:
                    name = str(v.name)
                    add(self._origins.get(name, name), dx)
        return {name: gradients[name] for name in self.reached if name in gradients}


class Run:
    """One sample's values.

    Attributes:
        values: by name; the model's outputs among them.
    """

    def __init__(self, tape: Tape, values: Mapping[str, Array]) -> None:
        self._tape = tape
        self.values = values

    def gradients(self, seeds: Mapping[str, Array]) -> dict[str, Array]:
        """dL/dw by weight name, for L whose derivatives by the outputs are given; the run is used up."""
        return self._tape.back(self.values, seeds)


def _constants(way: Sequence[ir.Node], weights: set[str | None]) -> dict[str, Array]:
    """The constants that operators on the way read."""
    found = {}
    for v in (v for node in way for v in node.inputs):
        if v is not None and v.name not in weights and graph.is_constant(v):
            found[str(v.name)] = graph.array(v)
    return found
