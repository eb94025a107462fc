"""Static INT8 that the runtime does not execute in integers is taken back.

Every operator on static grids is looked up in the graph that the target's runtime executes. Where one runs in float all
the same, it gets its float weight back and its Q/DQ go, which may free others of theirs; so this is repeated, a bounded
number of times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qgraph import activations, errors, files, graph
from qgraph.executed.match import Ran
from qgraph.pipeline import Context
from qgraph.plan import Decision
from qgraph.target import Writer

ROUNDS = 3


def run(model: ir.Model, ctx: Context) -> bool:
    """Take back what does not fuse; True if anything was."""
    changed = False
    for _ in range(ROUNDS):
        lost = _unfused(model, ctx)
        if not lost:
            break
        _take_back(model, ctx, lost)
        changed = True
    return changed


def _unfused(model: ir.Model, ctx: Context) -> dict[str, str]:
    """Weights of which a use runs in float → what runs."""
    placed = ctx.placed
    if placed is None or not placed.uses or ctx.target.inspect is None or not ctx.inspect:
        return {}
    outputs = {str(n.outputs[0].name): w for w, nodes in placed.uses.items() for n in nodes}
    ctx.progress(f"asking {ctx.target.name} what it runs", 0.0)
    with tempfile.TemporaryDirectory(prefix="qgraph-fused-") as folder:
        path = files.save(model, Path(folder) / "model.onnx")
        try:
            ran: Mapping[str, Ran] = ctx.target.inspect(str(path), list(outputs))
        except errors.RuntimeFailure as e:
            found = e.diagnostics[0]
            text = f"what runs could not be checked: {found.message}"
            ctx.report("warning", found.code, found.where, text, found.hint)
            return {}
    # What cannot be seen (bodies in OpenVINO) is left as it is.
    return {
        w: ran[name].kernel
        for name, w in outputs.items()
        if name in ran and ran[name].how not in ("integer", "unknown")
    }


def _take_back(model: ir.Model, ctx: Context, lost: Mapping[str, str]) -> None:
    placed, integers = ctx.placed, ctx.target.integers
    assert placed is not None and integers is not None
    placed.remove()
    regions, grids = activations.recall(model, ctx.plan)
    weighted = {n for nodes in placed.uses.values() for n in nodes}
    others = [n for n in (*regions.operators, *regions.moves) if n not in weighted]
    for weight, kernel in lost.items():
        placed.restore(model, weight)
        _forget(ctx, weight, placed.uses.pop(weight), kernel)
    remaining = list(dict.fromkeys(n for nodes in placed.uses.values() for n in nodes))
    kept = activations.find(model, integers, remaining, only=others)
    without = [str(v.name) for v in kept.grids if v not in grids]
    if without:  # fewer operators want fewer grids
        raise AssertionError(f"values without a grid: {without}")
    placed.write(Writer(model, ctx.spool), kept, {v: grids[v] for v in kept.grids})
    activations.remember(kept, ctx.plan)
    _drop_decisions(ctx, {str(v.name) for v in kept.grids})
    graph.remove_dead(model)
    for each in graph.graphs(model):
        each.sort()


def _forget(ctx: Context, weight: str, nodes: Iterable[ir.Node], kernel: str) -> None:
    """The ledger's line of a weight that is float again."""
    reason = (
        f"static int8 was written and taken back: {ctx.target.name} executes "
        f"{kernel} for {', '.join(graph.where(n) for n in nodes)}"
    )
    decision = ctx.plan.decisions[weight]
    ctx.plan.add(
        replace(decision, spec=None, activation=None, forms=(), reason=reason, code="QG319")
    )
    ctx.records[weight].pop("nodes", None)


def _drop_decisions(ctx: Context, kept: set[str]) -> None:
    def stays(d: Decision) -> bool:
        return d.role == "weight" or d.value in kept

    ctx.plan.decisions = {n: d for n, d in ctx.plan.decisions.items() if stays(d)}
