"""Constants: lift them out of nodes and bodies, and fold the arithmetic through which exporters feed weights.

    MatMul(x, Transpose(Mul(u, s)))      →  MatMul(x, Transpose(w)),  w = u * s   (lazy: computed when read)
    MatMul(x, Cast(w16)), Reshape, ...   →  MatMul(x, w)

A Transpose directly before an operator stays: `qgraph.weights` looks through it, so tied tables stay tied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, weights

Array = npt.NDArray[Any]


def lift(model: ir.Model) -> bool:
    """Turn float Constant nodes and float initializers of bodies into initializers of the main graph."""
    names = graph.Names(model)
    lifted: dict[
        int, ir.Value
    ] = {}  # by tensor: an inlined function called twice holds one tensor twice
    held = Counter(str(v.name) for g in graph.graphs(model) for v in _values(g))
    changed = False

    def adopt(tensor: ir.TensorProtocol, name: str) -> ir.Value:
        if id(tensor) not in lifted:
            # The value of that name goes away, so the name is free unless another body has it too.
            fresh = name if held[name] == 1 else names(name)
            lifted[id(tensor)] = graph.add_initializer(model.graph, fresh, tensor)
        return lifted[id(tensor)]

    for each in list(graph.graphs(model)):
        for node in list(each):
            if node.op_type != "Constant" or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            tensor = graph.node_constant(node.outputs[0])
            if tensor is None or tensor.dtype not in graph.FLOATS or len(tensor.shape) == 0:
                continue
            graph.replace_uses(node.outputs[0], adopt(tensor, str(node.outputs[0].name)))
            each.remove(node, safe=True)
            changed = True
        if each is model.graph:
            continue
        for v in list(each.initializers.values()):
            tensor = v.const_value
            if (
                tensor is None
                or tensor.dtype not in graph.FLOATS
                or v.is_graph_output()
                or v.is_graph_input()
            ):
                continue
            graph.replace_uses(v, adopt(tensor, str(v.name)))
            del each.initializers[str(v.name)]
            changed = True
    return changed


def _values(each: ir.Graph) -> Iterator[ir.Value]:
    yield from each.inputs
    yield from each.initializers.values()
    for node in each:
        yield from node.outputs


def merge_equal(model: ir.Model) -> bool:
    """Merge nodes that compute the same thing from the same constants, so that what they feed is shared."""
    changed = False
    for each in graph.graphs(model):
        seen: dict[Any, ir.Node] = {}
        for node in list(each):
            if node.op_type not in _FOLDABLE or node.domain != "" or len(node.outputs) != 1:
                continue
            if (
                not all(graph.is_constant(v) for v in node.inputs)
                or node.outputs[0].is_graph_output()
            ):
                continue
            first = seen.setdefault(_key(node), node)
            if first is not node:
                graph.replace_uses(node.outputs[0], first.outputs[0])
                each.remove(node, safe=True)
                changed = True
    return changed


def fold(model: ir.Model) -> bool:
    """Replace constant arithmetic in front of weights and biases by one initializer, computed when it is read."""
    names = graph.Names(model)
    made_of: dict[Any, ir.Value] = {}  # two bodies that compute the same constant share one
    changed = False
    for each in graph.graphs(model):
        for node in list(each):
            if not _is_foldable(node) or not _leads_to_weight(node.outputs[0]):
                continue
            if node.op_type == "Transpose" and _feeds_only_weight_slots(node.outputs[0]):
                continue
            key = _key(node)
            if node.op_type == "Identity" and graph.is_constant(node.inputs[0]):
                assert node.inputs[0] is not None
                made_of.setdefault(key, node.inputs[0])  # what is shared stays shared
            elif key not in made_of:
                made_of[key] = graph.add_initializer(
                    model.graph, names(_largest(node) + ".folded"), _evaluate_later(node)
                )
            graph.replace_uses(node.outputs[0], made_of[key])
            each.remove(node, safe=True)
            changed = True
    return changed


def _key(node: ir.Node) -> Any:
    """Equal for nodes that compute the same from the same constants; small operands count by value."""
    operands = []
    for v in node.inputs:
        small = graph.small_array(v, limit=64)
        operands.append(
            id(v) if small is None else (str(small.dtype), small.shape, small.tobytes())
        )
    return (
        node.op_type,
        tuple(operands),
        tuple(sorted((k, str(a.value)) for k, a in node.attributes.items())),
    )


def _is_foldable(node: ir.Node) -> bool:
    if (
        node.domain != ""
        or node.op_type not in _FOLDABLE
        or len(node.outputs) != 1
        or node.outputs[0].is_graph_output()
    ):
        return False
    if not all(
        v is not None and (graph.is_constant(v) or graph.small_array(v) is not None)
        for v in node.inputs
    ):
        return False
    first = node.inputs[0]
    return (
        first is not None
        and first.const_value is not None
        and first.const_value.dtype in graph.FLOATS
    )


def _largest(node: ir.Node) -> str:
    """The name of the largest operand: the one under which a person knows the weight."""
    operands = [v for v in node.inputs if v is not None and v.const_value is not None]
    return str(
        max(operands, key=lambda v: v.const_value.size if v.const_value else 0).name
    ).removesuffix(".folded")


def _leads_to_weight(v: ir.Value, depth: int = 8) -> bool:
    if depth == 0:
        return False
    for node, index in v.uses():
        if (node.domain, node.op_type, index) in weights.LAYOUTS:
            return True
        if node.domain == "" and index == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return True  # a bias
        constant = all(_is_expression(i) for i in node.inputs if i is not v)
        if (
            node.domain == ""
            and node.op_type in _FOLDABLE
            and constant
            and _leads_to_weight(node.outputs[0], depth - 1)
        ):
            return True
    return False


def _is_expression(v: ir.Value | None, depth: int = 8) -> bool:
    """Constant, or computed from constants by operators that can be folded."""
    if v is None or depth == 0:
        return False
    if graph.is_constant(v) or graph.small_array(v) is not None:
        return True
    producer = v.producer()
    if producer is None or producer.domain != "" or producer.op_type not in _FOLDABLE:
        return False
    return all(_is_expression(i, depth - 1) for i in producer.inputs)


def _feeds_only_weight_slots(v: ir.Value) -> bool:
    return all((node.domain, node.op_type, index) in weights.LAYOUTS for node, index in v.uses())


def _evaluate_later(node: ir.Node) -> ir.TensorProtocol:
    """A lazy tensor of the node's result. Its operands are captured now: the node may change or go away later."""
    operands = [_operand(v) for v in node.inputs]
    attributes = {k: a.value for k, a in node.attributes.items()}
    compute = _FOLDABLE[node.op_type]
    first = operands[0]
    # Shapes and types come from stride-0 stand-ins, so that nothing large is read here.
    stand_ins = [_stand_in(o) if o.size > 65536 else np.asarray(o.numpy()) for o in operands]
    result = compute(attributes, stand_ins)
    dtype = ir.DataType(int(attributes["to"])) if node.op_type == "Cast" else first.dtype
    name = str(node.outputs[0].name)
    return graph.lazy(
        lambda: compute(attributes, [np.asarray(o.numpy()) for o in operands]),
        dtype,
        result.shape,
        name,
    )


