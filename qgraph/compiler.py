"""optimize: a model, a recipe, a target → a quantized model and the reasons. The one function behind the CLI."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from qgraph import accuracy, auto, errors, files, ledger, mixed, registry, workdir
from qgraph import recipe as recipes
from qgraph import verify as verifier
from qgraph.data import Dataset, inputs_of, load
from qgraph.floors import FloorMissed, Floors
from qgraph.instruments import EquivalenceChecker, Verifier
from qgraph.pipeline import Context, Instrument, Pipeline, Timer
from qgraph.reaches import Reaches
from qgraph.report import Entry, Report
from qgraph.spool import Spool
from qgraph.target import Target
from qgraph.workdir import WorkDir

VERIFY = ("each", "ends", "off")
MAX_TIME = 300.0

T = TypeVar("T")


@dataclass
class Result:
    """What `optimize` returns.

    Attributes:
        model: the quantized model.
        report: the ledger, findings, sizes and timings.
        metrics: accuracy figures, where data was given and asked for.
        path: where it was saved, or None.
    """

    model: ir.Model
    report: Report
    metrics: dict[str, Any]
    path: Path | None = None

    @property
    def ledger(self) -> list[Entry]:
        """One entry per weight."""
        return self.report.ledger

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the model (atomically); see `qgraph.save`."""
        self.path = files.save(self.model, path, force=force)
        self.report.output = str(self.path)
        self.report.output_bytes = files.file_bytes(self.path)
        return self.path

    def to_proto(self) -> onnx.ModelProto:
        """The model as a ModelProto (under 2 GB)."""
        return files.to_proto(self.model)


