"""correct-bias: what rounding a weight adds to the mean of its operator's outputs is taken off the bias.

    b ← b - E[(Ŵ - W) x]        W the weight, Ŵ what its codes mean, x the input in the float model

Rounding errors of a weight do not average out over inputs that are not centred (behind Relu all are positive): they
shift whole output channels, and the next operators build on that. Most of all in depthwise convolutions, where few
products are summed. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019
(arXiv:1906.04721, 4.2), in the empirical form: the mean is taken over samples.

Each operator is corrected for its own weight alone, as if all before it were exact. Correcting what is left of the
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

from qgraph import activations, files, graph, qdq, runtime, weights
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
    """An operator whose weight is rounded."""

    weight: Weight
    use: Use
    solved: QTensor

    @property
    def output(self) -> str:
        return str(self.use.node.outputs[0].name)

    def error(self) -> Array:
        """What rounding adds to the weight, as the operator reads it, float32."""
        rows = self.solved.dequantize().astype(np.float64) - self.weight.read()
        added = self.use.matrix.back(rows.astype(np.float32), self.weight.dims)
        if self.use.through is None:
            return added
        perm = graph.attribute(self.use.through, "perm", None)
        return np.ascontiguousarray(added.transpose(perm))


@register
class CorrectBias(Pass):
    """Find the mean error that each rounded weight causes; insert-qdq takes it off the bias."""

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
        ctx.report("note", "QG405", self.name, f"{count} biases make up for rounded weights")
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
                yield _Rounded(weight, use, solved)


def _batches(found: Sequence[_Rounded]) -> Iterator[list[_Rounded]]:
    """As many operators at a time as keep their errors within 256 MB."""
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
    """By operator, the mean over samples of what its weight's rounding adds to each output channel [C]."""
    work = graph.clone(model)
    nodes = {str(n.outputs[0].name): n for n in work.graph if n.outputs}
    fresh = graph.Names(work)
    work.graph.outputs[:] = [_error_of(work, nodes[e.output], e, fresh) for e in batch]
    graph.remove_dead(work)
    totals: list[Array] = [np.zeros(1)] * len(batch)
    count = 0
    with tempfile.TemporaryDirectory(prefix="qgraph-bias-") as folder:
        path = files.save(work, Path(folder) / "errors.onnx", external_data=True)
        # Q and DQ that the model came with are run as they are written.
        as_written = {"session.disable_quant_qdq": "1"}
        session = runtime.session(
            path, threads=ctx.threads or None, accuracy_level=1, config=as_written
        )
        taken = {i.name for i in session.get_inputs()}
        total = min(samples, len(ctx.data))
        for count, feeds in enumerate(islice(ctx.data, samples), start=1):
            ctx.progress(f"correcting biases, sample {count} of {total}", count / total)
            errors = session.run(None, {n: v for n, v in feeds.items() if n in taken})
            totals = [t + _channel_means(e) for t, e in zip(totals, errors, strict=True)]
    return {e.output: t / count for e, t in zip(batch, totals, strict=True)}


def _error_of(work: ir.Model, node: ir.Node, each: _Rounded, fresh: graph.Names) -> ir.Value:
    """Give the model a second operator whose weight is the error of this one's; returns its output, averaged."""
    constant = graph.add_initializer(work.graph, fresh(f"{each.output}.error"), each.error())
    out = graph.value(fresh(f"{each.output}.shift"), ir.DataType.FLOAT)
    inputs = [node.inputs[0], constant]
    if node.op_type == "Gemm":  # whose third input was no option before opset 11
        zero = np.zeros(1, np.float32)
        inputs.append(graph.add_initializer(work.graph, fresh(f"{each.output}.zero"), zero))
    attributes = list(node.attributes.values())
    work.graph.append(ir.Node("", node.op_type, inputs, attributes, outputs=[out]))
    if not _BIASED[node.op_type]:
        return out
    mean = graph.value(fresh(f"{each.output}.mean"), ir.DataType.FLOAT)
    work.graph.append(ir.Node("", "GlobalAveragePool", [out], outputs=[mean]))
    return mean


def _channel_means(values: Array) -> Array:
    """[N, C, ...] → [C], float64."""
    axes = tuple(a for a in range(values.ndim) if a != 1)
    return np.asarray(values.mean(axis=axes, dtype=np.float64))
