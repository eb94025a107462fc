"""Rules of products of two activations, and of fused attention.

    scores = Q K'     Q and K rotate alike (Q T)(K T)' = Q K'; each head by itself
    mixed  = P V      V's channels pass: P (V T) = (P V) T; each key head by itself

Where query heads share a key head they share its transform, too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.symmetry.channels import NONE, Channels, Labels, padded
from qgraph.symmetry.linear import product
from qgraph.symmetry.registry import rule


@rule("MatMul")
def matmul(c: Channels, node: ir.Node) -> None:
    """X W with a stored W, W X with a stored W, or a product of two activations."""
    a, b = node.inputs
    assert a is not None and b is not None
    if graph.is_constant(a) and c.layout(b) is not None:
        _from_left(c, node, a, b)
    elif _is_stored(b):
        product(c, node, 0, 1)
    else:
        _activations(c, node, a, b)


def _is_stored(v: ir.Value) -> bool:
    producer = v.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.domain == "":
        return graph.is_constant(producer.inputs[0])
    return graph.is_constant(v)


def _from_left(c: Channels, node: ir.Node, w: ir.Value, x: ir.Value) -> None:
    """W X: X's last axis passes; its axis -2 would be read, which no runtime quantizes."""
    labels = c.layouts[x].labels
    if labels.ndim < 2 or labels.shape[-2] > 1:
        c.pin(labels, node, "its weight is the left input")
    else:
        c.put(node.outputs[0], padded(labels, max(labels.ndim, c.rank(w) or 0)))