def optimize(
    model: files.Source,
    recipe: str | os.PathLike[str] | dict[str, Any] | recipes.Recipe = "auto",
    *,
    target: str | Target | None = None,
    data: Any = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    overrides: Sequence[str] = (),
    verify: str = "each",
    inspect: bool = True,
    min_sqnr: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    logits: str | Sequence[str] = (),
    max_size: str | int | None = None,
    avg_bits: float | None = None,
    max_latency: str | None = None,
    max_time: float = MAX_TIME,
    external_data: bool | None = None,
    threads: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    instruments: Sequence[Instrument] = (),
    progress: Callable[[str, float], None] | None = None,
) -> Result:
    """Quantize a model.

    Args:
        model: path, "zoo:NAME", ModelProto or onnx_ir.Model; never modified.
        recipe: preset name, .toml/.json file, dict or Recipe.
        target: overrides the recipe's target; a name or a Target of your own.
        data: samples (see `qgraph.data`); needed for accuracy floors.
        output: where to save; refused before any work if it cannot be written.
        force: replace an existing output.
        overrides: "key=value" changes to the recipe.
        verify: "each" pass is verified and its claims are proven on sample inputs, only the "ends", or "off".
        inspect: open the result in the target's runtime and report what it really executes.
        min_sqnr: accuracy floor in dB for every output (needs data).
        max_kl: accuracy ceiling of the KL divergence in nats (needs data).
        min_agreement: accuracy floor of the share of equal top-1 predictions, 0..1 (needs data).
        logits: the outputs that hold predictions over classes; told by their names where it is left out.
        max_size: of the written file with its external data, in bytes or as "4.5MB": formats are chosen weight by
            weight (needs data, and a recipe with choices: `mixed`, which stands for `auto` here).
        avg_bits: the same by stored bits per weight.
        max_latency: the same by time of one run of the sample of middle size in one thread: "0.8x" of the float
            model's, or "12ms".
        max_time: seconds that may be spent on finding what to give back to weights where a floor is missed, or on
            improving a mixture of formats; 0 only checks the floors.
        external_data: weights beside the model; default: only over 256 MB.
        threads: for solvers; 0 is one per core.
        work_dir: folder of finished work, where an interrupted run goes on; made if missing, emptied when all is done.
        instruments: watch the passes.
        progress: called with what is being done and the share done, 0..1.

    Raises:
        errors.InputError: the model, data or output cannot be used.
        errors.RecipeError: the recipe means nothing.
        errors.VerificationError: a pass broke the model or its promise.
        errors.AccuracyError: an accuracy floor or a budget was missed; nothing is written.
    """
    if verify not in VERIFY:
        hint = errors.nearest(verify, VERIFY)
        raise errors.RecipeError(
            errors.Diagnostic("error", "QG305", "verify", f"cannot be {verify!r}", hint)
        )
    chosen, goal = _resolve(recipe, overrides, target)
    chosen = mixed.budgeted(
        chosen, {"max_size": max_size, "avg_bits": avg_bits, "max_latency": max_latency}
    )
    is_mixed = mixed.is_mixed(chosen)
    destination = files.check_output(output, force=force) if output is not None else None
    is_measured = data is not None and auto.is_measured(chosen)
    if is_measured:
        chosen = auto.calibrated(chosen)
    pipeline = Pipeline(chosen.pipeline, {k: dict(v) for k, v in chosen.options.items()})
    predictions = (logits,) if isinstance(logits, str) else tuple(logits)
    floors = Floors(data, min_sqnr, max_kl, min_agreement, predictions)
    floors.require_data()
    if is_mixed:
        mixed.require_data(data)
    work = files.load(model)
    _refuse_broken(work)
    files.check_apart(destination, model, work)
    if data is not None and not isinstance(data, Dataset):
        data = load(data, inputs_of(model))
        floors = replace(floors, data=data)
    report = _new_report(model, work, chosen, goal, destination)
    kept = None
    if work_dir is not None:
        kept = WorkDir(work_dir, _work(work, chosen, data))
    spool = Spool(destination.parent if destination else None)
    first = auto.observing(chosen) if is_measured else chosen
    ctx = Context(goal, first, data=data, spool=spool, work=kept, threads=threads)
    ctx.progress, ctx.inspect = progress or ctx.progress, inspect
    timer, checker, reaches = Timer(), EquivalenceChecker(), Reaches()
    checkpoint = accuracy.Checkpoint(stops=is_measured or is_mixed)
    watchers: list[Instrument] = [timer]
    if verify != "off":
        watchers.append(Verifier(every=verify == "each"))
    if verify == "each":
        watchers.append(checker)
    watchers.extend([reaches, *instruments])
    is_kept = is_measured or is_mixed or (floors.is_set and max_time > 0)
    pipeline.run(work, ctx, [*watchers, *([checkpoint] if is_kept else [])])
    report.shifts = reaches.shifts
    report.notes += reaches.lines
    trials = accuracy.Trials(pipeline, *checkpoint.kept) if checkpoint.kept else None
    told: dict[str, str] = {}
    if is_measured and trials is not None:
        started = time.monotonic()
        choice = auto.choose(
            trials, model, chosen, data,
            is_accuracy_held=floors.is_set, max_seconds=max_time, progress=ctx.progress,
        )  # fmt: skip
        report.choice, told, chosen = choice.figures, choice.told, choice.recipe
        report.seconds["choosing by measurement"] = time.monotonic() - started
        work, ctx = trials.run(chosen, spool, inspect=inspect, instruments=watchers)
    chooser: mixed.Chooser | None = None
    if is_mixed and trials is not None:
        started = time.monotonic()
        write = _Quick(trials, external_data, destination)
        chooser = mixed.Chooser(
            trials, model, chosen, data, floors, write, max_seconds=max_time, progress=ctx.progress
        )
        mixture = _mixture(chooser, kept)
        report.mixed, told, chosen = mixture.figures, mixture.told, mixture.recipe
        report.notes += mixture.notes
        report.seconds["mixed precision"] = time.monotonic() - started
        work, ctx = trials.run(chosen, spool, inspect=inspect, instruments=watchers, work=kept)
    # Saved under a temporary name, looked at, held to the floors: only then does the output appear.
    with _staging(destination) as folder:
        stage = _Stage(model, goal, report, timer, checker, external_data, destination, told)
        staged = stage(work, ctx, folder)
        if chooser is not None:
            chooser.require_size(report.output_bytes)
        if floors.is_set:
            found = floors.measure(model, staged)
            report.metrics.update(found.to_json())
            problems = floors.problems(found.outputs)
            is_whole = pipeline.passes[-1].name in timer.seconds
            can_climb = is_whole and max_time > 0 and floors.can_be_met(problems)
            while problems and can_climb and chooser is not None and trials is not None:
                again = chooser.again(found.outputs)
                if again is None:
                    problems.append(chooser.problem())
                    break
                report.mixed, chosen = again.figures, again.recipe
                stage.told.clear()
                stage.told.update(again.told)
                work, ctx = trials.run(chosen, spool, inspect=inspect, instruments=watchers)
                staged = stage(work, ctx, folder / "again")
                found = floors.measure(model, staged)
                report.metrics.update(found.to_json())
                problems = floors.problems(found.outputs)
            if problems and can_climb and trials is not None and chooser is None:
                search = accuracy.Search(trials, floors, model, chosen, max_time, ctx.progress)
                outcome = search.run(found, ctx)
                report.control = outcome.to_json()
                report.seconds["accuracy control"] = outcome.seconds
                if outcome.recipe is None:
                    problems.append(accuracy.problem(outcome, floors, len(ctx.plan.quantized())))
                    raise FloorMissed(report, problems)
                work, ctx = trials.run(outcome.recipe, spool, inspect=inspect, instruments=watchers)
                staged = stage(work, ctx, folder / "again")
                found = floors.measure(model, staged)
                report.metrics.update(found.to_json())
                problems = floors.problems(found.outputs)
            if problems:
                raise FloorMissed(report, problems)
        if data is not None and inspect and goal.timed:
            _time(report, model, staged, data)
        result = Result(work, report, report.metrics)
        if destination is not None:
            result.path = files.publish(staged, destination, force=force)
        if kept is not None and pipeline.passes[-1].name in timer.seconds:
            kept.clear()
    ctx.progress("done", 1.0)
    return result


