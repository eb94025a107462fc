"""The graph: walking it, editing it, copying it. Every onnx_ir work-around that is not I/O lives here.

Rules that keep edits safe (each pinned in tests/contract): values are always named by us; arrays read from the
graph are never written; types are replaced, never assigned through `.dtype`; nothing is kept in `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_CONSTANT_DTYPES = {
    "value_float": ir.DataType.FLOAT,
    "value_floats": ir.DataType.FLOAT,
    "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64,
}


def nodes(model: ir.Model) -> list[ir.Node]:
    """Every node of the main graph and of all bodies inside it (If, Loop, Scan), outer nodes first."""
    return [n for g in graphs(model) for n in g]


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every body inside it, outer graphs first. Model-local functions are not included."""
    todo = [model.graph]
    while todo:
        graph = todo.pop(0)
        yield graph
        todo.extend(body for node in graph for body in bodies(node))


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds in its attributes, in attribute order."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def initializers(model: ir.Model) -> Iterator[tuple[ir.Graph, ir.Value]]:
    """Every initializer of every graph, with the graph that owns it, in name order per graph."""
    for graph in graphs(model):
        for name in sorted(graph.initializers):
            yield graph, graph.initializers[name]


def owner(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {node.name!r} stands in no graph")
    return graph


def ancestors(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """For every body, the node of the main graph that holds it, directly or through other bodies."""
    found: dict[ir.Graph, ir.Node] = {}
    for top in model.graph:
        todo = list(bodies(top))
        while todo:
            body = todo.pop()
            found[body] = top
            todo.extend(inner for node in body for inner in bodies(node))
    return found


class Names:
    """Fresh names for one model: `names("w.scale")` gives "w.scale", then "w.scale_1", ... never one in use."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in graphs(model):
            self._used.update(v.name for v in graph.inputs if v.name)
            self._used.update(graph.initializers)
            for node in graph:
                self._used.update(v.name for v in node.outputs if v.name)
                if node.name:
                    self._used.add(node.name)

    def __call__(self, base: str) -> str:
        """A name like `base` that nothing has yet."""
        name, count = base, 0
        while name in self._used:
            count += 1
            name = f"{base}_{count}"
        self._used.add(name)
        return name


def value(
    name: str, dtype: ir.DataType | None = None, shape: ir.Shape | Sequence[Any] | None = None
) -> ir.Value:
    """A new named value."""
    if shape is not None and not isinstance(shape, ir.Shape):
        shape = ir.Shape(list(shape))
    return ir.Value(
        name=name, type=ir.TensorType(dtype) if dtype is not None else None, shape=shape
    )


def add_initializer(
    graph: ir.Graph, name: str, data: npt.NDArray[Any] | ir.TensorProtocol
) -> ir.Value:
    """Register a constant under a fresh name (see `Names`) and return its value."""
    tensor = ir.tensor(data, name=name) if isinstance(data, np.ndarray) else data
    if tensor.name != name:
        # onnx_ir renames a tensor to its value when it saves, and this one may be another model's too.
        tensor = _named(tensor, name)
    made = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    if name in graph.initializers:
        raise ValueError(f"initializer {name!r} exists already")
    graph.register_initializer(made)
    return made


def _named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The same data under another name, without a copy."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=name)


def add_node(
    anchor: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    *,
    name: str,
    domain: str = "",
    attributes: Mapping[str, Any] | None = None,
    after: bool = False,
) -> ir.Node:
    """Insert a node before (or after) `anchor`, in the anchor's graph."""
    made = ir.Node(
        domain,
        op,
        list(inputs),
        [ir.convenience.convert_attribute(k, v) for k, v in (attributes or {}).items()],
        outputs=list(outputs),
        name=name,
    )
    (anchor.append if after else anchor.prepend)(made)
    return made


def replace_node(
    old: ir.Node, op: str, inputs: Sequence[ir.Value | None], **kwargs: Any
) -> ir.Node:
    """Put a new node in the place of `old`; it takes over `old`'s outputs, names and types included."""
    graph = owner(old)
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in old.outputs]
    made = add_node(old, op, inputs, outputs, name=kwargs.pop("name", old.name), **kwargs)
    made.metadata_props.update(old.metadata_props)
    for before, now in zip(old.outputs, outputs, strict=True):
        replace_uses(before, now)
    graph.remove(old, safe=True)
    return made


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every consumer of `old`, graph outputs of any scope included, read `new`. Output names are kept."""
    if old.is_graph_output():
        graph = old.graph
        if graph is None:
            raise ValueError(f"{old.name!r} is an output of no graph")
        for index, out in enumerate(graph.outputs):
            if out is old:
                graph.outputs[index] = new
    ir.convenience.replace_all_uses_with(old, new)


def array(constant: ir.Value) -> npt.NDArray[Any]:
    """The data of an initializer as a read-only view; memory-mapped where it is external."""
    tensor = constant.const_value
    if tensor is None:
        raise ValueError(f"{constant.name!r} is not a constant")
    data = tensor.numpy().view()
    data.flags.writeable = False
    return data


def is_constant(v: ir.Value | None) -> bool:
    """True for an initializer that no caller can override (graph inputs with defaults are not constant)."""
    return (
        v is not None
        and v.is_initializer()
        and not v.is_graph_input()
        and v.const_value is not None
    )


def node_constant(v: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a Constant node's output, else None; also for sparse ones and for a function's parameters.

    onnx_ir's own helper renames the tensor, which the caller's model may share, and raises for sparse ones.
    """
    node = v.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    held = next(iter(node.attributes.values()), None)
    if held is None or held.is_ref():
        return None
    if held.name == "value":
        return held.as_tensor()
    dtype = _CONSTANT_DTYPES.get(held.name)
    return None if dtype is None else ir.tensor(held.value, dtype=dtype)


def small_array(v: ir.Value | None, limit: int = 65536) -> npt.NDArray[Any] | None:
    """The data of a small constant (initializer or Constant node), else None."""
    if v is None:
        return None
    tensor = v.const_value if is_constant(v) else node_constant(v)
    if tensor is None or tensor.size > limit or tensor.dtype == ir.DataType.STRING:
        return None
    return np.asarray(tensor.numpy())


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or the default where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def lazy(
    fn: Callable[[], npt.NDArray[Any]], dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.LazyTensor:
    """A tensor that is computed when it is read, each time anew: it holds no memory between reads."""
    return ir.LazyTensor(
        lambda: ir.tensor(fn(), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(list(shape)),
        name=name,
    )


def clone(model: ir.Model) -> ir.Model:
    """An independent copy that shares only the (immutable) tensor data."""
    copy = model.clone()
    for graph in graphs(copy):
        values = [
            *graph.inputs,
            *graph.initializers.values(),
            *(v for n in graph for v in n.outputs),
        ]
        for v in values:
            if isinstance(v.type, ir.TensorType):
                v.type = ir.TensorType(v.type.dtype, denotation=v.type.denotation)
    return copy


def sort_initializers(model: ir.Model) -> None:
    """Order the initializers of every graph by first use, then by name.

    Shape inference and insertion leave them in any order. Files must not differ for it, and a runtime that maps
    the file reads it front to back if weights lie in execution order.
    """
    order: dict[ir.Value, int] = {}
    for node in nodes(model):
        for v in node.inputs:
            if v is not None and v.is_initializer():
                order.setdefault(v, len(order))
    for graph in graphs(model):
        held = sorted(
            graph.initializers.items(), key=lambda item: (order.get(item[1], len(order)), item[0])
        )
        graph.initializers.clear()
        for _, v in held:
            graph.register_initializer(v)


def remove_dead(model: ir.Model) -> int:
    """Remove nodes, initializers, functions and opset imports that nothing uses; returns how many things went.

    Graph inputs and outputs always stay. Bodies are cleaned from the inside out, until nothing changes.
    """
    removed = 0
    while True:
        round_removed = 0
        for graph in reversed(list(graphs(model))):
            outputs = set(graph.outputs)
            for node in reversed(graph):
                if not any(v.uses() or v in outputs for v in node.outputs):
                    graph.remove(node, safe=True)
                    round_removed += 1
            for name in list(graph.initializers):
                v = graph.initializers[name]
                if not v.uses() and not v.is_graph_output() and not v.is_graph_input():
                    del graph.initializers[name]
                    round_removed += 1
        removed += round_removed
        if round_removed == 0:
            break
    return removed + _remove_unused_functions(model) + _remove_unused_imports(model)


def _remove_unused_functions(model: ir.Model) -> int:
    used: set[Any] = set()
    todo: list[Iterable[ir.Node]] = [nodes(model)]
    while todo:
        for node in todo.pop():
            key = node.op_identifier()
            if key in model.functions and key not in used:
                used.add(key)
                todo.append(list(model.functions[key].all_nodes()))
    dead = [key for key in model.functions if key not in used]
    for key in dead:
        del model.functions[key]
    return len(dead)


def _remove_unused_imports(model: ir.Model) -> int:
    used = (
        {n.domain for n in nodes(model)}
        | {n.domain for f in model.functions.values() for n in f.all_nodes()}
        | {""}
    )
    dead = [
        d
        for d in model.graph.opset_imports
        if d not in used and not (d == "ai.onnx" and "" in used)
    ]
    for domain in dead:
        del model.graph.opset_imports[domain]
    return len(dead)


def opset(model: ir.Model) -> int:
    """The version of the default operator set that the model imports."""
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if version is None:
        # A graph may use contrib operators alone; anything then fits.
        return 1
    return version


def static_shape(v: ir.Value) -> tuple[int, ...] | None:
    """The shape where every dimension is known, else None."""
    if v.shape is None or not v.shape.is_static():
        return None
    return tuple(int(d) for d in v.shape)  # type: ignore[arg-type]


def where(node: ir.Node) -> str:
    """How messages name a node: "MatMul '/layers.0/q_proj'"."""
    name = node.name or output_name(node)
    return f"{node.op_type} {name!r}"


def output_name(node: ir.Node) -> str:
    """The name of a node's first output that has one; recurrent operators may leave the first one out.

    >>> output_name(ir.Node("", "LSTM", [], outputs=[ir.Value(name=""), ir.Value(name="h")]))
    'h'
    """
    return next((v.name for v in node.outputs if v.name), "")


def require_unique_names(model: ir.Model) -> None:
    """Give every unnamed value that is used a name; raise where an initializer has two.

    Unnamed nodes stay unnamed (see `where`): thousands of invented names would only make the file larger.
    """
    names = Names(model)
    for graph in graphs(model):
        for node in graph:
            for v in node.outputs:
                if v.name is None and (v.uses() or v.is_graph_output()):
                    v.name = names(f"{node.op_type}_out")
        for name, v in graph.initializers.items():
            if v.name != name:
                raise errors.InputError(
                    errors.Diagnostic(
                        "error",
                        "QG104",
                        name,
                        f"initializer is registered as {name!r} but named {v.name!r}",
                    )
                )
