"""correct-bias without data: means from folded BatchNormalizations, and what keeps them honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import graph, normalized
from qgraph.passes.correct_bias import analytic

RNG = np.random.default_rng(19)
C = 12


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def constants() -> dict[str, np.ndarray[Any, Any]]:
    """Two convolutions, each with a BatchNormalization, and a classifier."""
    made = {"w": draw(C, 3, 1, 1), "v": draw(C, 1, 3, 3), "u": draw(5, C)}
    for n in "pq":
        made |= {
            f"{n}g": RNG.uniform(0.5, 2, C).astype(np.float32), f"{n}b": draw(C),
            f"{n}m": draw(C), f"{n}v": RNG.uniform(0.5, 2, C).astype(np.float32),
        }  # fmt: skip
    return made


NET = """g (float[n, 3, 8, 8] x) => (float[n, c] y) {
    low = Constant <value_float = 0.0> () high = Constant <value_float = 6.0> ()
    a = Conv (x, w) b = BatchNormalization (a, pg, pb, pm, pv) c = Clip (b, low, high)
    d = Conv <group = 12, pads = [1, 1, 1, 1]> (c, v) e = BatchNormalization (d, qg, qb, qm, qv)
    f = Relu (e) s = Add (f, c) p = GlobalAveragePool (s) h = Flatten (p) y = Gemm <transB = 1> (h, u) }"""


def canonical(model: ir.Model) -> ir.Model:
    from qgraph.passes.canonicalize import Canonicalize

    Canonicalize()(model)
    return model


def normal_after(mean: float, deviation: float, low: float, high: float) -> tuple[float, float]:
    x = np.clip(mean + deviation * RNG.standard_normal(400_000), low, high)
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, np.inf), (0.0, 6.0), (-np.inf, 0.5), (-np.inf, np.inf)]
)
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-2.0, 1.5), (5.0, 2.0), (1.0, 1e-9)])
def test_moments_of_what_is_clipped(mean: float, deviation: float, low: float, high: float) -> None:
    found = analytic.clipped_normal(np.array([mean]), np.array([deviation**2]), low, high)
    expected = normal_after(mean, deviation, low, high)
    assert found[1] is not None
    np.testing.assert_allclose([found[0][0], found[1][0]], expected, atol=0.01)


def test_means_follow_the_graph(parse) -> None:
    given = constants()
    model = canonical(parse(NET, **given))
    known = {str(v.name): m for v, m in analytic.of_model(model).items()}
    nodes = {
        n.op_type: [m for m in graph.nodes(model) if m.op_type == n.op_type] for n in model.graph
    }
    first, second = (str(n.outputs[0].name) for n in nodes["Conv"])
    np.testing.assert_allclose(known[first][0], given["pb"], rtol=1e-6)
    np.testing.assert_allclose(known[first][1], given["pg"] ** 2, rtol=1e-6)
    np.testing.assert_allclose(known[second][0], given["qb"], rtol=1e-6)
    clip = analytic.clipped_normal(given["pb"].astype(float), given["pg"].astype(float) ** 2, 0, 6)
    relu = analytic.clipped_normal(
        given["qb"].astype(float), given["qg"].astype(float) ** 2, 0, np.inf
    )
    np.testing.assert_allclose(known["h"][0], clip[0] + relu[0], rtol=1e-6)
    assert known["h"][1] is None


@pytest.mark.parametrize("change", ["bias", "nothing"])
def test_what_was_noted_is_void_once_channels_are_changed(parse, change: str) -> None:
    model = canonical(parse(NET, **constants()))
    again = graph.clone(model)  # metadata survives copies
    conv = next(n for n in again.graph if n.op_type == "Conv")
    assert normalized.recall(conv) is not None
    if change == "bias":
        bias = conv.inputs[2]
        bias.const_value = ir.tensor(2 * graph.array(bias), name=bias.name)
        assert normalized.recall(conv) is None
    assert normalized.forget(again)
    assert normalized.recall(conv) is None
    assert not normalized.forget(again)


def test_mean_errors_are_those_of_samples_that_are_as_the_norms_say(parse) -> None:
    """Inputs of the second convolution drawn from the distribution that the first norm promises."""
    given = constants()
    model = canonical(parse(NET, **given))
    moments = {str(v.name): m for v, m in analytic.of_model(model).items()}
    conv = next(
        n for n in model.graph if n.op_type == "Conv" and graph.attribute(n, "group", 1) > 1
    )
    error = 0.1 * draw(C, 1, 3, 3)
    found = analytic._through(conv, error, moments["c"][0])
    x = np.clip(given["pb"] + given["pg"] * RNG.standard_normal((200_000, C)), 0, 6)
    expected = x.mean(axis=0) * error.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, atol=0.02)
