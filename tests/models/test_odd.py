"""Every odd graph is valid ONNX, runs in ONNX Runtime and is the same each time."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qgraph import models
from qgraph.models.odd import ODD, feeds


def run(model: ir.Model, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # the unused initializer is meant
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(
        None, sample
    )


@pytest.mark.parametrize("name", ODD)
def test_is_valid_and_the_same_each_time(name):
    content = ir.to_proto(ODD[name]()).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    assert ir.to_proto(ODD[name]()).SerializeToString() == content


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("batch", "seq"), [(2, 7), (1, 4)])
def test_runs_and_keeps_its_declared_shapes(name, batch, seq):
    model = ODD[name]()
    results = run(model, feeds(model, batch=batch, seq=seq))
    for declared, value in zip(model.graph.outputs, results, strict=True):
        assert declared.shape.rank() == value.ndim
        for dim, size in zip(declared.shape, value.shape, strict=True):
            assert not isinstance(dim, int) or dim == size
        assert value.dtype.kind != "f" or np.isfinite(value).all()


@pytest.mark.parametrize("name", ["if_outer_weight", "nested_if"])
def test_both_branches_come_up(name):
    model = ODD[name]()
    sample = feeds(model)
    sums = {bool(feeds(model, seed=seed)["x"].sum() > 0) for seed in range(8)}
    assert sums == {True, False}
    there = run(model, sample)[0]
    back = run(model, {**sample, "x": -sample["x"]})[0]
    assert np.abs(there).max() > 0
    assert np.abs(back).max() > 0


@pytest.mark.parametrize("name", ["empty_batch_ok", "shared_weight", "function_body"])
def test_runs_on_an_empty_batch(name):
    model = ODD[name]()
    assert run(model, feeds(model, batch=0))[0].shape[0] == 0


def test_an_overridable_weight_is_left_at_its_default_and_may_be_fed():
    model = ODD["weight_is_graph_input"]()
    sample = feeds(model)
    assert list(sample) == ["x"]
    zeros = np.zeros((64, 64), np.float32)
    assert not run(model, {**sample, "head.weight": zeros})[0].any()
    assert run(model, sample)[0].any()


def test_feeds_depend_on_the_seed_alone():
    model = models.build("tiny-llama-kv")
    first, again, other = feeds(model), feeds(model), feeds(model, seed=1)
    assert first["input_ids"].shape == (2, 7)
    assert first["past_key_values.0.key"].shape == (2, 4, 7, 16)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["past_key_values.0.key"], other["past_key_values.0.key"])


@pytest.mark.parametrize("name", ODD)
def test_says_what_is_odd(name):
    assert ODD[name].__doc__
