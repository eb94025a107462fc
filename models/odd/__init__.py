"""Small graphs with one odd thing each: what every pass, solver and target must survive.

Example:
    for name, build in ODD.items():
        model = build()                       # fresh, the same bytes each time
        sample = feeds(model, batch=2, seq=7)
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.models.odd import control_flow, corners, operators, sharing
from qgraph.models.odd.collect import ODD

__all__ = ["ODD", "control_flow", "corners", "feeds", "operators", "sharing"]

# Integer inputs stay below this: they index every table of the zoo and of the odd graphs.
SAFE_INTEGERS = 96


def feeds(
    model: ir.Model, seed: int = 0, batch: int = 2, seq: int = 7
) -> dict[str, npt.NDArray[np.generic]]:
    """Return sample inputs for `model`, made from the types and shapes it declares.

    A dimension called "batch" (or a first dimension without a name) is `batch`, each other symbolic
    dimension is `seq`. Floats are standard normal; integers are valid token ids. Inputs that have
    an initializer are left at their default.
    """
    random = np.random.default_rng(seed)
    return {
        str(value.name): _sample(value, random, batch, seq)
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    }


def _sample(
    value: ir.Value, random: np.random.Generator, batch: int, seq: int
) -> npt.NDArray[np.generic]:
    if value.shape is None or value.dtype is None:
        raise ValueError(f"Input {value.name} declares no shape or no type; feed it by hand.")
    shape = [
        dim if isinstance(dim, int) else batch if _is_batch(dim, axis) else seq
        for axis, dim in enumerate(value.shape)
    ]
    dtype = value.dtype.numpy()
    if value.dtype == ir.DataType.BOOL:
        return np.asarray(random.integers(0, 2, shape), bool)
    if value.dtype.is_integer():
        return np.asarray(random.integers(0, SAFE_INTEGERS, shape), dtype)
    return np.asarray(random.standard_normal(shape), dtype)


def _is_batch(dim: ir.SymbolicDim, axis: int) -> bool:
    return dim.value == "batch" or (dim.value is None and axis == 0)
