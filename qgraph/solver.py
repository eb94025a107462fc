"""The solver protocol: a matrix in, a `QTensor` out. A solver never sees the graph, the plan or the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from qgraph.spec import Floats, QTensor, QuantSpec


class SolverOptions(BaseModel):
    """Base of a solver's options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class WeightStats:
    """What calibration knows about the input of a weight.

    Attributes:
        importance: [K] mean of x² per input channel, or None without data.
        gram: [K, K] mean of x xᵀ, or None; of x̃ x̃ᵀ where there is a cross.
        cross: [K, K] mean of x x̃ᵀ, x being the input in the float model and x̃ in one whose weights before this one
            are quantized; None where both are the same.
        offset: [N, K] mean of (r - r̃) x̃ᵀ, r being what the output is added to; None counts as zeros.
    """

    importance: Floats | None = None
    gram: npt.NDArray[np.floating[Any]] | None = None
    cross: npt.NDArray[np.floating[Any]] | None = None
    offset: npt.NDArray[np.floating[Any]] | None = None


class Solver(ABC):
    """Base class of solvers. Set `name` and implement `solve`; `statistics` says what of the inputs it asks for."""

    name: ClassVar[str]
    statistics: ClassVar[Literal["none", "importance", "blocks", "gram"]] = "none"
    """What it reads of the Gram matrix: nothing, the diagonal, what lies inside the groups, or all of it."""
    Options: ClassVar[type[SolverOptions]] = SolverOptions

    def __init__(self, **options: Any) -> None:
        self.options = self.Options(**options)

    @abstractmethod
    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Quantize a matrix.

        Args:
            w: [N, K] weights, read-only; possibly a memory-mapped view in any layout or float type.
            spec: how to quantize.
            stats: what is known about the inputs, or None.
            rng: the only source of randomness.

        Returns:
            Codes and scales for w; `QTensor.error` is the solver's own objective.
        """
