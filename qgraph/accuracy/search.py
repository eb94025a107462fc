"""Which weights go back to more bits or to float so that the accuracy floors hold: the fewest that suffice.

    1  each quantized weight is quantized alone, and the damage at the model's outputs is measured on a few samples
    2  the weights are put in order of damage per share of multiplications and bytes that quantizing them saves
    3  the first k of the order climb one rung (`qgraph.accuracy.rungs`); the smallest k for which the floors hold on
       all samples is found by bisection
    4  where even all of them on that rung do not suffice, 1 to 3 are repeated one rung higher

Measurements: one of a few samples per weight and rung, and about log2(weights) + 2 of all samples. The clock decides
nothing but when to stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from qgraph import errors, files
from qgraph.accuracy import rungs
from qgraph.accuracy.rungs import Rung
from qgraph.accuracy.trials import Trials
from qgraph.data import Dataset, Feeds
from qgraph.evaluate.comparison import Comparison, OutputError
from qgraph.evaluate.reference import Reference
from qgraph.floors import Floors
from qgraph.pipeline import Context
from qgraph.recipe import Recipe, Rule

if TYPE_CHECKING:
    from qgraph.target import Target

FEW = 8  # samples on which single weights are measured
SHARE_OF_ORDERING = 0.5  # of the time that is left, at most, goes into single weights


@dataclass(slots=True)
class Unit:
    """One quantized weight with all its uses.

    Attributes:
        weight: its name.
        label: a name that a person recognises.
        solver: of the decision.
        cost: share of the model's multiplications and saved bytes that quantizing it brings, 0..2.
        ladder: what it may have, by stage: 0 is what it has now.
        level: the stage that it has reached.
        damage: of quantizing it alone, in units of what the floors allow; None where it was not measured.
        measured: that damage for people.
        outputs: that damage as figures, by output.
    """

    weight: str
    label: str
    solver: str
    cost: float
    ladder: dict[int, Rung]
    level: int = 0
    damage: float | None = None
    measured: str = ""
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)

    def rung(self, level: int) -> Rung:
        """The highest rung up to a level."""
        return self.ladder[max(stage for stage in self.ladder if stage <= level)]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "weight": self.weight,
            "label": self.label,
            "from": self.ladder[0].name,
            "to": self.rung(self.level).name,
            "alone": self.outputs,
            "cost": self.cost,
        }


@dataclass(slots=True)
class Outcome:
    """What a search found.

    Attributes:
        recipe: the recipe with rules in front that pin what was given back; None where nothing sufficed.
        returned: the weights that were given something back, most damage per cost first.
        best: the outputs of the best model in which something is still quantized.
        measurements: how many models were measured on a few and on all samples.
        seconds: it took.
        timed_out: the time was over before the search was.
        why: one sentence on how it ended.
    """

    recipe: Recipe | None
    returned: list[Unit]
    best: tuple[OutputError, ...]
    measurements: dict[str, int]
    seconds: float
    timed_out: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report; without the clock's reading, so that it is reproducible."""
        return {
            "held": self.recipe is not None,
            "returned": [u.to_json() for u in self.returned],
            "measurements": self.measurements,
            "timed_out": self.timed_out,
            "why": self.why,
        }


