"""cleanup: remove what nothing uses any more and put the rest in a fixed order, so that equal runs give equal bytes."""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph, normalized
from qgraph.pipeline import Context, Keeps, Pass
from qgraph.registry import register


@register
class Cleanup(Pass):
    """Drop dead nodes, initializers, functions and opset imports; sort initializers; forget what canonicalize noted."""

    name = "cleanup"
    keeps = Keeps.BIT_EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Clean `model` in place."""
        removed = graph.remove_dead(model)
        graph.sort_initializers(model)
        return normalized.forget(model) or removed > 0
