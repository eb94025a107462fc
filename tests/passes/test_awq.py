"""AWQ: channels that large activations meet are scaled up in the weights, the function stays."""

import os
from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph import errors, evaluate, files, graph, models, registry, symmetry, verify
from qgraph.models.builder import FLOAT, Builder
from qgraph.models.data import eval_tokens
from qgraph.pipeline import Context
from qgraph.recipe import PRESETS, Recipe, load

DATA = Path(os.environ.get("QGRAPH_TEST_DATA", ""))
needs_data = pytest.mark.skipif(not DATA.name, reason="QGRAPH_TEST_DATA is not set")
K, LARGE = 64, [3, 17, 40, 41]


def uneven(factor=30.0):
    """RMSNorm whose gain makes four channels large, readers' rows small → linear."""
    rng = np.random.default_rng(0)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    gain, w = np.ones(K, "f4"), rng.normal(size=(K, 48)).astype("f4")
    gain[LARGE] *= factor
    w[LARGE] /= factor
    h = b.op("SimplifiedLayerNormalization", x, b.initializer("gain", gain), axis=-1, epsilon=1e-5)
    b.output("y", b.op("MatMul", h, b.initializer("w", w)), FLOAT, ["m", 48])
    return b.model()


def samples(count=6, rows=20):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(rows, K)).astype("f4")} for _ in range(count)]


def awq(model, data, recipe="int4-awq", **options):
    """The canonical model before and after the pass, proven equal; whether it changed, and the context."""
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    ctx = Context(registry.get("target", "ort"), recipe, data=data)
    work = graph.clone(files.load(model))
    registry.get("pass", "canonicalize")().run(work, ctx)
    before = graph.clone(work)
    changed = registry.get("pass", "awq")(**options).run(work, ctx)
    verify.check(work)
    same = verify.equivalent(before, work, list(data)[:2], rtol=1e-4)
    assert same.ok, same.reason
    return before, work, changed, ctx


def constant(model, name):
    return np.array(graph.array(model.graph.initializers[name]))


def test_large_channels_are_scaled_up_in_the_weights():
    _, model, changed, ctx = awq(uneven(), samples())
    assert changed
    gain, rows = constant(model, "gain"), np.abs(constant(model, "w")).mean(axis=1)
    assert gain[LARGE].max() < 3 * np.median(gain)
    assert rows.max() < 4 * rows.min()
    (note,) = [d for d in ctx.diagnostics if d.code == "QG217"]
    assert note.message.startswith("scaled 1 of 1 groups of channels, with alpha from ")


def test_a_given_alpha_is_used():
    _, model, _, _ = awq(uneven(), samples(), alpha=0.5)
    x = np.concatenate([s["x"] for s in samples()]).astype("f8")
    gain = constant(uneven(), "gain")
    sizes = np.abs(x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * gain).mean(axis=0)
    s = np.sqrt(sizes)
    s /= np.exp(np.log(s).mean())
    np.testing.assert_allclose(constant(model, "gain"), gain / s, rtol=1e-4)
    np.testing.assert_allclose(
        constant(model, "w"), constant(uneven(), "w") * s[:, None], rtol=1e-4
    )


def test_what_is_best_as_it_is_stays():
    rng = np.random.default_rng(0)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", K])
    w = rng.choice([-1.0, 1.0], (K, 48)).astype("f4")
    h = b.op("SimplifiedLayerNormalization", x, b.initializer("gain", np.ones(K, "f4")), axis=-1)
    b.output("y", b.op("MatMul", h, b.initializer("w", w)), FLOAT, ["m", 48])
    _, _, changed, ctx = awq(b.model(), samples())
    assert not changed
    assert not [d for d in ctx.diagnostics if d.code == "QG217"]


def test_what_stays_float_is_not_judged():
    """With rules that leave linears float there is nothing to gain."""
    rules = [{"ops": ["MatMul", "Gemm"], "weights": "float"}]
    recipe = {"pipeline": ["canonicalize", "awq"], "rules": rules}
    _, _, changed, _ = awq(uneven(), samples(), recipe)
    assert not changed


