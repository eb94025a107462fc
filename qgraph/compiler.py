"""optimize: a model, a recipe, a target → a quantized model and the reasons. The one function behind the CLI."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from qgraph import errors, files, registry
from qgraph import recipe as recipes
from qgraph import verify as verifier
from qgraph.instruments import EquivalenceChecker, Verifier
from qgraph.pipeline import Context, Instrument, Pipeline, Timer
from qgraph.report import Entry, Report
from qgraph.spool import Spool
from qgraph.target import Target

if TYPE_CHECKING:
    from qgraph.evaluate import Comparison

INSPECT_UNDER = 8 << 30


class FloorMissed(errors.AccuracyError):
    """An accuracy floor was missed; `report` tells all about the model that was not written."""

    def __init__(self, report: Report, problems: Sequence[errors.Diagnostic]) -> None:
        super().__init__(*problems)
        self.report = report


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
    external_data: bool | None = None,
    threads: int = 0,
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
        external_data: weights beside the model; default: only over 256 MB.
        threads: for solvers; 0 is one per core.
        instruments: watch the passes.
        progress: called with what is being done and the share done, 0..1.

    Raises:
        errors.InputError: the model, data or output cannot be used.
        errors.RecipeError: the recipe means nothing.
        errors.VerificationError: a pass broke the model or its promise.
        errors.AccuracyError: an accuracy floor was missed; nothing is written.
    """
    chosen = recipes.load(recipe, overrides)
    goal = (
        registry.get("target", target or chosen.target)
        if not isinstance(target, Target)
        else target
    )
    if goal.name != chosen.target:
        chosen = chosen.model_copy(update={"target": goal.name})
    destination = files.check_output(output, force=force) if output is not None else None
    pipeline = Pipeline(chosen.pipeline, {k: dict(v) for k, v in chosen.options.items()})
    _check_solvers(chosen)
    if (min_sqnr is not None or max_kl is not None) and data is None:
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG130",
                "--min-sqnr/--max-kl",
                "an accuracy floor needs data to be measured on",
                "give --data",
            )
        )
    work = files.load(model)
    _refuse_broken(work)
    files.check_apart(destination, model, work)
    source = _source_name(model)
    float_bytes = files.file_bytes(source) if os.path.isfile(source) else files.weight_bytes(work)
    timer = Timer()
    ctx = Context(
        goal,
        chosen,
        data=data,
        rng=np.random.default_rng(chosen.seed),
        spool=Spool(destination.parent if destination else None),
        threads=threads,
    )
    if progress is not None:
        ctx.progress = progress
    watchers: list[Instrument] = [timer]
    checker = None
    if verify != "off":
        watchers.append(Verifier(every=verify == "each"))
    if verify == "each":
        checker = EquivalenceChecker()
        watchers.append(checker)
    pipeline.run(work, ctx, [*watchers, *instruments])
    report = Report(
        source,
        str(destination or ""),
        chosen.name,
        goal.name,
        float_bytes,
        seconds=timer.seconds,
        versions=_versions(),
    )
    report.resolved_recipe = chosen.model_dump(mode="json")
    report.notes = list(goal.notes)
    report.checks = checker.lines if checker else []
    report.diagnostics = ctx.diagnostics
    report.ledger = _ledger(ctx)
    _stamp(work, chosen)
    result = Result(work, report, report.metrics)
    _finish(
        result, model, goal, destination, inspect, force, external_data, min_sqnr, max_kl, data, ctx
    )
    return result


def _finish(
    result: Result,
    model: files.Source,
    goal: Target,
    destination: Path | None,
    inspect: bool,
    force: bool,
    external_data: bool | None,
    min_sqnr: float | None,
    max_kl: float | None,
    data: Any,
    ctx: Context,
) -> None:
    """Save under a temporary name, look at what runs, hold the floors, and only then let the output appear."""
    ctx.progress("saving", 0.0)
    report = result.report
    with _staging(destination) as folder:
        name = destination.name if destination is not None else "model.onnx"
        staged = files.save(
            result.model,
            folder / name,
            external_data=external_data,
            progress=lambda n, share: ctx.progress(f"saving {n}", share),
        )
        report.output_bytes = files.file_bytes(staged)
        if inspect and goal.inspect is not None:
            _inspect(report, ctx, goal, staged)
        _missed(report, goal)
        if min_sqnr is not None or max_kl is not None:
            _hold_floors(report, model, staged, data, min_sqnr, max_kl)
        if destination is not None:
            files.publish(staged, destination, force=force)
            result.path = destination
    ctx.progress("done", 1.0)


@contextlib.contextmanager
def _staging(destination: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        prefix=".qgraph-", dir=destination.parent if destination else None
    ) as folder:
        yield Path(folder)


def _source_name(model: files.Source) -> str:
    return (
        "(model in memory)" if isinstance(model, (ir.Model, onnx.ModelProto)) else os.fspath(model)
    )


def _refuse_broken(model: ir.Model) -> None:
    found = [d for d in verifier.verify(model) if d.severity == "error"]
    if found:
        raise errors.InputError(
            *(errors.Diagnostic("error", d.code, d.where, d.message, d.hint) for d in found[:10])
        )


