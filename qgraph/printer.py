"""A model as text, the same on every run: one line a node, names kept, nothing that depends on ids or dict order.

    model ir 8, qgraph 0.1
    opset ai.onnx 18
    metadata
      origin = "a test"

    graph main
      in   x: float32[N, 4]
      init w: float32[4, 2] #1f3a9c02
      h: float32[N, 2] = MatMul(x, w)  # /fc/MatMul
      y: float32[N, 2] = Relu(h)
      out  y

Initializers are sorted by name, attributes and metadata by key. Small tensors show their values, medium ones a hash
of their content, and large ones only type and shape, unless `hashes=True` asks to read them all.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

SHOWN = 8  # elements
HASHED_BYTES = 1 << 16
LONG_TEXT = 60
INDENT = "  "
METADATA = (
    "qgraph."  # node metadata with other keys is left out: exporters write stack traces there
)

_PLAIN_NAME = re.compile(r"[^\s,()\[\]{}=\"#<>]+")


def text(model: ir.Model, *, hashes: bool = False) -> str:
    """The model as text, with a newline at the end.

    Args:
        model: not changed; large tensors are not read unless `hashes`.
        hashes: hash every tensor, however large.
    """
    lines = [f"model ir {model.ir_version}{_producer(model)}", *_imports(model.graph.opset_imports)]
    lines += _metadata(model.metadata_props)
    lines += ["", *_graph(model.graph, f"graph {_name(model.graph.name)}", hashes)]
    for key in sorted(model.functions):
        lines += ["", *_function(model.functions[key], hashes)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def diff(a: ir.Model, b: ir.Model, *, hashes: bool = False) -> str:
    """Unified diff of two models' texts; empty if they are the same."""
    before, after = (text(m, hashes=hashes).splitlines(keepends=True) for m in (a, b))
    return "".join(difflib.unified_diff(before, after, "before", "after", n=2))


def tensor(held: ir.TensorProtocol, *, hashes: bool = False) -> str:
    """Type and shape of a tensor, then its values, or a hash of its content.

    A tensor that is large, memory-mapped or computed when read shows neither unless `hashes`.
    """
    head = f"{_dtype(held.dtype)}{_dims(held.shape)}"
    if held.dtype == ir.DataType.STRING:
        strings = list(getattr(held, "string_data", list)())
        if len(strings) > SHOWN:
            content = b"\0".join(strings)
            return f"{head} #{hashlib.sha256(content).hexdigest()[:8]}"
        return f"{head} = {_listed([_text(s.decode(errors='replace')) for s in strings])}"
    is_at_hand = not isinstance(held, (ir.ExternalTensor, ir.LazyTensor))
    if is_at_hand and held.size <= SHOWN:
        values = [_number(v) for v in np.asarray(held.numpy()).ravel()]
        return f"{head} = {values[0] if len(held.shape) == 0 else _listed(values)}"
    if hashes or (is_at_hand and held.nbytes <= HASHED_BYTES):
        return f"{head} #{hashlib.sha256(held.tobytes()).hexdigest()[:8]}"
    return head


def _producer(model: ir.Model) -> str:
    producer = f"{model.producer_name or ''} {model.producer_version or ''}".strip()
    return f", {producer}" if producer else ""


def _imports(imports: Mapping[str, int]) -> list[str]:
    listed = sorted((domain or "ai.onnx", version) for domain, version in imports.items())
    return ["opset " + ", ".join(f"{domain} {version}" for domain, version in listed)]


def _metadata(props: Mapping[str, str]) -> list[str]:
    if not props:
        return []
    return ["metadata", *(f"{INDENT}{_name(k)} = {_text(props[k])}" for k in sorted(props))]


def _function(function: ir.Function, hashes: bool) -> list[str]:
    label = f"{function.domain}::{function.name}"
    label += f":{function.overload}" if function.overload else ""
    parameters = [
        f"{name}={_attribute_value(a, hashes)}" if a.value is not None else name
        for name, a in sorted(function.attributes.items())
    ]
    attributes = f" <{', '.join(parameters)}>" if parameters else ""
    lines = [f"function {label}{attributes}"]
    lines += [INDENT + line for line in _imports(function.opset_imports)]
    return lines + _graph(function.graph, "", hashes)


