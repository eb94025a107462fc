"""Rules of norms and reductions, as operators and in pieces.

    RMSNorm, L2 norms        keep Σ x², so every rotation passes; the gain has to move into the readers
    LayerNorm                subtracts the mean, so a rotation has to map the all-ones vector to itself (or the writers
                             are centred and the mean dropped)
    ReduceMean of x          the same; of x² (Pow or Mul before it): every rotation passes
    BatchNormalization       a factor and an offset per channel

All of them end a scale, and a gain begins another.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph
from qgraph.symmetry import elementwise
from qgraph.symmetry.channels import MEAN, NONE, POSITIVE, Channels, Labels, padded
from qgraph.symmetry.linear import _ints
from qgraph.symmetry.registry import rule


@rule("LayerNormalization")
def layer_norm(c: Channels, node: ir.Node) -> None:
    """γ (x - mean) / sqrt(variance + ε) + β."""
    held = c.layout(node.inputs[0])
    normalise(c, node, held.labels if held else None, 1, 2, has_mean=True)


@rule("RMSNormalization", "SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_norm(c: Channels, node: ir.Node) -> None:
    """γ x / sqrt(mean(x²) + ε)."""
    held = c.layout(node.inputs[0])
    normalise(c, node, held.labels if held else None, 1, None, has_mean=False)


@rule("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_norm(c: Channels, node: ir.Node) -> None:
    """LayerNorm(x + skip + bias); the sum is output 3."""
    normalise(c, node, _skip(c, node, 4), 2, 3, has_mean=True)


@rule("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_rms_norm(c: Channels, node: ir.Node) -> None:
    """RMSNorm(x + skip + bias); the sum is output 3."""
    normalise(c, node, _skip(c, node, 3), 2, None, has_mean=False)


def _skip(c: Channels, node: ir.Node, bias: int) -> Labels | None:
    given = [i for i in (0, 1, bias) if i < len(node.inputs) and node.inputs[i] is not None]
    labels = elementwise.merge(c, node, tuple(given))
    c.layouts.pop(node.outputs[0], None)
    if labels is not None and len(node.outputs) > 3:
        c.put(node.outputs[3], labels)
    return labels


def normalise(
    c: Channels,
    node: ir.Node,
    labels: Labels | None,
    gain: int,
    bias: int | None,
    *,
    has_mean: bool,
) -> None:
    """A norm over the last axis with gain and bias."""
    given = [i for i in (gain, bias) if i is not None and i < len(node.inputs) and node.inputs[i]]
    if any(not graph.is_constant(node.inputs[i]) for i in given):
        if labels is not None:
            c.pin(labels, node, "its gain is no constant")
        return
    if labels is not None and (
        graph.attribute(node, "axis", -1) not in (-1, labels.ndim - 1) or labels.shape[-1] == 1
    ):
        c.pin(labels, node, "normalises over other axes than the channels")
        return
    if labels is not None:
        c.limit(labels, node, "normalises over the channels", scale=NONE)
        if has_mean:
            c.limit(labels, node, "subtracts the mean of the channels", rotate=MEAN)
        c.part(labels, range(labels.ndim - 1))
    out = node.outputs[0]
    if c.kind == "scale":
        rank = labels.ndim if labels is not None else c.rank(node.inputs[0])
        factor = node.inputs[gain] if gain in given else None
        if factor is None or factor.const_value is None or rank is None:
            return
        after = c.fresh([int(factor.const_value.shape.numpy()[-1])])
        for index in given:
            c.add("writer" if index == gain else "rider", node, index, after)
        c.put(out, padded(after, rank))
    elif labels is not None:
        for index in given:
            shared = c.collapse(labels, -1)
            if index == gain and c.kind == "rotate":
                if not elementwise.is_uniform(node.inputs[gain]):
                    elementwise.gain(c, node, gain, labels)
            else:
                c.add("rider", node, index, shared)
        c.put(out, labels)


@rule("LpNormalization")
def lp_norm(c: Channels, node: ir.Node) -> None:
    """X / |x|."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    c.limit(held.labels, node, "normalises over the channels", scale=NONE)
    axis = int(graph.attribute(node, "axis", -1)) % held.labels.ndim
    if held.labels.shape[axis] == 1:
        c.limit(held.labels, node, "is not linear", rotate=NONE)
    elif graph.attribute(node, "p", 2) != 2:
        c.limit(held.labels, node, "is no L2 norm", rotate=NONE)
    c.part(held.labels, [a for a in range(held.labels.ndim) if a != axis])
    c.put(node.outputs[0], held.labels)


