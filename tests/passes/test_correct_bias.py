"""correct-bias: the means of output channels stay those of the float model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, graph, runtime
from qgraph.recipe import PRESETS, STATIC_PIPELINE, load

RNG = np.random.default_rng(7)
HEAD = "g (float[n, 4, 8, 8] x) => (float[n, c, h, w] y) {"
DEPTHWISE = "p = Conv <group = 4, pads = [1, 1, 1, 1]> (x, a, k) q = Relu(p) y = Conv (q, b)"


@pytest.fixture(autouse=True)
def _seeded():
    """Whatever ran before, each test draws the same numbers."""
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {"a": draw(4, 1, 3, 3), "k": draw(4), "b": draw(6, 4, 1, 1)}


def samples(count: int = 6) -> list[dict[str, Any]]:
    """Inputs far from zero, so that rounding a weight shifts the mean."""
    return [{"x": np.abs(draw(1, 4, 8, 8)) + 3} for _ in range(count)]


def outputs(model: Any, data: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    session = runtime.session(model, config={"session.disable_quant_qdq": "1"})
    return np.concatenate([session.run(None, feeds)[0] for feeds in data])


def shift(model: Any, result: qgraph.Result, data: list[dict[str, Any]]) -> float:
    """Root mean square of the differences of output channels' means."""
    added = outputs(result.to_proto(), data) - outputs(model, data)
    return float(np.sqrt(np.square(added.mean(axis=(0, 2, 3))).mean()))


def without_correction() -> Any:
    pipeline = tuple(p for p in STATIC_PIPELINE if p != "correct-bias")
    return PRESETS["int8-static"].model_copy(update={"pipeline": pipeline})


def test_means_of_channels_stay(parse):
    """One large weight per channel makes the steps of the others coarse."""
    constants = {name: array.copy() for name, array in CONSTANTS.items()}
    constants["a"][:, :, 0, 0] *= 20
    constants["b"][:, 0] *= 20
    model, data = parse(f"{HEAD} {DEPTHWISE} }}", **constants), samples(16)
    kept = qgraph.optimize(model, "int8-static", data=data)
    plain = qgraph.optimize(model, without_correction(), data=data)
    assert shift(model, kept, data) < 0.3 * shift(model, plain, data)


def test_padding_counts(parse):
    """At the borders a padded convolution sums less: the mean over all places is the measured one."""
    text = f"{HEAD} y = Conv <pads = [2, 2, 2, 2], strides = [3, 3]> (x, a, k) }}"
    model, data = parse(text, a=draw(4, 4, 3, 3), k=draw(4)), samples()
    held: dict[str, Any] = {}
    _watch(model, data, held)
    added = _added(model, held, data)
    np.testing.assert_allclose(held["corrections"]["y"], added.mean(axis=(0, 2, 3)), atol=1e-5)


def _added(model: ir.Model, held: dict[str, Any], data: list[dict[str, Any]]) -> Any:
    """What the codes of weight and input change, by float arithmetic."""
    copy, grid = graph.clone(model), held["grid"]
    copy.graph.initializers["a"].const_value = ir.tensor(held["codes"], name="a")
    codes = [np.clip(np.rint(f["x"] / grid.scale) + grid.zero_point, 0, 255) for f in data]
    rounded = [{"x": np.float32((c - grid.zero_point) * grid.scale)} for c in codes]
    return outputs(copy, rounded) - outputs(model, data)


def _watch(
    model: ir.Model,
    data: Any,
    held: dict[str, Any],
    *overrides: str,
    recipe: Any = "int8-static",
    options: tuple[str, ...] = ("held_out=0",),
) -> qgraph.Result:
    """Quantize, and remember the plan as correct-bias leaves it: by default with all corrections."""
    from qgraph.pipeline import Instrument

    class After(Instrument):
        def after(self, each, work, ctx, changed):
            if each.name == "correct-bias":
                held["corrections"] = dict(ctx.plan.corrections)
                held["grid"] = ctx.plan.grids["x"]
                dims = np.asarray(graph.array(work.graph.initializers["a"])).shape
                held["codes"] = ctx.plan.solved["a"].dequantize().reshape(dims)
                held["weight"] = graph.array(work.graph.initializers["a"])

    given = (*(f"options.correct-bias.{o}" for o in options), *overrides)
    return qgraph.optimize(model, recipe, data=data, instruments=[After()], overrides=given)


def test_so_many_samples(parse):
    text = f"{HEAD} y = Conv (x, a, k) }}"
    model, data = parse(text, a=draw(4, 4, 3, 3), k=draw(4)), samples()
    held: dict[str, Any] = {}
    _watch(model, data, held, "options.correct-bias.samples=1")
    added = _added(model, held, data[:1])
    np.testing.assert_allclose(held["corrections"]["y"], added.mean(axis=(0, 2, 3)), atol=1e-5)
    with pytest.raises(errors.RecipeError, match="samples"):
        _watch(model, data, held, "options.correct-bias.samples=0")


