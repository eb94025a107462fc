"""The inputs of a model, and how a finding about them is raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, files

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
Casts: TypeAlias = dict[str, errors.Diagnostic]


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One model input.

    A dimension is a size, a name (symbolic) or None; shape is None where the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        """As messages name it: `input_ids int64[batch, seq]`."""
        dims = (
            "…"
            if self.shape is None
            else ", ".join("?" if d is None else str(d) for d in self.shape)
        )
        return f"{self.name} {self.dtype}[{dims}]"


def inputs_of(model: files.Source) -> tuple[InputInfo, ...]:
    """The inputs that a caller must feed, in graph order; those with a default are left out.

    Raises:
        errors.InputError: QG110 where an input is no tensor, QG101-104 where the model cannot be
            read.
    """
    graph = (model if isinstance(model, ir.Model) else files.load(model)).graph
    required = [value for value in graph.inputs if value.name not in graph.initializers]
    return tuple(map(_input_info, required))


def _input_info(value: ir.Value) -> InputInfo:
    if not isinstance(value.type, ir.TensorType):
        found = f"is {value.type or 'untyped'}, not a tensor"
        fail("QG110", f"model input {value.name!r}", found, "only tensor inputs can be fed")
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return InputInfo(value.name or "", np.dtype(value.type.dtype.numpy()), shape)


def error(code: str, where: str, message: str, hint: str) -> errors.Diagnostic:
    """An error with its code."""
    return errors.Diagnostic("error", code, where, message, hint)


def fail(
    code: str, where: str, message: str, hint: str, cause: BaseException | None = None
) -> NoReturn:
    """Raise InputError with one error."""
    raise errors.InputError(error(code, where, message, hint)) from cause