@rule("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "ReduceMax", "ReduceMin")
def reduce(c: Channels, node: ir.Node) -> None:
    """Over channels: what is left depends on none of them. Over other axes: linear operators pass everything."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    labels, op = held.labels, node.op_type
    axes = _ints(node, 1, "axes")
    has_input = len(node.inputs) > 1 and node.inputs[1] is not None
    if axes is None and has_input:
        c.pin(labels, node, "its axes are not known")
        return
    if axes is None:
        if graph.attribute(node, "noop_with_empty_axes", 0):
            c.pin(labels, node, "reduces nothing")
            return
        axes = list(range(labels.ndim))
    axes = [a % labels.ndim for a in axes]
    is_square = held.is_square or op in ("ReduceL2", "ReduceSumSquare")
    kept = [a for a in range(labels.ndim) if a not in axes]
    if any(labels.shape[a] > 1 for a in axes):
        _over_channels(c, node, labels, kept, is_square=is_square)
        return
    if op in ("ReduceMax", "ReduceMin"):
        c.limit(labels, node, f"{op} keeps only positive factors", scale=POSITIVE, rotate=NONE)
    elif is_square:
        c.limit(labels, node, "sums squares over other axes", scale=NONE, rotate=NONE)
    keep = int(graph.attribute(node, "keepdims", 1))
    c.put(node.outputs[0], labels if keep else labels.squeeze(tuple(axes)))


def _over_channels(
    c: Channels, node: ir.Node, labels: Labels, kept: list[int], *, is_square: bool
) -> None:
    c.part(labels, kept)
    c.limit(labels, node, f"{node.op_type} runs over the channels", scale=NONE)
    if is_square:
        return
    if node.op_type in ("ReduceMax", "ReduceMin"):
        c.limit(labels, node, f"{node.op_type} runs over the channels", rotate=NONE)
    else:
        c.limit(labels, node, "takes the mean of the channels", rotate=MEAN)


@rule("BatchNormalization")
def batch_norm(c: Channels, node: ir.Node) -> None:
    """γ (x - mean) / sqrt(variance + ε) + β with stored mean and variance: x/s needs mean/s and γ s."""
    held, out = c.layout(node.inputs[0]), node.outputs[0]
    if not all(graph.is_constant(v) for v in node.inputs[1:5]):
        if held is not None:
            c.pin(held.labels, node, "its parameters are no constants")
        return
    n = int(node.inputs[1].const_value.shape.numpy()[0])  # type: ignore[union-attr]
    rank = held.labels.ndim if held is not None else c.rank(node.inputs[0])
    labels = None
    if held is not None:
        if held.labels.ndim < 2 or held.labels.shape[1] != n:
            c.pin(held.labels, node, "its channels are not those that the analysis follows")
            return
        labels = c.collapse(held.labels, 1)
        c.limit(labels, node, "has a factor per channel", rotate=NONE)
    if c.kind == "scale":
        if labels is not None:
            c.add("reader", node, 1, labels)
            c.add("rider", node, 3, labels)
        after = c.fresh([n])
        c.add("writer", node, 1, after)
        c.add("rider", node, 2, after)
        if rank is not None:
            c.put(out, after.reshape([-1 if a == 1 else 1 for a in range(rank)]))
    elif labels is not None and held is not None:
        for index in range(1, 5):
            c.add("rider", node, index, labels)
        c.put(out, held.labels)
