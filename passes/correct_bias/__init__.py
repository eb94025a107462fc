"""correct-bias: what quantization adds to the mean of an operator's outputs is taken off its bias.

    b ← b - E[Ŵ x̂ - W x]        x the input in the float model, x̂ on its grid, W the weight, Ŵ what its codes mean

Rounding errors of a weight do not average out over inputs that are not centred (behind Relu all are positive), and
clipping an input moves its mean: whole output channels are shifted, and the next operators build on that. Most of all
in depthwise convolutions, where few products are summed. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019 (arXiv:1906.04721, 4.2), in the empirical form: the mean is taken over samples.

Each operator is corrected for its own rounding alone, as if all before it were exact. Correcting what is left of the
shifts of operators before it as well counts them twice, and that diverges (docs/notes/static_int8.md).

Without data the mean of x comes from BatchNormalizations that were folded (`analytic`); with data it is measured, and
corrections stay only where they make other samples better (`held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import activations, graph, qdq, trials, weights
from qgraph.observers import Grid
from qgraph.passes.correct_bias import analytic, held_out
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.spec import QTensor
from qgraph.weights import Use, Weight

Array = npt.NDArray[Any]

_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rounded:
    """An operator whose weight is rounded, and the grid of its input."""

    weight: Weight
    use: Use
    solved: QTensor
    grid: Grid

    @property
    def output(self) -> str:
        """The name of what the operator gives."""
        return str(self.use.node.outputs[0].name)

    def rounded(self) -> Array:
        """The weight that the codes mean, as the operator reads it, float32."""
        return self.oriented(self.use.matrix.back(self.solved.dequantize(), self.weight.dims))

    def plain(self) -> Array:
        """The weight itself, as the operator reads it."""
        return self.oriented(graph.array(self.weight.value))

    def oriented(self, weight: Array) -> Array:
        """A weight behind the Transpose through which the operator reads it."""
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
        """Where means come from, and how much data is used."""

        method: Literal["auto", "empirical", "analytic"] = "auto"
        """Means of the inputs: measured on samples, from folded BatchNormalizations, or the latter without data."""
        samples: int = Field(32, ge=1)
        """How many samples the mean is taken over, the first ones; means settle early."""
        held_out: int = Field(8, ge=0)
        """How many of the samples that follow must get better, at most a quarter of all; 0 takes all corrections."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan.corrections`."""
        options = self.options_as(CorrectBias.Options)
        found = list(_rounded(model, ctx))
        if not found:
            return False
        held = min(options.held_out, len(ctx.data) // 4) if ctx.data is not None else 0
        samples = min(options.samples, len(ctx.data) - held) if ctx.data is not None else 0
        made: dict[str, Array] = {}
        if options.method == "analytic" or (options.method == "auto" and ctx.data is None):
            made.update(analytic.mean_errors(model, found))
        elif ctx.data is not None:
            for batch in _batches(found):
                made.update(_mean_errors(model, batch, ctx, samples))
        kept = made
        if held and made:
            others = list(islice(iter(ctx.data), samples, samples + held))
            kept = held_out.accepted(model, ctx, made, others)
        ctx.plan.corrections.update(kept)
        if made:
            message = f"{len(kept)} biases make up for rounding"
            if len(kept) < len(made):
                message += f"; {len(made) - len(kept)} others would not bring {held} other samples closer to float"
            ctx.report("note", "QG406", self.name, message)
        return False


def _rounded(model: ir.Model, ctx: Context) -> Iterator[Rounded]:
    """The operators of the main graph that compute on codes and whose bias can change."""
    _, grids = activations.recall(model, ctx.plan)
    for weight in weights.find(model):
        solved = ctx.plan.solved.get(weight.name)
        if solved is None or ctx.plan.decisions[weight.name].activation is None:
            continue
        solved = ctx.plan.solved[weight.name] = qdq.with_room_for_bias(solved, weight, grids)
        for use in weight.uses:
            output = str(use.node.outputs[0].name)
            if not use.in_body and output in ctx.plan.operators and _has_bias(weight, use, ctx):
                assert use.node.inputs[0] is not None
                yield Rounded(weight, use, solved, grids[use.node.inputs[0]])


def _has_bias(weight: Weight, use: Use, ctx: Context) -> bool:
    """The operator has a bias or can have one; that of a MatMul is a float constant that an Add behind it adds."""
    if use.node.op_type in trials.BIASED:
        return True
    if use.node.op_type != "MatMul" or use.index != 1:
        return False
    behind = qdq.bias_behind(use.node, weight.shape[0])
    return behind is not None and graph.output_name(behind[0]) not in ctx.plan.operators


def _batches(found: Sequence[Rounded]) -> Iterator[list[Rounded]]:
    """As many operators at a time as keep their weights within 256 MB."""
    batch: list[Rounded] = []
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
    model: ir.Model, batch: Sequence[Rounded], ctx: Context, samples: int
) -> dict[str, Array]:
    """By operator, the mean over samples of what quantization adds to each output channel [C]."""
    made = trials.Trials(model, max(e.grid.spec.qtype.bits for e in batch))
    for each in batch:
        node = made.nodes[each.output]
        x = made.rounded(node.inputs[0], each.grid)
        weight = made.constant(each.rounded())
        twin = made.add(node.op_type, x, weight, *node.inputs[2:], like=node)
        for out in (node.outputs[0], twin):
            is_matmul = node.op_type == "MatMul"
            width = each.weight.shape[0]
            made.output(made.columns(out, width) if is_matmul else made.channels(node, out))
    totals: list[Array] = [np.zeros(1)] * len(batch)
    count, total = 0, min(samples, len(ctx.data))
    for count, means in enumerate(made.run(ctx.data, samples, ctx.threads), start=1):
        ctx.progress(f"correcting biases, sample {count} of {total}", count / total)
        found = [trials.channel_means(m) for m in means]
        pairs = zip(found[::2], found[1::2], strict=True)
        totals = [t + (twin - plain) for t, (plain, twin) in zip(totals, pairs, strict=True)]
    return {e.output: t / count for e, t in zip(batch, totals, strict=True)}
