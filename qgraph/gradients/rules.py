"""How a gradient goes back through one operator: vector-Jacobian products, one rule for each, all in one table.

A rule gets the operator's inputs and outputs and, for each output, dL/dy; it gives dL/dx for each input that is wanted.
Formulas are those of the operator's definition in the ONNX standard, differentiated; with x read and y given by it,
`g` is dL/dy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph

Array: TypeAlias = npt.NDArray[Any]
Gradients: TypeAlias = Sequence[Any]  # arrays; None where there is no gradient


@dataclass(frozen=True, slots=True)
class Site:
    """One run of one operator.

    Attributes:
        node: the operator.
        x: its inputs, None where one is left out.
        y: its outputs.
        wanted: which inputs' gradients are asked for.
    """

    node: ir.Node
    x: Sequence[Array]
    y: Sequence[Array]
    wanted: Sequence[bool]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the operator."""
        return graph.attribute(self.node, name, default)

    def axes(self, index: int = 1) -> tuple[int, ...] | None:
        """Axes that are an attribute in older opsets and an input in later ones; None where they are not given."""
        found = self.attribute("axes")
        if found is None and len(self.x) > index and self.x[index] is not None:
            found = self.x[index].reshape(-1)
        return None if found is None else tuple(int(a) for a in found)


Rule: TypeAlias = Callable[[Site, Gradients], Gradients]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of operators of the ONNX domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def of_shape(g: Array, shape: Sequence[int]) -> Array:
    """Sum a gradient over the axes along which the input was broadcast."""
    lead = g.ndim - len(shape)
    if lead:
        g = g.sum(axis=tuple(range(lead)))
    spread = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
    return g.sum(axis=spread, keepdims=True) if spread else g


def pointwise(name: str, slope: Callable[[Site, Array, Array], Array]) -> None:
    """The rule of an operator of one input that works on each element: dL/dx = g * slope(x, y)."""

    def back(site: Site, g: Gradients) -> Gradients:
        return [g[0] * slope(site, site.x[0], site.y[0])]

    RULES[name] = back


pointwise("Neg", lambda _, x, y: np.full_like(x, -1))
pointwise("Abs", lambda _, x, y: np.sign(x))
pointwise("Sqrt", lambda _, x, y: 0.5 / y)
pointwise("Reciprocal", lambda _, x, y: -y * y)
pointwise("Exp", lambda _, x, y: y)
pointwise("Log", lambda _, x, y: 1 / x)
pointwise("Sin", lambda _, x, y: np.cos(x))
pointwise("Cos", lambda _, x, y: -np.sin(x))
pointwise("Tanh", lambda _, x, y: 1 - y * y)
pointwise("Sigmoid", lambda _, x, y: y * (1 - y))
pointwise("Softplus", lambda _, x, y: -np.expm1(-y))
pointwise("Erf", lambda _, x, y: (2 / math.sqrt(math.pi)) * np.exp(-x * x))
pointwise("Relu", lambda _, x, y: (x > 0).astype(x.dtype))
pointwise(
    "LeakyRelu", lambda s, x, y: np.where(x < 0, s.attribute("alpha", 0.01), 1).astype(x.dtype)
)
pointwise("Elu", lambda s, x, y: np.where(x < 0, y + s.attribute("alpha", 1.0), 1).astype(x.dtype))
pointwise("HardSwish", lambda _, x, y: np.where(np.abs(x) < 3, x / 3 + 0.5, x > 0).astype(x.dtype))


@rule("HardSigmoid")
def _hard_sigmoid(site: Site, g: Gradients) -> Gradients:
    return [g[0] * ((site.y[0] > 0) & (site.y[0] < 1)) * np.float32(site.attribute("alpha", 0.2))]


@rule("Gelu")
def _gelu(site: Site, g: Gradients) -> Gradients:
    x = site.x[0]
    if site.attribute("approximate", "none") == "tanh":
        root = math.sqrt(2 / math.pi)
        t = np.tanh(root * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)
        return [g[0] * slope.astype(x.dtype)]
    # y = x Φ(x), so y' = Φ(x) + x φ(x); Φ(x) = y / x, and 1/2 at 0.
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    share = np.divide(site.y[0], x, out=np.full_like(x, 0.5), where=np.abs(x) > 1e-4)
    return [g[0] * (share + x * density).astype(x.dtype)]


