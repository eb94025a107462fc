"""Counting inside the session gives what counting values that were brought out gives, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import calibrate, data, errors, files, runtime
from qgraph.calibrate import instrument
from qgraph.models.odd import ODD
from qgraph.models.odd import feeds as odd_feeds
from qgraph.observers import FloatHistogram, Stats, Wanted, tables
from qgraph.passes.observe import observed

RNG = np.random.default_rng(17)
TYPES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n] x) => (double[b, n] y) {
  a = Exp(x)  h = Cast<to = 10>(a)  k = Add(h, h)  d = Cast<to = 11>(x)  y = Mul(d, d)
  q = Div(x, x)  r = Reciprocal(x) }"""
BODIES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 3] x, int64 turns, bool p) => (float[2, 3] y) {
  yes = Constant<value = bool {1}>()
  z = Loop (turns, yes, x) < body = b (int64 i, bool c, float[2, 3] h) => (bool d, float[2, 3] k) {
    d = Identity(c)  two = Constant<value_float = 2.0>()  k = Mul(h, two)
    u = If (p) < then_branch = t () => (float[2, 3] ut) { s = Neg(k)  ut = Neg(s) },
                 else_branch = e () => (float[2, 3] ue) { ue = Exp(h) } > } >
  y = Neg(z) }"""


def model(text: str) -> ir.Model:
    return files.load(onnx.parser.parse_model(text))


def feeds(shape: tuple[int, ...], count: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [{"x": RNG.normal(size=shape).astype(np.float32), **more} for _ in range(count)]


def run(m: ir.Model, samples: list[dict[str, Any]], *names: str, threads: int = 1) -> Stats:
    dataset = data.load(samples, data.inputs_of(m))
    return calibrate.run(m, dataset, dict.fromkeys(names, Wanted()), threads=threads)


def as_bytes(stats: Stats, path: Path) -> bytes:
    stats.save(path)
    return path.read_bytes()


def both(
    m: ir.Model, samples: list[dict[str, Any]], *names: str, tmp_path: Path, threads: int = 1
) -> Stats:
    """The statistics, after both ways gave the same."""
    assert tables.library() is not None
    inside = run(m, samples, *names, threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "library", lambda: None)
        outside = run(m, samples, *names)
    assert as_bytes(inside, tmp_path / "inside") == as_bytes(outside, tmp_path / "outside")
    return inside


def odd_values() -> list[dict[str, Any]]:
    """Zeros of both signs, ties, and samples with some or only non-finite values."""
    x = np.maximum(RNG.normal(size=(4, 700)), 0).astype(np.float32)
    signed, zeros = x.copy(), np.zeros((2, 3), np.float32)
    signed[1, ::7], signed[0] = -0.0, 3.4e38
    return [{"x": v} for v in (x, signed, zeros, -x, x * np.float32(1e-42))]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["ragged", "large", "odd"])
def test_values_of_every_type(kind: str, threads: int, tmp_path: Path) -> None:
    samples = {
        "ragged": [*feeds((2, 3)), *feeds((1, 4097)), *feeds((5, 1))],
        "large": feeds((3, 200_001)),  # over the tasks' least size
        "odd": odd_values(),
    }[kind]
    m = model(TYPES)
    names = ("x", "a", "h", "k", "d", "y", "q", "r")
    found = both(m, samples, *names, tmp_path=tmp_path, threads=threads)
    x = np.concatenate([s["x"].ravel() for s in samples])
    assert (found["x"].count, found["x"].nonfinite) == (x.size, 0)
    assert (found["x"].minimum, found["x"].maximum) == (x.min(), x.max())
    assert found["q"].nonfinite == np.count_nonzero(x == 0) >= 6 * (kind == "odd")
    assert found["q"].samples == len(samples) - (kind == "odd"), "one has no finite value"


def test_values_of_bodies(tmp_path: Path) -> None:
    samples = [
        *feeds((2, 3), turns=np.array(3, np.int64), p=np.array(True)),
        *feeds((2, 3), turns=np.array(0, np.int64), p=np.array(True)),
        *feeds((2, 3), turns=np.array(2, np.int64), p=np.array(False)),
    ]
    m = model(BODIES)
    found = both(m, samples, "x", "h", "k", "s", "ue", "u", "z", "y", tmp_path=tmp_path)
    assert {n: s.samples for n, s in found.items()} == {
        "x": 9, "h": 6, "k": 6, "s": 3, "ue": 3, "u": 6, "z": 9, "y": 9,
    }  # fmt: skip
    assert found["k"].count == 3 * 18 + 3 * 12
    assert found["s"].maximum == -found["k"].minimum or found["s"].minimum == -found["k"].maximum


@pytest.mark.parametrize("name", ODD)
def test_every_value_of_the_odd_graphs(name: str, tmp_path: Path) -> None:
    m = files.load(ODD[name]())
    samples = [odd_feeds(m, seed, batch, 5 + seed) for seed, batch in ((0, 2), (1, 3))]
    names = observed(m)
    found = both(m, samples, *names, tmp_path=tmp_path, threads=2)
    assert len(found) == len(names)


def test_a_histogram_and_more_of_another_value(tmp_path: Path) -> None:
    m, samples = model(TYPES), feeds((2, 50))
    dataset = data.load(samples, data.inputs_of(m))
    found = calibrate.run(m, dataset, {"a": Wanted(), "x": Wanted(1), "d": Wanted(0)}, threads=1)
    alone = run(m, samples, "a", "x", "d")
    for name, stats in found.items():
        assert np.array_equal(stats.histogram.counts, alone[name].histogram.counts)
    assert found["x"].channel_absmax is not None
    np.testing.assert_array_equal(
        found["x"].channel_absmax, np.max([np.abs(s["x"]).max(axis=0) for s in samples], axis=0)
    )


def test_a_closed_table_and_a_wrong_control_are_refused() -> None:
    m = model(TYPES)
    with tables.opened([FloatHistogram()]) as (keys, _):
        seen = instrument.count(m, {"a": keys[0]}, 1)
        m.graph.outputs[:] = [seen[0].value]
        session = runtime.session(m, custom_ops=True)
        sample = feeds((1, 2), 1)[0] | {instrument.CONTROL: np.ones((1, 3), np.int64)}
        session.run(None, sample)
        for wrong, said in (([0, 1, 0], "0 parts"), ([3, 1, 0], "3 equal parts")):
            control = np.array([wrong], np.int64)
            with pytest.raises(Exception, match=rf"Observe 'a\.seen': .*{said}"):
                session.run(None, sample | {instrument.CONTROL: control})
    with pytest.raises(Exception, match=r"Observe 'a\.seen': its table is not open"):
        session.run(None, sample)
    with pytest.raises(errors.RuntimeFailure, match=r"Observe 'a\.seen': its table is not open"):
        runtime.session(m, custom_ops=True)


REARRANGED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 3] x, int64 turns) => (float[n, 2] y) {
  yes = Constant<value = bool {1}>()  to = Constant<value_ints = [-1, 2]>()
  f = Flatten(x)  r = Reshape(f, to)  e = Exp(r)  t = Transpose(e)
  z = Loop (turns, yes, f) < body = b (int64 i, bool c, float[2, 3] h) => (bool d, float[2, 3] k) {
    d = Identity(c)  s = Transpose(x)  p = Transpose(h)  q = Transpose(p)  k = Neg(q) } >
  u = Reshape(z, to)  v = Add(u, e)  y = Identity(v) }"""


