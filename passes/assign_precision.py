"""assign-precision: weights × rules × target → plan. Nothing in the graph changes.

The first rule that matches a weight gives specs in order of preference; the first that the target can write for
every use of the weight is taken. What stays float gets a coded reason, and so does every rule that matched nothing.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from qgraph import activations, errors, graph, grids, opset, sensitivity, ternary, weights
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.plan import Decision
from qgraph.recipe import AUTO, FLOAT, Rule, static_spec
from qgraph.registry import register
from qgraph.report import Entry
from qgraph.spec import QuantSpec
from qgraph.target import Request, Target
from qgraph.weights import Weight

DYNAMIC = replace(QuantSpec.parse("uint8.tensor.asym"), dynamic=True)
DYNAMIC_INT4 = replace(QuantSpec.parse("int4.ch"), dynamic=True)  # a scale per token

_COMPUTING = ("matmul", "gemm", "conv", "conv_transpose")


@register
class AssignPrecision(Pass):
    """Decide for every weight how it is quantized, or why it is not."""

    name = "assign-precision"
    needs = frozenset({Fact.CANONICAL})
    gives = frozenset({Fact.PLAN})
    keeps = Keeps.BIT_EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fill `ctx.plan`."""
        found = weights.find(model)
        decided: dict[int, list[Weight]] = {}
        reach = _Reach(model, ctx.target.max_opset)
        without_grids = _static(model, found, ctx, reach)
        for weight in found:
            index, rule = match(ctx.recipe.rules, weight)
            decision = _decide(weight, rule, ctx, reach)
            if weight.name in without_grids:
                decision = Decision(
                    weight.name, "weight", None, by=decision.by, code="QG317",
                    reason=without_grids[weight.name],
                )  # fmt: skip
            ctx.plan.add(decision)
            ctx.records.setdefault(weight.name, {})["entry"] = _entry(weight)
            decided.setdefault(index, []).append(weight)
        for index, rule in enumerate(ctx.recipe.rules):
            _promote(rule, decided.get(index, []), ctx, reach)
        _settle(found, ctx, reach)
        _check_names(ctx.recipe.rules, found)
        return False


def _static(
    model: ir.Model, found: Sequence[Weight], ctx: Context, reach: _Reach
) -> dict[str, str]:
    """Plan the static grids of activations; returns the weights that stay float for want of one, with the reason."""
    held: dict[str, Weight] = {}
    specs: dict[str, QuantSpec] = {}
    for weight in found:
        decision = _decide(weight, match(ctx.recipe.rules, weight)[1], ctx, reach)
        if decision.activation is not None and not decision.activation.dynamic:
            held[weight.name], specs[weight.name] = weight, decision.activation
    if not held or ctx.target.integers is None:
        return {}
    if ctx.stats is None:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error", "QG318", f"recipe {ctx.recipe.name}",
                "static activations need statistics, and nothing was observed",
                "give samples (--data) and put the pass observe before assign-precision",
            )
        )  # fmt: skip
    gone: dict[str, str] = {}
    while True:
        candidates = {u.node: specs[w.name] for w in held.values() for u in w.uses}
        made = grids.find(model, ctx.target.integers, candidates, ctx.stats)
        lost = {
            w.name: made.regions.refused[u.node]
            for w in held.values()
            for u in w.uses
            if u.node in made.regions.refused
        }
        if not lost:
            break
        gone.update(lost)
        held = {name: w for name, w in held.items() if name not in lost}
    for decision in made.decisions(ctx.stats.choice.method):
        ctx.plan.add(decision)
    activations.remember(made.regions, ctx.plan)
    return gone


@functools.cache
def _glob(pattern: str) -> Callable[[str], object]:
    """Whether a name matches a pattern; fnmatch forgets compiled patterns where there are many."""
    return re.compile(fnmatch.translate(pattern)).match


class _Reach:
    """The opset that the model can be raised to, found out only if somebody asks for more than it has."""

    def __init__(self, model: ir.Model, ceiling: int) -> None:
        self._model, self._ceiling = model, ceiling
        self._known: dict[int, bool] = {}
        self.reason = ""

    def __call__(self) -> int:
        current = graph.opset(self._model)
        for version in (25, 23, 21, 19, 13, 11, 10):
            if version <= current:
                return current
            if version <= self._ceiling and self._can(version):
                return version
        return current

    def _can(self, version: int) -> bool:
        if version not in self._known:
            try:
                opset.raise_opset(graph.clone(self._model), version)
                self._known[version] = True
            except errors.UnsupportedError as e:
                self._known[version] = False
                self.reason = e.diagnostics[0].message
        return self._known[version]


def match(rules: Sequence[Rule], weight: Weight) -> tuple[int, Rule | None]:
    """The first rule that matches a weight, and its number; -1 and None where none does."""
    for index, rule in enumerate(rules):
        ops = {u.node.op_type for u in weight.uses}
        if rule.ops and not ops & set(rule.ops):
            continue
        if rule.names and not any(_glob(g)(n) for n in names_of(weight) for g in rule.names):
            continue
        if weight.shape[0] * weight.shape[1] < rule.min_elements or (
            rule.tied and not weight.is_tied
        ):
            continue
        if rule.head and not all(_is_head(u.node) for u in weight.uses):
            continue
        if rule.ternary and not all(ternary.is_ternary(u) for u in weight.uses if not u.reason):
            continue
        return index, rule
    return -1, None


