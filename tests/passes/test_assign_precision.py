"""assign-precision: each code of a weight that stays float, and how rules are chosen."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from qgraph import errors, printer
from qgraph.passes.assign_precision import fit_group
from qgraph.plan import Decision, QuantPlan
from qgraph.recipe import PRESETS, Recipe, Rule
from qgraph.spec import QuantSpec

MATMUL = "g (float[m, 64] x) => (float[m, 48] y) { y = MatMul(x, w) }"
ALL = Rule(id="all", weights=("int8.ch",))


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def decide(after: Any, model: Any, *rules: Rule, target: str = "ort", **fields: Any) -> QuantPlan:
    recipe = Recipe(rules=rules or (ALL,), **fields)
    before = printer.text(after("canonicalize", model).model)
    done = after("canonicalize assign-precision", model, recipe, target)
    assert not done.changed and printer.text(done.model) == before
    assert all(d.spec or (d.code and d.reason) for d in done.ctx.plan.decisions.values())
    return done.ctx.plan


def only(plan: QuantPlan) -> Decision:
    (decision,) = plan.decisions.values()
    return decision


FLOAT_REASONS = {
    "QG310": (
        MATMUL,
        (Rule(id="conv", ops=("Conv",)),),
        "no rule of recipe 'custom' matches MatMul",
    ),
    "QG311-left": (
        "g (float[64, m] x) => (float[48, m] y) { y = MatMul(w, x) }",
        (),
        "left input of the MatMul",
    ),
    "QG311-input": (
        "g (float[m, 64] x, float[64, 48] w) => (float[m, 48] y) { y = MatMul(x, w) }",
        (),
        "a caller may override it; --set options.canonicalize.freeze_inputs=true",
    ),
    "QG311-axis": (
        "g (int64[b] i) => (float[48, b] y) { y = Gather<axis=1>(w, i) }",
        (),
        "Gather along axis 1",
    ),
    "QG311-indices": (
        "g (float[48] x) => (float[2, 48] y) { c = Gather(w, i) y = Add(x, c) }",
        (),
        "constant indices",
    ),
    "QG311-mask": (
        "g (float[s, 48] x, int64[n] e) => (float[s, 48] y) { c = Slice(mask, z, e, z) y = Add(x, c) }",
        (),
        "sentinel such as -1e9",
    ),
    "QG311-factors": (
        "g (float[s, 48] x, int64[n] e) => (float[s, 48] y) { c = Slice(w, z, e, z) y = Mul(x, c) }",
        (),
        "its rows are factors",
    ),
    "QG311-slice": (
        "g (float[s, n] x, int64[n] e) => (float[s, n] y) { c = Slice(w, z, e, o) y = Add(x, c) }",
        (),
        "along other axes than rows",
    ),
    "QG312": (MATMUL, (), "fewer elements than min_elements"),
    "QG313": (
        """g (float[m, 48] x) => (float[m, 48] y) {
          h = MatMul(x, square) t = Transpose<perm=[1, 0]>(square) y = MatMul(h, t) }""",
        (),
        "its uses sum over different axes",
    ),
    "QG314": (MATMUL, (Rule(id="kept", weights=("float",), reason="because"),), "because"),
    "QG316-node": (
        "g (float[m, 64] x) => (float[m, 48] y, float[64, 48] k) { y = MatMul(x, w) k = Abs(w) }",
        (),
        "its float values stay for Abs",
    ),
    "QG312-empty": (
        "g (float[m, 48] x) => (float[m, 0] y) { y = MatMul(x, empty) }",
        (),
        "fewer elements than min_elements = 1",
    ),
    "QG316-transposed-output": (
        """g (float[m, 48] x) => (float[m, 64] y, float[48, 64] t) {
          t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t) }""",
        (),
        "its float values stay for the graph's outputs",
    ),
    "QG316-output": (
        "g (float[m, 64] x) => (float[m, 48] y, float[64, 48] w) { y = MatMul(x, w) }",
        (),
        "its float values stay for the graph's outputs",
    ),
}


CONSTANTS = {
    "w": draw(64, 48),
    "square": draw(48, 48),
    "empty": draw(48, 0),
    "mask": np.where(np.eye(64, 48), np.float32(-1e9), draw(64, 48)),
    "i": np.array([1, 3], np.int64),
    "z": np.array([0], np.int64),
    "o": np.array([1], np.int64),
}


@pytest.mark.parametrize("case", FLOAT_REASONS)
def test_what_stays_float_says_why(parse, after, case):
    text, rules, reason = FLOAT_REASONS[case]
    used = {k: v for k, v in CONSTANTS.items() if re.search(rf"[(,] ?{k}[,)]", text)}
    used |= {"w": draw(48, 64)} if "MatMul(w" in text else {}
    size = {"QG312": 4000, "QG312-empty": 0}.get(case, 1024)
    decision = only(decide(after, parse(text, **used), *rules, min_elements=size))
    assert decision.spec is None
    assert decision.code == case[:5] and reason in decision.reason


def test_a_spec_without_a_form_is_refused_with_every_forms_reason(parse, after):
    text = "g (float[b, 4, 9, 9] x) => (float[b, 32, 7, 7] y) { y = Conv(x, w) }"
    rule = Rule(id="conv", weights=("int4.g16",))
    decision = only(decide(after, parse(text, w=draw(32, 4, 3, 3)), rule))
    assert decision.code == "QG315"
    assert decision.reason.startswith(
        "int4.g16.sym: dequantize-linear: blocks would run over 3 axes"
    )


def test_the_first_spec_that_the_target_takes_wins_and_says_what_it_is_not(parse, after):
    text = "g (float[b, 4, 9, 9] x) => (float[b, 32, 7, 7] y) { y = Conv(x, w) }"
    rule = Rule(id="conv", weights=("int4.g16", "int8.ch", "float"))
    decision = only(decide(after, parse(text, w=draw(32, 4, 3, 3)), rule))
    assert str(decision.spec) == "int8.ch.sym" and decision.forms == ("dequantize-linear",)
    assert "not int4.g16.sym" in decision.reason


def test_the_first_rule_that_matches_decides(parse, after):
    text = """g (float[m, 64] x) => (float[m, 64] y) {
      [up] h = MatMul(x, up_weight) [down] y = MatMul(h, down_weight) }"""
    rules = (
        Rule(id="big", min_elements=5000, weights=("int4.g32",)),
        Rule(id="named", names=("up*",), weights=("int8.g32",)),
        Rule(id="rest", weights=("uint4.g32",)),
    )
    model = parse(text, up_weight=draw(64, 64), down_weight=draw(64, 64))
    plan = decide(after, model, *rules)
    by = {d.value: (d.by, str(d.spec)) for d in plan.decisions.values()}
    assert by["up_weight"] == ("rule named", "int8.g32.sym")
    assert by["down_weight"] == ("rule rest", "uint4.g32.asym")


def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_name(parse, after):
    with pytest.raises(errors.RecipeError, match="QG309.*\n.*did you mean w"):
        decide(after, parse(MATMUL, w=draw(64, 48)), Rule(id="typo", names=("ww*",)), ALL)


def test_a_tied_table_gets_one_decision_with_a_form_for_each_use(parse, after):
    text = """g (int64[b, s] i) => (float[b, s, 96] y) {
      h = Gather(w, i) t = Transpose<perm=[1, 0]>(w) y = MatMul(h, t) }"""
    model = parse(text, w=draw(96, 64))
    recipe = PRESETS["auto"]
    for target, forms in (
        ("ort", ("gather-block", "matmul-nbits")),
        ("onnx", ("gather-rows", "dequantize-linear")),
        ("openvino", ("dequantize-linear", "dequantize-linear")),
    ):
        decision = only(decide(after, model, *recipe.rules, target=target))
        assert decision.forms == forms


def test_dynamic_activations_are_planned_only_where_a_form_uses_them(parse, after):
    rule = Rule(id="dynamic", weights=("int8.ch",), activations="int8")
    plan = decide(after, parse(MATMUL, w=draw(64, 48)), rule)
    assert only(plan).activation is not None and only(plan).forms == ("dynamic-int8",)
    plan = decide(after, parse(MATMUL, w=draw(64, 48)), rule, target="openvino")
    assert only(plan).activation is None and only(plan).forms == ("dequantize-linear",)


def test_the_opset_is_raised_in_thought_only(parse, after):
    model = parse(MATMUL, opset=13, w=draw(64, 48))
    done = after(
        "canonicalize assign-precision", model, Recipe(rules=(Rule(weights=("int4.g32",)),)), "onnx"
    )
    assert only(done.ctx.plan).forms == ("dequantize-linear",)
    assert done.model.graph.opset_imports[""] == 13


@pytest.mark.parametrize(
    ("spec", "k", "fitted"),
    [
        ("int4.g32", 64, "int4.g32"),
        ("int4.g32", 60, "int4.g32"),
        ("int4.g32", 40, "int4.g16"),
        ("int4.g128", 192, "int4.g64"),
        ("int4.g128", 8, "int4.g16"),
        ("int8.ch", 40, "int8.ch"),
        ("int8.tensor", 40, "int8.tensor"),
    ],
)
def test_groups_shrink_where_rows_would_be_padded(spec, k, fitted):
    assert fit_group(QuantSpec.parse(spec), k) == QuantSpec.parse(fitted)


def test_the_plan_is_the_same_twice_and_survives_json(parse, after):
    model = parse(MATMUL, w=draw(64, 48))
    first, second = (decide(after, model, ALL) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert QuantPlan.from_json(first.to_json()).to_json() == first.to_json()


def test_the_most_sensitive_weights_get_more_bits_within_their_share(parse, after):
    text = """g (float[m, 64] x) => (float[m, 64] y) {
      n = LayerNormalization<axis=-1>(x, gain) v = MatMul(n, value) u = Mul(v, v)
      y = MatMul(u, out) }"""
    rule = Rule(id="linear", weights=("int4.g32",), sensitive="int8.g32", sensitive_share=0.5)
    model = parse(text, gain=draw(64), value=draw(64, 64), out=draw(64, 64))
    plan = decide(after, model, rule)
    assert {k: str(d.spec) for k, d in plan.decisions.items()} == {
        "value": "int8.g32.sym",
        "out": "int4.g32.sym",
    }
    assert "among the most sensitive 50% of rule 'linear'" in plan.decisions["value"].reason
    none = rule.model_copy(update={"sensitive_share": 0.4})
    assert {str(d.spec) for d in decide(after, model, none).decisions.values()} == {"int4.g32.sym"}
