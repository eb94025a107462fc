"""observe: run the model on the data and remember what its activations are like. Nothing in the graph changes.

The grids themselves are chosen later (`qgraph.observers.choose`), when it is known which values share one and of which
type they are; `method` and its options travel with the statistics.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from qgraph import activations, calibrate, graph, samples
from qgraph.observers import Choice, Stats, Wanted
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
# Integer kernels exist for these, or they pass codes on unchanged, so their inputs and outputs may need grids.
CARRIERS = frozenset(
    {
        "Add", "AveragePool", "Clip", "Concat", "Flatten", "Gather", "GlobalAveragePool", "Identity", "LeakyRelu",
        "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze",
        "Sub", "Transpose", "Unsqueeze", "Upsample",
    }
)  # fmt: skip
# Those that ONNX Runtime hands over as arrays.
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@register
class Observe(Pass):
    """Collect statistics of activations on the data."""

    name = "observe"
    needs = frozenset({Fact.CANONICAL})
    gives = frozenset({Fact.STATS})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """How ranges are chosen, and what calibration may use."""

        method: Literal["mse", "min-max", "moving-average", "percentile", "entropy"] = "mse"
        """How the range of an activation is chosen."""
        percentile: float = 99.99
        """Share of values that method "percentile" covers, in percent."""
        clip_sentinels: bool = False
        """Leave masked logits and infinities out of the range, instead of keeping such tensors float."""
        max_memory: int = 32
        """MiB of activations alive at once; where that is too little the model runs several times."""
        cache: str = ""
        """Folder of earlier results, keyed by model, data and observers; "" keeps none."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.stats`."""
        options = self.options_as(Observe.Options)
        names = _wanted(model, ctx)
        if not names and ctx.data is None:  # all that could have a grid arrived with one
            ctx.stats = Stats(
                {}, Choice(options.method, options.percentile, options.clip_sentinels)
            )
            return False
        dataset = samples.require(model, ctx, "observe", "calibration needs samples")
        choice = Choice(options.method, options.percentile, options.clip_sentinels)
        stats = calibrate.run(
            model,
            dataset,
            dict.fromkeys(names, Wanted()),
            threads=ctx.threads,
            max_memory=options.max_memory << 20,
            progress=ctx.progress,
            cache=options.cache or None,
            on_cached=lambda path: ctx.report(
                "note", "QG144", str(path), "statistics are those of an earlier calibration"
            ),
        )
        ctx.stats = Stats(stats, choice)
        return False


def _wanted(model: ir.Model, ctx: Context) -> list[str]:
    """What the recipe may put on a grid; every activation that could have one where no rule asks for grids."""
    is_static = any(rule.is_static for rule in ctx.recipe.rules)
    if is_static and ctx.target.integers is not None:
        return activations.observed(model, ctx.target.integers)
    return observed(model)


def observed(model: ir.Model) -> list[str]:
    """Names of the float activations that may need a grid, in graph order."""
    names: dict[str, None] = {}
    dtypes = calibrate.infer_types(model)
    for node in graph.nodes(model):
        if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHTED | CARRIERS:
            continue
        for v in (*node.inputs, *node.outputs):
            if v is not None and v.name and _is_activation(v) and dtypes.get(v.name) in FLOATS:
                names[v.name] = None
    return list(names)


def _is_activation(v: ir.Value) -> bool:
    return not v.is_initializer() and graph.node_constant(v) is None
