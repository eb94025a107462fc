"""What is one weight stays one weight: quantized once, stored once, wherever it is used.

By default every graph meets every recipe and every target, and every recipe every target; QGRAPH_FULL=1 tries all three
together.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgraph
from qgraph import graph, models, numerics, registry, runtime, verify
from qgraph.models.odd import ODD, feeds
from qgraph.recipe import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from covering import covering

# The codes of every weight, whatever the form calls them.
SHARED = {
    "shared_weight": 3,
    "weight_on_both_sides": 0,
    "tied_embedding": 2,
    "if_outer_weight": 2,
    "nested_if": 2,
    "function_called_twice": 1,
}


def codes(result: qgraph.Result) -> Counter[str]:
    """How often each initializer of codes is read."""
    held = [v for _, v in graph.initializers(result.model) if ".codes" in str(v.name)]
    return Counter({str(v.name): len(v.uses()) for v in held})


def optimized(name: str, recipe: str, target: str) -> qgraph.Result:
    eager = PRESETS[recipe].model_copy(update={"min_elements": 0})
    model = ODD[name]()
    data = [feeds(model, seed) for seed in range(2)] if eager.needs_data else None
    return qgraph.optimize(model, eager, target=target, data=data, inspect=False)


@pytest.mark.parametrize(
    ("name", "recipe", "target"), covering(list(SHARED), list(PRESETS), registry.names("target"))
)
def test_codes_are_stored_once(name, recipe, target):
    result = optimized(name, recipe, target)
    found = codes(result)
    assert len(found) == len(result.report.quantized)
    if recipe == "w4a4" and SHARED[name] and not result.report.quantized:
        # Only qgraph's operators take activations of 4 bits; elsewhere products stay float, and the ledger says so.
        assert target != "ort-qgraph" and {e.code for e in result.ledger} == {"QG315"}
        return
    most = max(found.values(), default=0)
    assert most == SHARED[name] or "if" in name  # in a body: one copy, read by one or more
    stored = sum(v.const_value.nbytes for _, v in graph.initializers(result.model))
    listed = sum(e.stored_bytes for e in result.ledger)
    assert stored <= listed + 2000


@pytest.mark.parametrize("target", registry.names("target"))
@pytest.mark.parametrize("recipe", PRESETS)
def test_a_tied_table_stays_tied(recipe, target):
    result = optimized("tied_embedding", recipe, target)
    (entry,) = result.report.quantized
    assert entry.operators == {"Gather": 1, "MatMul": 1} and len(entry.forms) == 2
    ((_, uses),) = codes(result).items()
    assert uses >= 2
    assert not [
        v for _, v in graph.initializers(result.model) if v.const_value.nbytes >= 96 * 64 * 4
    ]


@pytest.mark.parametrize("recipe", ["auto", "int4"])
def test_the_tied_zoo_model_is_smaller_than_its_two_tables(recipe):
    model = models.build("tiny-gpt")
    result = qgraph.optimize(model, recipe, inspect=False)
    tied = [e for e in result.report.quantized if len(e.operators) > 1]
    assert len(tied) == 1
    name = tied[0].weight
    held = [
        v for _, v in graph.initializers(result.model) if str(v.name).startswith(f"{name}.codes")
    ]
    assert len(held) == 1 and len(held[0].uses()) == 2


BODIES = {
    "if_outer_weight": ["outer.weight", "else.weight"],
    "nested_if": ["near.weight", "far.weight"],
    "loop_outer_weight": ["outer.weight", "body.weight"],
    "scan_body": ["cell.input_weight", "cell.state_weight"],
    "duplicate_names_in_subgraph_scopes": ["branch.weight", "branch.weight_1"],
    "function_body": ["dense.weight", "own"],
}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("recipe", ["auto", "int4", "int8-dynamic"])
@pytest.mark.parametrize("name", BODIES)
def test_weights_of_bodies_are_quantized_wherever_they_are_defined(name, recipe, target):
    result = optimized(name, recipe, target)
    assert len(result.ledger) == len(result.report.quantized) == 2
    floats = [
        v
        for _, v in graph.initializers(result.model)
        if v.dtype in graph.FLOATS and v.const_value.size >= 64 * 64
    ]
    assert not floats


def test_both_branches_compute_with_the_quantized_weights():
    result = optimized("if_outer_weight", "int8-weights", "ort")
    sample = feeds(ODD["if_outer_weight"]())
    for sign in (1, -1):
        x = {"x": np.abs(sample["x"]) * np.float32(sign)}
        want, got = (
            runtime.session(m, threads=1).run(None, x)[0]
            for m in (ODD["if_outer_weight"](), result.to_proto())
        )
        assert numerics.sqnr_db(want, got) > 30


def test_equal_bytes_are_still_two_weights():
    result = optimized("equal_weights", "int4", "ort")
    assert sorted(e.weight for e in result.report.quantized) == ["first.weight", "second.weight"]


ZOO_FLOORS = {"auto": 25.0, "int4": 8.0, "int8-dynamic": 20.0}


@pytest.mark.parametrize("recipe", ZOO_FLOORS)
@pytest.mark.parametrize("name", models.names())
def test_the_zoo(name: str, recipe: str):
    model: Any = models.build(name)
    result = qgraph.optimize(model, recipe, inspect=False)
    assert not [d for d in verify.verify(result.model) if d.severity == "error" or d.code == "V10"]
    sample = verify.sample_feeds(model, count=1)[0]
    want, got = (
        runtime.session(m, threads=1).run(None, sample) for m in (model, result.to_proto())
    )
    worst = min(
        numerics.sqnr_db(a, b) for a, b in zip(want, got, strict=True) if a.dtype.kind == "f"
    )
    assert worst >= ZOO_FLOORS[recipe]
    small = {"QG312", "QG314"}  # too small, or a convolution without data
    assert all(e.spec or e.code in small for e in result.ledger)
    assert result.report.quantized or name == "tiny-cnn"
