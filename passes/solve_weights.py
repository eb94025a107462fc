"""solve-weights: float weights of the plan → codes and scales, one weight at a time.

At most two weights are in memory: what is solved goes to the spool. A weight with NaN or Inf is an error, not a guess.
Solvers that ask for Gram matrices get those of the weight's inputs on the data, as many at a time as may be in memory;
or, one tensor after the other, those of the inputs that they will see behind the weights that are solved already.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from qgraph import calibrate, data, errors, registry, weights
from qgraph.calibrate import grams
from qgraph.calibrate.twins import Means, Twins, collect
from qgraph.observers import Wanted
from qgraph.passes.solvers import weighted
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.plan import Decision
from qgraph.registry import register
from qgraph.solver import Solver, WeightStats
from qgraph.spec import QTensor
from qgraph.spool import Packed
from qgraph.weights import Weight

_CHUNK = 1 << 20
Tell = Callable[[Weight, QTensor], None]


@register
class SolveWeights(Pass):
    """Run each weight's solver."""

    name = "solve-weights"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN})
    gives = frozenset({Fact.SOLVED})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """What collecting Gram matrices may use."""

        gram_memory: int = 512
        """MiB of Gram matrices in memory at once; where that is too little the model runs several times."""
        max_memory: int = 32
        """MiB of activations alive at once in one of these runs."""
        inputs: Literal["quantized", "float"] = "quantized"
        """What solvers with data see: inputs of a model whose weights up to there are quantized (it runs once for every
        tensor that weights read, up to that tensor), or those of the float model (it runs as often as memory asks)."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan.solved`."""
        found = {w.name: w for w in weights.find(model)}
        planned = ctx.plan.quantized()
        solvers = {d.solver: make_solver(d.solver, ctx) for d in planned}
        total = sum(found[d.value].nbytes for d in planned) or 1
        kept: dict[str, Future[Packed]] = {}
        done = 0
        with ThreadPoolExecutor(1) as keeper:  # writes one weight while the next is solved
            for decision, stats, tell in self._with_statistics(model, found, solvers, ctx):
                weight = found[decision.value]
                ctx.progress(f"solving {weight.label}", done / total)
                # What is random depends on the weight's place in the plan, not on the order of solving.
                rng = np.random.default_rng([ctx.recipe.seed, planned.index(decision)])
                q = self._solve(weight, decision, solvers[decision.solver], stats, rng, ctx)
                tell(weight, q)
                wait(kept.values())
                kept[weight.name] = keeper.submit(Packed, q, ctx.spool)
                done += weight.nbytes
        ctx.plan.solved.update({d.value: kept[d.value].result() for d in planned})
        ctx.progress("solved", 1.0)
        return False

    def _with_statistics(
        self, model: ir.Model, found: dict[str, Weight], solvers: dict[str, Solver], ctx: Context
    ) -> Iterator[tuple[Decision, WeightStats | None, Tell]]:
        """Each decision with what its solver wants to know, and whom to tell the result; without statistics first."""
        asking: dict[str, Decision] = {}
        wanted: list[tuple[Weight, tuple[str, ...]]] = []
        plain: list[Decision] = []
        for decision in ctx.plan.quantized():
            weight = found[decision.value]
            inputs = _inputs(weight, solvers[decision.solver], ctx)
            if inputs:
                asking[weight.name] = decision
                wanted.append((weight, inputs))
            else:
                plain.append(decision)
        if not wanted:
            yield from ((decision, None, _no_one) for decision in plain)
            return
        dataset = _dataset(model, next(iter(asking.values())), ctx)
        options = self.options_as(SolveWeights.Options)
        if options.inputs == "quantized":
            with tempfile.TemporaryDirectory(prefix="qgraph-twins-") as folder:
                twins = Twins(model, dataset, Path(folder), ctx.threads)

                def tell(weight: Weight, q: QTensor) -> None:
                    twins.replace(weight.name, weight.matrix.back(q.dequantize(), weight.dims))

                yield from ((decision, None, tell) for decision in plain)
                for inputs, group in _by_inputs(wanted):
                    ctx.progress(f"calibrating {', '.join(inputs)}", 0.0)
                    halves = collect(twins, group, inputs)
                    for weight, known in _from_means(halves, group, inputs, ctx):
                        yield asking[weight.name], known, tell
            return
        yield from ((decision, None, _no_one) for decision in plain)
        for batch in grams.batches(wanted, options.gram_memory << 20):
            names = dict.fromkeys(n for _, inputs in batch for n in inputs)
            stats = calibrate.run(
                model,
                dataset,
                dict.fromkeys(names, Wanted(gram=True)),
                threads=ctx.threads,
                max_memory=options.max_memory << 20,
                progress=ctx.progress,
            )
            held = grams.Grams(stats)
            for weight, inputs in batch:
                yield asking[weight.name], _known(held.of(inputs), weight, inputs, ctx), _no_one

    def _solve(
        self,
        weight: Weight,
        decision: Decision,
        solver: Solver,
        stats: WeightStats | None,
        rng: np.random.Generator,
        ctx: Context,
    ) -> QTensor:
        w = weight.read()
        power = _power(w, weight, ctx.threads)
        assert decision.spec is not None
        q = solver.solve(w, decision.spec, stats, rng)
        error = q.error if stats is None else weighted.plain_error(w, q)
        sqnr = math.inf if error == 0 else 10 * math.log10(power / error) if power else -math.inf
        ctx.records.setdefault(weight.name, {}).update(
            squared_error=error, sqnr_db=sqnr, elements=w.size
        )
        return q


