"""`qgraph recipes`, `targets`, `passes`, `solvers`, `models`: what there is, as a list or one in full."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qgraph import errors
from qgraph.cli import options, terminal

if TYPE_CHECKING:
    from pydantic import BaseModel

    from qgraph.pipeline import Fact
    from qgraph.recipe import Recipe, Rule
    from qgraph.target import Target

RECIPES_EXAMPLES = """
Examples:
  qgraph recipes               all of them
  qgraph recipes int4          its passes and rules
  qgraph recipes mine.toml     what a file of yours means
"""
MODELS_EXAMPLES = """
Examples:
  qgraph models
  qgraph models tiny-llama -o tiny-llama.onnx
"""

RecipeName = Annotated[
    str | None,
    typer.Argument(metavar="NAME|FILE", help="One of them, in full.", show_default=False),
]
ModelOutput = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE.onnx", help="Write the model.", show_default=False
    ),
]


def recipes(name: RecipeName = None, as_json: options.Json = False) -> None:
    """List the recipes, or show one: its passes and its rules, as they run."""
    from qgraph import recipe

    if name is None:
        rows = [(each.name, each.target, each.summary) for each in recipe.PRESETS.values()]
        _list("recipes", ("name", "target", "summary"), rows, as_json=as_json)
        return
    found = recipe.load(name)
    if as_json:
        terminal.emit(found.model_dump(mode="json"))
        return
    terminal.line(f"{found.name}: {found.summary}" if found.summary else found.name, "bold")
    terminal.line()
    terminal.pairs(
        [
            ("target", found.target),
            ("min_elements", found.min_elements),
            ("seed", found.seed),
            *((f"options.{each}", values) for each, values in found.options.items()),
            *((f"solvers.{each}", values) for each, values in found.solvers.items()),
        ]
    )
    _pipeline(found)
    terminal.heading("Rules, the first that matches a weight decides")
    columns = (
        "id",
        "for",
        "weights become, the first that is possible",
        "activations",
        "solver",
        "",
    )
    terminal.table(columns, map(_rule, found.rules))


def _pipeline(recipe: Recipe) -> None:
    from qgraph import registry

    terminal.heading("Passes, in this order")
    kinds = [registry.get("pass", each) for each in recipe.pipeline]
    rows = ((i + 1, k.name, k.keeps.value, first_line(k)) for i, k in enumerate(kinds))
    terminal.table((">", "pass", "function", "what it does"), rows)


def _rule(rule: Rule) -> tuple[str, ...]:
    matched = [", ".join(rule.ops)] if rule.ops else ["every operator"]
    matched += [f"named {', '.join(rule.names)}"] if rule.names else []
    matched += [f"of {rule.min_elements} elements or more"] if rule.min_elements else []
    # Rules may have fields that this table has no column for; none is kept silent.
    shown = {"id", "ops", "names", "min_elements", "weights", "activations", "solver", "reason"}
    others = {k: v for k, v in rule.model_dump(exclude_defaults=True).items() if k not in shown}
    notes = [rule.reason] if rule.reason else []
    notes += [f"{k} = {v}" for k, v in others.items()]
    return (
        rule.id,
        ", ".join(matched),
        ", ".join(rule.weights),
        rule.activations,
        rule.solver,
        "; ".join(notes),
    )


def targets(name: options.Name = None, as_json: options.Json = False) -> None:
    """List the targets, or show one: which forms it takes for which operators, and its choices."""
    from qgraph import registry

    if name is None:
        found = [registry.get("target", each) for each in registry.names("target")]
        rows = [(each.name, each.max_opset, each.summary) for each in found]
        _list("targets", ("name", ">max_opset", "summary"), rows, as_json=as_json)
        return
    target: Target = registry.get("target", name)
    if as_json:
        terminal.emit(_target_json(target))
        return
    terminal.line(f"{target.name}: {target.summary}", "bold")
    terminal.line()
    checks = "opened in the runtime to see what really runs" if target.inspect else "not opened"
    terminal.pairs([("opset", f"at most {target.max_opset}"), ("results are", checks)])
    terminal.heading("Forms, the best first")
    forms = ((kind, f.name, f.summary) for kind, fs in target.forms.items() for f in fs)
    terminal.table(("for", "form", "what is written"), forms)
    terminal.heading("What recipe auto tries, in this order")
    tries = ((kind, *each) for kind, choices in target.auto.items() for each in choices)
    terminal.table(("for", "weights", "activations", "why"), tries)
    if target.notes:
        terminal.heading("Notes")
        terminal.bullets(
            f"{form}: {each}" for form, lines in target.notes.items() for each in lines
        )


def _target_json(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "summary": target.summary,
        "max_opset": target.max_opset,
        "inspects": target.inspect is not None,
        "forms": {kind: [f.name for f in forms] for kind, forms in target.forms.items()},
        "auto": {
            kind: [{"weights": w, "activations": a, "reason": r} for w, a, r in choices]
            for kind, choices in target.auto.items()
        },
        "notes": {form: list(lines) for form, lines in target.notes.items()},
    }


def passes(name: options.Name = None, as_json: options.Json = False) -> None:
    """List the passes, or show one: what it does, needs, gives, breaks and keeps, and its options."""
    from qgraph import registry

    if name is None:
        kinds = [registry.get("pass", each) for each in registry.names("pass")]
        rows = [
            (k.name, facts(k.needs), facts(k.gives), k.keeps.value, first_line(k)) for k in kinds
        ]
        columns = ("name", "needs", "gives", "keeps", "summary")
        _list("passes", columns, rows, as_json=as_json)
        return
    kind = registry.get("pass", name)
    declared = {key: facts(getattr(kind, key)) for key in ("needs", "gives", "breaks")}
    fields = option_fields(kind.Options)
    if as_json:
        payload = {"name": kind.name, "summary": first_line(kind), "keeps": kind.keeps.value}
        terminal.emit({**payload, **declared, "options": fields, "text": full_text(kind)})
        return
    terminal.line(f"{kind.name}: {first_line(kind)}", "bold")
    terminal.line()
    terminal.line(full_text(kind))
    terminal.line()
    kept = {"nothing": "no promise: the function may change"}.get(
        kind.keeps.value, kind.keeps.value
    )
    terminal.pairs(
        [*((key, ", ".join(declared[key]) or "nothing") for key in declared), ("keeps", kept)]
    )
    _options(f"options.{kind.name}", fields)


def solvers(name: options.Name = None, as_json: options.Json = False) -> None:
    """List the weight solvers, or show one with its options."""
    from qgraph import registry

    if name is None:
        kinds = [registry.get("solver", each) for each in registry.names("solver")]
        rows = [(kind.name, first_line(kind)) for kind in kinds]
        _list("solvers", ("name", "summary"), rows, as_json=as_json)
        return
    kind = registry.get("solver", name)
    fields = option_fields(kind.Options)
    if as_json:
        text = full_text(kind)
        terminal.emit({"name": name, "summary": first_line(kind), "options": fields, "text": text})
        return
    terminal.line(f"{kind.name}: {first_line(kind)}", "bold")
    terminal.line()
    terminal.line(full_text(kind))
    _options(f"solvers.{kind.name}", fields)


def models(
    name: options.Name = None,
    output: ModelOutput = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """List the reference models that ship with qgraph, or write one as an .onnx file."""
    from qgraph import models as zoo

    if name is None:
        if output is not None:
            message, hint = "which model shall be written?", "qgraph models NAME -o FILE.onnx"
            raise errors.InputError(errors.Diagnostic("error", "QG101", "models", message, hint))
        rows = [_model_row(each) for each in zoo.names()]
        _list("models", ("name", "task", "metric", ">value", "summary"), rows, as_json=as_json)
        return
    try:
        row = _model_row(name)
    except ValueError as e:
        hint = "see: qgraph models"
        raise errors.InputError(errors.Diagnostic("error", "QG101", name, str(e), hint)) from e
    written = None
    if output is not None:
        from qgraph import files

        files.check_output(output, force=force)
        written = files.save(files.load(f"zoo:{name}"), output, force=force)
    if as_json:
        keys = ("name", "task", "metric", "value", "summary")
        terminal.emit({**dict(zip(keys, row, strict=True)), "output": written})
        return
    terminal.line(f"{name}: {row[4]}", "bold")
    terminal.pairs([("task", row[1]), (str(row[2]), row[3]), ("written to", written)])


def _model_row(name: str) -> tuple[str, str, str, float | str, str]:
    from qgraph import models as zoo

    found = zoo.info(name)
    try:
        reached: float | str = found.reached
    except KeyError:
        reached = ""
    return found.name, found.task, found.metric, reached, found.summary


def _list(
    key: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]], *, as_json: bool
) -> None:
    if as_json:
        names = [c.lstrip(">") for c in columns]
        terminal.emit({key: [dict(zip(names, row, strict=True)) for row in rows]})
    else:
        terminal.table(columns, rows)


def _options(prefix: str, fields: list[dict[str, Any]]) -> None:
    if not fields:
        terminal.line()
        terminal.line("no options")
        return
    terminal.heading(f"Options, set with --set {prefix}.KEY=VALUE")
    keys = ("key", "type", "default", "help")
    terminal.table(keys, ([f[k] for k in keys] for f in fields))


def option_fields(kind: type[BaseModel]) -> list[dict[str, Any]]:
    """Key, type, default and help of every option."""
    documented = field_docs(kind)
    found = []
    for key, info in kind.model_fields.items():
        typed = getattr(info.annotation, "__name__", None) or str(info.annotation)
        text = info.description or documented.get(key, "")
        required = (
            "(required)" if info.is_required() else info.get_default(call_default_factory=True)
        )
        found.append({"key": key, "type": typed, "default": required, "help": text})
    return found


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a class, which is its help."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made at run time, there is no source
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, below in itertools.pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def facts(of: Iterable[Fact]) -> list[str]:
    """Names of facts, sorted."""
    return sorted(each.value for each in of)


def first_line(kind: type) -> str:
    """What a pass or solver does, in one line."""
    return (inspect.getdoc(kind) or "").strip().partition("\n")[0]


def full_text(kind: type) -> str:
    """What the module and the class say about themselves, but for the first line of the class."""
    module = inspect.getmodule(kind)
    rest = (inspect.getdoc(kind) or "").partition("\n")[2]
    texts = [inspect.getdoc(module) if module else "", rest]
    return "\n\n".join(t.strip() for t in texts if t)
