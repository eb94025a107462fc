"""DynamicQuantizeLSTM: every attribute and input of LSTM, in bodies, shared, in every opset and in both runtimes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import qgraph
from qgraph import files, graph, numerics, runtime
from qgraph.forms.lstm import DynamicLstm

sys.path.insert(0, str(Path(__file__).parent))
import recurrence

Array = np.ndarray[Any, Any]
H, I, T, N = 64, 72, 5, 3
LEAST_DB = 30.0
"""What int8 activations leave of an LSTM's outputs; measured 34 to 42 dB."""


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """An LSTM: its direction and further attributes, and which of its optional inputs it has."""

    direction: str = "forward"
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("B",)
    lengths: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def weights(self) -> dict[str, Array]:
        d = self.count
        held = {"W": draw(1, d, 4 * H, I) * 0.15, "R": draw(2, d, 4 * H, H) * 0.15}
        extra = {"B": draw(3, d, 8 * H) * 0.2, "P": draw(4, d, 3 * H) * 0.3}
        return held | {k: v for k, v in extra.items() if k in self.inputs}

    def feeds(self, seed: int = 0) -> dict[str, Array]:
        found = {"x": draw(10 + seed, T, N, I)}
        if "h0" in self.inputs:
            found |= {"h0": draw(20 + seed, self.count, N, H) * 0.5}
        if "c0" in self.inputs:
            found |= {"c0": draw(30 + seed, self.count, N, H)}
        return found | ({"lengths": np.array(self.lengths, np.int32)} if self.lengths else {})

    def text(self) -> str:
        has = {*self.inputs, *(("lengths",) if self.lengths else ())}
        names = [n if n in has else "" for n in ("B", "lengths", "h0", "c0", "P")]
        while names and not names[-1]:
            names.pop()
        shapes = {"h0": f"float[d, b, {H}]", "c0": f"float[d, b, {H}]", "lengths": "int32[b]"}
        declared = "".join(f", {s} {n}" for n, s in shapes.items() if n in has)
        attributes = {"hidden_size": H, "direction": self.direction, **self.attributes}
        written = ", ".join(f"{k} = {_literal(v)}" for k, v in attributes.items())
        called = ", ".join(["x", "W", "R", *names])
        return f"""g (float[t, b, {I}] x{declared}) =>
            (float[t, d1, b, {H}] y, float[d2, b, {H}] h, float[d3, b, {H}] c)
            {{ y, h, c = LSTM <{written}> ({called}) }}"""

    def reference(self, w: Array, r: Array, feeds: dict[str, Array]) -> list[Array]:
        held = self.weights()
        attributes = {k: v for k, v in self.attributes.items() if k != "layout"}
        return recurrence.lstm(
            feeds["x"], w, r, held.get("B"), feeds.get("lengths"), feeds.get("h0"),
            feeds.get("c0"), held.get("P"), direction=self.direction, **attributes,
        )  # fmt: skip


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else str(value)


CASES = {
    "forward": Case(),
    "reverse": Case("reverse"),
    "bidirectional": Case("bidirectional"),
    "no-bias": Case(inputs=()),
    "peepholes": Case(inputs=("B", "P")),
    "peepholes-both-ways": Case("bidirectional", inputs=("P",)),
    "lengths": Case(lengths=(3, 5, 1)),
    "lengths-backwards": Case("reverse", lengths=(3, 5, 1)),
    "lengths-both-ways": Case("bidirectional", lengths=(3, 5, 1)),
    "states": Case(inputs=("B", "h0", "c0")),
    "cell-state": Case(inputs=("c0",)),
    "everything": Case("bidirectional", {"clip": 3.0}, ("B", "h0", "c0", "P"), (2, 5, 4)),
    "clip": Case(attributes={"clip": 1.5}),
    "input-forget": Case(attributes={"input_forget": 1}),
    "activations": Case(attributes={"activations": ["Sigmoid", "Softsign", "Relu"]}),
    "activations-both-ways": Case(
        "bidirectional",
        {"activations": ["Sigmoid", "Softsign", "Tanh", "Sigmoid", "Tanh", "Softsign"]},
    ),
    "layout-0": Case(attributes={"layout": 0}),
}
SPECS = ("int8.ch", "int8.tensor", "uint8.tensor", "int8.tensor.asym", "uint8.ch.sym")


def dequantized(written: Any) -> tuple[Array, Array]:
    """W [D, 4H, I] and R [D, 4H, H] as the reference model holds them."""
    held = {str(v.name): v for _, v in graph.initializers(written.reference)}
    return np.asarray(graph.array(held["W"])), np.asarray(graph.array(held["R"]))


