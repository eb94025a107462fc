"""Fold what follows a linear operator into its weights, in float64.

    BatchNormalization(Conv(x, W, b)):  f = γ / sqrt(σ² + ε),  W ← f W,  b ← f (b - μ) + β
    Gemm(alpha, beta):                  B ← alpha B,  C ← beta C

Only where the weight has no other user: a shared weight would have to be copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, normalized

Array = npt.NDArray[Any]

_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1}


def fold_batch_norm(model: ir.Model) -> bool:
    """Fold inference-mode BatchNormalization into the Conv or ConvTranspose before it."""
    names = graph.Names(model)
    changed = False
    for node in graph.nodes(model):
        if (
            node.op_type == "BatchNormalization"
            and node.domain == ""
            and _fold_one(model, node, names)
        ):
            changed = True
    return changed


def _fold_one(model: ir.Model, norm: ir.Node, names: graph.Names) -> bool:
    conv = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if (
        conv is None
        or conv.domain != ""
        or conv.op_type not in _OUTPUT_AXIS
        or conv.graph is not norm.graph
    ):
        return False
    if len(conv.outputs[0].uses()) != 1 or conv.outputs[0].is_graph_output():
        return False
    if graph.attribute(norm, "training_mode", 0) or any(
        v.uses() or v.is_graph_output() for v in norm.outputs[1:]
    ):
        return False
    if conv.op_type == "ConvTranspose" and graph.attribute(conv, "group", 1) != 1:
        return False
    weight = conv.inputs[1]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    parameters = [graph.small_array(v) for v in norm.inputs[1:5]]
    if weight is None or not graph.is_constant(weight) or len(weight.uses()) != 1:
        return False
    if any(p is None for p in parameters):
        return False
    if bias is not None and graph.small_array(bias) is None:
        return False
    assert weight.const_value is not None
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    factor = gamma / np.sqrt(variance + graph.attribute(norm, "epsilon", 1e-5))
    old_bias = (
        np.zeros_like(mean) if bias is None else np.asarray(graph.small_array(bias), np.float64)
    )
    tensor = weight.const_value
    axis = _OUTPUT_AXIS[conv.op_type]
    spread = tuple(-1 if a == axis else 1 for a in range(len(tensor.shape)))

    def scaled() -> Array:
        product: Array = np.asarray(tensor.numpy(), np.float64) * factor.reshape(spread)
        return product.astype(tensor.dtype.numpy())

    # A folded weight is a new constant under the old one's name: reports and globs keep working.
    _replace_constant(
        model,
        conv,
        1,
        graph.lazy(scaled, tensor.dtype, tensor.shape.numpy(), str(weight.name)),
        str(weight.name),
        names,
    )
    new_bias = (factor * (old_bias - mean) + beta).astype(tensor.dtype.numpy())
    name = str(bias.name) if bias is not None else f"{weight.name}.bias"
    _replace_constant(model, conv, 2, ir.tensor(new_bias, name=name), name, names)
    # The running mean and variance are those of the norm's input: behind it they are β and γ².
    normalized.record(conv, beta, np.abs(gamma))
    graph.replace_uses(norm.outputs[0], conv.outputs[0])
    _keep_name(norm.outputs[0], conv.outputs[0])
    graph.owner(norm).remove(norm, safe=True)
    return True


def _keep_name(old: ir.Value, new: ir.Value) -> None:
    """A graph output keeps its name and type whatever computes it."""
    if new.is_graph_output():
        name, old.name = old.name, None
        new.name = name
        new.type, new.shape = old.type, old.shape


def _replace_constant(
    model: ir.Model,
    node: ir.Node,
    index: int,
    tensor: ir.TensorProtocol,
    name: str,
    names: graph.Names,
) -> None:
    old = node.inputs[index] if index < len(node.inputs) else None
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, None)
    if (
        old is not None
        and not old.uses()
        and old.graph is not None
        and not old.is_graph_input()
        and not old.is_graph_output()
    ):
        assert isinstance(old.graph, ir.Graph)
        if old.is_initializer():
            del old.graph.initializers[str(old.name)]
        fresh = name
        if name in model.graph.initializers:
            fresh = names(name)
    else:
        fresh = names(name)
    node.replace_input_with(index, graph.add_initializer(model.graph, fresh, tensor))


def fold_gemm_factors(model: ir.Model) -> bool:
    """Fold Gemm's alpha into its constant B and beta into its constant C."""
    names = graph.Names(model)
    changed = False
    for node in graph.nodes(model):
        if node.op_type != "Gemm" or node.domain != "":
            continue
        for key, index in (("alpha", 1), ("beta", 2)):
            factor = float(graph.attribute(node, key, 1.0))
            constant = node.inputs[index] if index < len(node.inputs) else None
            if (
                factor == 1.0
                or constant is None
                or not graph.is_constant(constant)
                or len(constant.uses()) != 1
            ):
                continue
            tensor = constant.const_value
            assert tensor is not None
            scaled = graph.lazy(
                lambda t=tensor, f=factor: (np.asarray(t.numpy(), np.float64) * f).astype(
                    t.dtype.numpy()
                ),  # type: ignore[misc]
                tensor.dtype,
                tensor.shape.numpy(),
                str(constant.name),
            )
            _replace_constant(model, node, index, scaled, str(constant.name), names)
            del node.attributes[key]
            changed = True
    return changed
