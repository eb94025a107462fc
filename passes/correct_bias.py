"""correct-bias: what quantization adds to the mean of an operator's outputs is taken off its bias.

    b ← b - E[Ŵ x̂ - W x]        x the input in the float model, x̂ on its grid, W the weight, Ŵ what its codes mean

Rounding errors of a weight do not average out over inputs that are not centred (behind Relu all are positive), and
clipping an input moves its mean: whole output channels are shifted, and the next operators build on that. Most of all
in depthwise convolutions, where few products are summed. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019 (arXiv:1906.04721, 4.2), in the empirical form: the mean is taken over samples.

Each operator is corrected for its own rounding alone, as if all before it were exact. Correcting what is left of the
shifts of operators before it as well counts them twice, and that diverges (docs/notes/static_int8.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import activations, files, graph, opset, qdq, runtime, weights
from qgraph.observers import Grid
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.spec import QTensor
from qgraph.weights import Use, Weight

Array = npt.NDArray[Any]

# Whose bias takes the correction, and whether the output has axes behind that of the channels.
_BIASED = {"Conv": True, "ConvTranspose": True, "Gemm": False}
_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Rounded:
    """An operator whose weight is rounded, and the grid of its input."""

    weight: Weight
    use: Use
    solved: QTensor
    grid: Grid

    @property
    def output(self) -> str:
        return str(self.use.node.outputs[0].name)

    def rounded(self) -> Array:
        """The weight that the codes mean, as the operator reads it, float32."""
        weight = self.use.matrix.back(self.solved.dequantize(), self.weight.dims)
        if self.use.through is None:
            return weight
        return np.ascontiguousarray(
            weight.transpose(graph.attribute(self.use.through, "perm", None))
        )


@register
class CorrectBias(Pass):
    """Find the mean error of each operator on codes; insert-qdq takes it off the bias."""

    name = "correct-bias"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN, Fact.SOLVED})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """How much data is used."""

        samples: int = Field(32, ge=1)
        """How many samples the mean is taken over, the first ones; means settle early."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan.corrections`."""
        found = list(_rounded(model, ctx))
        if not found or ctx.data is None:
            return False
        samples = self.options_as(CorrectBias.Options).samples
        for batch in _batches(found):
            ctx.plan.corrections.update(_mean_errors(model, batch, ctx, samples))
        count = len(ctx.plan.corrections)
        ctx.report("note", "QG405", self.name, f"{count} biases make up for rounding")
        return False


def _rounded(model: ir.Model, ctx: Context) -> Iterator[_Rounded]:
    """The operators of the main graph that compute on codes and whose bias can change."""
    _, grids = activations.recall(model, ctx.plan)
    for weight in weights.find(model):
        solved = ctx.plan.solved.get(weight.name)
        if solved is None or ctx.plan.decisions[weight.name].activation is None:
            continue
        solved = ctx.plan.solved[weight.name] = qdq.with_room_for_bias(solved, weight, grids)
        for use in weight.uses:
            output = str(use.node.outputs[0].name)
            if use.node.op_type in _BIASED and not use.in_body and output in ctx.plan.operators:
                assert use.node.inputs[0] is not None
                yield _Rounded(weight, use, solved, grids[use.node.inputs[0]])


def _batches(found: Sequence[_Rounded]) -> Iterator[list[_Rounded]]:
    """As many operators at a time as keep their weights within 256 MB."""
    batch: list[_Rounded] = []
    held = 0
    for each in found:
        size = 4 * int(np.prod(each.weight.dims))
        if batch and held + size > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(each)
        held += size
    yield batch


def _mean_errors(
    model: ir.Model, batch: Sequence[_Rounded], ctx: Context, samples: int
) -> dict[str, Array]:
    """By operator, the mean over samples of what quantization adds to each output channel [C]."""
    work = graph.clone(model)
    needed = max(21 if e.grid.spec.qtype.bits == 16 else 10 for e in batch)  # of QuantizeLinear
    if graph.opset(work) < needed:
        opset.raise_opset(work, needed)
    nodes = {str(n.outputs[0].name): n for n in work.graph if n.outputs}
    fresh = graph.Names(work)
    pairs = [_twin(work, nodes[e.output], e, fresh) for e in batch]
    work.graph.outputs[:] = [v for pair in pairs for v in pair]
    graph.remove_dead(work)
    totals: list[Array] = [np.zeros(1)] * len(batch)
    count = 0
    with tempfile.TemporaryDirectory(prefix="qgraph-bias-") as folder:
        path = files.save(work, Path(folder) / "twins.onnx", external_data=True)
        # Q and DQ are run as they are written, also those that the model came with.
        as_written = {"session.disable_quant_qdq": "1"}
        session = runtime.session(
            path, threads=ctx.threads or None, accuracy_level=1, config=as_written
        )
        taken = {i.name for i in session.get_inputs()}
        total = min(samples, len(ctx.data))
        for count, feeds in enumerate(islice(ctx.data, samples), start=1):
            ctx.progress(f"correcting biases, sample {count} of {total}", count / total)
            means = session.run(None, {n: v for n, v in feeds.items() if n in taken})
            found = [_channel_means(m) for m in means]
            totals = [t + (q - f) for t, f, q in zip(totals, found[::2], found[1::2], strict=True)]
    return {e.output: t / count for e, t in zip(batch, totals, strict=True)}


def _twin(
    work: ir.Model, node: ir.Node, each: _Rounded, fresh: graph.Names
) -> tuple[ir.Value, ir.Value]:
    """Put the quantized operator beside the float one, with the same input; returns the means of both outputs."""
    grid, main = each.grid, work.graph

    def add(op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType) -> ir.Value:
        out = graph.value(fresh(f"{each.output}.{op}"), dtype)
        attributes = list(node.attributes.values()) if op == node.op_type else ()
        main.append(ir.Node("", op, inputs, attributes, outputs=[out]))
        return out

    def constant(what: str, array: Array) -> ir.Value:
        return graph.add_initializer(main, fresh(f"{each.output}.{what}"), array)

    numbers = [
        constant("scale", np.asarray(grid.scale, np.float32)),
        constant("zero_point", np.asarray(grid.zero_point, grid.spec.qtype.container)),
    ]
    codes = add("QuantizeLinear", [node.inputs[0], *numbers], grid.spec.qtype.dtype)
    x = add("DequantizeLinear", [codes, *numbers], ir.DataType.FLOAT)
    weight = constant("weight", each.rounded())
    twin = add(node.op_type, [x, weight, *node.inputs[2:]], ir.DataType.FLOAT)
    if not _BIASED[node.op_type]:
        return node.outputs[0], twin
    mean, mean_twin = (
        add("GlobalAveragePool", [v], ir.DataType.FLOAT) for v in (node.outputs[0], twin)
    )
    return mean, mean_twin


def _channel_means(values: Array) -> Array:
    """[N, C, ...] → [C], float64."""
    axes = tuple(a for a in range(values.ndim) if a != 1)
    return np.asarray(values.mean(axis=axes, dtype=np.float64))
