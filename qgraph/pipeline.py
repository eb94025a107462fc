"""The pipeline: passes, the facts that move between them, and the instruments that watch.

Every pass declares what it needs, gives, breaks and keeps. `Pipeline.check` proves the whole chain before anything
runs; instruments (verifier, timer, printer, ...) see the model before and after each pass.
"""

from __future__ import annotations

import enum
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from qgraph import errors, registry
from qgraph.plan import QuantPlan
from qgraph.spool import Spool

if TYPE_CHECKING:
    from qgraph.qdq import Placed
    from qgraph.recipe import Recipe
    from qgraph.report import Operator
    from qgraph.target import Target
    from qgraph.workdir import WorkDir


class Fact(enum.Enum):
    """What is true of the model between two passes."""

    CANONICAL = "canonical"
    STATS = "stats"
    PLAN = "plan"
    SOLVED = "solved"
    QDQ = "qdq"
    LOWERED = "lowered"


class Keeps(enum.Enum):
    """What a pass promises about the function that the model computes."""

    BIT_EXACT = "bit-exact"
    FLOAT_EQUAL = "float-equal"
    NOTHING = "nothing"


class PassOptions(BaseModel):
    """Base of a pass's options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


OptionsType = TypeVar("OptionsType", bound=PassOptions)


@dataclass
class Context:
    """What travels beside the model: target, recipe, data, plan, findings, and where to put large things.

    `placed` is what insert-qdq wrote for static grids, `operators` what the operators of the float model cost, by
    output; `inspect` says that the target's runtime may be asked what it executes; `work` keeps finished work.
    """

    target: Target
    recipe: Recipe
    data: Any = None
    stats: Any = None
    plan: QuantPlan = field(default_factory=QuantPlan)
    facts: set[Fact] = field(default_factory=set)
    diagnostics: list[errors.Diagnostic] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)
    placed: Placed | None = None
    inspect: bool = True
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    spool: Spool = field(default_factory=Spool)
    work: WorkDir | None = None
    threads: int = 1
    progress: Callable[[str, float], None] = lambda what, share: None

    def report(
        self, severity: errors.Severity, code: str, where: str, message: str, hint: str = ""
    ) -> None:
        """Add a finding to the report."""
        self.diagnostics.append(errors.Diagnostic(severity, code, where, message, hint))


class Pass(ir.passes.InPlacePass):
    """Base class of passes. Set `name`, declare, implement `run`.

    A qgraph pass is an onnx_ir pass: it may stand in an `onnx_ir.passes.Sequential`, and any onnx_ir pass may stand
    in a qgraph pipeline (it needs, gives and breaks nothing and is taken to keep the function float-equal).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    keeps: ClassVar[Keeps] = Keeps.NOTHING
    repeats: ClassVar[str] = ""
    """Why a second run changes the model again; "" where it does not."""
    Options: ClassVar[type[PassOptions]] = PassOptions

    def __init__(self, **options: Any) -> None:
        super().__init__()
        try:
            self.options = self.Options(**options)
        except ValidationError as e:
            raise errors.RecipeError(*_option_errors(self.name, self.Options, e)) from e

    def options_as(self, kind: type[OptionsType]) -> OptionsType:
        """The options, typed."""
        assert isinstance(self.options, kind)
        return self.options

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Change the model in place; True if anything changed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run outside a qgraph pipeline, with the default recipe and target."""
        from qgraph.recipe import Recipe

        recipe = Recipe.default()
        ctx = Context(registry.get("target", recipe.target), recipe)
        return ir.passes.PassResult(model, self.run(model, ctx))


def _option_errors(
    name: str, options: type[BaseModel], e: ValidationError
) -> list[errors.Diagnostic]:
    found = []
    for problem in e.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            found.append(
                errors.Diagnostic(
                    "error",
                    "QG305",
                    f"{name}.{key}",
                    "is no option",
                    errors.nearest(key, options.model_fields),
                )
            )
        else:
            text = f"{problem['msg']}, found {problem['input']!r}"
            found.append(
                errors.Diagnostic(
                    "error", "QG305", f"{name}.{key}", text, f"see: qgraph passes {name}"
                )
            )
    return found


class _Adopted(Pass):
    """Any onnx_ir pass as a qgraph pass."""

    keeps = Keeps.FLOAT_EQUAL

    def __init__(self, inner: ir.passes.PassBase) -> None:
        super().__init__()
        self.inner = inner
        self.name = type(inner).__name__  # type: ignore[misc]

    def run(self, model: ir.Model, ctx: Context) -> bool:
        result = self.inner(model)
        if result.model is not model:
            raise errors.PipelineError(
                errors.Diagnostic(
                    "error",
                    "QG306",
                    self.name,
                    "returned another model",
                    "wrap it with onnx_ir.passes.functionalize's in-place twin",
                )
            )
        return bool(result.modified)


class Instrument:
    """Watches a pipeline. Override what you need; raise to stop the run."""

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        """Called before a pass runs."""

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Called after a pass ran."""


