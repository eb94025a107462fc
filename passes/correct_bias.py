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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import activations, graph, qdq, trials, weights
from qgraph.observers import Grid
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.spec import QTensor
from qgraph.weights import Use, Weight

Array = npt.NDArray[Any]

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
        ctx.report("note", "QG406", self.name, f"{count} biases make up for rounding")
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
            if (
                use.node.op_type in trials.BIASED
                and not use.in_body
                and output in ctx.plan.operators
            ):
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
    made = trials.Trials(model, max(e.grid.spec.qtype.bits for e in batch))
    for each in batch:
        node = made.nodes[each.output]
        x = made.rounded(node.inputs[0], each.grid)
        weight = made.constant(each.rounded())
        twin = made.add(node.op_type, x, weight, *node.inputs[2:], like=node)
        for out in (node.outputs[0], twin):
            made.output(made.channels(node, out))
    totals: list[Array] = [np.zeros(1)] * len(batch)
    count, total = 0, min(samples, len(ctx.data))
    for count, means in enumerate(made.run(ctx.data, samples, ctx.threads), start=1):
        ctx.progress(f"correcting biases, sample {count} of {total}", count / total)
        found = [trials.channel_means(m) for m in means]
        pairs = zip(found[::2], found[1::2], strict=True)
        totals = [t + (twin - plain) for t, (plain, twin) in zip(totals, pairs, strict=True)]
    return {e.output: t / count for e, t in zip(batch, totals, strict=True)}