def test_depthwise_weights_that_are_quantized_are_not_judged():
    """One channel makes each of their outputs, on a scale of its own: no factor changes how they round."""
    rng = np.random.default_rng(2)
    feeds = [{"image": rng.uniform(size=(8, 1, 8, 8)).astype("f4")} for _ in range(3)]
    _, _, _, ctx = awq(
        "zoo:tiny-cnn", feeds, load("int4-awq").model_copy(update={"min_elements": 1})
    )
    (text,) = [d.message for d in ctx.diagnostics if d.code == "QG217"]
    assert "of 4 groups" in text


def test_needs_samples():
    with pytest.raises(errors.InputError, match="QG131 awq: needs samples"):
        qgraph.optimize("zoo:tiny-llama", "int4-awq", inspect=False)
    assert PRESETS["int4-awq"].needs_data and not PRESETS["int4"].needs_data


def tokens(count=6, length=128):
    return [
        {"input_ids": eval_tokens()[None, i * length : (i + 1) * length].astype(np.int64)}
        for i in range(count)
    ]


def scaled(before, after):
    """Sizes of the groups of channels whose weights have changed."""
    found = []
    for group in symmetry.groups(before, ["scale"]):
        names = {m.value.name for m in group.readers}
        moved = any((constant(before, n) != constant(after, n)).any() for n in names)
        found += [group.size] if moved and group.legal else []
    return found


@pytest.mark.parametrize(("name", "sizes"), [("tiny-llama", {64, 128, 384}), ("tiny-gpt", {128})])
def test_decoders_stay_float_equal(name, sizes):
    """Norms with all their readers, shared value heads with the output projection, up with down."""
    before, after, changed, _ = awq(f"zoo:{name}", tokens(2), alpha=0.5, rows=64)
    assert changed
    assert set(scaled(before, after)) >= sizes


@needs_data
def test_stories_stay_float_equal():
    """Tables tied to the head keep their channels; eight queries share four value heads."""
    data = [{"input_ids": np.arange(1, 65)[None]}]
    path = DATA / "lm/stories260K/stories260K.onnx"
    before, after, changed, _ = awq(path, data, alpha=0.5, rows=64)
    assert changed and set(scaled(before, after)) == {32, 64, 172}


@needs_data
def test_encoders_are_scaled_where_heads_allow_it():
    """Behind norms that stand on the stream only values take factors."""
    path = DATA / "encoder/minilm_l6_v2/minilm_l6_v2.onnx"
    ids = np.arange(1000, 1024)[None]
    data = [{"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}]
    before, after, changed, _ = awq(path, data, alpha=0.5, rows=24)
    assert changed and scaled(before, after) == [384] * 6


def stressed():
    """tiny-llama with four channels of everything that a norm's gain makes times 30, its readers divided."""
    model = models.build("tiny-llama")
    ctx = Context(registry.get("target", "ort"), load("int4"))
    registry.get("pass", "canonicalize")().run(model, ctx)
    for group in symmetry.groups(model, ["scale"]):
        if group.legal and any(m.node.op_type == "Mul" for m in group.writers):
            s = np.ones(group.size)
            s[[3, 50, 77, 120]] = 30
            symmetry.scale(model, group, s)
    return model


def test_four_bits_lose_less_than_plain_rounding():
    """On the model as trained, all linears in 4 bits, and many times less where some channels are large."""
    reference = models.build("tiny-llama")
    texts = list(eval_tokens()[32 * 128 : 48 * 128].reshape(16, 128))

    def kl(model, name):
        recipe = PRESETS[name].model_dump()
        recipe["rules"] = [{**r, "sensitive": "", "sensitive_share": 0.0} for r in recipe["rules"]]
        made = qgraph.optimize(model, recipe, data=tokens(), verify="off", inspect=False)
        found = evaluate.divergence(reference, made.model, texts, 128)
        return found.divergence.kl_mean.value

    usual = kl(reference, "int4")
    assert kl(reference, "int4-awq") < 0.97 * usual
    outliers = stressed()
    assert kl(outliers, "int4") > 4 * usual
    assert kl(outliers, "int4-awq") < 1.05 * usual


def test_recipe_is_int4_behind_awq_with_ranges_by_output_error():
    recipe = PRESETS["int4-awq"]
    assert recipe.pipeline[1] == "awq"
    (linear,) = [r for r in recipe.rules if r.id == "linear"]
    (plain,) = [r for r in PRESETS["int4"].rules if r.id == "linear"]
    assert linear == plain.model_copy(update={"solver": "clip"})
