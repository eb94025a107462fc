"""`qgraph eval`: a model on a task, and where inside it the error arises."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qgraph import errors
from qgraph.cli import measure, options, reports, terminal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.data import Dataset
    from qgraph.evaluate.findings import Findings

PERPLEXITY_EXAMPLES = """
Examples:
  qgraph eval perplexity zoo:tiny-llama --tokens zoo:tiny-llama --context 256
  qgraph eval perplexity model.q.onnx --float model.onnx --tokens held_out.npy --context 1024
  qgraph eval perplexity model.q.onnx --text book.txt --tokenizer tokenizer.json --context 512 --report found.html
"""
ACCURACY_EXAMPLES = """
Examples:
  qgraph eval accuracy model.q.onnx --float model.onnx --data images.npz --labels labels.npy
  qgraph eval accuracy model.onnx --data photos/ --preprocess values=imagenet --labels labels.npy --json
"""
EMBEDDINGS_EXAMPLES = """
Examples:
  qgraph eval embeddings model.q.onnx --float model.onnx --data lines.txt --preprocess tokenizer=tokenizer.json
  qgraph eval embeddings model.q.onnx --float model.onnx --data pairs.npz --scores judged.npy --output last_hidden_state
"""
TENSORS_EXAMPLES = """
Examples:
  qgraph eval tensors model.q.onnx --float model.onnx --data samples.npz
  qgraph eval tensors model.q.onnx --float model.onnx --data samples.npz --samples 4 --report layers.html
"""

Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="FILE.npy|zoo:NAME",
        help="Token ids, one integer array; zoo:NAME: the held-out text of a reference model.",
        rich_help_panel=options.DATA,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE.txt",
        help="Instead of --tokens: a text in UTF-8, tokenized whole and without special tokens.",
        rich_help_panel=options.DATA,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="FILE.json",
        help="The tokenizer.json of --text.",
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
        help="The float model: adds its figures and what the two have in common.",
    ),
]
FloatNeeded = Annotated[
    str, typer.Option("--float", metavar="MODEL", help="The float model to compare with.")
]
DataNeeded = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="SOURCE", help="Real inputs, as for compare.", rich_help_panel=options.DATA
    ),
]  # fmt: skip
Labels = Annotated[
    Path,
    typer.Option(
        "--labels",
        metavar="FILE.npy",
        help="Class indices [samples], or [samples, ...] for several predictions each; negative ones do not count.",
        rich_help_panel=options.DATA,
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        metavar="FILE.npy",
        help="How similar vectors 0 and 1, 2 and 3, ... are by human judgement: adds rank correlations.",
        rich_help_panel=options.DATA,
    ),
]
OutputName = Annotated[
    str | None,
    typer.Option("--output", metavar="NAME", help="The output with the vectors. Default: the only one."),
]  # fmt: skip


class Pooling(str, Enum):
    """How hidden states become a vector."""

    mean = "mean"
    first = "first"


PoolOption = Annotated[
    Pooling,
    typer.Option(
        "--pool", help="Hidden states [batch, T, d]: mean over the mask, or the first token."
    ),
]
Most = Annotated[
    int, typer.Option("--worst", metavar="N", min=1, help="Print the worst N; reports hold all.")
]


def perplexity(
    model: options.Model,
    context: ContextLength,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    float_model: FloatOption = None,
    limit: Limit = None,
    logits: options.Logits = None,
    threads: measure.OneThread = 1,
    report: reports.Reports = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of a language model on tokens.

    exp of the mean of -log p over every token but the first of each window.
    With --float also that of the float model, the KL divergence between the
    two and how often they predict the same token.
    """
    reports.check(report, force=force)
    from qgraph import evaluate, files
    from qgraph.evaluate import telling

    for each in filter(None, (model, float_model)):
        files.load(each)  # says better than a session what is wrong with a file
    ids = _tokens(tokens, text, tokenizer)[:limit]
    source = tokens or f"{text} by {tokenizer}"
    with terminal.progress(is_shown=not as_json) as progress:
        progress(f"{len(ids)} tokens", -1)
        shared: dict[str, Any] = {"logits": logits, "threads": threads}
        found: evaluate.Perplexity | evaluate.LanguageComparison
        if float_model is None:
            found = evaluate.perplexity(model, ids, context, **shared)
        else:
            found = evaluate.divergence(float_model, model, ids, context, **shared)
    told = telling.of_perplexity(found, model, float_model or "", source, context)
    payload = {"model": model, "float_model": float_model, "context": context, **found.to_json()}
    _tell(told, report, payload if as_json else None)