def test_rearranged_values_are_counted_once(tmp_path: Path) -> None:
    samples = [each | {"turns": np.array(n, np.int64)} for n in (2, 3) for each in feeds((2, 3), 2)]
    names = ("r", "x", "f", "t", "e", "s", "q", "h", "p", "y", "u")
    m = model(REARRANGED)
    assert instrument.rearranged(m, names) == {
        "x": "r", "f": "r", "e": "t", "h": "q", "p": "q",
    }  # fmt: skip
    found = both(m, samples, *names, tmp_path=tmp_path)
    x = np.concatenate([s["x"].ravel() for s in samples])
    for name in ("r", "x", "f"):
        assert np.array_equal(
            found[name].histogram.counts, np.bincount(x.view(np.uint32) >> 16, minlength=65536)
        )
        assert found[name].samples == len(samples)
        assert found[name].maximum == x.max()
        low = np.mean([s["x"].min() for s in samples])
        assert found[name].average_extremes[0] == pytest.approx(low)
    assert found["s"].count == 6 * 10, "a value from outside counts in each turn of the loop"
    assert found["q"].count == found["h"].count == 6 * 10
    assert found["r"] is not found["x"]
    shared = {id(found[n].histogram.counts) for n in names}
    assert len(shared) == len(names), "merging other shards must not count twice"