@rule("Clip", "Min", "Max")
def _bounded(site: Site, g: Gradients) -> Gradients:
    """The gradient goes to the input that came through; half to each of two that are equal would be no better."""
    found: list[Array | None] = []
    taken = np.zeros(site.y[0].shape, bool)
    for x, wanted in zip(site.x, site.wanted, strict=True):
        here = np.equal(x, site.y[0]) & ~taken if x is not None else taken
        taken = taken | here
        found.append(of_shape(g[0] * here, x.shape) if wanted else None)
    return found


@rule("Add")
def _add(site: Site, g: Gradients) -> Gradients:
    return [
        of_shape(g[0], x.shape) if w else None for x, w in zip(site.x, site.wanted, strict=True)
    ]


@rule("Sub")
def _sub(site: Site, g: Gradients) -> Gradients:
    a, b = site.x
    return [of_shape(g[0], a.shape), of_shape(-g[0], b.shape) if site.wanted[1] else None]


@rule("Mul")
def _mul(site: Site, g: Gradients) -> Gradients:
    a, b = site.x
    return [
        of_shape(g[0] * b, a.shape) if site.wanted[0] else None,
        of_shape(g[0] * a, b.shape) if site.wanted[1] else None,
    ]


@rule("Div")
def _div(site: Site, g: Gradients) -> Gradients:
    a, b = site.x
    return [
        of_shape(g[0] / b, a.shape) if site.wanted[0] else None,
        of_shape(-g[0] * site.y[0] / b, b.shape) if site.wanted[1] else None,
    ]


@rule("Pow")
def _pow(site: Site, g: Gradients) -> Gradients:
    x, power = site.x
    # An exponent that is wanted would need log(x): it is a constant wherever networks have one.
    return [of_shape(g[0] * power * x ** (power - 1), x.shape).astype(x.dtype), None]


@rule("Where")
def _where(site: Site, g: Gradients) -> Gradients:
    condition, a, b = site.x
    return [
        None,
        of_shape(g[0] * condition, a.shape) if site.wanted[1] else None,
        of_shape(g[0] * ~condition, b.shape) if site.wanted[2] else None,
    ]


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Dropout")
def _same_elements(site: Site, g: Gradients) -> Gradients:
    x = site.x[0]
    return [g[0].reshape(x.shape).astype(x.dtype, copy=False), *[None] * (len(site.x) - 1)]


@rule("Transpose")
def _transpose(site: Site, g: Gradients) -> Gradients:
    order = site.attribute("perm") or range(g[0].ndim)[::-1]
    return [g[0].transpose(np.argsort(order))]


@rule("Expand")
def _expand(site: Site, g: Gradients) -> Gradients:
    return [of_shape(g[0], site.x[0].shape), None]


@rule("Concat")
def _concat(site: Site, g: Gradients) -> Gradients:
    axis = site.attribute("axis")
    ends = np.cumsum([x.shape[axis] for x in site.x])[:-1]
    return list(np.split(g[0], ends, axis=axis))


@rule("Split")
def _split(site: Site, g: Gradients) -> Gradients:
    parts = [np.zeros_like(y) if part is None else part for y, part in zip(site.y, g, strict=True)]
    return [np.concatenate(parts, axis=site.attribute("axis", 0)), *[None] * (len(site.x) - 1)]


@rule("Slice")
def _slice(site: Site, g: Gradients) -> Gradients:
    x, starts, ends = site.x[:3]
    axes = site.axes(3) or range(len(starts))
    steps = (
        site.x[4] if len(site.x) > 4 and site.x[4] is not None else np.ones(len(starts), np.int64)
    )
    place = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # An end before the first element, going backwards, is none in Python.
        stop = None if step < 0 and end < -x.shape[axis] else int(end)
        place[axis] = slice(int(start), stop, int(step))
    whole = np.zeros_like(x)
    whole[tuple(place)] = g[0]
    return [whole, *[None] * (len(site.x) - 1)]


@rule("Gather")
def _gather(site: Site, g: Gradients) -> Gradients:
    x, indices = site.x
    axis = site.attribute("axis", 0) % x.ndim
    whole = np.zeros_like(x)
    lead = (slice(None),) * axis
    np.add.at(whole, (*lead, indices), g[0])
    return [whole, None]


