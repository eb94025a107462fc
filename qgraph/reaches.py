"""How far every channel of an activation reaches, before and after the passes that even channels out.

For each product (MatMul, Gemm, Conv, ConvTranspose) with a weight: max|x_j| over samples of each channel j of what it
reads. Passes that smooth, equalize or rotate are known by what they declare: they break STATS and leave the model
canonical.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph import calibrate, data, errors, files, graph, weights
from qgraph.instruments import PROVE_UNDER
from qgraph.observers import Wanted
from qgraph.pipeline import Context, Fact, Instrument, Pass
from qgraph.report import Reach, Shift

SAMPLES = 4
_PROFILE = np.linspace(0, 1, 17)
_CHANNEL_AXIS = {"matmul": -1, "gemm": -1, "conv": 1, "conv_transpose": 1}


@dataclass(frozen=True, slots=True)
class _Read:
    """What a product reads: the activation's name and its channel axis."""

    name: str
    axis: int


class Reaches(Instrument):
    """Measures the channels around each pass that may even them out; needs samples.

    `shifts` holds what was found, pass by pass in graph order; `lines` says why nothing could be measured.
    """

    def __init__(self) -> None:
        self.shifts: list[Shift] = []
        self.lines: list[str] = []
        self._before: ir.Model | None = None

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        """Keep a copy, if the pass may move channels."""
        self._before = None
        moves = Fact.STATS in each.breaks and Fact.CANONICAL not in each.breaks
        if not moves or not isinstance(ctx.data, data.Dataset):
            return
        size = files.weight_bytes(model)
        if size > PROVE_UNDER:
            text = f"ranges around {each.name} were not measured: the model has {size >> 20} MB of weights"
            self.lines.append(f"{text}, more than {PROVE_UNDER >> 20} MB")
            return
        self._before = graph.clone(model)

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Measure both, if the pass changed anything."""
        if self._before is None or not changed:
            return
        pair = (self._before, model)
        reads = [_reads(m) for m in pair]
        both = [output for output in reads[0] if output in reads[1]]
        try:
            found = [
                _measure(m, {read[o] for o in both}, ctx)
                for m, read in zip(pair, reads, strict=True)
            ]
        except errors.QGraphError as e:
            told = e.diagnostics[0].message
            self.lines.append(f"ranges around {each.name} could not be measured: {told}")
            return
        seen: set[tuple[_Read, _Read]] = set()
        for output in both:
            key = (reads[0][output], reads[1][output])
            one, two = (side.get(read) for side, read in zip(found, key, strict=True))
            if key not in seen and one is not None and two is not None:
                seen.add(key)
                self.shifts.append(Shift(key[0].name, each.name, one[0], one[1], two[1]))


def _reads(model: ir.Model) -> dict[str, _Read]:
    """By output of each product with a weight in the main graph: what it reads."""
    found = {}
    for weight in weights.find(model):
        for use in weight.uses:
            x = use.node.inputs[0]
            axis = _CHANNEL_AXIS.get(use.kind)
            turned = use.kind == "gemm" and graph.attribute(use.node, "transA", 0)
            if axis is None or use.index != 1 or use.in_body or turned or x is None or not x.name:
                continue
            if not graph.is_constant(x):
                found[str(use.node.outputs[0].name)] = _Read(str(x.name), axis)
    order = [str(v.name) for node in model.graph for v in node.outputs]
    return {name: found[name] for name in order if name in found}


def _measure(model: ir.Model, reads: set[_Read], ctx: Context) -> dict[_Read, tuple[int, Reach]]:
    """(channels, their reach) of each activation; without those that never were finite or have no channels."""
    wanted = {r.name: Wanted(channel_axis=r.axis) for r in sorted(reads, key=lambda r: r.name)}
    stats = calibrate.run(model, ctx.data.first(SAMPLES), wanted, threads=ctx.threads)
    found = {}
    for read in reads:
        peaks = stats[read.name].channel_absmax
        if peaks is None or not len(peaks) or not np.isfinite(peaks).all():
            continue
        profile = np.quantile(peaks.astype(np.float64), _PROFILE)
        middle = float(profile[len(_PROFILE) // 2])
        found[read] = (
            len(peaks),
            Reach(float(profile[-1]), middle, [float(v) for v in profile]),
        )
    return found
