"""The searches: `bad_pass` and `bad_weights`.

`bad_pass` runs the pipeline once and checks the model after every pass that changed it.

`bad_weights` runs it again and again with some weights kept float. With F(S) = "the check fails with exactly the
weights S quantized" and F monotone, the loop

    S = ∅;  while not F(S):  S += the last weight of the shortest prefix P of the others with F(S ∪ P)

ends with a set of which no weight can be left out, after O(|S| log n) runs, each prefix found by bisection. The
weights stand in order of their own error, worst first, so that S is made of bad ones. Where F is not monotone, S
still fails, but may not be minimal. Reference: QuickXplain (Junker 2004), insertion based.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import errors, files, registry
from qgraph import recipe as recipes
from qgraph.bisect.checks import Check, Outcome
from qgraph.pipeline import Context, Fact, Instrument, Pass, Pipeline, StopPipeline

MOST_WEIGHTS = 8  # more of them together: the error is spread, and no set explains it


@dataclass(frozen=True, slots=True)
class Trial:
    """One model that was judged: `what` it was, and the outcome."""

    what: str
    ok: bool
    detail: str


@dataclass
class Found:
    """What a bisection found.

    Attributes:
        check: what should hold.
        guilty: the pass, or the labels of the weights; empty where the check holds to the end.
        trials: everything that was judged, in order.
        is_spread: more than MOST_WEIGHTS weights fail together; `guilty` is only a part of them.
        remedy: what the check says with the guilty weights float and all others quantized.
        saved: files that were kept, by what they are.
    """

    check: str
    guilty: tuple[str, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    is_spread: bool = False
    remedy: Trial | None = None
    saved: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"found": bool(self.guilty), **asdict(self)}


def bad_pass(
    model: files.Source,
    recipe: recipes.Recipe,
    check: Check,
    *,
    keep: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Found:
    """The first pass after which a check fails, or that raises.

    Args:
        model: what to quantize.
        recipe: resolved, with the target.
        check: what should hold.
        keep: folder for the last good and the first bad model.
        progress: called with what is being judged.

    Raises:
        errors.InputError: QG710 where the check fails on the float model already.
    """
    work = files.load(model)
    with tempfile.TemporaryDirectory(prefix="qgraph-bisect-") as folder:
        judge = _Judge(check, Path(folder), Found(check.name), progress)
        _require_good(judge, work)
        watch = _Watch(judge)
        try:
            _run(work, recipe, [watch])
        except errors.QGraphError as e:
            judge.found.trials.append(Trial(f"pass {watch.current}", False, f"raises: {e}"))
            watch.guilty = watch.current
        if watch.guilty:
            judge.found.guilty = (watch.guilty,)
        if keep is not None:
            judge.keep(keep)
        return judge.found


def bad_weights(
    model: files.Source,
    recipe: recipes.Recipe,
    check: Check,
    *,
    keep: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Found:
    """A smallest set of weights whose quantization makes a check fail; arguments as `bad_pass`.

    Raises:
        errors.InputError: QG710 where the check fails on the float model already, QG711 where it fails with every
            weight kept float too.
        errors.QGraphError: what the pipeline raises.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-bisect-") as folder:
        judge = _Judge(check, Path(folder), Found(check.name), progress)
        _require_good(judge, files.load(model))
        subsets = _Subsets(model, recipe, judge)
        found = judge.found
        if not subsets.fail(None):
            return found
        if subsets.fail([]):
            message = f"fails with every weight kept float too: {subsets.trial([]).detail}"
            hint = "a pass is the cause: qgraph bisect without --weights finds it"
            raise errors.InputError(errors.Diagnostic("error", "QG711", check.name, message, hint))
        guilty, found.is_spread = _smallest(subsets.worst_first(), subsets.fail)
        found.guilty = tuple(subsets.labels[name] for name in guilty)
        if not found.is_spread:
            found.remedy = subsets.trial([n for n in subsets.labels if n not in guilty])
        if keep is not None:
            judge.keep(keep)
        return found


class _Subsets:
    """Quantizes some weights only, and remembers what the check said of each such model."""

    def __init__(self, model: files.Source, recipe: recipes.Recipe, judge: _Judge) -> None:
        self._model, self._recipe, self._judge = model, recipe, judge
        self._done: dict[frozenset[str], Trial] = {}
        self._own_sqnr: dict[str, float] = {}
        self.labels: dict[str, str] = {}

    def trial(self, names: Sequence[str] | None) -> Trial:
        """Judge the model with only these weights quantized (None: all, which must come first)."""
        key = frozenset(names or ())
        if names is None or key not in self._done:
            work = files.load(self._model)
            chosen = _Only(names, self.labels)
            ctx = _run(work, self._recipe, [chosen])
            for name in chosen.quantized:
                sqnr = ctx.records.get(name, {}).get("sqnr_db", math.inf)
                self._own_sqnr.setdefault(name, sqnr)
            self._judge(work, chosen.what())
            key = frozenset(chosen.quantized)
            self._done[key] = self._judge.found.trials[-1]
        return self._done[key]

    def fail(self, names: Sequence[str] | None) -> bool:
        """Whether the check fails with only these weights quantized."""
        return not self.trial(names).ok

    def worst_first(self) -> list[str]:
        """All weights that the recipe quantizes, in order of their own error."""
        return sorted(self.labels, key=lambda name: self._own_sqnr[name])


