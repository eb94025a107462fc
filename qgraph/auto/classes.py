"""Operators that are chosen a form for together: those of one kind and shape, which take the same time each.

A form is what a rule says: how weights and activations of an operator are quantized.

    static    int8 weights, activations on calibrated grids      Conv, Gemm, MatMul
    dynamic   int8 weights, activations quantized at run time    Gemm, MatMul
    table     what the target prefers without data               all but Conv
    float
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph import graph, weights
from qgraph.passes import assign_precision
from qgraph.recipe import AUTO, FLOAT, PRESETS, STATIC, Recipe, Rule
from qgraph.target import Target
from qgraph.weights import Weight

SMALLEST = (
    1024  # elements of tables and recurrent weights: smaller ones cost more nodes than they save
)


@dataclass(frozen=True, slots=True)
class Form:
    """One way to quantize the operators of a class."""

    name: str
    weights: tuple[str, ...]
    activations: str = FLOAT
    reason: str = ""


FORMS = {
    form.name: form
    for form in (
        Form(
            "static", ("int8.ch", "int8.tensor", FLOAT), STATIC,
            "measured: integer kernels on calibrated grids are the best form",
        ),
        Form(
            "dynamic", ("int8.ch", FLOAT), "int8",
            "measured: int8 with activations quantized at run time is the best form",
        ),
        Form("table", (AUTO, FLOAT)),
        Form("float", (FLOAT,), FLOAT, "measured: no quantized form is faster than float"),
    )
}  # fmt: skip

# Tables first: one that is also the head is a table.
_KINDS = {
    "embedding": ("Gather", "Slice"),
    "linear": ("MatMul", "Gemm"),
    "conv": ("Conv", "ConvTranspose"),
    "rnn": ("LSTM", "GRU", "RNN"),
}


@dataclass(frozen=True, slots=True)
class Class:
    """Operators of one kind and shape.

    Attributes:
        name: for people, "Gemm 1536x384".
        kind: "linear", "conv", "embedding" or "rnn".
        weights: their names, in graph order.
        share: of the model's multiplications or of its weights' elements, whichever is more, 0..1.
        forms: names of the forms that they may have; the first is kept unless another is clearly faster.
    """

    name: str
    kind: str
    weights: tuple[str, ...]
    share: float
    forms: tuple[str, ...]


def is_measured(recipe: Recipe) -> bool:
    """Whether a recipe leaves products or convolutions to measurements: it is `auto`, or extends it."""
    own = [rule for rule in PRESETS["auto"].rules if rule.id in ("linear", "conv")]
    return any(rule in own for rule in recipe.rules) and "observe" not in recipe.pipeline


def calibrated(recipe: Recipe) -> Recipe:
    """The recipe with a pipeline that collects statistics, and rules that take every weight."""
    static = PRESETS["int8-static"]
    least = (
        static.min_elements
        if recipe.min_elements == PRESETS["auto"].min_elements
        else recipe.min_elements
    )
    changes = {
        "pipeline": static.pipeline,
        "options": {
            name: {**static.options.get(name, {}), **recipe.options.get(name, {})}
            for name in sorted(static.options.keys() | recipe.options.keys())
        },
        "min_elements": least,
    }
    return recipe.model_copy(update=changes)


def observing(base: Recipe) -> Recipe:
    """The recipe while statistics are collected: all that may get a static grid is seen."""
    kept = [rule for rule in base.rules if rule not in PRESETS["auto"].rules]
    wanted = [_rule(kind, FORMS["static"], ops=_KINDS[kind]) for kind in ("linear", "conv")]
    return base.model_copy(update={"rules": (*kept, *wanted)})


def find(model: ir.Model, recipe: Recipe, target: Target, macs: Mapping[str, int]) -> list[Class]:
    """The classes of a canonical float model, largest share first; weights that a person's rule decides are in none.

    Args:
        model: see above.
        recipe: as `calibrated` makes it.
        target: which forms there are.
        macs: multiplications by the first output of each operator, where they are known.
    """
    own = [rule for rule in recipe.rules if rule in PRESETS["auto"].rules]
    members: dict[tuple[str, str], list[Weight]] = {}
    for weight in weights.find(model):
        _, rule = assign_precision.match(recipe.rules, weight)
        if rule not in own or rule is None or any(u.reason for u in weight.uses):
            continue
        ops = {use.node.op_type for use in weight.uses}
        kind = next(kind for kind, known in _KINDS.items() if ops & set(known))
        members.setdefault((kind, _name(weight)), []).append(weight)

    def elements(held: Sequence[Weight]) -> int:
        return sum(w.shape[0] * w.shape[1] for w in held)

    def work(held: Sequence[Weight]) -> int:
        return sum(macs.get(str(u.node.outputs[0].name), 0) for w in held for u in w.uses)

    sizes = sum(map(elements, members.values())) or 1
    works = sum(map(work, members.values())) or 1
    found = [
        Class(
            name,
            kind,
            tuple(w.name for w in held),
            max(elements(held) / sizes, work(held) / works),
            _forms(kind, target),
        )
        for (kind, name), held in members.items()
    ]
    return sorted(found, key=lambda c: -c.share)


def _forms(kind: str, target: Target) -> tuple[str, ...]:
    has_grids = target.integers is not None
    if kind == "linear":
        return ("table", *(("static",) if has_grids else ()), "dynamic", "float")
    if kind == "conv":
        return ("float", "static") if has_grids else ("float",)
    return ("table", "float")


def _name(weight: Weight) -> str:
    node = weight.uses[0].node
    n, k = weight.shape
    if {u.kind for u in weight.uses} > {"gather"}:
        return f"tied table {n}x{k}"
    if node.op_type not in _KINDS["conv"]:
        return f"{node.op_type} {n}x{k}"
    window = "x".join(map(str, weight.dims[2:]))
    groups = int(graph.attribute(node, "group", 1))
    if groups == 1:
        return f"{node.op_type} {window}"
    kind = "depthwise" if groups in weight.dims[:2] else "grouped"
    return f"{kind} {node.op_type} {window}"


def recipe_of(base: Recipe, classes: Sequence[Class], chosen: Mapping[str, str]) -> Recipe:
    """A recipe that gives each class its form, as short as may be: a rule for what most weights of a kind get, and
    rules with names in front of it for the others.

    Args:
        base: a recipe as `calibrated` makes it; rules of a person stay in front.
        classes: see `find`.
        chosen: form by name of class.
    """
    own = PRESETS["auto"].rules
    exceptions, rules = list[Rule](), list[Rule]()
    for kind, ops in _KINDS.items():
        held = [c for c in classes if c.kind == kind]
        counts = Counter[str]()
        for each in held:
            counts[chosen[each.name]] += len(each.weights)
        most = max(counts, key=lambda name: counts[name]) if counts else "table"
        for form in sorted(counts.keys() - {most}):
            names = [glob.escape(w) for c in held if chosen[c.name] == form for w in c.weights]
            exceptions.append(_rule(kind, FORMS[form], names=tuple(names)))
        rules.append(_rule(kind, FORMS[most], ops=ops))
    kept = [rule for rule in base.rules if rule not in own]
    return base.model_copy(update={"rules": (*kept, *exceptions, *rules)})


def _rule(kind: str, form: Form, *, ops: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Rule:
    least = 0 if form.name in ("static", "float") else SMALLEST
    return Rule(
        id=kind,
        ops=ops,
        names=names,
        weights=form.weights,
        activations=form.activations,
        reason=form.reason,
        min_elements=least,
    )
