"""What a verifier rule sees (`Scope`) and how it is registered (`rule`).

A scope is one graph: the main graph, a body inside a node, or a model-local function. A rule is a function from a
scope to findings; it reads names, types, shapes and attributes, never the data of a large tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from qgraph import errors

START = -1  # position of inputs and initializers; nodes count from 0


class Finding(NamedTuple):
    """What a rule reports; `severity` overrides the rule's own."""

    where: str
    message: str
    hint: str = ""
    severity: errors.Severity | None = None


@dataclass(slots=True)
class Scope:
    """One graph and what can be seen from inside it.

    Attributes:
        model: the whole model.
        graph: the graph itself.
        path: how messages name the scope, "" for the main graph.
        imports: opset version by domain, with "ai.onnx" written as "".
        nodes: the graph's nodes.
        defined: position of the definition of every value that this graph owns.
        owner: the node that holds this body.
        parent: the scope of that node.
        position: the node's place in its scope.
        function: the model-local function that this is the body of.
        bodies: the scopes directly inside.
    """

    model: ir.Model
    graph: ir.Graph
    path: str
    imports: Mapping[str, int]
    nodes: tuple[ir.Node, ...]
    defined: dict[ir.Value, int]
    owner: ir.Node | None = None
    parent: Scope | None = None
    position: int = START
    function: ir.Function | None = None
    bodies: list[Scope] = field(default_factory=list)

    def at(self, node: ir.Node) -> str:
        """How messages name a node: its name, or operator and first output where it has none."""
        return self.inside(node.name or f"{node.op_type}({_first_output(node)})")

    def inside(self, name: str | None) -> str:
        """How messages name a value of this scope."""
        return f"{self.path}/{name or '?'}" if self.path else name or "?"

    def lookup(self, value: ir.Value) -> tuple[Scope, int] | None:
        """The scope that defines a value visible from here, and the definition's position in it."""
        scope: Scope | None = self
        while scope is not None:
            position = scope.defined.get(value)
            if position is not None:
                return scope, position
            scope = scope.parent
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered check."""

    code: str
    severity: errors.Severity
    find: Callable[[Scope], Iterator[Finding]]


RULES: list[Rule] = []


def rule(
    code: str, severity: errors.Severity = "error"
) -> Callable[[Callable[[Scope], Iterator[Finding]]], Callable[[Scope], Iterator[Finding]]]:
    """Register a check under a code; it runs on every scope of every verified model."""

    def register(
        find: Callable[[Scope], Iterator[Finding]],
    ) -> Callable[[Scope], Iterator[Finding]]:
        RULES.append(Rule(code, severity, find))
        return find

    return register


def scopes(model: ir.Model) -> list[Scope]:
    """Every graph of a model: the main graph, bodies (outer before inner), then functions with theirs."""
    found: list[Scope] = []
    main = _scope(model, model.graph, "", model.graph.opset_imports)
    _collect(main, found)
    for key in sorted(model.functions):
        function = model.functions[key]
        path = f"function {function.domain}::{function.name}"
        scope = _scope(model, function.graph, path, function.opset_imports)
        scope.function = function
        _collect(scope, found)
    return found


def tensor_dtype(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value: of its data where it has some, else the declared one."""
    if value is None:
        return None
    if value.const_value is not None and value.is_initializer():
        return value.const_value.dtype
    return value.dtype


def tensor_shape(value: ir.Value | None) -> list[int | None] | None:
    """The dimensions of a value, None for each that is not a number; None if even the rank is unknown."""
    if value is None:
        return None
    if value.const_value is not None and value.is_initializer():
        return [int(d) for d in value.const_value.shape.numpy()]
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in value.shape]


def _collect(scope: Scope, found: list[Scope]) -> None:
    found.append(scope)
    for position, node in enumerate(scope.nodes):
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                bodies = [(name, attribute.as_graph())]
            elif attribute.type == ir.AttributeType.GRAPHS:
                bodies = [(f"{name}[{i}]", g) for i, g in enumerate(attribute.as_graphs())]
            else:
                continue
            for label, graph in bodies:
                path = f"{scope.at(node)}.{label}"
                inner = _scope(scope.model, graph, path, scope.imports)
                inner.owner, inner.parent, inner.position = node, scope, position
                inner.function = scope.function
                scope.bodies.append(inner)
                _collect(inner, found)


def _scope(model: ir.Model, graph: ir.Graph, path: str, imports: Mapping[str, int]) -> Scope:
    nodes = tuple(graph)
    defined: dict[ir.Value, int] = dict.fromkeys(graph.inputs, START)
    for value in graph.initializers.values():
        defined[value] = START
    for position, node in enumerate(nodes):
        for value in node.outputs:
            defined[value] = position
    plain = {"" if domain == "ai.onnx" else domain: version for domain, version in imports.items()}
    return Scope(model, graph, path, plain, nodes, defined)


def _first_output(node: ir.Node) -> str:
    return next((v.name for v in node.outputs if v.name), "")
