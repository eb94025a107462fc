"""`qgraph compare`: how good, how small and how fast a quantized model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qgraph import errors
from qgraph.cli import options, reports, terminal

if TYPE_CHECKING:
    from qgraph.evaluate import Comparison, Divergence, Estimate

COMPARE_EXAMPLES = """
Examples:
  qgraph compare model.onnx model.q.onnx --data samples.npz
  qgraph compare model.onnx model.q.onnx --data samples.npz --min-sqnr 25 --json
  qgraph compare model.onnx model.q.onnx --random 4 --rounds 0
  qgraph compare model.onnx model.q.onnx --data samples.npz --report found.html
"""

FloatModel = Annotated[
    str, typer.Argument(metavar="FLOAT", help="The float model: an .onnx file or zoo:NAME.")
]
QuantModel = Annotated[
    str, typer.Argument(metavar="QUANT", help="The model to judge: an .onnx file or zoo:NAME.")
]
Random = Annotated[
    int | None,
    typer.Option(
        "--random",
        metavar="N",
        min=1,
        help="Compare on N random inputs instead: shows a broken model, says little of accuracy.",
        rich_help_panel=options.DATA,
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds", metavar="N", min=0, help="Rounds of the latency measurement; 0 leaves it out."
    ),
]
OneThread = Annotated[
    int, typer.Option("--threads", metavar="N", min=1, help="Threads of each session.")
]


def compare(
    float_model: FloatModel,
    quant_model: QuantModel,
    data: options.Data = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    random: Random = None,
    logits: options.Logits = None,
    min_sqnr: options.MinSqnr = None,
    max_kl: options.MaxKl = None,
    min_agreement: options.MinAgreement = None,
    rounds: Rounds = 20,
    threads: OneThread = 1,
    report: reports.Reports = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Compare a quantized model with its float model on data.

    For every output the SQNR; for predictions over classes also KL divergence
    and top-1 agreement with 95 % intervals; bytes, and latency as a ratio,
    measured by turns.
    """
    if (data is None) == (random is None):
        message = "a comparison needs either data or random inputs"
        hint = "give --data FILE.npz (real inputs), or --random N to compare on random ones"
        raise errors.InputError(errors.Diagnostic("error", "QG131", "--data", message, hint))
    reports.check(report, force=force)
    from qgraph import evaluate, files, floors
    from qgraph.evaluate import telling

    files.load(quant_model)  # says better than a session what is wrong with a file
    with terminal.progress(is_shown=not as_json) as progress:
        progress("reading data", -1)
        feeds = _feeds(float_model, data, samples, preprocess, random, progress)
        progress(f"comparing on {terminal.counted(len(feeds), 'sample')}", -1)
        found = evaluate.compare(
            float_model, quant_model, feeds, logits=logits or (), rounds=rounds, threads=threads
        )
    source = data or f"random ({random})"
    terminal.found.update(found.to_json(), data=source)
    told = telling.of_comparison(found, float_model, quant_model, source)
    told.command = ["qgraph", *terminal.given]
    reports.write(told, report)
    problems = floors.Floors(data, min_sqnr, max_kl, min_agreement).problems(found.outputs)
    if not as_json:
        _comparison(found, float_model, quant_model, data, random)
    if problems:
        raise errors.AccuracyError(*problems)
    if as_json:
        terminal.emit(terminal.found)


def _feeds(
    model: str,
    data: str | None,
    samples: int | None,
    preprocess: str | None,
    random: int | None,
    progress: terminal.Progress,
) -> Any:
    if data is not None:
        from qgraph.cli.optimize import dataset

        return dataset(model, data, samples, preprocess, progress)
    from qgraph import verify

    return verify.sample_feeds(model, count=random or 1)


def _comparison(
    found: Comparison, float_model: str, quant_model: str, data: str | None, random: int | None
) -> None:
    from qgraph.report import megabytes

    count = terminal.counted(found.samples, "sample")
    source = f"{data}, {count}" if data else f"random inputs ({random}): says little of accuracy"
    bits = found.bits_per_weight
    sizes = megabytes(found.float_bytes), megabytes(found.quant_bytes)
    terminal.pairs(
        [
            ("float", f"{float_model}, {sizes[0]}"),
            ("quantized", f"{quant_model}, {sizes[1]} ({found.size_ratio:.2f}x)"),
            ("bits per weight", "" if bits is None else f"{bits:.2f}"),
            ("data", source),
            ("latency", _latency(found)),
        ]
    )
    terminal.heading("Outputs")
    rows = []
    for each in found.outputs:
        if each.error is None:
            equal = "" if each.equal is None else f"{each.equal:.2%}"
            rows.append((each.name, "", "", "", equal))
            continue
        error = each.error
        broken = f"{error.broken} are not finite" if error.broken else ""
        sqnr = terminal.decibels(error.sqnr_db)
        rows.append((each.name, sqnr, f"{error.max_abs:.3g}", f"{error.cosine:.5f}", broken))
    terminal.table(("output", ">SQNR", ">largest error", ">cosine", ">equal"), rows)
    judged = [(each.name, each.divergence) for each in found.outputs if each.divergence]
    if judged:
        terminal.heading("Predictions")
        terminal.table(
            (
                "output",
                ">predictions",
                "KL divergence (95 %)",
                ">99 %",
                ">worst",
                "same top-1 (95 %)",
            ),
            ((name, *divergence_row(each)) for name, each in judged),
        )


def _latency(found: Comparison) -> str:
    each = found.latency
    if each is None:
        return ""
    quartiles = f"quartiles {each.lower_quartile:.2f} to {each.upper_quartile:.2f}"
    times = f"{each.seconds_a * 1e3:.3g} ms to {each.seconds_b * 1e3:.3g} ms"
    return f"{each.ratio:.2f}x ({quartiles}; {times}, {each.rounds} rounds by turns)"


def divergence_row(each: Divergence) -> tuple[object, ...]:
    """Cells that tell of KL divergence and agreement."""
    return (
        each.predictions,
        f"{interval(each.kl_mean, '.2e')} nats",
        f"{each.kl_p99:.2e}",
        f"{each.kl_max:.2e}",
        interval(each.agreement, ".2%"),
    )


def interval(each: Estimate, form: str) -> str:
    """An estimate with its interval, where there is one."""
    if each.low is None or each.high is None:
        return format(each.value, form)
    return f"{each.value:{form}} ({each.low:{form}} to {each.high:{form}})"
