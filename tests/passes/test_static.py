"""Static INT8: where grids lie, which values share one, what is written, and what is taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import activations, errors, graph, registry, runtime
from qgraph.plan import QuantPlan
from qgraph.recipe import PRESETS, Rule, load

RNG = np.random.default_rng(0)
HEAD = "g (float[n, 4, 8, 8] x) => (float[n, c, h, w] y) {"


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


W = {name: draw(4, 4, 3, 3) for name in ("a", "b", "c")}


def conv(x: str, w: str, y: str) -> str:
    return f"{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w})"


def regions(model: ir.Model, target: str = "ort") -> activations.Regions:
    integers = registry.get("target", target).integers
    candidates = [n for n in graph.nodes(model) if n.op_type in integers.weighted]
    return activations.find(model, integers, candidates)


def groups(model: ir.Model, target: str = "ort") -> list[list[str]]:
    return [[str(v.name) for v in group] for group in regions(model, target).groups()]


def samples(count: int = 4, *shape: int) -> list[dict[str, Any]]:
    return [{"x": draw(2, *(shape or (4, 8, 8)))} for _ in range(count)]


def optimized(model: ir.Model, data: Any, **options: Any) -> qgraph.Result:
    return qgraph.optimize(model, options.pop("recipe", "int8-static"), data=data, **options)


CHAINS = {
    "relu is absorbed": (
        [conv("x", "a", "p"), "q = Relu(p)", conv("q", "b", "y")],
        [["x"], ["q"], ["y"]],
    ),
    "clip is absorbed": (
        [conv("x", "a", "p"), "q = Clip(p, low, high)", conv("q", "b", "y")],
        [["x"], ["q"], ["y"]],
    ),
    "a relu with another reader is not": (
        [conv("x", "a", "p"), "q = Relu(p)", conv("q", "b", "r"), "y = Add(p, r)"],
        [["x"], ["p"], ["q"], ["r"]],
    ),
    "pooling shares": (
        [conv("x", "a", "p"), "q = MaxPool <kernel_shape = [2, 2]> (p)", conv("q", "b", "y")],
        [["x"], ["p", "q"], ["y"]],
    ),
    "concat shares": (
        [conv("x", "a", "p"), conv("x", "b", "q"), "r = Concat <axis = 0> (p, q)", conv("r", "c", "y")],
        [["x"], ["p", "q", "r"], ["y"]],
    ),
    "a residual add has grids of its own": (
        [conv("x", "a", "p"), conv("p", "b", "q"), "r = Add(p, q)", conv("r", "c", "y")],
        [["x"], ["p"], ["q"], ["r"], ["y"]],
    ),
    "what nobody reads as codes stays float": (
        [conv("x", "a", "p"), "q = Exp(p)", "y = Sqrt(q)"],
        [["x"], ["p"]],
    ),
    "an add that takes a float stays float": (
        [conv("x", "a", "p"), "q = Exp(p)", "r = Add(p, q)", conv("r", "b", "y")],
        [["x"], ["p"], ["r"], ["y"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_grids_follow_the_dataflow(case, parse):
    lines, want = CHAINS[case]
    bounds = {"low": np.float32(0), "high": np.float32(6)} if "Clip" in str(lines) else {}
    used = {k: v for k, v in W.items() if f", {k})" in str(lines)}
    constants = {**used, **{k: np.asarray(v) for k, v in bounds.items()}}
    model = parse(f"{HEAD} {' '.join(lines)} }}", **constants)
    assert sorted(groups(model)) == sorted(want)


def test_a_linear_operator_leaves_floats_to_what_reads_floats(parse):
    model = parse(
        "g (float[n, 3, 16] x) => (float[n, 3, 16] y) { p = MatMul(x, a) q = Softmax(p) y = MatMul(q, b) }",
        a=draw(16, 16), b=draw(16, 16),
    )  # fmt: skip
    assert groups(model) == [["x"], ["q"]]


def test_moves_carry_the_grid_to_where_the_values_are_made(parse):
    model = parse(
        """g (float[n, 3, 16] x) => (float[n, 16, 3] y) {
            p = Softmax(x) q = Transpose <perm = [0, 1, 2]> (p) y = MatMul(q, a) }""",
        a=draw(16, 16),
    )
    found = regions(model)
    assert groups(model) == [["p", "q"]]
    assert [str(v.name) for v in found.roots(found.groups()[0])] == ["p"]


def test_a_value_without_a_grid_takes_its_operators_along(parse):
    text = f"{HEAD} {conv('x', 'a', 'p')} q = Relu(p) {conv('q', 'b', 'y')} }}"
    model = parse(text, a=W["a"], b=W["b"])
    integers = registry.get("target", "ort").integers
    held = [n for n in graph.nodes(model) if n.op_type == "Conv"]
    value = held[1].inputs[0]
    assert value is not None
    found = activations.find(model, integers, held, {value: "because"})
    assert not found.operators and set(found.refused) == set(held)
    assert all("because" in reason for reason in found.refused.values())


def test_a_plan_remembers_its_grids(parse):
    text = f"{HEAD} {conv('x', 'a', 'p')} q = Relu(p) {conv('q', 'b', 'y')} }}"
    plans: list[QuantPlan] = []

    class Keep(qgraph.Instrument):
        def after(self, each: Any, model: ir.Model, ctx: Any, changed: bool) -> None:
            if each.name == "assign-precision":
                plans.append(QuantPlan.from_json(ctx.plan.to_json()))
                assert plans[-1].grids == ctx.plan.grids

    optimized(parse(text, a=W["a"], b=W["b"]), samples(), instruments=[Keep()])
    assert list(plans[0].grids) == ["x", "q", "y"]


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_small_net_runs_in_integers_and_is_close(parse, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    lines = [
        conv("x", "a", "p"), "p1 = Add(p, bias)", "q = Relu(p1)", conv("q", "b", "r"), "s = Add(q, r)",
        "t = Clip(s, low, high)", "u = GlobalAveragePool(t)", "v = Flatten(u)", "k = MatMul(v, m)", "y = Add(k, n)",
    ]  # fmt: skip
    model = parse(
        f"g (float[n, 4, 8, 8] x) => (float[n, 8] y) {{ {' '.join(lines)} }}",
        a=W["a"], b=W["b"], bias=draw(4, 1, 1), m=draw(4, 8), n=draw(8),
        low=np.float32(0).reshape(()), high=np.float32(6).reshape(()),
    )  # fmt: skip
    data = samples(16)
    result = optimized(model, data, target=target)
    assert result.report.integer_macs == 1.0
    assert [o.op for o in result.report.operators] == ["Conv", "Conv", "Gemm"]
    want, got = (
        np.concatenate([runtime.session(m).run(None, f)[0] for f in data])
        for m in (model, result.to_proto())
    )
    assert qgraph.numerics.sqnr_db(want, got) > 30
    shown = {a.value: a for a in result.report.activations}
    assert (
        shown["q"].low == 0
        and np.float32(shown["t"].high) <= 6
        and "bounds of Clip" in shown["t"].reason
    )
    biases = [v for _, v in graph.initializers(result.model) if v.dtype == ir.DataType.INT32]
    assert len(biases) >= 2


@pytest.mark.parametrize("types", ["static:uint8", "static:int8", "static:int8.sym"])
def test_activations_of_the_type_that_was_asked_for(parse, types):
    text = f"{HEAD} {conv('x', 'a', 'p')} q = Relu(p) {conv('q', 'b', 'y')} }}"
    model, data = parse(text, a=W["a"], b=W["b"]), samples()
    recipe = load("int8-static", [f"conv.activations={types}"])
    result = optimized(model, data, recipe=recipe)
    name = types.split(":")[1].split(".")[0]
    assert {a.spec.split(".")[0] for a in result.report.activations} == {name}
    assert result.report.integer_macs == 1.0


def test_a_sentinel_gets_no_grid(parse):
    text = "g (float[n, 4, 8] x) => (float[n, 4, 8] y) { p = Add(x, mask) y = MatMul(p, a) }"
    mask = np.zeros((4, 8), np.float32)
    mask[:, 5:] = -1e9
    data = [{"x": draw(2, 4, 8)} for _ in range(3)]
    result = optimized(parse(text, a=draw(8, 8), mask=mask), data)
    (entry,) = result.ledger
    assert entry.code == "QG317" and "sentinel" in entry.reason and not result.report.activations


def test_static_grids_need_samples(parse):
    model = parse(f"{HEAD} {conv('x', 'a', 'y')} }}", a=W["a"])
    with pytest.raises(errors.InputError, match="QG131"):
        optimized(model, None)
    recipe = PRESETS["int8-static"].model_copy(
        update={"pipeline": PRESETS["int8-weights"].pipeline}
    )
    with pytest.raises(errors.RecipeError, match="QG318"):
        optimized(model, None, recipe=recipe)


def test_what_the_runtime_does_not_fuse_is_taken_back(parse):
    """ONNX Runtime has no integer ConvTranspose; a target that believes so learns it from the executed graph."""
    ort = registry.get("target", "ort")
    from dataclasses import replace

    from qgraph.forms.static import StaticInteger

    believing = replace(
        ort,
        integers=replace(ort.integers, weighted={**ort.integers.weighted, "ConvTranspose": False}),
        forms={**ort.forms, "conv_transpose": (StaticInteger(),)},
    )
    text = f"{HEAD} {conv('x', 'a', 'p')} q = ConvTranspose(p, b, n) {conv('q', 'c', 'y')} }}"
    model = parse(text, a=W["a"], b=W["b"], c=W["c"], n=draw(4))
    data = samples()
    result = optimized(model, data, target=believing)
    lines = {e.weight: e for e in result.ledger}
    assert lines["b"].code == "QG319" and not lines["b"].spec and lines["a"].spec
    (back,) = [n for n in graph.nodes(result.model) if n.op_type == "ConvTranspose"]
    assert all(graph.is_constant(v) and v.dtype == ir.DataType.FLOAT for v in back.inputs[1:])
    operators = {o.op: o.integer for o in result.report.operators}
    assert operators == {"Conv": True, "ConvTranspose": False}
    want, got = (
        np.concatenate([runtime.session(m).run(None, f)[0] for f in data])
        for m in (model, result.to_proto())
    )
    assert qgraph.numerics.sqnr_db(want, got) > 25


def test_a_rule_names_its_types():
    assert Rule(activations="static").is_static and not Rule(activations="int8").is_static
    for bad in ("statically", "static:int9", "uint8"):
        with pytest.raises((ValueError, errors.RecipeError)):
            Rule(activations=bad)


@pytest.mark.parametrize("recipe", ["int8-static", {"extends": "int8-static", "rules": [
    {"id": "per-tensor", "ops": ["Conv"], "weights": ["int8.tensor"], "activations": "static"}]}],
    ids=["per channel", "per tensor"])  # fmt: skip
def test_a_channel_that_training_switched_off_keeps_its_bias(parse, recipe):
    weight = W["a"].copy()
    weight[1] = 1e-20
    bias = np.array([0.1, 3.0, -0.2, 0.0], np.float32)
    text = "y = Conv <pads = [1, 1, 1, 1]> (x, a, b)"
    model = parse(f"{HEAD} {text} }}", a=weight, b=bias)
    data = samples()
    made = optimized(model, data, recipe=recipe, inspect=False)
    feeds = data[0]
    expected, found = (runtime.session(m).run(None, feeds)[0] for m in (model, made.model))
    assert np.abs(found[:, 1] - 3.0).max() < 0.2
    assert qgraph.numerics.sqnr_db(expected, found) > 30


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_operators_beside_static_grids_load_in_openvino(op, gates, parse, tmp_path):
    pytest.importorskip("openvino")
    rng = np.random.default_rng(0)
    held = {"K": (64, 64, 3), "W": (1, gates * 64, 64), "R": (1, gates * 64, 64)}
    arrays = {k: (rng.standard_normal(s) * 0.1).astype(np.float32) for k, s in held.items()}
    text = f"""g (float[1, 64, 20] x) => (float[20, 1, 1, 64] y, float[1, 64, 20] z) {{
        t = Transpose <perm = [2, 0, 1]> (x) y = {op} <hidden_size = 64> (t, W, R)
        c = Conv <pads = [1, 1]> (x, K) z = Relu(c) }}"""
    data = [{"x": rng.standard_normal((1, 64, 20)).astype(np.float32)} for _ in range(2)]
    result = qgraph.optimize(
        parse(text, **arrays),
        "int8-static",
        target="openvino",
        data=data,
        output=tmp_path / "q.onnx",
    )
    entries = {e.weight: e for e in result.report.ledger}
    assert entries["K"].runs == ["Convolution u8 activations, i8 weights"]
    for name in ("W", "R"):
        assert (entries[name].code == "QG315") == (op != "RNN")
        assert not entries[name].runs or entries[name].runs == ["RNNSeq float32"]
