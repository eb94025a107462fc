"""Calibration runs: the right numbers, from every scope, in any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import calibrate, data, errors, files
from qgraph.observers import Stats, Wanted

RNG = np.random.default_rng(3)
CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[b, n] x) => (float[b, n] y) { a = Relu(x)  c = Exp(a)  y = Neg(c) }"""
BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, n] x, bool p) => (float[2, n] y) {
  y = If (p) <
    then_branch = t () => (float[2, n] yt) { u = Relu(x)  yt = Neg(u) },
    else_branch = e () => (float[2, n] ye) { w = Exp(x)  ye = If (p) <
      then_branch = ee () => (float[2, n] q) { q = Identity(w) },
      else_branch = ef () => (float[2, n] r) { s = Sqrt(w)  r = Identity(s) } > } >
}"""
LOOP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 3] x, int64 turns) => (float[2, 3] y) {
  yes = Constant<value = bool {1}>()
  y = Loop (turns, yes, x) < body = b (int64 i, bool c, float[2, 3] h) => (bool d, float[2, 3] k) {
    d = Identity(c)  two = Constant<value_float = 2.0>()  k = Mul(h, two) } >
}"""


def model(text: str) -> ir.Model:
    return files.load(onnx.parser.parse_model(text))


def run(m: ir.Model, feeds: list[dict[str, Any]], *names: str, **options: Any) -> Stats:
    wanted = dict.fromkeys(names, options.pop("wanted", Wanted()))
    return calibrate.run(m, data.load(feeds, data.inputs_of(m)), wanted, threads=1, **options)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype(np.float32)


def test_every_value_of_a_chain_is_seen() -> None:
    feeds = [{"x": floats(2, n)} for n in (3, 50, 7)]
    found = run(model(CHAIN), feeds, "x", "a", "c", "y")
    x = np.concatenate([f["x"].ravel() for f in feeds])
    for name, values in {"x": x, "a": np.maximum(x, 0), "c": np.exp(np.maximum(x, 0))}.items():
        assert found[name].count == x.size
        assert found[name].minimum == pytest.approx(values.min(), rel=1e-6)
        assert found[name].maximum == pytest.approx(values.max(), rel=1e-6)
        assert found[name].samples == 3
    assert found["y"].minimum == -found["c"].maximum


def test_values_in_branches() -> None:
    feeds = [{"x": np.abs(floats(2, 4)), "p": np.array(p)} for p in (True, False, True)]
    found = run(model(BRANCHES), feeds, "u", "w", "s", "q", "y", "yt")
    assert {n: s.count for n, s in found.items()} == {
        "u": 16,
        "w": 8,
        "s": 8,
        "q": 0,
        "y": 24,
        "yt": 16,
    }
    assert found["w"].maximum == pytest.approx(np.exp(feeds[1]["x"]).max(), rel=1e-6)
    assert found["s"].maximum == pytest.approx(np.exp(feeds[1]["x"] / 2).max(), rel=1e-6)


def test_values_in_loops() -> None:
    feeds = [{"x": floats(2, 3), "turns": np.array(n, np.int64)} for n in (3, 0)]
    found = run(model(LOOP), feeds, "k", "h", wanted=Wanted(channel_axis=1))
    assert found["k"].count == found["h"].count == 18
    absmax = np.abs(feeds[0]["x"]).max(axis=0)
    np.testing.assert_array_equal(found["k"].channel_absmax, 8 * absmax)
    np.testing.assert_array_equal(found["h"].channel_absmax, 4 * absmax)


def as_bytes(stats: Stats, path: Path) -> bytes:
    stats.save(path)
    return path.read_bytes()


def test_a_split_changes_nothing(tmp_path: Path) -> None:
    feeds = [{"x": floats(2, 500)} for _ in range(4)]
    more = Wanted(channel_axis=0)  # than a histogram, so values have to come out
    whole = run(model(CHAIN), feeds, "x", "a", "c", "y", wanted=more)
    said: list[float] = []
    split = run(
        model(CHAIN),
        feeds,
        "x",
        "a",
        "c",
        "y",
        wanted=more,
        max_memory=5000,
        progress=lambda w, s: said.append(s),
    )
    assert as_bytes(whole, tmp_path / "a") == as_bytes(split, tmp_path / "b")
    assert len(said) == 3 * 4, "one run for each of the three computed values"
    assert said == sorted(said)
    assert said[-1] == 1


def test_the_cache_serves_the_same_question_only(tmp_path: Path) -> None:
    feeds, hits = [{"x": floats(2, 5)}], []
    options: dict[str, Any] = {"cache": tmp_path, "on_cached": hits.append}
    first = run(model(CHAIN), feeds, "a", **options)
    again = run(model(CHAIN), feeds, "a", **options)
    assert len(hits) == 1
    assert as_bytes(first, tmp_path / "a") == as_bytes(again, tmp_path / "b")
    run(model(CHAIN), [{"x": floats(2, 5)}], "a", **options)
    run(model(CHAIN), feeds, "c", **options)
    run(model(CHAIN.replace("Neg", "Abs")), feeds, "a", **options)
    run(model(CHAIN), feeds, "a", wanted=Wanted(gram=True), **options)
    assert len(hits) == 1
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(b"broken")
    with pytest.raises(errors.InputError, match="QG143"):
        run(model(CHAIN), feeds, "a", **options)


def test_refusals() -> None:
    feeds = [{"x": floats(2, 4), "p": np.array(True)}]
    with pytest.raises(errors.InputError, match="QG140.*uu"):
        run(model(BRANCHES), feeds, "uu")
    with pytest.raises(errors.InputError, match="QG142"):
        run(model(LOOP), [{"x": floats(2, 3), "turns": np.array(1, np.int64)}], "yes")


def test_the_model_is_left_alone() -> None:
    m = model(BRANCHES)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    run(m, [{"x": floats(2, 4), "p": np.array(True)}], "u", "w")
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
