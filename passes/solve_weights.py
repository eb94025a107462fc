"""solve-weights: float weights of the plan → codes and scales, one weight at a time.

The model is cut into blocks at its narrow points, and one block after the other is solved: its weights, one at a time,
and what is known about their inputs are all that is in memory. What is solved goes to the spool, and to the work folder
where there is one. A weight with NaN or Inf is an error, not a guess. Solvers that ask for Gram matrices get those of
the inputs that their weights will see behind the blocks that are solved already (or of the float model's).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from qgraph import cuts, errors, mapped, registry, samples, spool, weights, workdir
from qgraph.calibrate import groups
from qgraph.calibrate.sequence import Course
from qgraph.calibrate.simulate import Simulated, simulate
from qgraph.calibrate.twins import Doubles, Means, Twins
from qgraph.passes.solvers import weighted
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.plan import Decision
from qgraph.registry import register
from qgraph.solver import Solver, WeightStats
from qgraph.spec import QTensor
from qgraph.spool import Packed
from qgraph.weights import Weight

_CHUNK = 1 << 20
_RECORDED = ("squared_error", "sqnr_db", "elements")


@register
class SolveWeights(Pass):
    """Run each weight's solver."""

    name = "solve-weights"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN})
    gives = frozenset({Fact.SOLVED})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """Which inputs are collected."""

        inputs: Literal["quantized", "float"] = "quantized"
        """What solvers with data see: inputs of a model whose weights up to there are quantized, or those of the float
        model. Each operator runs once on all samples, in both models or in the float one."""
        activations: Literal["rounded", "float"] = "rounded"
        """Whether inputs are rounded meanwhile, where operators of the result will round them, or left float."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan.solved`."""
        decisions = {d.value: d for d in ctx.plan.quantized()}
        solvers = {d.solver: make_solver(d.solver, ctx) for d in decisions.values()}
        simulated = Simulated(model, {})
        is_rounded = self.options_as(SolveWeights.Options).activations == "rounded"
        if is_rounded and any(s.statistics != "none" for s in solvers.values()):
            simulated = simulate(model, ctx.plan, ctx.target)
        found = [w for w in weights.find(simulated.model) if w.name in decisions]
        inputs = {w.name: _inputs(w, solvers[decisions[w.name].solver], ctx) for w in found}
        blocks = groups.blocks(cuts.Order(simulated.model), found, inputs)
        if ctx.work is not None:
            plan = hashlib.sha256(ctx.plan.to_json().encode()).hexdigest()
            ctx.work.require({"plan": plan, "weights": workdir.digest(model)}, workdir.REPLANNED)
        total, done = sum(w.nbytes for w in found) or 1, 0
        asking = next((decisions[n] for n, asked in inputs.items() if asked), None)
        kept: dict[str, Packed] = {}
        with self._course(simulated, blocks, asking, ctx) as course:
            solving = _Solving(decisions, solvers, course, simulated.origins, ctx)
            for number, block in enumerate(blocks):
                name = f"block-{number:04d}"
                where = f"block {number + 1} of {len(blocks)}"
                ctx.progress(where, done / total)
                solved = _restored(name, ctx)
                if solved is None:
                    first = len(ctx.diagnostics)
                    solved = {}
                    for weight, q in solving.block(block):
                        solved[weight.name] = q
                        done += weight.nbytes
                        ctx.progress(f"{where}, {weight.label}", done / total)
                    _store(name, solved, first, ctx)
                    if course is not None:
                        course.finish(number)
                else:
                    for weight in (w for each in block.groups for w in each.weights):
                        done += weight.nbytes
                        if course is not None:
                            course.replace(weight, solved[weight.name])
                    if course is not None:
                        course.skip(number)
                kept.update(solved)
                mapped.release(model)
                for q in solved.values():
                    spool.drop(q)
        ctx.plan.solved.update({name: kept[name] for name in decisions})
        ctx.progress("solved", 1.0)
        return False

    @contextlib.contextmanager
    def _course(
        self,
        simulated: Simulated,
        blocks: Sequence[groups.Block],
        asking: Decision | None,
        ctx: Context,
    ) -> Iterator[Course | None]:
        """The way through the model, where `asking`, the first that wants to know its inputs, is not None."""
        if asking is None:
            yield None
            return
        why = "needs samples to know what its weights are multiplied with"
        dataset = samples.require(simulated.model, ctx, f"solver {asking.solver}", why)
        is_float = self.options_as(SolveWeights.Options).inputs == "float"
        folder = None if ctx.work is None else ctx.work.folder
        with tempfile.TemporaryDirectory(prefix="qgraph-walk-") as place:
            twins = Twins(simulated, dataset, Path(place), ctx.threads, alone=is_float)
            yield Course(twins, blocks, folder)


