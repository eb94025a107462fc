"""float16 activations and results: computed in float32 and rounded once, to nearest even."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest

import qgraph
from qgraph import graph, native, runtime
from qgraph.ops import bodies, hadamard, layout
from qgraph.runtime import library

N, K = 40, 72


def constants_of(op):
    rng = np.random.default_rng(0)
    if op == "Hadamard":
        return {"factor": np.array(hadamard.factor(12))}, "block_size=24"
    bias = {"bias": rng.standard_normal(N).astype(np.float32)}
    if op == "MatMulTernary":
        codes = layout.pack_ternary(rng.integers(-1, 2, (N, K)))
        scale = rng.uniform(0.1, 1, N).astype(np.float32)
        attributes = f"N={N}, K={K}, activation_bits=8, activation_block=0"
        return {"codes": codes, "scale": scale} | bias, attributes
    groups = layout.int4_columns(K, 32) // 32
    scales = layout.tile_groups(rng.uniform(-0.1, 0.1, (N, groups)).astype(np.float16), 0)
    constants = {
        "codes": layout.pack_int4(rng.integers(0, 16, (N, K)), 32),
        "scales": scales,
        "zero_points": np.full((1, 1, 1), 8, np.uint8),
    }
    attributes = f"N={N}, K={K}, block_size=32, activation_bits=8, activation_block=32"
    return constants | bias, attributes


def model_of(op, kind, dims=("a", "b", K), constants=None, attributes=None):
    if constants is None:
        constants, attributes = constants_of(op)
    names, out = ", ".join(map(str, dims)), ", ".join(f"y{i}" for i in range(len(dims)))
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>'
        f" g ({kind}[{names}] X) => ({kind}[{out}] Y)"
        f" {{ [the_node] Y = ai.qgraph.{op} <{attributes}> (X, {', '.join(constants)}) }}"
    )
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(v, name=k)) for k, v in constants.items())
    proto.functions.append(bodies.proto(op, 21))
    return proto


OPS = ["MatMulInt4", "MatMulTernary", "Hadamard"]


def feed(*lead, seed=1):
    x = np.random.default_rng(seed).standard_normal((*lead, K))
    return x.astype(np.float16)


@pytest.mark.parametrize("lead", [(1, 1), (3, 5), (60, 40), (0, 4)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_result_is_that_of_float32_rounded_once(op, lead):
    x = feed(*lead)
    (whole,) = runtime.session(model_of(op, "float")).run(None, {"X": x.astype(np.float32)})
    for threads in (1, 2):
        session = runtime.session(model_of(op, "float16"), threads=threads)
        (half,) = session.run(None, {"X": x})
        assert half.dtype == np.float16
        assert half.tobytes() == whole.astype(np.float16).tobytes()


@pytest.mark.parametrize("op", OPS)
def test_the_body_and_the_reference_agree(op):
    model = model_of(op, "float16")
    onnx.checker.check_model(model)
    x = feed(2, 3)
    (found,) = runtime.session(model).run(None, {"X": x})
    for (body,) in (
        runtime.session(model, custom_ops=False).run(None, {"X": x}),
        onnx.reference.ReferenceEvaluator(model).run(None, {"X": x}),
    ):
        assert body.dtype == np.float16
        np.testing.assert_allclose(
            found.astype(np.float32), body.astype(np.float32), rtol=2e-3, atol=1e-3
        )


@pytest.mark.parametrize("op", OPS)
def test_types_and_shapes_are_inferred(op):
    model = model_of(op, "float16")
    del model.functions[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = runtime.session(model).get_outputs()
    assert output.type == "tensor(float16)"
    assert output.shape == ["a", "b", K if op == "Hadamard" else N]


@pytest.mark.parametrize("custom_ops", [True, False])
def test_the_oldest_supported_runtime_agrees(custom_ops, oldest_runtime):
    cases = [(model_of(op, "float16"), {"X": feed(2, 3)}) for op in OPS]
    expected = [runtime.session(m, threads=1).run(None, feeds)[0] for m, feeds in cases]
    for found, values in zip(oldest_runtime(cases, custom_ops), expected, strict=True):
        assert found.dtype == np.float16
        if custom_ops:
            assert found.tobytes() == values.tobytes()
        np.testing.assert_allclose(
            found.astype(np.float32), values.astype(np.float32), rtol=2e-3, atol=1e-3
        )


def every_half():
    """Every float16, over and over, so that each stands in every place of a vector."""
    return np.resize(np.arange(1 << 16, dtype=np.uint16), 17 * (1 << 16) // 16 * 16).view(
        np.float16
    )


ISA = """
import sys, numpy as np
from qgraph import runtime
x = np.load(sys.argv[2])
np.save(sys.argv[3], runtime.session(sys.argv[1], threads=1).run(None, {"X": x})[0])
"""


@pytest.mark.parametrize("isa", list(native.load().isas))
def test_every_value_survives_and_every_sum_is_rounded_to_nearest_even(isa, tmp_path):
    # Blocks of 1 give X itself; blocks of 2 sums of two, which fall between float16 values.
    for block, x in (
        (1, every_half()),
        (2, np.random.default_rng(0).permutation(every_half())),
    ):
        factor = {"factor": np.ones((1, 1), np.float32)}
        model = model_of("Hadamard", "float16", ["m"], factor, f"block_size={block}")
        onnx.save(model, tmp_path / "model.onnx")
        np.save(tmp_path / "x.npy", x)
        settings = {"QGRAPH_ISA": isa, "QGRAPH_OPS_LIBRARY": library.library_path()}
        settings |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        paths = [str(tmp_path / name) for name in ("model.onnx", "x.npy", "y.npy")]
        subprocess.run([sys.executable, "-c", ISA, *paths], check=True, env=os.environ | settings)
        found = np.load(paths[2])
        whole = model_of("Hadamard", "float", ["m"], factor, f"block_size={block}")
        (sums,) = runtime.session(whole).run(None, {"X": x.astype(np.float32)})
        with np.errstate(over="ignore"):
            expected = sums.astype(np.float16)
        unordered = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), unordered)
        assert found[~unordered].tobytes() == expected[~unordered].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", OPS)
def test_a_row_that_is_not_finite_spoils_itself_only(op, bad):
    x = feed(1, 4)
    x[0, 2, 5] = bad
    (found,) = runtime.session(model_of(op, "float16")).run(None, {"X": x})
    (whole,) = runtime.session(model_of(op, "float")).run(None, {"X": x.astype(np.float32)})
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(whole))
    assert np.isfinite(found[0, [0, 1, 3]]).all()
    assert not np.isfinite(found[0, 2]).all()


def float16_model(k, n, *, gemm=False):
    text = "Gemm <beta=0.5> (x, w, b)" if gemm else "MatMul (x, w)"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float16[m, {k}] x) => (float16[m, {n}] y)'
        f" {{ y = {text} }}"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (k, n)), ("b", (1, n)))[: 2 if gemm else 1]:
        values = rng.standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(ir.to_proto(ir.tensor(values, name=name)))
    return model


@pytest.mark.parametrize("gemm", [False, True])
def test_a_float16_model_gets_the_operators(gemm):
    source = float16_model(256, 64, gemm=gemm)
    result = qgraph.optimize(source, recipe="w4a8")
    assert [n.op_type for n in graph.nodes(result.model) if n.domain] == ["MatMulInt4"]
    x = np.random.default_rng(1).standard_normal((9, 256)).astype(np.float16)
    (expected,) = runtime.session(source).run(None, {"x": x})
    for custom_ops in (True, False):
        (found,) = runtime.session(result.model, custom_ops=custom_ops).run(None, {"x": x})
        assert found.dtype == np.float16
        error = np.linalg.norm((found - expected).astype(np.float64))
        assert error < 0.2 * np.linalg.norm(expected.astype(np.float64))
