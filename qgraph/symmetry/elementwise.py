"""Rules of operators that act on every position by itself.

    Add, Sub, Where, Sum     tie their inputs; constants ride along
    Mul, Div                 by one number: pass; by a constant vector: end one scale and begin another
    Relu, Abs, LeakyRelu     pass permutations and positive scales
    Gelu, Sigmoid, Exp, ...  pass permutations only
    Clip                     as Relu; bounds other than 0 have to follow the scale

What is fixed for one operand is fixed for all that are added to it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.symmetry.channels import ANY, MEAN, NONE, POSITIVE, Channels, Gain, Labels, padded
from qgraph.symmetry.registry import rule

FLOATS = graph.FLOATS
_NONLINEAR = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Ceil", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor",
    "Gelu", "HardSigmoid", "HardSwish", "Log", "Mish", "Reciprocal", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip


def is_number(v: ir.Value | None) -> bool:
    """A constant with one element."""
    return graph.is_constant(v) and v.const_value.size == 1  # type: ignore[union-attr]


def number(v: ir.Value | None) -> float | None:
    """The constant's one number."""
    held = graph.small_array(v)
    return None if held is None or held.size != 1 else float(held.reshape(()))


def is_uniform(v: ir.Value | None) -> bool:
    """A constant whose elements are all the same."""
    held = graph.small_array(v)
    return held is not None and held.size > 0 and bool((held == held.flat[0]).all())


@rule("Identity", "Neg", "Dropout")
def linear(c: Channels, node: ir.Node) -> None:
    """Of y = x and y = -x everything passes."""
    held = c.layout(node.inputs[0])
    if held is not None:
        c.put(node.outputs[0], held.labels, is_square=held.is_square)


@rule("Cast", "CastLike")
def cast(c: Channels, node: ir.Node) -> None:
    """Between floats everything passes."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    to = graph.attribute(node, "to", None)
    if to is not None and ir.DataType(to) not in FLOATS:
        c.pin(held.labels, node, "casts to integers")
        return
    c.put(node.outputs[0], held.labels, is_square=held.is_square)


@rule("Relu", "LeakyRelu", "Abs")
def homogeneous(c: Channels, node: ir.Node) -> None:
    """Homogeneous: f(s x) = s f(x) for s > 0."""
    held = c.layout(node.inputs[0])
    if held is not None:
        c.limit(
            held.labels,
            node,
            f"{node.op_type} keeps only positive factors of single channels",
            scale=POSITIVE,
            rotate=NONE,
        )
        c.put(node.outputs[0], held.labels)


@rule("PRelu")
def prelu(c: Channels, node: ir.Node) -> None:
    """As LeakyRelu; the slopes are permuted."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    slope = node.inputs[1]
    if not graph.is_constant(slope):
        c.pin(held.labels, node, "its slope is no constant")
    elif c.kind == "permute" and not is_number(slope):
        c.add("rider", node, 1, held.labels)
    homogeneous(c, node)


