"""Channels of activations around a pass: measured, not believed."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import qgraph
from qgraph import data, files, graph, registry
from qgraph.pipeline import Context, Fact, Keeps, Pass, Pipeline
from qgraph.reaches import Reaches
from qgraph.recipe import Recipe

GAIN = np.array([8, 1, 1, 1, 0.5], np.float32)


def scaled_product():
    """y = (x g) W, with x in [-1, 1]."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 3)).astype(np.float32)
    return files.load(
        helper.make_model(
            helper.make_graph(
                [
                    helper.make_node("Mul", ["x", "g"], ["h"]),
                    helper.make_node("MatMul", ["h", "w"], ["y"]),
                ],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
                [numpy_helper.from_array(GAIN, "g"), numpy_helper.from_array(weight, "w")],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
    )


class Evens(Pass):
    """Takes the gain into the weight."""

    name = "evens"
    keeps = Keeps.FLOAT_EQUAL
    breaks = frozenset({Fact.STATS})

    def run(self, model, ctx):
        gain, weight = (model.graph.initializers[n] for n in "gw")
        g, w = graph.array(gain), graph.array(weight)
        weight.const_value = ir.tensor(g[:, None] * w, name="w")
        gain.const_value = ir.tensor(np.ones_like(g), name="g")
        return True


class Idle(Evens):
    """Does nothing."""

    name = "idle"

    def run(self, model, ctx):
        return False


class Decides(Evens):
    """Moves no channels, by what it declares."""

    name = "decides"
    breaks = frozenset()


def measure(each, samples):
    model = scaled_product()
    ctx = Context(registry.get("target", "ort"), Recipe.default())
    if samples is not None:
        ctx.data = data.load(samples, data.inputs_of(model))
    reaches = Reaches()
    Pipeline([each]).run(model, ctx, [reaches])
    assert reaches.lines == []
    return reaches.shifts


@pytest.fixture
def ones():
    return [{"x": np.full((2, 5), s, np.float32)} for s in (1.0, -1.0)]


def test_channels_before_and_after(ones):
    (shift,) = measure(Evens(), ones)
    assert (shift.value, shift.pass_name, shift.channels) == ("h", "evens", 5)
    assert (shift.before.largest, shift.before.median, shift.before.spread) == (8.0, 1.0, 8.0)
    assert (shift.after.largest, shift.after.median, shift.after.spread) == (1.0, 1.0, 1.0)
    assert shift.before.profile[0] == 0.5


def test_four_samples_are_looked_at(ones):
    later = [*ones, *ones, {"x": np.full((1, 5), 100.0, np.float32)}]
    (shift,) = measure(Evens(), later)
    assert shift.before.largest == 8.0


@pytest.mark.parametrize(
    ("each", "has_data"), [(Idle(), True), (Decides(), True), (Evens(), False)]
)
def test_nothing_to_tell(each, has_data, ones):
    assert measure(each, ones if has_data else None) == []


def test_the_report_holds_them():
    rng = np.random.default_rng(0)
    samples = [{"image": rng.random((1, 1, 8, 8), np.float32)} for _ in range(4)]
    result = qgraph.optimize("zoo:tiny-cnn", "int8-tensor", data=samples, inspect=False)
    shifts = result.report.shifts
    assert {s.pass_name for s in shifts} == {"equalize"}
    assert len(shifts) >= 3
    assert any(s.after != s.before for s in shifts)
    assert all(len(s.before.profile) == 17 for s in shifts)