@rule("ReduceSum", "ReduceMean")
def _reduce(site: Site, g: Gradients) -> Gradients:
    x = site.x[0]
    axes = site.axes()
    if not axes and site.attribute("noop_with_empty_axes", 0):
        return [g[0], *[None] * (len(site.x) - 1)]
    along = tuple(a % x.ndim for a in axes) if axes else tuple(range(x.ndim))
    kept = tuple(1 if i in along else size for i, size in enumerate(x.shape))
    share = math.prod(x.shape[i] for i in along) if site.node.op_type == "ReduceMean" else 1
    spread = np.broadcast_to(g[0].reshape(kept) / x.dtype.type(share), x.shape)
    return [spread, *[None] * (len(site.x) - 1)]


@rule("Softmax")
def _softmax(site: Site, g: Gradients) -> Gradients:
    y, axis = site.y[0], site.attribute("axis", -1)
    return [y * (g[0] - (g[0] * y).sum(axis=axis, keepdims=True))]


@rule("LogSoftmax")
def _log_softmax(site: Site, g: Gradients) -> Gradients:
    axis = site.attribute("axis", -1)
    return [g[0] - np.exp(site.y[0]) * g[0].sum(axis=axis, keepdims=True)]


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _norm(site: Site, g: Gradients) -> Gradients:
    """Of y = n gain + bias, n = (x - mean) / deviation: dx = (h - mean(h) - n mean(h n)) / deviation, h = g gain.

    Without the means of x and h where the norm is by the root of the mean square.
    """
    x, gain = site.x[0], site.x[1]
    axis = site.attribute("axis", -1) % x.ndim
    along, before = tuple(range(axis, x.ndim)), tuple(range(axis))
    is_centred = site.node.op_type == "LayerNormalization"
    centred = x - x.mean(axis=along, keepdims=True) if is_centred else x
    power = (centred * centred).mean(axis=along, keepdims=True)
    inverse = 1 / np.sqrt(power + x.dtype.type(site.attribute("epsilon", 1e-5)))
    n = centred * inverse
    h = g[0] * gain
    dx = h - n * (h * n).mean(axis=along, keepdims=True)
    if is_centred:
        dx -= h.mean(axis=along, keepdims=True)
    found: list[Array | None] = [dx * inverse]
    found.append((g[0] * n).sum(axis=before).reshape(gain.shape) if site.wanted[1] else None)
    if len(site.x) > 2:
        is_wanted = site.wanted[2]
        found.append(g[0].sum(axis=before).reshape(site.x[2].shape) if is_wanted else None)
    return found


@rule("MatMul")
def _matmul(site: Site, g: Gradients) -> Gradients:
    a, b = site.x
    dy = g[0]
    # Vectors count as matrices of one row or column.
    if b.ndim == 1:
        dy = dy[..., None]
    if a.ndim == 1:
        dy = dy[..., None, :]
    left = a if a.ndim > 1 else a[None]
    right = b if b.ndim > 1 else b[:, None]
    da = db = None
    if site.wanted[0]:
        da = of_shape(dy @ right.swapaxes(-1, -2), left.shape).reshape(a.shape)
    if site.wanted[1]:
        if right.ndim == 2:
            # One product over all rows, rather than one for each item of the batch and a sum.
            db = left.reshape(-1, left.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
        else:
            db = of_shape(left.swapaxes(-1, -2) @ dy, right.shape)
        db = db.reshape(b.shape)
    return [da, db]


@rule("Gemm")
def _gemm(site: Site, g: Gradients) -> Gradients:
    a, b = site.x[:2]
    turned = site.attribute("transA", 0), site.attribute("transB", 0)
    dy = g[0] * g[0].dtype.type(site.attribute("alpha", 1.0))
    left, right = (x.T if t else x for x, t in zip((a, b), turned, strict=True))
    da = dy @ right.T if site.wanted[0] else None
    db = left.T @ dy if site.wanted[1] else None
    found = [x.T if t and x is not None else x for x, t in zip((da, db), turned, strict=True)]
    if len(site.x) > 2:
        beta = g[0].dtype.type(site.attribute("beta", 1.0))
        found.append(of_shape(g[0] * beta, site.x[2].shape) if site.wanted[2] else None)
    return found