@dataclass(frozen=True)
class _Stage:
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
        _stamp(work, ctx.recipe)
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
class _Quick:
    """Writes the file under a recipe for somebody to look at; solved the quick way, which changes no size."""

    trials: accuracy.Trials
    external_data: bool | None
    destination: Path | None

    def __call__(self, recipe: recipes.Recipe, look: Callable[[Path], T]) -> T:
        quick = [
            rule
            if registry.get("solver", rule.solver).statistics == "none"
            else rule.model_copy(update={"solver": "rtn"})
            for rule in recipe.rules
        ]
        with _staging(self.destination) as folder:
            made = recipe.model_copy(update={"rules": tuple(quick)})
            work, _ = self.trials.run(made, Spool(folder), inspect=False)
            _stamp(work, recipe)
            name = self.destination.name if self.destination else "model.onnx"
            return look(files.save(work, folder / name, external_data=self.external_data))


def _time(report: Report, model: files.Source, staged: Path, dataset: Dataset) -> None:
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


def _mixture(chooser: mixed.Chooser, kept: WorkDir | None) -> mixed.Choice:
    """What was chosen before the work was interrupted, else a new choice."""
    held = kept.load("mixed") if kept is not None else None
    if held is not None:
        return mixed.Choice.from_json(held[1])
    choice = chooser.choose()
    if kept is not None:
        kept.store("mixed", {}, choice.to_json())
    return choice


def _resolve(
    recipe: str | os.PathLike[str] | dict[str, Any] | recipes.Recipe,
    overrides: Sequence[str],
    target: str | Target | None,
) -> tuple[recipes.Recipe, Target]:
    """The whole recipe and the target, with every name in them known to exist."""
    chosen = recipes.load(recipe, overrides)
    goal = target if isinstance(target, Target) else registry.get("target", target or chosen.target)
    for name in [*chosen.solvers, *(r.solver for r in chosen.rules)]:
        registry.get("solver", name)
    return chosen.model_copy(update={"target": goal.name}), goal


def _new_report(
    model: files.Source, work: ir.Model, chosen: recipes.Recipe, goal: Target, output: Path | None
) -> Report:
    source = (
        "(model in memory)" if isinstance(model, (ir.Model, onnx.ModelProto)) else os.fspath(model)
    )
    size = files.file_bytes(source) if os.path.isfile(source) else files.weight_bytes(work)
    report = Report(source, str(output or ""), chosen.name, goal.name, size, versions=_versions())
    report.resolved_recipe = chosen.model_dump(mode="json")
    return report


@contextlib.contextmanager
def _staging(destination: Path | None) -> Iterator[Path]:
    beside = destination.parent if destination else None
    with tempfile.TemporaryDirectory(prefix=".qgraph-", dir=beside) as folder:
        yield Path(folder)


def _refuse_broken(model: ir.Model) -> None:
    found = [d for d in verifier.verify(model) if d.severity == "error"]
    if found:
        raise errors.InputError(
            *(errors.Diagnostic("error", d.code, d.where, d.message, d.hint) for d in found[:10])
        )


def _work(model: ir.Model, chosen: recipes.Recipe, data: Dataset | None) -> dict[str, Any]:
    """What the results of a run depend on."""
    return {
        "model": workdir.digest(model),
        "recipe": chosen.model_dump(mode="json"),
        "data": "none" if data is None else data.digest(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import qgraph

    packages = ("onnx", "onnx-ir", "onnxruntime", "numpy")
    return {"qgraph": qgraph.__version__, **{p: importlib.metadata.version(p) for p in packages}}


def _stamp(model: ir.Model, chosen: recipes.Recipe) -> None:
    """Law 7: the model says how it was made. Short, because small models must not grow."""
    import qgraph

    model.metadata_props["qgraph"] = (
        f"{qgraph.__version__} {chosen.name} {chosen.target} seed={chosen.seed}"
    )
    preset = recipes.PRESETS.get(chosen.name)
    if preset is None or chosen != preset.model_copy(update={"target": chosen.target}):
        model.metadata_props["qgraph.recipe"] = chosen.to_json()
