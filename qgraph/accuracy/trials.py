"""The end of a pipeline, again and again: the same model and statistics under another recipe."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from qgraph import files, graph
from qgraph.accuracy.shared import Shared
from qgraph.pipeline import Context, Instrument, Pass, Pipeline, StopPipeline
from qgraph.plan import QuantPlan
from qgraph.recipe import Recipe
from qgraph.report import Operator
from qgraph.spool import Spool
from qgraph.workdir import WorkDir

DECIDES = "assign-precision"
"""The pass that reads the recipe's rules: what comes before it is the same for all rules."""


class Checkpoint(Instrument):
    """Keeps the model and its context as they were before the pass that decides.

    The copy shares its tensors with the model, so it costs no memory to speak of.

    Args:
        stops: the run ends there.
    """

    def __init__(self, *, stops: bool = False) -> None:
        self.kept: tuple[ir.Model, Context] | None = None
        self._stops = stops

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        """Keep them, the first time."""
        if each.name == DECIDES and self.kept is None:
            self.kept = graph.clone(model), branch(ctx)
            if self._stops:
                raise StopPipeline


def branch(ctx: Context) -> Context:
    """A context that goes its own way: data and statistics are shared, nothing that passes write is."""
    return replace(
        ctx,
        plan=QuantPlan(),
        facts=set(ctx.facts),
        diagnostics=list(ctx.diagnostics),
        records={name: dict(record) for name, record in ctx.records.items()},
        operators=dict(ctx.operators),
        placed=None,
        rng=copy.deepcopy(ctx.rng),
        work=None,  # it is for one plan
    )


@dataclass(frozen=True)
class Trials:
    """Runs what is left of a pipeline.

    Attributes:
        pipeline: all of it.
        model: as it was before the pass that decides.
        context: of that moment.
        operators: what the float model's operators cost, where that was counted.
        shared: where the weights lie that all trials have in common; None writes them into each.
    """

    pipeline: Pipeline
    model: ir.Model
    context: Context
    operators: Mapping[str, Operator] = field(default_factory=dict)
    shared: Shared | None = None

    @property
    def start(self) -> int:
        """The number of the pass that decides."""
        return [p.name for p in self.pipeline.passes].index(DECIDES)

    def run(
        self,
        recipe: Recipe,
        spool: Spool,
        *,
        inspect: bool,
        instruments: Sequence[Instrument] = (),
        work: WorkDir | None = None,
    ) -> tuple[ir.Model, Context]:
        """The model under another recipe, and what its passes left behind.

        Args:
            recipe: its pipeline is not looked at, its rules and options of solvers are.
            spool: where solved weights wait.
            inspect: the target's runtime may be asked what it executes.
            instruments: watch the passes.
            work: folder of finished work, where this recipe is the one that it is for.

        Raises:
            errors.QGraphError: whatever a pass finds.
        """
        model = graph.clone(self.model)
        ctx = replace(branch(self.context), recipe=recipe, spool=spool, inspect=inspect, work=work)
        ctx.operators = {
            name: replace(o, runs="", integer=False, code="", reason="")
            for name, o in self.operators.items()
        }
        self.pipeline.run(model, ctx, instruments, start=self.start)
        return model, ctx

    @contextlib.contextmanager
    def written(self, recipe: Recipe, *, inspect: bool) -> Iterator[tuple[Path, Context]]:
        """As `run`, with the model in a file that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="qgraph-trial-") as folder:
            model, ctx = self.run(recipe, Spool(Path(folder)), inspect=inspect)
            if self.shared is None:
                yield files.save(model, Path(folder) / "model.onnx"), ctx
                return
            path = self.shared.save(model)
            try:
                yield path, ctx
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[Trials]:
        """These trials with their common weights on disk once, as long as the context lasts."""
        if self.shared is not None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="qgraph-trials-") as folder:
            yield replace(self, shared=Shared(self.model, Path(folder)))