def _operand(v: ir.Value | None) -> ir.TensorProtocol:
    assert v is not None
    tensor = v.const_value if v.const_value is not None else graph.node_constant(v)
    assert tensor is not None
    return tensor


def _stand_in(tensor: ir.TensorProtocol) -> Array:
    return np.broadcast_to(np.zeros((), tensor.dtype.numpy()), tuple(tensor.shape.numpy()))


def _reshape(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    x, shape = inputs
    sizes = [int(d) for d in shape]
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[i] if d == 0 else d for i, d in enumerate(sizes)]
    return x.reshape(sizes)


def _axes(attributes: dict[str, Any], inputs: list[Array]) -> list[int] | None:
    if len(inputs) > 1:
        return [int(a) for a in inputs[1]]
    axes = attributes.get("axes")
    return None if axes is None else [int(a) for a in axes]


def _squeeze(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    axes = _axes(attributes, inputs)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    return np.expand_dims(inputs[0], tuple(_axes(attributes, inputs) or ()))


def _flatten(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    axis = int(attributes.get("axis", 1))
    axis += inputs[0].ndim if axis < 0 else 0
    return inputs[0].reshape(int(np.prod(inputs[0].shape[:axis])), -1)


def _transpose(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    return inputs[0].transpose(attributes.get("perm"))


def _cast(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    return inputs[0].astype(ir.DataType(int(attributes["to"])).numpy())


def _arithmetic(ufunc: np.ufunc) -> Callable[[dict[str, Any], list[Array]], Array]:
    def compute(attributes: dict[str, Any], inputs: list[Array]) -> Array:
        a, b = inputs
        if a.strides == (0,) * a.ndim and a.size > 1:  # a stand-in: only the shape is wanted
            return np.broadcast_to(np.zeros((), a.dtype), np.broadcast_shapes(a.shape, b.shape))
        # As the runtime computes it, in the tensor's own type: folding must not change a single bit.
        return np.asarray(ufunc(a, b, dtype=a.dtype))

    return compute


def _slice(attributes: dict[str, Any], inputs: list[Array]) -> Array:
    x = inputs[0]
    if len(inputs) > 1:
        starts, ends = inputs[1], inputs[2]
        axes = inputs[3] if len(inputs) > 3 else np.arange(len(starts))
        steps = inputs[4] if len(inputs) > 4 else np.ones(len(starts), np.int64)
    else:
        starts, ends = (np.asarray(attributes[k]) for k in ("starts", "ends"))
        axes, steps = (
            np.asarray(attributes.get("axes", range(len(starts)))),
            np.ones(len(starts), np.int64),
        )
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        stop: int | None = int(end)
        if step < 0 and end < -x.shape[int(axis)]:
            stop = None  # ONNX: "to the beginning"; a negative stop would wrap in Python
        cut[int(axis)] = slice(int(start), stop, int(step))
    return x[tuple(cut)]


_FOLDABLE: dict[str, Callable[[dict[str, Any], list[Array]], Array]] = {
    "Identity": lambda attributes, inputs: inputs[0],
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Cast": _cast,
    "Slice": _slice,
    "Concat": lambda attributes, inputs: np.concatenate(inputs, int(attributes["axis"])),
    "Mul": _arithmetic(np.multiply),
    "Div": _arithmetic(np.divide),
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
}
