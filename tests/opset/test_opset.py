"""Raising the opset: each adapter against ONNX Runtime or numpy, refusals, and every real model."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, files, graph, opset, printer, schemas, verify
from qgraph.opset import adapters
from qgraph.verify import equivalence

TARGETS = (11, 13, 18, 21, 25)
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


X = f32(2, 3, 9, 10)
P = np.abs(X) + np.float32(0.1)


def single(
    op: str,
    version: int,
    inputs: Sequence[Any],
    *,
    constants: Sequence[int] = (),
    outputs: int = 1,
    shapes: bool = True,
    ir_version: int = 8,
    domain: str = "",
    **attributes: Any,
) -> tuple[ir.Model, dict[str, Any]]:
    """A model of one node n, and its feeds. Inputs listed in `constants` become initializers."""
    helper = onnx.helper
    names, declared, held, feeds = [], [], [], {}
    for index, data in enumerate(inputs):
        name = "" if data is None else f"i{index}"
        names.append(name)
        if data is None:
            continue
        if index in constants:
            held.append(onnx.numpy_helper.from_array(data, name))
            continue
        feeds[name] = data
        shape = data.shape if shapes else [None] * data.ndim
        declared.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(data.dtype), shape)
        )
    results = [f"o{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, name="n", domain=domain, **attributes)
    untyped = [onnx.ValueInfoProto(name=name) for name in results]
    body = helper.make_graph([node], "g", declared, untyped, held)
    imports = [helper.make_opsetid(domain, version)]
    proto = helper.make_model(body, opset_imports=imports, ir_version=ir_version)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), feeds


def cases() -> Iterator[tuple[str, int, Sequence[Any], dict[str, Any]]]:
    """(operator, opset, inputs, further arguments of `single`): at least one for each change from opset 7 on."""
    for op, v, axis, shape, shapes in itertools.product(
        ("Softmax", "LogSoftmax", "Hardmax"),
        (7, 11),
        (None, 0, 1, 2, -1, -2),
        ((3, 4), (2, 3, 4), (2, 5, 1, 1)),
        (True, False),
    ):
        if axis is None or (-len(shape) <= axis < len(shape) and (v == 11 or axis >= 0)):
            yield (
                op,
                v,
                [f32(*shape)],
                {"shapes": shapes, **({} if axis is None else {"axis": axis})},
            )
    for op in (*adapters.REDUCTIONS, "ReduceSum"):
        for axes in (None, [1], [0, 2], [1, 2, 3, 0]):
            yield op, 7, [P], {} if axes is None else {"axes": axes}
        yield op, 11, [P], {"axes": [-1, -3], "keepdims": 0}
    yield "Squeeze", 7, [f32(1, 3, 1, 2)], {"axes": [0, 2]}
    yield "Squeeze", 11, [f32(1, 3, 1, 2)], {}
    yield "Unsqueeze", 7, [f32(3, 2)], {"axes": [0, 2]}
    yield "Unsqueeze", 11, [f32(3, 2)], {"axes": [-1, 0]}
    for bounds in ({}, {"min": -0.5}, {"max": 0.5}, {"min": -0.1, "max": 0.4}):
        yield "Clip", 7, [X], bounds
        yield "Clip", 7, [X.astype(np.float16)], bounds
    for mode, pads in itertools.product(
        ("constant", "reflect", "edge"), ([0, 0, 1, 2, 0, 0, 3, 1],)
    ):
        yield "Pad", 7, [X], {"mode": mode, "pads": pads}
    yield "Pad", 7, [X.astype(np.float64)], {"pads": [0, 0, 1, 2, 0, 0, 3, 1], "value": 1.5}
    yield "Pad", 7, [X], {"pads": [0, 0, -1, -2, 0, 0, 0, 1], "value": 0.0}
    yield "Slice", 7, [X], {"starts": [0, 1], "ends": [2, 5], "axes": [0, 2]}
    yield "Slice", 7, [X], {"starts": [0, 1, -3, 2], "ends": [2, 5, 1000, -1]}
    yield "TopK", 7, [X], {"k": 3, "axis": 2, "outputs": 2}
    yield "Split", 7, [f32(6, 4)], {"outputs": 3}
    yield "Split", 7, [f32(6, 4)], {"split": [1, 5], "outputs": 2}
    yield "Split", 11, [f32(6, 4)], {"axis": -1, "outputs": 2}
    yield "Split", 13, [f32(6, 4), i64(2, 4)], {"outputs": 2}
    for v in (7, 9):
        inputs = [X, f32(3), f32(3), f32(3), np.abs(f32(3)) + np.float32(0.1)]
        yield "BatchNormalization", v, inputs, {"epsilon": 1e-3, "constants": (1, 2, 3, 4)}
    yield "BatchNormalization", 7, inputs, {"spatial": 1}
    for v in (7, 10):
        yield "Dropout", v, [X], {"ratio": 0.3}
        yield "Dropout", v, [X], {}
    for v, mode in itertools.product((7, 9), ("nearest", "linear")):
        for scales in ([1, 1, 2, 2], [1, 1, 1.5, 2.5], [1, 1, 1, 1]):
            if v == 7:
                yield "Upsample", 7, [X], {"mode": mode, "scales": [float(s) for s in scales]}
                continue
            held = np.array(scales, np.float32)
            yield "Upsample", 9, [X, held], {"mode": mode, "constants": (1,)}
            yield "Upsample", 9, [X, held], {"mode": mode}
    for mode, scales in itertools.product(
        ("nearest", "linear"), ([1, 1, 2, 2], [1, 1, 3, 1.3], [1, 1, 0.5, 0.5], [1, 1, 0.6, 0.7])
    ):
        yield "Resize", 10, [X, np.array(scales, np.float32)], {"mode": mode, "constants": (1,)}
    roi, none = np.array([0, 0, 0.1, 0.2, 1, 1, 0.8, 0.9], np.float32), np.zeros(0, np.float32)
    for mode, coordinates in itertools.product(
        ("nearest", "linear", "cubic"),
        ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"),
    ):
        how = {"mode": mode, "coordinate_transformation_mode": coordinates, "constants": (1, 2, 3)}
        yield "Resize", 11, [X, roi, np.array([1, 1, 1.7, 0.6], np.float32)], how
        yield "Resize", 13, [X, roi, none, i64(2, 3, 13, 6)], how
    yield "OneHot", 9, [i64(0, 1, 2, -1, 5, -7), i64(4), np.float32([0, 1])], {}
    for mode in ("avg", "max"):
        size = {"mode": mode, "output_height": 2, "output_width": 3, "spatial_scale": 0.7}
        yield "RoiAlign", 10, [X, np.abs(f32(3, 4)) * 4, i64(0, 1, 0)], size
    for mode in (None, "bilinear", "nearest", "bicubic"):
        place = np.clip(f32(2, 4, 5, 2), -1.3, 1.3)
        yield "GridSample", 16, [X, place], {} if mode is None else {"mode": mode}
    yield "DFT", 17, [f32(2, 6, 7, 2)], {}
    yield "DFT", 17, [f32(2, 6, 7, 2)], {"axis": 2, "inverse": 1}
    yield "DFT", 17, [f32(2, 6, 7, 2), np.array(4, np.int64)], {"axis": 1}
    for shapes in (True, False):
        group = {"num_groups": 3, "shapes": shapes}
        yield "GroupNormalization", 18, [f32(2, 6, 3, 3), f32(3), f32(3)], group
    constants = {"num_groups": 2, "epsilon": 1e-2, "constants": (1, 2)}
    yield "GroupNormalization", 18, [f32(2, 6, 3, 3), f32(2), f32(2)], constants
    at = np.array([[0, 1, 2], [3, 0, 1]], np.int64)
    yield "Scatter", 9, [f32(4, 3), at, f32(2, 3)], {"axis": 0}
    yield from free_steps()


def free_steps() -> Iterator[tuple[str, int, Sequence[Any], dict[str, Any]]]:
    """Operators whose later versions only added types or options: nothing may change."""
    windows = itertools.product((0, 1), ([3, 3], [3, 2]), ([1, 1], [3, 2]), ([0] * 4, [1, 0, 0, 1]))
    for ceil, kernel, strides, pads in windows:
        how = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": ceil}
        yield "AveragePool", 10, [X], how
        yield "AveragePool", 10, [X], {**how, "count_include_pad": 1}
        yield "MaxPool", 10, [X], how
    for pad in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        how = {"auto_pad": pad, "strides": [2, 2]}
        yield "AveragePool", 7, [X], {**how, "kernel_shape": [3, 2]}
        yield "LpPool", 7, [X], {**how, "kernel_shape": [3, 2]}
        yield "Conv", 7, [X, f32(4, 3, 3, 2)], {**how, "constants": (1,)}
        yield "ConvTranspose", 11, [X, f32(3, 4, 3, 2)], {**how, "constants": (1,)}
    for direction, n in (("forward", 1), ("bidirectional", 2)):
        how = {"hidden_size": 4, "direction": direction}
        weights = [f32(n, 16, 3), f32(n, 16, 4), f32(n, 32)]
        yield "LSTM", 7, [f32(5, 2, 3), *weights], {**how, "outputs": 3}
        yield "GRU", 7, [f32(5, 2, 3), f32(n, 12, 3), f32(n, 12, 4)], {**how, "outputs": 2}
        yield "RNN", 7, [f32(5, 2, 3), f32(n, 4, 3), f32(n, 4, 4)], {**how, "outputs": 2}
    for op in ("ArgMax", "ArgMin"):
        yield op, 7, [np.round(X)], {"axis": 1}
    for op in ("Relu", "Sigmoid", "Tanh", "Erf", "Selu", "LeakyRelu", "Flatten", "Shape", "LRN"):
        yield op, 9, [X], {"size": 3} if op == "LRN" else {}
    for op in ("Add", "Sub", "Mul", "Div", "Max", "PRelu"):
        yield op, 8, [X, f32(10)], {}
    yield "Gemm", 7, [f32(3, 4), f32(4, 5), f32(5)], {"alpha": 0.5}
    yield "Gather", 7, [X, i64(0, 2)], {"axis": 1}
    yield "Cast", 9, [np.float32([1e6, -3.7, 70000])], {"to": 10}
    yield "DepthToSpace", 7, [f32(1, 8, 2, 2)], {"blocksize": 2}
    yield "QuantizeLinear", 10, [X, np.float32(0.05), np.uint8(3)], {"constants": (1, 2)}
    yield "DequantizeLinear", 13, [RNG.integers(-99, 99, (3, 4)).astype(np.int8), f32(4)], {}


def _id(case: tuple[str, int, Sequence[Any], dict[str, Any]]) -> str:
    op, version, inputs, more = case
    return f"{op}-{version}-{len(inputs)}-" + ",".join(f"{k}={v}" for k, v in more.items())[:60]


@pytest.mark.parametrize("case", list(cases()), ids=_id)
def test_same_result_at_every_later_opset(case: tuple[str, int, Sequence[Any], Any]) -> None:
    op, version, inputs, more = case
    before, feeds = single(op, version, inputs, **more)
    for target in TARGETS:
        after = graph.clone(before)
        if target <= version or not has_kernel(op, target):
            continue
        opset.raise_opset(after, target)
        assert graph.opset(after) == target
        verify.check(after)
        found = verify.equivalent(before, after, [feeds], rtol=1e-5)
        assert found.ok, f"{target}: {found}"


def has_kernel(op: str, target: int) -> bool:
    """False for RoiAlign and a few more, which the runtime cannot run at some later version."""
    schema = schemas.find("", op, target)
    return schema is None or schema.deprecated or schemas.has_kernel("", op, schema.since)


def test_every_adapter_is_tried() -> None:
    """From opset 7 on by `cases`, before that by `LEGACY`: the runtime has no kernels for those."""
    tried = {(case[0], case[1]) for case in cases()} | {(op, v) for op, v, *_ in LEGACY}
    untried = set()
    for op, version in adapters.ADAPTERS:
        if not any(name == op and v < version for name, v in tried):
            untried.add((op, version))
    assert untried == {("GRU", 3)}  # a default that was misspelled


def add_along(axis: int) -> Callable[..., Any]:
    """Addition with B aligned at an axis of A."""
    return lambda a, b: a + b.reshape(b.shape + (1,) * (a.ndim - axis - b.ndim))


LEGACY: list[tuple[str, int, Sequence[Any], dict[str, Any], Callable[..., Any]]] = [
    ("Add", 6, [X, f32(3)], {"broadcast": 1, "axis": 1}, add_along(1)),
    ("Add", 6, [X, f32(3, 9)], {"broadcast": 1, "axis": 1}, add_along(1)),
    ("Add", 6, [X, f32(9, 10)], {"broadcast": 1}, lambda a, b: a + b),
    ("Add", 6, [X, X], {}, lambda a, b: a + b),
    ("Mul", 1, [X, f32(3)], {"broadcast": 1, "axis": -3, "consumed_inputs": [0, 0]},
     lambda a, b: a * b[:, None, None]),
    *((op, 6, [P, P], {}, f) for op, f in (("Sub", np.subtract), ("Div", np.divide), ("Pow", np.power))),
    *((op, 6, [X > 0, X > 0.5], {}, f) for op, f in
      (("And", np.logical_and), ("Or", np.logical_or), ("Xor", np.logical_xor))),
    *((op, 6, [X, P], {}, f) for op, f in (("Greater", np.greater), ("Less", np.less))),
    ("Equal", 6, [i64(1, 2), i64(1, 3)], {}, np.equal),
    ("Relu", 1, [X], {"consumed_inputs": [0]}, lambda x: np.maximum(x, 0)),
    ("Clip", 1, [X], {"max": 0.5}, lambda x: np.minimum(x, 0.5)),
    ("PRelu", 6, [X, f32(3)], {}, lambda x, s: np.where(x < 0, x * s[:, None, None], x)),
    ("Gemm", 6, [f32(3, 4), f32(4, 5), f32(5)], {"broadcast": 1}, lambda a, b, c: a @ b + c),
    ("Reshape", 1, [X], {"shape": [6, -1]}, lambda x: x.reshape(6, -1)),
    ("Cast", 1, [X], {"to": "INT32"}, lambda x: x.astype(np.int32)),
    ("Concat", 1, [f32(2, 3), f32(2, 4)], {}, lambda a, b: np.concatenate([a, b], 1)),
    ("Selu", 1, [X], {}, lambda x: np.where(
        x > 0, 1.0507 * x, 1.0507 * 1.6732 * (np.exp(x) - 1)).astype(np.float32)),
    ("Pad", 1, [X], {"paddings": [0, 0, 1, 2, 0, 0, 3, 1]},
     lambda x: np.pad(x, ((0, 0), (0, 0), (1, 3), (2, 1)))),
    ("Split", 1, [f32(6, 4)], {"split": [6]}, lambda x: x),
    ("Dropout", 1, [X], {"is_test": 1}, lambda x: x),
    ("BatchNormalization", 6, [X, f32(3), f32(3), f32(3), np.abs(f32(3)) + 1], {"is_test": 1},
     lambda x, s, b, m, v: (x - m[:, None, None]) / np.sqrt(v + 1e-5)[:, None, None]
     * s[:, None, None] + b[:, None, None]),
    ("GlobalLpPool", 1, [P], {"p": 2.0}, lambda x: np.sqrt((x * x).sum((2, 3), keepdims=True))),
    ("LpPool", 1, [P], {"p": 1.0, "kernel_shape": [9, 10]}, lambda x: x.sum((2, 3), keepdims=True)),
    ("Upsample", 1, [X], {"height_scale": 2.0, "width_scale": 3.0},
     lambda x: x.repeat(2, 2).repeat(3, 3)),
    *((op, 6, [f32(5, 2, 3), f32(1, n, 3), f32(1, n, 4)],
       {"hidden_size": 4, "output_sequence": 1}, None)
      for op, n in (("LSTM", 16), ("GRU", 12), ("RNN", 4))),
]  # fmt: skip


@pytest.mark.parametrize("case", LEGACY, ids=lambda c: f"{c[0]}-{c[1]}-{list(c[3])}")
@pytest.mark.parametrize("target", [9, 21])
def test_opsets_that_the_runtime_no_longer_runs(case: Any, target: int) -> None:
    op, version, inputs, attributes, expected = case
    model, feeds = single(op, version, inputs, **attributes)
    opset.raise_opset(model, target)
    verify.check(model)
    (outputs,) = equivalence.run(model, [feeds])
    if expected is not None:
        np.testing.assert_allclose(outputs["o0"], expected(*inputs), rtol=1e-5, atol=1e-6)


class TestRefusals:
    """Each names the node, says why, and leaves the model as it was."""

    @pytest.mark.parametrize(
        ("op", "version", "inputs", "more", "reason"),
        [
            ("Dropout", 7, [X], {"outputs": 2}, "its mask is used"),
            ("Dropout", 10, [X], {"outputs": 2}, "its mask is used"),
            ("Dropout", 6, [X], {}, "training mode"),
            ("Resize", 10, [X, np.float32([1, 1, 2, 2])], {}, "scales are not constant"),
            ("Resize", 10, [X, np.float32([1, 1, 2, 0.5])], {"constants": (1,)}, "grow and shrink"),
            ("BatchNormalization", 7, [X, *[f32(3)] * 4], {"spatial": 0}, "spatial=0"),
            ("BatchNormalization", 9, [X, *[f32(3)] * 4], {"outputs": 5}, "training mode"),
            ("BatchNormalization", 6, [X, *[f32(3)] * 4], {}, "training mode"),
            ("RandomNormal", 1, [], {"shape": [2], "target": 25}, "cannot run the newer version"),
            ("ImageScaler", 1, [X], {"scale": 2.0, "bias": [0.0] * 3}, "opset 10 removed it"),
            ("LpPool", 1, [X], {"p": 1.5, "kernel_shape": [2, 2]}, "whole numbers"),
        ],
    )
    def test_reasons(
        self, op: str, version: int, inputs: Any, more: dict[str, Any], reason: str
    ) -> None:
        target = more.pop("target", 21)
        model, _ = single(op, version, inputs, **more)
        self.refuses(model, target, reason)

    def refuses(self, model: ir.Model, target: int, reason: str) -> None:
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        nodes = list(model.graph)
        with pytest.raises(errors.UnsupportedError) as raised:
            opset.raise_opset(model, target)
        (found,) = raised.value.diagnostics
        assert (found.code, found.where) == ("QG205", "n")
        assert reason in found.message
        assert found.hint
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before
        assert list(model.graph) == nodes

    def test_tf_half_pixel_for_nn(self) -> None:
        inputs = [X, np.zeros(0, np.float32), np.float32([1, 1, 2, 2])]
        mode = "tf_half_pixel_for_nn"
        model, _ = single("Resize", 11, inputs, coordinate_transformation_mode=mode)
        self.refuses(model, 13, "was removed")

    def test_unknown_ranks(self) -> None:
        model, _ = single("Add", 6, [X, f32(3)], broadcast=1, axis=1)
        model.graph.inputs[0].shape = None
        self.refuses(model, 21, "ranks of its inputs are not known")

    def test_all_at_once(self) -> None:
        model = ir.from_proto(
            onnx.parser.parse_model(
                """<ir_version: 6, opset_import: ["" : 10]> g (float[4] x) => (bool[4] y, bool[4] z) {
                [a] p, y = Dropout(x) [fine] q = Relu(p) [b] r, z = Dropout(q) }"""
            )
        )
        with pytest.raises(errors.UnsupportedError) as raised:
            opset.raise_opset(model, 21)
        assert [d.where for d in raised.value.diagnostics] == ["a", "b"]

    def test_opset_that_nobody_has(self) -> None:
        model, _ = single("Relu", 13, [X])
        with pytest.raises(errors.UnsupportedError, match="opset 99 is not known"):
            opset.raise_opset(model, 99)
        assert graph.opset(model) == 13

    def test_graph_out_of_order(self) -> None:
        model = parse("[a] h = ReduceMean <axes = [1]> (x) [b] y = Relu(h)", 13)
        first = model.graph[0]
        model.graph.remove(first)
        model.graph.append(first)
        with pytest.raises(errors.UnsupportedError, match="sort the graph first"):
            opset.raise_opset(model, 18)


def parse(body: str, version: int, ir_version: int = 8) -> ir.Model:
    text = f'<ir_version: {ir_version}, opset_import: ["" : {version}]> g (float[4, 4] x) => (float[A, B] y)'
    return ir.from_proto(onnx.parser.parse_model(f"{text} {{ {body} }}"))


class TestGraph:
    def test_nothing_to_do(self) -> None:
        model = parse("y = Relu(x)", 21)
        before = printer.text(model)
        opset.raise_opset(model, 13)
        assert printer.text(model) == before

    def test_free_steps_touch_only_the_import(self) -> None:
        model = parse("[n] y = Relu(x)", 13)
        node = model.graph[0]
        opset.raise_opset(model, 21)
        assert list(model.graph) == [node]
        assert (graph.opset(model), model.ir_version) == (21, 10)

    @pytest.mark.parametrize(
        ("before", "target", "after"),
        [(3, 9, 4), (6, 13, 7), (8, 18, 8), (8, 21, 10), (8, 25, 13), (11, 21, 11), (13, 13, 13)],
    )
    def test_ir_version(self, before: int, target: int, after: int) -> None:
        model = parse("y = Relu(x)", 8, ir_version=before)
        opset.raise_opset(model, target)
        assert model.ir_version == after

    def test_values_and_names_survive(self) -> None:
        model = parse("[soft] s = Softmax <axis = 0> (x) [sum] y = ReduceSum <axes = [1]> (s)", 11)
        softmax, outputs = model.graph[0].outputs[0], list(model.graph.outputs)
        opset.raise_opset(model, 21)
        assert softmax.name == "s"
        assert list(model.graph.outputs) == outputs
        names = [n.name for n in model.graph]
        assert [n.op_type for n in model.graph if n.name == "soft"] == ["Softmax"]
        assert len(set(names)) == len(names)
        verify.check(model)

    def test_metadata_follows(self) -> None:
        model = parse("[soft] y = Softmax <axis = 0> (x)", 11)
        model.graph[0].metadata_props["where"] = "layer 3"
        opset.raise_opset(model, 13)
        assert all(n.metadata_props == {"where": "layer 3"} for n in model.graph)

    def test_bodies(self) -> None:
        model = ir.from_proto(
            onnx.parser.parse_model(
                """<ir_version: 6, opset_import: ["" : 11]>
                g (bool c, float[2, 3, 4] x) => (float[A, B, C] y) { y = If (c) <
                    then_branch = t () => (float[2, 3, 4] a) { a = Softmax <axis = 1> (x) },
                    else_branch = e () => (float[2, 3, 1] b) { b = ReduceSum <axes = [2]> (x) }> }"""
            )
        )
        before = graph.clone(model)
        opset.raise_opset(model, 21)
        verify.check(model)
        feeds = [{"c": np.array(c), "x": f32(2, 3, 4)} for c in (True, False)]
        assert verify.equivalent(before, model, feeds).ok

    def test_functions_have_constant_nodes(self) -> None:
        text = """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
            g (float[2, 3] x) => (float[2, 1] y) { y = local.F(x) }
            <domain: "local", opset_import: ["" : 11]>
            F (a) => (b) { b = ReduceSum <axes = [1]> (a) }"""
        model = ir.from_proto(onnx.parser.parse_model(text))
        before = graph.clone(model)
        opset.raise_opset(model, 21)
        function = next(iter(model.functions.values()))
        assert [n.op_type for n in function] == ["Constant", "ReduceSum"]
        assert function.opset_imports[""] == 21
        verify.check(model)
        assert verify.equivalent(before, model, [{"x": f32(2, 3)}]).ok

    def test_attribute_from_the_caller_of_a_function(self) -> None:
        text = """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
            g (float[2, 3] x) => (float[2, 1] y) { y = local.F <axes = [1]> (x) }
            <domain: "local", opset_import: ["" : 11]>
            F <axes> (a) => (b) { b = ReduceSum <axes: ints = @axes> (a) }"""
        model = ir.from_proto(onnx.parser.parse_model(text))
        with pytest.raises(errors.UnsupportedError, match="set by the caller of the function"):
            opset.raise_opset(model, 21)
        assert next(iter(model.functions.values())).opset_imports[""] == 11

    def test_weights_stop_being_inputs_from_ir_4_on(self) -> None:
        """Before IR 4 a weight among the inputs is constant; from then on callers may replace it."""
        model = ir.from_proto(
            onnx.parser.parse_model(
                """<ir_version: 3, opset_import: ["" : 8]> g (float[4] x, float[4] w) => (float[4] y)
                { y = Add(x, w) }"""
            )
        )
        weight = model.graph.inputs[1]
        weight.const_value = ir.tensor(np.ones(4, np.float32), name="w")
        model.graph.register_initializer(weight)
        opset.raise_opset(model, 21)
        assert [v.name for v in model.graph.inputs] == ["x"]
        assert graph.is_constant(weight)

    def test_long_name_of_the_default_domain(self) -> None:
        model = parse("y = Relu(x)", 13)
        model.graph.opset_imports["ai.onnx"] = model.graph.opset_imports.pop("")
        opset.raise_opset(model, 21)
        assert dict(model.graph.opset_imports) == {"": 21}

    def test_other_domains_stay(self) -> None:
        model, _ = single("Gelu", 1, [X], domain="com.microsoft")
        opset.raise_opset(model, 21)
        assert dict(model.graph.opset_imports) == {"com.microsoft": 1, "": 21}

    def test_types_are_followed_through_untyped_values(self) -> None:
        model = parse("h = Relu(x) k = Neg(h) y = Clip <min = 0.0> (k)", 7)
        opset.raise_opset(model, 13)
        bound = model.graph[-1].inputs[1]
        assert bound is not None
        assert bound.dtype == ir.DataType.FLOAT

    def test_ranks_are_inferred_where_none_is_declared(self) -> None:
        model = parse("h = MatMul(x, w) y = Softmax <axis = 1> (h)", 11)

        def refuse() -> ir.TensorProtocol:
            raise AssertionError("was read")

        weight = graph.value("w", ir.DataType.FLOAT, [4, 1000])
        weight.const_value = ir.LazyTensor(
            refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 1000])
        )
        model.graph.register_initializer(weight)
        model.graph[0].replace_input_with(1, weight)
        opset.raise_opset(model, 21)
        assert [n.op_type for n in model.graph] == ["MatMul", "Softmax"]

    def test_weights_are_not_read(self, tmp_path: Path) -> None:
        model = parse("m = MatMul(x, x) y = ReduceMean <axes = [1]> (m)", 13)

        def refuse() -> ir.TensorProtocol:
            raise AssertionError("was read")

        lazy = ir.LazyTensor(refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="w")
        (tmp_path / "w.bin").write_bytes(bytes(64))
        external = ir.ExternalTensor(
            "w.bin", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="v", base_dir=tmp_path
        )
        for index, (name, tensor) in enumerate((("w", lazy), ("v", external))):
            value = graph.value(name, ir.DataType.FLOAT, [4, 4])
            value.const_value = tensor
            model.graph.register_initializer(value)
            model.graph[0].replace_input_with(index, value)
        opset.raise_opset(model, 21)
        assert model.graph.initializers["w"].const_value is lazy
        assert model.graph.initializers["v"].const_value is external
        assert external.raw is None  # not even mapped


@pytest.mark.slow
@pytest.mark.parametrize("target", [13, 21])
def test_every_real_model_is_equal_or_refused(target: int) -> None:
    root = os.environ.get("QGRAPH_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("QGRAPH_TEST_DATA names no folder with models")
    counts: Counter[str] = Counter()
    wrong = []
    for path in sorted(Path(root).rglob("*.onnx")):
        outcome, detail = convert(path, target)
        counts[outcome] += 1
        if detail:
            print(f"{outcome:8} {path.parent.name}/{path.name}: {detail}")
        if outcome == "wrong":
            wrong.append(path)
    print(f"to opset {target}:", dict(counts))
    assert counts["equal"] > 0
    assert not wrong


def convert(path: Path, target: int) -> tuple[str, str]:
    try:
        model = files.load(path)
        equivalence.session(path)
    except errors.QGraphError:
        return "unusable", ""
    if not 1 < graph.opset(model) < target:
        return "no need", ""
    try:
        opset.raise_opset(model, target)
    except errors.UnsupportedError as e:
        return "refused", e.diagnostics[0].message
    try:
        feeds = verify.sample_feeds(path)
    except errors.InputError as e:
        return "unproven", e.diagnostics[0].message[:120]
    try:
        verify.check(model)
        found = verify.equivalent(path, model, feeds)
    except errors.QGraphError as e:
        return "wrong", str(e)
    return ("equal", "") if found.ok else ("wrong", found.reason)
