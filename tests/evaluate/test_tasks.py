"""Accuracy, agreement, embeddings and rank correlation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, evaluate


def model(body: str = "y = Identity(x)", outputs: str = "float[n, 3] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3] x) => ({outputs}) {{ {body} }}'
    )


FEEDS = [{"x": np.eye(3, dtype=np.float32)[[0, 1]]}, {"x": np.eye(3, dtype=np.float32)[[2]]}]


def test_accuracy() -> None:
    assert evaluate.accuracy(model(), FEEDS, [[0, 1], 2]).value == 1
    assert evaluate.accuracy(model(), FEEDS, [[0, 0], [2]]).value == 2 / 3
    assert evaluate.accuracy(model(), FEEDS, [[0, -1], -100]).value == 1


def test_agreement() -> None:
    found = evaluate.agreement(model(), model("y = Neg(x)"), FEEDS)
    # Neg has its first maximum elsewhere in each row.
    assert found.value == 0
    shifted = model("c = Constant<value_floats=[0.0, 0.0, 5.0]>() y = Add(x, c)")
    found = evaluate.agreement(model(), shifted, FEEDS)
    assert found.value == 1 / 3
    assert (found.low, found.high) == (0, 1)


def test_accuracies_are_compared_in_pairs() -> None:
    shifted = model("c = Constant<value_floats=[0.0, 0.0, 5.0]>() y = Add(x, c)")
    found = evaluate.accuracies(model(), shifted, FEEDS, [[0, -1], 2])
    assert (found.float_accuracy.value, found.quant_accuracy.value) == (1, 0.5)
    assert (found.change.value, found.agreement.value) == (-0.5, 0.5)
    assert (found.change.low, found.change.high) == (-1, 0)
    same = evaluate.accuracies(model(), model(), FEEDS, [[0, 0], 2])
    assert same.float_accuracy == evaluate.accuracy(model(), FEEDS, [[0, 0], 2])
    assert same.change.value == 0
    with pytest.raises(errors.InputError, match="QG125 labels: 1 labels for 2 samples"):
        evaluate.accuracies(model(), model(), FEEDS, [0])


def test_which_output() -> None:
    both = model("z = Neg(x) logits = Identity(x)", "float[n, 3] z, float[n, 3] logits")
    assert evaluate.accuracy(both, FEEDS, [[0, 1], 2]).value == 1
    assert evaluate.accuracy(both, FEEDS, [[1, 0], 0], logits="z").value == 1
    unclear = model("z = Neg(x) y = Identity(x)", "float[n, 3] z, float[n, 3] y")
    with pytest.raises(errors.InputError, match="QG121: which output holds the predictions"):
        evaluate.accuracy(unclear, FEEDS, [[0, 1], 2])


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0], "QG125 labels: 1 labels for 2 samples"),
        ([0, 1], "QG125 labels of sample 0: 1 labels for 2 predictions"),
    ],
)
def test_qg125(labels: Any, text: str) -> None:
    with pytest.raises(errors.InputError, match=text):
        evaluate.accuracy(model(), FEEDS, labels)


def test_mean_pool_leaves_out_padding() -> None:
    hidden = np.array([[[6.0, 0], [0, 8], [99, 99]], [[0, 2], [5, 5], [5, 5]]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(evaluate.mean_pool(hidden, mask), [[0.6, 0.8], [0, 1]])


def test_cosines() -> None:
    found = evaluate.cosines([[3, 4], [1, 0]], [[6, 8], [0, 2]])
    np.testing.assert_allclose(found, [1, 0])


def test_spearman_by_hand() -> None:
    assert evaluate.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # Ranks 1, 2.5, 2.5, 4 against 1 … 4: covariance 4.5 / sqrt(4.5 * 5).
    assert evaluate.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert evaluate.spearman([3, 2, 1], [1, 2, 3]) == -1
