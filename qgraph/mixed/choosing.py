"""A format for every weight, by measured sensitivity, within budgets and floors.

    1  every weight is solved in every format; its error is weighed with the second moments of its inputs (costs)
    2  each item is quantized alone in two formats and the outputs are compared: losses by cost (losses)
    3  the knapsack is solved for the budget, and for others, which gives the front of size and loss (knapsack)
    4  the choice is measured, and changed where measuring says that this is better (swaps)
    5  it is written, and the budget lowered by what the file is too large or too slow, until it fits

What was chosen is an ordinary recipe with rules in front that say it: it makes the same file without measuring.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from qgraph import errors, files, workdir
from qgraph.accuracy.search import evenly
from qgraph.accuracy.trials import Trials
from qgraph.auto import speed
from qgraph.data import Dataset
from qgraph.evaluate.comparison import OutputError
from qgraph.floors import Floors
from qgraph.mixed import costs, items, knapsack, losses, mixtures, swaps, telling, times
from qgraph.mixed.items import Item, Option
from qgraph.mixed.telling import Choice
from qgraph.recipe import Recipe
from qgraph.spool import Spool
from qgraph.workdir import WorkDir

CHOOSING = "choosing"
"""Name of the part of a work folder where formats are weighed and mixtures measured."""
SAMPLES = 16  # on which mixtures are measured
_NEAR = 1e-4  # share of a budget that may be left over
_AIMS = 6  # knapsacks solved until the floors just hold
_TIGHTER = 0.9  # share of a floor that is aimed at once it was missed
_WRITTEN = 8  # files that may be written until one fits
_TIMED = 4  # files that may be timed until one is fast enough

T = TypeVar("T")


class BudgetMissed(errors.AccuracyError):
    """No mixture is within the budget."""


class Write(Protocol):
    """Writes the model under a recipe, solved the quick way, and lets somebody look at the file."""

    def __call__(self, recipe: Recipe, look: Callable[[Path], T]) -> T:
        """What was seen; the file is gone afterwards."""


class Chooser:
    """Chooses, and chooses again where the finished model misses a floor.

    It keeps a copy of the float model on disk for as long as it lives.

    Args:
        trials: the end of the pipeline.
        model: the float model.
        recipe: with choices and a budget.
        dataset: samples.
        floors: what must hold.
        write: see `Write`; asked only where the size or the time of the file is limited.
        max_seconds: when to stop measuring; what was found by then is taken.
        progress: called with what is being done and the share done.
        kept: folder of finished work, or None: an interrupted choice goes on from it.
    """

    def __init__(
        self,
        trials: Trials,
        model: files.Source,
        recipe: Recipe,
        dataset: Dataset,
        floors: Floors,
        write: Write,
        *,
        max_seconds: float,
        progress: Callable[[str, float], None] = lambda what, share: None,
        kept: WorkDir | None = None,
    ) -> None:
        self._trials, self._model, self._recipe = trials, model, recipe
        self._dataset, self._floors = dataset, floors
        self._write, self._progress, self._kept = write, progress, kept
        self._ends = time.monotonic() + max_seconds
        self._budget = recipe.budget
        self._has_goal = self._budget.is_set or floors.is_set
        self._items: list[Item] = []
        self._swaps: swaps.Swaps | None = None
        self._measure = "kl"
        self._most_seconds = float("inf")  # of the items' kernels
        self._timing: dict[str, float] = {}
        self._is_kl = floors.max_kl is not None and str(floors).count("--") == 1
        self._limit = self._aim = float(floors.max_kl or 0.0) if self._is_kl else 1.0

    def choose(self) -> Choice:
        """Measure and choose.

        Raises:
            BudgetMissed: QG331 where even the smallest or fastest formats do not do.
            errors.RuntimeFailure: ONNX Runtime refused a model.
        """
        self._items = items.find(self._trials, self._recipe)
        if not self._items:
            return Choice(telling.pinned(self._recipe, [], []))
        if self._budget.max_latency:
            self._time()
        ctx = self._trials.context
        self._folder = tempfile.TemporaryDirectory(prefix="qgraph-mixed-")  # gone with the chooser
        folder = Path(self._folder.name)
        found = [w for item in self._items for w in item.weights]
        work = self._work()
        samples = evenly(self._dataset, min(SAMPLES, len(self._dataset)))
        self._mixtures = mixtures.Mixtures(
            self._trials.model,
            found,
            samples,
            self._floors.logits,
            folder,
            ctx.threads,
            self._judge,
            work,
        )
        if self._floors.is_set and not self._is_kl:
            self._measure = "floors"
        elif not self._mixtures.has_predictions:
            self._measure = "noise"
        spool = Spool(folder)
        solved = costs.solve(self._trials.model, self._items, self._dataset, ctx, spool, work)
        self._mixtures.know(solved)
        losses.measure(self._items, self._mixtures, self._progress, self._is_over)
        for item in self._items:
            item.options = _worth_having(item.options)
        if self._floors.is_set and not self._budget.is_set:
            return self._choice(self._least_bytes())
        return self._choice(self._least_loss())

    def again(self, outputs: Sequence[OutputError]) -> Choice | None:
        """Another choice, because the finished model missed a floor; None where a budget leaves no more bytes."""
        if not self._items:
            self.choose()  # the choice was known from interrupted work
        if self._budget.is_set or not self._items:
            return None
        self._aim *= min(self._limit / self._judge(outputs), 1.0)
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
            raise BudgetMissed(self._missed(f"--max-size {nbytes}", f"a file of {nbytes} bytes"))

    def problem(self) -> errors.Diagnostic:
        """What could be reached, where a floor cannot be held."""

        def text(value: float) -> str:
            return telling.loss_text(self._measure, value)

        hint = "lower the floor, or add wider formats to the choices"
        reached = "no weight has a choice"
        if self._items:
            within = str(self._budget) or "all choices"
            reached = f"the best mixture within {within} has {text(self._loss(self._chosen))}"
            held = [p for p in self._front if p["measured"] <= self._limit]
            if held and self._budget.is_set:
                least = min(held, key=lambda p: p["bytes"])
                more = least["bytes"] - items.total(self._items, self._chosen)
                hint = (
                    f"about {least['avg_bits']:.2f} bits per weight ({more} bytes more) would do: "
                )
                hint += text(least["measured"])
        return errors.Diagnostic(
            "error", "QG332", str(self._floors), f"cannot be held: {reached}", hint
        )

    def _work(self) -> WorkDir | None:
        """Where weighed formats and measurements are kept."""
        if self._kept is None:
            return None
        self._progress("reading the weights", -1)
        work = self._kept.part(CHOOSING)
        work.require({"weights": workdir.digest(self._trials.model)}, workdir.REPLANNED)
        return work

    def _judge(self, outputs: Sequence[OutputError]) -> float:
        """What counts: the floors in units of what they allow, otherwise `mixtures.loss`."""
        if self._floors.is_set and not self._is_kl:
            return min(self._floors.damage(outputs), mixtures.WORST)
        return mixtures.loss(outputs)

    def _is_over(self) -> bool:
        return time.monotonic() > self._ends

    def _least_loss(self) -> list[int]:
        """The least loss within the budget.

        Raises:
            BudgetMissed: QG331.
        """
        most = self._allowed_bytes()
        chosen = self._fitting(most)
        if not self._budget.max_latency:
            return chosen
        for _ in range(_TIMED):
            excess = self._slowness(chosen)
            if excess <= 1:
                return chosen
            self._most_seconds /= excess
            if self._within(most) == self._fastest() and chosen == self._fastest():
                break
            chosen = self._fitting(most)
        ratio = self._timing["ratio"]
        raise BudgetMissed(
            self._missed(f"--max-latency {ratio:.2f}x", f"{ratio:.2f} of the float model's time")
        )

    def _fitting(self, most: float) -> list[int]:
        """The least loss in so many bytes, and in a file that is not too large."""
        if not self._budget.max_bytes:
            return self._improved(most)
        # Alignment and names make files differ from sums of bytes: the largest that fits is found by writing.
        best = self._smallest()
        low, high, probe = float(items.total(self._items, best)), most, most
        for _ in range(_WRITTEN):
            chosen = self._within(probe)
            excess = self._excess(chosen)
            if excess <= 0:
                best, low = chosen, probe
            else:
                high = probe
            if high - low < _NEAR * most:
                break
            middle = (low + high) / 2
            probe = max(probe - excess, middle) if excess > 0 else middle
        better = self._improved(low)
        return better if better == best or self._excess(better) <= 0 else best

    def _allowed_bytes(self) -> float:
        """Bytes that all items may take together.

        Raises:
            BudgetMissed: QG331 where the smallest formats take more.
        """
        smallest = self._smallest()
        held = items.total(self._items, smallest)
        if not self._has_goal:
            return float(max(held, sum(item.usual for item in self._items)))
        most = float("inf")
        if self._budget.avg_bits:
            most = self._budget.avg_bits * sum(item.elements for item in self._items) / 8
            if held > most:
                bits = telling.average_bits(self._items, smallest)
                raise BudgetMissed(
                    self._missed(f"--avg-bits {bits:.2f}", f"{bits:.2f} bits per weight")
                )
        excess = self._excess(smallest)
        self.require_size(self._budget.max_bytes + excess)
        return min(most, held - excess) if self._budget.max_bytes else most

    def _missed(self, option: str, what: str) -> errors.Diagnostic:
        text = f"cannot be met: the best that its choices give is {what}"
        hint = f"ask for {option} at least, or add other formats to the choices of the rules"
        return errors.Diagnostic("error", "QG331", str(self._budget), text, hint)

    def _excess(self, chosen: Sequence[int]) -> int:
        """Bytes by which the written file is above the budget; negative where there is room."""
        if not self._budget.max_bytes:
            return 0
        self._progress("measuring the file", -1)
        recipe = telling.pinned(self._recipe, self._items, chosen)
        return self._write(recipe, files.file_bytes) - self._budget.max_bytes

    def _time(self) -> None:
        """How long the kernels of each option take, and how long all of them may."""
        self._progress("timing kernels", -1)
        feeds = speed.typical(self._dataset)

        def written(choice: str, look: times.Look) -> Mapping[str, float]:
            recipe = items.asking_for(self._recipe, choice)
            return self._write(recipe.model_copy(update={"budget": type(self._budget)()}), look)

        rest = times.measure(self._items, written, feeds)
        floats = sum(times.profile(self._model, feeds).values())
        limit = self._budget.latency
        self._most_seconds = (limit.ratio * floats if limit.ratio else limit.seconds) - rest
        self._timing = {"float_seconds": floats, "other_seconds": rest}

    def _slowness(self, chosen: Sequence[int]) -> float:
        """Time of the written model over what is allowed, measured by turns with the float model."""
        recipe = telling.pinned(self._recipe, self._items, chosen)
        feeds, limit = speed.typical(self._dataset), self._budget.latency
        found = self._write(recipe, lambda path: times.ratio(self._model, path, feeds))
        self._timing |= {"ratio": found.ratio, "seconds": found.seconds}
        return found.ratio / limit.ratio if limit.ratio else found.seconds / limit.seconds

    def _within(self, most: float) -> list[int]:
        """The least predicted loss in so many bytes."""
        values = [[o.loss for o in item.options] for item in self._items]
        best = knapsack.solve(values, self._limits(most))
        if best is None:
            return self._fastest() if self._budget.max_latency else self._smallest()
        return best

    def _limits(self, most: float) -> list[knapsack.Limit]:
        limits = [knapsack.Limit([[float(o.nbytes) for o in i.options] for i in self._items], most)]
        if self._budget.max_latency:
            seconds = [[o.seconds for o in item.options] for item in self._items]
            limits.append(knapsack.Limit(seconds, self._most_seconds))
        return limits

    def _improved(self, most: float) -> list[int]:
        """The least loss in so many bytes, and what measuring makes of it."""
        self._progress("exchanging formats", -1)
        found = swaps.improve(
            self._items,
            self._within(most),
            self._mixtures,
            lambda values, chosen, moves: knapsack.solve(
                values, [*self._limits(most), knapsack.moves(values, chosen, moves)]
            ),
            self._is_over,
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
            is_less = items.total(self._items, chosen) < items.total(self._items, best)
            if measured <= self._aim and is_less:
                best = chosen
            aim *= min(max(self._aim / max(measured, 1e-12), 0.1), 10.0)
        return best

    def _choice(self, chosen: list[int]) -> Choice:
        self._chosen = chosen
        self._front = telling.front(self._items, chosen, self._mixtures, self._progress)
        figures = telling.figures(self._items, chosen, self._swaps) | {
            "budget": str(self._budget),
            "floors": str(self._floors),
            "measure": self._measure,
            "samples": min(SAMPLES, len(self._dataset)),
            "measured": self._loss(chosen),
            "measurements": self._mixtures.measured,
            "front": self._front,
            "timing": self._timing,
        }
        notes = []
        if not self._has_goal:
            notes.append(
                "no budget was given: the mixture takes as many bytes as without a choice of formats"
            )
        recipe = telling.pinned(self._recipe, self._items, chosen)
        return Choice(recipe, telling.lines(self._items, chosen, self._measure), figures, notes)

    def _loss(self, chosen: Sequence[int]) -> float:
        return self._mixtures.loss(losses.mixture(self._items, chosen))

    def _smallest(self) -> list[int]:
        return [0] * len(self._items)

    def _fastest(self) -> list[int]:
        return [
            min(range(len(i.options)), key=lambda o, i=i: i.options[o].seconds)  # type: ignore[misc]
            for i in self._items
        ]


def _worth_having(options: Sequence[Option]) -> list[Option]:
    """Without those that another one beats or equals in bytes, loss and time."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss, o.seconds)):
        if not any(k.loss <= option.loss and k.seconds <= option.seconds for k in kept):
            kept.append(option)
    return kept
