"""Vectors of two models: cosines, rank correlations, and what cannot be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, evaluate


def model(body: str = "y = Identity(x)", shape: str = "n, 2") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}'
    )


def rows(*values: Any) -> list[dict[str, Any]]:
    return [{"x": np.array([v], np.float32)} for v in values]


TURNED = "c = Constant<value_floats=[1.0, 0.0]>() y = Mul(x, c)"
POINTS = rows([1, 0], [3, 4], [0, 2], [1, 1])


def test_equal_models() -> None:
    found = evaluate.embeddings(model(), model(), POINTS)
    assert (found.vectors, found.output) == (4, "y")
    assert found.cosine.value == pytest.approx(1)
    assert found.worst_cosine == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    assert (found.float_spearman, found.quant_spearman) == (None, None)


def test_cosines_by_hand() -> None:
    found = evaluate.embeddings(model(), model(TURNED), rows([1, 0], [3, 4]))
    assert found.cosine.value == pytest.approx((1 + 3 / 5) / 2)
    assert found.worst_cosine == pytest.approx(3 / 5)


def test_scores_judge_each_model() -> None:
    points = rows([1, 0], [1, 0], [1, 0], [1, 1], [1, 0], [0, 1])
    swapped = model("c = Constant<value_floats=[1.0, -1.0]>() y = Mul(x, c)")
    found = evaluate.embeddings(model(), swapped, points, scores=[5.0, 3.0, 1.0])
    assert found.float_spearman == pytest.approx(1)
    assert found.quant_spearman == pytest.approx(1)
    found = evaluate.embeddings(model(), model(), points, scores=[1.0, 3.0, 5.0])
    assert found.float_spearman == pytest.approx(-1)


def test_hidden_states_are_pooled_without_padding() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[b, t, 2] x, float[b, t] attention_mask) => (float[b, t, 2] y) {{ {} }}"""
    plain = ir.from_onnx_text(text.format("y = Identity(x)"))
    noisy = ir.from_onnx_text(
        text.format("c = Constant<value_floats=[5.0]>() one = Constant<value_floats=[1.0]>()"
                    " a = Sub(one, attention_mask) m = Mul(a, c) axes = Constant<value_ints=[2]>()"
                    " u = Unsqueeze(m, axes) y = Add(x, u)")
    )  # fmt: skip
    feeds = [
        {
            "x": np.ones((1, 3, 2), np.float32) * [[[1], [2], [3]]],
            "attention_mask": np.array([[1, 1, 0]]),
        }
    ]
    feeds = [{k: v.astype(np.float32) for k, v in f.items()} for f in feeds]
    feeds[0]["x"][0, 0, 1] = 5
    assert evaluate.embeddings(plain, noisy, feeds).cosine.value == pytest.approx(1)
    first = evaluate.embeddings(plain, noisy, feeds, pool="first")
    assert first.cosine.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("points", "options", "text"),
    [
        (POINTS, {"scores": [1.0]}, "QG125 scores: 1 scores for 4 vectors"),
        (POINTS, {"output": "yy"}, "QG121: there is no float output 'yy'"),
    ],
)
def test_refusals(points: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.InputError, match=text):
        evaluate.embeddings(model(), model(), points, **options)


def test_a_vector_is_needed() -> None:
    flat = model(shape="n")
    with pytest.raises(errors.InputError, match=r"QG121 output 'y': has shape \[1\], expected"):
        evaluate.embeddings(flat, flat, [{"x": np.ones(1, np.float32)}])
