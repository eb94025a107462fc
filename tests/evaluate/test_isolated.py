"""Which layer hurts: errors where they arise, and where they arrive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, evaluate
from qgraph.evaluate.meanings import Meaning

FEEDS = {"x": np.array([1, -2, 3], np.float32)}


def chain(first: float = 1.0, second: float = 1.0, names: str = "bc") -> ir.Model:
    b, c = names
    return ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n] x) => (float[n] y)
        {{
            p = Constant<value_float={first}>()
            q = Constant<value_float={second}>()
            {b} = Mul(x, p)
            {c} = Mul({b}, q)
            i = Cast<to=6>({c})
            y = Neg({c})
        }}
        """
    )


def losses(*args: Any, **kwargs: Any) -> Any:
    return evaluate.tensor_losses(*args, **kwargs).tensors


def test_each_error_is_told_where_it_arises() -> None:
    found = {t.name: t for t in losses(chain(), chain(0.9, 1.01), FEEDS, ["b", "c", "y"])}
    assert found["b"].isolated.sqnr_db == pytest.approx(20, abs=1e-4)
    assert found["c"].isolated.sqnr_db == pytest.approx(40, abs=1e-3)
    assert found["y"].isolated.sqnr_db == math.inf
    # 0.9 x 1.01 = 0.909
    arrived = -20 * math.log10(1 - 0.909)
    assert [found[n].accumulated.sqnr_db for n in "cy"] == pytest.approx([arrived] * 2, abs=1e-4)
    assert "Mul" in found["c"].operator


def test_errors_can_cancel_on_the_way() -> None:
    (found,) = losses(chain(), chain(0.5, 2.0), FEEDS, ["c"])
    assert found.accumulated.sqnr_db == math.inf
    # Between x and c nothing else is compared, so c alone is the way from x.
    assert found.isolated.sqnr_db == math.inf
    both = {t.name: t for t in losses(chain(), chain(0.5, 2.0), FEEDS)}
    assert both["b"].isolated.sqnr_db == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    assert both["c"].isolated.sqnr_db == pytest.approx(0, abs=1e-4)


def test_a_value_of_one_model_alone_is_passed_through() -> None:
    other = chain(0.9, 1.0, "zc")
    found = {t.name: t for t in losses(chain(), other, FEEDS)}
    assert "b" not in found
    assert found["c"].isolated.sqnr_db == pytest.approx(20, abs=1e-4)


def test_the_models_are_left_alone() -> None:
    model = chain()
    evaluate.tensor_losses(model, model, [FEEDS, FEEDS])
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(errors.InputError, match="QG124 float model: has no float value 'bb'"):
        evaluate.tensor_losses(chain(), chain(), FEEDS, ["bb"])


@pytest.fixture
def images() -> Any:
    rng = np.random.default_rng(0)
    return [{"image": rng.random((1, 1, 8, 8), np.float32)} for _ in range(8)]


@pytest.mark.parametrize("recipe", ["int8-weights", "int8-dynamic"])
def test_a_net_whose_normalisations_were_folded(recipe: str, images: Any) -> None:
    result = qgraph.optimize("zoo:tiny-cnn", recipe, verify="off", inspect=False)
    found = evaluate.tensor_losses("zoo:tiny-cnn", result.model, images)
    assert all("/Conv_output" in name for name in found.moved)  # what stood before a normalisation
    assert len(found.moved) >= 7
    assert 1 <= len(found.worst()) < len(found.tensors)
    assert all(t.isolated.sqnr_db > 25 for t in found.tensors)
    assert found.tensors[-1].accumulated.sqnr_db > 25


def test_the_layer_that_was_spoiled_is_found(images: Any) -> None:
    """One weight gets 2 bits, in front of others with 8."""
    rules = ["linear.weights=int8.ch", "min_elements=0"]
    tokens = [{"input_ids": np.random.default_rng(i).integers(0, 1024, (1, 16))} for i in range(2)]
    result = qgraph.optimize(
        "zoo:tiny-llama", "int8-weights", overrides=rules, inspect=False, verify="off"
    )
    assert evaluate.tensor_losses("zoo:tiny-llama", result.model, tokens).moved == ()
    name = next(
        n for n in result.model.graph.initializers if "layers.2.up" in n and "scale" not in n
    )
    held = result.model.graph.initializers[name]
    array = held.const_value.numpy()
    held.const_value = ir.tensor(array // 64 * 64, name=name)
    worst = evaluate.tensor_losses("zoo:tiny-llama", result.model, tokens).worst()[0]
    assert "layers.2" in worst.operator
    assert "up_proj" in worst.operator
    assert worst.isolated.sqnr_db < 15


def test_smoothed_and_rotated_values_are_told_apart_from_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16, 32))
    turn = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    others = {
        "folded": x * rng.uniform(0.5, 3, 32) + rng.standard_normal(32),
        "folded on axis 1": x * rng.uniform(0.5, 3, (16, 1)),
        "smoothed a little": x * rng.uniform(0.9, 1.1, 32),
        "rotated": x @ turn,
        "permuted": x[..., ::-1],
    }
    for what, y in others.items():
        assert is_other(x, y + 1e-3 * rng.standard_normal(x.shape)), what
    noisy = {f"noise {s}": x + s * rng.standard_normal(x.shape) for s in (0.001, 0.1, 1.0, 3.0)}
    noisy["one channel shifted"] = (
        x + 0.3 * (np.arange(32) == 3) + 0.02 * rng.standard_normal(x.shape)
    )
    noisy["zero"] = 0 * x
    noisy["equal"] = x
    for what, y in noisy.items():
        assert not is_other(x, y), what


def is_other(x: Any, y: Any) -> bool:
    meaning = Meaning()
    for pair in zip(x[:, None], y[:, None], strict=True):
        meaning.add(*pair)
    return meaning.is_other()
