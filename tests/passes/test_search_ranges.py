"""search-ranges: what reads an activation decides on its range, if that gains much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qgraph
from qgraph import errors, graph, runtime
from qgraph.recipe import STATIC_PIPELINE

TEXT = """g (float[n, 8, 16, 16] x) => (float[n, c, h, w] y) {
    p = Relu(x) q = MaxPool <kernel_shape = [2, 2]> (p) y = Conv (q, a, k) }"""
WITHOUT = "pipeline=" + ",".join(p for p in STATIC_PIPELINE if p != "search-ranges")


def constants(weight_of_outliers: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((8, 8, 2, 2)).astype(np.float32)
    a[:, 0] *= weight_of_outliers
    return {"a": a, "k": rng.standard_normal(8).astype(np.float32)}


def samples() -> list[dict[str, Any]]:
    """Channel 0 is 200 times as large as the others in one place."""
    rng = np.random.default_rng(2)
    size = np.ones((1, 8, 16, 16), np.float32)
    size[:, 0, 5, 5] = 200
    return [{"x": size * np.abs(rng.standard_normal((2, 8, 16, 16)).astype("f"))} for _ in range(8)]


def quantized(model: Any, *overrides: str) -> qgraph.Result:
    return qgraph.optimize(model, "int8-static", data=samples(), overrides=overrides)


def step(result: qgraph.Result, name: str = "q") -> float:
    """Of the grid that the convolution reads."""
    (conv,) = [n for n in graph.nodes(result.model) if n.op_type == "Conv"]
    return float(graph.array(conv.inputs[0].producer().inputs[1]))


def sqnr(model: Any, result: qgraph.Result) -> float:
    found = [
        np.concatenate([runtime.session(m).run(None, f)[0] for f in samples()])
        for m in (model, result.to_proto())
    ]
    return qgraph.numerics.sqnr_db(*found)


def test_outliers_that_hardly_count_are_clipped(parse):
    model = parse(TEXT, **constants(1e-5))
    plain, searched = quantized(model, WITHOUT), quantized(model)
    assert step(searched) < 0.2 * step(plain)
    assert sqnr(model, searched) > sqnr(model, plain) + 10
    notes = [d for d in searched.report.diagnostics if d.code == "QG407"]
    assert len(notes) == 1 and "1 of 2" in notes[0].message
    line = next(a for a in searched.report.activations if a.value in ("p", "q", "x"))
    assert "dB less error in what reads it" in line.reason


def test_outliers_that_count_are_kept(parse):
    model = parse(TEXT, **constants(1.0))
    assert step(quantized(model)) == step(quantized(model, WITHOUT))


def test_a_method_that_was_asked_for_stays(parse):
    model = parse(TEXT, **constants(1e-5))
    asked = "options.observe.method=min-max"
    assert step(quantized(model, asked)) == step(quantized(model, asked, WITHOUT))


def test_a_product_of_activations_has_two_ranges(parse):
    """Each input of MatMul(x, y) is tried while the other stays float."""
    model = parse(
        "g (float[n, 4, 16] x, float[n, 16, 4] z) => (float[n, 4, 4] y) { y = MatMul(x, z) }"
    )
    rng = np.random.default_rng(3)
    data = [
        {"x": rng.standard_normal((1, 4, 16)).astype("f"), "z": rng.standard_normal((1, 16, 4)).astype("f")}
        for _ in range(4)
    ]  # fmt: skip
    result = qgraph.optimize(model, "int8-static", data=data)
    assert result.to_proto().graph.node


def test_samples_are_at_least_one(parse):
    model = parse(TEXT, **constants(1.0))
    with pytest.raises(errors.RecipeError, match="samples"):
        quantized(model, "options.search-ranges.samples=0")