def _graph(graph: ir.Graph, title: str, hashes: bool) -> list[str]:
    """The title, then the graph's contents one level in."""
    lines = []
    for value in graph.inputs:
        default = " (has a default)" if value.is_initializer() else ""
        lines.append(f"in   {_typed(value)}{default}")
    for name in sorted(graph.initializers):
        held = graph.initializers[name].const_value
        shown = "no data" if held is None else tensor(held, hashes=hashes)
        lines.append(f"init {_name(name)}: {shown}")
    for node in graph:
        lines += _node(node, hashes)
    lines += [f"out  {_typed(v) if v.producer() is None else _name(v.name)}" for v in graph.outputs]
    return ([title] if title else []) + [INDENT + line for line in lines]


def _node(node: ir.Node, hashes: bool) -> list[str]:
    """One line, and below it the bodies that the node holds."""
    outputs = ", ".join(_typed(v) for v in node.outputs)
    inputs = ", ".join("-" if v is None else _name(v.name) for v in node.inputs)
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    operator += f":{node.overload}" if node.overload else ""
    shown, bodies = [], []
    for name, attribute in sorted(node.attributes.items()):
        held = list(_bodies(attribute))
        for index, body in enumerate(held):
            label = name if len(held) == 1 else f"{name}[{index}]"
            bodies += [
                INDENT + line for line in _graph(body, f"{label}: {_name(body.name)}", hashes)
            ]
        if not held:
            shown.append(f"{name}={_attribute_value(attribute, hashes)}")
    line = f"{outputs} = {operator}({inputs})"
    line += f" {{{', '.join(shown)}}}" if shown else ""
    notes = [node.name] if node.name else []
    notes += [
        f"{k}={_text(node.metadata_props[k])}"
        for k in sorted(node.metadata_props)
        if k.startswith(METADATA)
    ]
    return [line + (f"  # {', '.join(notes)}" if notes else ""), *bodies]


def _bodies(attribute: ir.Attr) -> Iterator[ir.Graph]:
    if attribute.is_ref():
        return
    if attribute.type == ir.AttributeType.GRAPH:
        yield attribute.as_graph()
    elif attribute.type == ir.AttributeType.GRAPHS:
        yield from attribute.as_graphs()


def _attribute_value(attribute: ir.Attr, hashes: bool) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    kind, value = attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return tensor(value, hashes=hashes)
    if kind == ir.AttributeType.TENSORS:
        return _listed([tensor(v, hashes=hashes) for v in value])
    if kind in (ir.AttributeType.FLOATS, ir.AttributeType.INTS):
        return _listed([_number(v) for v in value])
    if kind == ir.AttributeType.STRINGS:
        return _listed([_text(v) for v in value])
    if kind == ir.AttributeType.STRING:
        return _text(value)
    if kind in (ir.AttributeType.FLOAT, ir.AttributeType.INT):
        return _number(value)
    return f"<{kind.name.lower()}>"


def _typed(value: ir.Value) -> str:
    name = _name(value.name) if value.name else "-"
    if value.type is None and value.shape is None:
        return name
    return f"{name}: {_type(value.type)}{_dims(value.shape)}"


def _type(kind: Any) -> str:
    """float32, seq(float32), optional(seq(float32)), sparse(float32) or ?."""
    if kind is None:
        return "?"
    if isinstance(kind, ir.SequenceType):
        return f"seq({_type(kind.elem_type)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_type(kind.elem_type)})"
    if isinstance(kind, ir.SparseTensorType):
        return f"sparse({_dtype(kind.dtype)})"
    return _dtype(kind.dtype)


def _dtype(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _dims(shape: Any) -> str:
    """[N, 3, ?], or [...] where even the rank is not known."""
    if shape is None:
        return "[...]"
    return _listed([str(d) if isinstance(d, int) else str(d.value or "?") for d in shape])


def _name(name: str | None) -> str:
    """A name as it is, quoted where it could be misread."""
    if name and name != "-" and _PLAIN_NAME.fullmatch(name):
        return name
    return _text(name or "")


def _text(value: str | bytes) -> str:
    """A quoted string; a long one is cut, with its length and a hash so that a change still shows."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if len(value) <= LONG_TEXT:
        return json.dumps(value, ensure_ascii=False)
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    return (
        f"{json.dumps(value[:LONG_TEXT], ensure_ascii=False)}… ({len(value)} characters, #{digest})"
    )


def _number(value: Any) -> str:
    """Shortest text that reads back as the same value. Attributes hold float32 as Python floats."""
    if isinstance(value, np.bool_):
        return str(value).lower()
    return str(np.float32(value) if type(value) is float else value)


def _listed(parts: list[str]) -> str:
    return f"[{', '.join(parts)}]"
