"""Raises the default operator set of a model, or says which operator is in the way and leaves the model as it was.

A node takes one step for each version of its operator. A step is free where the schemas differ only in types and in
optional things that the node does not use; where the meaning changed, `adapters` rewrites the node.
"""

from __future__ import annotations

import functools

import onnx_ir as ir

from qgraph import errors, graph, schemas, verify
from qgraph.opset.adapters import ADAPTERS
from qgraph.opset.edit import Edit, Ranks, Refused
from qgraph.schemas import Schema
from qgraph.verify import rules
from qgraph.verify.rules import Scope

MAX_IR_VERSION = 13
# First IR version that may carry an opset; each opset not listed needs that of the one before it.
IR_VERSIONS = {1: 3, 9: 4, 10: 5, 11: 6, 12: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}
IGNORED = "consumed_inputs"  # an in-place hint of opset 1 that never had a meaning


def raise_opset(model: ir.Model, version: int) -> None:
    """Opset of ai.onnx -> at least `version`, in the graph, its bodies and the model's functions.

    Keeps: float-equal. Weights are neither read nor moved. A model at or above the version is left alone.

    Args:
        model: changed in place; unchanged if an error is raised.
        version: e.g. 21, the first with 4-bit and blocked quantization.

    Raises:
        errors.UnsupportedError: QG205 with every node that is in the way and what to do about it.
    """
    if not any(s.imports.get("", 0) < version for s in _roots(model)):
        return
    if not schemas.is_loadable(schemas.SURE_IR_VERSION, version):
        raise errors.UnsupportedError(
            errors.Diagnostic(
                "error",
                "QG205",
                "model",
                f"opset {version} is not known to the installed ONNX Runtime",
                "update onnxruntime, or choose a target that needs less",
            )
        )
    if any(_is_work(scope, node, version) for scope, node in _nodes_below(model, version)):
        ranks = Ranks(model)
        blockers = _unsorted(model) or _convert(graph.clone(model), version, ranks)
        if blockers:
            raise errors.UnsupportedError(*blockers)
        # The copy went through, and the steps depend on nothing but the graph.
        _convert(model, version, ranks)
    _declare(model, version)


def _roots(model: ir.Model) -> list[Scope]:
    """The main graph and every function that imports ai.onnx."""
    tops = [s for s in rules.scopes(model) if s.parent is None]
    return [s for s in tops if s.function is None or "" in s.imports]


def _nodes_below(model: ir.Model, version: int) -> list[tuple[Scope, ir.Node]]:
    """Nodes of ai.onnx that are of an opset below the version."""
    return [
        (scope, node)
        for scope in rules.scopes(model)
        if scope.imports.get("", version) < version
        for node in scope.nodes
        if node.domain == "" and node.op_identifier() not in model.functions
    ]


def _is_work(scope: Scope, node: ir.Node, version: int) -> bool:
    """True unless every step of the node is free."""
    since = _schema(node.op_type, scope.imports[""])
    for step in _steps(node.op_type, scope.imports[""], version):
        if (node.op_type, step.since) in ADAPTERS or since is None:
            return True
        if IGNORED in node.attributes or _difference(node, since, step):
            return True
        since = step
    return _lost_kernel(node.op_type, scope.imports[""], node.op_type, version)


def _unsorted(model: ir.Model) -> list[errors.Diagnostic]:
    """A finding for each node out of order: such a graph cannot be copied to try things out on."""
    return [
        errors.Diagnostic(
            "error", "QG205", d.where, d.message, "sort the graph first: ir.Graph.sort"
        )
        for d in verify.verify(model)
        if d.code == "V04"
    ]


def _convert(model: ir.Model, version: int, ranks: Ranks) -> list[errors.Diagnostic]:
    """Raise every node; returns what is in the way."""
    blockers = []
    names = graph.Names(model)
    for function in model.functions.values():
        held = [*function.inputs, *(v for n in function.all_nodes() for v in n.outputs)]
        for value in held:
            names(value.name or "")  # asking for a name reserves it
    for scope, node in _nodes_below(model, version):
        edit = Edit(scope.imports, names, ranks, in_function=scope.function is not None)
        try:
            _raise(node, scope.imports[""], version, edit)
            while edit.created:
                _raise(*edit.created.pop(), version, edit)
        except Refused as e:
            blockers.append(
                errors.Diagnostic(
                    "error",
                    "QG205",
                    scope.at(node),
                    f"{node.op_type} cannot be raised from opset {scope.imports['']} to {version}: {e}",
                    "export the model again with a newer opset, or choose a target that needs less",
                )
            )
    return blockers


