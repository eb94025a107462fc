"""Models from quantization-aware training: their scales stay bit for bit, and integer kernels run in both runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import qgraph

Array = np.ndarray[Any, Any]
STEP = 0.05  # of the grid of the result
node = helper.make_node


class Net:
    """A convolutional net as exporters of quantization-aware training write it.

    Activations on uint8 or int8 grids, weights per channel, as codes or as floats behind QuantizeLinear, biases int32
    or float; everything quantized, or only what operators with weights read.
    """

    def __init__(
        self, *, signed: bool = False, centred: bool = False, floats: bool = False, opset: int = 17
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.signed, self.centred, self.floats, self.opset = signed, centred, floats, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.scales: dict[str, float] = {}

    def const(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        out = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(node(kind, list(inputs), [out], name=f"node_{out}", **attributes))
        return out

    def pair(self, x: str, scale: float, zero: int = 0) -> str:
        """Q and DQ; `zero` is the zero point of uint8."""
        zero = 128 if self.centred else zero
        point = np.asarray(zero - 128, np.int8) if self.signed else np.asarray(zero, np.uint8)
        grid = (self.const(np.float32(scale)), self.const(point))
        out = self.op("DequantizeLinear", self.op("QuantizeLinear", x, *grid), *grid)
        self.scales[out] = scale
        return out

    def product(self, kind: str, x: str, *shape: int, **attributes: Any) -> str:
        w = (self.rng.standard_normal(shape) * 0.3).astype(np.float32)
        scale = (np.abs(w).reshape(len(w), -1).max(axis=1) / 127).astype(np.float32)
        spread = scale.reshape(-1, *[1] * (len(shape) - 1))
        grid = (self.const(scale), self.const(np.zeros(len(w), np.int8)))
        if self.floats:
            codes = self.op("QuantizeLinear", self.const(w), *grid, axis=0)
        else:
            codes = self.const(np.rint(w / spread).astype(np.int8))
        weight = self.op("DequantizeLinear", codes, *grid, axis=0)
        b = (self.rng.standard_normal(len(w)) * 0.1).astype(np.float32)
        if self.floats:
            bias = self.const(b)
        else:
            step = (np.float32(self.scales[x]) * scale).astype(np.float32)
            held = (np.rint(b / step).astype(np.int32), step, np.zeros(len(w), np.int32))
            bias = self.op("DequantizeLinear", *map(self.const, held), axis=0)
        return self.op(kind, x, weight, bias, **attributes)

    def conv(self, x: str, *shape: int, relu: bool = True, group: int = 1) -> str:
        y = self.product("Conv", x, *shape, pads=[shape[-1] // 2] * 4, group=group)
        return self.op("Relu", y) if relu else y

    def model(self, y: str) -> onnx.ModelProto:
        self.nodes.append(node("Identity", [y], ["y"]))
        ports = [
            helper.make_tensor_value_info(n, 1, s)
            for n, s in (("x", ["n", 3, 16, 16]), ("y", ["n", 10]))
        ]
        held = [onnx.numpy_helper.from_array(a, n) for n, a in self.constants.items()]
        graph = helper.make_graph(self.nodes, "qat", ports[:1], ports[1:], held)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )


def quantized(**style: Any) -> onnx.ModelProto:
    """Every activation has a grid: residual Add, MaxPool, Concat, depthwise, pooling, Gemm."""
    net = Net(**style)
    x = net.pair("x", 0.03, 128)
    a = net.pair(net.conv(x, 8, 3, 3, 3), 0.02)
    p = net.pair(net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2]), 0.02)
    b = net.pair(net.conv(p, 8, 8, 3, 3), 0.03)
    c = net.pair(net.conv(b, 8, 8, 3, 3, relu=False), 0.04, 120)
    r = net.pair(net.op("Relu", net.op("Add", p, c)), 0.04)
    d = net.pair(net.conv(r, 8, 1, 3, 3, group=8), 0.05)
    e = net.pair(net.conv(r, 4, 8, 1, 1), 0.05)
    f = net.pair(net.op("Concat", d, e, axis=1), 0.05)
    h = net.pair(net.conv(f, 16, 12, 1, 1), 0.05)
    g = net.pair(net.op("GlobalAveragePool", h), 0.02)
    y = net.product("Gemm", net.pair(net.op("Flatten", g), 0.02), 10, 16, transB=1)
    return net.model(net.pair(y, STEP, 128))


def inputs_only(**style: Any) -> onnx.ModelProto:
    """Only what convolutions and Gemm read has a grid: a residual Add of floats."""
    net = Net(**style)
    a = net.conv(net.pair("x", 0.03, 128), 8, 3, 3, 3)
    p = net.pair(net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2]), 0.02)
    c = net.conv(net.pair(net.conv(p, 8, 8, 3, 3), 0.03), 8, 8, 3, 3, relu=False)
    r = net.pair(net.op("Relu", net.op("Add", p, c)), 0.04)
    h = net.conv(r, 16, 8, 1, 1)
    g = net.pair(net.op("Flatten", net.op("GlobalAveragePool", h)), 0.02)
    return net.model(net.product("Gemm", g, 10, 16, transB=1))


STYLES: dict[str, dict[str, Any]] = {
    "uint8": {},
    "uint8, float weights and biases": {"floats": True},
    "int8": {"signed": True},
    "int8 around zero, float weights and biases": {"signed": True, "centred": True, "floats": True},
    "uint8 around 128": {"centred": True},
    "opset 13": {"opset": 13, "floats": True},
    "opset 21": {"opset": 21},
}  # fmt: skip


def feeds(count: int = 4) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, 16, 16)).astype(np.float32)}


def as_written(path: str | Path) -> Array:
    """The result without any rewriting by the runtime."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds())[0])


