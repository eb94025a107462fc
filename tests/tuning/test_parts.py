"""Latent weights, losses and written samples, each alone."""

import numpy as np
import pytest

from qgraph import models, numerics, runtime, weights
from qgraph.models.builder import FLOAT, INT64, Builder
from qgraph.spec import QTensor, QuantSpec
from qgraph.tuning import losses
from qgraph.tuning.latent import Adam, Latent
from qgraph.tuning.written import Writer

SPECS = [
    "uint2.g8.asym",
    "int4.g8",
    "uint4.ch.asym",
    "int8.tensor",
    "int4.g8.f16",
    "uint4.g16.asym",
]


def _weight(n=6, k=20):
    b = Builder("one")
    x = b.input("x", FLOAT, ["rows", k])
    w = np.random.default_rng(n).standard_normal((k, n)).astype(np.float32)
    b.output("y", b.op("MatMul", x, b.initializer("w", w)), FLOAT, ["rows", n])
    model = b.model()
    (found,) = weights.find(model)
    return model, found


def _solved(weight, text):
    spec = QuantSpec.parse(text)
    w = np.asarray(weight.read(), np.float32)
    scale, zero = numerics.min_max_grid(w, spec)
    return QTensor(spec, numerics.quantize(w, scale, zero, spec), scale, zero)


@pytest.mark.parametrize("spec", SPECS)
def test_a_latent_weight_begins_as_it_was_solved(spec):
    _, weight = _weight()
    solved = _solved(weight, spec)
    latent = Latent(weight, solved)
    np.testing.assert_array_equal(
        latent.values(), weight.matrix.back(solved.dequantize(), weight.dims)
    )
    result = latent.result()
    result.check()
    np.testing.assert_array_equal(result.codes, solved.codes)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_by_scales_are_exact(spec):
    """Of L = Σ c w, by factors of each block's scale; those by codes are c s, as if rounding were not there."""
    _, weight = _weight()
    latent = Latent(weight, _solved(weight, spec))
    c = np.random.default_rng(3).standard_normal(weight.dims).astype(np.float32)
    found = latent.gradients(c)
    step = 0.25 if "f16" in spec else 1e-2  # float16 has no smaller differences worth the name
    for place in np.ndindex(latent.moved[1].shape):
        sides = []
        for sign in (1, -1):
            latent.moved[1][place] = sign * step
            sides.append(float((c.astype(np.float64) * latent.values()).sum()))
        latent.moved[1][place] = 0
        slope = (sides[0] - sides[1]) / (2 * np.sinh(step))
        assert found[1][place] == pytest.approx(slope, rel=2e-3, abs=2e-3)
    scale = numerics.expand(latent.result().scale, latent.result().spec, *weight.shape)
    np.testing.assert_allclose(found[0], c.T * scale, rtol=1e-6)


def test_codes_and_zero_points_stay_in_their_range():
    _, weight = _weight()
    latent = Latent(weight, _solved(weight, "uint2.g8.asym"))
    latent.moved[0][:] = 100
    latent.moved[2][:] = -100
    latent.confine()
    result = latent.result()
    result.check()
    assert (result.codes == 3).all() and (result.zero_point == 0).all()


def test_adam_walks_to_the_least():
    x = np.array([3.0, -2.0])
    adam = Adam([x], [0.1])
    for _ in range(400):
        adam.step([2 * (x - [1.0, 1.0])], 1.0)
    np.testing.assert_allclose(x, 1, atol=1e-2)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "noise"])
def test_losses_and_their_gradients(kind):
    rng = np.random.default_rng(5)
    wanted, found = (rng.standard_normal((2, 3, 5)) for _ in range(2))
    if kind == "probabilities":
        wanted, found = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (wanted, found))

    def loss(y):
        if kind == "noise":
            return losses.noise(wanted, y)
        return losses.divergence(wanted, y, is_logits=kind == "logits")

    value, slope = loss(found)
    assert value > 0 and loss(wanted)[0] == pytest.approx(0, abs=1e-12)
    for place in np.ndindex(found.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = found.copy()
            moved[place] += step
            sides.append(loss(moved)[0])
        expected = (sides[0] - sides[1]) / 2e-6
        assert slope[place] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def _writer(name, **feeds):
    model = models.build(name)
    output = model.graph.outputs[0].name
    return Writer(runtime.session(model, threads=1), output, [feeds], 40)


def test_a_decoder_writes_what_it_expects():
    """Its own text surprises it less than tokens drawn at random; the same seed writes the same."""
    from qgraph.evaluate import distributions

    tokens = models.eval_tokens("tiny-gpt")[:48][None]
    writer = _writer("tiny-gpt", input_ids=tokens)
    assert writer.obstacle() == ""
    (made, *more), (again, *_) = (
        writer.write(3, np.random.default_rng(0), lambda *_: None) for _ in range(2)
    )
    np.testing.assert_array_equal(made["input_ids"], again["input_ids"])
    assert len(more) == 2 and not np.array_equal(made["input_ids"], more[0]["input_ids"])
    assert made["input_ids"].shape == (1, 40) and made["input_ids"][0, 0] == tokens[0, 0]

    def surprise(ids):
        log_p = distributions.log_softmax(writer._predict({"input_ids": ids}))[0, :-1]
        return -np.take_along_axis(log_p, ids[0, 1:, None], -1).mean()

    noise = np.random.default_rng(1).integers(0, 200, (1, 40))
    assert surprise(made["input_ids"]) < surprise(noise) - 1


def test_what_is_no_decoder_does_not_write():
    b = Builder("bag")
    ids = b.input("ids", INT64, [1, "length"])
    rng = np.random.default_rng(0)
    table = b.initializer("table", rng.standard_normal((11, 11)).astype(np.float32))
    rows = b.op("Gather", table, ids)
    mean = b.op("ReduceMean", rows, b.integers("axes", 1), keepdims=1)
    b.output("logits", b.op("Add", rows, mean), FLOAT, [1, "length", 11])
    session = runtime.session(b.model(), threads=1)
    feeds = {"ids": np.arange(5)[None]}
    assert "depend on later tokens" in Writer(session, "logits", [feeds], 5).obstacle()
