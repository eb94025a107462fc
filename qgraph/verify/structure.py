"""Rules on the structure of a graph: names, scopes, order, types, dead things, external data."""

from __future__ import annotations

import graphlib
import os
from collections.abc import Iterator

import onnx_ir as ir

from qgraph import schemas
from qgraph.verify.rules import START, Finding, Scope, rule


@rule("V01")
def imports(scope: Scope) -> Iterator[Finding]:
    """Every domain that is used is imported; the IR and default opset versions are ones that run."""
    if scope.parent is not None:
        return
    if scope.function is None:
        yield from _versions(scope)
    used: dict[str, ir.Node] = {}
    todo = [scope]
    while todo:
        each = todo.pop()
        todo.extend(each.bodies)
        for node in each.nodes:
            used.setdefault(node.domain, node)
    for domain, node in sorted(used.items()):
        if domain not in scope.imports:
            yield Finding(
                scope.path or "model",
                f"{node.op_type} is of domain {domain or 'ai.onnx'!r}, which is not imported",
                f"add an opset import for {domain or 'ai.onnx'!r}",
            )


def _versions(scope: Scope) -> Iterator[Finding]:
    ir_version = scope.model.ir_version
    opset = scope.imports.get("")
    if not ir_version or ir_version < 1:
        yield Finding("model", f"has IR version {ir_version}", "set ir_version, e.g. to 10")
    elif not schemas.is_loadable(ir_version, schemas.SURE_OPSET):
        yield Finding(
            "model",
            f"has IR version {ir_version}, which the installed ONNX Runtime does not load",
            "export with an older onnx, or update onnxruntime",
        )
    if opset is None:
        return
    if opset < 1:
        yield Finding("model", f"imports opset {opset} of ai.onnx", "opsets count from 1")
    elif not schemas.is_loadable(schemas.SURE_IR_VERSION, opset):
        yield Finding(
            "model",
            f"imports opset {opset} of ai.onnx, which the installed ONNX Runtime does not load",
            "export with an older opset, or update onnxruntime",
        )


@rule("V02")
def names(scope: Scope) -> Iterator[Finding]:
    """Names of values and of nodes are unique in a graph and do not hide a value that the graph needs from outside."""
    held: dict[str, ir.Value] = {}
    for value in scope.defined:
        if not value.name:
            if value.uses() or value.is_graph_output():
                yield Finding(
                    scope.inside(None), f"a value that is used has no name{_made_by(value)}"
                )
        elif held.setdefault(value.name, value) is not value:
            other = held[value.name]
            yield Finding(
                scope.inside(value.name),
                f"two values have this name{_made_by(other)} and{_made_by(value)}",
                "names must be unique: rename one",
            )
    for name, value in scope.graph.initializers.items():
        if value.name != name:
            yield Finding(
                scope.inside(name), f"initializer is registered as {name!r}, named {value.name!r}"
            )
    labels: set[str] = set()
    for node in scope.nodes:
        if node.name and node.name in labels:
            yield Finding(
                scope.at(node), "two nodes have this name", "names must be unique: rename one"
            )
        labels.add(node.name or "")
    yield from _shadowing(scope, held)


def _shadowing(scope: Scope, held: dict[str, ir.Value]) -> Iterator[Finding]:
    """A saved model refers to values by name: an inner name hides the outer value of that name."""
    if scope.parent is None:
        return
    captured: set[ir.Value] = set()
    todo = [scope]
    while todo:
        each = todo.pop()
        todo.extend(each.bodies)
        for node in each.nodes:
            captured.update(v for v in node.inputs if v is not None)
    outer: Scope | None = scope.parent
    while outer is not None:
        for value in outer.defined:
            if value.name and value.name in held:
                is_needed = value in captured
                yield Finding(
                    scope.inside(value.name),
                    "hides an outer value of the same name"
                    + (" that this body reads" if is_needed else ""),
                    "rename the inner value",
                    None if is_needed else "warning",
                )
        outer = outer.parent


def _made_by(value: ir.Value) -> str:
    producer = value.producer()
    if producer is not None:
        return f" (an output of {producer.op_type} {producer.name or ''!r})"
    return " (an initializer)" if value.is_initializer() else " (an input)"


@rule("V03")
def dangling(scope: Scope) -> Iterator[Finding]:
    """Every node input is defined here or in an enclosing graph."""
    defined = scope.defined
    for node in scope.nodes:
        for index, value in enumerate(node.inputs):
            if value is None or value in defined or not value.name:
                continue
            if scope.lookup(value) is None:
                producer = value.producer()
                reason = "nothing produces it" if producer is None else "its node was removed"
                yield Finding(
                    scope.at(node),
                    f"input {index} {value.name!r} does not exist in the graph: {reason}",
                    "a pass removed or replaced it, or the model was cut badly",
                )


