"""Rules of operators that move positions: labels move with them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.symmetry import axes, elementwise
from qgraph.symmetry.channels import MEAN, NONE, POSITIVE, Channels, Labels, padded
from qgraph.symmetry.linear import _ints
from qgraph.symmetry.registry import rule


@rule("Shape", "Size")
def sizes(c: Channels, node: ir.Node) -> None:
    """Only the shape is read."""


@rule("Transpose")
def transpose(c: Channels, node: ir.Node) -> None:
    """Labels are transposed."""
    held = c.layout(node.inputs[0])
    if held is not None:
        order = graph.attribute(node, "perm", list(reversed(range(held.labels.ndim))))
        c.put(node.outputs[0], held.labels.transpose(order))


@rule("Unsqueeze", "Squeeze")
def squeeze(c: Channels, node: ir.Node) -> None:
    """Axes of size 1 come or go."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    labels, axes = held.labels, _ints(node, 1, "axes")
    if axes is None and node.op_type == "Squeeze":
        dims = c.dims.get(node.inputs[0])  # type: ignore[arg-type]
        axes = None if dims is None else [a for a, d in enumerate(dims) if d == 1]
    if axes is None:
        c.pin(labels, node, "its axes are not known")
    elif node.op_type == "Squeeze":
        c.put(node.outputs[0], labels.squeeze(tuple(a % labels.ndim for a in axes)))
    else:
        rank = labels.ndim + len(axes)
        c.put(node.outputs[0], np.expand_dims(labels, tuple(a % rank for a in axes)))


@rule("Reshape", "Flatten")
def reshape(c: Channels, node: ir.Node) -> None:
    """Axes are split and joined; those without labels may be of any size."""
    x, out = node.inputs[0], node.outputs[0]
    held, joined = c.layout(x), None if x is None else c.joined.get(x)
    if x is None or (held is None and joined is None):
        return
    labels = held.labels if held is not None else joined.labels  # type: ignore[union-attr]
    before = c.dims.get(x) if joined is None else joined.dims
    after = c.dims.get(out)
    found = None
    if before is not None and after is not None:
        found = axes.reshaped(labels, before, after)
    if found is None:
        c.pin(labels, node, "it is not known which axes it splits or joins")
    else:
        c.put_joined(out, found)


