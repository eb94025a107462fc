"""Rules of operators that hold weights: they read channels and write new ones.

    MatMul, Gemm             y = x W + b      x's last axis is read, y's last axis is written
    Conv, ConvTranspose      of any kernel size: channels are mixed at every pixel alike, and padding with 0 stays 0
    depthwise Conv           one factor per channel and pixel: ends one scale and begins another, passes permutations
    Gather, Slice of a table an embedding: writes its last axis

Labels belong to axes of stored tensors, so that a weight that several operators share is transformed once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph, weights
from qgraph.symmetry import elementwise
from qgraph.symmetry.channels import MEAN, NONE, Channels, Labels, padded
from qgraph.symmetry.registry import rule


@rule("Gemm")
def gemm(c: Channels, node: ir.Node) -> None:
    """Y = alpha X W + beta C."""
    x = c.layout(node.inputs[0])
    if x is not None and graph.attribute(node, "transA", 0):
        c.pin(x.labels, node, "transposes its input")
        return
    if not product(c, node, 0, 1):
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    out = c.layout(node.outputs[0])
    if bias is None or out is None:
        return
    if graph.is_constant(bias):
        if elementwise.number(bias) != 0:
            c.add("rider", node, 2, out.labels)
    elif c.layout(bias) is not None:
        c.pin(out.labels, node, "adds an activation as bias")
        c.pin(c.layouts[bias].labels, node, "adds an activation as bias")
    elif c.varies(bias, out.labels):
        c.pin(out.labels, node, f"adds {bias.name!r}, which is not transformed")
    else:
        text = f"adds {bias.name!r}, the same to all channels"
        c.limit(out.labels, node, text, scale=NONE, rotate=MEAN)


def product(c: Channels, node: ir.Node, left: int, right: int) -> bool:
    """X W with a stored W: x's channels are read, y's written. False where W is no stored matrix."""
    v = node.inputs[right]
    held = c.layout(node.inputs[left])
    origin, through = (None, None) if v is None else weights.source(v)
    use = None
    if origin is not None:
        use = weights.use_of(node, right, len(weights.tensor_shape(origin)), through)
    if origin is None or use is None or use.reason or not graph.is_constant(origin):
        if held is not None:
            c.pin(held.labels, node, "its weight is no stored matrix")
        return False
    rank = len(use.matrix.perm)
    n_axis, k_axis = use.matrix.perm[use.matrix.rows - 1], use.matrix.perm[-1]
    k = weights.tensor_shape(origin)[k_axis]
    out_rank = max(rank, c.rank(node.inputs[left]) or rank)
    if held is not None and held.labels.shape[-1] == 1 and k > 1:
        # The product runs over another axis than the channels: they pass.
        c.put(node.outputs[0], padded(held.labels, out_rank))
        return False
    if held is not None:
        read = c.of_weight(origin, k_axis, "reader")
        c.tie(c.collapse(held.labels, -1), read)
        c.add("reader", node, right, along(read, k_axis, rank), origin)
    if n_axis == k_axis or weights.tensor_shape(origin)[n_axis] == 1:
        return False
    written = c.of_weight(origin, n_axis, "writer")
    c.add("writer", node, right, along(written, n_axis, rank), origin)
    c.put(node.outputs[0], padded(written, out_rank))
    return True


def along(labels: Labels, axis: int, rank: int) -> Labels:
    """Labels [n] as an array of that rank, along one axis."""
    return labels.reshape([-1 if a == axis else 1 for a in range(rank)])


@rule("Conv")
def conv(c: Channels, node: ir.Node) -> None:
    """Channels are axis 1 of x and y, axes 1 and 0 of W."""
    held, w = c.layout(node.inputs[0]), node.inputs[1]
    if not graph.is_constant(w):
        if held is not None:
            c.pin(held.labels, node, "its weight is no constant")
        return
    assert w is not None and w.const_value is not None
    dims = tuple(int(d) for d in w.const_value.shape.numpy())
    groups = int(graph.attribute(node, "group", 1))
    read = _image_channels(c, node, held, dims[1] * groups)
    if groups > 1 and dims[1] == 1:
        out = _depthwise(c, node, w, dims, read)
    else:
        if read is not None:
            per_group = read.reshape(groups, dims[1])
            c.part(per_group, [0])
            if groups == 1:
                labels = c.of_weight(w, 1, "reader")
                c.tie(read, labels)
                c.add("reader", node, 1, along(labels, 1, len(dims)))
            else:
                rows = np.repeat(per_group, dims[0] // groups, axis=0)
                c.add("reader", node, 1, rows.reshape(rows.shape + (1,) * (len(dims) - 2)))
        out = c.of_weight(w, 0, "writer")
        c.part(out.reshape(groups, -1), [0])
        c.add("writer", node, 1, along(out, 0, len(dims)))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if graph.is_constant(node.inputs[2]):
            c.add("rider", node, 2, out)
        else:
            c.pin(out, node, "its bias is no constant")
    c.put(node.outputs[0], along(out, 1, len(dims)))


def _image_channels(c: Channels, node: ir.Node, held: object, n: int) -> Labels | None:
    """Labels of axis 1, [n]; other axes are tied, since the kernel runs over them."""
    layout = c.layout(node.inputs[0])
    if layout is None:
        return None
    if layout.labels.ndim < 3 or layout.labels.shape[1] != n:
        c.pin(layout.labels, node, "its channels are not those that the analysis follows")
        return None
    return c.collapse(layout.labels, 1)


def _depthwise(
    c: Channels, node: ir.Node, w: ir.Value, dims: tuple[int, ...], read: Labels | None
) -> Labels:
    """Each input channel makes dims[0] / groups output channels and meets no other."""
    text = "a depthwise convolution mixes no channels"
    if c.kind == "scale":
        if read is not None:
            spread = np.repeat(read, dims[0] // len(read))
            c.add("reader", node, 1, along(spread, 0, len(dims)))
        out = c.of_weight(w, 0, "writer")
        c.add("writer", node, 1, along(out, 0, len(dims)))
        return out
    out = c.of_weight(w, 0, "writer")
    c.add("rider", node, 1, along(out, 0, len(dims)))
    c.limit(out, node, text, rotate=NONE)
    if read is None:
        # Its input stays as it is, so the output has to.
        c.limit(out, node, f"{text}, and its input is not followed", permute=NONE)
    else:
        c.limit(read, node, text, rotate=NONE)
        c.tie(out, np.repeat(read, dims[0] // len(read)))
    return out


@rule("ConvTranspose")
def conv_transpose(c: Channels, node: ir.Node) -> None:
    """Channels are axis 1 of x and y, axes 0 and 1 of W; followed without groups only."""
    held, w = c.layout(node.inputs[0]), node.inputs[1]
    if not graph.is_constant(w) or graph.attribute(node, "group", 1) != 1:
        if held is not None:
            c.pin(held.labels, node, "its weight is no constant, or it has groups")
        return
    assert w is not None
    dims = weights.tensor_shape(w)
    read = _image_channels(c, node, held, dims[0])
    if read is not None:
        labels = c.of_weight(w, 0, "reader")
        c.tie(read, labels)
        c.add("reader", node, 1, along(labels, 0, len(dims)))
    out = c.of_weight(w, 1, "writer")
    c.add("writer", node, 1, along(out, 1, len(dims)))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if graph.is_constant(node.inputs[2]):
            c.add("rider", node, 2, out)
        else:
            c.pin(out, node, "its bias is no constant")
    c.put(node.outputs[0], along(out, 1, len(dims)))


@rule("Gather")
def gather(c: Channels, node: ir.Node) -> None:
    """Rows of a table: writes its last axis. Of an activation: indexing, if it is constant or along another axis."""
    x, indices = node.inputs
    axis = int(graph.attribute(node, "axis", 0))
    assert x is not None and indices is not None
    if graph.is_constant(x):
        _table(c, node, axis, c.rank(indices))
        return
    held = c.layout(x)
    if held is None:
        return
    labels, rank = held.labels, c.rank(indices)
    axis %= labels.ndim
    chosen = graph.small_array(indices)
    if rank is None or (labels.shape[axis] > 1 and chosen is None):
        c.pin(labels, node, "takes channels by an index that is not known")
    elif labels.shape[axis] == 1:
        shape = labels.shape[:axis] + (1,) * rank + labels.shape[axis + 1 :]
        c.put(node.outputs[0], labels.reshape(shape))
    else:
        assert chosen is not None
        c.put(node.outputs[0], np.take(labels, chosen.astype(np.int64), axis=axis))


def _table(c: Channels, node: ir.Node, axis: int, rank: int | None) -> None:
    table = node.inputs[0]
    assert table is not None and table.const_value is not None
    dims = table.const_value.shape.numpy()
    if table.const_value.dtype not in graph.FLOATS or len(dims) < 2 or rank is None:
        return
    if axis % len(dims) == len(dims) - 1:
        return
    labels = c.of_weight(table, len(dims) - 1, "writer")
    c.add("writer", node, 0, along(labels, len(dims) - 1, len(dims)))
    c.put(node.outputs[0], padded(labels, len(dims) - 1 + rank))


@rule("Slice")
def slices(c: Channels, node: ir.Node) -> None:
    """Of a table: as Gather. Of an activation: indexing of labels."""
    x = node.inputs[0]
    assert x is not None
    axes, starts, ends, steps = (_ints(node, i, k) for i, k in _SLICE)
    if graph.is_constant(x):
        assert x.const_value is not None
        dims = x.const_value.shape.numpy()
        last = len(dims) - 1
        cut = range(len(dims)) if axes is None else [a % len(dims) for a in axes]
        if x.const_value.dtype in graph.FLOATS and len(dims) > 1 and last not in cut:
            labels = c.of_weight(x, last, "writer")
            c.add("writer", node, 0, along(labels, last, len(dims)))
            c.put(node.outputs[0], padded(labels, len(dims)))
        return
    held = c.layout(x)
    if held is None:
        return
    labels = held.labels
    if axes is None:
        known = starts if starts is not None else ends
        axes = None if known is None else list(range(len(known)))
    if axes is None:
        c.pin(labels, node, "its axes are not known")
        return
    index: list[slice] = [slice(None)] * labels.ndim
    for place, axis in enumerate(axes):
        if labels.shape[axis] == 1:
            continue
        if starts is None or ends is None:
            c.pin(labels, node, "takes channels by bounds that are not known")
            return
        step = 1 if steps is None else steps[place]
        start, end = starts[place], ends[place]
        if step < 0 and end < -labels.shape[axis]:
            index[axis] = slice(start, None, step)
        else:
            index[axis] = slice(start, end, step)
    c.put(node.outputs[0], labels[tuple(index)])


_SLICE = ((3, "axes"), (1, "starts"), (2, "ends"), (4, "steps"))


def _ints(node: ir.Node, index: int, key: str) -> list[int] | None:
    """An integer list that older opsets have as attribute and newer ones as input."""
    v = node.inputs[index] if index < len(node.inputs) else None
    if v is None:
        held = graph.attribute(node, key, None)
        return None if held is None else [int(i) for i in held]
    array = graph.small_array(v)
    return None if array is None else [int(i) for i in array.reshape(-1)]
