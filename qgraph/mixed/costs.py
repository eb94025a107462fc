"""How much each weight loses in each format: Σ e H eᵀ over its rows, H being the mean of x xᵀ of its inputs.

The weights are solved for it with the inputs of the float model, which needs each Gram matrix once and serves every
mixture. Weights without one (tables, convolutions) count plain squares: only ratios between the formats of one weight
are used, for what an error does at the outputs is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph import calibrate, errors, registry
from qgraph.calibrate import grams
from qgraph.data import Dataset
from qgraph.mixed.items import Item
from qgraph.observers import Wanted
from qgraph.passes import solve_weights
from qgraph.pipeline import Context
from qgraph.recipe import FLOAT, Rule
from qgraph.solver import Solver, WeightStats
from qgraph.spec import Floats, QTensor, QuantSpec
from qgraph.spool import Packed, Spool
from qgraph.weights import Weight

QUICK = "gptq"
"""Stands in these trials for the solvers that see data; others are quick themselves."""
_PART = 1 << 20  # elements of a weight that are weighed at once
_MEMORY = 512 << 20  # bytes of Gram matrices at once


def solve(
    model: ir.Model, items: Sequence[Item], dataset: Dataset, ctx: Context, spool: Spool
) -> dict[tuple[str, str], QTensor]:
    """Quantize every weight in every format of its item, and put the costs into the options.

    Args:
        model: the float model.
        items: their options get costs.
        dataset: samples.
        ctx: says how many threads, which options of solvers, and where progress goes.
        spool: where the quantized weights wait.

    Returns:
        By weight name and spec.

    Raises:
        errors.InputError: QG401 for a weight, QG403 for inputs with NaN or Inf.
    """
    wanted: dict[str, tuple[Weight, list[str]]] = {}
    rules = {w.name: item.rule for item in items for w in item.weights}
    for item in items:
        for place, weight in enumerate(item.weights):
            specs = [o.specs[place] for o in item.options if o.specs[place] != FLOAT]
            wanted[weight.name] = weight, list(dict.fromkeys(specs))
    solved: dict[tuple[str, str], QTensor] = {}
    costs: dict[tuple[str, str], float] = {}
    solvers: dict[str, Solver] = {}
    known = _with_grams(model, [w for w, _ in wanted.values()], dataset, ctx)
    for done, (weight, gram) in enumerate(known):
        ctx.progress(f"weighing formats of {weight.label}", done / len(wanted))
        w = np.asarray(weight.read(), np.float32)
        if not np.isfinite(w).all():
            raise errors.InputError(
                errors.Diagnostic(
                    "error", "QG401", weight.label, "has NaN or Inf",
                    f'repair the model, or keep it float with a rule: names = ["{weight.label}"], weights = "float"',
                )
            )  # fmt: skip
        if gram is not None and not np.isfinite(gram).all():
            raise errors.InputError(
                errors.Diagnostic(
                    "error", "QG403", weight.label, "its input has NaN or Inf", "leave such samples out"
                )
            )  # fmt: skip
        stats = None if gram is None else WeightStats(np.diag(gram).astype(np.float32), gram)
        name = _quick(rules[weight.name], is_blind=gram is None)
        # Weights that share an input come one after the other: a solver keeps what it made of its Gram matrix.
        solver = solvers[name] = solvers.get(name) or solve_weights.make_solver(name, ctx)
        for text in wanted[weight.name][1]:
            q = solver.solve(w, QuantSpec.parse(text), stats, np.random.default_rng(0))
            costs[weight.name, text] = _weighed(w, q, gram)
            solved[weight.name, text] = Packed(q, spool)
    for item in items:
        item.options = [
            replace(o, cost=sum(_cost(costs, w, s) for w, s in zip(item.weights, o.specs, strict=True)))
            for o in item.options
        ]  # fmt: skip
    return solved


def _weighed(w: Floats, q: QTensor, gram: grams.Doubles | None) -> float:
    """Σ e H eᵀ over the rows in float64, some of them at a time."""
    total = 0.0
    quantized = q.dequantize()
    step = max(1, _PART // max(w.shape[1], 1))
    for start in range(0, len(w), step):
        e = w[start : start + step].astype(np.float64) - quantized[start : start + step]
        total += float(np.einsum("nk,nk->", e if gram is None else e @ gram, e))
    return max(total, 0.0)


def _cost(costs: dict[tuple[str, str], float], weight: Weight, spec: str) -> float:
    return 0.0 if spec == FLOAT else costs[weight.name, spec]


def _quick(rule: Rule, *, is_blind: bool) -> str:
    """The solver that stands for the rule's."""
    if registry.get("solver", rule.solver).statistics == "none":
        return rule.solver
    return "rtn" if is_blind else QUICK


def _with_grams(
    model: ir.Model, found: Sequence[Weight], dataset: Dataset, ctx: Context
) -> Iterator[tuple[Weight, grams.Doubles | None]]:
    """Each weight with the Gram matrix of its inputs, None where there is none."""
    reading: list[tuple[Weight, tuple[str, ...]]] = []
    for weight in found:
        inputs = grams.inputs_of(weight)
        if isinstance(inputs, str):
            yield weight, None
        else:
            reading.append((weight, inputs))
    for batch in grams.batches(reading, _MEMORY):
        names = dict.fromkeys(n for _, inputs in batch for n in inputs)
        wanted = dict.fromkeys(names, Wanted(gram=True))
        stats = calibrate.run(model, dataset, wanted, threads=ctx.threads, progress=ctx.progress)
        held = grams.Grams(stats)
        for weight, inputs in batch:
            yield weight, held.of(inputs)