def _smallest(names: list[str], fails: Callable[[Sequence[str]], bool]) -> tuple[list[str], bool]:
    """The set S of the text at the top, and whether it was given up as too large."""
    chosen: list[str] = []
    while not fails(chosen):
        if len(chosen) == MOST_WEIGHTS:
            return chosen, True
        low, high = 0, len(names)  # with the first `high` of them it fails, with `low` it does not
        while high - low > 1:
            middle = (low + high) // 2
            if fails([*chosen, *names[:middle]]):
                high = middle
            else:
                low = middle
        if high == 0:  # F is not monotone
            break
        chosen.append(names[high - 1])
        names = names[: high - 1]
    return chosen, False


class _Judge:
    """Saves a model, checks it and writes down what came out."""

    def __init__(
        self,
        check: Check,
        folder: Path,
        found: Found,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self._check, self._folder, self.found = check, folder, found
        self._progress = progress or (lambda what, share: None)
        self._kept: dict[bool, Path] = {}

    def __call__(self, model: ir.Model, what: str) -> bool:
        self._progress(what, -1)
        path = self._folder / f"{len(self.found.trials)}.onnx"
        try:
            files.save(model, path, force=True)
            outcome = self._check(path)
        except Exception as e:
            if not _is_about_the_model(e):
                raise
            outcome = Outcome(False, str(e))
        self.found.trials.append(Trial(what, outcome.ok, outcome.detail))
        old = self._kept.get(outcome.ok)
        self._kept[outcome.ok] = path
        if old is not None:
            old.unlink(missing_ok=True)
            old.with_name(old.name + ".data").unlink(missing_ok=True)
        return outcome.ok

    def keep(self, folder: Path) -> None:
        """Copy the last good and the last bad model to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for is_good, path in self._kept.items():
            name = "good" if is_good else "bad"
            saved = files.save(files.load(path), folder / f"{name}.onnx", force=True)
            self.found.saved[name] = str(saved)


class _Watch(Instrument):
    """Judges the model after every pass and stops at the first bad one."""

    def __init__(self, judge: _Judge) -> None:
        self._judge = judge
        self.current = self.guilty = ""

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        self.current = each.name

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        what = f"after {each.name}"
        if not changed:
            self._judge.found.trials.append(Trial(what, True, "the model is unchanged"))
        elif not self._judge(model, what):
            self.guilty = each.name
            raise StopPipeline


class _Only(Instrument):
    """Lets only some weights be quantized: all others become float in the plan."""

    def __init__(self, names: Sequence[str] | None, labels: dict[str, str]) -> None:
        self._names, self._labels = names, labels
        self.quantized: list[str] = []

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        if Fact.PLAN not in each.gives:
            return
        for decision in ctx.plan.quantized():
            entry = ctx.records.get(decision.value, {}).get("entry")
            self._labels.setdefault(decision.value, getattr(entry, "label", decision.value))
            if self._names is None or decision.value in self._names:
                self.quantized.append(decision.value)
                continue
            kept = replace(decision, spec=None, forms=(), activation=None, code="QG314")
            ctx.plan.add(replace(kept, reason="kept float by bisect", by="bisect"))

    def what(self) -> str:
        """How the trial is called."""
        count = len(self.quantized)
        if self._names is None:
            return f"all {count} weights quantized"
        if count == 1:
            return f"only {self._labels[self.quantized[0]]} quantized"
        return f"{count} weights quantized" if count else "no weight quantized"


def _is_about_the_model(e: Exception) -> bool:
    """True for what qgraph raises on purpose, and for what ONNX Runtime raises."""
    return isinstance(e, errors.QGraphError) or type(e).__module__.startswith("onnxruntime")


def _require_good(judge: _Judge, model: ir.Model) -> None:
    if judge(model, "the float model"):
        return
    detail = judge.found.trials[-1].detail
    message = f"the float model fails the check already: {detail}"
    hint = "give data that it runs on, or another check"
    raise errors.InputError(errors.Diagnostic("error", "QG710", judge.found.check, message, hint))


def _run(model: ir.Model, recipe: recipes.Recipe, instruments: Sequence[Instrument]) -> Context:
    target = registry.get("target", recipe.target)
    pipeline = Pipeline(recipe.pipeline, {k: dict(v) for k, v in recipe.options.items()})
    ctx = Context(target, recipe, rng=np.random.default_rng(recipe.seed))
    pipeline.run(model, ctx, instruments)
    return ctx
