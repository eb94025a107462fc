"""tune: outputs come closer on samples that it has not seen, or weights stay as they are."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, graph, models, weights
from qgraph.gradients import Tape
from qgraph.models.builder import BOOL, FLOAT, Builder
from qgraph.recipe.presets import TUNED_PIPELINE

SAMPLES, LENGTH = 12, 64


def tokens(count=SAMPLES):
    """Windows of held-out text."""
    ids = models.eval_tokens("tiny-gpt")[: count * LENGTH].reshape(count, 1, LENGTH)
    return [{"input_ids": each} for each in ids]


def recipe(spec="uint2.g32.asym", **tune):
    """Everything that multiplies in one format, solved without data."""
    return {
        "name": "tuned",
        "pipeline": list(TUNED_PIPELINE),
        "rules": [{"id": "linear", "ops": ["MatMul", "Gemm"], "weights": spec}],
        "options": {"tune": {"epochs": 2, "batch": 2, "held_out": 3, **tune}},
        "min_elements": 1,
    }


def untuned():
    """The same without the pass."""
    made = recipe()
    made["pipeline"].remove("tune")
    del made["options"]
    return made


def optimize(model, data, **options):
    """A tuned result."""
    target = options.pop("target", "ort")
    return qgraph.optimize(model, recipe(**options), target=target, data=data, threads=1)


def finding(result, code="QG413"):
    """The pass's own finding."""
    (found,) = [d for d in result.report.diagnostics if d.code == code]
    return found


def test_tuned_weights_are_closer_on_other_text():
    """KL divergence on text that neither taught nor judged; and the same bytes again."""
    from qgraph import evaluate

    data = tokens()
    tuned = optimize("zoo:tiny-gpt", data, epochs=6)
    assert finding(tuned).severity == "note"
    solved = qgraph.optimize("zoo:tiny-gpt", untuned(), target="ort", threads=1)
    other = models.eval_tokens("tiny-gpt")[4096 : 4096 + 8 * LENGTH]
    before, after = (
        evaluate.divergence("zoo:tiny-gpt", r.model, other, LENGTH).divergence.kl_mean.value
        for r in (solved, tuned)
    )
    assert after < 0.92 * before
    again = optimize("zoo:tiny-gpt", data, epochs=6)
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == ir.to_proto(
        tuned.model
    ).SerializeToString(deterministic=True)


def test_what_does_not_help_is_not_kept():
    """Steps far too large make everything worse: the result is that of the solvers, and the report says so."""
    made = optimize("zoo:tiny-gpt", tokens(), code_rate=4.0, scale_rate=1.0, epochs=1)
    assert finding(made).severity == "warning" and "stay as solved" in finding(made).message
    solved = qgraph.optimize("zoo:tiny-gpt", untuned(), target="ort", threads=1)
    for name, value in solved.model.graph.initializers.items():
        held = made.model.graph.initializers[name]
        np.testing.assert_array_equal(graph.array(held), graph.array(value))


def test_a_decoder_writes_samples_for_itself():
    made = optimize("zoo:tiny-gpt", tokens(3), written=2, epochs=1)
    assert not [d for d in made.report.diagnostics if d.code == "QG412"]


def network(op=None, size=32):
    """Two layers with an operator in between."""
    rng = np.random.default_rng(0)
    b = Builder("network")
    x = b.input("x", FLOAT, ["rows", size])
    w = [b.initializer(n, rng.standard_normal((size, size)).astype(np.float32) / 6) for n in "vw"]
    h = b.op("MatMul", x, w[0])
    h = op(b, h) if op else b.op("Relu", h)
    b.output("y", b.op("MatMul", h, w[1]), FLOAT, ["rows", size])
    return b.model()


