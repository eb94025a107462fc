"""Recipe auto with data: what measured best is taken, by a margin; the choice is told and can be run again."""

import json
import time

import numpy as np
import pytest

import qgraph
from qgraph import auto, data, files, graph, models, pipeline, registry
from qgraph import recipe as recipes
from qgraph.auto import choosing, classes, speed, timing
from qgraph.auto.timing import Relative


@pytest.fixture(scope="module")
def digits():
    images, _ = models.eval_data()
    return [{"image": images[i : i + 1]} for i in range(16)]


@pytest.fixture(scope="module")
def lines():
    tokens = models.eval_tokens("tiny-gpt")
    return [{"input_ids": tokens[i * 100 : i * 100 + 32][None]} for i in range(4)]


def canonical(name):
    model = files.load(f"zoo:{name}")
    base = auto.calibrated(recipes.PRESETS["auto"])
    ctx = pipeline.Context(registry.get("target", "ort"), base)
    made = registry.get("pass", "canonicalize")(**base.options["canonicalize"])
    made.run(model, ctx)
    return model, base, ctx.target


def test_classes_are_kinds_and_shapes():
    found = {c.name: c for c in classes.find(*canonical("tiny-cnn"), {})}
    assert {"Conv 1x1", "Conv 3x3", "depthwise Conv 3x3"} < found.keys()
    assert found["Conv 3x3"].forms == ("float", "static")
    linear = next(c for c in found.values() if c.kind == "linear")
    assert linear.forms == ("table", "static", "dynamic", "float")
    every = [w for c in found.values() for w in c.weights]
    assert len(every) == len(set(every)) == 8
    shares = [c.share for c in classes.find(*canonical("tiny-cnn"), {})]
    assert shares == sorted(shares, reverse=True)


def test_rules_of_a_person_stay_in_front_and_out_of_the_choice():
    model, _, target = canonical("tiny-cnn")
    mine = {
        "extends": "auto",
        "rules": [{"id": "mine", "names": ["classifier*"], "weights": "float"}],
    }
    base = auto.calibrated(recipes.load(mine))
    found = classes.find(model, base, target, {})
    assert not [w for c in found for w in c.weights if w.startswith("classifier")]
    made = classes.recipe_of(base, found, {c.name: c.forms[0] for c in found})
    assert made.rules[0].id == "mine"


def test_the_recipe_names_exceptions_only():
    model, base, target = canonical("tiny-cnn")
    found = classes.find(model, base, target, {})
    forms = {c.name: "static" if "static" in c.forms else "table" for c in found}
    assert not any(r.names for r in classes.recipe_of(base, found, forms).rules)
    stem = next(c for c in found if c.name.startswith("depthwise"))
    made = classes.recipe_of(base, found, {**forms, stem.name: "float"})
    named = [r for r in made.rules if r.names]
    assert [r.names for r in named] == [stem.weights]
    assert named[0].weights == ("float",)
    assert not auto.is_measured(made)


def test_only_auto_is_measured():
    measured = {name for name, r in recipes.PRESETS.items() if auto.is_measured(r)}
    assert measured == {"auto"}
    assert auto.is_measured(recipes.load({"extends": "auto", "min_elements": 7}))


class Loop:
    """A session that takes its time."""

    def __init__(self, size):
        self._x = np.ones((size, size), np.float32)

    def run(self, names, feeds):
        for _ in range(50):
            self._x.sum(axis=0)


def test_times_are_relative_and_repeatable():
    sessions = {"a": Loop(64), "b": Loop(256), "c": Loop(64)}
    found = timing.relative(sessions, {}, seconds=0.1)
    assert found["a"].ratio == 1.0
    assert found["b"].ratio > 2
    assert 0.7 < found["c"].ratio < 1.4


@pytest.mark.skipif(timing.clock_name() == "wall", reason="the system has no fine processor clock")
def test_waiting_does_not_count():
    class Sleeper(Loop):
        def run(self, names, feeds):
            super().run(names, feeds)
            time.sleep(0.002)

    found = timing.relative({"a": Loop(128), "b": Sleeper(128)}, {}, seconds=0.02)
    assert found["b"].ratio < 2


