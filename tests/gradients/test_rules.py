"""Each rule against central differences of the operator's definition (onnx.reference, float64)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qgraph.gradients import Tape  # noqa: F401  (all rules are registered)
from qgraph.gradients.rules import RULES, Site

OPSET = 23
STEP = 1e-5
# Their definition is computed in float32 by onnx.reference: (step, bound).
COARSE = {"Erf": (1e-2, 5e-4), "Gelu": (1e-2, 5e-4)}


def _draw(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(sum(shape) + 1)
    return rng.uniform(low, high, shape)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = _draw(2, 3, 4)
POSITIVE = _draw(2, 3, 4, low=0.5)
KEYS, TABLE = _draw(2, 1, 5, 4), _draw(7, 2)
SHARED_HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}
HALF_OF_PAIRS = {"num_heads": 2, "rotary_embedding_dim": 4, "interleaved": 1}
# Operator, inputs, attributes. Inputs of integers and booleans are not differentiated.
CASES: list[tuple[str, list[np.ndarray], dict[str, Any]]] = [
    ("Neg", [X], {}),
    ("Abs", [X], {}),
    ("Sqrt", [POSITIVE], {}),
    ("Reciprocal", [POSITIVE], {}),
    ("Exp", [X], {}),
    ("Log", [POSITIVE], {}),
    ("Sin", [X], {}),
    ("Cos", [X], {}),
    ("Tanh", [X], {}),
    ("Sigmoid", [X], {}),
    ("Softplus", [X], {}),
    ("Erf", [X], {}),
    ("Relu", [X], {}),
    ("LeakyRelu", [X], {"alpha": 0.3}),
    ("Elu", [X], {"alpha": 0.7}),
    ("HardSigmoid", [2 * X], {"alpha": 0.4, "beta": 0.6}),
    ("HardSwish", [2.5 * X], {}),
    ("Gelu", [X], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Clip", [X, np.array(-1.0), np.array(0.5)], {}),
    ("Min", [X, _draw(3, 1)], {}),
    ("Max", [_draw(4), X], {}),
    ("Add", [X, _draw(3, 1)], {}),
    ("Sub", [_draw(4), X], {}),
    ("Sub", [X, np.array(2.0)], {}),
    ("Mul", [X, _draw(3, 1)], {}),
    ("Mul", [_draw(1, 1, 4), X], {}),
    ("Div", [X, _draw(3, 1, low=0.5)], {}),
    ("Where", [X > 0, X, _draw(1, 4)], {}),
    ("Reshape", [X, _ints(4, 6)], {}),
    ("Squeeze", [_draw(2, 1, 3), _ints(1)], {}),
    ("Unsqueeze", [X, _ints(0, 2)], {}),
    ("Flatten", [X], {"axis": 2}),
    ("Identity", [X], {}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Expand", [_draw(3, 1), _ints(2, 3, 4)], {}),
    ("Concat", [X, _draw(2, 1, 4)], {"axis": 1}),
    ("Split", [X, _ints(1, 3)], {"axis": 2}),
    ("Slice", [X, _ints(1, 0), _ints(3, 100), _ints(1, -1), _ints(1, 2)], {}),
    ("Slice", [X, _ints(-1), _ints(-100), _ints(2), _ints(-2)], {}),
    ("Gather", [X, np.array([[0, 2], [2, 2]])], {"axis": 1}),
    ("Gather", [X, np.array(-1)], {"axis": -1}),
    ("ReduceSum", [X, _ints(1)], {"keepdims": 0}),
    ("ReduceMean", [X, _ints(-1, 0)], {}),
    ("ReduceMean", [X], {}),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    ("Softmax", [X], {"axis": 1}),
    ("LogSoftmax", [X], {}),
    ("LayerNormalization", [X, _draw(4), _draw(4) + 1], {}),
    ("LayerNormalization", [X, _draw(3, 4)], {"axis": 1, "epsilon": 1e-2}),
    ("RMSNormalization", [X, _draw(4)], {"epsilon": 1e-2}),
    ("MatMul", [X, _draw(4, 5)], {}),
    ("MatMul", [X, _draw(2, 4, 5)], {}),
    ("MatMul", [_draw(4), _draw(2, 4, 5)], {}),
    ("MatMul", [X, _draw(4)], {}),
    ("MatMul", [_draw(1, 3, 4), _draw(2, 4, 5)], {}),
    ("Gemm", [_draw(4, 3), _draw(5, 4), _draw(5)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    ("Gemm", [_draw(3, 4), _draw(4, 5), _draw(3, 1)], {"beta": 2.0}),
    ("Gemm", [_draw(3, 4), _draw(4, 5)], {}),
    ("Conv", [_draw(2, 4, 5, 6), _draw(6, 2, 3, 2), _draw(6)], {"group": 2, "pads": [1, 0, 1, 1], "strides": [2, 1]}),
    ("Conv", [_draw(1, 2, 9), _draw(3, 2, 3)], {"dilations": [2], "auto_pad": "SAME_LOWER"}),
    ("Conv", [_draw(1, 3, 4, 4), _draw(3, 1, 3, 3)], {"group": 3, "pads": [1, 1, 1, 1]}),
    ("MaxPool", [_draw(2, 2, 5, 5)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ("AveragePool", [_draw(2, 2, 5, 5)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [_draw(1, 2, 6)], {"kernel_shape": [2], "pads": [1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", [_draw(2, 3, 4, 2)], {}),
    ("Attention", [_draw(2, 2, 3, 4), _draw(2, 2, 5, 4), _draw(2, 2, 5, 3)], {}),
    ("Attention", [_draw(1, 3, 8), _draw(1, 3, 4), _draw(1, 3, 6)], SHARED_HEADS),
    ("Attention", [_draw(2, 2, 3, 4), KEYS, KEYS, _draw(3, 5)], {"softcap": 1.5, "scale": 0.7}),
    ("Attention", [_draw(1, 1, 3, 2), _draw(1, 1, 3, 2), _draw(1, 1, 3, 2), _draw(3, 3) > -1], {"is_causal": 1}),
    ("RotaryEmbedding", [_draw(2, 2, 3, 6), _draw(2, 3, 3), _draw(2, 3, 3)], {}),
    ("RotaryEmbedding", [_draw(1, 3, 12), TABLE, TABLE, np.array([[1, 4, 6]])], HALF_OF_PAIRS),
]  # fmt: skip


def _evaluator(op: str, x: list[np.ndarray], attributes: dict[str, Any]) -> Any:
    """Runs the operator alone, in the inputs' types."""
    names = [f"x{i}" for i in range(len(x))]
    count = 2 if op == "Split" else 1
    node = helper.make_node(op, names, [f"y{i}" for i in range(count)], **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, x, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(f"y{i}", 11, None) for i in range(count)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    session = ReferenceEvaluator(model)
    return node, lambda given: session.run(None, dict(zip(names, given, strict=True)))


# How many inputs have gradients, where the rest are masks and tables that no weight decides.
DIFFERENTIATED = {"Attention": 3, "RotaryEmbedding": 1}


@pytest.mark.parametrize(
    ("op", "x", "attributes"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_rule_is_the_derivative(op: str, x: list[np.ndarray], attributes: dict[str, Any]) -> None:
    """Every element of every float input."""
    node, run = _evaluator(op, x, attributes)
    y = run(x)
    weights = [np.random.default_rng(7).standard_normal(each.shape) for each in y]
    count = DIFFERENTIATED.get(op, len(x))
    wanted = [a.dtype.kind == "f" and i < count for i, a in enumerate(x)]
    site = Site(ir.serde.deserialize_node(node), x, y, wanted)
    found = list(RULES[op](site, weights))
    size, bound = COARSE.get(op, (STEP, 1e-6))
    for index, array in enumerate(x):
        if not wanted[index]:
            assert index >= len(found) or found[index] is None
            continue
        slope = np.empty(array.shape)
        for place in np.ndindex(array.shape):
            sides = []
            for step in (size, -size):
                moved = array.copy()
                moved[place] += step
                given = [moved if i == index else a for i, a in enumerate(x)]
                sides.append(
                    sum(float((w * z).sum()) for w, z in zip(weights, run(given), strict=True))
                )
            slope[place] = (sides[0] - sides[1]) / (2 * size)
        got = found[index]
        assert got is not None and got.shape == array.shape
        np.testing.assert_allclose(got, slope, rtol=bound, atol=bound)


def test_only_what_is_wanted_is_computed() -> None:
    """A product with a constant has no gradient for it."""
    a, b = _draw(3, 4), _draw(4, 5)
    node = ir.serde.deserialize_node(onnx.helper.make_node("MatMul", ["a", "b"], ["y"]))
    da, db = RULES["MatMul"](Site(node, [a, b], [a @ b], (True, False)), [np.ones((3, 5))])
    assert da is not None and db is None


def test_every_rule_has_a_case() -> None:
    """Cast, Dropout and Pow are tested in a graph: here they would be the identity, or have an exponent."""
    elsewhere = {"BatchNormalization", "Cast", "Dropout", "Pow", "SimplifiedLayerNormalization"}
    assert set(RULES) - elsewhere == {op for op, *_ in CASES}
