"""permute: the order, and that the function stays."""

import numpy as np
import pytest

import qgraph
from qgraph import files, graph, verify
from qgraph.models.builder import FLOAT, Builder


def permuted(model, data=None):
    recipe = {"pipeline": ["canonicalize", "permute"]}
    return qgraph.optimize(model, recipe, data=data, inspect=False)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt", "tiny-cnn"])
def test_models_stay_float_equal(name):
    result = permuted(f"zoo:{name}")
    assert any(d.code == "QG214" for d in result.report.diagnostics)
    before = files.load(f"zoo:{name}")
    assert verify.equivalent(before, result.model, verify.sample_feeds(before), rtol=1e-4).ok


def pair(sizes):
    """x A → Relu → B with hidden channels of these sizes."""
    rng = np.random.default_rng(2)
    n = len(sizes)
    b = Builder("g")
    a = np.abs(rng.normal(size=(6, n))).astype("f4") * np.asarray(sizes, "f4")
    h = b.op("Relu", b.op("MatMul", b.input("x", FLOAT, ["m", 6]), b.initializer("A", a)))
    second = (rng.uniform(0.5, 1, (n, 5)) / np.asarray(sizes)[:, None]).astype("f4")
    b.output("y", b.op("MatMul", h, b.initializer("B", second)), FLOAT, ["m", 5])
    return b.model()


def columns(model):
    return np.abs(graph.array(model.graph.initializers["A"])).max(axis=0)


def test_large_channels_come_first_on_the_data():
    sizes = [1, 50, 2, 9, 1, 70, 3, 5]
    data = [
        {"x": np.abs(np.random.default_rng(i).normal(size=(4, 6))).astype("f4")} for i in range(3)
    ]
    found = columns(permuted(pair(sizes), data).model)
    assert (np.argsort(-found)[:3] == [0, 1, 2]).all() and found[0] > 10 * found[-1]


def test_without_data_the_weights_that_read_decide():
    found = columns(permuted(pair([1, 50, 2, 9, 1, 70, 3, 5])).model)
    assert found[-1] > 10 * found[0]  # small channels have large weights


def test_a_sorted_model_is_left_alone():
    once = permuted(pair([1, 50, 2, 9])).model
    again = permuted(once)
    assert not [d for d in again.report.diagnostics if d.code == "QG214"]
