"""solve-weights: float weights of the plan → codes and scales, one weight at a time.

Only one weight is in memory; what is solved goes to the spool. A weight with NaN or Inf is an error, not a guess.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from qgraph import errors, registry, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.plan import Decision
from qgraph.registry import register
from qgraph.solver import Solver
from qgraph.spec import QTensor
from qgraph.weights import Weight

_CHUNK = 1 << 22


@register
class SolveWeights(Pass):
    """Run each weight's solver."""

    name = "solve-weights"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN})
    gives = frozenset({Fact.SOLVED})
    keeps = Keeps.BIT_EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan.solved`."""
        found = {w.name: w for w in weights.find(model)}
        planned = ctx.plan.quantized()
        total = sum(found[d.value].nbytes for d in planned) or 1
        solvers: dict[str, Solver] = {}
        done = 0
        for decision in planned:
            weight = found[decision.value]
            ctx.progress(f"solving {weight.label}", done / total)
            if decision.solver not in solvers:
                solvers[decision.solver] = make_solver(decision.solver, ctx)
            self._solve(weight, decision, solvers[decision.solver], ctx)
            done += weight.nbytes
        ctx.progress("solved", 1.0)
        return False

    def _solve(self, weight: Weight, decision: Decision, solver: Solver, ctx: Context) -> None:
        w = weight.read()
        power = _power(w, weight)
        assert decision.spec is not None
        q = solver.solve(
            w, decision.spec, None, np.random.default_rng([ctx.recipe.seed, len(ctx.plan.solved)])
        )
        zero_point = None if q.zero_point is None else ctx.spool.keep(q.zero_point)
        ctx.plan.solved[weight.name] = QTensor(
            q.spec, ctx.spool.keep(q.codes), ctx.spool.keep(q.scale), zero_point, q.error
        )
        sqnr = (
            math.inf if q.error == 0 else 10 * math.log10(power / q.error) if power else -math.inf
        )
        ctx.records.setdefault(weight.name, {}).update(
            squared_error=q.error, sqnr_db=sqnr, elements=w.size
        )


def make_solver(name: str, ctx: Context) -> Solver:
    """The solver of that name with the recipe's options."""
    kind = registry.get("solver", name)
    options = dict(ctx.recipe.solvers.get(name, {}))
    if ctx.threads and "threads" in kind.Options.model_fields:
        options.setdefault("threads", ctx.threads)
    try:
        made: Solver = kind(**options)
    except ValidationError as e:
        keys = [".".join(map(str, p["loc"])) for p in e.errors()]
        raise errors.RecipeError(
            *(
                errors.Diagnostic(
                    "error",
                    "QG305",
                    f"solvers.{name}.{k}",
                    "is no option or has a bad value",
                    errors.nearest(k, kind.Options.model_fields),
                )
                for k in keys
            )
        ) from e
    return made


def _power(w: np.ndarray, weight: Weight) -> float:
    """Σ w² in float64, read in pieces; refuses NaN and Inf."""
    rows = max(1, _CHUNK // max(w.shape[1], 1))
    power = 0.0
    for start in range(0, w.shape[0], rows):
        part = np.asarray(w[start : start + rows], np.float32)
        power += float(np.einsum("nk,nk->", part, part, dtype=np.float64))
    if not math.isfinite(power):
        bad = [i for i in range(w.shape[0]) if not np.isfinite(np.asarray(w[i], np.float32)).all()]
        if not bad:
            return power
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG401",
                weight.label,
                f"has NaN or Inf in {len(bad)} of {w.shape[0]} output channels (first: {bad[0]})",
                "repair the model, or keep this weight float with a rule: "
                f'names = ["{weight.label}"], weights = "float"',
            )
        )
    return power
