"""Outliers that keep the function: some channels are multiplied by a factor, and what reads them is divided by it.

Such models are hard to quantize for no reason that is in the function, so that what smoothing and rotation are worth
can be read off: they have to come out as good as the model without outliers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph, registry, symmetry
from qgraph.pipeline import Context
from qgraph.recipe import Recipe
from qgraph.symmetry import Group

FACTOR, COUNT = 30.0, 4
NORMS = ("Mul", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def canonical(model: ir.Model) -> ir.Model:
    """A copy of the model as `canonicalize` leaves it."""
    work = graph.clone(model)
    ctx = Context(registry.get("target", "ort"), Recipe.default())
    registry.get("pass", "canonicalize")().run(work, ctx)
    return work


def inject(
    model: ir.Model, kind: str, *, factor: float = FACTOR, count: int = COUNT, seed: int = 5
) -> tuple[ir.Model, int]:
    """A stressed copy, and how many groups of channels got outliers.

    Args:
        model: not changed.
        kind: "norms": gains of norms (where the stream takes a norm's output too, a Mul divides it there); "values":
            values of attention and hidden units behind a gate; "channels": outputs of convolutions.
        factor: of the outliers.
        count: outliers per group.
        seed: of their places.
    """
    work = canonical(model)
    if kind == "norms":
        _part_streams(work)
    rng = np.random.default_rng(seed)
    changed = 0
    for group in symmetry.groups(work, ["scale"]):
        if group.legal and _KINDS[kind](group) and not symmetry.would_copy(group):
            s = np.ones(group.size)
            s[rng.permutation(group.size)[:count]] = factor
            symmetry.scale(work, group, s)
            changed += 1
    return work, changed


def _part_streams(model: ir.Model) -> None:
    """Between a norm's output and what adds it (a post-norm stream) goes a Mul by ones, which can take a factor."""
    names = graph.Names(model)
    for node in [n for n in model.graph if n.op_type in NORMS[1:]]:
        out = node.outputs[0]
        others = [(n, i) for n, i in out.uses() if n.op_type == "Add"]
        gain = node.inputs[1]
        if not others or gain is None:
            continue
        ones = graph.add_initializer(
            model.graph, names(f"{out.name}.one"), np.ones_like(graph.array(gain))
        )
        first = min(others, key=lambda use: list(model.graph).index(use[0]))[0]
        made = graph.value(names(f"{out.name}.part"), out.dtype, out.shape)
        graph.add_node(first, "Mul", [out, ones], [made], name=names(f"{node.name}.part"))
        for user, index in others:
            user.replace_input_with(index, made)


def _is_norm(group: Group) -> bool:
    """One norm's gain begins these channels."""
    return len(group.writers) == 1 and group.writers[0].node.op_type in NORMS


def _is_value(group: Group) -> bool:
    """A linear makes them, and one without a product with another activation between (a gate) reads them."""
    linear = ("MatMul", "Gemm")
    return all(m.node.op_type in linear for m in (*group.writers, *group.readers))


def _is_convolution(group: Group) -> bool:
    return all(m.node.op_type == "Conv" for m in group.writers)


_KINDS = {"norms": _is_norm, "values": _is_value, "channels": _is_convolution}
