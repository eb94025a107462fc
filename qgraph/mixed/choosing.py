"""A format for every weight, by measured sensitivity, within budgets and floors.

    1  every weight is solved in every format; its error is weighed with the second moments of its inputs (costs)
    2  each item is quantized alone in two formats and the outputs are compared: losses by cost (losses)
    3  the knapsack is solved for the budget, and for others, which gives the front of size and loss (knapsack)
    4  the choice is measured, and changed where measuring says that this is better (swaps)
    5  it is written, and the budget lowered by what the file is too large, until it fits

What was chosen is an ordinary recipe with rules in front that say it: it makes the same file without measuring.
"""

from __future__ import annotations

import glob
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qgraph import errors
from qgraph.accuracy.search import evenly
from qgraph.accuracy.trials import Trials
from qgraph.budget import Budget
from qgraph.data import Dataset
from qgraph.evaluate.comparison import OutputError
from qgraph.floors import Floors
from qgraph.mixed import costs, items, knapsack, losses, mixtures, swaps
from qgraph.mixed.items import Item, Option
from qgraph.recipe import FLOAT, Recipe, Rule
from qgraph.spool import Spool

SAMPLES = 8  # on which mixtures are measured
POINTS = 9  # of the front
_WRITTEN = 8  # files that may be written until one fits
PAIRS = 64  # exchanges that may be tried
_NEAR = 1e-4  # share of a budget that may be left over
_AIMS = 6  # knapsacks solved until the floors just hold
_TIGHTER = 0.9  # share of a floor that is aimed at once it was missed
RULE = "mixed"


def is_mixed(recipe: Recipe) -> bool:
    """Whether a recipe leaves formats open."""
    return any(rule.choices for rule in recipe.rules)


def require_choices(recipe: Recipe) -> None:
    """Refuse a budget where a recipe has nothing to choose.

    Raises:
        errors.RecipeError: QG330.
    """
    if recipe.budget.is_set and not is_mixed(recipe):
        raise errors.RecipeError(
            errors.Diagnostic(
                "error", "QG330", f"{recipe.budget}",
                f"recipe {recipe.name!r} leaves no format open that a budget could choose",
                'use --recipe mixed, or give a rule choices = ["uint4.g32", "int8.g32", ...]',
            )
        )  # fmt: skip


def require_data(data: object) -> None:
    """Refuse to choose where nothing can be measured.

    Raises:
        errors.InputError: QG131.
    """
    if data is None:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG131", "mixed precision", "needs samples to measure which weights matter",
                "give --data (data=...)",
            )
        )  # fmt: skip


@dataclass
class Choice:
    """What was chosen.

    Attributes:
        recipe: an ordinary recipe that says it.
        told: for weights by name, the figures behind the choice, as the report prints them.
        figures: the same for the report's JSON.
        notes: sentences for the report.
    """

    recipe: Recipe
    told: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class BudgetMissed(errors.AccuracyError):
    """No mixture is within the budget, or none within it holds a floor."""


Write = Callable[[Recipe], int]
"""Writes the model under a recipe and returns the bytes of the file."""


