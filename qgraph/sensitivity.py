"""Which weights hurt most, judged by structure alone, when there is no data to measure with.

At equal bits every matrix adds the same relative noise to its output, whatever its size. So extra bits buy most
where the matrix is small, and dataflow tells two kinds of matrix apart:

- what feeds a Softmax (queries, keys) is forgiven: errors move attention weights, which are normalised;
- what reads a norm and feeds no Softmax (values, gate and up projections) is not: its input has a large part that is
  common to all tokens, and an error in that part is the same error at every token, which nothing averages out.

Measured on a decoder and on an encoder: docs/notes/int4.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph import graph, weights
from qgraph.weights import Use, Weight

_NORMS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_VIEWS = frozenset(
    {"Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Dropout"}
)
_STEPS = 64


def most_sensitive(found: Sequence[Weight], share: float) -> list[Weight]:
    """The weights that read a norm and feed no Softmax, smallest first and last layers first, up to a share.

    Args:
        found: linear weights, in graph order.
        share: of all their elements, 0..1.
    """
    budget = share * sum(w.shape[0] * w.shape[1] for w in found)
    position = {id(w): index for index, w in enumerate(found)}
    candidates = [
        w
        for w in found
        if any(reads_norm(u) for u in w.uses) and not any(feeds_softmax(u) for u in w.uses)
    ]
    chosen = []
    for weight in sorted(candidates, key=lambda w: (w.shape[0] * w.shape[1], -position[id(w)])):
        size = weight.shape[0] * weight.shape[1]
        if size <= budget:
            budget -= size
            chosen.append(weight)
    return chosen


def reads_norm(use: Use) -> bool:
    """True where the operator's input is the output of a normalization, decomposed or not."""
    v = use.node.inputs[0]
    producer = v.producer() if v is not None else None
    while producer is not None and producer.op_type in _VIEWS and producer.inputs:
        v = producer.inputs[0]
        producer = v.producer() if v is not None else None
    if producer is None:
        return False
    if producer.op_type in _NORMS:
        return True
    # The gain of a decomposed norm: a product with a constant vector (and, for LayerNorm, a sum with another).
    if producer.op_type not in ("Mul", "Add") or len(producer.inputs) != 2:
        return False
    gains = [graph.small_array(i) for i in producer.inputs]
    return any(
        g is not None and g.ndim >= 1 and g.size == use.matrix.shape(_dims(use))[1] for g in gains
    )


def _dims(use: Use) -> tuple[int, ...]:
    constant = use.through.inputs[0] if use.through is not None else use.node.inputs[use.index]
    assert constant is not None and constant.const_value is not None
    return tuple(constant.const_value.shape.numpy())


def feeds_softmax(use: Use) -> bool:
    """True where the operator's output reaches a Softmax before it reaches the next weight."""
    todo: list[ir.Value] = [use.node.outputs[0]]
    seen: set[ir.Value] = set()
    while todo and len(seen) < _STEPS:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        for node, index in v.uses():
            if node.op_type in ("Softmax", "LogSoftmax") or (
                node.op_type in _ATTENTION and index < 2
            ):
                return True
            if node.op_type in _ATTENTION or _has_weight(node):
                continue
            todo.extend(o for o in node.outputs if o.name)
    return False


def _has_weight(node: ir.Node) -> bool:
    for index, v in enumerate(node.inputs):
        if (
            v is not None
            and (node.domain, node.op_type, index) in weights.LAYOUTS
            and graph.is_constant(v)
        ):
            return True
        producer = v.producer() if v is not None else None
        if (
            producer is not None
            and producer.op_type == "Transpose"
            and graph.is_constant(producer.inputs[0])
        ):
            return True
    return False
