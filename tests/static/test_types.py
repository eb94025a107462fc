"""Types of weights and activations: each runs in integers in a real session, or is refused with a code and a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qgraph
from qgraph import graph, runtime
from qgraph.recipe import Rule, load

RNG = np.random.default_rng(1)
TARGETS = ("ort", "openvino")
BODY = """p = Conv <pads = [1, 1, 1, 1]> (x, a, ba) q = Relu(p) s = Conv <group = 4> (q, d)
    u = Flatten(s) v = Gemm(u, k, bk) y = MatMul(v, m)"""
TEXT = f"g (float[n, 4, 8, 8] x) => (float[n, 5] y) {{ {BODY} }}"


@pytest.fixture(autouse=True)
def _seeded():
    """Whatever ran before, each test draws the same numbers."""
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "a": draw(4, 4, 3, 3), "ba": draw(4), "d": draw(4, 1, 3, 3), "k": draw(144, 12), "bk": draw(12), "m": draw(12, 5),
}  # fmt: skip
DATA = [{"x": draw(n, 4, 8, 8)} for n in (2, 3, 8, 1, 8, 16, 16, 16)]


def recipe(weights: str, activations: str) -> Any:
    changes = [
        (f"{r}.weights={weights}", f"{r}.activations={activations}") for r in ("conv", "linear")
    ]
    return load("int8-static", [change for pair in changes for change in pair])


def products(path: Any) -> list[onnx.NodeProto]:
    return [n for n in onnx.load(path).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]


def activation_types(path: Any) -> set[str]:
    """Element types of the codes that QuantizeLinear writes in a file."""
    model = onnx.load(path)
    constants = {i.name: i.data_type for i in model.graph.initializer}
    steps = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return {onnx.TensorProto.DataType.Name(constants[n.input[2]]).lower() for n in steps}


def quality(float_side: Any, other: Any) -> float:
    """SQNR in dB over all samples."""
    want, got = (
        np.concatenate([run(f)[0] for f in DATA])
        for run in (lambda f: float_side.run(None, f), other.run)
    )
    return float(qgraph.numerics.sqnr_db(want, got))


# Weights, activations, the stored type of the weights, in which targets they run in integers, least SQNR in dB.
RUNS = [
    ("int8.ch", "static:uint8", "int8", TARGETS, 30),
    ("int8.ch", "static:int8", "int8", TARGETS, 30),
    ("int8.ch", "static:int8.sym", "int8", TARGETS, 30),
    ("int8.tensor", "static:uint8", "int8", TARGETS, 28),
    ("uint8.ch.sym", "static:uint8", "uint8", ("ort",), 30),
    ("uint8.tensor.asym", "static:uint8", "uint8", ("ort",), 28),
    ("uint8.ch.sym", "static:int8", "uint8", ("ort",), 30),
    ("int7.ch", "static:uint8", "int8", TARGETS, 25),
    ("int7.tensor", "static:uint8", "int8", TARGETS, 21),
    ("uint7.ch.sym", "static:uint8", "uint8", ("ort",), 25),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("weights", "activations", "stored", "targets", "floor"), RUNS)
def test_a_type_runs_in_integers_or_says_why_not(
    weights, activations, stored, targets, floor, target, parse, executed, tmp_path
):
    model = parse(TEXT, **CONSTANTS)
    path = tmp_path / "q.onnx"
    result = qgraph.optimize(
        model, recipe(weights, activations), target=target, data=DATA, output=path
    )
    found = executed(path, target)
    if target not in targets:
        assert {e.code for e in result.ledger} == {"QG315"}
        assert all("signed weights" in e.reason for e in result.ledger)
        assert not any(integer for _, integer in found.products)
        return
    assert found.all_integer and len(found.products) == 4
    if target == "ort":
        assert set(found.types) == {stored}
    assert activation_types(path) == {activations.split(":")[1].split(".")[0]}
    assert quality(runtime.session(model), found) > floor


@pytest.mark.parametrize("weights", ["int7.ch", "int7.tensor", "uint7.ch.sym"])
def test_reduced_range_leaves_room_for_sums_of_16_bits(weights, parse):
    """Two products of uint8 and 7 bits: 2 * 255 * 64 < 2^15. Of 8 bits they need 17 bits, which AVX2 cuts off."""
    result = qgraph.optimize(parse(TEXT, **CONSTANTS), recipe(weights, "static"), data=DATA)
    codes = {
        str(v.name): graph.array(v)
        for _, v in graph.initializers(result.model)
        if str(v.name).endswith(".codes")
    }
    assert len(codes) == 4
    for name, array in codes.items():
        middle = 0 if array.dtype == np.int8 else 64
        centred = array.astype(int) - middle
        assert centred.min() >= -64 and centred.max() <= 63, name
        assert np.abs(centred).max() > 60, name
    assert {e.spec.split(".")[0] for e in result.ledger} == {weights.split(".")[0]}
    assert all(e.stored_bytes >= codes[f"{e.weight}.codes"].nbytes for e in result.ledger)


@pytest.mark.parametrize("activations", ["static:uint16", "static:int16"])
@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_activations_have_no_integer_kernels(activations, target, parse, executed, tmp_path):
    model, path = parse(TEXT, **CONSTANTS), tmp_path / "q.onnx"
    result = qgraph.optimize(
        model, recipe("int8.ch", activations), target=target, data=DATA, output=path
    )
    assert {e.code for e in result.ledger} == {"QG315"}
    assert all("not " + activations.split(":")[1] in e.reason for e in result.ledger)
    assert not result.report.activations
    assert not any(integer for _, integer in executed(path, target).products)


@pytest.mark.parametrize(
    ("activations", "stored"), [("static:uint16", "uint16"), ("static:int16.sym", "int16")]
)
def test_16_bit_activations_in_the_portable_target(activations, stored, parse, executed, tmp_path):
    """Any runtime runs them, and they lose next to nothing: what is left is the error of the weights."""
    model, path = parse(TEXT, **CONSTANTS), tmp_path / "q.onnx"
    qgraph.optimize(
        model, recipe("int8.ch", "static"), target="onnx", data=DATA, output=tmp_path / "8.onnx"
    )
    qgraph.optimize(model, recipe("int8.ch", activations), target="onnx", data=DATA, output=path)
    assert activation_types(path) == {stored}
    rough, fine = (
        quality(runtime.session(model), executed(m, "ort")) for m in (tmp_path / "8.onnx", path)
    )
    assert fine > rough + 1


@pytest.mark.parametrize("weights", ["uint8.ch.asym", "int8.ch.asym", "int8.g32", "int4.ch"])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_integer_kernels_do_not_take(weights, target, parse):
    result = qgraph.optimize(
        parse(TEXT, **CONSTANTS), recipe(weights, "static"), target=target, data=DATA
    )
    assert {e.code for e in result.ledger} == {"QG315"}
    assert all(weights.split(".")[0] in e.reason for e in result.ledger)


def test_16_bits_are_no_weights():
    with pytest.raises(ValueError, match="16-bit types are for activations"):
        Rule(weights=("int16.ch",))