class Script:
    """Times that a test makes up: seconds of a model by the forms of its classes."""

    def __init__(self, cost, default=1.0):
        self._cost, self._default = cost, default
        self.asked = 0

    def __call__(self, sessions, feeds, seconds=1.0):
        self.asked += 1
        times = {name: self._cost.get(name, self._default) for name in sessions}
        first = next(iter(times.values()))
        return {n: Relative(t / first, t / first, t / first, t) for n, t in times.items()}


@pytest.mark.parametrize(
    ("cost", "form"),
    [
        ({"table": 1.0, "static": 0.97, "dynamic": 0.99, "float": 1.2}, "table"),
        ({"table": 1.0, "static": 0.5, "dynamic": 0.9, "float": 1.2}, "static"),
        ({"table": 1.0, "static": 0.81, "dynamic": 0.8, "float": 1.2}, "static"),
        ({"table": 1.0, "static": 0.9, "dynamic": 0.5, "float": 1.2}, "dynamic"),
        ({"table": 3.0, "static": 3.0, "dynamic": 3.0, "float": 1.0}, "float"),
    ],
)
def test_a_form_gives_way_only_to_a_clearly_faster_one(monkeypatch, lines, cost, form):
    monkeypatch.setattr(timing, "relative", Script(cost))
    monkeypatch.setattr(choosing, "GOOD", -100.0)
    result = qgraph.optimize("zoo:tiny-gpt", "auto", data=lines, verify="off")
    chosen = {c["name"]: c["form"] for c in result.report.choice["classes"]}
    large = {n: f for n, f in chosen.items() if n.startswith(("MatMul", "Gemm"))}
    assert set(large.values()) == {form}
    entry = next(e for e in result.ledger if "MatMul" in e.operators or "Gemm" in e.operators)
    assert "time of the whole model" in entry.reason or "against float" in entry.reason


def test_convolutions_come_out_static_where_that_is_faster(monkeypatch, digits):
    monkeypatch.setattr(timing, "relative", Script({"static": 0.5, "table": 1.0}))
    result = qgraph.optimize("zoo:tiny-cnn", "auto", data=digits)
    assert result.report.integer_macs == 1.0
    assert all(e.activation for e in result.ledger)
    monkeypatch.setattr(timing, "relative", Script({"static": 1.3, "table": 1.0}))
    result = qgraph.optimize("zoo:tiny-cnn", "auto", data=digits)
    assert not any("Conv" in e.operators for e in result.report.quantized)
    reason = next(e.reason for e in result.ledger if "Conv" in e.operators)
    assert "no quantized form is faster than float" in reason


def test_products_that_cost_too_much_accuracy_go_back(monkeypatch, lines):
    monkeypatch.setattr(timing, "relative", Script({"static": 0.5}))
    monkeypatch.setattr(choosing, "GOOD", 48.0)
    monkeypatch.setattr(choosing, "SPARE", 0.1)
    result = qgraph.optimize("zoo:tiny-gpt", "auto", data=lines)
    back = result.report.choice["given_back"]
    assert back[0]["held"]
    names = {u["weight"] for u in back[0]["returned"]}
    entries = [e for e in result.ledger if e.weight in names]
    assert entries
    assert all("given back 8-bit weights, float activations" in e.reason for e in entries)
    assert not any(e.activation for e in entries)
    assert any(e.activation for e in result.ledger)


def test_floors_come_before_the_own_ones(monkeypatch, lines):
    monkeypatch.setattr(timing, "relative", Script({"static": 0.5}))
    result = qgraph.optimize("zoo:tiny-gpt", "auto", data=lines, min_sqnr=1)
    assert "given_back" not in result.report.choice


