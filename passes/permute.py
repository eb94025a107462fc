"""permute: sort channels by size, so that large ones share the groups in which weights and activations are quantized.

A group of 32 columns has one scale: one large channel among 31 small ones makes those coarse. Sorted, outliers lie
together (RPTQ, arXiv 2304.01089; DuQuant, arXiv 2406.01721). The order folds into the weights, so it costs nothing;
where it is legal is found by `qgraph.symmetry`. Channels of attention heads stay within their head.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, symmetry
from qgraph.channel_rows import channel_rows
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.registry import register
from qgraph.symmetry import Group

Floats = npt.NDArray[np.float64]


@register
class Permute(Pass):
    """Reorder channels by their largest value on the data, or by their readers' weights without data."""

    name = "permute"
    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.STATS})
    keeps = Keeps.FLOAT_EQUAL

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Permute `model` in place."""
        found = [g for g in symmetry.groups(model, ["permute"]) if g.legal and g.readers]
        samples = channel_rows(model, found, ctx)
        changed = False
        for number, group in enumerate(found):
            ctx.progress(f"permuting {group.name}", number / len(found))
            rows = samples.get(number)
            size = _by_weights(group) if rows is None else np.abs(rows).max(axis=0)
            order = np.argsort(-size.reshape(group.blocks.shape), axis=1, kind="stable")
            if (order == np.arange(group.block)).all():
                continue
            symmetry.permute(model, group, order, spool=ctx.spool)
            changed = True
            ctx.report("note", "QG214", group.name, f"{group.size} channels sorted by size")
        return changed


def _by_weights(group: Group) -> Floats:
    """Largest absolute weight that reads each channel [group.size]."""
    size = np.zeros(group.size)
    for member in group.readers:
        at = group.positions(member)
        held = np.abs(np.asarray(graph.array(member.value), np.float64))
        wide = np.broadcast_to(at, np.broadcast_shapes(at.shape, held.shape))
        held = np.broadcast_to(held, wide.shape)
        np.maximum.at(size, wide[wide >= 0], held[wide >= 0])
    return size
