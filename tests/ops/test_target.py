"""Target ort-qgraph: which weights become native operators, and that the files run with and without the library."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, graph, models, runtime, ternary
from qgraph.ops import layout

TOKENS = models.eval_tokens("tiny-llama")[None, :96]


def logits(model, **options):
    session = runtime.session(model, threads=1, **options)
    (given,) = session.get_inputs()
    return session.run(None, {given.name: TOKENS})[0]


def operators(model):
    return [n.op_type for n in graph.nodes(model) if n.domain == "ai.qgraph"]


def relative_error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def w4a8():
    return qgraph.optimize("zoo:tiny-llama", recipe="w4a8")


@pytest.fixture(scope="module")
def ternary_result():
    return qgraph.optimize("zoo:tiny-bitnet", recipe="ternary")


def test_4_bit_weights_become_native_operators(w4a8):
    assert set(operators(w4a8.model)) == {"MatMulInt4"}
    entries = [e for e in w4a8.report.ledger if "matmul-int4" in e.forms]
    assert len(entries) == len(operators(w4a8.model)) > 20
    assert all(e.runs == ["ai.qgraph MatMulInt4"] for e in entries)
    assert all(e.spec == "int4.g32.sym.f16" for e in entries)


def test_the_body_is_carried_once_and_runs_without_the_library(w4a8):
    assert [key[1] for key in w4a8.model.functions] == ["MatMulInt4"]
    native = logits(w4a8.model)
    body = logits(w4a8.model, custom_ops=False)
    assert relative_error(native, body) < 1e-2  # a rounding that falls the other way now and then
    assert relative_error(native, logits(models.build("tiny-llama"))) < 0.2


def test_ternary_weights_are_exact(ternary_result):
    exact = [e for e in ternary_result.report.ledger if e.spec == "int2.ch.sym"]
    assert len(exact) > 20
    assert all(e.mse == 0 for e in exact)
    assert "MatMulTernary" in operators(ternary_result.model)
    native = logits(ternary_result.model)
    assert relative_error(native, logits(ternary_result.model, custom_ops=False)) < 2e-2
    assert relative_error(native, logits(models.build("tiny-bitnet"))) < 0.1


def test_ternary_weights_are_exact_on_stock_onnxruntime():
    result = qgraph.optimize("zoo:tiny-bitnet", recipe="ternary", target="ort")
    exact = [e for e in result.report.ledger if e.spec == "int2.ch.sym"]
    assert len(exact) > 20
    assert all(e.mse == 0 for e in exact)
    assert operators(result.model) == []


def matmul(w, *, gemm=None):
    """A model of one product with a constant weight [K, N]."""
    k, n = w.shape
    bias = "" if gemm is None else ", b"
    op = "MatMul" if gemm is None else f"Gemm <{gemm}>"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[m, {k}] x) => (float[m, {n}] y)'
        f" {{ y = {op} (x, w{bias}) }}"
    )
    model.graph.initializer.append(ir.to_proto(ir.tensor(w, name="w")))
    if gemm is not None:
        b = np.linspace(-1, 1, n, dtype=np.float32)
        model.graph.initializer.append(ir.to_proto(ir.tensor(b, name="b")))
    return model


def ternary_weight(k, n, scale=None):
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 3, n) if scale is None else scale
    return (rng.integers(-1, 2, (k, n)) * scale).astype(np.float32)


SPECS = [
    *("int4.g32", "uint4.g64.asym", "int4.ch", "uint4.g16.asym.f16"),
    *("int3.g32", "uint3.g64.asym.f16", "int3.ch"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_stored_is_what_was_solved(spec):
    bits = int(spec.lstrip("uint")[0])
    unpack, most = {4: (layout.unpack_int4, 0.2), 3: (layout.unpack_int3, 0.4)}[bits]
    w = np.random.default_rng(0).standard_normal((200, 96)).astype(np.float32)
    recipe = {"rules": [{"weights": [spec]}], "min_elements": 1}
    model = qgraph.optimize(matmul(w), recipe=recipe, target="ort-qgraph").model
    (node,) = [n for n in graph.nodes(model) if n.op_type == f"MatMulInt{bits}"]
    codes, scales, points = (graph.array(v) for v in node.inputs[1:4])
    q = unpack(codes, 96, 200).astype(np.float64)
    group = node.attributes["block_size"].value or 200
    s, z = (layout.untile_groups(v, 96) for v in (scales, np.broadcast_to(points, scales.shape)))
    s, z = (np.repeat(v.astype(np.float64), group, axis=1)[:, :200] for v in (s, z))
    x = np.random.default_rng(1).standard_normal((5, 200)).astype(np.float32)
    (y,) = runtime.session(model).run(None, {"x": x})
    assert relative_error(y, x @ ((q - z) * s).T) < 0.02
    assert relative_error(y, x @ w) < most


def test_3_bits_are_between_2_and_4_in_bytes_and_in_error():
    """On a model that has all of its products in one width."""
    found = {}
    for spec in ("uint2.g32.asym", "uint3.g32.asym", "uint4.g32.asym"):
        recipe = {"rules": [{"ops": ["MatMul"], "weights": [spec, "float"]}]}
        result = qgraph.optimize("zoo:tiny-llama", recipe=recipe, target="ort-qgraph")
        held = [e for e in result.report.ledger if e.spec.startswith(spec)]
        assert len(held) > 20
        error = relative_error(logits(result.model), logits(models.build("tiny-llama")))
        size = sum(e.stored_bytes for e in held) / sum(np.prod(e.shape) for e in held) * 8
        found[spec[4]] = size, error
        if spec[4] == "3":
            assert set(operators(result.model)) == {"MatMulInt3"}
            assert {run for e in held for run in e.runs} == {"ai.qgraph MatMulInt3"}
    # A float32 scale of 32 columns is a bit per weight; zero points are bytes here, and share them in MatMulNBits.
    assert [round(found[b][0], 2) for b in "234"] == [3.06, 4.25, 5.25]
    assert found["4"][1] < found["3"][1] / 1.5 and found["3"][1] < found["2"][1] / 1.5


@pytest.mark.parametrize("target", ["ort", "openvino", "onnx"])
def test_targets_without_3_bits_keep_the_weight_float_and_say_why(target):
    w = np.random.default_rng(0).standard_normal((256, 96)).astype(np.float32)
    recipe = {"rules": [{"weights": ["uint3.g32.asym", "float"]}], "min_elements": 1}
    (entry,) = qgraph.optimize(matmul(w), recipe=recipe, target=target).ledger
    assert not entry.spec and entry.code == "QG315"
    assert "not 3" in entry.reason or "ONNX has no type for uint3" in entry.reason


@pytest.mark.parametrize("scale", [None, 0.37], ids=["per channel", "per tensor"])
def test_found_by_value_whatever_the_scale(scale):
    w = ternary_weight(256, 128, scale)
    model = qgraph.optimize(matmul(w), recipe="ternary").model
    (node,) = [n for n in graph.nodes(model) if n.domain == "ai.qgraph"]
    values = layout.unpack_ternary(graph.array(node.inputs[1]), 128, 256)
    stored = graph.array(node.inputs[2])
    assert stored.shape == ((128,) if scale is None else (1,))
    np.testing.assert_array_equal((values * stored[:, None]).T, w)


def test_almost_ternary_is_not_ternary():
    w = ternary_weight(256, 128)
    w[3, 5] = 1e-3
    model = qgraph.optimize(matmul(w), recipe="ternary").model
    assert operators(model) == []
    recipe = {"rules": [{"weights": ["int2.ch"], "solver": "ternary"}]}
    with pytest.raises(errors.RecipeError, match="QG402"):
        qgraph.optimize(matmul(w), recipe=recipe, target="ort")


@pytest.mark.parametrize("gemm", ["transB = 0", "beta = 0.5"])
@pytest.mark.parametrize("recipe", ["w4a8", "ternary"])
def test_gemm_keeps_its_bias(recipe, gemm):
    w = ternary_weight(256, 128)
    source = matmul(w, gemm=gemm)
    model = qgraph.optimize(source, recipe=recipe).model
    assert len(operators(model)) == 1
    x = np.random.default_rng(1).standard_normal((7, 256)).astype(np.float32)
    (expected,) = runtime.session(source).run(None, {"x": x})
    (found,) = runtime.session(model).run(None, {"x": x})
    assert relative_error(found, expected) < (0.2 if recipe == "w4a8" else 0.02)
    (zero,) = runtime.session(model).run(None, {"x": 0 * x})
    np.testing.assert_allclose(zero, runtime.session(source).run(None, {"x": 0 * x})[0], atol=1e-6)


def test_what_the_kernels_are_not_for_stays_with_onnxruntime():
    recipe = {"rules": [{"weights": ["int4.g32.f16", "int4.g32"]}]}
    source = matmul(np.ones((512, 8), np.float32))
    result = qgraph.optimize(source, recipe=recipe, target="ort-qgraph")
    assert operators(result.model) == []
    (entry,) = result.report.ledger
    assert "too small" in entry.reason or "matmul-nbits" in entry.forms


def tied(dtype=np.float32):
    """A table [128, 256] and the head that uses it too."""
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(dtype)
    model = matmul(w.T, gemm="transB = 1")
    for held, values in zip(model.graph.initializer, (w, np.zeros(128, dtype)), strict=True):
        held.CopyFrom(ir.to_proto(ir.tensor(values, name=held.name)))
    more = onnx.parser.parse_graph("g (int64[j] i) => (float[j, p] R) { R = Gather (w, i) }")
    for name in ("input", "output", "node"):
        getattr(model.graph, name).extend(getattr(more, name))
    if dtype == np.float16:
        for v in (model.graph.input[0], *model.graph.output):
            v.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model, w


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("spec", ["int4.g32", "uint4.g64.asym", "int4.ch", "uint4.g16.asym.f16"])
def test_a_table_that_is_also_the_head_is_stored_once(spec, dtype):
    source, w = tied(dtype)
    recipe = {"rules": [{"weights": [spec]}], "min_elements": 1}
    result = qgraph.optimize(source, recipe=recipe, target="ort-qgraph")
    assert sorted(operators(result.model)) == ["GatherInt4", "MatMulInt4"]
    gather, product = (
        next(n for n in graph.nodes(result.model) if n.op_type == op)
        for op in ("GatherInt4", "MatMulInt4")
    )
    assert list(gather.inputs[1:4]) == list(product.inputs[1:4])
    stored = sum(
        v.const_value.nbytes for v in result.model.graph.initializers.values() if v.const_value
    )
    assert stored < 128 * 256 / 2 + 128 * (256 / 16) * 5 + 2000
    # Rows are exactly what the product multiplies with.
    for custom_ops in (True, False):
        feeds = {"i": np.arange(128), "x": np.eye(256, dtype=dtype)}
        y, rows = runtime.session(result.model, custom_ops=custom_ops).run(None, feeds)
        assert rows.dtype == dtype
        np.testing.assert_allclose(y.T, rows, rtol=2e-3 if dtype == np.float16 else 1e-5)
        assert relative_error(rows.astype(np.float32), w.astype(np.float32)) < 0.2


def test_a_table_alone_stays_with_onnxruntime_where_it_can():
    source, _ = tied()
    del source.graph.node[0], source.graph.output[0], source.graph.input[0]
    for spec, expected in (
        ("int4.g32", []),  # rows of their own lie closer together
        ("uint4.g32.asym", ["GatherInt4"]),
        ("int4.ch", ["GatherInt4"]),
    ):
        recipe = {"rules": [{"weights": [spec]}], "min_elements": 1}
        found = qgraph.optimize(source, recipe=recipe, target="ort-qgraph")
        assert operators(found.model) == expected


def test_tied_tables_of_8_bits_stay_with_onnxruntime():
    recipe = {"rules": [{"weights": ["int8.g32"]}]}
    result = qgraph.optimize(tied()[0], recipe=recipe, target="ort-qgraph")
    assert operators(result.model) == []
    assert {n.op_type for n in graph.nodes(result.model)} >= {
        "GatherBlockQuantized",
        "MatMulNBits",
    }


def test_a_tied_model_shares_its_table():
    found = qgraph.optimize(
        "zoo:tiny-gpt", recipe="w4a8", overrides=["tied.weights=int4.g32.f16"], verify="ends"
    )
    assert "GatherInt4" in operators(found.model)


def test_half_scales_go_with_float_activations_only_where_a_form_takes_them():
    w = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)
    recipe = {"rules": [{"weights": ["int4.g32.f16", "int4.g32"]}]}
    (entry,) = qgraph.optimize(matmul(w), recipe=recipe, target="onnx").report.ledger
    assert entry.spec == "int4.g32.sym"
    assert "float32" in entry.reason
    (entry,) = qgraph.optimize(matmul(w), recipe=recipe, target="ort").report.ledger
    assert entry.spec == "int4.g32.sym.f16" and entry.forms == ["matmul-nbits"]


def test_rows_of_zeros_and_of_infinities():
    w = np.array([[0, 0], [0.5, -0.5]], np.float32)
    codes, scales = ternary.decompose(w)
    assert scales.ravel().tolist() == [0.5, 0.5]
    assert codes.tolist() == [[0, 0], [1, -1]]
    assert ternary.decompose(np.zeros((2, 3), np.float32))[1].tolist() == [[1], [1]]
    for bad in (np.nan, np.inf):
        assert ternary.decompose(np.array([[bad, 0]], np.float32)) is None