def _activations(c: Channels, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    x, y = c.layout(a), c.layout(b)
    ranks = c.rank(a), c.rank(b)
    held = [h.labels for h in (x, y) if h is not None]
    if not held:
        return
    if None in ranks or min(r for r in ranks if r is not None) < 2:
        for each in held:
            c.pin(each, node, "multiplies activations of unknown rank")
        return
    rank = max(r for r in ranks if r is not None)
    left = None if x is None else padded(x.labels, rank)
    right = None if y is None else padded(y.labels, rank)
    found = activations(c, node, left, right)
    if found is not None:
        c.put(node.outputs[0], found)


def activations(
    c: Channels, node: ir.Node, left: Labels | None, right: Labels | None
) -> Labels | None:
    """Labels of the product of two activations with labels of one rank, None where one is not followed."""
    if right is not None:
        right = right.swapaxes(-1, -2)
    held = [m for m in (left, right) if m is not None]
    rank = held[0].ndim
    # Now the last axis of both is the one that is summed over.
    summed = [m for m in (left, right) if m is not None and m.shape[-1] > 1]
    free = [m for m in (left, right) if m is not None and m.shape[-2] > 1]
    batch = [m for m in (left, right) if m is not None and max(m.shape[:-2], default=1) > 1]
    if len(free) == 2 or any(m is n for m in free for n in summed):
        for each in held:
            c.pin(each, node, "multiplies two activations with channels on several axes")
        return None
    if len(summed) == 2:
        _scores(c, node, summed[0], summed[1], rank)
    else:
        for each in summed:
            c.pin(each, node, "sums over channels times an activation that is not transformed")
    carried = free or [m for m in batch if not any(m is n for n in summed)]
    if len(carried) > 1:
        for each in carried:
            c.pin(each, node, "multiplies two activations with channels on a common axis")
        return None
    for each in batch:
        if not any(each is m for m in (*carried, *summed)):
            c.pin(each, node, "multiplies two activations with channels on a common axis")
    for each in carried:
        c.part(each, range(rank - 2))
        if not free:
            c.limit(each, node, "multiplies heads with an activation", permute=NONE, rotate=NONE)
        return each.swapaxes(-1, -2) if each is right else each
    return None


def _scores(c: Channels, node: ir.Node, q: Labels, k: Labels, rank: int) -> None:
    text = "sums over channels times another activation's"
    try:
        shape = np.broadcast_shapes(q.shape, k.shape)
    except ValueError:
        c.pin(q, node, "sums over channels of different numbers")
        c.pin(k, node, "sums over channels of different numbers")
        return
    c.limit(q, node, text, scale=NONE)
    c.limit(k, node, text, scale=NONE)
    c.tie(q, k)
    c.summed.append((q, node))
    c.part(np.broadcast_to(q if q.size >= k.size else k, shape), range(rank - 1))


@rule("Attention")
def attention(c: Channels, node: ir.Node) -> None:
    """Softmax(Q K') V of opset 23, [batch, heads, seq, d] or [batch, seq, heads d]."""
    _fused(c, node, "q_num_heads", "kv_num_heads", pasts=(4, 5), presents=(1, 2))


@rule("GroupQueryAttention", domain="com.microsoft")
def grouped(c: Channels, node: ir.Node) -> None:
    """Softmax(Q K') V with grouped heads and its own cache, [batch, seq, heads d]."""
    if graph.attribute(node, "do_rotary", 0):
        for v in node.inputs[:2]:
            held = c.layout(v)
            if held is not None:
                c.pin(held.labels, node, "turns pairs of channels (rotary positions)")
    _fused(c, node, "num_heads", "kv_num_heads", pasts=(3, 4), presents=(1, 2))


def _fused(
    c: Channels,
    node: ir.Node,
    q_heads: str,
    k_heads: str,
    *,
    pasts: tuple[int, int],
    presents: tuple[int, int],
) -> None:
    heads = [graph.attribute(node, key, 0) for key in (q_heads, k_heads, k_heads)]
    q, k, v = (_by_head(c, x, n) for x, n in zip(node.inputs[:3], heads, strict=True))
    followed = [(x, own) for x, own in zip(node.inputs, (q, k, v), strict=False) if c.layout(x)]
    if any(own is None for _, own in followed):
        for x, _ in followed:
            assert x is not None
            c.pin(c.layouts[x].labels, node, "its heads are not those that the analysis follows")
        return
    for labels, past, present in ((k, *_at(pasts, presents, 0)), (v, *_at(pasts, presents, 1))):
        has_past = past < len(node.inputs) and node.inputs[past] is not None
        is_used = present < len(node.outputs) and (
            node.outputs[present].uses() or node.outputs[present].is_graph_output()
        )
        if labels is not None and (has_past or is_used):
            c.pin(labels, node, "its cache is an input or output of the operator")
    if q is not None and k is not None:
        c.limit(q, node, "sums over channels times another activation's", scale=NONE)
        c.limit(k, node, "sums over channels times another activation's", scale=NONE)
        c.tie(q, np.repeat(k, len(q) // len(k), axis=0))
        c.summed.append((q, node))
        c.part(q, [0])
    else:
        for each in (q, k):
            if each is not None:
                c.pin(each, node, "sums over channels times an activation that is not transformed")
    if v is None:
        return
    c.part(v, [0])
    first = c.layout(node.inputs[0])
    rank = c.rank(node.inputs[0]) or 3
    n = len(q) if q is not None else int(heads[0]) or _heads_of(c, node.inputs[0])
    if first is None and not n:
        c.pin(v, node, "its heads are not known")
        return
    mixed = np.repeat(v, n // len(v), axis=0)
    out = mixed.reshape(1, 1, -1) if rank == 3 else mixed[None, :, None, :]
    c.put(node.outputs[0], out)


def _at(pasts: tuple[int, int], presents: tuple[int, int], i: int) -> tuple[int, int]:
    return pasts[i], presents[i]


def _heads_of(c: Channels, v: ir.Value | None) -> int:
    dims = None if v is None else c.dims.get(v)
    return int(dims[1]) if dims is not None and len(dims) == 4 and isinstance(dims[1], int) else 0


def _by_head(c: Channels, v: ir.Value | None, heads: int) -> Labels | None:
    """Labels [heads, d] of an input of attention, or None."""
    held = c.layout(v)
    if held is None:
        return None
    labels = held.labels
    if labels.ndim == 4 and labels.shape[0] == 1 and labels.shape[2] == 1:
        if labels.shape[1] == 1:
            dims = c.dims.get(v) if v is not None else None
            n = dims[1] if dims is not None else None
            return np.repeat(labels[0, :, 0], n, axis=0) if isinstance(n, int) else None
        return labels[0, :, 0]
    if labels.ndim == 3 and labels.shape[:2] == (1, 1) and heads and labels.shape[2] % heads == 0:
        return labels.reshape(heads, -1)
    return None


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain="com.microsoft")
def rotary(c: Channels, node: ir.Node) -> None:
    """Turns pairs of channels by angles that depend on the position."""
    held = c.layout(node.inputs[0])
    if held is not None:
        c.pin(held.labels, node, "turns pairs of channels (rotary positions)")
        c.put(node.outputs[0], held.labels)
