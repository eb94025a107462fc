"""solve-weights: float weights of the plan → codes and scales, one weight at a time.

At most two weights are in memory: what is solved goes to the spool. A weight with NaN or Inf is an error, not a guess.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from qgraph import errors, registry, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.plan import Decision
from qgraph.registry import register
from qgraph.solver import Solver
from qgraph.spec import QTensor
from qgraph.spool import Packed
from qgraph.weights import Weight

_CHUNK = 1 << 20


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
        kept: dict[str, Future[Packed]] = {}
        done = 0
        with ThreadPoolExecutor(1) as keeper:  # writes one weight while the next is solved
            for decision in planned:
                weight = found[decision.value]
                ctx.progress(f"solving {weight.label}", done / total)
                if decision.solver not in solvers:
                    solvers[decision.solver] = make_solver(decision.solver, ctx)
                rng = np.random.default_rng([ctx.recipe.seed, len(kept)])
                q = self._solve(weight, decision, solvers[decision.solver], rng, ctx)
                wait(kept.values())
                kept[weight.name] = keeper.submit(Packed, q, ctx.spool)
                done += weight.nbytes
        ctx.plan.solved.update({name: future.result() for name, future in kept.items()})
        ctx.progress("solved", 1.0)
        return False

    def _solve(
        self,
        weight: Weight,
        decision: Decision,
        solver: Solver,
        rng: np.random.Generator,
        ctx: Context,
    ) -> QTensor:
        w = weight.read()
        power = _power(w, weight, ctx.threads)
        assert decision.spec is not None
        q = solver.solve(w, decision.spec, None, rng)
        sqnr = (
            math.inf if q.error == 0 else 10 * math.log10(power / q.error) if power else -math.inf
        )
        ctx.records.setdefault(weight.name, {}).update(
            squared_error=q.error, sqnr_db=sqnr, elements=w.size
        )
        return q


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


def _power(w: np.ndarray, weight: Weight, threads: int) -> float:
    """Σ w², each row in float32 and over the rows in float64; refuses NaN and Inf."""
    stored = w if w.strides[0] >= w.strides[1] else w.T  # the rows of the file
    rows = max(1, _CHUNK // max(stored.shape[1], 1))

    def of(start: int) -> float:
        part = np.asarray(stored[start : start + rows], np.float32)
        return float(np.einsum("nk,nk->n", part, part).sum(dtype=np.float64))

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        power = math.fsum(pool.map(of, range(0, stored.shape[0], rows)))
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