class Search:
    """Finds what to give back.

    Args:
        trials: the end of the pipeline.
        floors: what must hold, with data that is a Dataset.
        model: the float model.
        recipe: the recipe that missed them.
        max_seconds: when to stop.
        progress: called with what is being done and the share done.
        clock: seconds; only to stop in time.
        to_float: whether weights may go back to float.
        purpose: what it is for, as reasons say; the floors where it is left out.
    """

    def __init__(
        self,
        trials: Trials,
        floors: Floors,
        model: files.Source,
        recipe: Recipe,
        max_seconds: float,
        progress: Callable[[str, float], None] = lambda what, share: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        to_float: bool = True,
        purpose: str = "",
    ) -> None:
        self._trials, self._floors, self._model, self._recipe = trials, floors, model, recipe
        self._progress, self._clock = progress, clock
        self._to_float, self._purpose = to_float, purpose or str(floors)
        self._started = clock()
        self._ends = self._started + max_seconds
        self._measurements = {"alone": 0, "whole": 0}
        self._units: list[Unit] = []

    def run(self, missed: Comparison, ctx: Context) -> Outcome:
        """Search.

        Args:
            missed: what the recipe reached.
            ctx: what its passes left behind.
        """
        with self._trials.sharing() as trials:
            self._trials = replace(trials, operators=ctx.operators)
            return self._run(missed, ctx)

    def _run(self, missed: Comparison, ctx: Context) -> Outcome:
        self._best = missed.outputs
        self._units = units(ctx, self._trials.context.target)
        if not self._to_float:
            for unit in self._units:
                unit.ladder = {s: r for s, r in unit.ladder.items() if r is not rungs.NOTHING}
        samples = evenly(self._floors.data, FEW)
        self._reference = Reference(self._model, samples, self._floors.logits)
        for level in sorted({stage for u in self._units for stage in u.ladder if stage}):
            climbing = [u for u in self._units if u.rung(level) is not u.rung(level - 1)]
            if not climbing:
                continue
            self._measure(climbing, level - 1)
            order = ordered(climbing)
            found, is_over = self._bisect(order, level)
            if found is not None:
                for unit in order[:found]:
                    unit.level = level
                if all(u.rung(u.level) is rungs.NOTHING for u in self._units):
                    why = "the floors hold only with all weights in float"
                    return self._outcome(None, why, timed_out=False)
                given = sum(bool(u.level) for u in self._units)
                why = f"{given} of {len(self._units)} quantized weights got something back"
                return self._outcome(self._pinned(final=True), why, timed_out=is_over)
            if is_over:
                why = "the time was over (raise --max-time)"
                return self._outcome(None, why, timed_out=True)
            for unit in climbing:
                unit.level = level
        return self._outcome(None, "nothing is quantized that could be given back", timed_out=False)

    def _outcome(self, recipe: Recipe | None, why: str, *, timed_out: bool) -> Outcome:
        returned = [u for u in ordered(self._units) if u.level]
        seconds = self._clock() - self._started
        return Outcome(recipe, returned, self._best, self._measurements, seconds, timed_out, why)

    def _measure(self, climbing: Sequence[Unit], level: int) -> None:
        """Quantize each weight alone. Those with the most bytes of error come first, should the time not suffice."""
        until = self._clock() + (self._ends - self._clock()) * SHARE_OF_ORDERING
        for index, unit in enumerate(climbing):
            unit.damage, unit.measured, unit.outputs = None, "", {}
            if self._clock() > until:
                continue
            self._progress(f"measuring {unit.label} alone", index / len(climbing))
            alone = unit.rung(level).rule(unit.weight, unit.solver, "")
            recipe = self._recipe.model_copy(update={"rules": (alone,)})
            with self._trials.written(recipe, inspect=False) as (path, _):
                outputs = self._reference.against(path)
            self._measurements["alone"] += 1
            unit.damage = self._floors.damage(outputs)
            unit.measured = f"{unit.rung(level).name} alone leaves {told(outputs)}"
            unit.outputs = figures(outputs)

    def _bisect(self, order: Sequence[Unit], level: int) -> tuple[int | None, bool]:
        """The smallest number of weights that must climb to a level, None where no number holds; and time is over."""
        low, high = 0, len(order)
        is_last = all(u.rung(level) is rungs.NOTHING for u in self._units)
        if not is_last:  # the float model holds every floor
            if self._clock() > self._ends:
                return None, True
            if not self._holds(order, high, level):
                return None, False
        probe = min(max(predicted(order), 1), high - 1)
        while high - low > 1:
            if self._clock() > self._ends:
                return (None if is_last and high == len(order) else high), True
            if self._holds(order, probe, level):
                high = probe
            else:
                low = probe
            probe = (low + high) // 2
        return high, False

    def _holds(self, order: Sequence[Unit], count: int, level: int) -> bool:
        before = [u.level for u in order]
        for unit in order[:count]:
            unit.level = level
        try:
            recipe = self._pinned(final=False)
        finally:
            for unit, old in zip(order, before, strict=True):
                unit.level = old
        self._progress(f"measuring with {count} of {len(order)} given back", -1)
        with self._trials.written(recipe, inspect=self._trials.context.inspect) as (path, _):
            found = self._reference.over(self._floors.data, path)
        self._measurements["whole"] += 1
        if self._floors.damage(found) < self._floors.damage(self._best):
            self._best = found
        return not self._floors.problems(found)

    def _pinned(self, *, final: bool) -> Recipe:
        """The recipe with a rule in front for every weight that was given something back."""
        pins = [self._pin(u, final=final) for u in ordered(self._units) if u.level]
        return self._recipe.model_copy(update={"rules": (*pins, *self._recipe.rules)})

    def _pin(self, unit: Unit, *, final: bool) -> Rule:
        rung = unit.rung(unit.level)
        if not final:
            return rung.rule(unit.weight, unit.solver, "")
        alone = unit.measured or "its share was not measured, the time was over"
        reason = f"given back {rung.name}, for {self._purpose}: {alone}"
        return rung.rule(unit.weight, unit.solver, reason)


