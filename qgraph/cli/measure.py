"""`qgraph compare` and `qgraph eval perplexity`: how good, how small and how fast a quantized model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qgraph import errors
from qgraph.cli import options, terminal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.evaluate import Comparison, Divergence, Estimate, LanguageComparison

COMPARE_EXAMPLES = """
Examples:
  qgraph compare model.onnx model.q.onnx --data samples.npz
  qgraph compare model.onnx model.q.onnx --data samples.npz --min-sqnr 25 --json
  qgraph compare model.onnx model.q.onnx --random 4 --rounds 0
"""
PERPLEXITY_EXAMPLES = """
Examples:
  qgraph eval perplexity zoo:tiny-llama --tokens zoo:tiny-llama --context 256
  qgraph eval perplexity model.q.onnx --float model.onnx --tokens held_out.npy --context 1024
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
Tokens = Annotated[
    str,
    typer.Option(
        "--tokens",
        metavar="FILE.npy|zoo:NAME",
        help="Token ids, one integer array; zoo:NAME: the held-out text of a reference model.",
        rich_help_panel=options.DATA,
    ),
]
ContextLength = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        min=2,
        help="Tokens per window; windows do not overlap.",
        rich_help_panel=options.DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        min=2,
        help="Use the first N tokens. Default: all.",
        rich_help_panel=options.DATA,
    ),
]
FloatOption = Annotated[
    str | None,
    typer.Option(
        "--float",
        metavar="MODEL",
        help="The float model: adds its perplexity, KL divergence and agreement.",
    ),
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
    from qgraph import evaluate, files, floors

    files.load(quant_model)  # says better than a session what is wrong with a file
    with terminal.progress(is_shown=not as_json) as progress:
        progress("reading data", -1)
        feeds = _feeds(float_model, data, samples, preprocess, random, progress)
        progress(f"comparing on {terminal.counted(len(feeds), 'sample')}", -1)
        found = evaluate.compare(
            float_model, quant_model, feeds, logits=logits or (), rounds=rounds, threads=threads
        )
    terminal.found.update(found.to_json(), data=data or f"random ({random})")
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
    sizes = megabytes(found.float_bytes), megabytes(found.quant_bytes)
    terminal.pairs(
        [
            ("float", f"{float_model}, {sizes[0]}"),
            ("quantized", f"{quant_model}, {sizes[1]} ({found.size_ratio:.2f}x)"),
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


def perplexity(
    model: options.Model,
    tokens: Tokens,
    context: ContextLength,
    float_model: FloatOption = None,
    limit: Limit = None,
    logits: options.Logits = None,
    threads: OneThread = 1,
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of a language model on tokens.

    exp of the mean of -log p over every token but the first of each window.
    With --float also that of the float model, the KL divergence between the
    two and how often they predict the same token.
    """
    from qgraph import evaluate, files

    for each in filter(None, (model, float_model)):
        files.load(each)  # says better than a session what is wrong with a file
    ids = read_tokens(tokens)[:limit]
    with terminal.progress(is_shown=not as_json) as progress:
        progress(f"{len(ids)} tokens", -1)
        shared: dict[str, Any] = {"logits": logits, "threads": threads}
        if float_model is None:
            alone = evaluate.perplexity(model, ids, context, **shared)
            payload = alone.to_json()
        else:
            both = evaluate.divergence(float_model, model, ids, context, **shared)
            payload = both.to_json()
    if as_json:
        terminal.emit({"model": model, "float_model": float_model, "context": context, **payload})
    elif float_model is None:
        counts = f"{alone.tokens} predictions in {alone.windows} windows of {context}"
        terminal.line(f"perplexity {alone.perplexity:.4f} ({alone.nll:.4f} nats, {counts})", "bold")
    else:
        _language(both, model, float_model, context)


def _language(found: LanguageComparison, model: str, float_model: str, context: int) -> None:
    ratio = found.quant_perplexity.perplexity / found.float_perplexity.perplexity
    rows = [
        (name, f"{each.perplexity:.4f}", f"{each.nll:.4f}")
        for name, each in ((float_model, found.float_perplexity), (model, found.quant_perplexity))
    ]
    terminal.table(("model", ">perplexity", ">nats per token"), rows)
    terminal.line()
    terminal.pairs(
        [
            ("perplexity", f"{ratio:.4f}x"),
            ("change", f"{interval(found.nll_change, '+.4f')} nats per token"),
            ("KL divergence", f"{interval(found.divergence.kl_mean, '.2e')} nats"),
            ("same top-1", interval(found.divergence.agreement, ".2%")),
            ("measured on", f"{found.quant_perplexity.tokens} predictions, windows of {context}"),
        ]
    )


def read_tokens(source: str) -> npt.NDArray[np.integer[Any]]:
    """Token ids from a .npy file, or the held-out ones of a reference model ("zoo:NAME")."""
    if source.startswith("zoo:"):
        from qgraph import models

        try:
            return models.eval_tokens(source[4:])
        except ValueError as e:
            raise _bad_tokens(source, str(e), "see: qgraph models") from e
    import numpy as np

    try:
        found = np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as e:
        raise _bad_tokens(source, "does not exist", "give a .npy file or zoo:NAME") from e
    except (OSError, ValueError, EOFError) as e:
        hint = "save token ids with np.save"
        raise _bad_tokens(source, "is no readable .npy file", hint) from e
    if not isinstance(found, np.ndarray):
        raise _bad_tokens(source, "holds several arrays", "give one array of ids, a .npy file")
    return found


def _bad_tokens(source: str, message: str, hint: str) -> errors.InputError:
    return errors.InputError(errors.Diagnostic("error", "QG123", source, message, hint))
