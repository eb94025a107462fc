"""A choice made better by measuring what one notch of each item does among the others.

    1  each item goes a notch up and a notch down, all others staying as they are: that scales its losses anew
    2  the knapsack is solved with them, at first for any number of items that change, then for half as many, and so on
    3  the first result that measures better is taken, and all is repeated around it

Losses do not add up, so what is best for the steps one by one need not be so for all at once: fewer changes are nearer
to what was measured. One half of the samples says what to try, the other whether to take it, and they take turns:
otherwise what merely suits a few samples would be taken. Nothing is taken that measures worse on both together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qgraph.mixed import losses
from qgraph.mixed.items import Item
from qgraph.mixed.mixtures import Mixtures

ROUNDS = 4
_NOTCH = 0.7  # a notch changes the loss to that share of it at least
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 20.0
Solve = Callable[[Sequence[Sequence[float]], Sequence[int], int], "list[int] | None"]
"""The knapsack for other losses, at most so many items being other than in a choice; None where there is nothing."""


@dataclass
class Swaps:
    """What was tried and taken.

    Attributes:
        chosen: the choice.
        halves: its losses on the halves of the samples.
        tried: mixtures that might have been taken.
        taken: how many of them were.
        notes: one line for each that was taken.
    """

    chosen: list[int]
    halves: tuple[float, float]
    tried: int = 0
    taken: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """On all samples."""
        return sum(self.halves) / 2


def improve(
    items: Sequence[Item],
    start: Sequence[int],
    mixtures: Mixtures,
    solve: Solve,
    is_over: Callable[[], bool],
) -> Swaps:
    """Make a choice better.

    Args:
        items: with losses.
        start: the choice.
        mixtures: measure.
        solve: see `Solve`; it keeps to the budget.
        is_over: whether there is no time left.
    """

    def measured(chosen: Sequence[int]) -> tuple[float, float]:
        return mixtures.halves(losses.mixture(items, chosen))

    mixtures.stay_near(losses.mixture(items, start))
    best = Swaps(list(start), measured(start))
    in_vain = 0
    for turn in range(ROUNDS):
        if is_over():
            break
        mixtures.stay_near(losses.mixture(items, best.chosen))
        steps = _steps(items, best, measured, turn % 2, is_over)
        if is_over():
            break
        is_better = _move(items, best, _rescaled(items, best.chosen, steps), measured, solve, turn)
        in_vain = 0 if is_better else in_vain + 1
        if in_vain == 2:
            break
    return best


def _move(
    items: Sequence[Item],
    best: Swaps,
    values: Sequence[Sequence[float]],
    measured: Callable[[Sequence[int]], tuple[float, float]],
    solve: Solve,
    turn: int,
) -> bool:
    """Take what the knapsack finds, with fewer and fewer changes until it measures better; whether anything was."""
    most = len(items)
    judge = 1 - turn % 2
    while most:
        other = solve(values, best.chosen, most)
        moved = [i for i, c in enumerate(other or best.chosen) if c != best.chosen[i]]
        if other is None or not moved or sum(values[i][other[i]] for i in moved) >= 0:
            return False
        best.tried += 1
        found = measured(other)
        if found[judge] < best.halves[judge] and sum(found) < sum(best.halves):
            before = best.loss
            best.chosen, best.halves, best.taken = other, found, best.taken + 1
            names = items[moved[0]].label if len(moved) == 1 else f"{len(moved)} formats"
            best.notes.append(f"{names} changed: {before:.3g} -> {best.loss:.3g}")
            return True
        most = min(most, len(moved)) // 2
    return False


def _steps(
    items: Sequence[Item],
    best: Swaps,
    measured: Callable[[Sequence[int]], tuple[float, float]],
    half: int,
    is_over: Callable[[], bool],
) -> dict[tuple[int, int], float]:
    """What each item's notch up (+1) and down (-1) changes on a half of the samples, by the option that it is."""
    found: dict[tuple[int, int], float] = {}
    for place, item in enumerate(items):
        for to in _notches(item, best.chosen[place]):
            if is_over():
                return found
            other = [*best.chosen[:place], to, *best.chosen[place + 1 :]]
            found[place, to] = measured(other)[half] - best.halves[half]
    return found


def _notches(item: Item, now: int) -> list[int]:
    """The next options, up and down, whose loss is much another; the last ones where none is."""
    options = item.options
    loss = options[now].loss
    ups = list(range(now + 1, len(options)))
    downs = list(range(now - 1, -1, -1))
    up = next((i for i in ups if options[i].loss <= loss * _NOTCH), ups[-1]) if ups else -1
    down = next((i for i in downs if options[i].loss * _NOTCH >= loss), downs[-1]) if downs else -1
    return [i for i in (up, down) if i >= 0]


def _rescaled(
    items: Sequence[Item], chosen: Sequence[int], steps: dict[tuple[int, int], float]
) -> list[list[float]]:
    """Losses relative to the choice: those of an item's options scaled like the notch on their side."""
    found = []
    for place, item in enumerate(items):
        now = item.options[chosen[place]].loss
        factors = {False: 1.0, True: 1.0}
        for to, step in ((to, s) for (p, to), s in steps.items() if p == place):
            change = item.options[to].loss - now
            factor = step / change if change else 1.0
            factors[to > chosen[place]] = min(max(factor, _LEAST_FACTOR), _MOST_FACTOR)
        values = [factors[i > chosen[place]] * (o.loss - now) for i, o in enumerate(item.options)]
        found.append(values)
    return found
