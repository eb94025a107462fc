"""optimize: a model, a recipe, a target → a quantized model and the reasons. The one function behind the CLI."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qgraph import auto, errors, files, mixed, registry, workdir
from qgraph import recipe as recipes
from qgraph import verify as verifier
from qgraph.compilation import Compilation
from qgraph.data import Dataset, inputs_of, load
from qgraph.floors import Floors
from qgraph.pipeline import Instrument, Pipeline
from qgraph.report import Entry, Report
from qgraph.target import Target
from qgraph.workdir import WorkDir

VERIFY = ("each", "ends", "off")
MAX_TIME = 300.0


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
    destination = files.check_output(output, force=force) if output is not None else None
    is_measured = data is not None and auto.is_measured(chosen)
    if is_measured:
        chosen = auto.calibrated(chosen)
    pipeline = Pipeline(chosen.pipeline, {k: dict(v) for k, v in chosen.options.items()})
    predictions = (logits,) if isinstance(logits, str) else tuple(logits)
    floors = Floors(data, min_sqnr, max_kl, min_agreement, predictions)
    floors.require_data()
    if mixed.is_mixed(chosen):
        mixed.require_data(data)
    work = files.load(model)
    _refuse_broken(work)
    files.check_apart(destination, model, work)
    if data is not None and not isinstance(data, Dataset):
        data = load(data, inputs_of(model))
        floors = replace(floors, data=data)
    report = _new_report(model, work, chosen, goal, destination)
    kept = WorkDir(work_dir, _work(work, chosen, data, floors)) if work_dir is not None else None
    made = Compilation(
        source=model,
        model=work,
        recipe=chosen,
        pipeline=pipeline,
        target=goal,
        report=report,
        data=data,
        floors=floors,
        destination=destination,
        kept=kept,
        external_data=external_data,
        verify=verify,
        inspect=inspect,
        is_measured=is_measured,
        max_time=max_time,
        threads=threads,
        instruments=instruments,
        progress=progress or _unheard,
    )
    path = made.run(force=force)
    return Result(made.model, report, report.metrics, path)


def _unheard(what: str, share: float) -> None:
    """Progress that nobody asked for."""


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


def _refuse_broken(model: ir.Model) -> None:
    found = [d for d in verifier.verify(model) if d.severity == "error"]
    if found:
        raise errors.InputError(
            *(errors.Diagnostic("error", d.code, d.where, d.message, d.hint) for d in found[:10])
        )


def _work(
    model: ir.Model, chosen: recipes.Recipe, data: Dataset | None, floors: Floors
) -> dict[str, Any]:
    """What the results of a run depend on."""
    # Formats are chosen for the floors; weights are solved without looking at them.
    held = {"floors": str(floors), "logits": list(floors.logits)} if mixed.is_mixed(chosen) else {}
    return {
        **held,
        "model": workdir.digest(model),
        "recipe": chosen.model_dump(mode="json"),
        "data": "none" if data is None else data.digest(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import qgraph

    packages = ("onnx", "onnx-ir", "onnxruntime", "numpy")
    return {"qgraph": qgraph.__version__, **{p: importlib.metadata.version(p) for p in packages}}
