"""From statistics to the grids of a plan: one for every group of activations that shares one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qgraph import activations, arrived
from qgraph.activations import Regions
from qgraph.observers import Choice, Grid, NoGrid, Stats, TensorStats, choose
from qgraph.plan import Decision
from qgraph.spec import QTYPES, QuantSpec
from qgraph.target import Integers


@dataclass
class Gridded:
    """Regions in which every quantized value has a grid.

    Attributes:
        regions: see `qgraph.activations`.
        grids: by value.
    """

    regions: Regions
    grids: dict[ir.Value, Grid]

    def decisions(self, method: str) -> list[Decision]:
        """The plan's lines about activations, in graph order."""
        made = []
        for group in self.regions.groups():
            first = str(self.regions.roots(group)[0].name)
            for v in group:
                grid = self.grids[v]
                reason = _reason(v, self.regions)
                shares = first if len(group) > 1 else ""
                made.append(
                    Decision(
                        str(v.name),
                        "activation",
                        grid.spec,
                        method,
                        reason,
                        "assign-precision",
                        grid=grid,
                        shares=shares,
                    )
                )
        return made


def find(
    model: ir.Model,
    integers: Integers,
    candidates: Mapping[ir.Node, QuantSpec],
    stats: Stats,
) -> Gridded:
    """Regions and their grids; what can have no grid stays float, with all that would need it.

    Args:
        model: a canonical float model.
        integers: what the target computes on codes.
        candidates: operators that may compute on codes → spec of their activations.
        stats: what calibration saw, and how ranges are chosen.
    """
    blocked: dict[ir.Value, str] = {}
    while True:
        regions = activations.find(model, integers, list(candidates), blocked)
        grids: dict[ir.Value, Grid] = {}
        refused: dict[ir.Value, str] = {}
        for group in regions.groups():
            roots = regions.roots(group)
            spec = _spec(group, regions, candidates)
            if _is_centred(group, regions, integers):
                spec = _around_zero(spec, roots, regions, stats)
            held = [g for g in map(arrived.grid_of, roots) if g is not None]
            found = (
                _bounded(held[0], roots, regions)
                if held
                else of_group(group, regions, spec, stats, stats.choice)
            )
            if isinstance(found, NoGrid):
                refused[roots[0]] = found.reason
            else:
                grids.update(dict.fromkeys(group, found))
        if not refused:
            return Gridded(regions, grids)
        blocked.update(refused)


def _spec(
    group: list[ir.Value], regions: Regions, candidates: Mapping[ir.Node, QuantSpec]
) -> QuantSpec:
    """What the operators around a group ask for; with a zero point behind a Relu, whose bound the grid applies."""
    nodes = [n for v in group for n in (*v.consumers(), v.producer())]
    nodes += [n.inputs[0].producer() for n in nodes if n in regions.absorbed and n.inputs[0]]
    asked = [candidates[n] for n in nodes if n in candidates and n in regions.operators]
    spec = asked[0] if asked else next(iter(candidates.values()))
    is_bounded = any(v.producer() in regions.absorbed for v in group)
    return replace(spec, symmetric=False) if is_bounded and spec.symmetric else spec


def _is_centred(group: list[ir.Value], regions: Regions, integers: Integers) -> bool:
    """Whether an operator reads codes of the group and takes no zero point but 0."""
    uses = [use for v in group for use in v.uses()]
    return any(n.op_type in integers.centred and regions.reads_codes(n, i) for n, i in uses)


def _around_zero(
    spec: QuantSpec, roots: list[ir.Value], regions: Regions, stats: Stats
) -> QuantSpec:
    """The type in which code 0 stands for 0.0: unsigned where nothing is negative, else signed and symmetric."""
    held = [stats.get(str(v.name)) for v in roots]
    if all(each is not None and each.minimum >= 0 for each in held):
        return replace(spec, qtype=QTYPES[f"uint{spec.qtype.bits}"], symmetric=False)
    if any(v.producer() in regions.absorbed for v in roots):
        return spec  # the bounds of a Clip around zero need a zero point
    return replace(spec, qtype=QTYPES[f"int{spec.qtype.bits}"], symmetric=True)


def of_group(
    group: Sequence[ir.Value],
    regions: Regions,
    spec: QuantSpec,
    stats: Mapping[str, TensorStats],
    choice: Choice,
) -> Grid | NoGrid:
    """The grid of values that share one, as `choice` takes it from what was seen of them; or why they have none."""
    roots = regions.roots(group)
    held = [stats.get(str(v.name)) for v in roots]
    if len(roots) == 1 and held[0] is not None:
        found = choose(held[0], spec, choice)
    else:
        merged = TensorStats()
        for v, each in zip(roots, held, strict=True):
            if each is None:
                return NoGrid(f"calibration did not see {v.name!r}")
            merged.merge(each)
        found = choose(merged, spec, choice)
    return found if isinstance(found, NoGrid) else _bounded(found, roots, regions)


def _bounded(grid: Grid, roots: list[ir.Value], regions: Regions) -> Grid:
    """The grid with all of it inside the bounds of the Clip that it absorbs, so that runtimes may drop the Clip."""
    for v in roots:
        node = v.producer()
        if node is None or node not in regions.absorbed:
            continue
        bounds = activations.bounds_of(node)
        assert bounds is not None
        for limit, steps in (
            (bounds[1], grid.spec.qtype.qmax - grid.zero_point),
            (-bounds[0], grid.zero_point - grid.spec.qtype.qmin),
        ):
            scale = np.float32(grid.scale)
            while np.float32(scale * np.float32(steps)) > limit and steps > 0:
                inside = np.float32(limit / steps)
                scale = inside if inside < scale else np.nextafter(scale, np.float32(0))
            grid = replace(grid, scale=float(scale))
    return grid


def _reason(v: ir.Value, regions: Regions) -> str:
    """Why an activation is quantized: who reads it, or who produces it."""
    readers = sorted({n.op_type for n, i in v.uses() if regions.reads_codes(n, i)})
    producer = v.producer()
    if readers:
        text = (
            f"{', '.join(readers)} computes on its codes"
            if len(readers) == 1
            else (f"{', '.join(readers)} compute on its codes")
        )
    else:
        assert producer is not None
        text = f"{producer.op_type} has an integer kernel only with codes behind it"
    if producer in regions.absorbed:
        assert producer is not None
        text += f"; the grid applies the bounds of {producer.op_type}"
    return text
