"""Operators beside those of a model: what they give, and that the model stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from qgraph import files, graph, trials
from qgraph.observers import Grid
from qgraph.spec import QuantSpec

RNG = np.random.default_rng(5)
SPEC = QuantSpec.parse("uint8.tensor.asym")


def model(opset: int = 17) -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[n, 3, 5, 5] x) => (float[n, 4, 3, 3] y) {{ y = Conv (x, w) }}"""
    proto = onnx.parser.parse_model(text)
    weight = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(ir.to_proto(ir.tensor(weight, name="w")))
    return files.load(proto)


def data(count: int) -> list[dict[str, Any]]:
    return [{"x": RNG.standard_normal((2, 3, 5, 5)).astype(np.float32)} for _ in range(count)]


def test_a_second_operator_sees_the_same_input():
    base, feeds = model(), data(3)
    made = trials.Trials(base, 8)
    node = made.nodes["y"]
    doubled = made.constant(2 * np.asarray(graph.array(base.graph.initializers["w"])))
    twin = made.add("Conv", node.inputs[0], doubled, like=node)
    places = [made.output(v) for v in (node.outputs[0], twin, made.channels(node, twin))]
    found = list(made.run(feeds, 2, threads=1))
    assert len(found) == 2  # of three samples
    for outputs in found:
        plain, other, means = (outputs[p] for p in places)
        np.testing.assert_allclose(other, 2 * plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            trials.channel_means(means), other.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5
        )
    assert [n.op_type for n in base.graph] == ["Conv"] and len(base.graph.outputs) == 1


def test_rounded_is_on_the_grid_also_in_old_models():
    """QuantizeLinear came with opset 10."""
    grid, feeds = Grid(0.1, 100, SPEC), data(1)
    made = trials.Trials(model(opset=9), 8)
    place = made.output(made.rounded(made.nodes["y"].inputs[0], grid))
    ((*outputs,),) = made.run(feeds, 1, threads=1)
    want = (np.clip(np.rint(feeds[0]["x"] / np.float32(0.1)) + 100, 0, 255) - 100) * 0.1
    np.testing.assert_allclose(outputs[place], want, atol=1e-6)


def test_attributes_may_be_added():
    made = trials.Trials(model(), 8)
    total = made.output(made.add("ReduceMean", made.nodes["y"].outputs[0], keepdims=0))
    (outputs,) = made.run(data(1), 1, threads=1)
    assert outputs[total].shape == ()
