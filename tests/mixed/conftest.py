"""A small model whose layers matter very differently, so that there is something to choose."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

WIDTH = 64
LAYERS = 4


def network(gains=(0.1, 1.0, 0.3, 3.0)):
    """x → x + gain · Relu(x A) B, layer by layer, → logits; two products read each norm-less x."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def weight(name, rows, columns, gain=1.0):
        w = (gain * rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(w, name))
        return name

    x = "x"
    for i, gain in enumerate(gains):
        left = weight(f"layers.{i}.left", WIDTH, WIDTH)
        right = weight(f"layers.{i}.right", WIDTH, WIDTH)
        back = weight(f"layers.{i}.back", WIDTH, WIDTH, gain)
        nodes += [
            helper.make_node("MatMul", [x, left], [f"l{i}"], f"left{i}"),
            helper.make_node("MatMul", [x, right], [f"r{i}"], f"right{i}"),
            helper.make_node("Relu", [f"l{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", f"r{i}"], [f"m{i}"]),
            helper.make_node("MatMul", [f"m{i}", back], [f"b{i}"], f"back{i}"),
            helper.make_node("Add", [x, f"b{i}"], [f"x{i}"]),
        ]
        x = f"x{i}"
    nodes.append(helper.make_node("MatMul", [x, weight("head", WIDTH, 32)], ["logits"], "head"))
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["T", WIDTH])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["T", 32])],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "net.onnx"
    onnx.save(network(), path)
    return str(path)


@pytest.fixture(scope="session")
def samples():
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((32, WIDTH)).astype(np.float32)} for _ in range(6)]


@pytest.fixture(scope="session")
def recipe():
    """Three widths and float, solved without looking at the data, which keeps these tests quick."""
    choices = ["uint2.g32.asym", "uint4.g32.asym", "int8.g32", "float"]
    rule = {"id": "linear", "weights": ["uint4.g32.asym"], "choices": choices}
    return {"name": "some", "rules": [rule]}
