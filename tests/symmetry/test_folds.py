"""Applying a transform: what is refused, what is copied, and that the numbers are those of float64."""

import numpy as np
import pytest

from qgraph import errors, files, graph, models, symmetry, verify
from qgraph.models.builder import FLOAT, Builder
from qgraph.spool import Spool


def chain(body="Relu", tied=False):
    """x A → body → B, and B once more elsewhere if tied."""
    rng = np.random.default_rng(3)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", 6])
    h = b.op(body, b.op("MatMul", x, b.initializer("A", rng.normal(size=(6, 8)).astype("f4"))))
    second = b.initializer("B", rng.normal(size=(8, 5)).astype("f4"))
    b.output("y", b.op("MatMul", h, second), FLOAT, ["m", 5])
    if tied:
        z = b.input("z", FLOAT, ["m", 8])
        b.output("w", b.op("MatMul", z, second), FLOAT, ["m", 5])
    return b.model()


def one(model, kind):
    (group,) = symmetry.groups(model, [kind])
    return group


def data(model, name):
    return np.array(graph.array(model.graph.initializers[name]))


def refused(fn, model, group, argument):
    with pytest.raises(errors.PipelineError, match="QG210") as caught:
        fn(model, group, argument)
    return str(caught.value)


def test_scales_are_multiplied_in_float64():
    model = chain()
    a, b = data(model, "A"), data(model, "B")
    s = np.exp(np.random.default_rng(0).normal(size=8))
    done = symmetry.scale(model, one(model, "scale"), s)
    assert (done.changed, done.copied) == (2, ())
    np.testing.assert_array_equal(data(model, "A"), (a.astype("f8") * s).astype("f4"))
    np.testing.assert_array_equal(
        data(model, "B"), (b.astype("f8") * (1 / s)[:, None]).astype("f4")
    )


def test_rotations_are_applied_in_float64():
    model = chain("Identity")
    a, b = data(model, "A"), data(model, "B")
    t = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    symmetry.rotate(model, one(model, "rotate"), t)
    np.testing.assert_allclose(data(model, "A"), (a.astype("f8") @ t.T).astype("f4"), rtol=1e-6)
    np.testing.assert_allclose(data(model, "B"), (t @ b.astype("f8")).astype("f4"), rtol=1e-6)


def test_orders_are_applied():
    model = chain("Gelu")
    a, b = data(model, "A"), data(model, "B")
    order = np.random.default_rng(0).permutation(8)
    symmetry.permute(model, one(model, "permute"), order[None])
    np.testing.assert_array_equal(data(model, "A"), a[:, order])
    np.testing.assert_array_equal(data(model, "B"), b[order])


def test_what_is_not_legal_is_refused():
    model = chain("Gelu")
    text = refused(symmetry.scale, model, one(model, "scale"), np.ones(8))
    assert "may not be scaled" in text and "Gelu is not linear" in text
    assert "may not be rotated" in refused(symmetry.rotate, model, one(model, "rotate"), np.eye(8))
    model = chain()
    assert "positive" in refused(symmetry.scale, model, one(model, "scale"), -np.ones(8))
    assert "finite" in refused(symmetry.scale, model, one(model, "scale"), np.zeros(8))
    assert "8 channels, found 7" in refused(symmetry.scale, model, one(model, "scale"), np.ones(7))
    text = refused(symmetry.permute, model, one(model, "permute"), np.zeros((1, 8), np.int64))
    assert "permutations of 0..7" in text
    model = chain("Identity")
    text = refused(symmetry.rotate, model, one(model, "rotate"), 1.01 * np.eye(8))
    assert "orthogonal" in text


def test_a_gain_has_to_be_absorbed_first():
    model = models.build("tiny-llama")
    group = next(g for g in symmetry.groups(model, ["rotate"]) if g.gains)
    assert "absorb_gains first" in refused(symmetry.rotate, model, group, np.eye(group.block))


def test_a_layer_norm_needs_its_mean():
    model = models.build("tiny-gpt")
    group = next(g for g in symmetry.groups(model, ["rotate"]) if g.keeps_mean)
    symmetry.absorb_gains(model, group)
    t = np.linalg.qr(np.random.default_rng(0).normal(size=(128, 128)))[0]
    assert "T 1 = 1" in refused(symmetry.rotate, model, group, t)
    symmetry.rotate(model, group, symmetry.keep_mean(t))


def test_matrices_that_keep_the_mean():
    t = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    kept = symmetry.keep_mean(t)
    np.testing.assert_allclose(kept @ kept.T, np.eye(12), atol=1e-12)
    np.testing.assert_allclose(kept.sum(axis=1), np.ones(12), atol=1e-12)
    np.testing.assert_array_equal(symmetry.keep_mean(np.eye(12)), np.eye(12))


