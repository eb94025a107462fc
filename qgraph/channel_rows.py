"""Samples of the channels of symmetry groups: what their readers take, in the order of the groups' channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import data, symmetry, weights
from qgraph.calibrate import rows as calibrate_rows
from qgraph.pipeline import Context
from qgraph.symmetry import Group

ROWS = 512  # per activation
ACTIVATIONS = 8  # per group
Floats = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]


def channel_rows(model: ir.Model, groups: Sequence[Group], ctx: Context) -> dict[int, Floats]:
    """Rows [m, group.size] of the inputs of a group's readers, by the group's number; none without data.

    Args:
        model: canonical; left unchanged.
        groups: any groups of the model.
        ctx: with the samples; what is drawn depends on the recipe's seed alone.

    Raises:
        errors.InputError: the samples do not fit the model.
        errors.RuntimeFailure: ONNX Runtime refuses the model or fails on a sample.
    """
    if ctx.data is None:
        return {}
    dataset = ctx.data
    if not isinstance(dataset, data.Dataset):
        dataset = ctx.data = data.load(ctx.data, data.inputs_of(model))
    inner = {v for n in model.graph for v in n.outputs}
    taken: dict[int, dict[str, Columns]] = {}
    axes: dict[str, int] = {}
    for number, group in enumerate(groups):
        columns: dict[str, Columns] = {}
        for member in group.readers:
            use = weights.use_of(member.node, member.index, member.labels.ndim, None)
            x, at = member.node.inputs[0], _columns(group, member)
            if x in inner and at is not None and use is not None and use.kind in _AXES:
                columns.setdefault(str(x.name), at)
                axes[str(x.name)] = _AXES[use.kind]
        step = -(-len(columns) // ACTIVATIONS) or 1
        taken[number] = dict(list(columns.items())[::step])
    wanted = {x: axes[x] for own in taken.values() for x in own}
    rng = np.random.default_rng([ctx.recipe.seed, len(groups)])
    rows = calibrate_rows.take(model, dataset, wanted, ROWS, rng, threads=ctx.threads)
    return {
        number: np.concatenate([rows[x][:, at] for x, at in own.items()])
        for number, own in taken.items()
        if own
    }


_AXES = {"matmul": -1, "gemm": -1, "conv": 1}


def _columns(group: Group, member: symmetry.Member) -> Columns | None:
    """Where a reader's input has the group's channels, in the group's order; None where it lacks some."""
    places, first = np.unique(group.positions(member).ravel(), return_index=True)
    held = first[places >= 0]
    return held if len(held) == group.size else None
