"""Verifier rules that compare a node with its operator's schema: V05, V06, V11, V13."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qgraph import errors, schemas
from qgraph.schemas import Schema
from qgraph.verify.rules import Finding, Scope, rule

CUSTOM_DOMAIN = "ai.qgraph"


@rule("V05")
def known_operators(scope: Scope) -> Iterator[Finding]:
    """Every operator exists at the imported opset, or is a function of the model."""
    for node in scope.nodes:
        domain = node.domain
        schema = _schema(scope, node)
        if schema is not None and not schema.deprecated:
            continue
        if domain == CUSTOM_DOMAIN or domain not in scope.imports:
            continue  # V13 and V01 speak of these
        if node.op_identifier() in scope.model.functions:
            continue
        version = scope.imports[domain]
        if schema is not None:
            yield Finding(
                scope.at(node),
                f"{node.op_type} was removed from {domain or 'ai.onnx'} by version {version}",
                "import the version that the model was written for",
            )
        elif domain in schemas.STANDARD_DOMAINS + schemas.RUNTIME_DOMAINS:
            yield Finding(
                scope.at(node),
                f"{domain or 'ai.onnx'} has no operator {node.op_type!r} at version {version}",
                errors.nearest(node.op_type, schemas.names(domain)),
            )
        else:
            yield Finding(
                scope.at(node),
                f"operator {domain}::{node.op_type} is not known here",
                "only a runtime that has the custom operator's library can run the model",
                "warning",
            )


@rule("V06")
def signatures(scope: Scope) -> Iterator[Finding]:
    """Counts of inputs and outputs and the attributes fit the schema, or the model's own function."""
    for node in scope.nodes:
        schema = _schema(scope, node)
        if schema is not None:
            yield from _against_schema(scope, node, schema)
            continue
        function = scope.model.functions.get(node.op_identifier())
        if function is not None:
            yield from _against_function(scope, node, function)


@rule("V11")
def bodies(scope: Scope) -> Iterator[Finding]:
    """If, Loop, Scan and SequenceMap agree with their bodies on the number of inputs and outputs."""
    node = scope.owner
    if node is None or node.domain != "":
        return
    inputs, outputs = _body_arity(node, scope)
    if inputs is not None and len(scope.graph.inputs) != inputs:
        yield Finding(
            scope.path, f"takes {len(scope.graph.inputs)} inputs, {node.op_type} passes {inputs}"
        )
    if outputs is not None and len(scope.graph.outputs) != outputs:
        yield Finding(
            scope.path,
            f"gives {len(scope.graph.outputs)} outputs, {node.op_type} expects {outputs}",
            "both branches of an If give the same outputs" if node.op_type == "If" else "",
        )


@rule("V13")
def custom_operators(scope: Scope) -> Iterator[Finding]:
    """Each of our custom operators carries its meaning as a function of the model."""
    for node in scope.nodes:
        if node.domain == CUSTOM_DOMAIN and node.op_identifier() not in scope.model.functions:
            yield Finding(
                scope.at(node),
                f"{CUSTOM_DOMAIN}::{node.op_type} has no function body in the model",
                "a stock ONNX Runtime cannot run it: add the operator's function",
            )


def _schema(scope: Scope, node: ir.Node) -> Schema | None:
    version = scope.imports.get(node.domain)
    return None if version is None else schemas.find(node.domain, node.op_type, version)


def _against_schema(scope: Scope, node: ir.Node, schema: Schema) -> Iterator[Finding]:
    least, most = schema.input_counts
    inputs = node.inputs
    count = len(inputs)
    if count > most or count < least:
        yield _count(scope, node, "inputs", count, least, most)
    else:
        for formal, value in zip(schema.inputs, inputs, strict=False):
            if value is None and formal.option == "Single":
                yield Finding(scope.at(node), f"{node.op_type} needs its input {formal.name!r}")
    least, most = schema.output_counts
    count = len(node.outputs)
    if count > most or count < least:
        yield _count(scope, node, "outputs", count, least, most)
    for name, attribute in node.attributes.items():
        formal_attribute = schema.attributes.get(name)
        if formal_attribute is None:
            if not name.startswith("__"):
                yield Finding(
                    scope.at(node),
                    f"{node.op_type}-{schema.since} has no attribute {name!r}",
                    errors.nearest(name, schema.attributes) if schema.attributes else "",
                )
        elif attribute.type.value != formal_attribute.type:
            want = ir.AttributeType(formal_attribute.type).name
            yield Finding(
                scope.at(node),
                f"attribute {name!r} of {node.op_type} is {attribute.type.name}, must be {want}",
            )
    if node.op_type == "Constant" and node.domain == "" and len(node.attributes) != 1:
        yield Finding(scope.at(node), f"Constant has {len(node.attributes)} values, must have one")
    for name, formal_attribute in schema.attributes.items():
        if formal_attribute.required and name not in node.attributes:
            yield Finding(scope.at(node), f"{node.op_type} needs its attribute {name!r}")


def _count(scope: Scope, node: ir.Node, what: str, count: int, least: int, most: int) -> Finding:
    want = (
        str(least)
        if least == most
        else f"{least} to {most}"
        if most < 2**31 - 1
        else f"{least} or more"
    )
    return Finding(scope.at(node), f"{node.op_type} has {count} {what}, its schema wants {want}")


def _against_function(scope: Scope, node: ir.Node, function: ir.Function) -> Iterator[Finding]:
    for what, count, most in (
        ("inputs", len(node.inputs), len(function.inputs)),
        ("outputs", len(node.outputs), len(function.outputs)),
    ):
        if count > most:
            yield Finding(
                scope.at(node),
                f"{node.op_type} has {count} {what}, the function {function.name} takes {most}",
            )
    for name, attribute in function.attributes.items():
        if attribute.value is None and not attribute.is_ref() and name not in node.attributes:
            yield Finding(scope.at(node), f"{node.op_type} needs the function's attribute {name!r}")


def _body_arity(node: ir.Node, scope: Scope) -> tuple[int | None, int | None]:
    """How many inputs and outputs a body must have; None where that is not settled by the node."""
    if node.op_type == "If":
        return 0, len(node.outputs)
    if node.op_type == "Loop":
        # Iteration number and condition come first; the body gives the condition back.
        return len(node.inputs), len(node.outputs) + 1
    if node.op_type == "Scan":
        has_lengths = scope.imports.get("", 9) < 9
        return len(node.inputs) - has_lengths, len(node.outputs)
    if node.op_type == "SequenceMap":
        return len(node.inputs), len(node.outputs)
    return None, None
