"""search-ranges: an activation gets another range than that of least squared error where its readers gain much by it.

Squared error treats all channels of a tensor alike. Where few of them are large and hardly count for what reads the
tensor, clipping them leaves finer steps to the others; only the readers' outputs show it. So the ranges that other
methods would take are tried: each reader runs on float inputs, but one of them on the grid,

    e = op(x̂) - op(x)           what is left of mean e² when the bias has taken off the channels' means (correct-bias)

and the sum over readers, each over the mean square of its output, decides. A range must leave a quarter of that of the
method: the same outliers are clipped in one tensor after the other, errors of one sign that add up downstream, which
no single reader shows (docs/notes/static_int8.md).
Related: the layer-wise search of BRECQ and of Nagel et al. 2021 (arXiv:2106.08295, 3.1), there on the tensor alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import activations, arrived, grids, trials
from qgraph.activations import Regions
from qgraph.observers import Choice, Grid
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register

Doubles = npt.NDArray[np.float64]

OTHERS = (
    Choice("min-max"),
    *(Choice("percentile", p) for p in (99.999, 99.99, 99.97, 99.9, 99.7)),
)
_GAIN = 4.0  # another range must divide the error by this
_AT_ONCE = 16  # operators that are tried in one session


@dataclass(frozen=True, slots=True)
class _Group:
    """Activations that share a grid, and the grids that they could have: first the one they have."""

    members: list[ir.Value]
    candidates: list[tuple[Choice, Grid]]


@dataclass(frozen=True, slots=True)
class _Tried:
    """One reader of a group; outputs of the trials: mean square, mean of e² by candidate, and channels' means of e."""

    group: _Group
    power: int
    errors: list[int]
    means: list[int]


@register
class SearchRanges(Pass):
    """Try other ranges of activations on what reads them."""

    name = "search-ranges"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN, Fact.STATS})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """How much data is used."""

        samples: int = Field(8, ge=1)
        """How many samples the readers run on, the first ones."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Change grids in `ctx.plan`; ranges of a method other than "mse" were asked for and stay."""
        if ctx.stats is None or ctx.data is None or ctx.stats.choice.method != "mse":
            return False
        regions, chosen = activations.recall(model, ctx.plan)
        groups = _groups(regions, chosen, ctx)
        scores = {id(g): np.zeros(len(g.candidates)) for g in groups}
        of_value = {v: g for g in groups for v in g.members}
        readers = [n for n in regions.operators if n.graph is model.graph and len(n.outputs) == 1]
        samples = self.options_as(SearchRanges.Options).samples
        for start in range(0, len(readers), _AT_ONCE):
            ctx.progress("trying ranges", start / len(readers))
            batch = readers[start : start + _AT_ONCE]
            for group, errors in _tried(model, batch, regions, of_value, ctx, samples):
                scores[id(group)] += errors
        changed = sum(_settle(g, scores[id(g)], ctx) for g in groups)
        if changed:
            message = (
                f"{changed} of {len(groups)} ranges are others than those of least squared error"
            )
            ctx.report("note", "QG407", self.name, message)
        return False


def _groups(regions: Regions, chosen: Mapping[ir.Value, Grid], ctx: Context) -> list[_Group]:
    """The groups of the plan with the grids that they could have; grids that the model came with stay."""
    members: dict[str, list[ir.Value]] = {}
    for v in chosen:
        decision = ctx.plan.decisions[str(v.name)]
        members.setdefault(decision.shares or decision.value, []).append(v)
    groups = []
    for held in members.values():
        if any(arrived.grid_of(v) is not None for v in held):
            continue
        now = chosen[held[0]]
        candidates = [(ctx.stats.choice, now)]
        for other in OTHERS:
            choice = replace(ctx.stats.choice, method=other.method, percentile=other.percentile)
            grid = grids.of_group(held, regions, now.spec, ctx.stats, choice)
            if isinstance(grid, Grid) and grid not in [g for _, g in candidates]:
                candidates.append((choice, grid))
        groups.append(_Group(held, candidates))
    return groups


def _tried(
    model: ir.Model,
    readers: Sequence[ir.Node],
    regions: Regions,
    of_value: Mapping[ir.Value, _Group],
    ctx: Context,
    samples: int,
) -> list[tuple[_Group, Doubles]]:
    """By reader and input, the share of its output's mean square that each candidate leaves as error."""
    bits = max((g.candidates[0][1].spec.qtype.bits for g in of_value.values()), default=8)
    made = trials.Trials(model, bits)
    tried = [
        _try(made, node, index, of_value[v])
        for node in readers
        for index in regions.operators[node]
        if (v := node.inputs[index]) is not None and v in of_value
    ]
    if not tried:
        return []
    totals: list[Any] = []
    count = 0
    for count, outputs in enumerate(made.run(ctx.data, samples, ctx.threads), start=1):
        found = [trials.channel_means(o) if o.ndim > 1 else float(o) for o in outputs]
        totals = found if count == 1 else [t + f for t, f in zip(totals, found, strict=True)]
    means = [t / count for t in totals]
    return [(t.group, _shares(t, means)) for t in tried]


def _try(made: trials.Trials, reader: ir.Node, index: int, group: _Group) -> _Tried:
    node = made.nodes[str(reader.outputs[0].name)]
    plain = node.outputs[0]

    def mean_square(v: ir.Value) -> int:
        return made.output(made.add("ReduceMean", made.add("Mul", v, v), keepdims=0))

    errors, means = [], []
    for _, grid in group.candidates:
        inputs = list(node.inputs)
        inputs[index] = made.rounded(inputs[index], grid)
        error = made.add("Sub", made.add(node.op_type, *inputs, like=node), plain)
        errors.append(mean_square(error))
        if node.op_type in trials.BIASED:
            means.append(made.output(made.channels(node, error)))
    return _Tried(group, mean_square(plain), errors, means)


def _shares(trial: _Tried, found: Sequence[Any]) -> Doubles:
    errors = np.array([found[i] for i in trial.errors])
    if trial.means:
        errors -= [float(np.square(found[i]).mean()) for i in trial.means]
    return np.asarray(np.maximum(errors, 0) / max(found[trial.power], 1e-30))


def _settle(group: _Group, errors: Doubles, ctx: Context) -> bool:
    """Give a group its best range; True if that is another one."""
    best = int(np.argmin(errors))
    if best == 0 or errors[best] * _GAIN > errors[0]:
        return False
    choice, grid = group.candidates[best]
    method = choice.method
    if method == "percentile":
        method = f"percentile {choice.percentile:g}"
    gain = 10 * np.log10(errors[0] / max(errors[best], 1e-30))
    for v in group.members:
        decision = ctx.plan.decisions[str(v.name)]
        reason = f"{decision.reason}; {gain:.1f} dB less error in what reads it than by {decision.solver}"
        ctx.plan.add(replace(decision, grid=grid, solver=method, reason=reason))
    return True
