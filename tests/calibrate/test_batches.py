"""Samples that run together give what they give alone, and only run together where they do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from qgraph import calibrate, data, files
from qgraph.calibrate import batches, sessions
from qgraph.observers import Stats, Wanted

RNG = np.random.default_rng(23)
# `p` knows nothing of the samples; `t` has them on its last axis.
ROWS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[b, n, 2] y) {
  w = Constant<value = float[4, 2] {0.3, -1.7, 0.9, 2.1, -0.4, 0.6, 1.3, -0.8}>()
  one = Constant<value_ints = [0, 2]>()
  m = MatMul(x, w)  y = Softmax(m)
  s = Shape<start = 1, end = 2>(x)  p = ConstantOfShape<value = float[1] {0.5}>(s)  q = Exp(p)
  u = Unsqueeze(q, one)  z = Add(y, u) }"""
MIXED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[b, n, 4] y) {
  c = ReduceMean<axes = [0], keepdims = 1>(x)  y = Sub(x, c) }"""
LAST = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[n, 4, b] y) { t = Transpose<perm = [1, 2, 0]>(x)  y = Exp(t) }"""
FLAT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[1, m] y) {
  to = Constant<value_ints = [1, -1]>()  r = Reshape(x, to)  y = Exp(r) }"""
ONE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[n, 4] y) {
  axis = Constant<value_ints = [0]>()  r = Squeeze(x, axis)  y = Exp(r) }"""
STEPS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n, 4] x) => (float[k, 3] y) { i = NonZero(x)  f = Cast<to = 1>(i)  y = Transpose(f) }"""


def samples(*lengths: int) -> list[dict[str, Any]]:
    return [{"x": RNG.normal(size=(1, n, 4)).astype(np.float32)} for n in lengths]


class Runs:
    """How many samples each run had."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        run = sessions.Instrumented.run

        def watched(this: Any, feeds: Any, *rest: Any) -> Any:
            self.counts.append(len(feeds["x"]))
            return run(this, feeds, *rest)

        patch.setattr(sessions.Instrumented, "run", watched)


def calibrated(text: str, feeds: list[dict[str, Any]], *names: str, **options: Any) -> Stats:
    m = files.load(onnx.parser.parse_model(text))
    wanted = dict.fromkeys(names, Wanted())
    return calibrate.run(m, data.load(feeds, data.inputs_of(m)), wanted, threads=1, **options)


def as_bytes(stats: Stats, path: Path) -> bytes:
    stats.save(path)
    return path.read_bytes()


CASES = {
    "rows": (ROWS, ("x", "m", "y", "q", "z"), True),
    "mixed": (MIXED, ("x", "c", "y"), False),
    "last": (LAST, ("t", "y"), False),
    "flat": (FLAT, ("r", "y"), True),
    "one": (ONE, ("r", "y"), False),
    "steps": (STEPS, ("f", "y"), False),
}


@pytest.mark.parametrize("kind", CASES)
def test_together_is_as_alone(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, names, joins = CASES[kind]
    feeds = samples(*(3, 5) * 17, *[3] * 11, 7, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MOST", 1)
        alone = calibrated(text, feeds, *names)
    runs = Runs(monkeypatch)
    together = calibrated(text, feeds, *names)
    assert as_bytes(alone, tmp_path / "a") == as_bytes(together, tmp_path / "b")
    assert together[names[0]].samples == len(feeds)
    if joins:
        # Eight of a shape run alone, eight more to compare with, those once together, and once more where a value knows
        # nothing of samples; of the others, eight at a time.
        assert runs.counts.count(8) == 2 * (2 if kind == "rows" else 1) + 1
        assert runs.counts.count(1) == (16 + 4) + (16 + 1) + 2
    else:
        assert runs.counts.count(1) == len(feeds), "all ran alone"


def test_order_and_memory_change_nothing(tmp_path: Path) -> None:
    feeds = samples(*[4] * 28, *[6] * 19, *[2] * 3)
    names = CASES["rows"][1]
    found = {
        as_bytes(calibrated(ROWS, given, *names, max_memory=limit), tmp_path / "a")
        for given, limit in itertools.product(
            (feeds, feeds[::-1], [feeds[i] for i in RNG.permutation(len(feeds))]),
            (1, 3000, 32 << 20),
        )
    }
    assert len(found) == 1


def test_many_shapes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    each = batches.Batches._each

    def watched(this: Any, group: Any) -> Any:
        held.append(sum(map(len, this._waiting.values())))
        return each(this, group)

    monkeypatch.setattr(batches.Batches, "_each", watched)
    feeds = samples(*[n for n in range(1, 60) for _ in range(batches.EARLY + 3)])
    assert calibrated(ROWS, feeds, "y")["y"].samples == len(feeds)
    assert 1 < max(held) <= batches._WAITING
