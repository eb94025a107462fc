"""One model on its way through a recipe: the passes, what is chosen by measuring, the floors, the file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph import accuracy, auto, errors, files, mixed, staging
from qgraph.data import Dataset
from qgraph.floors import FloorMissed, Floors
from qgraph.instruments import EquivalenceChecker, Verifier
from qgraph.pipeline import Context, Instrument, Pipeline, Timer
from qgraph.reaches import Reaches
from qgraph.recipe import Recipe
from qgraph.report import Report
from qgraph.spool import Spool
from qgraph.target import Target
from qgraph.workdir import WorkDir

if TYPE_CHECKING:
    from qgraph.evaluate import Comparison


@dataclass
class Compilation:
    """What `optimize` was asked for, with every name known to exist, and how far it is.

    Attributes:
        source: the float model as it was given.
        model: the same, loaded; the passes write into it.
        recipe: changes where something is chosen by measuring.
        pipeline: its passes.
        target: what the file is for.
        report: told of everything.
        data: samples, or None.
        floors: what the result must reach on them.
        destination: where the file will be, or None.
        kept: folder of finished work, or None.
        external_data: weights beside the model; None: over 256 MB.
        verify: "each", "ends" or "off".
        inspect: the target's runtime is asked what it executes.
        is_measured: the recipe's open choices are made by latency and error on the data.
        max_time: seconds for searches.
        threads: for solvers; 0 is one per core.
        instruments: watch the passes.
        progress: called with what is being done and the share done.
    """

    source: files.Source
    model: ir.Model
    recipe: Recipe
    pipeline: Pipeline
    target: Target
    report: Report
    data: Dataset | None
    floors: Floors
    destination: Path | None
    kept: WorkDir | None
    external_data: bool | None
    verify: str
    inspect: bool
    is_measured: bool
    max_time: float
    threads: int
    instruments: Sequence[Instrument]
    progress: Callable[[str, float], None]

    _ctx: Context = field(init=False)
    _spool: Spool = field(init=False)
    _watchers: list[Instrument] = field(init=False)
    _timer: Timer = field(init=False, default_factory=Timer)
    _checker: EquivalenceChecker = field(init=False, default_factory=EquivalenceChecker)
    _trials: accuracy.Trials | None = field(init=False, default=None)
    _chooser: mixed.Chooser | None = field(init=False, default=None)
    _told: dict[str, str] = field(init=False, default_factory=dict)

    def run(self, *, force: bool) -> Path | None:
        """All of it; returns the path of the file, which appears only when every check has passed.

        Raises:
            errors.QGraphError: see `optimize`.
        """
        self._spool = Spool(self.destination.parent if self.destination else None)
        self._run_passes()
        if self.is_measured:
            self._choose_forms()
        if mixed.is_mixed(self.recipe):
            self._choose_mixture()
        with staging.folder_beside(self.destination) as folder:
            staged = self._stage(folder)
            if self._chooser is not None:
                self._chooser.require_size(self.report.output_bytes)
            if self.floors.is_set:
                staged = self._hold_floors(staged, folder / "again")
            if self.data is not None and self.inspect and self.target.timed:
                staging.time_it(self.report, self.source, staged, self.data)
            path = None
            if self.destination is not None:
                path = files.publish(staged, self.destination, force=force)
        if self.kept is not None and self._is_whole:
            self.kept.clear()
        self.progress("done", 1.0)
        return path

    @property
    def _is_whole(self) -> bool:
        """No instrument ended the run early."""
        return self.pipeline.passes[-1].name in self._timer.seconds

    def _run_passes(self) -> None:
        """To the end, or to the pass that decides where that takes measuring."""
        is_chosen = self.is_measured or mixed.is_mixed(self.recipe)
        first = auto.observing(self.recipe) if self.is_measured else self.recipe
        self._ctx = Context(
            self.target, first, data=self.data, spool=self._spool, work=self.kept, threads=self.threads
        )  # fmt: skip
        self._ctx.progress, self._ctx.inspect = self.progress, self.inspect
        checkpoint, reaches = accuracy.Checkpoint(stops=is_chosen), Reaches()
        self._watchers = [self._timer]
        if self.verify != "off":
            self._watchers.append(Verifier(every=self.verify == "each"))
        if self.verify == "each":
            self._watchers.append(self._checker)
        self._watchers.extend([reaches, *self.instruments])
        is_kept = is_chosen or (self.floors.is_set and self.max_time > 0)
        extra = [checkpoint] if is_kept else []
        self.pipeline.run(self.model, self._ctx, [*self._watchers, *extra])
        self.report.shifts = reaches.shifts
        self.report.notes += reaches.lines
        if checkpoint.kept:
            self._trials = accuracy.Trials(self.pipeline, *checkpoint.kept)

    def _run_again(self, recipe: Recipe, work: WorkDir | None = None) -> None:
        """The end of the pipeline, under another recipe."""
        assert self._trials is not None
        self.recipe = recipe
        self.model, self._ctx = self._trials.run(
            recipe, self._spool, inspect=self.inspect, instruments=self._watchers, work=work
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.report.seconds[what] = time.monotonic() - started

    def _choose_forms(self) -> None:
        """Recipe `auto`: static or dynamic or float for every class of operators, by latency and error."""
        if self._trials is None or self.data is None:
            return  # the run was ended before anything could be decided
        with self._timed("choosing by measurement"):
            choice = auto.choose(
                self._trials, self.source, self.recipe, self.data,
                is_accuracy_held=self.floors.is_set, max_seconds=self.max_time,
                progress=self.progress,
            )  # fmt: skip
        self.report.choice, self._told = choice.figures, choice.told
        self._run_again(choice.recipe)

    def _choose_mixture(self) -> None:
        """Formats weight by weight, within a budget; known already where the work was interrupted after it."""
        if self._trials is None or self.data is None:
            return  # the run was ended before anything could be decided
        write = staging.Quick(self._trials, self.external_data, self.destination)
        with self._timed("mixed precision"):
            self._chooser = mixed.Chooser(
                self._trials, self.source, self.recipe, self.data, self.floors, write,
                max_seconds=self.max_time, progress=self.progress, kept=self.kept,
            )  # fmt: skip
            held = self.kept.load("mixed") if self.kept is not None else None
            choice = mixed.Choice.from_json(held[1]) if held else self._chooser.choose()
            if self.kept is not None and not held:
                self.kept.store("mixed", {}, choice.to_json())
        self.report.mixed, self._told = choice.figures, choice.told
        self.report.notes += choice.notes
        self._run_again(choice.recipe, self.kept)

    def _stage(self, folder: Path) -> Path:
        stage = staging.Stage(
            self.source, self.target, self.report, self._timer, self._checker,
            self.external_data, self.destination, self._told,
        )  # fmt: skip
        return stage(self.model, self._ctx, folder)

    def _stage_again(self, folder: Path) -> Path:
        if folder.exists():
            shutil.rmtree(folder)
        return self._stage(folder)

    def _judge(self, staged: Path) -> tuple[Comparison, list[errors.Diagnostic]]:
        found = self.floors.measure(self.source, staged)
        self.report.metrics.update(found.to_json())
        return found, self.floors.problems(found.outputs)

    def _hold_floors(self, staged: Path, folder: Path) -> Path:
        """The staged file, or one in `folder` that holds the floors.

        Raises:
            FloorMissed: nothing that was tried holds them.
        """
        found, problems = self._judge(staged)
        can_climb = self._is_whole and self.max_time > 0 and self.floors.can_be_met(problems)
        if problems and can_climb and self._chooser is not None:
            staged, problems = self._widen(self._chooser, staged, found, problems, folder)
        elif problems and can_climb and self._trials is not None:
            staged, problems = self._give_back(self._trials, staged, found, problems, folder)
        if problems:
            raise FloorMissed(self.report, problems)
        return staged

    def _widen(
        self,
        chooser: mixed.Chooser,
        staged: Path,
        found: Comparison,
        problems: list[errors.Diagnostic],
        folder: Path,
    ) -> tuple[Path, list[errors.Diagnostic]]:
        """Mixtures of more bytes, until one holds the floors; the file, and the floors that it misses."""
        while problems:
            again = chooser.again(found.outputs)
            if again is None:
                return staged, [*problems, chooser.problem()]
            self.report.mixed, self._told = again.figures, again.told
            self._run_again(again.recipe)
            staged = self._stage_again(folder)
            found, problems = self._judge(staged)
        return staged, problems

    def _give_back(
        self,
        trials: accuracy.Trials,
        staged: Path,
        found: Comparison,
        problems: list[errors.Diagnostic],
        folder: Path,
    ) -> tuple[Path, list[errors.Diagnostic]]:
        """Bits for the weights that hurt most; the file, and the floors that it misses."""
        search = accuracy.Search(
            trials, self.floors, self.source, self.recipe, self.max_time, self.progress
        )
        outcome = search.run(found, self._ctx)
        self.report.control = outcome.to_json()
        self.report.seconds["accuracy control"] = outcome.seconds
        if outcome.recipe is None:
            count = len(self._ctx.plan.quantized())
            return staged, [*problems, accuracy.problem(outcome, self.floors, count)]
        self._run_again(outcome.recipe)
        staged = self._stage_again(folder)
        return staged, self._judge(staged)[1]
