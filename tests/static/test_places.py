"""Small models of every form with static INT8, in real sessions: integer kernels, close to float, bodies and opsets."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import qgraph
from qgraph import runtime

RNG = np.random.default_rng(0)
TARGETS = ("ort", "openvino")
FULL = os.environ.get("QGRAPH_FULL") == "1"


@pytest.fixture(autouse=True)
def _seeded():
    """Whatever ran before, each test draws the same numbers."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


IMAGE = "g (float[n, 4, 8, 8] x) => (float[n, c, h, w] y)"
ROWS = "g (float[n, 16] x) => (float[n, m] y)"
CONV = "Conv <pads = [1, 1, 1, 1]>"
CONSTANTS = {
    "a": draw(4, 4, 3, 3), "b": draw(4, 4, 3, 3), "c": draw(8, 8, 3, 3), "d": draw(4, 1, 3, 3), "ba": draw(4),
    "t": draw(4, 3, 2, 2), "bt": draw(3), "t2": draw(4, 3, 2, 2), "bt2": draw(6), "t4": draw(4, 4, 2, 2),
    "k": draw(16, 12), "kt": draw(12, 16), "bk": draw(12), "bk1": draw(1, 12), "one": draw(1),
    "low": np.float32(0), "high": np.float32(6), "shp": np.array([0, 0, 4, 16], np.int64),
    "scales": np.array([1, 1, 2, 2], np.float32), "none": np.array([], np.float32), "st": np.array([0], np.int64),
    "en": np.array([2], np.int64), "ax": np.array([1], np.int64),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
}  # fmt: skip

# Name → graph, body, and how many products compute in integers in each target.
FORMS: dict[str, tuple[str, str, int, int]] = {
    "conv, bias, relu": (IMAGE, f"p = {CONV}(x, a, ba) y = Relu(p)", 1, 1),
    "depthwise": (IMAGE, "y = Conv <pads = [1, 1, 1, 1], group = 4> (x, d, ba)", 1, 1),
    "residual add": (IMAGE, f"p = {CONV}(x, a) q = {CONV}(p, b) r = Add(p, q) y = Relu(r)", 2, 2),
    "concat of convolutions": (
        IMAGE, f"p = {CONV}(x, a) q = {CONV}(x, b) r = Concat <axis = 1> (p, q) y = {CONV}(r, c)", 3, 3),
    "pooling, resize, slice": (
        IMAGE,
        f"""p = {CONV}(x, a) q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (p)
        s = Resize <mode = "nearest"> (q, none, scales) t1 = Slice(s, st, en, ax)
        u = Concat <axis = 1> (t1, t1) y = {CONV}(u, b)""", 2, 2),
    "transpose and reshape": (
        IMAGE,
        f"p = {CONV}(x, a) q = Transpose <perm = [0, 1, 3, 2]> (p) s = Reshape(q, shp) y = Conv (s, b)", 2, 2),
    "pad": (IMAGE, "p = Pad(x, pads) y = Conv(p, a, ba)", 1, 1),
    "clip": (IMAGE, f"p = {CONV}(x, a, ba) q = Clip(p, low, high) y = {CONV}(q, b)", 2, 2),
    "transposed convolution": (IMAGE, "y = ConvTranspose <strides = [2, 2]> (x, t, bt)", 0, 1),
    "transposed convolution behind a relu": (
        IMAGE, f"p = {CONV}(x, a) q = Relu(p) y = ConvTranspose <strides = [2, 2]> (q, t, bt)", 1, 2),
    "transposed convolution between convolutions": (
        IMAGE, f"p = {CONV}(x, a) q = ConvTranspose(p, t4, ba) y = {CONV}(q, b)", 2, 3),
    "grouped transposed convolution": (
        IMAGE, "y = ConvTranspose <strides = [2, 2], group = 2> (x, t2, bt2)", 0, 0),
    "gemm": (ROWS, "y = Gemm(x, k, bk)", 1, 1),
    "gemm transB": (ROWS, "y = Gemm <transB = 1> (x, kt, bk)", 1, 1),
    "gemm with a row as bias": (ROWS, "y = Gemm(x, k, bk1)", 1, 1),
    "gemm with one number as bias": (ROWS, "y = Gemm(x, k, one)", 1, 1),
    "gemm without bias": (ROWS, "y = Gemm(x, k)", 1, 1),
    "matmul": (ROWS, "y = MatMul(x, k)", 1, 1),
    "matmul, add": (ROWS, "p = MatMul(x, k) y = Add(p, bk)", 1, 1),
    "matmul of an undeclared rank": (
        ROWS, "p = MatMul(x, k) q = Add(p, bk) s = Relu(q) u = MatMul(s, kt) y = Add(one, u)", 2, 2),
    "biases behind one identity": (
        IMAGE, f"i = Identity(ba) p = {CONV}(x, a, i) y = {CONV}(p, b, i)", 2, 2),
}  # fmt: skip


def used(body: str) -> dict[str, Any]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in CONSTANTS.items() if name in words}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_run_in_integers_and_are_close(form, target, parse, executed, tmp_path):
    header, body, *integers = FORMS[form]
    model = parse(f"{header} {{ {body} }}", **used(body))
    shape = (4, 8, 8) if header == IMAGE else (16,)
    data = [{"x": draw(n, *shape)} for n in (2, 3, 2, 1)]
    path = tmp_path / "q.onnx"
    result = qgraph.optimize(model, "int8-static", target=target, data=data, output=path)
    found = executed(path, target)
    count = integers[TARGETS.index(target)]
    assert sum(integer for _, integer in found.products) == count
    assert sum(o.integer for o in result.report.operators) == count
    assert all(o.integer or o.reason for o in result.report.operators)
    # What is not integer has no codes either: nothing is expanded at every run.
    assert all(e.spec or e.code for e in result.ledger)
    for feeds in data:
        (want,), (got,) = runtime.session(model).run(None, feeds), found.run(feeds)
        assert got.shape == want.shape
        assert qgraph.numerics.sqnr_db(want, got) > 25