def _check_solvers(chosen: recipes.Recipe) -> None:
    for name in [*chosen.solvers, *(r.solver for r in chosen.rules)]:
        registry.get("solver", name)


def _ledger(ctx: Context) -> list[Entry]:
    """What the plan decided about every weight, and what was written."""
    ledger = []
    for decision in ctx.plan.decisions.values():
        if decision.role != "weight":
            continue
        record = ctx.records.get(decision.value, {})
        entry: Entry = record["entry"]
        entry.reason, entry.by, entry.code = decision.reason, decision.by, decision.code
        if decision.spec is not None and "nodes" in record:
            entry.spec = str(decision.spec)
            entry.activation = str(decision.activation) if decision.activation else ""
            entry.stored_bytes = record["stored_bytes"]
            entry.forms = [n["form"] for n in record["nodes"]]
            entry.sqnr_db = record["sqnr_db"]
            entry.mse = record["squared_error"] / max(record["elements"], 1)
            entry.pass_name = "insert-qdq"
        ledger.append(entry)
    arrived = [r["entry"] for name, r in ctx.records.items() if name not in ctx.plan.decisions]
    return ledger + arrived


def _inspect(report: Report, ctx: Context, goal: Target, path: Path) -> None:
    """Ask the runtime what it executes for every use, and warn of what it does not fuse."""
    outputs = [n["output"] for r in ctx.records.values() for n in r.get("nodes", ())]
    if not outputs or goal.inspect is None:
        return
    ctx.progress(f"asking {goal.name} what it runs", 0.0)
    try:
        ran = goal.inspect(str(path), outputs)
    except errors.RuntimeFailure as e:
        report.diagnostics.extend(
            errors.Diagnostic(
                "warning", d.code, d.where, f"what runs could not be checked: {d.message}", d.hint
            )
            for d in e.diagnostics
        )
        return
    for entry in report.ledger:
        nodes = ctx.records.get(entry.weight, {}).get("nodes", ())
        entry.runs = [str(ran[n["output"]].kernel) for n in nodes if n["output"] in ran]
    report.checks.append(
        f"the fusion check opened the model in {goal.name} and read the graph that it executes"
    )


def _missed(report: Report, goal: Target) -> None:
    """Say aloud what stayed float, and when nothing was quantized at all."""
    for code, reason, count, size in report.stayed_float():
        report.diagnostics.append(
            errors.Diagnostic(
                "missed",
                code,
                f"{count} weight{'s' if count > 1 else ''} ({size} bytes)",
                f"stays float: {reason}",
            )
        )
    if report.ledger and not report.quantized:
        report.diagnostics.append(
            errors.Diagnostic(
                "warning",
                "QG320",
                "",
                f"nothing was quantized for target {goal.name}; the output is the canonicalized float model",
                "the lines above say why",
            )
        )
    elif not report.ledger:
        report.diagnostics.append(
            errors.Diagnostic(
                "warning",
                "QG321",
                "",
                "the model has no weights that qgraph can quantize; the output is the canonicalized float model",
                "see: qgraph inspect MODEL",
            )
        )


def _hold_floors(
    report: Report,
    model: files.Source,
    staged: Path,
    data: Any,
    min_sqnr: float | None,
    max_kl: float | None,
) -> None:
    from qgraph import evaluate

    comparison = evaluate.compare(model, staged, data, rounds=0)
    report.metrics.update(comparison.to_json())
    problems = floor_problems(comparison, min_sqnr, max_kl)
    if problems:
        raise FloorMissed(report, problems)


def floor_problems(
    comparison: Comparison, min_sqnr: float | None, max_kl: float | None
) -> list[errors.Diagnostic]:
    """The floors that a comparison misses, as errors."""
    remedy = "try --recipe int8-weights, or keep the worst weights float (see --report)"
    problems = []
    if min_sqnr is not None:
        problems += [
            _missed_floor(
                "QG701", name, f"SQNR is {db:.1f} dB, the floor is {min_sqnr:g} dB", remedy
            )
            for name, db in (
                (o.name, o.error.sqnr_db) for o in comparison.outputs if o.error is not None
            )
            if not db >= min_sqnr
        ]
    if max_kl is None:
        return problems
    judged = [
        (o.name, o.divergence.kl_mean.value) for o in comparison.outputs if o.divergence is not None
    ]
    problems += [
        _missed_floor(
            "QG702", name, f"KL divergence is {mean:.3g} nats, the ceiling is {max_kl:g}", remedy
        )
        for name, mean in judged
        if not mean <= max_kl
    ]
    if not judged:
        text = "no output looks like predictions over classes, so there is no KL divergence"
        problems.append(
            errors.Diagnostic(
                "error", "QG703", "--max-kl", text, "name it with --logits, or use --min-sqnr"
            )
        )
    return problems


def _missed_floor(code: str, output: str, message: str, hint: str) -> errors.Diagnostic:
    return errors.Diagnostic("error", code, f"output {output!r}", message, hint)


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
