"""A finished model where nobody sees it yet: saved under a temporary name, looked at, timed, told of in the report."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from qgraph import accuracy, auto, errors, files, ledger, registry
from qgraph import recipe as recipes
from qgraph.data import Dataset
from qgraph.instruments import EquivalenceChecker
from qgraph.pipeline import Context, Timer
from qgraph.report import Report
from qgraph.spool import Spool
from qgraph.target import Target

T = TypeVar("T")


@contextlib.contextmanager
def folder_beside(destination: Path | None) -> Iterator[Path]:
    """A temporary folder on the file system of the destination, so that what is in it can be renamed to it."""
    beside = destination.parent if destination else None
    with tempfile.TemporaryDirectory(prefix=".qgraph-", dir=beside) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Stage:
    """Writes a finished model where nobody sees it yet, and tells the report about it."""

    source: files.Source
    goal: Target
    report: Report
    timer: Timer
    checker: EquivalenceChecker
    external_data: bool | None
    destination: Path | None
    told: dict[str, str]

    def __call__(self, work: ir.Model, ctx: Context, folder: Path) -> Path:
        """Save the model in a folder; returns the file."""
        report, goal = self.report, self.goal
        folder.mkdir(exist_ok=True)
        report.seconds.update(self.timer.seconds)
        report.checks = list(dict.fromkeys(self.checker.lines))
        report.diagnostics = ctx.diagnostics
        report.ledger, report.activations = ledger.entries(ctx), ledger.activations(ctx)
        written = {form for entry in report.ledger for form in entry.forms}
        known = {form: lines for form, lines in goal.notes.items() if form in written}
        apart = [n for n in report.notes if n not in itertools.chain(*goal.notes.values())]
        report.notes = [*itertools.chain(*known.values()), *apart]
        for entry in report.ledger:
            if entry.weight in self.told and entry.by != f"rule {accuracy.RULE}":
                entry.reason += f" ({self.told[entry.weight]})"
        report.resolved_recipe = ctx.recipe.model_dump(mode="json")
        stamp(work, ctx.recipe)
        staged = files.save(
            work,
            folder / (self.destination.name if self.destination else "model.onnx"),
            external_data=self.external_data,
            progress=lambda name, share: ctx.progress(f"saving {name}", share),
        )
        report.output_bytes = files.file_bytes(staged)
        if ctx.inspect:
            ledger.ask_runtime(report, ctx, goal, staged, self.source)
        ledger.say_what_was_missed(report, goal)
        return staged


@dataclass(frozen=True)
class Quick:
    """Writes the file under a recipe for somebody to look at; solved the quick way, which changes no size."""

    trials: accuracy.Trials
    external_data: bool | None
    destination: Path | None

    def __call__(self, recipe: recipes.Recipe, look: Callable[[Path], T]) -> T:
        """What `look` says of the file."""
        quick = [
            rule
            if registry.get("solver", rule.solver).statistics == "none"
            else rule.model_copy(update={"solver": "rtn"})
            for rule in recipe.rules
        ]
        with folder_beside(self.destination) as folder:
            made = recipe.model_copy(update={"rules": tuple(quick)})
            work, _ = self.trials.run(made, Spool(folder), inspect=False)
            stamp(work, recipe)
            name = self.destination.name if self.destination else "model.onnx"
            return look(files.save(work, folder / name, external_data=self.external_data))


def time_it(report: Report, model: files.Source, staged: Path, dataset: Dataset) -> None:
    """Say how fast the result is against the float model."""
    if report.float_bytes > auto.TIMED_UNDER:
        text = f"latency was not measured: the model has {report.float_bytes >> 20} MB of weights"
        report.notes.append(text)
        return
    try:
        speed = auto.measure(model, staged, dataset)
    except errors.RuntimeFailure as e:
        found = e.diagnostics[0]
        text = f"latency could not be measured: {found.message}"
        report.diagnostics.append(
            errors.Diagnostic("warning", found.code, found.where, text, found.hint)
        )
        return
    report.latency = speed.to_json()
    report.checks.append(f"timed by turns in ONNX Runtime: {speed}")
    slow = speed.finding()
    if slow is not None and report.quantized:
        report.diagnostics.append(slow)


def stamp(model: ir.Model, chosen: recipes.Recipe) -> None:
    """Law 7: the model says how it was made. Short, because small models must not grow."""
    import qgraph

    model.metadata_props["qgraph"] = (
        f"{qgraph.__version__} {chosen.name} {chosen.target} seed={chosen.seed}"
    )
    preset = recipes.PRESETS.get(chosen.name)
    if preset is None or chosen != preset.model_copy(update={"target": chosen.target}):
        model.metadata_props["qgraph.recipe"] = chosen.to_json()
