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


def measure(items: Sequence[Item], mixtures: Mixtures, progress: Progress) -> None:
    """Put the losses into the options."""
    for place, item in enumerate(items):
        progress(f"measuring {item.label} alone", place / len(items))
        known = {index: mixtures.loss(specs_of(item, index)) for index in _measured(item.options)}
        item.options = [
            replace(o, loss=_scaled(item.options, index, known))
            for index, o in enumerate(item.options)
        ]


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
