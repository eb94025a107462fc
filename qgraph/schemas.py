"""Operator schemas, read once: what ONNX and the installed ONNX Runtime say about an operator at a version.

ONNX's own table answers for the standard domains. ONNX Runtime's registry answers for its contrib operators and for
the few that it adds to the default domain; it is only imported when one of those is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx.defs
import onnx_ir as ir

STANDARD_DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training")
RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")

SURE_OPSET = 21  # every ONNX Runtime that qgraph supports loads these; anything above is tried once
SURE_IR_VERSION = 10

_NO_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Formal:
    """A formal input or output; `type_name` is a type variable ("T") or a type ("tensor(int64)")."""

    name: str
    option: str  # "Single", "Optional" or "Variadic"
    type_name: str
    types: frozenset[str]


@dataclass(frozen=True, slots=True)
class Attribute:
    """A formal attribute; `default` is None where there is none."""

    type: int
    required: bool
    default: Any


@dataclass(frozen=True, slots=True)
class Schema:
    """One version of one operator."""

    domain: str
    name: str
    since: int
    deprecated: bool
    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]
    attributes: Mapping[str, Attribute]
    input_counts: tuple[int, int]
    output_counts: tuple[int, int]
    is_function: bool


@functools.cache
def find(domain: str, op_type: str, version: int) -> Schema | None:
    """The schema that `op_type` has in a model that imports `version` of the domain; None if there is none."""
    if domain in STANDARD_DOMAINS:
        try:
            return _schema(onnx.defs.get_schema(op_type, version, domain))
        except onnx.defs.SchemaError:
            pass
    elif domain not in RUNTIME_DOMAINS:
        return None
    known = [s for s in _runtime_schemas().get((domain, op_type), ()) if s.since_version <= version]
    return _schema(max(known, key=lambda s: s.since_version)) if known else None


def names(domain: str) -> list[str]:
    """Every operator name of a domain, for "did you mean"."""
    found = {s.name for s in onnx.defs.get_all_schemas() if s.domain == domain}
    return sorted(found | {name for at, name in _runtime_schemas() if at == domain})


@functools.cache
def has_kernel(domain: str, op_type: str, since: int) -> bool:
    """True if the installed ONNX Runtime can run this version on the CPU, by a kernel or by the op's function body.

    A kernel that is registered without an end fits only its first version: the runtime cannot know what a
    later version means.
    """
    schema = find(domain, op_type, since)
    if schema is None or schema.is_function or (domain, op_type) == ("", "Constant"):
        return schema is not None
    ranges = _runtime_kernels().get((domain, op_type), ())
    return any(first == since or (first < since <= last < _NO_END) for first, last in ranges)


@functools.cache
def is_loadable(ir_version: int, opset: int) -> bool:
    """True if the installed ONNX Runtime loads models of this IR version and default opset."""
    if ir_version <= SURE_IR_VERSION and opset <= SURE_OPSET:
        return True
    import onnxruntime

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Relu", [x])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([1])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": opset}, name="probe")
    data = ir.to_proto(ir.Model(graph, ir_version=ir_version)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  the runtime's exception types are not public; any of them means "no"
        return False
    return True


def _schema(found: Any) -> Schema:
    """Compact copy of an onnx or onnxruntime schema object, whose fields are slow to read."""
    return Schema(
        domain=found.domain,
        name=found.name,
        since=found.since_version,
        deprecated=found.deprecated,
        inputs=tuple(_formal(p) for p in found.inputs),
        outputs=tuple(_formal(p) for p in found.outputs),
        attributes={name: _attribute(a) for name, a in found.attributes.items()},
        input_counts=(found.min_input, found.max_input),
        output_counts=(found.min_output, found.max_output),
        is_function=bool(
            getattr(found, "has_function", False)
            or getattr(found, "has_context_dependent_function", False)
        ),
    )


def _formal(found: Any) -> Formal:
    type_name = found.type_str if hasattr(found, "type_str") else found.typeStr
    option = str(found.option).rsplit(".", 1)[-1]
    return Formal(found.name, option, type_name, frozenset(map(str, found.types)))


def _attribute(found: Any) -> Attribute:
    default = getattr(found, "default_value", None)
    value = None
    if default is not None and default.name:
        value = ir.from_proto(default).value
    # ONNX and ONNX Runtime number the attribute types alike, but only ONNX's enumeration converts to int.
    kind = ir.AttributeType[str(found.type).rsplit(".", 1)[-1]]
    return Attribute(int(kind), found.required, value)


@functools.cache
def _runtime_schemas() -> dict[tuple[str, str], list[Any]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    found: dict[tuple[str, str], list[Any]] = {}
    for schema in native.get_all_operator_schema():
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


@functools.cache
def _runtime_kernels() -> dict[tuple[str, str], list[tuple[int, int]]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in native.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            found.setdefault((kernel.domain, kernel.op_name), []).append(kernel.version_range)
    return found