def units(ctx: Context, target: Target) -> list[Unit]:
    """Every quantized weight, in plan order."""
    decisions = [d for d in ctx.plan.quantized() if d.value in ctx.records]
    macs: dict[str, int] = {}
    for operator in ctx.operators.values():
        macs[operator.weight] = macs.get(operator.weight, 0) + operator.macs
    entries = {d.value: ctx.records[d.value]["entry"] for d in decisions}
    saved = {
        name: max(entry.float_bytes - int(ctx.records[name].get("stored_bytes", 0)), 0)
        for name, entry in entries.items()
    }
    all_macs = sum(macs.get(name, 0) for name in entries) or 1
    all_saved = sum(saved.values()) or 1
    return [
        Unit(
            d.value,
            entries[d.value].label,
            d.solver,
            macs.get(d.value, 0) / all_macs + saved[d.value] / all_saved,
            {0: rungs.of(d), **rungs.above(d, entries[d.value], target)},
        )
        for d in decisions
    ]


def ordered(found: Sequence[Unit]) -> list[Unit]:
    """Most damage per cost first; what was not measured comes last, in plan order."""

    def rank(item: tuple[int, Unit]) -> tuple[float, int]:
        index, unit = item
        worth = -math.inf if unit.damage is None else unit.damage / max(unit.cost, 1e-9)
        return -worth, index

    return [unit for _, unit in sorted(enumerate(found), key=rank)]


def predicted(order: Sequence[Unit]) -> int:
    """How many must climb if the damages of the others add up to what is allowed."""
    left = math.fsum(u.damage or 0.0 for u in order if math.isfinite(u.damage or 0.0))
    for index, unit in enumerate(order):
        if left <= 1.0 and math.isfinite(unit.damage or 0.0):
            return index
        left -= unit.damage or 0.0 if math.isfinite(unit.damage or 0.0) else 0.0
    return len(order)


def evenly(dataset: Dataset, count: int) -> list[Feeds]:
    """So many samples, evenly spaced over all of them."""
    chosen = {len(dataset) * i // count for i in range(count)}
    return [feeds for i, feeds in enumerate(islice(dataset, len(dataset))) if i in chosen]


def figures(outputs: Sequence[OutputError]) -> dict[str, dict[str, float]]:
    """SQNR, KL divergence and agreement of outputs as plain numbers."""
    found: dict[str, dict[str, float]] = {}
    for each in outputs:
        line = found.setdefault(each.name, {})
        if each.error is not None:
            line["sqnr_db"] = each.error.sqnr_db
        if each.divergence is not None:
            line["kl"] = each.divergence.kl_mean.value
            line["agreement"] = each.divergence.agreement.value
    return found


def told(outputs: Sequence[OutputError]) -> str:
    """The worst of outputs for people."""
    parts = []
    noise = [o.error.sqnr_db for o in outputs if o.error is not None]
    if noise:
        worst = min(noise)
        parts.append("the outputs exact" if worst == math.inf else f"{worst:.1f} dB")
    judged = [o.divergence for o in outputs if o.divergence is not None]
    if judged:
        kl = max(d.kl_mean.value for d in judged)
        parts.append(f"KL {kl:.2g}")
    return ", ".join(parts)


def problem(outcome: Outcome, floors: Floors, total: int) -> errors.Diagnostic:
    """Why nothing sufficed, and what could be done."""
    reached = told(outcome.best)
    shares = [o.divergence.agreement.value for o in outcome.best if o.divergence]
    if shares:
        reached += f", agreement {min(shares):.2%}"
    given = f"{outcome.measurements['whole']} mixtures of {total} weights were measured"
    text = f"cannot be held: {outcome.why}; the best with anything quantized is {reached}; {given}"
    hint = "lower the floor, choose a milder recipe (int8-weights), or look at the outputs: is one a sentinel?"
    if outcome.timed_out:
        hint = "raise --max-time; " + hint
    return errors.Diagnostic("error", "QG704", str(floors), text, hint)