@rule("V04")
def order(scope: Scope) -> Iterator[Finding]:
    """A node stands after the nodes that it reads from, also where a body reads from outside.

    A warning where sorting would help, as runtimes sort by themselves; an error where there is a cycle.
    """
    early = list(_early(scope))
    if not early:
        return
    cycle = _cycle(scope)
    if cycle:
        names = " -> ".join(scope.at(n) for n in cycle)
        yield Finding(scope.at(cycle[0]), f"is in a cycle: {names}", "no order can compute this")
    for node, value in early:
        yield Finding(
            scope.at(node),
            f"reads {value.name!r} before the node that produces it",
            "" if cycle else "sort the graph (ir.Graph.sort)",
            "error" if cycle else "warning",
        )


def _early(scope: Scope) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Each read of a value that is only produced later."""
    defined = scope.defined
    for position, node in enumerate(scope.nodes):
        for value in node.inputs:
            if value is None:
                continue
            at = defined.get(value)
            if at is None:
                at, limit = _outer_position(scope, value)
            else:
                limit = position
            if at >= limit:
                yield node, value


def _outer_position(scope: Scope, value: ir.Value) -> tuple[int, int]:
    """Where a captured value is defined, and where in that same graph the capturing body stands."""
    inner = scope
    while inner.parent is not None:
        at = inner.parent.defined.get(value)
        if at is not None:
            return at, inner.position
        inner = inner.parent
    return START, 0


def _cycle(scope: Scope) -> tuple[ir.Node, ...]:
    """Nodes of a cycle, the first repeated at the end; empty if there is none."""
    needs: dict[int, set[int]] = {}
    for position, node in enumerate(scope.nodes):
        needs[position] = {scope.defined.get(v, START) for v in node.inputs if v is not None}
    for body in scope.bodies:
        todo = [body]
        while todo:
            each = todo.pop()
            todo.extend(each.bodies)
            read = (v for n in each.nodes for v in n.inputs if v is not None)
            needs[body.position].update(scope.defined.get(v, START) for v in read)
    for before in needs.values():
        before.discard(START)
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as e:
        return tuple(scope.nodes[position] for position in e.args[1])
    return ()


@rule("V07")
def declared(scope: Scope) -> Iterator[Finding]:
    """Inputs have types, outputs exist, initializers have data of the declared type and shape."""
    if scope.parent is None and scope.function is None:
        for value in scope.graph.inputs:
            if value.type is None:
                yield Finding(scope.inside(value.name), "graph input has no type")
    for index, value in enumerate(scope.graph.outputs):
        if value in scope.defined:
            continue
        if _is_outer(scope, value):
            yield Finding(
                scope.inside(value.name),
                f"output {index} is a value of an outer graph",
                "put an Identity node between",
            )
        else:
            yield Finding(scope.inside(value.name), f"output {index} is produced by nothing")
    for value in scope.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            yield Finding(scope.inside(value.name), "initializer has no data")
            continue
        if value.dtype is not None and value.dtype != tensor.dtype:
            yield Finding(
                scope.inside(value.name),
                f"initializer holds {tensor.dtype.name}, declared as {value.dtype.name}",
                "the type of the value must follow its data",
            )
        shape = value.shape
        if shape is None or shape is tensor.shape:
            continue
        data = tensor.shape.numpy()
        if len(shape) != len(data) or any(
            isinstance(a, int) and a != b for a, b in zip(shape, data, strict=True)
        ):
            yield Finding(
                scope.inside(value.name),
                f"initializer has shape {list(data)}, declared as {shape}",
                "the shape of the value must follow its data",
            )


def _is_outer(scope: Scope, value: ir.Value) -> bool:
    """True for a value of an enclosing graph, also where reading the file has lost the connection."""
    outer = scope.parent
    while outer is not None:
        if value in outer.defined or any(v.name == value.name for v in outer.defined):
            return True
        outer = outer.parent
    return False


@rule("V10", "warning")
def dead(scope: Scope) -> Iterator[Finding]:
    """Nothing is computed or stored that nobody reads."""
    for node in scope.nodes:
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            yield Finding(scope.at(node), "no output is used", "remove_dead drops it")
    for value in scope.graph.initializers.values():
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            yield Finding(
                scope.inside(value.name), "initializer is not used", "remove_dead drops it"
            )


@rule("V12")
def external(scope: Scope) -> Iterator[Finding]:
    """External data files exist and are long enough."""
    sizes: dict[str, int] = {}
    for value in scope.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.path not in sizes:
            try:
                sizes[tensor.path] = os.stat(tensor.path).st_size
            except OSError:
                sizes[tensor.path] = -1
        size = sizes[tensor.path]
        end = (tensor.offset or 0) + tensor.nbytes
        if size < 0:
            yield Finding(
                scope.inside(value.name),
                f"external data {str(tensor.location)!r} does not exist",
                "keep the data file beside the model",
            )
        elif end > size:
            yield Finding(
                scope.inside(value.name),
                f"external data {str(tensor.location)!r} has {size} bytes, this needs up to {end}",
                "the file is truncated: copy it again",
            )
        elif tensor.length is not None and tensor.length != tensor.nbytes:
            yield Finding(
                scope.inside(value.name),
                f"external data has {tensor.length} bytes, type and shape need {tensor.nbytes}",
            )
