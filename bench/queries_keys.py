"""Queries and keys: outliers in them, and rounding them as a kernel for products of two activations would.

No target of qgraph computes such a product on codes, so what a width costs there can only be simulated:

    Q → MatMul      becomes      Q → round(Q / s) clipped to ±L → · s → MatMul        L = 127 for 8 bits, 7 for 4

with one scale s = max|Q| / L over the samples for each input of each product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph
from qgraph import files, graph, online_scores, registry
from qgraph.pipeline import Context
from qgraph.recipe import Recipe


def large_keys(model: ir.Model, head_dim: int, factor: float = 30.0) -> None:
    """One rotary pair of every key times `factor`, that of the queries divided: the scores stay.

    Args:
        model: as the zoo's decoders are named; changed in place.
        head_dim: channels of a head, of which i and i + head_dim / 2 are turned together.
        factor: of the keys.
    """
    for name, value in model.graph.initializers.items():
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            continue
        stored = graph.array(value)
        w = stored.reshape(len(stored), -1, head_dim).copy()
        w[..., [1, 1 + head_dim // 2]] *= factor if name.endswith("k_proj.weight") else 1 / factor
        value.const_value = ir.tensor(w.reshape(stored.shape), name=name)


def round_products(source: Any, model: ir.Model, samples: list[dict[str, Any]], bits: int) -> None:
    """Round both inputs of every product of queries and keys.

    Args:
        source: the float model that was quantized, or its path, where these products are looked for.
        model: changed in place; its nodes still have the names of `source`.
        samples: for the scales.
        bits: of queries and keys.
    """
    float_model = graph.clone(source) if isinstance(source, ir.Model) else files.load(source)
    ctx = Context(registry.get("target", "ort-qgraph"), Recipe.default())
    registry.get("pass", "canonicalize")().run(float_model, ctx)
    names = {p.node.name for p in online_scores.find(float_model, 128)}
    held = [n for n in model.graph if n.name in names]
    if not held or len(held) < len(names):
        raise ValueError(f"{len(held)} of {len(names)} products are left in the model")
    inputs = list(dict.fromkeys(v for n in held for v in n.inputs if v is not None))
    limit = float(2 ** (bits - 1) - 1)
    for v, largest in zip(inputs, _largest(model, inputs, samples), strict=True):
        _round(model, v, held, largest / limit, limit)


def _largest(model: ir.Model, values: list[ir.Value], samples: list[dict[str, Any]]) -> list[float]:
    """max|v| over the samples."""
    watched = graph.clone(model)
    found = {v.name: v for n in watched.graph for v in n.outputs}
    own = [found[v.name] for v in values]
    for v in own:
        v.dtype = ir.DataType.FLOAT
    watched.graph.outputs[:] = own
    session = qgraph.session(watched)
    runs = [[np.abs(y).max() for y in session.run(None, feed)] for feed in samples]
    return [float(m) for m in np.max(runs, axis=0)]


def _round(
    model: ir.Model, v: ir.Value, readers: list[ir.Node], scale: float, limit: float
) -> None:
    names = graph.Names(model)
    numbers = [
        graph.add_initializer(model.graph, names(f"{v.name}.{key}"), np.array(x, np.float32))
        for key, x in (("scale", scale), ("low", -limit), ("high", limit))
    ]
    first = next(n for n in model.graph if n in readers and v in n.inputs)
    x = v
    for op, extra in (
        ("Div", numbers[:1]),
        ("Round", []),
        ("Clip", numbers[1:]),
        ("Mul", numbers[:1]),
    ):
        out = graph.value(names(f"{v.name}.{op}"))
        graph.add_node(first, op, [x, *extra], [out], name=names(f"{v.name}.rounded.{op}"))
        x = out
    for node in readers:
        for index, held in enumerate(node.inputs):
            if held is v:
                node.replace_input_with(index, x)