def _raise(node: ir.Node, at: int, version: int, edit: Edit) -> None:
    """Take every step of one node. Its operator may change on the way (Upsample -> Resize)."""
    first = (node.op_type, at)
    while steps := _steps(node.op_type, at, version):
        step = steps[0]
        node.attributes.pop(IGNORED, None)
        adapter = ADAPTERS.get((node.op_type, step.since))
        if adapter is not None:
            edit.version = step.since
            adapter(node, edit)
        else:
            old = _schema(node.op_type, at)
            reason = "the operator is not known" if old is None else _difference(node, old, step)
            if reason:
                raise Refused(reason)
        at = step.since
    if _lost_kernel(*first, node.op_type, version):
        raise Refused("the installed ONNX Runtime cannot run the newer version on the CPU")
    node.version = None


def _schema(op_type: str, version: int) -> Schema | None:
    return schemas.find("", op_type, version)


@functools.cache
def _steps(op_type: str, present: int, version: int) -> tuple[Schema, ...]:
    """The operator's versions above `present` up to `version`, oldest first."""
    found: list[Schema] = []
    schema = _schema(op_type, version)
    while schema is not None and schema.since > present:
        found.append(schema)
        schema = _schema(op_type, schema.since - 1)
    return tuple(reversed(found))


def _difference(node: ir.Node, old: Schema, new: Schema) -> str:
    """Why a step is not free for a node; empty if it is."""
    label = f"{new.name}-{new.since}"
    if new.deprecated:
        return f"opset {new.since} removed it"
    if len(node.inputs) > new.input_counts[1] or len(node.outputs) > new.output_counts[1]:
        return f"{label} has fewer inputs or outputs"
    for before, after in zip(old.inputs, new.inputs, strict=False):
        if before.option != after.option and after.option != "Optional":
            return f"{label} has other inputs"
    if any(p.option == "Single" for p in new.inputs[len(old.inputs) :]):
        return f"{label} has other inputs"
    for name in node.attributes:
        known = new.attributes.get(name)
        if name in old.attributes and (known is None or known.type != old.attributes[name].type):
            return f"{label} has another attribute {name!r} or none"
    for name, attribute in new.attributes.items():
        if name in node.attributes:
            continue
        before_default = old.attributes[name].default if name in old.attributes else None
        if attribute.required:
            return f"{label} needs an attribute {name!r}"
        if name in old.attributes and attribute.default != before_default:
            return f"{label} has another default for {name!r}"
    return ""


def _lost_kernel(op_before: str, before: int, op_type: str, version: int) -> bool:
    """True if the runtime can run the node now and could not after it is raised."""
    old, new = _schema(op_before, before), _schema(op_type, version)
    if old is None or new is None or old == new:
        return False
    has = schemas.has_kernel
    return has("", op_before, old.since) and not has("", op_type, new.since)


def _declare(model: ir.Model, version: int) -> None:
    """Set the imports, and an IR version that may carry them."""
    for scope in _roots(model):
        held = model.graph if scope.function is None else scope.function
        held.opset_imports[""] = max(version, scope.imports.get("", 0))
        held.opset_imports.pop("ai.onnx", None)
    needed = max(ir_version for opset, ir_version in IR_VERSIONS.items() if opset <= version)
    if model.ir_version < 4 <= needed:
        # Until IR 3 weights were listed as inputs too and still constant. From IR 4 on such an input is one
        # that a caller may replace, and runtimes fold and pack it no longer.
        main = model.graph
        main.inputs[:] = [v for v in main.inputs if v.name not in main.initializers]
    if model.ir_version < needed:
        model.ir_version = min(needed, MAX_IR_VERSION)
