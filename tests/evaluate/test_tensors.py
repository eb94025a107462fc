"""Errors of values inside the graph."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, evaluate, numerics
from qgraph.evaluate import tensors


def chain(scale: float, last: str = "y = Relu(b)") -> ir.Model:
    return ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n] x) => (float[n] y)
        {{
            c = Constant<value_float={scale}>()
            a = Neg(x)
            b = Mul(a, c)
            i = Cast<to=6>(b)
            {last}
        }}
        """
    )


FEEDS = {"x": np.array([-1, 2, 3], np.float32)}


def test_errors_by_hand() -> None:
    found = evaluate.sqnr_per_tensor(chain(1.0), chain(0.9), FEEDS, ["a", "b", "y"])
    assert list(found) == ["a", "b", "y"]
    assert found["a"].sqnr_db == math.inf
    assert found["b"].sqnr_db == pytest.approx(20, abs=1e-5)
    assert found["b"].max_abs == pytest.approx(0.3, rel=1e-5)


def test_all_common_float_values_by_default() -> None:
    other = chain(0.5, "z = Abs(b) y = Identity(z)")
    assert list(evaluate.sqnr_per_tensor(chain(1.0), other, FEEDS)) == ["c", "a", "b", "y"]


def test_several_samples_are_pooled() -> None:
    feeds = [{"x": np.array([1], np.float32)}, {"x": np.array([-3, 4], np.float32)}]
    pooled = evaluate.sqnr_per_tensor(chain(1.0), chain(0.0), feeds, ["b"])["b"]
    assert pooled.sqnr_db == 0
    assert pooled.max_abs == 4


def test_models_are_left_alone() -> None:
    model = chain(1.0)
    evaluate.sqnr_per_tensor(model, model, FEEDS, ["a"])
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("name", ["aa", "i", "x"])
def test_qg124_names(name: str) -> None:
    other = chain(1.0, "aa = Abs(b) y = Identity(aa)")
    with pytest.raises(errors.InputError, match=f"QG124 float model: has no float value '{name}'"):
        evaluate.sqnr_per_tensor(chain(1.0), other, FEEDS, [name])


def test_qg124_in_the_quantized_model() -> None:
    other = chain(1.0, "aa = Abs(b) y = Identity(aa)")
    with pytest.raises(errors.InputError, match=r"QG124 quantized model: .* 'aa'"):
        evaluate.sqnr_per_tensor(other, chain(1.0), FEEDS, ["aa"])


def test_qg124_nothing_in_common() -> None:
    model = chain(1.0)
    for node in model.graph:
        node.outputs[0].name += "_other"
    with pytest.raises(errors.InputError, match="QG124 float model: shares no float value"):
        evaluate.sqnr_per_tensor(chain(1.0), model, FEEDS)


def test_qg120_shapes() -> None:
    other = chain(1.0, "y = Concat<axis=0>(b, b)")
    with pytest.raises(errors.InputError, match=r"QG120 value 'y': shape \[3\] in the float"):
        evaluate.sqnr_per_tensor(chain(1.0), other, FEEDS, ["y"])


def test_meter_agrees_with_numerics() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 50)).astype(np.float32)
    meter = tensors.ErrorMeter()
    for a, b in zip(x, y, strict=True):
        meter.add(a, b)
    assert meter.result().sqnr_db == pytest.approx(numerics.sqnr_db(x, y))


def test_infinite_in_both_is_no_error() -> None:
    meter = tensors.ErrorMeter()
    meter.add(np.array([1, -np.inf]), np.array([1, -np.inf]))
    assert meter.result() == evaluate.TensorError(math.inf, 0, 1, 1, 0)


def test_zero_tensors_have_no_cosine() -> None:
    meter = tensors.ErrorMeter()
    meter.add(np.zeros(2), np.zeros(2))
    found = meter.result()
    assert found.sqnr_db == math.inf
    assert math.isnan(found.cosine)
    assert math.isnan(found.worst_cosine)
    assert math.isnan(tensors.ErrorMeter().result().worst_cosine)
