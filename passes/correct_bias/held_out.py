"""Which corrections make the quantized model better, on samples that they were not found on.

The mean error of each operator is certain, what it does to the outputs is not: errors may cancel, and where few samples
were seen the means themselves are noise. So the model is quantized as planned, without corrections and with all. If its
outputs are closer to the float model's with them, all stay. If not, they are halved in the order of the graph, and a
half stays if it helps beside those that stay already; one that does not is halved again, into eighths.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, runtime
from qgraph.passes.insert_qdq import InsertQdq
from qgraph.pipeline import Context
from qgraph.spool import Spool

Array = npt.NDArray[Any]
_PARTS = 8
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def accepted(
    model: ir.Model,
    ctx: Context,
    corrections: Mapping[str, Array],
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Array]:
    """Those of the corrections that bring the outputs on the samples closer to the float model's.

    Raises:
        errors.RuntimeFailure: QG601, where ONNX Runtime refuses the model.
    """
    wanted = _outputs(model, samples, ctx.threads)

    def error(chosen: Mapping[str, Array]) -> float:
        ctx.progress(f"measuring {len(chosen)} corrected biases", -1)
        return _distance(wanted, _outputs(_quantized(model, ctx, chosen), samples, ctx.threads))

    names = [n for node in model.graph for n in _names(node) if n in corrections]
    kept: dict[str, Array] = {}
    least = error(kept)
    waiting = [names]
    while waiting:
        part = waiting.pop()
        tried = kept | {n: corrections[n] for n in part}
        found = error(tried)
        if found < least:
            kept, least = tried, found
        elif len(part) > max(len(names) // _PARTS, 1):
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]  # the first half is next
    return kept


def _names(node: ir.Node) -> list[str]:
    return [str(v.name) for v in node.outputs]


def _quantized(model: ir.Model, ctx: Context, corrections: Mapping[str, Array]) -> ir.Model:
    """The model as insert-qdq would write it with these corrections."""
    plan = replace(
        ctx.plan,
        decisions=dict(ctx.plan.decisions),
        solved=dict(ctx.plan.solved),
        corrections=dict(corrections),
    )
    made = graph.clone(model)
    InsertQdq().run(
        made,
        replace(
            ctx,
            plan=plan,
            spool=Spool(),
            diagnostics=[],
            records={name: dict(record) for name, record in ctx.records.items()},
            operators=dict(ctx.operators),
            placed=None,
            progress=lambda what, share: None,
        ),
    )
    return made


def _outputs(
    model: ir.Model, samples: Sequence[Mapping[str, Any]], threads: int
) -> list[list[Array]]:
    """The float outputs of each sample; Q and DQ run as they are written."""
    with tempfile.TemporaryDirectory(prefix="qgraph-held-out-") as folder:
        path = files.save(model, Path(folder) / "model.onnx", external_data=True)
        as_written = {"session.disable_quant_qdq": "1"}
        session = runtime.session(
            path, threads=threads or None, accuracy_level=1, config=as_written
        )
        taken = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs() if o.type in _FLOATS]
        return [
            session.run(names, {n: v for n, v in feeds.items() if n in taken}) for feeds in samples
        ]


def _distance(wanted: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> float:
    """Over all outputs, the sum of the shares of their energy that are error; values that are not finite count as 0."""
    lost = energy = np.zeros(len(wanted[0]))
    for xs, ys in zip(wanted, found, strict=True):
        pairs = [
            np.nan_to_num(np.stack([x, y]).astype(np.float64), posinf=0, neginf=0)
            for x, y in zip(xs, ys, strict=True)
        ]
        lost = lost + [np.square(p[0] - p[1]).sum() for p in pairs]
        energy = energy + [np.square(p[0]).sum() for p in pairs]
    return float((lost / np.maximum(energy, 1e-30)).sum())
