"""The application: its commands, its global options, and how an exception becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import qgraph
from qgraph import errors
from qgraph.cli import bisect, catalogue, doctor, inspect, measure, optimize, terminal
from qgraph.cli import evaluation as judge

DONE, USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 0, 1, 70, 130
VERBOSE = ("-v", "--verbose")

# Some versions of typer carry their own copy of click: what a wrong command line raises is found from here.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

EXAMPLES = """
Examples:
  qgraph optimize model.onnx -o model.q.onnx            the best that needs no data
  qgraph optimize zoo:tiny-llama -r int4 -o q.onnx      a model that ships with qgraph
  qgraph inspect model.onnx                             what is in it, what can be quantized
  qgraph compare model.onnx model.q.onnx -d data.npz    how much was lost, how much gained

Exit codes:
  0 done   1 wrong input   2 verification failed   3 accuracy floor missed   70 internal error
"""


class Command(TyperCommand):
    """A command whose examples are printed as they are written."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the examples."""
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        formatter.write(examples or "")
        self.epilog = examples


class Root(TyperGroup):
    """The top-level group: prints errors as diagnostics and turns them into exit codes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the examples."""
        super().format_help(ctx, formatter)
        formatter.write(EXAMPLES)

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order that a person meets them."""
        return list(self.commands)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; exits unless `standalone_mode` is False."""
        given = list(sys.argv[1:] if args is None else args)
        is_verbose = any(flag in given for flag in VERBOSE)  # it may stand anywhere
        given = [each for each in given if each not in VERBOSE]
        terminal.found.clear()
        terminal.given[:] = given
        code = DONE
        try:
            with _logging(is_verbose):
                result = super().main(given, prog_name, complete_var, False, **extra)
            code = result if isinstance(result, int) else DONE
            sys.stdout.flush()
        except BrokenPipeError:  # as in `qgraph passes | head`: nobody reads on
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = USER_ERROR
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as e:  # noqa: BLE001 - nothing may reach a person as a traceback
            code = report(e, as_json="--json" in given, is_verbose=is_verbose)
        if code == INTERRUPTED:
            typer.echo("interrupted", err=True)
        if standalone_mode:
            sys.exit(code)
        return code


def report(e: Exception, *, as_json: bool, is_verbose: bool) -> int:
    """Print an exception as a person or a program should read it; returns the exit code."""
    diagnostics, code = explain(e)
    if is_verbose:
        traceback.print_exception(e)
    terminal.diagnostics(diagnostics)
    if as_json:
        terminal.emit({**terminal.found, "errors": terminal.diagnostics_json(diagnostics)})
    return code


def explain(e: Exception) -> tuple[Sequence[errors.Diagnostic], int]:
    """The diagnostics and the exit code of an exception."""
    if isinstance(e, errors.QGraphError):
        return e.diagnostics, e.exit_code
    if isinstance(e, USAGE_ERROR):
        return [_usage(e)], USER_ERROR
    if type(e).__module__.startswith("onnxruntime"):
        text, hint = f"could not run the model: {e}", "do the inputs fit the model?"
        return [errors.Diagnostic("error", "QG602", "ONNX Runtime", text, hint)], USER_ERROR
    if isinstance(e, OSError) and e.filename is not None:
        text = f"cannot be read or written: {e.strerror}"
        found = errors.Diagnostic("error", "QG105", str(e.filename), text, "choose another place")
        return [found], USER_ERROR
    text = f"internal error, please report it: {type(e).__name__}: {' '.join(str(e).split())}"
    hint = "-v shows where it happened"
    return [errors.Diagnostic("error", "QG900", "", text, hint)], INTERNAL_ERROR


def _usage(e: Any) -> errors.Diagnostic:
    ctx = getattr(e, "ctx", None)
    command = ctx.command_path if ctx is not None else "qgraph"
    text = e.format_message().strip().rstrip(".")
    hint = f"see: {command} --help"
    known = getattr(getattr(ctx, "command", None), "commands", None)
    quoted = text.split("'")
    if known and text.startswith("No such command") and len(quoted) == 3:
        hint = f"{errors.nearest(quoted[1], known)}; {hint}"
    return errors.Diagnostic("error", "QG100", command, text, hint)


@contextlib.contextmanager
def _logging(is_on: bool) -> Iterator[None]:
    """Log to stderr meanwhile, or nothing but errors."""
    root_logger = logging.getLogger()
    level, handler = root_logger.level, logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    root_logger.setLevel(logging.INFO if is_on else logging.ERROR)
    root_logger.addHandler(handler)
    try:
        yield
    finally:
        root_logger.removeHandler(handler)
        root_logger.setLevel(level)


def _version(is_asked: bool) -> None:
    if is_asked:
        terminal.line(f"qgraph {qgraph.__version__}")
        raise typer.Exit


def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, typer.Option(*VERBOSE, help="Log what is done, show tracebacks. May stand anywhere.")
    ] = False,
) -> None:
    """A compiler for neural-network quantization: ONNX in, smaller and faster ONNX out, with reasons."""
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help() + "\n")


def _application() -> typer.Typer:
    look = {"add_completion": False, "rich_markup_mode": "rich", "pretty_exceptions_enable": False}
    made = typer.Typer(cls=Root, invoke_without_command=True, callback=root, **look)  # type: ignore[arg-type]
    evaluation = typer.Typer(**look)  # type: ignore[arg-type]
    for app, panel, name, function, examples in (
        (made, "Quantize", "optimize", optimize.optimize, optimize.EXAMPLES),
        (made, "Quantize", "inspect", inspect.inspect, inspect.EXAMPLES),
        (made, "Quantize", "bisect", bisect.bisect, bisect.EXAMPLES),
        (made, "Measure", "compare", measure.compare, measure.COMPARE_EXAMPLES),
        (evaluation, "", "perplexity", judge.perplexity, judge.PERPLEXITY_EXAMPLES),
        (evaluation, "", "accuracy", judge.accuracy, judge.ACCURACY_EXAMPLES),
        (evaluation, "", "embeddings", judge.embeddings, judge.EMBEDDINGS_EXAMPLES),
        (evaluation, "", "tensors", judge.tensors, judge.TENSORS_EXAMPLES),
        (made, "What there is", "recipes", catalogue.recipes, catalogue.RECIPES_EXAMPLES),
        (made, "What there is", "targets", catalogue.targets, ""),
        (made, "What there is", "passes", catalogue.passes, ""),
        (made, "What there is", "solvers", catalogue.solvers, ""),
        (made, "What there is", "models", catalogue.models, catalogue.MODELS_EXAMPLES),
        (made, "What there is", "doctor", doctor.doctor, ""),
    ):
        panel_of = {"rich_help_panel": panel} if panel else {}
        app.command(name, cls=Command, epilog=examples, **panel_of)(function)  # type: ignore[arg-type]
        if name == "compare":
            title = "Measure a model on a task, or find the layer that hurts."
            made.add_typer(evaluation, name="eval", help=title, rich_help_panel=panel)
    return made


app = _application()