def _dataset(model: ir.Model, decision: Decision, ctx: Context) -> data.Dataset:
    """The samples, checked against the model's inputs."""
    if ctx.data is None:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG131", f"solver {decision.solver}",
                "needs samples to know what its weights are multiplied with", "give --data (data=...)",
            )
        )  # fmt: skip
    if not isinstance(ctx.data, data.Dataset):
        ctx.data = data.load(ctx.data, data.inputs_of(model))
        ctx.diagnostics.extend(ctx.data.notes)
    dataset: data.Dataset = ctx.data
    return dataset


def _inputs(weight: Weight, solver: Solver, ctx: Context) -> tuple[str, ...]:
    """The tensors whose Gram matrix the solver asks for; none where it asks for nothing or there can be none."""
    if solver.statistics == "none":
        return ()
    inputs = grams.inputs_of(weight)
    if isinstance(inputs, str):
        message = f"solver {solver.name} has no Gram matrix for it: {inputs}"
        hint = "it was solved as if all inputs were alike and independent"
        ctx.report("note", "QG404", weight.label, message, hint)
        return ()
    return inputs


def _by_inputs(
    wanted: list[tuple[Weight, tuple[str, ...]]],
) -> Iterator[tuple[tuple[str, ...], list[Weight]]]:
    """Weights that read the same tensors, group by group, in the order of their first."""
    groups: dict[tuple[str, ...], list[Weight]] = {}
    for weight, inputs in wanted:
        groups.setdefault(inputs, []).append(weight)
    yield from groups.items()


def _from_means(
    halves: tuple[Means, Means], group: list[Weight], inputs: tuple[str, ...], ctx: Context
) -> Iterator[tuple[Weight, WeightStats | None]]:
    """What is known about each weight of a group; the Gram matrix is shared."""
    whole = halves[0] + halves[1]
    first = whole.stats(group[0].name)
    gram = None if first is None else np.asarray(first.gram)
    for weight in group:
        known = _known(gram, weight, inputs, ctx)
        stats = whole.stats(weight.name)
        if known is None or stats is None:
            yield weight, None
            continue
        parts = [half.stats(weight.name) for half in halves]
        share = 1.0
        if parts[0] is not None and parts[1] is not None:
            share = weighted.shrinkage(weight.read(), (parts[0], parts[1]), weighted.DAMPING)
        assert gram is not None and stats.cross is not None
        cross = gram + share * (stats.cross - gram)
        offset = None if stats.offset is None else share * stats.offset
        yield weight, replace(known, cross=cross, offset=offset)


def _no_one(weight: Weight, q: QTensor) -> None:
    """Nobody waits for the result."""


def _known(
    gram: grams.Doubles | None, weight: Weight, inputs: tuple[str, ...], ctx: Context
) -> WeightStats | None:
    if gram is None:
        ctx.report(
            "warning", "QG405", weight.label, f"the samples never reach {' or '.join(inputs)}",
            "it was solved as if all inputs were alike; give samples that take every branch",
        )  # fmt: skip
        return None
    if not np.isfinite(gram).all():
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG403", weight.label, f"its input {' or '.join(inputs)} has NaN or Inf",
                'leave such samples out, or give the weight solver = "rtn" in a rule',
            )
        )  # fmt: skip
    return WeightStats(importance=np.diag(gram).astype(np.float32), gram=gram)


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