def accuracy(
    model: options.Model,
    data: DataNeeded,
    labels: Labels,
    float_model: FloatOption = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    logits: options.Logits = None,
    threads: measure.OneThread = 1,
    report: reports.Reports = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Measure the accuracy of a classifier on labelled data.

    The share of labelled predictions whose largest class is the label, with
    its 95 % interval. With --float also that of the float model, the change
    sample by sample, and how often both predict the same.
    """
    reports.check(report, force=force)
    from qgraph import evaluate
    from qgraph.evaluate import telling

    known = _array(labels)
    with terminal.progress(is_shown=not as_json) as progress:
        dataset = _dataset(model, data, samples, preprocess, progress)
        kept = known[: len(dataset)] if samples is not None else known
        shared: dict[str, Any] = {"logits": logits, "threads": threads}
        found: evaluate.Estimate | evaluate.AccuracyComparison
        if float_model is None:
            found = evaluate.accuracy(model, dataset, kept, **shared)
        else:
            found = evaluate.accuracies(float_model, model, dataset, kept, **shared)
    told = telling.of_accuracy(found, model, float_model or "", data, len(dataset))
    _tell(told, report, _whole(told) if as_json else None)


def embeddings(
    model: options.Model,
    float_model: FloatNeeded,
    data: DataNeeded,
    scores: Scores = None,
    output: OutputName = None,
    pool: PoolOption = Pooling.mean,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    threads: measure.OneThread = 1,
    report: reports.Reports = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Compare the vectors that a model gives with those of its float model.

    The cosine of each vector with its float version, and the rank correlation
    (Spearman) of the similarities of all pairs. With --scores also how well
    each model agrees with human judgement.
    """
    reports.check(report, force=force)
    from qgraph import evaluate
    from qgraph.evaluate import telling

    with terminal.progress(is_shown=not as_json) as progress:
        dataset = _dataset(float_model, data, samples, preprocess, progress)
        found = evaluate.embeddings(
            float_model,
            model,
            dataset,
            output=output,
            pool=pool.value,
            scores=None if scores is None else _array(scores),
            threads=threads,
        )
    told = telling.of_embeddings(found, model, float_model, data, pool.value)
    _tell(told, report, _whole(told) if as_json else None)


def tensors(
    model: options.Model,
    float_model: FloatNeeded,
    data: DataNeeded,
    worst: Most = 20,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    threads: measure.OneThread = 1,
    report: reports.Reports = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Tell which layer hurts: the error of every value inside the graph.

    Isolated: what an operator loses when it reads what the float model
    computed before it. Accumulated: what has arrived, with the error of all
    operators before.
    """
    reports.check(report, force=force)
    from qgraph import evaluate
    from qgraph.evaluate import telling

    with terminal.progress(is_shown=not as_json) as progress:
        dataset = _dataset(float_model, data, samples, preprocess, progress)
        progress(f"comparing on {terminal.counted(len(dataset), 'sample')}", -1)
        found = evaluate.tensor_losses(float_model, model, dataset, threads=threads)
    told = telling.of_tensors(found, model, float_model, data)
    _tell(told, report, _whole(told) if as_json else None, most=worst)


def _whole(found: Findings) -> dict[str, Any]:
    """What `--json` prints."""
    return {"model": found.model, "float_model": found.float_model or None, **found.payload}


def _tell(
    found: Findings,
    paths: list[Path] | None,
    payload: dict[str, Any] | None,
    most: int | None = None,
) -> None:
    """Write the reports and print the result: as JSON, where there is a payload."""
    from qgraph.evaluate.findings import text

    found.command = ["qgraph", *terminal.given]
    reports.write(found, paths)
    if payload is not None:
        terminal.emit(payload)
        return
    told = [(_small(f.title), f"{f.text} ({f.note})" if f.note else f.text) for f in found.figures]
    terminal.pairs([("model", found.model), ("float", found.float_model), *told])
    for table in found.tables:
        rows = table.rows[:most]
        terminal.heading(table.title)
        terminal.table(table.columns, ([text(cell) for cell in row] for row in rows))
        if len(rows) < len(table.rows):
            terminal.line(f" … and {len(table.rows) - len(rows)} more (--worst N, --report FILE)")
    terminal.line()
    for sentence in found.how:
        terminal.line(sentence, "dim")


def _small(title: str) -> str:
    """The title as the name of a value: "KL divergence", but "perplexity"."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def _dataset(
    model: str,
    data: str,
    samples: int | None,
    preprocess: str | None,
    progress: terminal.Progress,
) -> Dataset:
    from qgraph import files
    from qgraph.cli.optimize import dataset

    files.load(model)
    progress("reading data", -1)
    found = dataset(model, data, samples, preprocess, progress)
    assert found is not None
    return found


def _tokens(
    tokens: str | None, text: str | None, tokenizer: str | None
) -> npt.NDArray[np.integer[Any]]:
    if (tokens is None) == (text is None):
        message = "what shall be predicted?"
        hint = "give --tokens FILE.npy, or --text FILE.txt with --tokenizer tokenizer.json"
        raise errors.InputError(errors.Diagnostic("error", "QG123", "--tokens", message, hint))
    if tokens is not None and tokenizer is not None:
        raise _bad_tokens("--tokenizer", "is for --text; tokens are ids already", "leave it out")
    if text is not None and tokenizer is None:
        raise _bad_tokens("--text", "needs a tokenizer", "give --tokenizer tokenizer.json")
    if tokens is not None:
        return read_tokens(tokens)
    from qgraph.data.text import tokenize

    found: npt.NDArray[np.integer[Any]] = tokenize(str(text), str(tokenizer))
    return found


def read_tokens(source: str) -> npt.NDArray[np.integer[Any]]:
    """Token ids from a .npy file, or the held-out ones of a reference model ("zoo:NAME")."""
    if source.startswith("zoo:"):
        from qgraph import models

        try:
            return models.eval_tokens(source[4:])
        except ValueError as e:
            raise _bad_tokens(source, str(e), "see: qgraph models") from e
    return _array(Path(source), "token ids", "give a .npy file or zoo:NAME")


def _array(
    source: Path, what: str = "numbers", where: str = "give a .npy file"
) -> npt.NDArray[Any]:
    """One array from a .npy file."""
    import numpy as np

    try:
        found = np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as e:
        raise _bad_tokens(str(source), "does not exist", where) from e
    except (OSError, ValueError, EOFError) as e:
        hint = f"save {what} with np.save"
        raise _bad_tokens(str(source), "is no readable .npy file", hint) from e
    if not isinstance(found, np.ndarray):
        raise _bad_tokens(str(source), "holds several arrays", f"give one array of {what}, a .npy file")  # fmt: skip
    return found


def _bad_tokens(source: str, message: str, hint: str) -> errors.InputError:
    return errors.InputError(errors.Diagnostic("error", "QG123", source, message, hint))