def test_the_choice_can_be_run_again(digits, tmp_path):
    first = qgraph.optimize("zoo:tiny-cnn", "auto", data=digits, output=tmp_path / "a.onnx")
    (tmp_path / "report.json").write_text(first.report.to_json())
    again = qgraph.optimize(
        "zoo:tiny-cnn", tmp_path / "report.json", data=digits, output=tmp_path / "b.onnx"
    )
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert again.report.choice == {}


def test_measured_times_stay_out_of_the_file(monkeypatch, digits, tmp_path):
    """The same choice gives the same bytes, whatever the clock said."""
    for name, cost in (("a", 0.5), ("b", 0.45)):
        monkeypatch.setattr(timing, "relative", Script({"static": cost}))
        qgraph.optimize("zoo:tiny-cnn", "auto", data=digits, output=tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_targets_that_cannot_be_timed_say_so(digits, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    result = qgraph.optimize("zoo:tiny-cnn", "auto", target=target, data=digits)
    assert result.report.latency == {}
    convs = [e for e in result.ledger if "Conv" in e.operators]
    assert all(e.activation for e in convs)
    assert f"latency is not measured for target {target}" in convs[0].reason


def test_without_data_nothing_is_measured():
    result = qgraph.optimize("zoo:tiny-cnn", "auto")
    assert result.report.choice == result.report.latency == {}
    assert not any("Conv" in e.operators for e in result.report.quantized)


def test_time_limits_the_measurement(monkeypatch, lines):
    script = Script({"static": 0.5})
    monkeypatch.setattr(timing, "relative", script)
    result = qgraph.optimize("zoo:tiny-gpt", "auto", data=lines, max_time=0, inspect=False)
    assert script.asked == 1  # whole models only
    assert result.report.quantized


def test_a_slower_model_is_told_with_the_reason(monkeypatch, digits):
    monkeypatch.setattr(timing, "relative", Script({"quantized": 1.5}))
    result = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits)
    found = [d for d in result.report.diagnostics if d.code == "QG710"]
    assert len(found) == 1
    assert "1.50x slower than the float model" in found[0].message
    assert "of its time" in result.report.latency["why"]
    assert "Conv" in result.report.latency["why"]


def test_a_faster_model_is_told_too(monkeypatch, digits):
    monkeypatch.setattr(timing, "relative", Script({"quantized": 0.5}))
    result = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits)
    assert "timed by turns in ONNX Runtime: 2.00x faster" in result.report.checks[-1]
    assert json.loads(result.report.to_json())["latency"]["ratio"] == 0.5
    assert not [d for d in result.report.diagnostics if d.code == "QG710"]


def test_the_sample_of_middle_size_is_timed():
    held = data.load(
        [{"x": np.zeros((n,), np.float32)} for n in (5, 1, 9)],
        [data.InputInfo("x", np.dtype(np.float32), (None,))],
    )
    assert speed.typical(held)["x"].shape == (5,)


def test_names_with_special_characters_are_matched_as_they_are():
    model, base, target = canonical("tiny-cnn")
    weight = next(v for _, v in graph.initializers(model) if str(v.name).startswith("depthwise"))
    weight.name = "odd[1]*?.weight"
    found = classes.find(model, base, target, {})
    held = next(c for c in found if weight.name in c.weights)
    forms = {c.name: "static" if "static" in c.forms else "table" for c in found}
    made = classes.recipe_of(base, found, {**forms, held.name: "float"})
    again = classes.find(model, made, target, {})
    assert again == []
    from qgraph import weights
    from qgraph.passes import assign_precision

    named = {w.name: assign_precision.match(made.rules, w)[1] for w in weights.find(model)}
    assert named[weight.name].weights == ("float",)


def test_options_of_a_person_are_added_to_those_of_calibration():
    mine = recipes.load("auto", ["options.canonicalize.freeze_inputs=true"])
    assert auto.is_measured(mine)
    options = auto.calibrated(mine).options["canonicalize"]
    assert options == {
        **recipes.PRESETS["int8-static"].options["canonicalize"],
        "freeze_inputs": True,
    }
