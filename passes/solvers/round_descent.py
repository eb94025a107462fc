"""round-descent: codes, scales and zero points descend together on the Gram-weighted error, starting from gptq.

The error of a linear layer is a quadratic form, so the best change of one code, of one scale, or of one zero point has
a closed form; they take turns until none of them helps. Scales that fit the rounded codes then give gptq a better
grid, so both are repeated.
Sources: the closed form of AutoRound's objective for one layer (Cheng et al. 2023, arXiv:2309.05516); coordinate
descent as in QuantEase (Behdin et al. 2023, arXiv:2309.01885). `runtime_ops/kernels/descent.h` has the inner loop.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qgraph.passes.solvers import weighted
from qgraph.passes.solvers.gptq import Gptq
from qgraph.registry import register


@register
class RoundDescent(Gptq):
    """Descend on codes, scales and zero points under the Gram matrix of the inputs, from gptq's result."""

    name = "round-descent"

    class Options(Gptq.Options):
        """Options of round-descent."""

        sweeps: int = Field(12, ge=1)
        """At most so many passes over the codes of a row."""
        rounds: int = Field(2, ge=1)
        """How often gptq and descent take turns."""

    def _ways(self, task: weighted.Task) -> list[Any]:
        assert isinstance(self.options, RoundDescent.Options)
        return [task.feedback, task.descend(self.options.sweeps)] * self.options.rounds
