"""The help texts: every command and option has one, and every example is a command line that parses."""

import shlex
from pathlib import Path

import pytest
import typer

from qgraph.cli import app

ROOT = typer.main.get_command(app.app)
TREE = {"": ROOT}
for _name, _command in ROOT.commands.items():
    TREE[_name] = _command
    TREE |= {f"{_name} {n}": c for n, c in getattr(_command, "commands", {}).items()}
COMMANDS = [name for name in TREE if not hasattr(TREE[name], "commands")]
DOCUMENTS = [p for p in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if p.is_file()]


def parse(words):
    """Parse a command line without running it."""
    command, context = ROOT, None
    while True:
        name = command.name or "qgraph"
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "commands"):
            return
        first = "_protected_args" if hasattr(context, "_protected_args") else "protected_args"
        words = [*getattr(context, first, ()), *context.args]
        name, command, words = command.resolve_command(context, words)


def lines_of(text):
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("qgraph "):
            yield shlex.split(line.partition("  ")[0], comments=True)[1:]


@pytest.mark.parametrize("name", TREE)
def test_every_command_and_option_has_a_text(name):
    command = TREE[name]
    assert command.help or name == ""
    for param in command.params:
        assert param.help, f"{name} {param.name}"
        assert param.help.rstrip().endswith((".", "exit.")), param.help


@pytest.mark.parametrize("name", TREE)
def test_help(run, name):
    done = run(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert "Usage: qgraph" in done.out
    if TREE[name].epilog:
        assert TREE[name].epilog.strip() in done.out


def test_no_arguments_is_help(run):
    done = run()
    assert done.code == 0
    assert done.out.split() == run("--help").out.split()


def test_the_first_help_shows_examples_and_exit_codes(run):
    out = run("--help").out
    assert app.EXAMPLES.strip() in out
    assert "3 accuracy floor missed" in out


def test_every_command_with_a_result_has_json():
    assert all(any("--json" in p.opts for p in TREE[name].params) for name in COMMANDS)


def test_the_main_commands_have_examples():
    for name in (
        "optimize",
        "inspect",
        "compare",
        "bisect",
        "eval perplexity",
        "eval accuracy",
        "eval embeddings",
        "eval tensors",
        "recipes",
        "models",
    ):
        assert len(list(lines_of(TREE[name].epilog))) >= 2


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_examples_parse(name):
    for words in lines_of(app.EXAMPLES if name == "" else TREE[name].epilog or ""):
        parse(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_documents_show_command_lines_that_parse(path):
    for words in lines_of(path.read_text(encoding="utf-8")):
        parse(words)


def test_version(run):
    import qgraph

    assert run("--version").out == f"qgraph {qgraph.__version__}\n"
