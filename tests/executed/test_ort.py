"""What ONNX Runtime executes, read back from real sessions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from qgraph import errors
from qgraph.executed import ort

RNG = np.random.default_rng(0)
INT4 = RNG.integers(-8, 8, (64, 32)).astype(ml_dtypes.int4)
INT8 = RNG.integers(-127, 128, (64, 32)).astype(np.int8)
BLOCK_SCALE = np.full((2, 32), 0.01, np.float32)
SCALE = np.full(32, 0.01, np.float32)
BIAS = np.ones(32, np.float32)
BLOCKED = """g (float[n, m, 64] x) => (float[n, m, 32] y) {
    wf = DequantizeLinear <axis = 0, block_size = 32> (W, s)
    y0 = MatMul(x, wf)
    y = Add(y0, b) }"""
IN_BRANCH = """g (bool c, float[m, 64] x) => (float[m, 32] y) { y = If (c) <
    then_branch = t () => (float[m, 32] yt) {
        q, xs, xz = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, W, xz)
        f = Cast <to = 1> (i)
        a = Mul(xs, s)
        yt = Mul(f, a) },
    else_branch = e () => (float[m, 32] ye) { ye = MatMul(x, V) }> }"""


def test_fused_node_and_its_constants(write) -> None:
    seen = ort.executed_graph(write(BLOCKED, W=INT4, s=BLOCK_SCALE, b=BIAS))
    assert (seen.runtime, seen.version) == ("onnxruntime", onnxruntime.__version__)
    node = seen.producer("y")
    assert node is not None
    assert (node.op, node.domain) == ("MatMulNBits", "com.microsoft")
    assert node.attributes["bits"] == 4
    assert "block_size=32" in node.detail
    assert node.inputs[0] == "x"
    codes = node.constant(1)
    assert codes is not None
    assert (codes.dtype, codes.shape) == ("uint8", (32, 2, 16))
    assert node.constant(0) is None
    assert node.constant(99) is None
    assert seen.producer("y0") is None
    assert seen.producer("") is None


def test_configuration_is_obeyed(write) -> None:
    path = write(BLOCKED, W=INT4, s=BLOCK_SCALE, b=BIAS)
    exact = ort.executed_graph(path, {"session.qdq_matmulnbits_accuracy_level": "1"})
    assert exact.nodes[0].attributes["accuracy_level"] == 1
    plain = ort.executed_graph(path, {"session.disable_quant_qdq": "1"})
    assert "MatMulNBits" not in [n.op for n in plain.nodes]


def test_bodies_are_read_too(write) -> None:
    weights = {"W": INT8, "s": SCALE, "V": RNG.standard_normal((64, 32)).astype(np.float32)}
    seen = ort.executed_graph(write(IN_BRANCH, **weights))
    inside = seen.producer("yt")
    assert inside is not None
    assert inside.op == "DynamicQuantizeMatMul"
    assert inside.detail.startswith("in If")
    captured = inside.constant(1)
    assert captured is not None
    assert (captured.name, captured.dtype) == ("W", "int8")
    other = seen.producer("ye")
    assert other is not None
    assert other.op == "MatMul"
    assert other.constants[0].shape == (64, 32)


def test_nothing_is_left_behind(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    ort.executed_graph(write(BLOCKED, W=INT4, s=BLOCK_SCALE, b=BIAS))
    assert list(folder.iterdir()) == []


def test_weights_never_pass_through_the_saved_model(write, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    load = ort.ir.load
    monkeypatch.setattr(ort.ir, "load", lambda p: sizes.append(Path(p).stat().st_size) or load(p))
    w = RNG.standard_normal((512, 512)).astype(np.float32)
    text = "g (float[m, 512] x) => (float[m, 512] y) { y = MatMul(x, W) }"
    node = ort.executed_graph(write(text, W=w)).nodes[0]
    assert node.constants[0].shape == (512, 512)
    assert sizes[0] < 10_000


def test_a_refused_model_is_a_runtime_failure(write) -> None:
    path = write("g (float[m, 64] x) => (float[m, 32] y) { y = Nonsense(x) }")
    with pytest.raises(errors.RuntimeFailure, match="Nonsense"):
        ort.executed_graph(path)


def test_inspect_follows_the_value(write) -> None:
    ran = ort.inspect(write(BLOCKED, W=INT4, s=BLOCK_SCALE, b=BIAS), ["y0"])
    assert ran["y0"].kernel == "MatMulNBits int8-activation (accuracy_level 4)"
    assert ran["y0"].integer