def rows(count=8, size=32):
    """Samples of it."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((16, size)).astype(np.float32)} for _ in range(count)]


def test_outputs_that_are_no_predictions_count_as_noise():
    """And such a model does not write samples, which is told."""
    made = optimize(network(), rows(), epochs=4, written=3, code_rate=0.05)
    assert "share of noise" in finding(made).message and finding(made).severity == "note"
    assert "cannot write samples" in finding(made, "QG412").message


@pytest.mark.parametrize("activations", ["", "int4"])  # qgraph's operator rounds to int8 by itself
def test_rounded_activations_are_rounded_meanwhile(activations):
    """Gradients pass through roundings of inputs as if they were not there."""
    given = recipe("int4.g32.f16", epochs=4, code_rate=0.05)
    if activations:
        given["rules"][0]["activations"] = activations
    data = rows(size=256)
    made = qgraph.optimize(network(size=256), given, target="ort-qgraph", data=data, threads=1)
    assert finding(made).severity == "note"


def test_bad_input_is_told():
    with pytest.raises(errors.InputError, match="QG131"):
        optimize(network(), None)
    with pytest.raises(errors.InputError, match="QG411.*single sample"):
        optimize(network(), rows(1))


def test_weights_behind_what_has_no_rule_stay():
    """The first layer's weight is the solver's, the second one is tuned."""
    made = optimize(
        network(lambda b, h: b.op("Mod", h, b.number("ten", 10), fmod=1)), rows(), epochs=4
    )
    left = finding(made, "QG410")
    assert "1 weights stay" in left.message and "no gradient passes Mod" in left.message
    solved = qgraph.optimize(network(), untuned(), target="ort", threads=1)
    same = [
        np.array_equal(graph.array(made.model.graph.initializers[n]), graph.array(v))
        for n, v in sorted(solved.model.graph.initializers.items())
        if "scale" in n
    ]
    assert sorted(same) == [False, True]


def test_gradients_of_a_whole_model():
    """Against differences of the loss along one direction, through every kind of node in between."""
    model = models.build("tiny-llama")
    names = [w.name for w in weights.find(model)]
    values = {str(v.name): graph.array(v) for _, v in graph.initializers(model)}
    held = {n: np.asarray(values[n], np.float32) for n in names}
    tape = Tape(model, names, threads=1)
    feeds = {"input_ids": models.eval_tokens("tiny-llama")[:24][None]}
    run = tape.run(feeds, held)
    output = tape.outputs[0]
    c = np.random.default_rng(0).standard_normal(run.values[output].shape).astype(np.float32)
    found = run.gradients({output: c})
    assert set(found) == set(names)
    for name in names[:: len(names) // 6]:
        way = np.random.default_rng(1).standard_normal(held[name].shape).astype(np.float32)
        way *= held[name].std()
        sides = []
        for step in (1e-2, -1e-2):
            y = tape.run(feeds, {**held, name: held[name] + np.float32(step) * way}).values[output]
            sides.append(float((y.astype(np.float64) * c).sum()))
        slope = (sides[0] - sides[1]) / 2e-2
        got = float((found[name].astype(np.float64) * way).sum())
        size = float(np.linalg.norm(found[name]) * np.linalg.norm(way))
        assert abs(got - slope) < 2e-3 * size, name


def test_a_condition_has_no_gradient():
    """Comparisons stop the way back; what they choose between goes on."""
    b = Builder("gate")
    x = b.input("x", FLOAT, [4, 4])
    w = b.initializer("w", np.eye(4, dtype=np.float32))
    h = b.op("MatMul", x, w)
    b.output("y", b.op("Where", b.op("Greater", h, b.number("zero", 0)), h, x), FLOAT, [4, 4])
    b.output("positive", b.op("Greater", h, b.number("zero", 0)), BOOL, [4, 4])
    tape = Tape(b.model(), ["w"], threads=1)
    feeds = {"x": np.arange(-8, 8, dtype=np.float32).reshape(4, 4)}
    run = tape.run(feeds, {"w": np.eye(4, dtype=np.float32)})
    g = run.gradients({"y": np.ones((4, 4), np.float32)})["w"]
    np.testing.assert_allclose(g, feeds["x"].T @ (feeds["x"] > 0))
