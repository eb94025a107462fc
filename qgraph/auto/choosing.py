"""Which form each class of operators gets, by latency and error measured on this machine.

    1  whole models in which every class has the same form (as far as it can) are timed by turns against the float
       model; the first of table, static, dynamic that is within 5 % of the fastest is where the choice starts
    2  class by class, largest share first: a model in which this class alone has another form is timed against the
       best one so far, and taken where it is more than 5 % faster; below that the order of the forms decides
    3  products on int8 activations must not cost much accuracy where the target has a form that keeps it: those that
       do most damage go back to it (`qgraph.accuracy`) until the outputs have 20 dB, or 3 dB less than with that form
    4  a model below 10 dB is broken: what does most damage goes back to float

Times of whole models, rather than of operators alone, count what a form costs around an operator: conversions, lost
fusions, other layouts. Where a person sets floors, these are held instead of 3 and 4.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from qgraph import data, files, macs
from qgraph.accuracy.search import FEW, Search, evenly
from qgraph.accuracy.trials import Trials
from qgraph.auto import classes as classing
from qgraph.auto import speed, timing
from qgraph.auto.classes import Class
from qgraph.data import Dataset
from qgraph.evaluate import sessions
from qgraph.evaluate.comparison import OutputError
from qgraph.evaluate.reference import Reference
from qgraph.floors import Floors
from qgraph.recipe import Recipe
from qgraph.target import Target

MARGIN = 1.05
"""A form gives way only to one that is faster by more than this."""
GOOD, SPARE, BROKEN = 20.0, 3.0, 10.0  # dB
MATTERS = 0.02  # share; smaller classes are left with the form of the start
HOPELESS = 1.25  # a form that makes the whole model slower by so much is not tried for single classes of products
HARDLY = 0.98  # tables are tried in float only where no whole model is faster than this
MEASURED = 6  # classes
JUDGED = 32  # samples on which accuracy is held
TIMED_UNDER = 1 << 30  # bytes of weights; several models are open at once


@dataclass
class Choice:
    """What was chosen.

    Attributes:
        recipe: an ordinary recipe that says it.
        told: for weights by name, the figures behind the choice, as the report prints them.
        figures: the same for the report's JSON.
    """

    recipe: Recipe
    told: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Variant:
    forms: dict[str, str]
    session: Any
    sqnr: float


def choose(
    trials: Trials,
    model: files.Source,
    recipe: Recipe,
    dataset: Dataset,
    *,
    is_accuracy_held: bool,
    max_seconds: float,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Choice:
    """Measure and choose.

    Args:
        trials: the end of the pipeline, with statistics.
        model: the float model.
        recipe: as `classes.calibrated` makes it.
        dataset: samples.
        is_accuracy_held: somebody else sees to accuracy (floors were given).
        max_seconds: when to stop measuring; what was found by then is taken.
        progress: called with what is being done and the share done.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refused a model.
    """
    ends = time.monotonic() + max_seconds
    target = trials.context.target
    counted = macs.count(trials.model, speed.typical(dataset))
    found = classing.find(trials.model, recipe, target, counted)
    if not found:
        return Choice(classing.recipe_of(recipe, found, {}))
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(trials.sharing())
        chooser = _Chooser(trials, model, recipe, dataset, found, stack, ends, progress)
        if not target.timed or files.weight_bytes(trials.model) > TIMED_UNDER:
            chosen = chooser.untimed(target)
        else:
            chosen = chooser.timed()
        result = Choice(classing.recipe_of(recipe, found, chosen.forms), *chooser.told(chosen))
        if not is_accuracy_held:
            result.recipe = chooser.repaired(result, chosen)
    return result


class _Chooser:
    def __init__(
        self,
        trials: Trials,
        model: files.Source,
        recipe: Recipe,
        dataset: Dataset,
        found: Sequence[Class],
        stack: contextlib.ExitStack,
        ends: float,
        progress: Callable[[str, float], None],
    ) -> None:
        self._trials, self._model, self._recipe = trials, model, recipe
        self._dataset, self._classes, self._stack, self._ends = dataset, found, stack, ends
        self._progress = progress
        self._reference = Reference(model, evenly(dataset, FEW))
        self._feeds = speed.typical(dataset)
        self._uniform: dict[str, dict[str, float]] = {}
        self._single: dict[str, dict[str, float]] = {}
        self._accuracy: dict[str, Any] = {}
        self._is_timed = False

    def timed(self) -> _Variant:
        """Steps 1 and 2."""
        self._is_timed = True
        self._progress("timing whole models", -1)
        uniform = {name: self._variant(self._all(name)) for name in self._wanted()}
        both: dict[str, Any] = {"float": sessions.open_session(self._model)}
        both.update({name: v.session for name, v in uniform.items()})
        times = timing.relative(both, self._feeds)
        self._uniform = {
            name: {"ratio": times[name].ratio, "sqnr_db": v.sqnr} for name, v in uniform.items()
        }
        fastest = min(times[name].ratio for name in uniform)
        best = next(v for n, v in uniform.items() if times[n].ratio <= fastest * MARGIN)
        for each in [c for c in self._classes if c.share >= MATTERS][:MEASURED]:
            if time.monotonic() > self._ends:
                break
            best = self._refined(each, best)
        return best

    def untimed(self, target: Target) -> _Variant:
        """Without a clock: convolutions get integer kernels, all else the target's own form."""
        forms = self._all("table")
        for each in self._classes:
            if "static" in each.forms and each.kind == "conv":
                forms[each.name] = "static"
        self._accuracy["untimed"] = (
            f"latency is not measured for target {target.name}"
            if not target.timed
            else "latency is not measured for models of that size"
        )
        return self._variant(forms)

    def _wanted(self) -> list[str]:
        known = {form for c in self._classes for form in c.forms}
        return [name for name in ("table", "static", "dynamic") if name in known | {"table"}]

    def _all(self, form: str) -> dict[str, str]:
        return {c.name: form if form in c.forms else c.forms[0] for c in self._classes}

    def _variant(self, forms: Mapping[str, str]) -> _Variant:
        recipe = classing.recipe_of(self._recipe, self._classes, forms)
        trial = self._trials.written(recipe, inspect=self._trials.context.inspect)
        path, ctx = self._stack.enter_context(trial)
        if ctx.operators and not self._trials.operators:  # counted once
            self._trials = replace(self._trials, operators=ctx.operators)
        session = sessions.open_session(path)
        return _Variant(dict(forms), session, worst(self._reference.judge(session)))

    def _refined(self, each: Class, best: _Variant) -> _Variant:
        """The best of a model and those in which this class has another form."""
        current = best.forms[each.name]
        others = {
            form: self._variant({**best.forms, each.name: form})
            for form in each.forms
            if form != current and self._is_worth_a_try(form, each, best)
        }
        if not others:
            return best
        self._progress(f"timing forms of {each.name}", -1)
        all_of_them = {current: best, **others}
        times = timing.relative({f: v.session for f, v in all_of_them.items()}, self._feeds)
        self._single[each.name] = {form: t.ratio for form, t in times.items()}
        fastest = min(t.ratio for t in times.values())
        if times[current].ratio <= fastest * MARGIN:
            return best
        form = next(f for f in each.forms if f in times and times[f].ratio <= fastest * MARGIN)
        return all_of_them[form]

    def _is_worth_a_try(self, form: str, each: Class, best: _Variant) -> bool:
        """Whether a class may become faster so: not where the form made the whole model much slower."""
        current = self._uniform.get(best.forms[each.name], {"ratio": 1.0})["ratio"]
        if each.kind == "embedding":
            return min(v["ratio"] for v in self._uniform.values()) > HARDLY
        if each.kind == "linear":
            return self._uniform.get(form, {"ratio": 1.0})["ratio"] < current * HOPELESS
        return True

    def repaired(self, choice: Choice, chosen: _Variant) -> Recipe:
        """Steps 3 and 4: the recipe with rules that give back what costs too much accuracy."""
        recipe, reached = choice.recipe, chosen.sqnr
        quick = {c.name for c in self._classes if c.kind == "linear"} & {
            name for name, form in chosen.forms.items() if form in ("static", "dynamic")
        }
        if quick:
            careful = self._variant({**chosen.forms, **dict.fromkeys(quick, "table")})
            floor = min(GOOD, careful.sqnr - SPARE)
            choice.figures["careful_sqnr_db"] = careful.sqnr
            if reached < floor:
                purpose = f"products must leave the outputs {floor:.1f} dB"
                recipe = self._search(choice, recipe, floor, False, purpose)
                reached = floor
        if reached < BROKEN:
            purpose = f"a model below {BROKEN:g} dB is broken"
            recipe = self._search(choice, recipe, BROKEN, True, purpose)
        return recipe

    def _search(
        self,
        choice: Choice,
        recipe: Recipe,
        floor: float,
        to_float: bool,
        purpose: str,
    ) -> Recipe:
        few = list(islice(self._dataset, JUDGED))
        floors = Floors(data.load(few, self._dataset.inputs), min_sqnr=floor)
        left = max(self._ends - time.monotonic(), 0.0)
        search = Search(
            self._trials, floors, self._model, recipe, left, self._progress,
            to_float=to_float, purpose=purpose,
        )  # fmt: skip
        with self._trials.written(recipe, inspect=self._trials.context.inspect) as (path, ctx):
            before = floors.measure(self._model, path)
        if not floors.problems(before.outputs):
            return recipe
        outcome = search.run(before, ctx)
        choice.figures.setdefault("given_back", []).append({**outcome.to_json(), "for": purpose})
        return outcome.recipe or recipe

    def told(self, chosen: _Variant) -> tuple[dict[str, str], dict[str, Any]]:
        """What was measured: a line for each weight, and figures."""
        lines: dict[str, str] = {}
        for each in self._classes:
            form = chosen.forms[each.name]
            known = self._single.get(each.name)
            if known:
                first = known[form]
                parts = [f"{name} {ratio / first:.2f}" for name, ratio in sorted(known.items())]
                text = f"{each.name} as a class, time of the whole model: {', '.join(parts)}"
            elif self._uniform:
                parts = [f"{n} {v['ratio']:.2f}" for n, v in self._uniform.items()]
                text = f"whole models against float: {', '.join(parts)}"
            else:
                text = str(self._accuracy["untimed"])
            lines.update(dict.fromkeys(each.weights, text))
        figures = {
            "clock": timing.clock_name() if self._is_timed else "",
            "uniform": self._uniform,
            "classes": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "weights": list(c.weights),
                    "form": chosen.forms[c.name],
                    "times": self._single.get(c.name, {}),
                }
                for c in self._classes
            ],
            "sqnr_db": chosen.sqnr,
            **self._accuracy,
        }
        return lines, figures


def worst(outputs: Sequence[OutputError]) -> float:
    """The lowest SQNR of the float outputs, dB; infinite where there is none."""
    return min((o.error.sqnr_db for o in outputs if o.error is not None), default=float("inf"))