OPSETS = {
    9: "p = Conv <pads = [1, 1, 1, 1]> (x, a) q = Clip <min = 0.0, max = 6.0> (p) y = Conv (q, b, ba)",
    10: "p = Conv <pads = [1, 1, 1, 1]> (x, a) q = Relu(p) y = Conv (q, b, ba)",
    **dict.fromkeys(range(11, 25), "p = Conv <pads = [1, 1, 1, 1]> (x, a) q = Clip(p, low, high) y = Conv (q, b, ba)"),
}  # fmt: skip


TRIED = [(o, t) for t in TARGETS for o in (9, 10, 11, 13, 16, 19, 21, 23, 24)]
SLOW = [(o, "openvino") for o in (11, 16, 19, 23)]  # of the same form as their neighbours


@pytest.mark.parametrize(("opset", "target"), [c for c in TRIED if FULL or c not in SLOW])
def test_every_opset(opset, target, parse, executed, tmp_path):
    body = OPSETS[opset]
    model = parse(
        f"{IMAGE} {{ {body} }}", opset=opset, ir_version=4 if opset == 9 else 10, **used(body)
    )
    data = [{"x": draw(n, 4, 8, 8)} for n in (2, 3)]
    path = tmp_path / "q.onnx"
    qgraph.optimize(model, "int8-static", target=target, data=data, output=path)
    found = executed(path, target)
    assert found.all_integer and len(found.products) == 2
    for feeds in data:
        assert (
            qgraph.numerics.sqnr_db(runtime.session(model).run(None, feeds)[0], found.run(feeds)[0])
            > 25
        )


@pytest.mark.parametrize("target", TARGETS)
def test_sequences_of_any_length(target, parse, executed, tmp_path):
    body = "p = MatMul(x, k) q = Add(p, bk) s = Tanh(q) y = MatMul(s, kt)"
    text = f"g (float[n, length, 16] x) => (float[n, length, 16] y) {{ {body} }}"
    model = parse(text, **used(body))
    data = [{"x": draw(n, length, 16)} for n, length in ((1, 3), (2, 7), (1, 12))]
    path = tmp_path / "q.onnx"
    qgraph.optimize(model, "int8-static", target=target, data=data, output=path)
    found = executed(path, target)
    assert found.all_integer
    for n, length in ((1, 1), (3, 5), (2, 40)):
        feeds = {"x": draw(n, length, 16)}
        assert (
            qgraph.numerics.sqnr_db(runtime.session(model).run(None, feeds)[0], found.run(feeds)[0])
            > 25
        )


@pytest.mark.parametrize("target", TARGETS)
def test_an_activation_that_comes_out_of_a_quantized_table(target, parse, executed, tmp_path):
    text = """g (int64[n, length] i) => (float[n, length, 16] y) {
        x = Gather(table, i) p = MatMul(x, k) q = Tanh(p) y = MatMul(q, kt) }"""
    model = parse(text, table=draw(100, 16), k=CONSTANTS["k"], kt=CONSTANTS["kt"])
    data = [{"i": RNG.integers(0, 100, (2, length))} for length in (3, 9, 30)]
    path = tmp_path / "q.onnx"
    result = qgraph.optimize(model, "int8-static", target=target, data=data, output=path)
    assert [bool(e.spec) for e in result.ledger] == [True] * 3
    found = executed(path, target)
    assert found.all_integer
    for feeds in data:
        assert (
            qgraph.numerics.sqnr_db(runtime.session(model).run(None, feeds)[0], found.run(feeds)[0])
            > 25
        )


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("target", TARGETS)
def test_floats_that_a_convolution_and_a_product_add_up_to(size, target, parse, executed, tmp_path):
    """A residual stream of floats before LayerNormalization, of values whose variance is near epsilon too."""
    body = """c = Conv <pads = [1, 1, 1, 1], group = 4> (x, d) u = Reshape(c, rows)
        t0 = Transpose <perm = [0, 2, 1]> (u) l = LayerNormalization <axis = -1> (t0, gain, shift)
        m = MatMul(l, k4) e = Tanh(m) v = MatMul(e, k5) w = Add(t0, v)
        y = LayerNormalization <axis = -1> (w, gain, shift)"""
    constants = {
        "d": CONSTANTS["d"], "rows": np.array([0, 4, 64], np.int64), "gain": np.ones(4, np.float32),
        "shift": np.zeros(4, np.float32), "k4": draw(4, 16), "k5": draw(16, 4) * np.float32(0.001),
    }  # fmt: skip
    model = parse(f"g (float[n, 4, 8, 8] x) => (float[n, s, c] y) {{ {body} }}", **constants)
    data = [{"x": draw(2, 4, 8, 8) * np.float32(size)} for _ in range(6)]
    path = tmp_path / "q.onnx"
    qgraph.optimize(model, "int8-static", target=target, data=data, output=path)
    found = executed(path, target)
    assert found.all_integer
    want = runtime.session(model).run(None, data[0])[0]
    assert qgraph.numerics.sqnr_db(want, found.run(data[0])[0]) > 25