def _is_head(node: ir.Node) -> bool:
    """Whether a result is an output of the model, with a bias or another shape or type at most."""
    while not node.outputs[0].is_graph_output():
        readers = [n for n, _ in node.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type not in ("Add", "Cast", "Reshape", "Identity"):
            return False
        node = readers[0]
    return True


def _promote(rule: Rule, decided: Sequence[Weight], ctx: Context, reach: _Reach) -> None:
    """Give the rule's most sensitive weights its sensitive spec, within the rule's share."""
    if not rule.sensitive or not rule.sensitive_share:
        return
    quantized = [w for w in decided if ctx.plan.decisions[w.name].spec is not None]
    raised = rule.model_copy(update={"weights": (rule.sensitive,)})
    for weight in sensitivity.most_sensitive(quantized, rule.sensitive_share):
        decision = _decide(weight, raised, ctx, reach)
        if decision.spec is not None:
            reason = (
                "reads a norm and feeds no Softmax: among the most sensitive "
                f"{rule.sensitive_share:.0%} of rule {rule.id!r}"
            )
            ctx.plan.add(replace(decision, reason=reason))


def _settle(found: Sequence[Weight], ctx: Context, reach: _Reach) -> None:
    """Decide anew, without it, for weights in a form that holds several of an operator's where one has another."""
    barred: dict[str, dict[str, str]] = {}
    while lost := _alone(found, ctx):
        for weight, form, why in lost:
            barred.setdefault(weight.name, {})[form] = why
        for weight in {w.name: w for w, _, _ in lost}.values():
            rule = match(ctx.recipe.rules, weight)[1]
            ctx.plan.add(_decide(weight, rule, ctx, reach, barred[weight.name]))


def _alone(found: Sequence[Weight], ctx: Context) -> list[tuple[Weight, str, str]]:
    """Weights whose form lacks a partner: (weight, form, why it cannot be)."""
    chosen = {
        (use.node, use.index): (weight, form)
        for weight in found
        for use, form in zip(weight.uses, ctx.plan.decisions[weight.name].forms, strict=False)
    }
    lost = []
    for (node, index), (weight, form) in chosen.items():
        use = next(u for u in weight.uses if u.node is node and u.index == index)
        for other in ctx.target.form(form).partners(use):
            partner, theirs = chosen.get((node, other), (None, ""))
            if theirs != form:
                name = partner.label if partner else str(getattr(node.inputs[other], "name", ""))
                why = f"needs {name or 'input ' + str(other)} in the same form, which it is not"
                lost.append((weight, form, why))
    return lost


def _entry(weight: Weight) -> Entry:
    """The weight's line in the ledger, before anything is decided."""
    operators = Counter(u.node.op_type for u in weight.uses)
    return Entry(
        weight.name, weight.label, dict(operators), weight.dims, weight.nbytes, weight.nbytes
    )


def names_of(weight: Weight) -> list[str]:
    """The names that globs of rules may mean."""
    return [weight.label, weight.name, *(str(u.node.name) for u in weight.uses if u.node.name)]


def _decide(
    weight: Weight,
    rule: Rule | None,
    ctx: Context,
    reach: _Reach,
    barred: Mapping[str, str] | None = None,
) -> Decision:
    by = f"rule {rule.id or ctx.recipe.rules.index(rule) + 1}" if rule else "recipe"
    n, k = weight.shape

    def stays(code: str, reason: str) -> Decision:
        return Decision(weight.name, "weight", None, reason=reason, by=by, code=code)

    blocked = next((u.reason for u in weight.uses if u.reason), "")
    if n * k < max(ctx.recipe.min_elements, 1):
        return stays(
            "QG312", f"it has fewer elements than min_elements = {max(ctx.recipe.min_elements, 1)}"
        )
    if blocked:
        return stays("QG311", blocked)
    needed = sorted({n.op_type for n in weight.others})
    if needed or weight.is_output:
        by_whom = ", ".join(needed) or "the graph's outputs"
        return stays("QG316", f"its float values stay for {by_whom}, so codes would only be added")
    if rule is None:
        return stays(
            "QG310", f"no rule of recipe {ctx.recipe.name!r} matches {weight.uses[0].node.op_type}"
        )
    if len({u.matrix for u in weight.uses}) > 1:
        return stays("QG313", "its uses sum over different axes, so no grouping serves all of them")
    refused = _beside_grids(weight, ctx)
    if refused:
        return stays("QG315", refused)
    dtype = (
        weight.value.const_value.dtype
        if weight.value.const_value is not None
        else ir.DataType.FLOAT
    )
    reasons: list[str] = []
    for text, why in _choices(rule, weight, ctx.target):
        if text == FLOAT:
            if rule.weights[0] == FLOAT or not reasons:
                return stays("QG314", rule.reason or why or f"rule {rule.id!r} keeps it float")
            reasons += [why] if why else []
            break
        spec = fit_group(QuantSpec.parse(text), k)
        if dtype == ir.DataType.FLOAT16:
            spec = replace(spec, scale_dtype="float16")
        activation = _activation(rule, why, ctx.target)
        if rule.is_static and any(u.kind not in _COMPUTING for u in weight.uses):
            activation = None  # a table has no activations, and its head shares its codes
        forms, refused = _forms(weight, spec, activation, dtype, ctx.target, reach, barred or {})
        if activation is not None and not activation.dynamic and ctx.target.integers is not None:
            untaken = ctx.target.integers.refuses(activation)
            if untaken and _takes_activation(forms):
                forms, refused = [], f"target {ctx.target.name}: {untaken}"
        if forms and activation is None:
            stored = ctx.target.nbytes(spec, forms, n, k)
            if stored > weight.nbytes:
                forms, refused = [], f"it would take {stored} bytes, in float {weight.nbytes}"
        if forms:
            reason = rule.reason or why or f"rule {rule.id!r} of recipe {ctx.recipe.name!r}"
            if reasons:
                reason += f"; not {reasons[0]}"
            return Decision(
                weight.name,
                "weight",
                spec,
                rule.solver,
                reason,
                by,
                forms=tuple(forms),
                activation=activation if _takes_activation(forms) else None,
            )
        reasons.append(f"{spec}: {refused}")
    return stays("QG315", "; ".join(reasons) or rule.reason)


def _beside_grids(weight: Weight, ctx: Context) -> str:
    """Why the weight cannot be quantized in a model with static activations, if the recipe makes it one."""
    integers = ctx.target.integers
    if integers is None or not any(rule.is_static for rule in ctx.recipe.rules):
        return ""
    return next((r for u in weight.uses if (r := integers.floats.get(u.node.op_type))), "")


def _choices(rule: Rule, weight: Weight, target: Target) -> list[tuple[str, str]]:
    """(spec, reason) in order of preference; "auto" is the target's own list for the kind of the weight."""
    found: list[tuple[str, str]] = []
    for text in rule.weights:
        if text == AUTO:
            kind = "tied" if len(weight.kinds) > 1 else weight.kinds[0]
            for spec, activations, why in target.auto.get(
                kind, target.auto.get(weight.kinds[0], ())
            ):
                found.append((spec, ("dynamic: " if activations == "int8" else "") + why))
        else:
            found.append((text, ""))
    return found


def _activation(rule: Rule, why: str, target: Target) -> QuantSpec | None:
    """How a rule wants the operator's input."""
    if rule.is_static and target.integers is not None:
        text = rule.activations.partition(":")[2]
        return static_spec(text or target.integers.types[0])
    if rule.activations == "int4":
        return DYNAMIC_INT4
    return DYNAMIC if rule.activations == "int8" or why.startswith("dynamic") else None


def _takes_activation(forms: Sequence[str]) -> bool:
    return any(f.startswith(("dynamic", "static")) for f in forms)


def _wanted(activation: QuantSpec | None, kind: str) -> QuantSpec | None:
    """What a rule's activations mean for a kind of use: tables have none, and no recurrent kernel takes static ones."""
    is_dynamic = activation is not None and activation.dynamic
    return activation if kind in _COMPUTING or (kind == "rnn" and is_dynamic) else None


def _forms(
    weight: Weight,
    spec: QuantSpec,
    activation: QuantSpec | None,
    dtype: ir.DataType,
    target: Target,
    reach: _Reach,
    barred: Mapping[str, str],
) -> tuple[list[str], str]:
    """A form for every use, or why there is none."""
    requests = [
        Request(
            use,
            weight.dims,
            dtype,
            spec,
            _wanted(activation, use.kind),
            weight.is_tied,
            barred,
        )
        for use in weight.uses
    ]
    forms, refused = target.support_all(requests, graph.opset(reach._model))
    if refused:
        forms, refused = target.support_all(requests, reach())
    return [f.name for f in forms], refused


def fit_group(spec: QuantSpec, k: int) -> QuantSpec:
    """Shrink the group where rows of K would be padded by more than an eighth to fill their last group."""
    group = spec.group
    while group > 16 and (-(-k // group) * group - k) * 8 > k:
        group //= 2
    return spec if group == spec.group else replace(spec, block=(spec.block[0], group))


def _check_names(rules: Sequence[Rule], found: Sequence[Weight]) -> None:
    """A glob that a person wrote and that matches nothing is an error (law 4)."""
    known = [name for w in found for name in names_of(w)]
    problems = []
    for index, rule in enumerate(rules):
        for pattern in rule.names:
            if not any(_glob(pattern)(name) for name in known):
                where = f"rules[{index}].names = {pattern!r}"
                problems.append(
                    errors.Diagnostic(
                        "error",
                        "QG309",
                        where,
                        "matches no weight of this model",
                        errors.nearest(pattern.strip("*?"), known),
                    )
                )
    if problems:
        raise errors.RecipeError(*problems)
