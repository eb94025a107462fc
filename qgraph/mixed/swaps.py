"""A choice made better by measuring: what one step of each item does among the others, and exchanges of two items.

    1  each item goes one option up and one down, all others staying as they are: that scales its losses anew
    2  the knapsack is solved with them; the result is taken where it measures better, and 1 is repeated
    3  pairs, one item up and another down, are tried most promising first, and taken where they measure better

Nothing is ever taken that measures worse or leaves the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qgraph.mixed import losses
from qgraph.mixed.items import Item
from qgraph.mixed.mixtures import Mixtures

ROUNDS = 3
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 20.0
Solve = Callable[[Sequence[Sequence[float]]], "list[int] | None"]
Allowed = Callable[[Sequence[int]], bool]


@dataclass
class Swaps:
    """What was tried and taken.

    Attributes:
        chosen: the choice.
        loss: measured.
        tried: mixtures that might have been taken.
        taken: how many of them were.
        notes: one line for each that was taken.
    """

    chosen: list[int]
    loss: float
    tried: int = 0
    taken: int = 0
    notes: list[str] = field(default_factory=list)


def improve(
    items: Sequence[Item],
    start: Sequence[int],
    mixtures: Mixtures,
    solve: Solve,
    is_allowed: Allowed,
    most: int,
    is_over: Callable[[], bool],
) -> Swaps:
    """Make a choice better.

    Args:
        items: with losses.
        start: the choice.
        mixtures: measure.
        solve: the knapsack for other losses.
        is_allowed: whether a choice is within the budget.
        most: pairs that may be tried.
        is_over: whether there is no time left.
    """

    def measured(chosen: Sequence[int]) -> float:
        return mixtures.loss(losses.mixture(items, chosen))

    best = Swaps(list(start), measured(start))
    steps: dict[tuple[int, int], float] = {}
    for _ in range(ROUNDS):
        steps = _steps(items, best, measured, is_over)
        if is_over():
            return best
        other = solve(_rescaled(items, best.chosen, steps))
        if other is None or other == best.chosen:
            break
        best.tried += 1
        found = measured(other)
        if found >= best.loss:
            break
        best.notes.append(f"solved again with measured steps: {best.loss:.3g} -> {found:.3g}")
        best.chosen, best.loss, best.taken = other, found, best.taken + 1
    _pairs(items, best, steps, measured, is_allowed, most, is_over)
    return best


def _steps(
    items: Sequence[Item],
    best: Swaps,
    measured: Callable[[Sequence[int]], float],
    is_over: Callable[[], bool],
) -> dict[tuple[int, int], float]:
    """What each item's step down (-1) and up (+1) changes."""
    found: dict[tuple[int, int], float] = {}
    for place, item in enumerate(items):
        for step in (-1, 1):
            to = best.chosen[place] + step
            if not 0 <= to < len(item.options) or is_over():
                continue
            other = [*best.chosen[:place], to, *best.chosen[place + 1 :]]
            found[place, step] = measured(other) - best.loss
    return found


def _rescaled(
    items: Sequence[Item], chosen: Sequence[int], steps: dict[tuple[int, int], float]
) -> list[list[float]]:
    """Losses relative to the choice: measured one step away, scaled like that step further off."""
    found = []
    for place, item in enumerate(items):
        now = item.options[chosen[place]].loss
        values = []
        for index, option in enumerate(item.options):
            away = index - chosen[place]
            step = 1 if away > 0 else -1
            if away == 0 or (place, step) not in steps:
                values.append(option.loss - now)
                continue
            change = item.options[chosen[place] + step].loss - now
            factor = steps[place, step] / change if change else 1.0
            factor = min(max(factor, _LEAST_FACTOR), _MOST_FACTOR)
            values.append(steps[place, step] if abs(away) == 1 else factor * (option.loss - now))
        found.append(values)
    return found


def _pairs(
    items: Sequence[Item],
    best: Swaps,
    steps: dict[tuple[int, int], float],
    measured: Callable[[Sequence[int]], float],
    is_allowed: Allowed,
    most: int,
    is_over: Callable[[], bool],
) -> None:
    """One item up and another down, most promising first."""
    ups = {p: d for (p, s), d in steps.items() if s == 1}
    downs = {p: d for (p, s), d in steps.items() if s == -1}
    order = sorted(
        ((ups[a] + downs[b], a, b) for a in ups for b in downs if a != b),
    )
    singles = sorted((d, a, -1) for a, d in ups.items())
    moved: set[int] = set()
    tried = 0
    for promise, up, down in sorted([*singles, *order]):
        if tried >= most or is_over():
            return
        if promise >= 0 and tried >= most // 2:
            return
        if {up, down} & moved:
            continue
        other = list(best.chosen)
        other[up] += 1
        if down >= 0:
            other[down] -= 1
        if not is_allowed(other):
            continue
        tried += 1
        best.tried += 1
        found = measured(other)
        if found < best.loss:
            lower = f", {items[down].label} down" if down >= 0 else ""
            best.notes.append(f"{items[up].label} up{lower}: {best.loss:.3g} -> {found:.3g}")
            best.chosen, best.loss, best.taken = other, found, best.taken + 1
            moved |= {up, down} - {-1}
