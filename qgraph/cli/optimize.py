"""`qgraph optimize`: a model → a quantized model, and a summary of what was done and why."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qgraph import errors
from qgraph.cli import options, summary, terminal
from qgraph.cli import reports as kept

if TYPE_CHECKING:
    from qgraph.data import Dataset
    from qgraph.pipeline import Instrument
    from qgraph.recipe import Recipe
    from qgraph.report import Report

EXAMPLES = """
Examples:
  qgraph optimize model.onnx -o model.q.onnx
  qgraph optimize model.onnx -o model.q.onnx --recipe int4 --report model.html
  qgraph optimize model.onnx -o model.q.onnx --target openvino --data calib.npz --min-sqnr 25
  qgraph optimize model.onnx -o model.q.onnx --data calib.npz --max-size 4.5MB --max-kl 0.05
  qgraph optimize model.onnx -o model.q.onnx --set linear.weights=int8.g32 --set min_elements=0
  qgraph optimize zoo:tiny-cnn -o cnn.onnx --stop-after canonicalize --print-after canonicalize
"""

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Where to write the quantized model. Needed.",
        rich_help_panel=options.OUTPUT,
        show_default=False,
    ),
]
Reports = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write the whole report, every weight with its reason: .html, .json or .md. May be repeated.",
        rich_help_panel=options.OUTPUT,
    ),
]
External = Annotated[
    bool | None,
    typer.Option(
        "--external-data/--no-external-data",
        help="Weights in OUT.data beside the model. Default: over 256 MB.",
        rich_help_panel=options.OUTPUT,
        show_default=False,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        metavar="DIR",
        help="Keep finished work in DIR: the same command goes on there after an interruption. Emptied at the end.",
        rich_help_panel=options.OUTPUT,
        show_default=False,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print nothing but warnings and errors.",
        rich_help_panel=options.OUTPUT,
    ),
]
Verify = Annotated[
    options.VerifyMode,
    typer.Option(
        "--verify",
        help="each: verify the model and prove what every pass claims; ends: verify the result; off.",
        rich_help_panel=options.DEBUG,
    ),
]
NoInspect = Annotated[
    bool,
    typer.Option(
        "--no-inspect",
        help="Do not ask the target's runtime what it really executes.",
        rich_help_panel=options.DEBUG,
    ),
]
PrintAfter = Annotated[
    list[str] | None,
    typer.Option(
        "--print-after",
        metavar="PASS",
        help="Print the model to stderr after this pass; * for all. May be repeated.",
        rich_help_panel=options.DEBUG,
    ),
]
StopAfter = Annotated[
    str | None,
    typer.Option(
        "--stop-after",
        metavar="PASS",
        help="End after this pass and write the model as it is then.",
        rich_help_panel=options.DEBUG,
    ),
]


def optimize(
    model: options.Model,
    recipe: options.Recipe = "auto",
    target: options.Target = None,
    overrides: options.Overrides = None,
    output: Output = None,
    data: options.Data = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    min_sqnr: options.MinSqnr = None,
    max_kl: options.MaxKl = None,
    min_agreement: options.MinAgreement = None,
    logits: options.Logits = None,
    max_size: options.MaxSize = None,
    avg_bits: options.AvgBits = None,
    max_latency: options.MaxLatency = None,
    max_time: options.MaxTime = 300.0,
    reports: Reports = None,
    verify: Verify = options.VerifyMode.each,
    no_inspect: NoInspect = False,
    print_after: PrintAfter = None,
    dump_dir: options.Dump = None,
    stop_after: StopAfter = None,
    force: options.Force = False,
    external_data: External = None,
    threads: options.Threads = 0,
    work_dir: WorkDir = None,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model.

    Reads MODEL, runs the passes of a recipe over it and writes a quantized
    model for the target. Every weight that stays float has a reason in the
    summary. OUT appears only when all is done and every check has passed.
    Where a floor is missed, the weights that hurt most get bits back until it
    holds; the report names them.
    """
    destination = _check_outputs(model, output, reports or (), force=force)

    from qgraph import compiler
    from qgraph import recipe as recipes

    chosen = recipes.load(recipe, overrides or ())
    watchers = instruments(chosen, print_after or (), dump_dir, stop_after)
    if data is not None and (min_sqnr, max_kl, min_agreement) == (None, None, None):
        _warn_of_unused_data(chosen)
    is_quiet = quiet or as_json or bool(print_after)
    with terminal.progress(is_shown=not is_quiet) as progress, _reports_of_failures(reports):
        result = compiler.optimize(
            model,
            chosen,
            target=target,
            data=dataset(model, data, samples, preprocess, progress),
            output=destination,
            force=force,
            verify=verify.value,
            inspect=not no_inspect,
            min_sqnr=min_sqnr,
            max_kl=max_kl,
            min_agreement=min_agreement,
            logits=logits or (),
            max_size=max_size,
            avg_bits=avg_bits,
            max_latency=max_latency,
            max_time=max_time,
            external_data=external_data,
            threads=threads,
            work_dir=work_dir,
            instruments=watchers,
            progress=progress,
        )
    result.report.command = ["qgraph", *terminal.given]
    if stop_after is not None:
        _tell_of_the_stop(result.report, stop_after)
    kept.write(result.report, reports)
    if as_json:
        terminal.emit(json.loads(result.report.to_json()))
    elif quiet:
        terminal.diagnostics(d for d in result.report.diagnostics if d.severity == "warning")
    elif stop_after is not None:
        terminal.line(f"stopped after {stop_after}; written to {destination}", "bold")
    else:
        summary.show(result.report)