@rule("Expand", "Tile")
def expand(c: Channels, node: ir.Node) -> None:
    """Copies along an axis have the same labels."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    labels = held.labels
    if node.op_type == "Expand":
        rank = c.rank(node.inputs[1])
        sizes = c.dims.get(node.inputs[1]) if node.inputs[1] is not None else None
        known = graph.small_array(node.inputs[1])
        n = known.size if known is not None else sizes[0] if sizes and rank == 1 else None
        if not isinstance(n, int):
            c.pin(labels, node, "its shape is not known")
            return
        c.put(node.outputs[0], padded(labels, max(n, labels.ndim)))
        return
    times = graph.small_array(node.inputs[1])
    if times is None:
        c.pin(labels, node, "its repeats are not known")
        return
    repeats = [int(t) if labels.shape[a] > 1 else 1 for a, t in enumerate(times.reshape(-1))]
    c.put(node.outputs[0], np.tile(labels, repeats))


@rule("Concat")
def concat(c: Channels, node: ir.Node) -> None:
    """Along channels their labels stand side by side; along another axis they are tied."""
    held = [c.layout(v) for v in node.inputs]
    known = [h.labels for h in held if h is not None]
    if not known:
        return
    axis = int(graph.attribute(node, "axis", 0)) % known[0].ndim
    parts: list[Labels] = []
    if any(a.shape[axis] > 1 for a in known):
        for v, h in zip(node.inputs, held, strict=True):
            part = _beside(c, node, v, h.labels if h else None, known[0], axis)
            if part is None:
                return
            parts.append(part)
        shape = [max(p.shape[a] for p in parts) for a in range(known[0].ndim)]
        wide = [np.broadcast_to(p, [p.shape[a] if a == axis else n for a, n in enumerate(shape)])
                for p in parts]  # fmt: skip
        c.put(node.outputs[0], np.concatenate(wide, axis))
        return
    # Along another axis: all inputs are the same channels.
    elementwise.merge(c, node, range(len(node.inputs)))
    for v, h in zip(node.inputs, held, strict=True):
        if h is None and v is not None and not graph.is_constant(v):
            if elementwise.expanded(c, v, known[0]) is not None:
                continue  # has its channels transformed
            text = f"stands beside {v.name!r}, which is not transformed"
            for each in known:
                c.pin(each, node, text)


def _beside(
    c: Channels, node: ir.Node, v: ir.Value | None, labels: Labels | None, like: Labels, axis: int
) -> Labels | None:
    """Labels of one input of a Concat along channels; new and fixed ones for an input that is not followed."""
    size = None
    if v is not None:
        dims = c.dims.get(v)
        size = dims[axis] if dims is not None and len(dims) == like.ndim else None
    if labels is not None and labels.shape[axis] > 1:
        return labels
    if not isinstance(size, int):
        for each in node.inputs:
            held = c.layout(each)
            if held is not None:
                c.pin(held.labels, node, f"stands beside {v.name!r} of unknown size")  # type: ignore[union-attr]
        return None
    if labels is not None:
        return np.repeat(labels, size, axis)
    made = c.fresh([size if a == axis else 1 for a in range(like.ndim)])
    name = v.name if v is not None else ""
    c.pin(made, node, f"{name!r} is not transformed")
    return made


@rule("Split")
def split(c: Channels, node: ir.Node) -> None:
    """Labels are split."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    labels = held.labels
    axis = int(graph.attribute(node, "axis", 0)) % labels.ndim
    n = labels.shape[axis]
    if n == 1:
        for out in node.outputs:
            c.put(out, labels)
        return
    parts = _ints(node, 1, "split")
    if parts is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        c.pin(labels, node, "its sizes are not known")
        return
    if parts is None:
        each = -(-n // len(node.outputs))
        parts = [min(each, n - i * each) for i in range(len(node.outputs))]
    ends = np.cumsum(parts)
    for out, piece in zip(node.outputs, np.split(labels, ends[:-1], axis), strict=True):
        c.put(out, piece)


@rule("Pad")
def pad(c: Channels, node: ir.Node) -> None:
    """With 0: channels that are added are new ones; with another number only permutations pass."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    labels, pads = held.labels, _ints(node, 1, "pads")
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        c.pin(labels, node, "its sizes are not known")
        return
    value = node.inputs[2] if len(node.inputs) > 2 else None
    filled = graph.attribute(node, "value", 0.0) if value is None else elementwise.number(value)
    mode = graph.attribute(node, "mode", "constant")
    if mode == "constant" and filled != 0.0:
        c.limit(labels, node, "pads with another number than 0", scale=NONE, rotate=MEAN)
    for axis in range(labels.ndim):
        before, after = pads[axis], pads[axis + labels.ndim]
        if labels.shape[axis] == 1 or not (before or after):
            continue
        if mode != "constant" or filled != 0.0 or min(before, after) < 0:
            c.pin(labels, node, "pads channels")
            return
        shape = list(labels.shape)
        new = []
        for n in (before, after):
            shape[axis] = n
            new.append(c.fresh(shape))
        labels = np.concatenate([new[0], labels, new[1]], axis)
    c.put(node.outputs[0], labels)


@rule("MaxPool", "GlobalMaxPool")
def max_pool(c: Channels, node: ir.Node) -> None:
    """max(s x) = s max(x) for s > 0."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    if any(n > 1 for n in held.labels.shape[2:]):
        c.pin(held.labels, node, "pools over channels")
        return
    text = f"{node.op_type} keeps only positive factors of single channels"
    c.limit(held.labels, node, text, scale=POSITIVE, rotate=NONE)
    c.put(node.outputs[0], held.labels)


@rule("AveragePool", "GlobalAveragePool", "Resize", "Upsample")
def pool(c: Channels, node: ir.Node) -> None:
    """Linear, and the same for all channels."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    if any(n > 1 for n in held.labels.shape[2:]):
        c.pin(held.labels, node, "pools over channels")
        return
    if node.op_type in ("Resize", "Upsample") and _resizes(c, node, held.labels):
        c.pin(held.labels, node, "may resize the channels")
        return
    if graph.attribute(node, "extrapolation_value", 0.0) != 0.0:
        c.limit(held.labels, node, "fills with a number", scale=NONE, rotate=MEAN)
    c.put(node.outputs[0], held.labels)


def _resizes(c: Channels, node: ir.Node, labels: Labels) -> bool:
    """True unless the channel axes are known to keep their size."""
    dims = c.dims.get(node.outputs[0])
    return dims is None or any(n > 1 and d != n for n, d in zip(labels.shape, dims, strict=True))
