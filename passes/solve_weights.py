"""solve-weights: float weights of the plan → codes and scales, one weight at a time.

At most two weights are in memory: what is solved goes to the spool. A weight with NaN or Inf is an error, not a guess.
Solvers that ask for Gram matrices get those of the weight's inputs on the data, as many at a time as may be in memory;
or, one tensor after the other, those of the inputs that they will see behind the weights that are solved already.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

from qgraph import calibrate, cuts, data, errors, registry, weights, workdir
from qgraph.calibrate import grams, groups
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
_RECORDED = ("squared_error", "sqnr_db", "elements")


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
        decisions = {d.value: d for d in ctx.plan.quantized()}
        found = {w.name: w for w in weights.find(model) if w.name in decisions}
        solvers = {d.solver: make_solver(d.solver, ctx) for d in decisions.values()}
        inputs = {n: _inputs(w, solvers[decisions[n].solver], ctx) for n, w in found.items()}
        blocks = groups.blocks(cuts.Order(model), list(found.values()), inputs)
        if ctx.work is not None:
            plan = hashlib.sha256(ctx.plan.to_json().encode()).hexdigest()
            ctx.work.require({"plan": plan, "weights": workdir.digest(model)})
        total, done = sum(w.nbytes for w in found.values()) or 1, 0
        asking = next((decisions[n] for n, asked in inputs.items() if asked), None)
        kept: dict[str, Packed] = {}
        with self._seen(model, asking, ctx) as seen:
            for number, block in enumerate(blocks):
                name = f"block-{number:04d}"
                where = f"block {number + 1} of {len(blocks)}"
                ctx.progress(where, done / total)
                solved = _restored(name, ctx)
                if solved is None:
                    first = len(ctx.diagnostics)
                    solved = {}
                    for weight, q in self._block(block, seen, decisions, solvers, ctx):
                        solved[weight.name] = q
                        done += weight.nbytes
                        ctx.progress(f"{where}, {weight.label}", done / total)
                    _store(name, solved, first, ctx)
                else:
                    for each in block.groups:
                        for weight in each.weights:
                            seen.replace(weight, solved[weight.name])
                            done += weight.nbytes
                kept.update(solved)
        ctx.plan.solved.update({name: kept[name] for name in decisions})
        ctx.progress("solved", 1.0)
        return False

    def _block(
        self,
        block: groups.Block,
        seen: _Seen,
        decisions: Mapping[str, Decision],
        solvers: Mapping[str, Solver],
        ctx: Context,
    ) -> Iterator[tuple[Weight, Packed]]:
        """Solve the weights of a block; each is written while the next is solved."""
        places = {name: place for place, name in enumerate(decisions)}
        waiting: list[tuple[Weight, Future[Packed]]] = []
        with ThreadPoolExecutor(1) as keeper:
            for weight, stats in seen.of(block, ctx):
                decision = decisions[weight.name]
                # What is random depends on the weight's place in the plan, not on the order of solving.
                rng = np.random.default_rng([ctx.recipe.seed, places[weight.name]])
                q = self._solve(weight, decision, solvers[decision.solver], stats, rng, ctx)
                seen.replace(weight, q)
                for before, future in waiting:
                    yield before, future.result()
                waiting = [(weight, keeper.submit(Packed, q, ctx.spool))]
            for before, future in waiting:
                yield before, future.result()

    @contextlib.contextmanager
    def _seen(self, model: ir.Model, asking: Decision | None, ctx: Context) -> Iterator[_Seen]:
        """What tells about the inputs of weights; `asking` is the first that wants to know."""
        if asking is None:
            yield _Seen()
            return
        options = self.options_as(SolveWeights.Options)
        dataset = _dataset(model, asking, ctx)
        if options.inputs == "float":
            yield _Float(model, dataset, options)
            return
        with tempfile.TemporaryDirectory(prefix="qgraph-twins-") as folder:
            yield _Quantized(Twins(model, dataset, Path(folder), ctx.threads))

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


class _Seen:
    """Statistics for the weights of each block: none here."""

    def of(self, block: groups.Block, ctx: Context) -> Iterator[tuple[Weight, WeightStats | None]]:
        """The weights of a block with what is known about their inputs."""
        for group in block.groups:
            yield from ((weight, None) for weight in group.weights)

    def replace(self, weight: Weight, q: QTensor) -> None:
        """Hear how a weight was solved."""


class _Float(_Seen):
    """Those of the float model."""

    def __init__(
        self, model: ir.Model, dataset: data.Dataset, options: SolveWeights.Options
    ) -> None:
        self._model, self._dataset, self._options = model, dataset, options

    def of(self, block: groups.Block, ctx: Context) -> Iterator[tuple[Weight, WeightStats | None]]:
        asked = [(w, g.inputs) for g in block.groups for w in g.weights]
        yield from ((w, None) for w, inputs in asked if not inputs)
        wanted = [(w, inputs) for w, inputs in asked if inputs]
        for batch in grams.batches(wanted, self._options.gram_memory << 20):
            names = dict.fromkeys(n for _, inputs in batch for n in inputs)
            stats = calibrate.run(
                self._model,
                self._dataset,
                dict.fromkeys(names, Wanted(gram=True)),
                threads=ctx.threads,
                max_memory=self._options.max_memory << 20,
            )
            held = grams.Grams(stats)
            for weight, inputs in batch:
                yield weight, _known(held.of(inputs), weight, inputs, ctx)


class _Quantized(_Seen):
    """Those of a model whose weights are quantized up to the block."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins

    def of(self, block: groups.Block, ctx: Context) -> Iterator[tuple[Weight, WeightStats | None]]:
        for group in block.groups:
            if not group.inputs:
                yield from ((weight, None) for weight in group.weights)
                continue
            held = list(group.weights)
            halves = collect(self._twins, held, group.inputs)
            yield from _from_means(halves, held, group.inputs, ctx)

    def replace(self, weight: Weight, q: QTensor) -> None:
        self._twins.replace(weight.name, weight.matrix.back(q.dequantize(), weight.dims))


def _store(name: str, solved: Mapping[str, Packed], first: int, ctx: Context) -> None:
    """Keep a block's results, and the findings from number `first` on, in the work folder."""
    if ctx.work is None:
        return
    facts = [
        {"name": n, **q.facts, "record": {k: ctx.records[n][k] for k in _RECORDED}}
        for n, q in solved.items()
    ]
    arrays = {
        f"{index}.{key}": array
        for index, q in enumerate(solved.values())
        for key, array in q.arrays.items()
    }
    found = [asdict(d) for d in ctx.diagnostics[first:]]
    ctx.work.store(name, arrays, {"weights": facts, "diagnostics": found})


def _restored(name: str, ctx: Context) -> dict[str, Packed] | None:
    """The results of a block that was finished before the work was interrupted."""
    held = None if ctx.work is None else ctx.work.load(name)
    if held is None:
        return None
    arrays, facts = held
    solved = {}
    for index, each in enumerate(facts["weights"]):
        prefix = f"{index}."
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        solved[each["name"]] = Packed.restored(each, own, ctx.spool)
        ctx.records.setdefault(each["name"], {}).update(each["record"])
    ctx.diagnostics.extend(errors.Diagnostic(**each) for each in facts["diagnostics"])
    return solved


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


def _from_means(
    halves: tuple[Means, Means], group: Sequence[Weight], inputs: tuple[str, ...], ctx: Context
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
