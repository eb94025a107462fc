"""How much the model's outputs lose by each option: measured for a few, scaled by the Gram-weighted error for others.

    loss[i, o] = gain[i] cost[i, o]

The gain of an item is what was measured over its cost, with all other items in float. Large errors do less damage per
cost than small ones, so an item is measured in its coarsest option and in one of the middle, and each option takes the
gain of the one that is nearer. The sum over items puts mixtures in order; it is no forecast of their loss, for errors
do not simply add up below 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from qgraph.mixed.items import Item, Option
from qgraph.mixed.mixtures import Mixtures

Progress = Callable[[str, float], None]


def measure(
    items: Sequence[Item],
    mixtures: Mixtures,
    progress: Progress,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Put the losses into the options.

    Where time is over, an item has the gain of that measured one which is nearest in the graph, of its own shape if
    there is one; they are measured in an order that soon has some from everywhere.
    """
    found: dict[int, dict[int, float]] = {}
    for done, place in enumerate(_spread(len(items))):
        if is_over() and found:
            break
        item = items[place]
        progress(f"measuring {item.label} alone", done / len(items))
        known = {index: mixtures.loss(specs_of(item, index)) for index in _measured(item.options)}
        found[place] = known
    for place, item in enumerate(items):
        known = found.get(place) or _borrowed(items, place, found)
        item.options = [
            replace(o, loss=_scaled(item.options, index, known))
            for index, o in enumerate(item.options)
        ]


def _spread(count: int) -> list[int]:
    """0..count-1, each next one far from those before it."""
    width = max(count - 1, 1).bit_length()
    return [p for i in range(1 << width) if (p := int(f"{i:0{width}b}"[::-1], 2)) < count]


def _borrowed(
    items: Sequence[Item], place: int, found: dict[int, dict[int, float]]
) -> dict[int, float]:
    """Losses of an item that was not measured, from the gains of one that was."""
    shape = [w.shape for w in items[place].weights]

    def distance(other: int) -> tuple[bool, int]:
        return [w.shape for w in items[other].weights] != shape, abs(other - place)

    other = min(found, key=distance)
    options, theirs = items[place].options, items[other].options
    made = {}
    for index in _measured(options):
        match = min(
            found[other],
            key=lambda i: abs(
                theirs[i].nbytes / items[other].elements
                - options[index].nbytes / items[place].elements
            ),
            default=None,
        )
        if match is not None and theirs[match].cost > 0:
            made[index] = found[other][match] * options[index].cost / theirs[match].cost
    return made


def specs_of(item: Item, index: int) -> dict[str, str]:
    """What the weights of an item have under one of its options."""
    specs = item.options[index].specs
    return {w.name: s for w, s in zip(item.weights, specs, strict=True)}


def mixture(items: Sequence[Item], chosen: Sequence[int]) -> dict[str, str]:
    """What all weights have under a choice."""
    found: dict[str, str] = {}
    for item, index in zip(items, chosen, strict=True):
        found.update(specs_of(item, index))
    return found


def _measured(options: Sequence[Option]) -> list[int]:
    """The options in which an item is measured."""
    lossy = sorted((i for i, o in enumerate(options) if o.cost > 0), key=lambda i: -options[i].cost)
    return list(dict.fromkeys([lossy[0], lossy[len(lossy) // 2]])) if lossy else []


def _scaled(options: Sequence[Option], index: int, known: dict[int, float]) -> float:
    cost = options[index].cost
    if not known or cost <= 0:
        return 0.0
    nearest = min(known, key=lambda i: abs(math.log(options[i].cost / cost)))
    return known[nearest] * cost / options[nearest].cost


def predicted(items: Sequence[Item], chosen: Sequence[int]) -> float:
    """The sum of the losses of a choice."""
    return math.fsum(i.options[c].loss for i, c in zip(items, chosen, strict=True))
