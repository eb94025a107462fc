"""What OpenVINO makes of the forms that qgraph emits: which weights stay compressed, what it refuses.

Measured on 2026.4.1; `docs/notes/forms.md` has the whole picture. One model per process, always.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, runtime
from qgraph.executed import openvino

pytestmark = pytest.mark.skipif(not openvino.is_available(), reason="openvino is not installed")

Array = np.ndarray[Any, Any]
Write = Callable[..., Path]

HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
K, N, G = 128, 48, 32
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, K)).astype(np.float32)
FLOAT = 2e-6

RUN = """
import json, sys
import numpy, openvino
model, feeds, config = sys.argv[1:]
core = openvino.Core()
compiled = core.compile_model(core.read_model(model), "CPU", json.loads(config))
numpy.save(feeds + ".out.npy", compiled(dict(numpy.load(feeds)))[0])
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(text: str, opset: int = 21, **weights: Array) -> Path:
        proto = onnx.parser.parse_model(f"{HEADER.format(opset=opset)}\n{text}")
        for key, array in weights.items():
            proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=key)))
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        return path

    return save


def run(path: Path, **feeds: Array) -> Array:
    given = path.with_suffix(".npz")
    np.savez(given, **feeds)
    config = json.dumps(dict(openvino.PARITY))
    subprocess.run([sys.executable, "-c", RUN, str(path), str(given), config], check=True)
    return np.asarray(np.load(f"{given}.out.npy"))


def kernel(path: Path, value: str = "y") -> str:
    return str(openvino.inspect(path, [value])[value].kernel)


def error(y: Array, reference: Array) -> float:
    assert y.shape == reference.shape
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def integers(type_: Any, shape: tuple[int, ...]) -> Array:
    limits = ml_dtypes.iinfo(type_)
    return RNG.integers(limits.min, int(limits.max) + 1, shape).astype(type_)


