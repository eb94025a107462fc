"""What a folded BatchNormalization said of its outputs: channel means β and deviations |γ|, kept with the operator.

Training brings each channel behind the normalisation to mean β and deviation |γ|, so both are statistics of its outputs
that need no data. Folding makes β and γ part of weight and bias, where they cannot be told apart any more; so they are
written into the metadata of the operator, beside a digest of its bias. Who scales, permutes or moves the output's
channels later changes the bias, and what was written is void.
"""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph

Doubles = npt.NDArray[np.float64]
_KEY = "ai.qgraph.batch_norm"


def record(node: ir.Node, mean: Doubles, deviation: Doubles) -> None:
    """Write means [C] and deviations [C] of the outputs of an operator with a constant bias into its metadata."""
    numbers = np.stack([mean, deviation]).astype("<f4").tobytes()
    node.metadata_props[_KEY] = f"{_digest(node)} {base64.b64encode(numbers).decode()}"


def recall(node: ir.Node) -> tuple[Doubles, Doubles] | None:
    """What was written, as means [C] and variances [C]; None where there is nothing, or nothing that still holds."""
    digest, _, numbers = node.metadata_props.get(_KEY, "").partition(" ")
    if not numbers or digest != _digest(node):
        return None
    mean, deviation = np.frombuffer(base64.b64decode(numbers), "<f4").reshape(2, -1)
    return mean.astype(np.float64), np.square(deviation, dtype=np.float64)


def forget(model: ir.Model) -> bool:
    """Remove what was written; True where there was something."""
    held = [n.metadata_props.pop(_KEY, None) for n in graph.nodes(model)]
    return any(h is not None for h in held)


def _digest(node: ir.Node) -> str:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or not graph.is_constant(bias):
        return ""
    return hashlib.sha256(graph.array(bias).tobytes()).hexdigest()[:16]
