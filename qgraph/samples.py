"""The samples of a run, as passes ask for them."""

from __future__ import annotations

import onnx_ir as ir

from qgraph import data, errors
from qgraph.pipeline import Context


def require(
    model: ir.Model, ctx: Context, who: str, why: str, hint: str = errors.GIVE_SAMPLES
) -> data.Dataset:
    """The samples, checked against the model's inputs.

    Args:
        model: the float model.
        ctx: has them, or what they can be loaded from.
        who: asks.
        why: as in "calibration needs samples".
        hint: what to do where there are none.

    Raises:
        errors.InputError: QG131 where there are none; what `data.load` raises.
    """
    if ctx.data is None:
        raise errors.InputError(errors.Diagnostic("error", "QG131", who, why, hint))
    if not isinstance(ctx.data, data.Dataset):
        ctx.data = data.load(ctx.data, data.inputs_of(model))
    found: data.Dataset = ctx.data
    ctx.diagnostics.extend(n for n in found.notes if n not in ctx.diagnostics)
    return found
