"""Cross-layer equalization: ranges become even, the function stays."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, graph, models, numerics, registry, runtime
from qgraph.models.builder import FLOAT, Builder
from qgraph.pipeline import Context
from qgraph.recipe import Recipe
from qgraph.spec import QuantSpec


def uneven(activation="Relu", seed=0, channels=16):
    """Conv → activation → depthwise → activation → Conv, with ranges that differ by factors of up to 100."""
    rng = np.random.default_rng(seed)
    factors = np.exp(rng.uniform(-2.3, 2.3, channels)).astype("f4")
    b = Builder("g")
    x = b.input("x", FLOAT, ["n", 3, 8, 8])

    def conv(x, name, shape, scale, group=1):
        w = rng.normal(size=shape).astype("f4") * scale
        y = b.op("Conv", x, b.initializer(name, w.astype("f4")),
                 b.initializer(f"{name}.bias", 0.1 * rng.normal(size=shape[0]).astype("f4")),
                 group=group, kernel_shape=list(shape[2:]))  # fmt: skip
        if name == "last":
            return y
        if activation == "Clip":
            return b.op("Clip", y, b.number("zero", 0.0), b.number("six", 6.0))
        return b.op(activation, y)

    h = conv(x, "first", (channels, 3, 1, 1), factors[:, None, None, None])
    h = conv(h, "depthwise", (channels, 1, 3, 3), factors[::-1, None, None, None], channels)
    b.output("y", conv(h, "last", (5, channels, 1, 1), 0.3), FLOAT, ["n", 5, 6, 6])
    return b.model()


def ranges(constants, name, axis):
    w = np.abs(constants[name])
    return w.max(axis=tuple(a for a in range(w.ndim) if a != axis))


def spread(values):
    return float(values.max() / values.min())


def test_ranges_become_even(after):
    result = after("canonicalize equalize", uneven())
    assert result.changed
    held = result.constants()
    before = {str(v.name): graph.array(v) for _, v in graph.initializers(uneven())}
    for name in ("first", "depthwise"):
        assert spread(ranges(held, name, 0)) < 0.25 * spread(ranges(before, name, 0))
    # Every channel as large, within its tensor, where it is made as where it is read.
    made, read = ranges(held, "depthwise", 0), ranges(held, "last", 1)
    np.testing.assert_allclose(made / made.max(), read / read.max(), rtol=0.02)
    (note,) = [d for d in result.ctx.diagnostics if d.code == "QG211"]
    assert note.message.startswith("scaled 2 of 2 groups of channels")


def test_weights_with_one_scale_lose_less(after):
    x = {"x": np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype("f4")}
    spec = QuantSpec.parse("int8.tensor")

    def error(model):
        expected = runtime.session(model, optimize="off").run(None, x)[0]
        work = graph.clone(model)
        for name in ("first", "depthwise", "last"):
            w = np.array(graph.array(work.graph.initializers[name]))
            scale = np.full((1, 1), np.abs(w).max() / 127, "f4")
            codes = numerics.quantize(w.reshape(1, -1), scale, None, spec)

            work.graph.initializers[name].const_value = ir.tensor(
                (codes * scale).reshape(w.shape).astype("f4"), name=name
            )
        got = runtime.session(work, optimize="off").run(None, x)[0]
        return numerics.sqnr_db(expected, got)

    model = uneven()
    assert error(after("canonicalize equalize", model).model) > error(model) + 6


def test_a_second_time_changes_nothing(after):
    once = after("canonicalize equalize", uneven()).model
    assert not after("canonicalize equalize", once).changed


def test_a_residual_net(after):
    result = after("canonicalize equalize", models.build("tiny-cnn"), clips="exact")
    assert result.changed
    assert "Min" in result.ops()


def test_bounds_are_left_alone_unless_asked(after):
    model = uneven("Clip")
    result = after("canonicalize equalize", model)
    assert not result.changed


def test_bounds_of_single_channels(after):
    result = after("canonicalize equalize", uneven("Clip"), clips="exact")
    assert result.ops() == ["Conv", "Relu", "Min"] * 2 + ["Conv"]


class TestMeasured:
    @staticmethod
    def run(model, samples):
        ctx = Context(registry.get("target", "ort"), Recipe.default(), data=samples)
        work = graph.clone(model)
        registry.get("pass", "canonicalize")().run(work, ctx)
        before = graph.clone(work)
        made = registry.get("pass", "equalize")(clips="measured")
        return before, work, ctx, made.run(work, ctx)

    @staticmethod
    def samples(scale):
        rng = np.random.default_rng(2)
        return [{"x": scale * rng.normal(size=(1, 3, 8, 8)).astype("f4")} for _ in range(6)]

    def test_channels_below_their_bound_are_scaled(self):
        _, model, ctx, changed = self.run(uneven("Clip"), self.samples(0.5))
        assert changed
        assert [n.op_type for n in model.graph] == ["Conv", "Clip"] * 2 + ["Conv"]
        proof = next(d for d in ctx.diagnostics if d.code == "QG212")
        assert "proven float-equal on 6 samples of the data" in proof.message

    def test_channels_that_meet_it_are_not(self):
        samples = self.samples(0.5)
        before, model, _, _ = self.run(uneven("Clip"), samples)
        hidden = next(n for n in before.graph if n.op_type == "Clip").outputs[0]
        before.graph.outputs[:] = [hidden]
        hidden.type = before.graph.inputs[0].type
        seen = np.concatenate(
            [runtime.session(before, optimize="off").run(None, s)[0] for s in samples]
        ).max(axis=(0, 2, 3))
        original = graph.array(uneven("Clip").graph.initializers["first"])
        now = graph.array(model.graph.initializers["first"])
        factor = np.abs(now).max(axis=(1, 2, 3)) / np.abs(original).max(axis=(1, 2, 3))
        assert (seen >= 6).any() and (seen < 6).any()
        np.testing.assert_allclose(factor[seen >= 6], 1, rtol=1e-6)
        assert (factor * seen <= 6 * (1 + 1e-5)).all()
        assert (np.abs(factor[seen < 6] - 1) > 0.01).any()

    def test_needs_samples(self):
        with pytest.raises(errors.InputError, match="QG131 equalize"):
            self.run(uneven("Clip"), None)


def test_tied_tables_are_not_copied(after):
    result = after("canonicalize equalize", models.build("tiny-gpt"))
    names = list(result.constants())
    assert not [n for n in names if n.endswith(".folded")]
