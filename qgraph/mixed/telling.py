"""What was chosen, as a recipe, as lines for people, and as figures for the report."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qgraph.budget import Budget
from qgraph.mixed import items as found
from qgraph.mixed import knapsack, losses
from qgraph.mixed.items import Item, Option
from qgraph.mixed.mixtures import Mixtures
from qgraph.mixed.swaps import Swaps
from qgraph.recipe import FLOAT, Recipe, Rule, load

POINTS = 9  # of the front
RULE = "mixed"
"""Id of the rules that say what was chosen."""


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

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = {"told": self.told, "figures": self.figures, "notes": self.notes}
        return {"recipe": self.recipe.model_dump(mode="json"), **own}

    @staticmethod
    def from_json(held: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`."""
        return Choice(load(held["recipe"]), held["told"], held["figures"], held["notes"])


def loss_text(measure: str, value: float) -> str:
    """A loss for people; `measure` is "kl", "noise" or "floors"."""
    if measure == "kl":
        return f"KL {value:.2g}"
    return f"{value:.2g} of what the floors allow" if measure == "floors" else f"noise {value:.2g}"


def lines(items: Sequence[Item], chosen: Sequence[int], measure: str) -> dict[str, str]:
    """For each weight what its format and the next ones cost."""
    told = {}
    for item, index in zip(items, chosen, strict=True):
        option = item.options[index]
        text = f"alone it would cost {loss_text(measure, option.loss)}"
        for other in item.options[max(index - 1, 0) : index + 2]:
            if other is not option:
                text += f", as {other.choice} {loss_text(measure, other.loss)}"
        told.update({w.name: text for w in item.weights})
    return told


def pinned(recipe: Recipe, items: Sequence[Item], chosen: Sequence[int]) -> Recipe:
    """A recipe with rules in front that say the choice, and nothing left to choose."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for item, index in zip(items, chosen, strict=True):
        for weight, spec in zip(item.weights, item.options[index].specs, strict=True):
            activations = item.rule.activations if spec != FLOAT else FLOAT
            key = spec, activations, item.rule.solver
            names.setdefault(key, []).append(glob.escape(weight.name))
    pins = [
        Rule(
            id=RULE, names=tuple(held), weights=(spec,), activations=activations, solver=solver,
            reason="mixed precision",
        )
        for (spec, activations, solver), held in names.items()
    ]  # fmt: skip
    rest = [r.model_copy(update={"choices": ()}) for r in recipe.rules]
    return recipe.model_copy(update={"rules": (*pins, *rest), "budget": Budget()})


def front(
    items: Sequence[Item],
    chosen: Sequence[int],
    mixtures: Mixtures,
    progress: Callable[[str, float], None],
) -> list[dict[str, Any]]:
    """The least predicted loss for sizes from the smallest to the largest quantized one; the choice is among them."""
    values = [[o.loss for o in item.options] for item in items]
    sizes = [[float(o.nbytes) for o in item.options] for item in items]
    low = sum(map(min, sizes))
    high = sum(max(_narrow(item.options)) for item in items)
    held = {tuple(chosen): True}
    for step in range(POINTS):
        # Even steps in the logarithm: below 4 bits little changes much.
        most = low * (high / low) ** (step / (POINTS - 1)) if low else high
        progress("measuring the front", step / POINTS)
        mixed = knapsack.solve(values, [knapsack.Limit(sizes, most * (1 + 1e-6))])
        if mixed is not None:
            held.setdefault(tuple(mixed), False)
    points = [
        {
            "bytes": found.total(items, mixed),
            "avg_bits": average_bits(items, mixed),
            "predicted": losses.predicted(items, mixed),
            "measured": mixtures.loss(losses.mixture(items, mixed)),
            "chosen": is_chosen,
        }
        for mixed, is_chosen in held.items()
    ]
    return sorted(points, key=lambda p: (p["bytes"], p["measured"]))


def figures(items: Sequence[Item], chosen: Sequence[int], swaps: Swaps | None) -> dict[str, Any]:
    """What every weight has and could have, and which exchanges were made."""
    return {
        "bytes": found.total(items, chosen),
        "avg_bits": average_bits(items, chosen),
        "predicted": losses.predicted(items, chosen),
        "swaps": {"tried": swaps.tried, "taken": swaps.taken, "notes": swaps.notes} if swaps else {},
        "groups": [
            {
                "weights": [w.name for w in item.weights],
                "labels": [w.label for w in item.weights],
                "elements": item.elements,
                "format": item.options[index].choice,
                "options": [
                    {
                        "format": o.choice, "specs": list(o.specs), "bytes": o.nbytes,
                        "cost": o.cost, "loss": o.loss, "seconds": o.seconds,
                    }
                    for o in item.options
                ],
            }
            for item, index in zip(items, chosen, strict=True)
        ],
    }  # fmt: skip


def average_bits(items: Sequence[Item], chosen: Sequence[int]) -> float:
    """Stored bits per element."""
    return 8 * found.total(items, chosen) / sum(item.elements for item in items)


def _narrow(options: Sequence[Option]) -> list[int]:
    """Bytes of the options that quantize, of all where none does."""
    return [o.nbytes for o in options if o.choice != FLOAT] or [o.nbytes for o in options]
