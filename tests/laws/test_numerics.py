"""The one arithmetic is ONNX's: codes, values and packed bytes agree with onnx.reference, onnx_ir and the library."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx.helper
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx.reference import ReferenceEvaluator

from qgraph import native, numerics
from qgraph.spec import QTYPES, QTensor, QuantSpec

PROFILE = settings(max_examples=60, deadline=None)
# onnx.reference has no 2-bit types, and ONNX saturates 7 bits as 8.
ONNX_TYPES = [t for t in QTYPES.values() if t.bits not in (2, 3, 7)]
# onnx.reference goes through int32, so that x / s must not leave it; we saturate whatever it is.
SCALES = st.floats(2.0**-10, 2.0**20, width=32)
VALUES = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)


def matrices(values: Any = VALUES) -> Any:
    shape = arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)
    return shape.flatmap(lambda s: arrays.arrays(np.float32, s, elements=values))


def reference(op: str, inputs: dict[str, Any], kind: str, axis: int, block: int) -> Any:
    """One QuantizeLinear or DequantizeLinear of opset 21, run by onnx.reference."""
    stored = {k: np.asarray(v) for k, v in inputs.items()}
    code = onnx.TensorProto.DataType.Value(kind)
    types = {"x": 1, "s": 1, "z": code} | ({"x": code} if op == "DequantizeLinear" else {})
    held = [
        onnx.helper.make_tensor_value_info(k, types[k], list(v.shape)) for k, v in stored.items()
    ]
    out = onnx.helper.make_tensor_value_info("y", 1 if op == "DequantizeLinear" else code, None)
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    node = onnx.helper.make_node(op, list(stored), ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", held, [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    return ReferenceEvaluator(model).run(None, stored)[0]


def as_onnx(codes: Any, kind: str) -> Any:
    """Codes in the numpy type that onnx uses."""
    types = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT8": np.int8, "UINT8": np.uint8}
    return np.asarray(codes).astype(types[kind])


@st.composite
def problems(draw: st.DrawFn) -> tuple[QuantSpec, Any, Any, Any]:
    """A spec, a matrix, and any scales and zero points of the right shape."""
    w = draw(matrices())
    qtype = draw(st.sampled_from(ONNX_TYPES))
    grain = draw(st.sampled_from(["tensor", "ch", "g2", "g3", "g16"]))
    symmetric = draw(st.booleans()) and qtype.is_signed
    spec = QuantSpec.parse(f"{qtype.name}.{grain}.{'sym' if symmetric else 'asym'}")
    shape = spec.scale_shape(*w.shape)
    scale = draw(arrays.arrays(np.float32, shape, elements=SCALES))
    whole = st.integers(qtype.qmin, qtype.qmax)
    points = draw(arrays.arrays(qtype.container, shape, elements=whole))
    return spec, w, scale, None if symmetric else points


def onnx_view(
    spec: QuantSpec, scale: Any, points: Any, kind: str
) -> tuple[dict[str, Any], int, int]:
    """Scale and zero point as ONNX wants them for a matrix [N, K], with axis and block_size."""
    points = np.zeros(scale.shape, spec.qtype.container) if points is None else points
    if spec.is_per_tensor:
        shape: tuple[int, ...] = ()
    elif spec.group:
        shape = scale.shape
    else:
        shape = (scale.shape[0],)
    held = {"s": scale.reshape(shape), "z": as_onnx(points.reshape(shape), kind)}
    return held, 1 if spec.group else 0, spec.group


@PROFILE
@given(problems())
def test_quantize_is_quantize_linear(problem):
    spec, w, scale, points = problem
    kind = spec.qtype.onnx_name
    held, axis, block = onnx_view(spec, scale, points, kind)
    want = reference("QuantizeLinear", {"x": w, **held}, kind, axis, block)
    got = numerics.quantize(w, scale, points, spec)
    assert got.dtype == spec.qtype.container
    assert np.array_equal(got, want.astype(np.int32))


@PROFILE
@given(problems())
def test_dequantize_is_dequantize_linear(problem):
    spec, w, scale, points = problem
    kind = spec.qtype.onnx_name
    codes = numerics.quantize(w, scale, points, spec)
    held, axis, block = onnx_view(spec, scale, points, kind)
    want = reference("DequantizeLinear", {"x": as_onnx(codes, kind), **held}, kind, axis, block)
    got = numerics.dequantize(codes, scale, points, spec)
    assert got.dtype == np.float32
    assert np.array_equal(got, want)


@PROFILE
@given(problems())
def test_codes_survive_a_round_trip(problem):
    spec, w, scale, points = problem
    codes = numerics.quantize(w, scale, points, spec)
    again = numerics.quantize(numerics.dequantize(codes, scale, points, spec), scale, points, spec)
    assert np.array_equal(again, codes)


@PROFILE
@given(problems())
def test_storage_as_the_other_sign_is_the_same_numbers(problem):
    spec, w, scale, points = problem
    q = QTensor(spec, numerics.quantize(w, scale, points, spec), scale, points)
    for signed in (True, False):
        other = q.stored_as(signed=signed)
        other.check()
        assert other.spec.qtype.is_signed == signed
        assert np.array_equal(other.dequantize(), q.dequantize())
        assert np.array_equal(other.stored_as(signed=spec.qtype.is_signed).codes, q.codes)


@PROFILE
@given(matrices(), st.sampled_from(["int8.ch", "uint4.g3", "int4.tensor", "uint8.g16", "int2.ch"]))
def test_the_min_max_grid_covers_every_weight(w, text):
    spec = QuantSpec.parse(text)
    scale, points = numerics.min_max_grid(w, spec)
    q = QTensor(spec, numerics.quantize(w, scale, points, spec), scale, points)
    q.check()
    step = np.broadcast_to(numerics.expand(scale, spec, *w.shape), w.shape)
    assert (np.abs(q.dequantize() - w) <= step * 1.0001 + 1e-30).all()
    assert (q.dequantize()[w == 0] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scales_never_underflow_to_zero(dtype):
    spec = QuantSpec.parse("int8.ch.f16" if dtype == "float16" else "int8.ch")
    tiny = np.array([[1e-45], [1e-9], [0.0], [-1e-30]], np.float32)
    stored = numerics.to_scale(tiny, spec)
    assert (stored[tiny != 0] != 0).all() and stored[2] == 0
    assert np.array_equal(np.sign(stored), np.sign(tiny))


@PROFILE
@given(st.sampled_from([2, 4, 8]), st.booleans(), st.data())
def test_pack_is_the_layout_of_onnx(bits, signed, data):
    qtype = QTYPES[f"{'' if signed else 'u'}int{bits}"]
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=3, max_side=7))
    whole = st.integers(qtype.qmin, qtype.qmax)
    codes = data.draw(arrays.arrays(qtype.container, shape, elements=whole))
    packed = numerics.pack(codes, bits)
    tensor = ir.tensor(codes.astype(qtype.dtype.numpy()), dtype=qtype.dtype)
    assert packed.tobytes() == tensor.tobytes()
    held = ir.PackedTensor(packed, qtype.dtype, shape=ir.Shape(shape)) if bits < 8 else tensor
    assert np.array_equal(held.numpy().astype(np.int32), codes)
    assert np.array_equal(onnx.numpy_helper.to_array(ir.to_proto(held)).astype(np.int32), codes)
    unpacked = numerics.unpack(packed, bits, codes.size, signed=signed)
    assert unpacked.dtype == codes.dtype
    assert np.array_equal(unpacked.reshape(shape), codes)


@PROFILE
@given(st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pack_is_that_of_the_native_library(bits, signed, columns, seed):
    qtype = QTYPES[f"{'' if signed else 'u'}int{bits}"]
    random = np.random.default_rng(seed)
    codes = random.integers(qtype.qmin, qtype.qmax + 1, (3, columns)).astype(qtype.container)
    rows = [numerics.pack(row, bits) for row in codes]  # the library starts each row in a new byte
    assert np.array_equal(native.pack(codes, bits), rows)


def test_packed_bytes_by_hand():
    assert numerics.pack(np.array([1, -2, 3], np.int8), 4).tolist() == [0xE1, 0x03]
    assert numerics.pack(np.array([0, 1, 2, 3, 3], np.uint8), 2).tolist() == [0b11100100, 0b11]
    assert numerics.unpack(np.array([0xE1, 0x03], np.uint8), 4, 3, signed=True).tolist() == [
        1,
        -2,
        3,
    ]


def test_quantize_saturates_whatever_the_scale():
    spec = QuantSpec.parse("int8.tensor")
    w, scale = np.array([[-3e38, 3e38]], np.float32), np.array([[1e-30]], np.float32)
    with np.errstate(over="ignore"):
        assert numerics.quantize(w, scale, None, spec).tolist() == [[-128, 127]]


def test_nothing_writes_into_its_arguments():
    spec = QuantSpec.parse("uint4.g2")
    w, scale = np.ones((2, 4), np.float32), np.ones((2, 2), np.float32)
    points = np.ones((2, 2), np.uint8)
    codes = numerics.quantize(w, scale, points, spec)
    for each in (w, scale, points, codes):
        each.flags.writeable = False
    numerics.quantize(w, scale, points, spec)
    numerics.dequantize(codes, scale, points, spec)
    numerics.min_max_grid(w, spec)
    packed = numerics.pack(codes, 4)
    packed.flags.writeable = False
    assert np.array_equal(numerics.unpack(packed, 4, 8, signed=False), codes.ravel())
    numerics.unpack(packed, 4, 8, signed=True)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [1.0, 0.0], np.inf),
        ([1.0, 0.0], [1.0, 0.1], 20.0),
        ([0.0, 0.0], [0.0, 0.1], -np.inf),
    ],
)
def test_sqnr(a, b, expected):
    assert numerics.sqnr_db(a, b) == pytest.approx(expected)


@given(st.text(max_size=12))
def test_a_spec_is_read_back_or_refused_with_a_hint(text):
    from qgraph import errors

    try:
        spec = QuantSpec.parse(text)
    except errors.RecipeError as e:
        if e.diagnostics[0].code != "QG302" or not e.diagnostics[0].hint:
            raise
    else:
        assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("kind", QTYPES)
@pytest.mark.parametrize("grain", ["", ".tensor", ".ch", ".g2", ".g128"])
@pytest.mark.parametrize("rest", ["", ".sym", ".asym", ".f16", ".asym.f16"])
def test_every_spec_is_read_back(kind, grain, rest):
    spec = QuantSpec.parse(kind + grain + rest)
    assert QuantSpec.parse(str(spec)) == spec
    assert (
        spec.storage(signed=not spec.qtype.is_signed).storage(signed=spec.qtype.is_signed) == spec
    )