def test_a_weight_with_another_user_is_copied():
    model = chain(tied=True)
    before = data(model, "B")
    done = symmetry.scale(model, one(model, "scale"), np.full(8, 2.0))
    assert done.copied == ("B",)
    np.testing.assert_array_equal(data(model, "B"), before)
    np.testing.assert_array_equal(data(model, "B.folded"), before / 2)


def test_a_tied_table_is_copied_for_gains_only():
    model = models.build("tiny-gpt")
    group = next(g for g in symmetry.groups(model, ["rotate"]) if g.keeps_mean)
    assert symmetry.absorb_gains(model, group).copied == ("wte.weight",)


def test_bounds_become_one_per_channel():
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", 6])
    rng = np.random.default_rng(3)
    h = b.op("MatMul", x, b.initializer("A", rng.normal(size=(6, 8)).astype("f4")))
    h = b.op("Clip", h, b.number("zero", 0.0), b.number("six", 6.0))
    second = b.initializer("B", rng.normal(size=(8, 5)).astype("f4"))
    b.output("y", b.op("MatMul", h, second), FLOAT, ["m", 5])
    model = b.model()
    symmetry.scale(model, one(model, "scale"), np.ones(8))
    assert [n.op_type for n in model.graph] == ["MatMul", "Clip", "MatMul"]
    symmetry.scale(model, one(model, "scale"), np.arange(1.0, 9.0))
    assert [n.op_type for n in model.graph] == ["MatMul", "Relu", "Min", "MatMul"]
    bound = next(n for n in model.graph if n.op_type == "Min").inputs[1]
    np.testing.assert_array_equal(np.ravel(graph.array(bound)), 6 * np.arange(1.0, 9.0))


def test_a_lower_bound_other_than_zero_becomes_one_per_channel():
    b = Builder("g")
    rng = np.random.default_rng(3)
    h = b.op(
        "MatMul",
        b.input("x", FLOAT, ["m", 6]),
        b.initializer("A", rng.normal(size=(6, 8)).astype("f4")),
    )
    h = b.op("Clip", h, b.number("low", -1.0), b.number("six", 6.0))
    b.output(
        "y",
        b.op("MatMul", h, b.initializer("B", rng.normal(size=(8, 5)).astype("f4"))),
        FLOAT,
        ["m", 5],
    )
    model = b.model()
    before, feeds = graph.clone(model), verify.sample_feeds(model)
    symmetry.scale(model, one(model, "scale"), np.arange(1.0, 9.0))
    assert [n.op_type for n in model.graph] == ["MatMul", "Max", "Min", "MatMul"]
    bound = next(n for n in model.graph if n.op_type == "Max").inputs[1]
    np.testing.assert_array_equal(np.ravel(graph.array(bound)), -np.arange(1.0, 9.0))
    assert verify.equivalent(before, model, feeds, rtol=1e-4).ok


@pytest.mark.parametrize("spool", [None, "spool"])
def test_tensors_wait_for_their_reader_or_on_the_spool(spool, tmp_path):
    rng = np.random.default_rng(3)
    b = Builder("g")
    x = b.input("x", FLOAT, ["m", 600])
    first = rng.normal(size=(600, 700)).astype("f4")
    h = b.op("MatMul", x, b.initializer("A", first))
    b.output("y", b.op("MatMul", h, b.initializer("B", rng.normal(size=(700, 5)).astype("f4"))),
             FLOAT, ["m", 5])  # fmt: skip
    model = files.load(files.save(b.model(), tmp_path / "m.onnx", external_data=True))
    held = Spool(tmp_path) if spool else None
    group = one(model, "scale")
    symmetry.scale(model, group, np.full(700, 2.0), spool=held)
    tensor = model.graph.initializers["A"].const_value
    kind = type(tensor).__name__
    assert kind == ("Tensor" if spool else "LazyTensor")
    if spool:
        assert isinstance(tensor.numpy().base, np.memmap) or isinstance(tensor.numpy(), np.memmap)
    np.testing.assert_array_equal(tensor.numpy(), 2 * first)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_stored_type_stays(dtype):
    model = chain()
    for name in ("A", "B"):
        held = model.graph.initializers[name]
        array = np.array(graph.array(held)).astype(dtype)
        del model.graph.initializers[name]
        fresh = graph.add_initializer(model.graph, name, array)
        for node, index in list(held.uses()):
            node.replace_input_with(index, fresh)
    symmetry.scale(model, one(model, "scale"), np.full(8, 2.0))
    assert data(model, "A").dtype == dtype
