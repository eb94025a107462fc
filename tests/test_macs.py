"""Multiplications, counted on the shapes of a run: in the main graph, in branches and in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import files, macs

M, K, N = 3, 8, 5
ONE = M * K * N
YES, NO = np.array(True), np.array(False)
X = np.ones((M, K), np.float32)


def model(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, shape in (("W", (K, N)), ("V", (N, K))):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
        )
    return files.load(proto)


BRANCHES = """g (bool q, float[m, 8] x) => (float[m, 5] y)
{ z = MatMul(x, W)
  u = If (q) <then_branch = a () => (float[m, 5] p) { p = MatMul(x, W) },
     else_branch = b () => (float[m, 5] r) { s = MatMul(z, V) r = MatMul(s, W) }>
  y = Add(z, u) }"""
LOOP = """g (int64 turns, bool q, float[m, 8] x) => (float[m, 8] y)
{ y = Loop (turns, q, x) <body = t (int64 i, bool go, float[m, 8] h) => (bool on, float[m, 8] k)
  { on = Identity(go) p = MatMul(h, W) k = MatMul(p, V) }> }"""
LOOP_IN_IF = """g (int64 turns, bool q, float[m, 8] x) => (float[m, 8] y)
{ y = If (q) <then_branch = a () => (float[m, 8] u) {
    u = Loop (turns, q, x) <body = t (int64 i, bool go, float[m, 8] h) => (bool on, float[m, 8] k)
      { on = Identity(go) p = MatMul(h, W) k = MatMul(p, V) }> },
  else_branch = b () => (float[m, 8] v) { v = Identity(x) }> }"""
IF_IN_LOOP = """g (int64 turns, bool q, float[m, 8] x) => (float[m, 8] y)
{ y = Loop (turns, q, x) <body = t (int64 i, bool go, float[m, 8] h) => (bool on, float[m, 8] k)
  { on = Identity(go) one = Constant <value_int = 1> () odd = Equal(i, one)
    k = If (odd) <then_branch = a () => (float[m, 8] u) { p = MatMul(h, W) u = MatMul(p, V) },
      else_branch = b () => (float[m, 8] v) { v = Identity(h) }> }> }"""


def turns(count: int, q: Any = YES) -> dict[str, Any]:
    return {"turns": np.array(count), "q": q, "x": X}


@pytest.mark.parametrize(
    ("text", "feeds", "counts"),
    [
        (BRANCHES, {"q": YES, "x": X}, {"z": ONE, "p": ONE, "s": 0, "r": 0}),
        (BRANCHES, {"q": NO, "x": X}, {"z": ONE, "p": 0, "s": ONE, "r": ONE}),
        (LOOP, turns(4), {"p": 4 * ONE, "k": 4 * ONE}),
        (LOOP, turns(0), {"p": 0, "k": 0}),
        (LOOP_IN_IF, turns(3), {"p": 3 * ONE, "k": 3 * ONE}),
        (LOOP_IN_IF, turns(3, NO), {"p": 0, "k": 0}),
        (IF_IN_LOOP, turns(3), {}),
    ],
    ids=["then", "else", "turns", "no-turn", "loop-in-if", "other-branch", "if-in-loop"],
)
def test_bodies(text, feeds, counts):
    original = model(text)
    before = len(original.graph.outputs)
    assert macs.count(original, feeds) == counts
    assert len(original.graph.outputs) == before


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("first", ["y", ""])
def test_recurrent_operators(op, gates, first):
    """Also where the first output is left out."""
    text = f"""g (float[t, b, {K}] x, float[2, {gates * N}, {K}] A, float[2, {gates * N}, {N}] R)
        => (float[2, b, {N}] h)
        {{ y, h = {op} <hidden_size = {N}, direction = "bidirectional"> (x, A, R) }}"""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.node[0].output[0] = first
    for name, k in (("A", K), ("R", N)):
        held = np.ones((2, gates * N, k), np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(held, name))
    for index in (2, 1):
        del proto.graph.input[index]
    found = macs.count(files.load(proto), {"x": np.ones((7, 2, K), np.float32)})
    assert found == {first or "h": 7 * 2 * 2 * gates * N * (K + N)}