def scales(model: onnx.ModelProto) -> dict[str, list[bytes]]:
    """Bytes of the scales that QuantizeLinear of activations and DequantizeLinear of weights read, in order."""
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    found: dict[str, list[bytes]] = {"activations": [], "weights": []}
    for each in model.graph.node:
        if each.op_type == "QuantizeLinear" and each.input[0] not in constants:
            found["activations"].append(constants[each.input[1]].tobytes())
        codes = constants.get(each.input[0]) if each.op_type == "DequantizeLinear" else None
        is_weight = codes is None or (codes.dtype == np.int8 and codes.ndim > 1)
        if each.op_type == "DequantizeLinear" and is_weight and constants[each.input[1]].ndim:
            found["weights"].append(constants[each.input[1]].tobytes())
    return {key: sorted(values) for key, values in found.items()}


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize(
    ("style", "recipe"),
    [*((s, "auto") for s in STYLES), ("uint8", "int8-static"), ("int8", "int8-static")],
)
def test_a_trained_graph_keeps_its_scales_and_runs_in_integers(
    style, recipe, target, executed, tmp_path
):
    model = quantized(**STYLES[style])
    before, after = tmp_path / "qat.onnx", tmp_path / "q.onnx"
    onnx.save(model, before)
    result = qgraph.optimize(before, recipe, target=target, output=after)
    assert scales(onnx.load(after)) == scales(model)
    found = executed(after, target)
    assert found.all_integer and len(found.products) == 7
    assert result.report.integer_macs == 1.0
    assert [o.integer for o in result.report.operators] == [True] * 7
    if target == "ort":
        assert {"QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool"} <= set(found.ops)
        assert "Add" not in found.ops and "MaxPool" not in found.ops
    want, got = as_written(before), as_written(after)
    if STYLES[style].get("floats"):  # biases are rounded to the steps of the accumulator
        assert np.abs(want - got).max() < 1.5 * STEP
    else:
        assert np.array_equal(want, got)
    # Kernels round sums and means once where the graph as written rounds them twice.
    assert np.abs(want - found.run(feeds())[0]).max() < 3.5 * STEP


@pytest.mark.parametrize("signed", [False, True])
def test_what_lacks_a_grid_behind_it_is_named(signed, executed, tmp_path):
    """ONNX Runtime's convolutions give codes alone: the report says which run in float, as the runtime itself does."""
    model = inputs_only(signed=signed, centred=signed)
    before, after = tmp_path / "qat.onnx", tmp_path / "q.onnx"
    onnx.save(model, before)
    result = qgraph.optimize(before, "auto", output=after)
    assert scales(onnx.load(after)) == scales(model)
    float_ones = [o for o in result.report.operators if not o.integer]
    found = executed(after, "ort")
    assert len(float_ones) == sum(not integer for _, integer in found.products)
    assert 0 < result.report.integer_macs < 1
    assert {o.code for o in float_ones} == {"QG319"}
    assert all("nothing quantizes its result" in o.reason for o in float_ones)
    assert ("Gemm", True) not in [(o.op, not o.integer) for o in result.report.operators]


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_operators_left_in_float_join_the_grids_that_are_there(target, executed, tmp_path):
    """A trained body with a float head: the head is calibrated, and reads the grid that its input has."""
    net = Net()
    x = net.pair("x", 0.03, 128)
    a = net.pair(net.conv(x, 8, 3, 3, 3), 0.02)
    b = net.op("Conv", a, net.const(net.rng.standard_normal((4, 8, 1, 1)).astype(np.float32)))
    weight = net.const((net.rng.standard_normal((4, 10)) * 0.3).astype(np.float32))
    flat = net.op("Flatten", net.op("GlobalAveragePool", b))
    model = net.model(net.op("MatMul", flat, weight))
    before, after = tmp_path / "qat.onnx", tmp_path / "q.onnx"
    onnx.save(model, before)
    data = [feeds(n) for n in (2, 3, 4)]
    result = qgraph.optimize(before, "int8-static", target=target, data=data, output=after)
    assert executed(after, target).all_integer
    kept = scales(onnx.load(after))["activations"]
    assert all(s in kept for s in scales(model)["activations"])
    assert kept.count(np.float32(0.02).tobytes()) == 1, "the value has one grid, its own"
    assert qgraph.numerics.sqnr_db(as_written(before), executed(after, target).run(feeds())[0]) > 25
    assert result.report.activations