def check(want: list[Array], got: list[Array]) -> None:
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        assert numerics.sqnr_db(a, b) >= LEAST_DB
        assert np.abs(a - b).max() <= 0.06 * max(np.abs(a).max(), 1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spec", SPECS)
def test_is_the_lstm_on_the_dequantized_weights(write, name, spec):
    case = CASES[name]
    written = write(DynamicLstm(), spec, case.text(), activations="int8", **case.weights())
    assert not written.reasons and written.ops() == ["DynamicQuantizeLSTM"]
    w, r = dequantized(written)
    for seed in range(2):
        feeds = case.feeds(seed)
        want = case.reference(w, r, feeds)
        # The reference is ONNX Runtime's own, before it judges anything.
        for a, b in zip(want, written.expected(feeds), strict=True):
            assert np.abs(a - b).max() <= 2e-5
        for optimize in ("off", "all"):
            session = runtime.session(written.model, threads=1, optimize=optimize)
            check(want, session.run(None, feeds))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spec", SPECS[:3])
def test_is_the_same_in_the_oldest_runtime(write, old, name, spec):
    case = CASES[name]
    written = write(DynamicLstm(), spec, case.text(), activations="int8", **case.weights())
    feeds = case.feeds()
    w, r = dequantized(written)
    got = old.run(files.to_proto(written.model).SerializeToString(), [feeds])[0]
    check(case.reference(w, r, feeds), list(got.values()))


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("rows", [1, 9])
def test_any_number_of_steps_and_rows(write, steps, rows):
    case = CASES["bidirectional"]
    written = write(DynamicLstm(), "int8.ch", case.text(), activations="int8", **case.weights())
    feeds = {"x": draw(50, steps, rows, I)}
    session = runtime.session(written.model, threads=1)
    check(case.reference(*dequantized(written), feeds), session.run(None, feeds))


def test_rows_of_length_zero_are_what_the_float_lstm_gives(write):
    case = Case(lengths=(3, 0, 2))
    written = write(DynamicLstm(), "int8.ch", case.text(), activations="int8", **case.weights())
    feeds = case.feeds()
    got = runtime.session(written.model, threads=1).run(None, feeds)
    check(written.expected(feeds), got)
    assert not got[0][:, :, 1].any()


def test_codes_scales_and_zero_points(write):
    case = CASES["bidirectional"]
    text, weights = case.text(), case.weights()
    channels = write(DynamicLstm(), "int8.ch", text, activations="int8", **weights).constants()
    tensor = write(DynamicLstm(), "uint8.tensor", text, activations="int8", **weights).constants()
    for name, k in (("W", I), ("R", H)):
        assert channels[f"{name}.codes"] == ("INT8", (2, k, 4 * H))
        assert channels[f"{name}.scale"] == ("FLOAT", (2, 4 * H))
        assert channels[f"{name}.zero_point"] == ("INT8", (2, 4 * H))
        assert tensor[f"{name}.codes"] == ("UINT8", (2, k, 4 * H))
        assert tensor[f"{name}.scale"] == ("FLOAT", (2,))
        assert tensor[f"{name}.zero_point"] == ("UINT8", (2,))


# One pair of weights, in both branches of an If and in a Loop.
CALL = f"LSTM <hidden_size = {H}> "
BRANCHES = f"""g (bool q, float[t, b, {I}] x) => (float[t, 1, b, {H}] y)
{{ y = If (q) <then_branch = a () => (float[t, 1, b, {H}] ya) {{ ya = {CALL}(x, W, R, B) }},
   else_branch = n () => (float[t, 1, b, {H}] yb) {{ e = Neg(x) yb = {CALL}(e, W, R) }}> }}"""
LOOP = f"""g (int64 m, bool q, float[b, {I}] x, float[1, b, {H}] h0, float[1, b, {H}] c0) =>
  (float[1, b, {H}] h, float[1, b, {H}] c, float[m, 1, 1, b, {H}] ys)
{{ h, c, ys = Loop (m, q, h0, c0) <body = turn (int64 i, bool go, float[1, b, {H}] hi, float[1, b, {H}] ci)
   => (bool on, float[1, b, {H}] ho, float[1, b, {H}] co, float[1, 1, b, {H}] yo)
   {{ on = Identity(go) axis = Constant <value_ints = [0]> () s = Unsqueeze(x, axis)
      yo, ho, co = {CALL}(s, W, R, B, , hi, ci) }}> }}"""
NESTED = f"""g (bool q, float[t, b, {I}] x) => (float[t, 1, b, {H}] y)
{{ y = If (q) <then_branch = a () => (float[t, 1, b, {H}] ya) {{
     ya = If (q) <then_branch = aa () => (float[t, 1, b, {H}] u) {{ u = {CALL}(x, W, R, B) }},
                  else_branch = ab () => (float[t, 1, b, {H}] v) {{ v = {CALL}(x, W, R, B) }}> }},
   else_branch = n () => (float[t, 1, b, {H}] yb) {{ yb = {CALL}(x, W, R, B) }}> }}"""
YES, NO = np.array(True), np.array(False)
X = draw(60, T, N, I)
STATES = {"h0": draw(61, 1, N, H) * 0.5, "c0": draw(62, 1, N, H)}
BODIES: dict[str, tuple[str, int, list[dict[str, Array]]]] = {
    "if": (BRANCHES, 2, [{"q": YES, "x": X}, {"q": NO, "x": X}]),
    "loop": (LOOP, 1, [{"m": np.array(7), "q": YES, "x": X[0], **STATES}]),
    "nested": (NESTED, 3, [{"q": YES, "x": X}, {"q": NO, "x": X}]),
}


@pytest.mark.parametrize("name", BODIES)
def test_in_bodies_the_weights_stay_shared(write, name):
    text, count, samples = BODIES[name]
    written = write(DynamicLstm(), "int8.ch", text, activations="int8", **Case().weights())
    assert not written.reasons and written.ops().count("DynamicQuantizeLSTM") == count
    assert [k for k in written.constants() if ".codes" in k] == ["R.codes", "W.codes"]
    session = runtime.session(written.model, threads=1)
    for feeds in samples:
        check(written.expected(feeds), session.run(None, feeds))


@pytest.mark.parametrize("name", BODIES)
def test_in_bodies_of_the_oldest_runtime(write, old, name):
    text, _, samples = BODIES[name]
    written = write(DynamicLstm(), "int8.ch", text, activations="int8", **Case().weights())
    got = old.run(files.to_proto(written.model).SerializeToString(), samples)
    for feeds, outputs in zip(samples, got, strict=True):
        check(written.expected(feeds), list(outputs.values()))


def model(text: str, opset: int = 17, **constants: Array) -> onnx.ModelProto:
    ir_version = 4 if opset < 11 else 8 if opset < 21 else 10
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    proto = onnx.parser.parse_model(f"{head}\n{text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    return proto


def executed(path: Path, tmp_path: Path) -> list[str]:
    """Operator types of the optimized graph, bodies included, read without qgraph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    onnxruntime.InferenceSession(str(path), options)
    found, todo = [], [onnx.load(tmp_path / "executed.onnx").graph]
    while todo:
        for node in todo.pop().node:
            found.append(node.op_type)
            todo += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


@pytest.mark.parametrize("opset", range(9, 25))
def test_every_opset(opset, tmp_path):
    case = CASES["everything"]
    result = qgraph.optimize(
        model(case.text(), opset, **case.weights()), "auto", output=tmp_path / "q.onnx"
    )
    assert [e.runs for e in result.report.ledger] == [["DynamicQuantizeLSTM"]] * 2
    imports = {o.domain: o.version for o in onnx.load(tmp_path / "q.onnx").opset_import}
    assert imports["com.microsoft"] == 1 and imports[""] >= min(opset, 10)
    feeds = case.feeds()
    got = runtime.session(tmp_path / "q.onnx", threads=1).run(None, feeds)
    check(case.reference(*list(case.weights().values())[:2], feeds), got)


@pytest.mark.parametrize("target", ["ort", "ort-qgraph"])
@pytest.mark.parametrize("recipe", ["auto", "int8-dynamic", "int8-static"])
def test_recipes_take_it_where_onnxruntime_runs(recipe, target, tmp_path):
    case = CASES["everything"]
    proto = model(case.text(), **case.weights())
    data = [case.feeds(seed) for seed in range(3)]
    result = qgraph.optimize(proto, recipe, target=target, data=data, output=tmp_path / "q.onnx")
    for entry in result.report.ledger:
        assert entry.forms == ["dynamic-lstm"] and entry.runs == ["DynamicQuantizeLSTM"]
        assert entry.spec == "int8.ch.sym" and entry.activation and not entry.code
        assert "integer kernel" in entry.reason
    assert executed(tmp_path / "q.onnx", tmp_path).count("DynamicQuantizeLSTM") == 1
    operators = {o.op: o for o in result.report.operators}
    assert result.report.integer_macs == 1.0
    assert operators["LSTM"].macs == T * N * 2 * 4 * H * (I + H) and operators["LSTM"].integer


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("recipe", ["auto", "int8-dynamic"])
def test_other_targets_keep_dequantize_linear(recipe, target):
    case = Case()
    result = qgraph.optimize(
        model(case.text(), **case.weights()), recipe, target=target, inspect=False
    )
    assert [e.forms for e in result.report.ledger] == [["dequantize-linear"]] * 2


@pytest.mark.parametrize("recipe", ["int8-weights", "int4"])
def test_recipes_for_weights_alone_keep_activations_float(recipe):
    case = Case()
    result = qgraph.optimize(model(case.text(), **case.weights()), recipe, inspect=False)
    assert [e.forms for e in result.report.ledger] == [["dequantize-linear"]] * 2


def small(op: str, gates: int, hidden: int, width: int, shape: str = "t, b") -> onnx.ModelProto:
    text = f"""g (float[{shape}, {width}] x) => (float[t1, d, b1, {hidden}] y)
        {{ y = {op} <hidden_size = {hidden}> (x, W, R) }}"""
    return model(text, W=draw(70, 1, gates * hidden, width), R=draw(71, 1, gates * hidden, hidden))


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (small("GRU", 3, 128, 128), "no integer kernel for GRU"),
        (small("RNN", 1, 128, 128), "no integer kernel for RNN"),
        (small("LSTM", 4, 48, 40), "hidden size 48 and 16896 elements"),
        (small("LSTM", 4, 16, 1024), "hidden size 16"),
        (small("LSTM", 4, 64, 64, "1, 1"), "98304 for one step of one row"),
    ],
    ids=["gru", "rnn", "small", "narrow", "one-row"],
)
@pytest.mark.parametrize("recipe", ["auto", "int8-dynamic"])
def test_stays_float_where_nothing_is_gained(proto, reason, recipe):
    result = qgraph.optimize(proto, recipe, inspect=False)
    for entry in result.report.ledger:
        assert not entry.spec and entry.code == "QG315" and reason in entry.reason
        assert "slower than float" in entry.reason and "int8-weights" in entry.reason


def rule(names: str, *weights: str) -> dict[str, Any]:
    return {"names": [names], "weights": list(weights), "activations": "int8"}


@pytest.mark.parametrize("kept", ["W", "R"])
def test_both_weights_or_none(kept):
    """Where a rule keeps one weight float, the other falls back to what can be written for it alone."""
    case = Case()
    recipe = {"rules": [rule(kept, "float"), {"weights": ["auto"]}]}
    result = qgraph.optimize(model(case.text(), **case.weights()), recipe, inspect=False)
    entries = {e.weight: e for e in result.report.ledger}
    assert not entries[kept].spec
    other = entries["R" if kept == "W" else "W"]
    assert not other.spec and f"dynamic-lstm: needs {kept} in the same form" in other.reason


def test_weights_that_are_computed_stay_away():
    text = f"""g (float[t, b, {I}] x, float[1, {4 * H}, {H}] R) => (float[t, 1, b, {H}] y)
        {{ y = {CALL}(x, W, R) }}"""
    result = qgraph.optimize(model(text, W=draw(1, 1, 4 * H, I)), "auto", inspect=False)
    (entry,) = result.report.ledger
    assert not entry.spec and "needs R in the same form" in entry.reason


def test_sequences_with_rows_first_are_refused(write):
    text = f"""g (float[b, t, {I}] x) => (float[b, t, 1, {H}] y)
        {{ y = LSTM <hidden_size = {H}, layout = 1> (x, W, R) }}"""
    held = {k: Case().weights()[k] for k in ("W", "R")}
    written = write(DynamicLstm(), "int8.ch", text, activations="int8", **held)
    assert len(written.reasons) == 2 and all("layout 0" in r for r in written.reasons)


def test_an_lstm_without_its_first_output_is_found(tmp_path):
    """torch drops what nobody reads; the ledger and the count of multiplications go by the outputs that are left."""
    text = f"""g (float[t, b, {I}] x) => (float[1, b, {H}] h) {{ _, h = {CALL}(x, W, R) }}"""
    proto = model(text.replace("_, h", "unread, h"), W=draw(1, 1, 4 * H, I), R=draw(2, 1, 4 * H, H))
    proto.graph.node[0].output[0] = ""
    result = qgraph.optimize(proto, "int8-static", data=[{"x": X}] * 2, output=tmp_path / "q.onnx")
    assert [e.runs for e in result.report.ledger] == [["DynamicQuantizeLSTM"]] * 2
    assert result.report.integer_macs == 1.0
    assert result.report.operators[0].macs == T * N * 4 * H * (I + H)
