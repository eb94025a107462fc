"""Rules of activations with joined axes: heads that an exporter put into the batch.

    [batch, heads, seq, d] -> [batch * heads, seq, d]      torch's MultiheadAttention, and keys on their way to K'

Reshape makes such axes and parts them again. Between, only the operators here are followed; any other one fixes the
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from qgraph import graph
from qgraph.symmetry import attention, elementwise, shapes
from qgraph.symmetry.channels import Channels, Joined

Rule: TypeAlias = Callable[[Channels, ir.Node], None]


def step(c: Channels, node: ir.Node) -> bool:
    """Follow joined axes through a node; False where it takes none of them, or does not know them."""
    held = [c.joined[v] for v in node.inputs if v is not None and v in c.joined]
    if not held:
        return False
    rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is not None:
        rule(c, node)
        return True
    _pin(c, node, held)
    return False


def _pin(c: Channels, node: ir.Node, held: list[Joined]) -> None:
    for each in held:
        c.pin(each.labels, node, f"{node.op_type} takes channels joined with another axis")


def _same(c: Channels, node: ir.Node) -> None:
    """Nothing moves: copies, negation, one number as factor."""
    held = [(i, c.joined[v]) for i, v in enumerate(node.inputs) if v is not None and v in c.joined]
    others = [v for i, v in enumerate(node.inputs) if i != held[0][0] and v is not None]
    to = graph.attribute(node, "to", None)
    is_number = all(elementwise.is_number(v) for v in others)
    is_divisor = node.op_type == "Div" and held[0][0] == 1
    if not is_number or is_divisor or (to is not None and ir.DataType(to) not in graph.FLOATS):
        _pin(c, node, [h for _, h in held])
    else:
        c.put_joined(node.outputs[0], held[0][1])


def _transpose(c: Channels, node: ir.Node) -> None:
    """The parts of an axis stay together."""
    v = node.inputs[0]
    assert v is not None
    held = c.joined[v]
    order = graph.attribute(node, "perm", list(reversed(range(len(held.spans)))))
    starts = [sum(held.spans[:a]) for a in range(len(held.spans))]
    fine = [starts[a] + i for a in order for i in range(held.spans[a])]
    dims = tuple(held.dims[a] for a in fine)
    spans = tuple(held.spans[a] for a in order)
    c.put_joined(node.outputs[0], Joined(held.labels.transpose(fine), dims, spans))


def _product(c: Channels, node: ir.Node) -> None:
    """Scores and mixtures of heads: as if the axes were not joined."""
    sides = [None if v is None else c.joined.get(v) for v in node.inputs]
    held = [h for h in sides if h is not None]
    first = held[0]
    is_other = any(
        h is None and (c.layout(v) is not None or graph.is_constant(v) or c.rank(v) != len(first.spans))
        for v, h in zip(node.inputs, sides, strict=True)
    )  # fmt: skip
    is_alike = all(h.spans == first.spans and h.dims[:-2] == first.dims[:-2] for h in held)
    if is_other or not is_alike or first.spans[-2:] != (1, 1):
        _pin(c, node, held)
        return
    left, right = (None if h is None else h.labels for h in sides)
    found = attention.activations(c, node, left, right)
    if found is not None:
        known = c.dims.get(node.outputs[0], (None, None))
        dims = (*first.dims[:-2], *known[-2:])
        c.put_joined(node.outputs[0], Joined(found, dims, first.spans))


_RULES: dict[str, Rule] = {
    "Reshape": shapes.reshape,
    "Transpose": _transpose,
    "MatMul": _product,
    "Shape": shapes.sizes,
    **dict.fromkeys(("Identity", "Dropout", "Neg", "Cast", "Mul", "Div"), _same),
}
