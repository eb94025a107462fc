"""What is chosen for: weights that share a format, and the formats that the target can write for them.

Weights share a format where one tensor is stored once for several uses (that is one weight here), and, where the
target fuses the operators that read one tensor (q/k/v, gate/up), so do their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qgraph import graph, weights
from qgraph.accuracy.trials import Trials, branch
from qgraph.calibrate import groups
from qgraph.passes import assign_precision
from qgraph.plan import Decision
from qgraph.recipe import FLOAT, Recipe, Rule
from qgraph.target import Target
from qgraph.weights import Weight

_LEAST_PEAK = 2.0**-10
"""Of weights below it, float16 scales may be so small that they are rounded more than the codes."""


@dataclass(frozen=True, slots=True)
class Option:
    """One format of an item.

    Attributes:
        choice: as the rule names it.
        specs: what each weight of the item gets, "float" where it stays so.
        nbytes: that the item takes in the file.
        cost: Σ e H eᵀ over its weights: their errors under the second moments of their inputs.
        loss: of the model's outputs if this item alone is quantized so, predicted or measured.
        seconds: of one run that its kernels take; 0 where that was not measured.
    """

    choice: str
    specs: tuple[str, ...]
    nbytes: int
    cost: float = 0.0
    loss: float = 0.0
    seconds: float = 0.0


@dataclass
class Item:
    """Weights that share a format.

    Attributes:
        weights: in graph order.
        rule: that matches them; tied weights have the same choices.
        elements: of all of them.
        usual: bytes that they take without a choice, by the rule's `weights`.
        options: fewest bytes first.
    """

    weights: tuple[Weight, ...]
    rule: Rule
    elements: int
    usual: int = 0
    options: list[Option] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Names that a person recognises."""
        return ", ".join(w.label for w in self.weights)


def find(trials: Trials, recipe: Recipe) -> list[Item]:
    """The items of a model whose rules have choices, with what the target takes of these; in graph order.

    Args:
        trials: the end of the pipeline; nothing of it runs but the pass that decides.
        recipe: its rules have the choices.
    """
    texts = dict.fromkeys(t for rule in recipe.rules for t in rule.choices)
    taken = {t: _decided(trials, asking_for(recipe, t)) for t in texts if t != FLOAT}
    usual = _decided(trials, recipe)
    ties = recipe.budget.tie_readers
    if ties is None:
        ties = trials.context.target.fuses_readers
    together: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights.find(trials.model):
        rule = assign_precision.match(recipe.rules, weight)[1]
        if rule is None or not rule.choices:
            continue
        if all(d[weight.name].spec is None for d in taken.values()):
            continue  # it stays float, and the plan will say why
        inputs = groups.inputs_of(weight)
        is_tied = ties and not isinstance(inputs, str) and len(weight.uses) == 1
        key = (inputs, rule.choices) if is_tied else (weight.name,)
        together.setdefault(key, []).append(weight)
    found = []
    for held in together.values():
        rule = assign_precision.match(recipe.rules, held[0])[1]
        assert rule is not None
        item = Item(tuple(held), rule, sum(w.shape[0] * w.shape[1] for w in held))
        target = trials.context.target
        item.usual = sum(stored_bytes(target, w, usual[w.name]) for w in held)
        item.options = _options(target, item, taken)
        if item.options:
            found.append(item)
    return found


def asking_for(recipe: Recipe, text: str) -> Recipe:
    """A recipe whose rules that have this choice ask for it alone."""
    rules = [
        r.model_copy(update={"weights": (text,), "sensitive": ""}) if text in r.choices else r
        for r in recipe.rules
    ]
    return recipe.model_copy(update={"rules": tuple(rules)})


def _decided(trials: Trials, recipe: Recipe) -> Mapping[str, Decision]:
    """What the plan would say."""
    ctx = replace(branch(trials.context), recipe=recipe)
    trials.pipeline.passes[trials.start].run(graph.clone(trials.model), ctx)
    return ctx.plan.decisions


def _options(
    target: Target, item: Item, taken: Mapping[str, Mapping[str, Decision]]
) -> list[Option]:
    """What all weights of an item can have, each of its choices once, by bytes."""
    found: dict[tuple[str, ...], Option] = {}
    for text in item.rule.choices:
        if text == FLOAT:
            specs = (FLOAT,) * len(item.weights)
            found.setdefault(specs, Option(text, specs, sum(w.nbytes for w in item.weights)))
            continue
        decisions = [taken[text][w.name] for w in item.weights]
        if any(d.spec is None for d in decisions):
            continue
        specs = tuple(str(d.spec) for d in decisions)
        both = zip(item.weights, decisions, strict=True)
        nbytes = sum(stored_bytes(target, weight, decision) for weight, decision in both)
        found.setdefault(specs, Option(text, specs, nbytes))
    return sorted(_without_twins(item, found), key=lambda o: o.nbytes)


def _without_twins(item: Item, found: Mapping[tuple[str, ...], Option]) -> Sequence[Option]:
    """Without float32 scales where float16 ones of the same codes are there: more bytes for nothing."""
    twins = {specs: tuple(f"{s}.f16" for s in specs) for specs in found}
    wide = {specs for specs, half in twins.items() if half in found}
    if wide and min(float(np.abs(w.read()).max()) for w in item.weights) < _LEAST_PEAK:
        return list(found.values())
    return [o for specs, o in found.items() if specs not in wide]


def stored_bytes(target: Target, weight: Weight, decision: Decision) -> int:
    """Codes, scales and zero points in the file, with the padding of the form that holds them."""
    if decision.spec is None:
        return weight.nbytes
    return target.nbytes(decision.spec, decision.forms, *weight.shape)


def total(items: Sequence[Item], chosen: Sequence[int]) -> int:
    """Bytes of a mixture."""
    return sum(item.options[c].nbytes for item, c in zip(items, chosen, strict=True))
