"""`qgraph bisect`: which pass, or which weights, break a model."""

from __future__ import annotations

import glob
import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qgraph import errors
from qgraph.cli import options, terminal

if TYPE_CHECKING:
    from qgraph.bisect import Check, Found, Trial

EXAMPLES = """
Examples:
  qgraph bisect model.onnx --recipe int4
  qgraph bisect model.onnx --recipe int4 --data samples.npz --min-sqnr 25 --weights
  qgraph bisect zoo:tiny-llama --recipe int4 --tokens zoo:tiny-llama --max-kl 0.05 --weights
  qgraph bisect model.onnx --target openvino --check load --dump-dir found
"""

RANDOM_FEEDS = 2
DEFAULT_KL = 0.1


class CheckName(str, Enum):
    """Checks that need no floor."""

    verify = "verify"
    load = "load"
    run = "run"


CheckOption = Annotated[
    CheckName | None,
    typer.Option(
        "--check",
        help="verify: the verifier finds no error; load: ONNX Runtime loads it; run: and runs it. "
        "Default: it runs, and the SQNR of every output is at least 10 dB.",
        rich_help_panel=options.DATA,
        show_default=False,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="FILE.npy|zoo:NAME",
        help="Judge a language model by its KL divergence on these tokens (--max-kl, default 0.1).",
        rich_help_panel=options.DATA,
    ),
]
ContextLength = Annotated[
    int,
    typer.Option(
        "--context", metavar="N", min=2, help="Tokens per window.", rich_help_panel=options.DATA
    ),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        metavar="DB",
        help="The check fails where the SQNR of an output is below DB decibels.",
        rich_help_panel=options.DATA,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="The check fails where predictions diverge by more than NATS on average.",
        rich_help_panel=options.DATA,
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="The check fails where fewer top-1 predictions than SHARE (0..1) are equal.",
        rich_help_panel=options.DATA,
    ),
]
Weights = Annotated[
    bool,
    typer.Option(
        "--weights", help="Find the weights, not the pass.", rich_help_panel=options.TO_DO
    ),
]

FloorValues = tuple[float | None, float | None, float | None]
"""--min-sqnr, --max-kl, --min-agreement."""


def bisect(
    model: options.Model,
    recipe: options.Recipe = "auto",
    target: options.Target = None,
    overrides: options.Overrides = None,
    weights: Weights = False,
    data: options.Data = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    tokens: Tokens = None,
    context: ContextLength = 128,
    min_sqnr: MinSqnr = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    check: CheckOption = None,
    dump_dir: Annotated[
        str | None,
        typer.Option(
            "--dump-dir",
            metavar="DIR",
            help="Save the last good and the last bad model as DIR/good.onnx and DIR/bad.onnx.",
            rich_help_panel=options.DEBUG,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Find the first pass after which a check fails, or the smallest set of weights that make it fail.

    Without data the check uses random inputs, which show what is broken but
    say little of accuracy. Every model that was tried is listed with what the
    check said of it.
    """
    from pathlib import Path

    from qgraph import bisect as search
    from qgraph import recipe as recipes
    from qgraph import registry

    chosen = recipes.load(recipe, overrides or ())
    goal = registry.get("target", target or chosen.target)
    chosen = chosen.model_copy(update={"target": goal.name})
    floors = (min_sqnr, max_kl, min_agreement)
    _refuse_conflicts(data, tokens, check, floors)
    judge: Any = _check(model, data, preprocess, samples, tokens, context, floors, check)
    find = search.bad_weights if weights else search.bad_pass
    keep = Path(dump_dir) if dump_dir else None
    with terminal.progress(is_shown=not as_json) as progress:
        found = find(model, chosen, judge, keep=keep, progress=progress)
    if as_json:
        terminal.emit(found.to_json())
        return
    explain(found, chosen.name, is_of_weights=weights)


def _refuse_conflicts(
    data: str | None,
    tokens: str | None,
    check: CheckName | None,
    floors: FloorValues,
) -> None:
    has_floor = floors != (None, None, None)
    min_sqnr, _, min_agreement = floors
    problem = hint = ""
    if data is not None and tokens is not None:
        problem, hint = "--data and --tokens exclude each other", "give one of them"
    elif check is not None and has_floor:
        problem = f"--check {check.value} has no floor"
        hint = "leave out --check: with a floor the model must run anyway"
    elif tokens is not None and (min_sqnr, min_agreement) != (None, None):
        problem, hint = "--tokens is judged by --max-kl", "give --max-kl, or --data with the others"
    if problem:
        raise errors.InputError(errors.Diagnostic("error", "QG100", "qgraph bisect", problem, hint))


def _check(
    model: str,
    data: str | None,
    preprocess: str | None,
    samples: int | None,
    tokens: str | None,
    context: int,
    floors: FloorValues,
    check: CheckName | None,
) -> Check:
    from qgraph import bisect as search
    from qgraph import verify
    from qgraph.cli.evaluation import read_tokens
    from qgraph.cli.optimize import dataset

    min_sqnr, max_kl, min_agreement = floors
    if check is CheckName.verify:
        return search.Verifies()
    if check is CheckName.load:
        return search.Loads()
    if tokens is not None:
        limit = DEFAULT_KL if max_kl is None else max_kl
        return search.Divergence(model, read_tokens(tokens), context, max_kl=limit)
    feeds: Any = dataset(model, data, samples, preprocess)
    feeds = feeds or verify.sample_feeds(model, count=RANDOM_FEEDS)
    if check is CheckName.run:
        return search.Runs(feeds)
    if floors == (None, None, None):
        min_sqnr = search.DEFAULT_SQNR
    return search.Accuracy(
        model, feeds, min_sqnr=min_sqnr, max_kl=max_kl, min_agreement=min_agreement
    )


def explain(found: Found, recipe: str, *, is_of_weights: bool) -> None:
    """Print what was tried and what was found."""
    terminal.line(f"Check: {found.check}")
    terminal.heading("Tried")
    terminal.table(("", "model", "what the check said"), map(_row, found.trials))
    terminal.line()
    if not found.guilty:
        terminal.line(f"The check holds with recipe {recipe}: nothing to find.", "bold green")
    elif not is_of_weights:
        terminal.line(f"The first bad pass is {found.guilty[0]}.", "bold red")
        terminal.line(
            f"See: qgraph passes {found.guilty[0]}; qgraph bisect --weights narrows it down."
        )
    else:
        _explain_weights(found)
    if found.saved:
        terminal.line()
        terminal.pairs(found.saved.items())


def _row(trial: Trial) -> tuple[str, str, str]:
    return "ok" if trial.ok else "FAILS", trial.what, trial.detail


def _explain_weights(found: Found) -> None:
    is_one = len(found.guilty) == 1
    count, them = terminal.counted(len(found.guilty), "weight"), "it" if is_one else "them"
    if found.is_spread:
        text = f"Even the {count} below do not fail alone: the error is spread over the model."
    else:
        text = f"{count} {'fails' if is_one else 'fail together'}:"
    terminal.line(text, "bold red")
    terminal.bullets(found.guilty)
    terminal.line()
    if found.is_spread or found.remedy is None:
        terminal.line("A better recipe helps more than single weights, see: qgraph recipes")
        return
    verdict = "holds" if found.remedy.ok else "still fails, there are more"
    terminal.line(f"With {them} float, the check {verdict}: {found.remedy.detail}")
    terminal.line(f"A rule that keeps {them} float, for a recipe file:")
    names = ", ".join(json.dumps(glob.escape(name)) for name in found.guilty)
    terminal.line(f'\n  [[rules]]\n  names = [{names}]\n  weights = "float"')
