"""Mean errors of operators from the statistics of folded BatchNormalization, without data.

    E[Ŵ x - W x] = (Ŵ - W) E[x]

x is normal with mean β and deviation |γ| where a normalisation was folded, and what Relu and Clip make of that; sums
and averages of such tensors follow. Nagel et al., 2019 (arXiv:1906.04721, 4.2 and appendix C). What the grid of x adds
is left out, and so are borders, where padding makes sums smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, normalized

if TYPE_CHECKING:
    from qgraph.passes.correct_bias import Rounded

Doubles = npt.NDArray[np.float64]
Moments = tuple[Doubles, Doubles | None]  # means [C] and variances [C], None where they are unknown
_erf = np.vectorize(math.erf, otypes=[np.float64])


def mean_errors(model: ir.Model, found: Iterable[Rounded]) -> dict[str, Doubles]:
    """By operator, what the rounding of its weight adds to the mean of each output channel [C], where it is known."""
    moments = of_model(model)
    errors = {}
    for each in found:
        node = each.use.node
        x = node.inputs[0]
        if x in moments:
            added = _through(node, each.rounded() - each.plain(), moments[x][0])
            if added is not None:
                errors[each.output] = added
    return errors


def of_model(model: ir.Model) -> dict[ir.Value, Moments]:
    """Mean and variance of the channels of values of the main graph, as far as normalisations tell."""
    known: dict[ir.Value, Moments] = {}
    for node in model.graph:
        held: Moments | None = normalized.recall(node)
        if held is None and not node.domain:
            held = _passed(node, [known.get(v) if v is not None else None for v in node.inputs])
        if held is not None:
            known[node.outputs[0]] = held
    return known


def clipped_normal(mean: Doubles, variance: Doubles, low: float, high: float) -> Moments:
    """Mean and variance of a normal variable clipped to [low, high]; either end may be infinite.

    >>> mean, variance = clipped_normal(np.zeros(1), np.ones(1), 0.0, math.inf)
    >>> [round(float(x[0]), 4) for x in (mean, variance)]
    [0.3989, 0.3408]
    """
    deviation = np.sqrt(np.maximum(variance, 1e-30))
    first, second = np.zeros_like(mean), np.zeros_like(mean)
    below, density = [], []
    for end in (low, high):
        at = (end - mean) / deviation
        below.append((1 + _erf(at / math.sqrt(2))) / 2)
        density.append(np.exp(-np.square(at) / 2) / math.sqrt(2 * math.pi))
        share = below[0] if end == low else 1 - below[1]
        if math.isfinite(end):
            first += end * share
            second += end * end * share
            slope = deviation * density[-1] * (end + mean)
            second += slope if end == low else -slope
    inside = below[1] - below[0]
    first += mean * inside - deviation * (density[1] - density[0])
    second += (mean**2 + deviation**2) * inside
    return first, np.maximum(second - first**2, 0)


def _passed(node: ir.Node, inputs: list[Moments | None]) -> Moments | None:
    """What an operator makes of the moments of its inputs."""
    x = inputs[0] if inputs else None
    if x is None:
        return None
    mean, variance = x
    if node.op_type in ("Relu", "Clip"):
        bounds = (0.0, math.inf) if node.op_type == "Relu" else _bounds(node)
        if variance is None or bounds is None:
            return None
        return clipped_normal(mean, variance, *bounds)
    if node.op_type == "Add":
        other = inputs[1]
        if other is None or other[0].size != mean.size:
            return None
        is_whole = variance is not None and other[1] is not None
        return mean + other[0], variance + other[1] if is_whole else None  # type: ignore[operator]
    if node.op_type == "AveragePool" and not any(graph.attribute(node, "pads", None) or ()):
        return mean, None
    # Flattened, channels stay in place only where each is a single value: those have known means and no variance.
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    is_single = source is not None and source.op_type == "GlobalAveragePool"
    if node.op_type == "GlobalAveragePool" or (node.op_type == "Flatten" and is_single):
        return mean, None
    return (mean, variance) if node.op_type in ("Identity", "Dropout") else None


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """What Clip clips to; None where that is not constant."""
    ends = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        v = node.inputs[index] if index < len(node.inputs) else None
        held = graph.small_array(v) if v is not None else None
        if v is not None and held is None:
            return None
        ends.append(float(graph.attribute(node, name, default) if held is None else held.item()))
    return ends[0], ends[1]


def _through(node: ir.Node, error: npt.NDArray[Any], mean: Doubles) -> Doubles | None:
    """Send means [C] of the input through an error of the weight: [M], or None where they do not fit."""
    error = error.astype(np.float64)
    if node.op_type == "Conv":
        groups = graph.attribute(node, "group", 1)
        taps = error.reshape(groups, error.shape[0] // groups, error.shape[1], -1).sum(axis=-1)
        if mean.size != groups * error.shape[1]:
            return None
        return np.asarray(np.einsum("gmc,gc->gm", taps, mean.reshape(groups, -1)).reshape(-1))
    if node.op_type == "Gemm" and not graph.attribute(node, "transA", 0):
        matrix = error if graph.attribute(node, "transB", 0) else error.T
        return matrix @ mean if matrix.shape[1] == mean.size else None
    return None
