"""What an opset adapter works with: it reads attributes, adds constants and nodes, and refuses with a reason.

Weights are never read. New constants are initializers; inside functions, which have none, they are Constant nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.shape_inference
import onnx_ir as ir

from qgraph import graph, schemas


class Refused(Exception):
    """A node that cannot be raised; the text completes "Resize cannot be raised to opset 11: ..."."""


class Ranks:
    """Numbers of dimensions by value name, where the model does not declare them: from ONNX's shape inference.

    It runs when first asked, on a copy whose weights are inputs, so that none is read or serialized.
    """

    LARGE = 1000  # bytes; smaller constants may be shapes, whose values inference needs

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._known: dict[str, int | None] | None = None

    def __call__(self, name: str | None) -> int | None:
        """The rank of the value of that name, None if it is not known."""
        if self._known is None:
            self._known = self._infer()
        return self._known.get(name or "")

    def _infer(self) -> dict[str, int | None]:
        copy = graph.clone(self._model)
        main = copy.graph
        inner = [v for g, v in graph.initializers(copy) if g is not main]
        constants = [v for n in graph.nodes(copy) if n.op_type == "Constant" for v in n.outputs]
        held = [*(v.const_value for v in inner), *map(ir.convenience.get_const_tensor, constants)]
        if sum(t.nbytes for t in held if t is not None) > 1 << 26:
            return {}
        for value in list(main.initializers.values()):
            if value.const_value is None or value.const_value.nbytes > self.LARGE:
                del main.initializers[value.name or ""]
                if not value.is_graph_input():
                    main.inputs.append(value)
        try:
            proto = onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=True)
        except Exception:  # noqa: BLE001  it raises many kinds, and then nothing more is known
            return {}
        known: dict[str, int | None] = {}
        for body in graph.graphs(ir.from_proto(proto)):
            for value in (v for node in body for v in node.outputs):
                rank = None if value.shape is None else len(value.shape)
                # Bodies side by side may use one name for two values.
                known[value.name or ""] = (
                    rank if known.get(value.name or "", rank) == rank else None
                )
        return known


class Edit:
    """Changes around one node of a model.

    Attributes:
        version: the opset at which the adapter's new nodes are written.
        created: nodes made so far with the version they are of; they are raised further like any other.
        only_grows: the node was an Upsample, which never shrinks.
    """

    def __init__(
        self, imports: Mapping[str, int], names: graph.Names, ranks: Ranks, *, in_function: bool
    ) -> None:
        self._imports = imports
        self._names = names
        self._ranks = ranks
        self._in_function = in_function
        self.version = 1
        self.only_grows = False
        self.created: list[tuple[ir.Node, int]] = []

    def get(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """The value of an attribute; strings as str."""
        found = node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref():
            raise Refused(f"its attribute {name!r} is set by the caller of the function")
        return found.value.decode() if isinstance(found.value, bytes) else found.value

    def take(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """Like `get`, and the node loses the attribute."""
        value = self.get(node, name, default)
        node.attributes.pop(name, None)
        return value

    def set(self, node: ir.Node, **attributes: Any) -> None:
        """Set attributes from plain Python values."""
        for name, value in attributes.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def inputs(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """Replace all inputs."""
        node.resize_inputs(len(values))
        for index, value in enumerate(values):
            node.replace_input_with(index, value)

    def add_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Set one input, with empty ones before it where there are none."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def constant(self, node: ir.Node, data: npt.ArrayLike, dtype: Any, name: str) -> ir.Value:
        """A constant for `node`, named after it."""
        array = np.asarray(data, dtype)
        label = self._names(f"{_label(node)}_{name}")
        if not self._in_function:
            return graph.add_initializer(graph.owner(node), label, array)
        attributes = {"value": ir.tensor(array, name=label)}
        return self.before(node, "Constant", [], attributes, name=label)

    def before(
        self,
        node: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> ir.Value:
        """A new one-output node before `node`; returns its output."""
        label = name or self._names(f"{_label(node)}_{op}")
        dtype = self.dtype(inputs[0]) if inputs and op != "Shape" else None
        out = graph.value(label, ir.DataType.INT64 if op == "Shape" else dtype)
        made = graph.add_node(node, op, inputs, [out], name=label, attributes=attributes)
        made.metadata_props.update(node.metadata_props)
        self.created.append((made, self.version))
        return out

    def move(self, node: ir.Node, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Put the operator itself, name included, before `node`, which is about to become another one."""
        name, kept = node.name, dict(node.attributes)
        node.name = self._names(f"{_label(node)}_out")
        out = self.before(node, node.op_type, inputs, attributes)
        made = out.producer()
        if made is not None:
            for key, attribute in kept.items():
                made.attributes.setdefault(key, attribute)
            made.name = name
        return out

    def become(
        self,
        node: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Turn `node` into another operator in place; its outputs stay the same values."""
        node.op_type = op
        node.attributes.clear()
        self.inputs(node, inputs)
        self.set(node, **(attributes or {}))

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of a value: declared, or the type that the schemas of its producers carry through."""
        for _ in range(1000):  # longer than any chain of untyped values that is worth following
            if value is None:
                return None
            if value.const_value is not None:
                return value.const_value.dtype
            if value.dtype is not None:
                return value.dtype
            node = value.producer()
            if node is None:
                return None
            if node.op_type == "Cast" and node.domain == "":
                to = node.attributes.get("to")
                return None if to is None or to.is_ref() else ir.DataType(to.as_int())
            constant = ir.convenience.get_const_tensor(value)
            if constant is not None:
                return constant.dtype
            value = self._same_type(node, value)
        return None

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of dimensions, declared or inferred; None if it is not known."""
        if value is None:
            return None
        shape = value.const_value.shape if value.const_value is not None else value.shape
        if shape is None:
            return None if self._in_function else self._ranks(value.name)
        return len(shape)

    def _same_type(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """The input of a node that has, by the schema, the type of one of its outputs."""
        schema = schemas.find(
            node.domain, node.op_type, self._imports.get(node.domain, self.version)
        )
        index = value.index()
        if schema is None or index is None or not schema.outputs:
            return None
        wanted = schema.outputs[min(index, len(schema.outputs) - 1)].type_name
        for at, source in enumerate(node.inputs):
            formal = schema.inputs[min(at, len(schema.inputs) - 1)]
            if formal.type_name == wanted and source is not None:
                return source
        return None


def _label(node: ir.Node) -> str:
    """A base for names: the node's name, or its first output."""
    return node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type