@dataclass(frozen=True)
class _Solving:
    """Solves block after block."""

    decisions: Mapping[str, Decision]
    solvers: Mapping[str, Solver]
    course: Course | None
    origins: Mapping[str, str]
    ctx: Context

    def block(self, block: groups.Block) -> Iterator[tuple[Weight, Packed]]:
        """The weights of a block with their results; each is written while the next is solved."""
        places = {name: place for place, name in enumerate(self.decisions)}
        waiting: list[tuple[Weight, Future[Packed]]] = []
        with ThreadPoolExecutor(1) as keeper:
            for weight, stats in self._known(block):
                decision = self.decisions[weight.name]
                # What is random depends on the weight's place in the plan, not on the order of solving.
                rng = np.random.default_rng([self.ctx.recipe.seed, places[weight.name]])
                q = self._solve(weight, decision, stats, rng)
                made = keeper.submit(Packed, q, self.ctx.spool)
                if self.course is not None:
                    self.course.replace(weight, made)
                yield from ((before, future.result()) for before, future in waiting)
                waiting = [(weight, made)]
            yield from ((before, future.result()) for before, future in waiting)

    def _known(self, block: groups.Block) -> Iterator[tuple[Weight, WeightStats | None]]:
        """The weights of a block with what is known about their inputs."""
        for group in block.groups:
            if not group.inputs or self.course is None:
                yield from ((weight, None) for weight in group.weights)
                continue
            self.ctx.progress(f"calibrating {group.weights[0].label}", 0.0)
            names = [self.origins.get(n, n) for n in group.inputs]
            halves = self.course.collect(group)
            yield from _from_means(halves, group.weights, names, self.ctx)

    def _solve(
        self,
        weight: Weight,
        decision: Decision,
        stats: WeightStats | None,
        rng: np.random.Generator,
    ) -> QTensor:
        w = weight.read()
        power = _power(w, weight, self.ctx.threads)
        assert decision.spec is not None
        q = self.solvers[decision.solver].solve(w, decision.spec, stats, rng)
        error = q.error if stats is None else weighted.plain_error(w, q)
        sqnr = math.inf if error == 0 else 10 * math.log10(power / error) if power else -math.inf
        self.ctx.records.setdefault(weight.name, {}).update(
            squared_error=error, sqnr_db=sqnr, elements=w.size
        )
        return q


def _store(name: str, solved: Mapping[str, Packed], first: int, ctx: Context) -> None:
    """Keep a block's results, and the findings from number `first` on, in the work folder."""
    if ctx.work is None:
        return
    facts = [
        {"name": n, **q.facts, "record": {k: ctx.records[n][k] for k in _RECORDED}}
        for n, q in solved.items()
    ]
    found = [asdict(d) for d in ctx.diagnostics[first:]]
    ctx.work.store(name, spool.gathered(solved.values()), {"weights": facts, "diagnostics": found})


def _restored(name: str, ctx: Context) -> dict[str, Packed] | None:
    """The results of a block that was finished before the work was interrupted."""
    held = None if ctx.work is None else ctx.work.load(name)
    if held is None:
        return None
    arrays, facts = held
    packed = spool.restored(facts["weights"], arrays, ctx.spool)
    solved = {each["name"]: q for each, q in zip(facts["weights"], packed, strict=True)}
    for each in facts["weights"]:
        ctx.records.setdefault(each["name"], {}).update(each["record"])
    ctx.diagnostics.extend(errors.Diagnostic(**each) for each in facts["diagnostics"])
    return solved


def _inputs(weight: Weight, solver: Solver, ctx: Context) -> tuple[str, ...]:
    """The tensors whose Gram matrix the solver asks for; none where it asks for nothing or there can be none."""
    if solver.statistics == "none":
        return ()
    inputs = groups.inputs_of(weight)
    if isinstance(inputs, str):
        message = f"solver {solver.name} has no Gram matrix for it: {inputs}"
        hint = "it was solved as if all inputs were alike and independent"
        ctx.report("note", "QG404", weight.label, message, hint)
        return ()
    return inputs


def _from_means(
    halves: tuple[Means, Means], group: Sequence[Weight], names: Sequence[str], ctx: Context
) -> Iterator[tuple[Weight, WeightStats | None]]:
    """What is known about each weight of a group; the Gram matrix is shared, and the halves are used up."""
    whole, rest = halves
    shares = [_share(weight, halves) for weight in group]
    whole.take(rest)
    gram, missing = whole.gram, whole.cross
    if gram is not None and missing is not None:
        missing -= gram
    for index, (weight, share) in enumerate(zip(group, shares, strict=True)):
        known = _known(gram, weight, names, ctx)
        if known is not None and missing is not None:
            assert gram is not None
            offset = whole.offsets.pop(weight.name, None)
            if offset is not None:
                offset *= share
            # These matrices are the largest things in memory: the last weight gets the one that is there.
            cross = missing if index == len(group) - 1 else missing.copy()
            cross *= share
            cross += gram
            known = replace(known, cross=cross, offset=offset)
        yield weight, known


def _share(weight: Weight, halves: tuple[Means, Means]) -> float:
    """How much of what the halves ask for is more than noise; of a weight of several layers, each layer's part of it.

    At the first of these layers little is lost yet, at the last what this very weight loses before it: a correction as
    large as the last one asks for makes the first ones worse (docs/notes/solvers.md).
    """
    first, second = (half.stats(weight.name) for half in halves)
    if first is None or second is None or first.cross is None or second.cross is None:
        return 1.0
    share = weighted.shrinkage(weight.read(), (first, second), weighted.DAMPING)
    return share / max(1, len(weight.uses))


def _known(
    gram: Doubles | None, weight: Weight, names: Sequence[str], ctx: Context
) -> WeightStats | None:
    if gram is None:
        ctx.report(
            "warning", "QG405", weight.label, f"the samples never reach {' or '.join(names)}",
            "it was solved as if all inputs were alike; give samples that take every branch",
        )  # fmt: skip
        return None
    if not np.isfinite(gram).all():
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG403", weight.label, f"its input {' or '.join(names)} has NaN or Inf",
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