@contextlib.contextmanager
def _reports_of_failures(reports: Sequence[Path] | None) -> Iterator[None]:
    """Write the reports also where an accuracy floor was missed: they tell which weights are bad."""
    from qgraph import floors

    try:
        yield
    except floors.FloorMissed as e:
        e.report.output, e.report.command = "", ["qgraph", *terminal.given]
        kept.write(e.report, reports)
        terminal.found.update(json.loads(e.report.to_json()))
        raise


def dataset(
    model: str,
    source: str | None,
    samples: int | None,
    preprocess: str | None = None,
    progress: terminal.Progress | None = None,
) -> Dataset | None:
    """What `--data`, `--preprocess` and `--samples` say, checked against the model's inputs."""
    if source is None:
        given = {"--samples": samples, "--preprocess": preprocess}
        for option, value in given.items():
            if value is not None:
                message = "there are no samples that it is about"
                raise errors.InputError(
                    errors.Diagnostic("error", "QG131", option, message, "give --data SOURCE")
                )
        return None
    from qgraph import data

    inputs = data.inputs_of(model)
    found = data.load(source, inputs, samples, preprocess=preprocess, progress=progress)
    terminal.diagnostics(found.notes)
    return found


def instruments(
    recipe: Recipe, print_after: Sequence[str], dump_dir: Path | None, stop_after: str | None
) -> list[Instrument]:
    """What watches the passes; refuses names of passes that the recipe does not run."""
    from qgraph import pipeline, registry

    known = [registry.get("pass", each).name for each in recipe.pipeline]
    asked = [("--print-after", n) for n in print_after if n != "*"]
    asked += [("--stop-after", stop_after)] if stop_after is not None else []
    wrong = [
        errors.Diagnostic(
            "error",
            "QG303",
            f"{option} {name}",
            f"is no pass of recipe {recipe.name!r}",
            errors.nearest(name, known),
        )
        for option, name in asked
        if name not in known
    ]
    if wrong:
        raise errors.RecipeError(*wrong)
    found: list[Instrument] = []
    if print_after:
        found.append(pipeline.Printer(print_after, _to_stderr))
    if dump_dir is not None:
        found.append(pipeline.Dumper(dump_dir))
    if stop_after is not None:
        found.append(pipeline.StopAfter(stop_after))
    return found


def _warn_of_unused_data(recipe: Recipe) -> None:
    from qgraph import auto, registry
    from qgraph.pipeline import Fact

    if auto.is_measured(recipe):
        return
    kinds = [registry.get("pass", each) for each in recipe.pipeline]
    solvers = [registry.get("solver", rule.solver) for rule in recipe.rules]
    if any(Fact.STATS in each.gives for each in kinds) or any(
        each.statistics != "none" for each in solvers
    ):
        return
    message = (
        f"is used for timing alone: recipe {recipe.name!r} does not calibrate, "
        "and there is no floor to hold"
    )
    hint = "give --min-sqnr, --max-kl or --min-agreement, or see: qgraph recipes"
    terminal.diagnostics([errors.Diagnostic("warning", "QG132", "--data", message, hint)])


def _to_stderr(text: str) -> None:
    typer.echo(text, err=True)


def _check_outputs(model: str, output: str | None, reports: Sequence[Path], *, force: bool) -> Path:
    """Refuse outputs that cannot be written, before anything heavy is imported or done."""
    if output is None:
        name = "model" if model.startswith("zoo:") else Path(model).stem
        hint = f"give -o, e.g. -o {name}.q.onnx"
        message = "where shall the quantized model go?"
        raise errors.InputError(errors.Diagnostic("error", "QG105", "--output", message, hint))
    if output.startswith("zoo:"):
        message = "names a reference model, which cannot be written"
        hint = f"give a file name, e.g. -o {output[4:]}.q.onnx"
        raise errors.InputError(errors.Diagnostic("error", "QG105", output, message, hint))
    from qgraph import files

    kept.check(reports, force=force)
    return files.check_output(output, force=force)


def _tell_of_the_stop(report: Report, stop_after: str) -> None:
    """A run that was ended early says so, and not that nothing was quantized."""
    report.notes.append(
        f"the run was stopped after {stop_after}; the output is the model as it was then"
    )
    report.diagnostics = [d for d in report.diagnostics if d.code not in ("QG320", "QG321")]
