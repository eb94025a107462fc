"""Find what breaks a model: the first pass after which a check fails, or the smallest set of weights.

    check = Accuracy("model.onnx", feeds, min_sqnr=10)
    found = bad_pass("model.onnx", "int4", check)
    found = bad_weights("model.onnx", "int4", check)

`bad_pass` runs the pipeline once and checks the model after every pass that changed it.

`bad_weights` runs it again and again with some weights kept float. With F(S) = "the check fails with exactly the
weights S quantized" and F monotone, the loop

    S = ∅;  while not F(S):  S += the last weight of the shortest prefix P of the others with F(S ∪ P)

ends with a set of which no weight can be left out, after O(|S| log n) runs, each prefix found by bisection. Where F
is not monotone, S still fails, but may not be minimal. Reference: QuickXplain (Junker 2004), insertion based.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qgraph import compiler, errors, evaluate, files, registry, runtime, verify
from qgraph import recipe as recipes
from qgraph.pipeline import Context, Fact, Instrument, Pass, Pipeline, StopPipeline

DEFAULT_SQNR = 10.0  # dB; below that an output has little to do with the float one
MOST_WEIGHTS = 12  # more of them together: the error is spread, and no set explains it


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check says of one model."""

    ok: bool
    detail: str


class Check(Protocol):
    """Judges the model in a file. `name` says what holds where it is ok."""

    name: str

    def __call__(self, path: Path) -> Outcome:
        """Judge one model; never raises for what is wrong with it."""


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


class Verifies:
    """The verifier finds no error."""

    name = "the verifier finds no error"

    def __call__(self, path: Path) -> Outcome:
        """Verify."""
        wrong = [d for d in verify.verify(ir.load(path)) if d.severity == "error"]
        return Outcome(not wrong, str(wrong[0]) if wrong else "no error")


class Loads:
    """ONNX Runtime loads it."""

    name = "ONNX Runtime loads the model"

    def __call__(self, path: Path) -> Outcome:
        """Open a session."""
        try:
            runtime.session(path, threads=1)
        except errors.RuntimeFailure as e:
            return Outcome(False, e.diagnostics[0].message)
        return Outcome(True, "loads")


class Runs:
    """ONNX Runtime runs it on given inputs."""

    name = "ONNX Runtime runs the model"

    def __init__(self, feeds: Iterable[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def __call__(self, path: Path) -> Outcome:
        """Run every feed."""
        loaded = Loads()(path)
        if not loaded.ok:
            return loaded
        session = runtime.session(path, threads=1)
        count = 0
        for feeds in self._feeds:
            try:
                session.run(None, dict(feeds))
            except Exception as e:  # noqa: BLE001 - the runtime's exceptions are not public
                return Outcome(False, f"loads, but does not run: {e}")
            count += 1
        return Outcome(True, f"runs on {count} inputs")


class Accuracy:
    """Its outputs are close to those of the float model."""

    def __init__(
        self,
        model: files.Source,
        feeds: Any,
        *,
        min_sqnr: float | None = None,
        max_kl: float | None = None,
    ) -> None:
        self._model, self._feeds = model, feeds
        self._floors = (min_sqnr, max_kl)
        self._runs = Runs(feeds)
        sqnr = f"SQNR is at least {min_sqnr:g} dB" if min_sqnr is not None else ""
        kl = f"KL divergence is at most {max_kl:g} nats" if max_kl is not None else ""
        self.name = f"the model runs, and its {' and '.join(filter(None, (sqnr, kl)))}"

    def __call__(self, path: Path) -> Outcome:
        """Compare with the float model."""
        ran = self._runs(path)
        if not ran.ok:
            return ran
        found = evaluate.compare(self._model, path, self._feeds, rounds=0)
        problems = compiler.floor_problems(found, *self._floors)
        parts = []
        for output in found.outputs:
            if output.error is not None:
                parts.append(f"{output.name} {output.error.sqnr_db:.1f} dB")
            if output.divergence is not None:
                parts.append(f"KL {output.divergence.kl_mean.value:.2g}")
        return Outcome(not problems, ", ".join(parts))


class Divergence:
    """A language model predicts as the float model does."""

    def __init__(self, model: files.Source, tokens: Any, context: int, *, max_kl: float) -> None:
        self._model, self._tokens, self._context = model, tokens, context
        self._max_kl = max_kl
        self.name = f"KL divergence on tokens is at most {max_kl:g} nats"

    def __call__(self, path: Path) -> Outcome:
        """Compare with the float model."""
        loaded = Loads()(path)
        if not loaded.ok:
            return loaded
        found = evaluate.divergence(self._model, path, self._tokens, self._context)
        mean = found.divergence.kl_mean.value
        return Outcome(mean <= self._max_kl, f"KL {mean:.2g} nats")


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
        errors.InputError: QG710 where the check fails on the float model already.
        errors.QGraphError: what the pipeline raises.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-bisect-") as folder:
        judge = _Judge(check, Path(folder), Found(check.name), progress)
        _require_good(judge, files.load(model))
        labels: dict[str, str] = {}
        done: dict[frozenset[str], bool] = {}

        def fails(names: Sequence[str] | None) -> bool:
            """Judge the model with only these weights quantized (None: all)."""
            key = frozenset(labels if names is None else names)
            if key not in done or names is None:
                work = files.load(model)
                chosen = _Only(names, labels)
                _run(work, recipe, [chosen])
                done[frozenset(chosen.quantized)] = not judge(work, chosen.what())
                key = frozenset(chosen.quantized)
            return done[key]

        if not fails(None):
            return judge.found
        guilty, judge.found.is_spread = _smallest(list(labels), fails)
        judge.found.guilty = tuple(labels[name] for name in guilty)
        if guilty and not judge.found.is_spread:
            fails([name for name in labels if name not in guilty])
            last = judge.found.trials[-1]
            judge.found.remedy = replace(last, what="without them: " + last.what)
        if keep is not None:
            judge.keep(keep)
        return judge.found


def _smallest(
    names: list[str], fails: Callable[[Sequence[str]], bool]
) -> tuple[list[str], bool]:
    """The set S of the text at the top, and whether it was given up as too large."""
    chosen: list[str] = []
    while not fails(chosen):
        if len(chosen) == MOST_WEIGHTS:
            return chosen, True
        low, high = 0, len(names)  # with the first `high` the check fails, with `low` it holds
        while high - low > 1:
            middle = (low + high) // 2
            if fails([*chosen, *names[:middle]]):
                high = middle
            else:
                low = middle
        if high == 0:
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
        except errors.QGraphError as e:
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


def _require_good(judge: _Judge, model: ir.Model) -> None:
    if judge(model, "the float model"):
        return
    detail = judge.found.trials[-1].detail
    message = f"the float model fails the check already: {detail}"
    hint = "give data that it runs on, or another check"
    raise errors.InputError(errors.Diagnostic("error", "QG710", judge.found.check, message, hint))


def _run(model: ir.Model, recipe: recipes.Recipe, instruments: Sequence[Instrument]) -> None:
    target = registry.get("target", recipe.target)
    pipeline = Pipeline(recipe.pipeline, {k: dict(v) for k, v in recipe.options.items()})
    ctx = Context(target, recipe, rng=np.random.default_rng(recipe.seed))
    pipeline.run(model, ctx, instruments)