@rule(*_NONLINEAR)
@rule("QuickGelu", "FastGelu", "BiasGelu", domain="com.microsoft")
def nonlinear(c: Channels, node: ir.Node) -> None:
    """The same function for all channels, so that permutations pass."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    text = f"{node.op_type} is not linear"
    c.limit(held.labels, node, text, scale=NONE, rotate=NONE)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        c.pin(held.labels, node, f"{node.op_type} has a bias inside")
    c.put(node.outputs[0], held.labels)


@rule("Clip")
def clip(c: Channels, node: ir.Node) -> None:
    """min(max(x, a), b): as Relu; a bound that is neither 0 nor infinite has to be scaled with its channel."""
    held = c.layout(node.inputs[0])
    if held is None:
        return
    bounds: list[float | None] = []
    for index, key in ((1, "min"), (2, "max")):
        v = node.inputs[index] if index < len(node.inputs) else None
        bounds.append(graph.attribute(node, key, 0.0) if v is None else number(v))
    text = "Clip keeps only positive factors of single channels"
    if None in bounds:
        c.limit(held.labels, node, "its bounds are no constants", scale=NONE, rotate=NONE)
    elif c.kind == "scale" and any(b and abs(b) < 1e30 for b in bounds):
        c.add("bound", node, 0, held.labels)
    c.limit(held.labels, node, text, scale=POSITIVE, rotate=NONE)
    c.put(node.outputs[0], held.labels)


@rule("Add", "Sub", "Sum")
def add(c: Channels, node: ir.Node) -> None:
    """Σ x_i: what is added together is transformed alike, constants too."""
    merge(c, node, range(len(node.inputs)))


@rule("Where")
def where(c: Channels, node: ir.Node) -> None:
    """Takes positions of one or the other: as Add, if the condition is the same for all channels."""
    labels = merge(c, node, (1, 2))
    condition = node.inputs[0]
    if labels is None or condition is None or not c.varies(condition, labels):
        return
    text = "its condition may differ between channels"
    c.limit(labels, node, text, permute=NONE, rotate=NONE)


@rule("Max", "Min")
def extreme(c: Channels, node: ir.Node) -> None:
    """max(s a, s b) = s max(a, b) for s > 0; bounds of single channels ride along, one for all stays."""
    others = [v for v in node.inputs if c.layout(v) is None]
    if any(number(v) != 0 and (is_number(v) or not graph.is_constant(v)) for v in others):
        for v in node.inputs:
            held = c.layout(v)
            if held is not None:
                c.limit(held.labels, node, "compares with what is not scaled", scale=NONE)
    labels = merge(c, node, range(len(node.inputs)))
    if labels is not None:
        text = f"{node.op_type} keeps only positive factors of single channels"
        c.limit(labels, node, text, scale=POSITIVE, rotate=NONE)


def merge(c: Channels, node: ir.Node, indices: range | tuple[int, ...]) -> Labels | None:
    """The common part of Add and its kind; returns the labels of the sum, if any input is followed."""
    tracked = [(i, h) for i in indices if (h := c.layout(node.inputs[i])) is not None]
    if not tracked:
        return None
    rank = max(h.labels.ndim for _, h in tracked)
    for i in indices:
        rank = max(rank, c.rank(node.inputs[i]) or 0)
    held = [padded(h.labels, rank) for _, h in tracked]
    held = one_to_all(c, node, held)
    try:
        shape = np.broadcast_shapes(*(a.shape for a in held))
    except ValueError:
        for each in held:
            c.pin(each, node, "adds channels of different numbers")
        return None
    for each in held[1:]:
        c.tie(held[0], each)
    labels = np.broadcast_to(max(held, key=lambda a: a.size), shape)
    for i in indices:
        v = node.inputs[i]
        if v is None or c.layout(v) is not None:
            continue
        copied = expanded(c, v, labels)
        if graph.is_constant(v):
            if number(v) != 0 and not (c.kind == "permute" and not c.varies(v, labels)):
                c.add("rider", node, i, labels)
        elif copied is not None:
            c.add("rider", copied, 0, labels)
        elif c.varies(v, labels):
            c.pin(labels, node, f"adds {v.name!r}, which is not transformed")
        else:
            text = f"adds {v.name!r}, the same to all channels"
            c.limit(labels, node, text, scale=NONE, rotate=MEAN)
    c.put(node.outputs[0], labels)
    return labels


def one_to_all(c: Channels, node: ir.Node, held: list[Labels]) -> list[Labels]:
    """Those with several channels; a single channel that is added to all of them stays as it is."""
    wide = [a for a in held if a.size > 1]
    if not wide or len(wide) == len(held):
        return held
    for each in held:
        if each.size == 1:
            c.pin(each, node, "is added to every channel of another activation")
        else:
            text = "adds another activation, the same to all channels"
            c.limit(each, node, text, scale=NONE, rotate=MEAN)
    return wide


def expanded(c: Channels, v: ir.Value, labels: Labels) -> ir.Node | None:
    """The Expand that copies a constant with channels (a class token) to `v`, if nothing else takes `v`."""
    node = v.producer()
    if node is None or node.op_type != "Expand" or node.domain != "" or v.is_graph_output():
        return None
    is_own = graph.is_constant(node.inputs[0]) and len(v.uses()) == 1
    return node if is_own and c.varies(v, labels) else None


@rule("Mul")
def multiply(c: Channels, node: ir.Node) -> None:
    """Product: a constant vector ends a scale and begins another; of two activations one carries the scale."""
    for index in (0, 1):
        if graph.is_constant(node.inputs[index]):
            by_constant(c, node, 1 - index, index)
            return
    a, b = node.inputs
    x, y = c.layout(a), c.layout(b)
    assert a is not None and b is not None
    if a is b and x is not None:
        square(c, node)
    elif x is not None and y is not None:
        _both(c, node)
    elif x is not None or y is not None:
        held, other = (x, b) if x is not None else (y, a)
        assert held is not None
        labels = padded(held.labels, max(held.labels.ndim, c.rank(other) or 0))
        _by_activation(c, node, labels, other, "multiplies")
        c.put(node.outputs[0], labels)


def _by_activation(c: Channels, node: ir.Node, labels: Labels, other: ir.Value, verb: str) -> None:
    """A factor that is not followed: where it differs between heads, each head is on its own."""
    wide = [a for a, n in enumerate(labels.shape) if n > 1]
    along = [a for a in wide if c.varies(other, labels, only=a)]
    if not along or along[-1] != wide[-1]:
        c.part(labels, along)
        return
    text = f"{verb} by {other.name!r}, which differs between channels"
    c.limit(labels, node, text, permute=NONE, rotate=NONE)


def _both(c: Channels, node: ir.Node) -> None:
    held = [h.labels for v in node.inputs if (h := c.layout(v)) is not None]
    rank = max(a.ndim for a in held)
    a, b = (padded(each, rank) for each in held)
    if (a.size == 1) != (b.size == 1):
        one, wide = (a, b) if a.size == 1 else (b, a)
        c.pin(one, node, "multiplies every channel of another activation")
        c.put(node.outputs[0], wide)
        return
    if c.kind == "scale":
        # s_a s_b would tie three unknowns; with one of them fixed it is a tie of two.
        if c.level(a) != NONE and c.level(b) != NONE:
            text = "multiplies two activations; the scale is the other one's"
            c.limit(a, node, text, scale=NONE)
        if c.level(a) != NONE:
            a, b = b, a
        try:
            c.put(node.outputs[0], np.broadcast_to(b, np.broadcast_shapes(a.shape, b.shape)))
        except ValueError:
            c.pin(b, node, "multiplies channels of different numbers")
        return
    merge(c, node, (0, 1))
    c.limit(c.layouts[node.outputs[0]].labels, node, "multiplies two activations", rotate=NONE)


def square(c: Channels, node: ir.Node) -> None:
    """X²: the sum of squares is what a rotation keeps, so it may go on to a reduction."""
    held = c.layout(node.inputs[0])
    if held is not None:
        c.limit(held.labels, node, "squares its channels", scale=NONE)
        c.put(node.outputs[0], held.labels, is_square=c.kind == "rotate")


@rule("Pow")
def power(c: Channels, node: ir.Node) -> None:
    """x^2 may end in a norm; other powers are not linear."""
    if number(node.inputs[1]) == 2.0:
        square(c, node)
        return
    for v in node.inputs:
        held = c.layout(v)
        if held is not None:
            permute = ANY if is_number(node.inputs[1]) else NONE
            c.limit(held.labels, node, "a power", permute=permute, scale=NONE, rotate=NONE)
            c.put(node.outputs[0], held.labels)


@rule("Div")
def divide(c: Channels, node: ir.Node) -> None:
    """Quotient: like Mul for the numerator; a denominator with channels stays as it is."""
    a, b = node.inputs
    assert a is not None and b is not None
    x, y = c.layout(a), c.layout(b)
    if y is not None:
        c.pin(y.labels, node, "is a denominator")
        if x is not None:
            c.pin(x.labels, node, f"divides by {b.name!r}, which differs between channels")
        return
    if x is None:
        return
    if graph.is_constant(b):
        by_constant(c, node, 0, 1, is_division=True)
        return
    labels = padded(x.labels, max(x.labels.ndim, c.rank(b) or 0))
    _by_activation(c, node, labels, b, "divides")
    c.put(node.outputs[0], labels)


def by_constant(
    c: Channels, node: ir.Node, index: int, constant: int, *, is_division: bool = False
) -> None:
    """An activation times (or by) a constant."""
    x, factor = node.inputs[index], node.inputs[constant]
    assert factor is not None and factor.const_value is not None
    held, out = c.layout(x), node.outputs[0]
    dims = tuple(factor.const_value.shape.numpy())
    if held is None:
        wide = [i for i, d in enumerate(dims) if d > 1]
        rank = c.rank(x)
        if c.kind != "rotate" and len(wide) == 1 and rank is not None and not is_division:
            labels = c.fresh([d if i == wide[0] else 1 for i, d in enumerate(dims)])
            c.add("writer" if c.kind == "scale" else "rider", node, constant, labels)
            c.put(out, padded(labels, max(rank, len(dims))))
        return
    labels = padded(held.labels, max(held.labels.ndim, len(dims)))
    if not c.varies(factor, labels):
        c.put(out, labels, is_square=held.is_square and is_number(factor))
    elif c.kind == "scale":
        c.add("reader", node, constant, labels, is_inverse=not is_division)
        after = c.fresh(labels.shape)
        c.add("writer", node, constant, after, is_inverse=is_division)
        c.put(out, after)
    elif c.kind == "permute":
        c.add("rider", node, constant, labels)
        c.put(out, labels)
    else:
        if not is_uniform(factor):
            gain(c, node, constant, labels, is_division=is_division)
        c.put(out, labels)


def gain(
    c: Channels, node: ir.Node, constant: int, labels: Labels, *, is_division: bool = False
) -> None:
    """A factor per channel commutes with no rotation; it may be able to move into the readers."""
    held = graph.small_array(node.inputs[constant])
    if is_division or held is None:
        c.limit(labels, node, "divides channel by channel", rotate=NONE)
    elif not np.isfinite(held).all() or not held.all():
        c.limit(labels, node, "its gain is zero or infinite in some channel", rotate=NONE)
    else:
        c.gains.append(Gain(node, constant, labels))


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(c: Channels, node: ir.Node) -> None:
    """Not linear, along whatever axis."""
    held = c.layout(node.inputs[0])
    if held is not None:
        c.limit(held.labels, node, f"{node.op_type} is not linear", scale=NONE, rotate=NONE)
        c.put(node.outputs[0], held.labels)