def weight_only(
    type_: Any, block: int, has_zero: bool, scale_type: Any = np.float32, k: int = K
) -> dict[str, Array]:
    """W, s[, z] of a DequantizeLinear over [k, N]: blocks along axis 0, or one scale a column."""
    shape = (-(-k // block), N) if block else (N,)
    found = {"W": integers(type_, (k, N))}
    found["s"] = (RNG.random(shape) * 0.02 + 0.005).astype(scale_type)
    if has_zero:
        found["z"] = integers(type_, shape)
    return found


@pytest.mark.parametrize(
    ("type_", "block", "has_zero", "opset"),
    [
        (np.int8, 0, False, 13),
        (np.uint8, 0, True, 13),
        (np.int8, G, False, 21),
        (ml_dtypes.int4, G, False, 21),
        (ml_dtypes.uint4, G, True, 21),
        (ml_dtypes.int4, 0, False, 21),
    ],
)
def test_weight_only_matmul_stays_compressed(type_, block, has_zero, opset, write) -> None:
    form = f"axis = 0, block_size = {block}" if block else "axis = 1"
    text = f"""g (float[m, {K}] x) => (float[m, {N}] y) {{
        wf = DequantizeLinear <{form}> (W, s{", z" if has_zero else ""}) y = MatMul(x, wf) }}"""
    path = write(text, opset, **weight_only(type_, block, has_zero))
    short = np.dtype(type_).name.replace("uint", "u").replace("int", "i")
    assert kernel(path) == f"FullyConnected {short} weights"
    config = {"session.disable_quant_qdq": "1"}
    reference = runtime.session(path, config=config).run(None, {"x": X})[0]
    assert error(run(path, x=X), np.asarray(reference)) < FLOAT


OTHER = {
    "Gemm transB": ("wf = DequantizeLinear <axis = 0> (W, s) y = Gemm <transB = 1> (x, wf)", True),
    "float16 scale": (
        "h = DequantizeLinear <axis = 1> (W, s16) wf = Cast <to = 1> (h) y = MatMul(x, wf)",
        False,
    ),
    "bias and activation": (
        "wf = DequantizeLinear <axis = 1> (W, s) h = MatMul(x, wf) a = Add(h, s) y = Relu(a)",
        False,
    ),
    "DynamicQuantizeMatMul": ("y = com.microsoft.DynamicQuantizeMatMul (x, W, s)", False),
}


@pytest.mark.parametrize("form", OTHER)
def test_more_forms_that_stay_compressed(form, write) -> None:
    body, is_transposed = OTHER[form]
    weights = weight_only(np.int8, 0, False)
    if is_transposed:
        weights["W"] = np.ascontiguousarray(weights["W"].T)
    weights["s16"] = weights["s"].astype(np.float16)
    path = write(f"g (float[m, {K}] x) => (float[m, {N}] y) {{ {body} }}", **weights)
    assert kernel(path) == "FullyConnected i8 weights"


def test_static_qdq_runs_in_integers(write) -> None:
    text = f"""g (float[m, {K}] x) => (float[m, {N}] y) {{
        xq = QuantizeLinear(x, xs, xz) xf = DequantizeLinear(xq, xs, xz)
        wf = DequantizeLinear <axis = 1> (W, s) y = MatMul(xf, wf) }}"""
    weights = weight_only(np.int8, 0, False) | {"xs": np.float32(0.05), "xz": np.uint8(128)}
    assert kernel(write(text, **weights)) == "FullyConnected u8 activations, i8 weights"


def test_a_block_that_does_not_divide_k_is_refused(write) -> None:
    k = 100
    text = f"""g (float[m, {k}] x) => (float[m, {N}] y) {{
        wf = DequantizeLinear <axis = 0, block_size = {G}> (W, s) y = MatMul(x, wf) }}"""
    path = write(text, **weight_only(ml_dtypes.int4, G, False, k=k))
    with pytest.raises(errors.RuntimeFailure, match="cannot be divided by block_size"):
        openvino.executed_graph(path)


def nbits(k: int, bits: int) -> dict[str, Array]:
    blocks = -(-k // G)
    return {
        "B": integers(np.uint8, (N, blocks, G * bits // 8)),
        "s": (RNG.random((N, blocks)) * 0.01).astype(np.float32),
        "z": integers(np.uint8, (N, -(-blocks * bits // 8))),
    }


@pytest.mark.parametrize(
    ("k", "bits", "expected"),
    [
        (K, 2, "FullyConnected u2 weights"),
        (K, 4, "FullyConnected u4 weights"),
        (K, 8, "FullyConnected u8 weights"),
        (100, 4, "FullyConnected float32"),
    ],
)
def test_matmul_nbits(k, bits, expected, write) -> None:
    """Compressed, unless K is not a multiple of the block: then the weights become float."""
    text = f"""g (float[m, {k}] x) => (float[m, {N}] y) {{ y = com.microsoft.MatMulNBits
        <K = {k}, N = {N}, bits = {bits}, block_size = {G}> (x, B, s, z) }}"""
    path = write(text, **nbits(k, bits))
    assert kernel(path) == expected
    if bits == 4:
        reference = runtime.session(path).run(None, {"x": X[:, :k]})[0]
        assert error(run(path, x=X[:, :k]), np.asarray(reference)) < FLOAT


def test_matmul_integer_becomes_float(write) -> None:
    text = f"""g (float[m, {K}] x) => (float[m, {N}] y) {{ q, xs, xz = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, W, xz) f = Cast <to = 1> (i) a = Mul(xs, s) y = Mul(f, a) }}"""
    path = write(text, **weight_only(np.int8, 0, False))
    assert kernel(path) == "FullyConnected float32"
    reference = runtime.session(path).run(None, {"x": X})[0]
    assert error(run(path, x=X), np.asarray(reference)) < FLOAT


def test_bodies_cannot_be_seen(write) -> None:
    text = f"""g (bool c, float[m, {K}] x) => (float[m, {N}] y) {{
        wf = DequantizeLinear <axis = 1> (W, s) y = If (c) <
            then_branch = t () => (float[m, {N}] yt) {{ yt = MatMul(x, wf) }},
            else_branch = e () => (float[m, {N}] ye) {{ ye = MatMul(x, wf) }}> }}"""
    path = write(text, **weight_only(np.int8, 0, False))
    assert kernel(path) == "inside If"
    assert kernel(path, "yt") == "not found"


def test_convolution_weights_become_float_without_activation_steps(write) -> None:
    body = "wf = DequantizeLinear <axis = 0> (W, s) y = Conv(x, wf)"
    weights = {"W": integers(np.int8, (16, 8, 3, 3)), "s": np.full(16, 0.01, np.float32)}
    path = write(f"g (float[n, 8, 9, 9] x) => (float[] y) {{ {body} }}", **weights)
    assert kernel(path) == "Convolution float32"


# Embeddings

ROWS = {
    "row-wise": ("wf = DequantizeLinear <axis = 0> (W, s) y = Gather(wf, i)", "Gather i4 weights"),
    "blocked": (
        "wf = DequantizeLinear <axis = 1, block_size = 32> (W, sb) y = Gather(wf, i)",
        "Gather float32",
    ),
    "GatherBlockQuantized": (
        """y = com.microsoft.GatherBlockQuantized
            <bits = 4, block_size = 32, quantize_axis = 1, gather_axis = 0> (B, i, sb)""",
        "Gather u4 weights",
    ),
    "codes, then scales": (
        "q = Gather(C, i) f = Cast <to = 1> (q) r = Gather(sr, i) y = Mul(f, r)",
        "Gather i8 weights",
    ),
}


@pytest.mark.parametrize("form", ROWS)
def test_embeddings(form, write) -> None:
    body, expected = ROWS[form]
    weights = {
        "W": integers(ml_dtypes.int4, (40, 64)),
        "B": integers(np.uint8, (40, 32)),
        "C": integers(np.int8, (40, 64)),
        "s": np.full(40, 0.01, np.float32),
        "sr": np.full((40, 1), 0.01, np.float32),
        "sb": np.full((40, 2), 0.01, np.float32),
    }
    path = write(f"g (int64[n] i) => (float[n, 64] y) {{ {body} }}", **weights)
    assert kernel(path) == expected
    i = np.array([3, 0, 39, 3])
    assert error(run(path, i=i), np.asarray(runtime.session(path).run(None, {"i": i})[0])) < FLOAT


TIED = {
    "axis 2": (
        "r = {gather}, quantize_axis = 2> (B, i, s3) e = Reshape(r, to)",
        [-1, 64],
        "Gather float32",
    ),
    "two tables": ("e = {gather}, quantize_axis = 1> (B2, i, s)", [0], "Gather u4 weights"),
}


@pytest.mark.parametrize("form", TIED)
def test_a_tied_table_stays_compressed_only_as_two_constants(form, write) -> None:
    body, to, expected = TIED[form]
    gather = "com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32, gather_axis = 0"
    text = f"""g (int64[n] i) => (float[n, 40] y) {{ {body.format(gather=gather)}
        y = com.microsoft.MatMulNBits <K = 64, N = 40, bits = 4, block_size = 32> (e, B, s) }}"""
    codes, s = integers(np.uint8, (40, 2, 16)), np.full((40, 2), 0.01, np.float32)
    tables = {"B": codes, "B2": codes.reshape(40, 32), "s": s, "s3": s[..., None]}
    path = write(text, **tables, to=np.array(to))
    found = openvino.inspect(path, ["e", "y"])
    assert found["y"].kernel == "FullyConnected u4 weights"
    assert found["e"].kernel == expected


REFUSED = {
    "table behind a Reshape": "must be a constant",
    "contrib integer operator": "QGemm",
    "custom operator": "MatMulTernary",
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form, write) -> None:
    body = {
        "table behind a Reshape": """t = Reshape(B, to) y = com.microsoft.GatherBlockQuantized
            <bits = 4, block_size = 32, quantize_axis = 1, gather_axis = 0> (t, i, s)""",
        "contrib integer operator": "y = com.microsoft.QGemm (i, s, B, i, s, B)",
        "custom operator": "y = com.microsoft.MatMulTernary (i, B)",
    }[form]
    weights = {
        "B": integers(np.uint8, (40, 2, 16)),
        "s": np.full((40, 2), 0.01, np.float32),
        "to": np.array([40, 32]),
    }
    path = write(f"g (int64[n] i) => (float[] y) {{ {body} }}", **weights)
    with pytest.raises(errors.RuntimeFailure, match=REFUSED[form]):
        openvino.executed_graph(path)


# Recurrent operators

LSTM = """g (float[4, 2, 64] x) => (float[4, 1, 2, 64] y) {{
    {before} w = DequantizeLinear(W, s) r = DequantizeLinear(R, s) y = LSTM <hidden_size = 64> ({x}, w, r) }}"""
GRID = "q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)"


@pytest.mark.parametrize("is_static", [False, True])
def test_lstm_weights_are_expanded_and_refused_behind_quantized_activations(is_static, write):
    weights = {k: RNG.integers(-127, 128, (1, 256, 64)).astype(np.int8) for k in "WR"}
    steps = {"s": np.float32(1e-3), "sx": np.float32(0.03), "zx": np.uint8(128)}
    text = LSTM.format(before=GRID if is_static else "", x="d" if is_static else "x")
    held = weights | (steps if is_static else {"s": steps["s"]})
    path = write(text, **held)
    if is_static:
        with pytest.raises(errors.RuntimeFailure, match="expects Constant"):
            openvino.executed_graph(path)
        return
    (node,) = [n for n in openvino.executed_graph(path).nodes if n.op == "RNNSeq"]
    assert set(node.input_dtypes) <= {"float32", "int32"}


# Sums with codes


@pytest.mark.parametrize(("size", "least", "most"), [(1e-1, 0.0, 0.01), (1e-3, 1.0, 9.0)])
def test_a_layer_norm_behind_a_sum_with_codes_loses_its_epsilon(size, least, most, write):
    """The scale of the codes is moved behind the normalization, as if epsilon were nothing beside any variance.

    So target openvino leaves what computes in float its floats (`Integers.gives_floats`).
    """
    text = """g (float[n, 4, 8] x, float[n, 4, 8] r) => (float[n, 4, 8] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) u = Add(d, r)
        y = LayerNormalization <axis = -1, epsilon = 0.00001> (u, g, b) }"""
    grid = {"s": np.asarray(size / 100, np.float32), "z": np.asarray(128, np.uint8)}
    path = write(text, 17, **grid, g=np.ones(8, np.float32), b=np.zeros(8, np.float32))
    rng = np.random.default_rng(0)
    feeds = {k: (rng.standard_normal((2, 4, 8)) * size).astype(np.float32) for k in "xr"}
    right = runtime.session(path).run(None, feeds)[0]
    assert least <= np.abs(run(path, **feeds) - right).max() < most