def test_a_shared_bias_is_corrected_for_each_operator(parse):
    text = f"{HEAD} p = Conv (x, a, k) q = Conv (x, b, k) y = Add(p, q) }}"
    model = parse(text, a=draw(4, 4, 3, 3), b=draw(4, 4, 3, 3), k=draw(4))
    result = qgraph.optimize(model, "int8-static", data=samples())
    biases = [
        graph.array(n.inputs[2].producer().inputs[0])
        for n in graph.nodes(result.model)
        if n.op_type == "Conv"
    ]
    assert len(biases) == 2 and (biases[0] != biases[1]).any()


@pytest.mark.parametrize("opset", [8, 17])
def test_an_operator_without_a_bias_gets_one(parse, opset):
    """Gemm needs its third input before opset 11; Conv never does."""
    text = """g (float[n, 4, 8, 8] x) => (float[n, c] y) {
        p = Conv (x, a) q = GlobalAveragePool(p) r = Flatten(q) y = Gemm <transB = 1> (r, b, k) }"""
    constants = {"a": draw(8, 4, 3, 3), "b": draw(5, 8), "k": np.zeros(5, np.float32)}
    model, data = parse(text, opset=opset, **constants), samples()
    result = qgraph.optimize(model, "int8-static", data=data)
    conv, gemm = (n for n in graph.nodes(result.model) if n.op_type in ("Conv", "Gemm"))
    for node in (conv, gemm):
        assert graph.array(node.inputs[2].producer().inputs[0]).any()
    want, got = outputs(model, data), outputs(result.to_proto(), data)
    assert qgraph.numerics.sqnr_db(want, got) > 30
    assert [e for e in result.report.diagnostics if e.code == "QG406"]


def test_a_recipe_may_leave_it_out():
    assert "correct-bias" in load("int8-static").pipeline
    assert "correct-bias" not in load(without_correction()).pipeline


NORMED = f"""{HEAD} p = Conv (x, a) n = BatchNormalization (p, g, k, m, v) q = Relu(n) y = Conv (q, b) }}"""


def test_means_come_from_norms_where_asked(parse):
    """The inputs of the second operator are as the norm says, so both ways find the same."""
    data = [{"x": draw(4, 4, 8, 8)} for _ in range(16)]
    a, b = draw(16, 4, 1, 1), draw(6, 16, 1, 1)
    b[:, 0] *= 40  # the steps of the others are coarse
    ones, k = np.ones(16, np.float32), draw(16)
    variance = np.square(a).sum(axis=(1, 2, 3))
    model = parse(NORMED, a=a, b=b, g=ones, k=k, m=0 * ones, v=variance)
    found = {}
    for method in ("empirical", "analytic"):
        held: dict[str, Any] = {}
        _watch(model, data, held, options=("held_out=0", f"method={method}"))
        found[method] = held["corrections"]
    assert set(found["empirical"]) == {"p", "y"} or len(found["empirical"]) == 2
    assert set(found["analytic"]) == {"y"}, "nothing is known of the model's input"
    scale = np.abs(found["empirical"]["y"]).max()
    assert scale > 0
    np.testing.assert_allclose(found["analytic"]["y"], found["empirical"]["y"], atol=0.3 * scale)


def test_corrections_that_do_not_help_other_samples_are_left_out(parse):
    """The first samples are not like the others: their means are no use."""
    constants = {name: array.copy() for name, array in CONSTANTS.items()}
    constants["a"][:, :, 0, 0] *= 20
    constants["b"][:, 0] *= 20
    model = parse(f"{HEAD} {DEPTHWISE} }}", **constants)
    odd = [{"x": -f["x"]} for f in samples(6)]
    held: dict[str, Any] = {}
    done = _watch(model, odd + samples(18), held, options=("samples=6",))
    (note,) = [d.message for d in done.report.diagnostics if d.code == "QG406"]
    assert "others would not bring 6 other samples closer" in note
    assert len(held["corrections"]) < 2
    done = _watch(model, samples(24), held, options=("samples=6",))
    assert len(held["corrections"]) == 2


def test_what_is_added_behind_a_matmul_is_corrected(parse):
    """Of rank 3, so it is no Gemm; the bias is shared and each MatMul gets its own."""
    text = """g (float[n, m, 16] x) => (float[n, m, 8] y) {
        p = MatMul (x, a) q = Add (p, k) r = Relu (q) s = MatMul (r, b) y = Add (k, s) }"""
    a, b = draw(16, 8), draw(8, 8)
    a[0] *= 20  # the steps of the others are coarse
    b[0] *= 20
    model = parse(text, a=a, b=b, k=draw(8))
    data = [{"x": np.abs(draw(1, 40, 16)) + 3} for _ in range(16)]
    kept = qgraph.optimize(model, "int8-static", data=data)
    plain = qgraph.optimize(model, without_correction(), data=data)

    def shifted(result: qgraph.Result) -> float:
        added = outputs(result.to_proto(), data) - outputs(model, data)
        return float(np.abs(added.mean(axis=(0, 1))).mean())

    assert shifted(kept) < 0.4 * shifted(plain)
    constants = [
        graph.array(v)
        for n in graph.nodes(kept.model)
        if n.op_type == "Add"
        for v in n.inputs
        if graph.is_constant(v)
    ]
    assert len(constants) == 2
    assert (constants[0] != constants[1]).any()