class StopPipeline(Exception):
    """Raised by an instrument to end the run early, with the model as it is."""


class Pipeline:
    """A checked sequence of passes.

    Args:
        passes: Pass instances, onnx_ir passes, or names ("canonicalize", "my_pass.py:MyPass").
        options: options by pass name, for the passes given by name.
    """

    def __init__(
        self,
        passes: Sequence[Pass | ir.passes.PassBase | str],
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        options = dict(options or {})
        self.passes: list[Pass] = []
        for each in passes:
            if isinstance(each, str):
                made = registry.get("pass", each)
                self.passes.append(made(**options.pop(made.name, {})))
            else:
                self.passes.append(each if isinstance(each, Pass) else _Adopted(each))
        if options:
            names = [p.name for p in self.passes]
            raise errors.RecipeError(
                *(
                    errors.Diagnostic(
                        "error",
                        "QG305",
                        k,
                        "options for a pass that is not in the pipeline",
                        errors.nearest(k, names),
                    )
                    for k in options
                )
            )
        self.check()

    def check(self, given: Iterable[Fact] = ()) -> None:
        """Prove that each pass gets what it needs.

        Raises:
            errors.PipelineError: QG307 naming the pass, the missing fact, and what gives or broke it.
        """
        facts = set(given)
        broken_by: dict[Fact, str] = {}
        for index, each in enumerate(self.passes):
            for fact in sorted(each.needs - facts, key=lambda f: f.value):
                givers = [
                    n for n in registry.names("pass") if fact in registry.get("pass", n).gives
                ]
                cause = (
                    f"{broken_by[fact]} breaks it"
                    if fact in broken_by
                    else "nothing before it gives that"
                )
                raise errors.PipelineError(
                    errors.Diagnostic(
                        "error",
                        "QG307",
                        f"pass {index + 1} ({each.name})",
                        f"needs {fact.value!r}, but {cause}",
                        f"put {' or '.join(givers) or 'a pass that gives it'} before it",
                    )
                )
            facts -= each.breaks
            broken_by.update(dict.fromkeys(each.breaks, each.name))
            facts |= each.gives

    def run(
        self,
        model: ir.Model,
        ctx: Context,
        instruments: Sequence[Instrument] = (),
        *,
        start: int = 0,
    ) -> ir.Model:
        """Run all passes on `model`, in place; from number `start`, where the model has been through those before it.

        Raises:
            errors.QGraphError: whatever a pass or an instrument found.
        """
        try:
            for index, each in enumerate(self.passes[start:], start):
                ctx.progress(each.name, index / len(self.passes))
                for instrument in instruments:
                    instrument.before(each, model, ctx)
                changed = each.run(model, ctx)
                ctx.facts -= each.breaks
                ctx.facts |= each.gives
                for instrument in instruments:
                    instrument.after(each, model, ctx, changed)
        except StopPipeline:
            pass
        ctx.progress("done", 1.0)
        return model


class Timer(Instrument):
    """Seconds per pass, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = 0.0

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Stop the clock."""
        self.seconds[each.name] = (
            self.seconds.get(each.name, 0.0) + time.perf_counter() - self._started
        )


class Printer(Instrument):
    """Prints the model after the passes that are named (all for "*")."""

    def __init__(self, after: Sequence[str], write: Callable[[str], None]) -> None:
        self._names, self._write = after, write

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Print, if the pass is named."""
        from qgraph import printer

        if "*" in self._names or each.name in self._names:
            self._write(f"-- after {each.name} --\n{printer.text(model)}")


class Dumper(Instrument):
    """Saves the model after every pass as FOLDER/NN-pass.onnx, with its text beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Save the model as it is now."""
        from qgraph import files, printer

        self._count += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._count:02d}-{each.name}.onnx"
        files.save(model, path, force=True)
        path.with_suffix(".txt").write_text(printer.text(model), encoding="utf-8")


class StopAfter(Instrument):
    """Ends the run after the named pass."""

    def __init__(self, name: str) -> None:
        self._name = name

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Stop, if this was the pass."""
        if each.name == self._name:
            raise StopPipeline
