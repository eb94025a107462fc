"""Smoothing: outliers of activations move into weights, the function stays."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, evaluate, graph, models, registry, symmetry, verify
from qgraph.models.builder import FLOAT, Builder
from qgraph.pipeline import Context
from qgraph.recipe import PRESETS, Recipe

K = 32


def outliers(tail="", seed=0, factor=60.0):
    """RMSNorm whose gain has four outlier channels → linear → `tail` → linear."""
    rng = np.random.default_rng(seed)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    gain = np.ones(K, "f4")
    gain[[3, 7, 11, 30]] = factor
    w = rng.normal(size=(K, 24)).astype("f4")
    w[[3, 7, 11, 30]] /= factor
    h = b.op("SimplifiedLayerNormalization", x, b.initializer("gain", gain), axis=-1, epsilon=1e-5)
    h = b.op("MatMul", h, b.initializer("first", w))
    if tail:
        h = b.op(tail, h)
    last = b.initializer("last", rng.normal(size=(24, 8)).astype("f4"))
    b.output("y", b.op("MatMul", h, last), FLOAT, ["m", 8])
    return b.model()


def samples(count=6, rows=20):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(rows, K)).astype("f4")} for _ in range(count)]


def smooth(model, data=None, **options):
    """The model after canonicalize and smooth, proven equal; whether anything changed, and the context."""
    data = samples() if data is None else data
    ctx = Context(registry.get("target", "ort"), Recipe.default(), data=data)
    work = graph.clone(model)
    registry.get("pass", "canonicalize")().run(work, ctx)
    before = graph.clone(work)
    changed = registry.get("pass", "smooth")(**options).run(work, ctx)
    verify.check(work)
    same = verify.equivalent(before, work, list(data)[:2], rtol=1e-4)
    assert same.ok, same.reason
    return work, changed, ctx


def constant(model, name):
    return np.array(graph.array(model.graph.initializers[name]))


def test_outliers_move_into_the_weights():
    model, changed, ctx = smooth(outliers())
    assert changed
    gain, w = np.abs(constant(model, "gain")), np.abs(constant(model, "first")).max(axis=1)
    assert gain.max() / np.median(gain) < 4
    assert w.max() / w.min() < 10
    (note,) = [d for d in ctx.diagnostics if d.code == "QG213"]
    assert note.message.startswith("smoothed ") and "of 2 groups of channels" in note.message


def test_a_given_alpha_is_used():
    model, _, _ = smooth(outliers(), alpha=0.5)
    seen = np.concatenate([s["x"] for s in samples()]).astype("f8")
    normed = seen / np.sqrt(np.square(seen).mean(axis=1, keepdims=True) + 1e-5)
    gain, w = constant(outliers(), "gain"), constant(outliers(), "first")
    peak, largest = np.abs(normed * gain).max(axis=0), np.abs(w).max(axis=1)
    t = np.sqrt(peak / largest)
    t /= np.exp(np.log(t).mean())
    np.testing.assert_allclose(constant(model, "gain"), gain / t, rtol=1e-4)


def test_what_is_best_as_it_is_stays():
    rng = np.random.default_rng(0)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    w = rng.choice([-1.0, 1.0], (K, 24)).astype("f4")
    h = b.op("SimplifiedLayerNormalization", x, b.initializer("gain", np.ones(K, "f4")), axis=-1)
    b.output("y", b.op("MatMul", h, b.initializer("first", w)), FLOAT, ["m", 24])
    flat = [{"x": rng.choice([-1.0, 1.0], (20, K)).astype("f4")} for _ in range(4)]
    _, changed, ctx = smooth(b.model(), flat)
    assert not changed
    assert not [d for d in ctx.diagnostics if d.code == "QG213"]


def test_an_explicit_operator_only_if_asked():
    """Behind a Gelu nothing can take the factor."""
    rng = np.random.default_rng(0)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    first = rng.normal(size=(K, 24)).astype("f4")
    first[:, [2, 9]] *= 80
    last = rng.normal(size=(24, 8)).astype("f4")
    last[[2, 9]] /= 80
    h = b.op("Gelu", b.op("MatMul", x, b.initializer("first", first)))
    b.output("y", b.op("MatMul", h, b.initializer("last", last)), FLOAT, ["m", 8])
    model = b.model()
    plain, _, _ = smooth(model)
    assert "Mul" not in [n.op_type for n in plain.graph]
    work, changed, _ = smooth(model, insert=True)
    assert changed
    (node,) = [n for n in work.graph if n.op_type == "Mul" and n.inputs[0].producer()]
    factor = constant(work, node.inputs[1].name)
    assert factor[[2, 9]].max() < 0.2 * np.median(factor)


def test_operators_that_got_no_factor_are_taken_back():
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    w = np.random.default_rng(0).choice([-1.0, 1.0], (K, 8)).astype("f4")
    b.output("y", b.op("MatMul", x, b.initializer("w", w)), FLOAT, ["m", 8])
    flat = [{"x": np.where(s["x"] > 0, 1, -1).astype("f4")} for s in samples()]
    work, changed, _ = smooth(b.model(), flat, insert=True)
    assert not changed
    assert [n.op_type for n in work.graph] == ["MatMul"]
    assert list(work.graph.initializers) == ["w"]


def test_needs_samples():
    ctx = Context(registry.get("target", "ort"), Recipe.default())
    with pytest.raises(errors.InputError, match="QG131 smooth"):
        registry.get("pass", "smooth")().run(models.build("tiny-llama"), ctx)


def stressed(name, factor=30.0, count=4):
    """Function-preserving outliers: some channels of every group that a norm's gain begins, times `factor`."""
    model = models.build(name)
    registry.get("pass", "canonicalize")().run(
        model, Context(registry.get("target", "ort"), Recipe.default())
    )
    rng = np.random.default_rng(5)
    for group in symmetry.groups(model, ["scale"]):
        is_norm = any(m.node.op_type in ("Mul", "LayerNormalization") for m in group.writers)
        if group.legal and is_norm and not symmetry.would_copy(group):
            s = np.ones(group.size)
            s[rng.permutation(group.size)[:count]] = factor
            symmetry.scale(model, group, s)
    return model


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt"])
def test_a_stressed_decoder_returns_to_what_it_was(name, tmp_path):
    """Plain static INT8 is far off with four outlier channels per norm, and smoothing takes that back."""
    import qgraph

    tokens = models.eval_tokens(name)
    length = 128
    texts = [tokens[i * length : (i + 1) * length] for i in range(40)]
    data = [{"input_ids": t[None].astype(np.int64)} for t in texts[:24]]
    reference = models.build(name)

    def kl(model, recipe):
        path = tmp_path / "q.onnx"
        qgraph.optimize(model, recipe, data=data, output=path, force=True)
        found = evaluate.divergence(reference, path, texts[24:], length)
        return found.divergence.kl_mean.value

    plain = kl(models.build(name), "int8-static")
    stress = stressed(name)
    collapsed, smoothed = kl(stress, "int8-static"), kl(stress, "int8-smooth")
    assert collapsed > 5 * plain
    assert smoothed < 1.5 * plain


