"""gptq: each column's rounding error is made up for by the columns that come after it.

Where the inputs are those of a model that is quantized up to here, errors of the weights before this one are made up
for as well (see `weighted`), as GPTAQ and Qronos do.

Columns go from the most to the least energy (act-order); scales and zero points come from a search on the original
weights first (static groups), so the result has plain blocks and needs no g_idx. Weights that read the same tensor
share the factored Gram matrix. Rows for which plain rounding is better keep that.
Reference: Frantar et al. 2022 (arXiv:2210.17323). `runtime_ops/kernels/feedback.h` has the inner loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qgraph.passes.solvers import weighted
from qgraph.passes.solvers.rtn import Rtn
from qgraph.registry import register
from qgraph.solver import Solver, SolverOptions, WeightStats
from qgraph.spec import QTensor, QuantSpec


@register
class Gptq(Solver):
    """Round column by column with error feedback under the Gram matrix of the inputs."""

    name = "gptq"
    statistics = "gram"

    class Options(SolverOptions):
        """Options of gptq."""

        damping: float = Field(weighted.DAMPING, gt=0)
        """Share of the mean diagonal added to the Gram matrix."""
        threads: int = 0
        """Threads to use; 0 is one per core."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert isinstance(self.options, Gptq.Options)
        self._prepared = weighted.Prepared(self.options.damping)

    def solve(
        self,
        w: npt.NDArray[np.floating[Any]],
        spec: QuantSpec,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        """Quantize w [N, K]; `error` is the sum of e H eᵀ over the rows."""
        assert isinstance(self.options, Gptq.Options)
        curvature = self._prepared.of(stats, w.shape[1])
        known = WeightStats(importance=weighted.importance(curvature))
        plain = Rtn(threads=self.options.threads)
        starts = [plain.solve(w, spec, known, rng)]
        target = curvature.target(w, stats)
        if target is not w and not spec.is_per_tensor:
            starts.append(plain.solve(target, spec, known, rng))
        task = weighted.Task(target, spec, curvature, self.options.threads)
        return task.improve(starts, self._ways(task))

    def _ways(self, task: weighted.Task) -> list[Any]:
        return [task.feedback]
