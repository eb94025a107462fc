"""How much each weight loses in each format: Σ e H eᵀ over its rows, H being the mean of x xᵀ of its inputs.

The weights are solved for it with the inputs of the float model, which needs each Gram matrix once and serves every
mixture. Weights without one (tables, convolutions) count plain squares: only ratios between the formats of one weight
are used, for what an error does at the outputs is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph import cuts, errors, mapped, registry
from qgraph.calibrate import groups
from qgraph.calibrate.sequence import Course
from qgraph.calibrate.simulate import Simulated
from qgraph.calibrate.twins import Doubles, Twins
from qgraph.data import Dataset
from qgraph.mixed.items import Item
from qgraph.passes import solve_weights
from qgraph.pipeline import Context
from qgraph.recipe import FLOAT, Rule
from qgraph.solver import Solver, WeightStats
from qgraph.spec import Floats, QTensor, QuantSpec
from qgraph.spool import Packed, Spool, drop, gathered, restored
from qgraph.weights import Weight
from qgraph.workdir import WorkDir

QUICK = "gptq"
"""Stands in these trials for the solvers that see data; others are quick themselves."""
_PART = 1 << 20  # elements of a weight that are weighed at once


def solve(
    model: ir.Model,
    items: Sequence[Item],
    dataset: Dataset,
    ctx: Context,
    spool: Spool,
    work: WorkDir | None = None,
) -> dict[tuple[str, str], QTensor]:
    """Quantize every weight in every format of its item, and put the costs into the options.

    The model is walked through block by block, as where its weights are solved for the file.

    Args:
        model: the float model.
        items: their options get costs.
        dataset: samples.
        ctx: says how many threads, which options of solvers, and where progress goes.
        spool: where the quantized weights wait.
        work: keeps the results of each block, and knows those from before an interruption; or None.

    Returns:
        By weight name and spec.

    Raises:
        errors.InputError: QG401 for a weight, QG403 for inputs with NaN or Inf.
    """
    wanted: dict[str, list[str]] = {}
    for item in items:
        for place, weight in enumerate(item.weights):
            specs = [o.specs[place] for o in item.options if o.specs[place] != FLOAT]
            wanted[weight.name] = list(dict.fromkeys(specs))
    found = [w for item in items for w in item.weights]
    inputs = {w.name: i if isinstance(i := groups.inputs_of(w), tuple) else () for w in found}
    blocks = groups.blocks(cuts.Order(model), found, inputs)
    weighing = _Weighing({w.name: item.rule for item in items for w in item.weights}, wanted, ctx)
    solved: dict[tuple[str, str], QTensor] = {}
    costs: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory(prefix="qgraph-walk-") as folder:
        twins = Twins(Simulated(model, {}), dataset, Path(folder), ctx.threads, alone=True)
        course = Course(twins, blocks, None if work is None else work.folder)
        for number, block in enumerate(blocks):
            held = _restored(number, spool, work)
            if held is None:
                ctx.progress(f"weighing formats, block {number + 1}", number / len(blocks))
                held = list(weighing.block(block, course, spool))
                _store(number, held, work)
                course.finish(number)
            else:
                course.skip(number)
            solved.update(((e.weight, e.spec), e.q) for e in held)
            costs.update(((e.weight, e.spec), e.cost) for e in held)
            mapped.release(model)
            for each in held:
                drop(each.q)
    for item in items:
        item.options = [
            replace(o, cost=sum(_cost(costs, w, s) for w, s in zip(item.weights, o.specs, strict=True)))
            for o in item.options
        ]  # fmt: skip
    return solved


@dataclass(frozen=True, slots=True)
class _Weighed:
    """One weight in one format."""

    weight: str
    spec: str
    q: Packed
    cost: float


@dataclass(frozen=True)
class _Weighing:
    """Weighs block after block."""

    rules: Mapping[str, Rule]
    wanted: Mapping[str, Sequence[str]]
    ctx: Context
    solvers: dict[str, Solver] = field(default_factory=dict)

    def block(self, block: groups.Block, course: Course, spool: Spool) -> Iterator[_Weighed]:
        """The weights of a block in all of their formats."""
        for group in block.groups:
            gram = _gram(course, group)
            # Weights that share an input come one after the other: a solver keeps what it made of its Gram matrix.
            for weight in group.weights:
                yield from self._weight(weight, gram, spool)

    def _weight(self, weight: Weight, gram: Doubles | None, spool: Spool) -> Iterator[_Weighed]:
        w = np.asarray(weight.read(), np.float32)
        _require_finite(weight, w, gram)
        stats = None if gram is None else WeightStats(np.diag(gram).astype(np.float32), gram)
        name = _quick(self.rules[weight.name], is_blind=gram is None)
        solver = self.solvers.get(name) or solve_weights.make_solver(name, self.ctx)
        self.solvers[name] = solver
        for text in self.wanted[weight.name]:
            q = solver.solve(w, QuantSpec.parse(text), stats, np.random.default_rng(0))
            yield _Weighed(weight.name, text, Packed(q, spool), _weighed(w, q, gram))


def _gram(course: Course, group: groups.Group) -> Doubles | None:
    """The Gram matrix that a group of weights shares; None where there is none, or the data never reached them."""
    if not group.inputs:
        return None
    whole, rest = course.collect(group)
    whole.take(rest)
    return whole.gram


def _require_finite(weight: Weight, w: Floats, gram: Doubles | None) -> None:
    """Refuse NaN and Inf.

    Raises:
        errors.InputError: QG401, QG403.
    """
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


def _store(number: int, held: Sequence[_Weighed], work: WorkDir | None) -> None:
    """Keep what a block's weights are in each format."""
    if work is None:
        return
    facts = [{"weight": e.weight, "asked": e.spec, "cost": e.cost, **e.q.facts} for e in held]
    work.store(f"block-{number:04d}", gathered(e.q for e in held), {"weighed": facts})


def _restored(number: int, spool: Spool, work: WorkDir | None) -> list[_Weighed] | None:
    """What a block's weights are in each format, where it was finished before an interruption."""
    kept = None if work is None else work.load(f"block-{number:04d}")
    if kept is None:
        return None
    arrays, facts = kept
    both = zip(facts["weighed"], restored(facts["weighed"], arrays, spool), strict=True)
    return [_Weighed(each["weight"], each["asked"], q, float(each["cost"])) for each, q in both]


def _weighed(w: Floats, q: QTensor, gram: Doubles | None) -> float:
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