class Chooser:
    """Chooses, and chooses again where the finished model misses a floor.

    Args:
        trials: the end of the pipeline.
        recipe: with choices and a budget.
        dataset: samples.
        floors: what must hold.
        write: see `Write`; asked only where there is a limit on the size of the file.
        max_seconds: when to stop improving by measuring.
        progress: called with what is being done and the share done.

    It keeps a copy of the float model on disk for as long as it lives.
    """

    def __init__(
        self,
        trials: Trials,
        recipe: Recipe,
        dataset: Dataset,
        floors: Floors,
        write: Write,
        *,
        max_seconds: float,
        progress: Callable[[str, float], None] = lambda what, share: None,
    ) -> None:
        self._trials, self._recipe, self._dataset, self._floors = trials, recipe, dataset, floors
        self._write, self._progress = write, progress
        self._ends = time.monotonic() + max_seconds
        self._budget = recipe.budget
        self._has_goal = self._budget.is_set or floors.is_set
        self._items: list[Item] = []
        self._swaps: swaps.Swaps | None = None
        self._samples = 0
        self._measure = "kl"
        self._limit = self._aim = 1.0
        self._is_kl = str(floors) == f"--max-kl {floors.max_kl:g}" if floors.max_kl else False
        if self._is_kl and floors.max_kl:
            self._limit = self._aim = floors.max_kl

    def choose(self) -> Choice:
        """Measure and choose.

        Raises:
            BudgetMissed: QG331 where even the smallest formats are too large.
            errors.RuntimeFailure: ONNX Runtime refused a model.
        """
        self._items = items.find(self._trials, self._recipe)
        if not self._items:
            return Choice(self._pinned([]))
        ctx = self._trials.context
        self._folder = tempfile.TemporaryDirectory(prefix="qgraph-mixed-")  # gone with the chooser
        folder = Path(self._folder.name)
        found = [w for item in self._items for w in item.weights]
        samples = evenly(self._dataset, min(SAMPLES, len(self._dataset)))
        self._mixtures = mixtures.Mixtures(
            self._trials.model,
            found,
            samples,
            self._floors.logits,
            folder,
            ctx.threads,
            self._judge,
        )
        self._samples = len(samples)
        if self._floors.is_set and not self._is_kl:
            self._measure = "floors"
        elif not self._mixtures.has_predictions:
            self._measure = "noise"
        solved = costs.solve(self._trials.model, self._items, self._dataset, ctx, Spool(folder))
        self._mixtures.know(solved)
        losses.measure(self._items, self._mixtures, self._progress)
        for item in self._items:
            item.options = _worth_having(item.options)
        if self._floors.is_set and not self._budget.is_set:
            chosen = self._least_bytes()
        else:
            chosen = self._least_loss()
        return self._choice(chosen)

    def again(self, outputs: Sequence[OutputError]) -> Choice | None:
        """Another choice, because the finished model missed a floor; None where a budget leaves no more bytes."""
        if self._budget.is_set or not self._items:
            return None
        missed = self._judge(outputs)
        self._aim *= min(self._limit / missed, 1.0)
        for _ in range(_AIMS):
            self._aim *= _TIGHTER
            chosen = self._least_bytes()
            if chosen != self._chosen:
                return self._choice(chosen)
        return None

    def require_size(self, nbytes: int) -> None:
        """Refuse a file above the budget, whatever the reason.

        Raises:
            BudgetMissed: QG331.
        """
        most = self._budget.max_bytes
        if most and nbytes > most:
            raise BudgetMissed(self._too_small(f"--max-size {nbytes}", f"a file of {nbytes} bytes"))

    def problem(self) -> errors.Diagnostic:
        """What could be reached, where a floor cannot be held."""
        held = [p for p in self._front if p["measured"] <= self._limit]
        reached = f"the best mixture within {str(self._budget) or 'all choices'} has {self._told_loss(self._best)}"
        if held and self._budget.is_set:
            least = min(held, key=lambda p: p["bytes"])
            hint = (
                f"about {least['avg_bits']:.2f} bits per weight ({least['bytes']} bytes of weights, "
                f"{least['bytes'] - self._bytes(self._chosen)} more) would do: {self._told_loss(least['measured'])}"
            )
        else:
            hint = "lower the floor, or add wider formats to the choices"
        return errors.Diagnostic(
            "error", "QG332", str(self._floors), f"cannot be held: {reached}", hint
        )

    def _judge(self, outputs: Sequence[OutputError]) -> float:
        """What counts: the floors in units of what they allow, otherwise `mixtures.loss`."""
        if self._floors.is_set and not self._is_kl:
            return min(self._floors.damage(outputs), mixtures.WORST)
        return mixtures.loss(outputs)

    def _least_loss(self) -> list[int]:
        """The least loss within the budget."""
        most = self._allowed_bytes()
        if not self._budget.max_bytes:
            return self._improved(most)
        # Alignment and names make files differ from sums of bytes: the largest that fits is found by writing.
        best, low, high, probe = self._smallest(), float(self._bytes(self._smallest())), most, most
        for _ in range(_WRITTEN):
            chosen = self._within(probe)
            excess = self._excess(chosen)
            if excess <= 0:
                best, low = chosen, probe
            else:
                high = probe
            if high - low < _NEAR * most:
                break
            probe = max(probe - excess, (low + high) / 2) if excess > 0 else (low + high) / 2
        better = self._improved(low)
        return better if better == best or self._excess(better) <= 0 else best

    def _allowed_bytes(self) -> float:
        """Bytes that all items may take together.

        Raises:
            BudgetMissed: QG331 where the smallest formats take more.
        """
        smallest = self._smallest()
        held = self._bytes(smallest)
        most = float("inf")
        if not self._has_goal:
            return max(held, sum(item.usual for item in self._items))
        if self._budget.avg_bits:
            most = self._budget.avg_bits * self._elements / 8
            if held > most:
                bits = 8 * held / self._elements
                raise BudgetMissed(
                    self._too_small(f"--avg-bits {bits:.2f}", f"{bits:.2f} bits per weight")
                )
        excess = self._excess(smallest)
        if excess > 0:
            size = self._budget.max_bytes + excess
            raise BudgetMissed(self._too_small(f"--max-size {size}", f"a file of {size} bytes"))
        if self._budget.max_bytes:
            most = min(most, held - excess)
        return most

    def _too_small(self, option: str, what: str) -> errors.Diagnostic:
        text = f"cannot be met: the smallest formats of its choices give {what}"
        hint = f"ask for {option} at least, or add smaller formats to the choices of the rules"
        return errors.Diagnostic("error", "QG331", str(self._budget), text, hint)

    def _excess(self, chosen: Sequence[int]) -> int:
        """Bytes by which the written file is above the budget; negative where there is room."""
        if not self._budget.max_bytes:
            return 0
        self._progress("measuring the file", -1)
        return self._write(self._pinned(chosen)) - self._budget.max_bytes

    def _within(self, most: float, values: Sequence[Sequence[float]] | None = None) -> list[int]:
        """The least loss in so many bytes; of these losses or of those of the options."""
        sizes = [[float(o.nbytes) for o in item.options] for item in self._items]
        known = values or [[o.loss for o in item.options] for item in self._items]
        return knapsack.solve(known, [knapsack.Limit(sizes, most)]) or self._smallest()

    def _improved(self, most: float) -> list[int]:
        """The least loss in so many bytes, and what measuring makes of it."""
        self._progress("exchanging formats", -1)
        found = swaps.improve(
            self._items,
            self._within(most),
            self._mixtures,
            lambda values: self._within(most, values),
            lambda chosen: self._bytes(chosen) <= most,
            min(PAIRS, 2 * len(self._items)),
            lambda: time.monotonic() > self._ends,
        )
        self._swaps = found
        return found.chosen

    def _least_bytes(self) -> list[int]:
        """The fewest bytes with which the floors hold."""
        sizes = [[float(o.nbytes) for o in item.options] for item in self._items]
        values = [[o.loss for o in item.options] for item in self._items]
        best = [min(range(len(v)), key=v.__getitem__) for v in values]
        aim = self._aim
        for _ in range(_AIMS):
            chosen = knapsack.solve(sizes, [knapsack.Limit(values, aim)])
            if chosen is None:
                break
            measured = self._loss(chosen)
            if measured <= self._aim and self._bytes(chosen) < self._bytes(best):
                best = chosen
            aim *= min(max(self._aim / max(measured, 1e-12), 0.1), 10.0)
        return best

    def _choice(self, chosen: list[int]) -> Choice:
        self._chosen, self._best = chosen, self._loss(chosen)
        self._front = self._pareto(chosen)
        told = {}
        for item, index in zip(self._items, chosen, strict=True):
            option = item.options[index]
            text = f"mixed precision: alone it would cost {self._told_loss(option.loss)}"
            for other in item.options[max(index - 1, 0) : index + 2]:
                if other is not option:
                    text += f", as {other.choice} {self._told_loss(other.loss)}"
            told.update({w.name: text for w in item.weights})
        notes = []
        if not self._has_goal:
            notes.append(
                "no budget was given: the mixture takes as many bytes as without a choice of formats"
            )
        return Choice(self._pinned(chosen), told, self._figures(chosen), notes)

    def _figures(self, chosen: Sequence[int]) -> dict[str, Any]:
        return {
            "budget": str(self._budget),
            "floors": str(self._floors),
            "measure": self._measure,
            "samples": self._samples,
            "bytes": self._bytes(chosen),
            "avg_bits": 8 * self._bytes(chosen) / self._elements,
            "predicted": losses.predicted(self._items, chosen),
            "measured": self._best,
            "measurements": self._mixtures.measured,
            "swaps": {"tried": self._swaps.tried, "taken": self._swaps.taken, "notes": self._swaps.notes}
            if self._swaps
            else {},
            "front": self._front,
            "groups": [
                {
                    "weights": [w.name for w in item.weights],
                    "labels": [w.label for w in item.weights],
                    "elements": item.elements,
                    "format": item.options[index].choice,
                    "options": [
                        {"format": o.choice, "specs": list(o.specs), "bytes": o.nbytes, "cost": o.cost, "loss": o.loss}
                        for o in item.options
                    ],
                }
                for item, index in zip(self._items, chosen, strict=True)
            ],
        }  # fmt: skip

    def _pareto(self, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """The least predicted loss for budgets from the smallest to the largest; the chosen mixture is among them."""
        values = [[o.loss for o in item.options] for item in self._items]
        sizes = [[float(o.nbytes) for o in item.options] for item in self._items]
        low = sum(map(min, sizes))
        high = sum(max(_narrow(item.options)) for item in self._items)
        found = {tuple(chosen): True}
        for step in range(POINTS):
            # Even steps in the logarithm: below 4 bits little changes much.
            most = low * (high / low) ** (step / (POINTS - 1)) if low else high
            self._progress("measuring the front", step / POINTS)
            mixed = knapsack.solve(values, [knapsack.Limit(sizes, most * (1 + 1e-6))])
            if mixed is not None:
                found.setdefault(tuple(mixed), False)
        points = [
            {
                "bytes": self._bytes(mixed),
                "avg_bits": 8 * self._bytes(mixed) / self._elements,
                "predicted": losses.predicted(self._items, mixed),
                "measured": self._loss(mixed),
                "chosen": is_chosen,
            }
            for mixed, is_chosen in found.items()
        ]
        return sorted(points, key=lambda p: (p["bytes"], p["measured"]))

    def _pinned(self, chosen: Sequence[int]) -> Recipe:
        """The recipe with rules in front that say the choice."""
        names: dict[tuple[str, str, str], list[str]] = {}
        for item, index in zip(self._items, chosen, strict=bool(chosen)):
            option, rule = item.options[index], item.rule
            for weight, spec in zip(item.weights, option.specs, strict=True):
                key = spec, rule.activations if spec != FLOAT else FLOAT, rule.solver
                names.setdefault(key, []).append(glob.escape(weight.name))
        pins = [
            Rule(
                id=RULE, names=tuple(held), weights=(spec,), activations=activations, solver=solver,
                reason="mixed precision",
            )
            for (spec, activations, solver), held in names.items()
        ]  # fmt: skip
        rest = [r.model_copy(update={"choices": ()}) for r in self._recipe.rules]
        return self._recipe.model_copy(update={"rules": (*pins, *rest), "budget": Budget()})

    def _loss(self, chosen: Sequence[int]) -> float:
        return self._mixtures.loss(losses.mixture(self._items, chosen))

    def _bytes(self, chosen: Sequence[int]) -> int:
        return items.total(self._items, chosen)

    def _smallest(self) -> list[int]:
        return [0] * len(self._items)

    @property
    def _elements(self) -> int:
        return sum(item.elements for item in self._items)

    def _told_loss(self, value: float) -> str:
        if self._measure == "kl":
            return f"KL {value:.2g}"
        return (
            f"{value:.2g} of what the floors allow"
            if self._measure == "floors"
            else f"noise {value:.2g}"
        )


def _narrow(options: Sequence[Option]) -> list[int]:
    """Bytes of the options that quantize, of all where none does."""
    return [o.nbytes for o in options if o.choice != FLOAT] or [o.nbytes for o in options]


def _worth_having(options: Sequence[Option]) -> list[Option]:
    """Without those that another one beats in bytes and loss; a tie goes to fewer bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