def test_recipe_is_static_with_smoothing():
    assert PRESETS["int8-smooth"].pipeline[1] == "smooth"
    assert PRESETS["int8-smooth"].rules == PRESETS["int8-static"].rules


def test_weights_of_convolutions_are_smoothed_too():
    rng = np.random.default_rng(0)
    b = Builder("g")
    x = b.input("x", FLOAT, ["n", 3, 6, 6])
    first = rng.normal(size=(16, 3, 1, 1)).astype("f4")
    first[[2, 9]] *= 50
    last = rng.normal(size=(5, 16, 3, 3)).astype("f4")
    last[:, [2, 9]] /= 50
    h = b.op("Relu", b.op("Conv", x, b.initializer("first", first), kernel_shape=[1, 1]))
    b.output("y", b.op("Conv", h, b.initializer("last", last), kernel_shape=[3, 3]), FLOAT,
             ["n", 5, 4, 4])  # fmt: skip
    data = [{"x": rng.normal(size=(1, 3, 6, 6)).astype("f4")} for _ in range(6)]
    model, changed, _ = smooth(b.model(), data)
    assert changed
    made = np.abs(constant(model, "first")).max(axis=(1, 2, 3))
    assert made.max() / np.median(made) < 10
    assert isinstance(model, ir.Model)
