"""solve-weights, insert-qdq, fuse-qdq, cleanup: what each changes, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, files, graph, numerics, printer, registry, runtime, verify
from qgraph.pipeline import Context, Pipeline
from qgraph.recipe import Recipe, Rule

MATMUL = "g (float[m, 64] x) => (float[m, 48] y) { y = MatMul(x, w) }"
SOLVE = "canonicalize assign-precision solve-weights"
INSERT = f"{SOLVE} insert-qdq"


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def recipe(*weights: str, **fields: Any) -> Recipe:
    return Recipe(rules=(Rule(id="all", weights=weights or ("int8.ch",)),), **fields)


# solve-weights


def test_solving_changes_no_graph_and_fills_the_plan(parse, after):
    model = parse(MATMUL, w=draw(64, 48))
    done = after(SOLVE, model, recipe("uint4.g32"))
    assert not done.changed and printer.text(done.model) == printer.text(model)
    q = done.ctx.plan.solved["w"]
    q.check()
    assert q.shape == (48, 64)
    record = done.ctx.records["w"]
    w = draw(64, 48).T
    assert record["squared_error"] == pytest.approx(numerics.squared_error(w, q), rel=1e-4)
    assert record["sqnr_db"] == pytest.approx(numerics.sqnr_db(w, q.dequantize()), abs=1e-3)


def test_a_weight_without_information_has_no_noise(parse, after):
    done = after(SOLVE, parse(MATMUL, w=np.zeros((64, 48), np.float32)), recipe())
    assert done.ctx.records["w"]["sqnr_db"] == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(parse, after, bad):
    w = draw(64, 48)
    w[3, 5] = bad
    with pytest.raises(errors.InputError, match=r"QG401 w: has NaN or Inf in 1 of 48 .*first: 5"):
        after(SOLVE, parse(MATMUL, w=w), recipe())


def test_unknown_solver_options_are_refused_with_the_nearest(parse, after):
    with pytest.raises(errors.RecipeError, match=r"QG305 solvers.rtn.thread: .*\n.*threads"):
        after(SOLVE, parse(MATMUL, w=draw(64, 48)), recipe(solvers={"rtn": {"thread": 2}}))


# insert-qdq


def test_inserting_consumes_the_plan_and_records_what_was_written(parse, after):
    done = after(INSERT, parse(MATMUL, w=draw(64, 48)), recipe("uint4.g32"))
    assert done.changed and done.ops() == ["MatMulNBits"]
    assert not done.ctx.plan.solved
    record = done.ctx.records["w"]
    assert record["nodes"] == [{"form": "matmul-nbits", "node": "", "output": "y"}]
    held = sum(a.nbytes for a in done.constants().values())
    assert record["stored_bytes"] == held == 64 * 48 // 2 + 48 * 2 * 4 + 48 * 2 // 2


@pytest.mark.parametrize(
    ("target", "spec", "raised"), [("ort", "int4.g32", 13), ("onnx", "int4.g32", 21)]
)
def test_the_opset_is_raised_only_for_a_form_that_needs_it(parse, after, target, spec, raised):
    model = parse(MATMUL, opset=13, ir_version=7, w=draw(64, 48))
    done = after(INSERT, model, recipe(spec), target)
    assert done.model.graph.opset_imports[""] == raised
    assert done.model.ir_version == (7 if raised == 13 else 10)


def test_nothing_planned_is_nothing_written(parse, after):
    done = after(INSERT, parse(MATMUL, w=draw(64, 48)), recipe("float"))
    assert not done.changed and done.ops() == ["MatMul"]


def test_the_plan_can_be_written_once_only():
    with pytest.raises(
        errors.PipelineError, match=r"QG307 pass 5 \(insert-qdq\): needs 'plan', but insert-qdq"
    ):
        Pipeline([*INSERT.split(), "insert-qdq"])


def test_a_shared_activation_is_quantized_before_its_first_reader(parse, after):
    text = """g (float[m, 64] x) => (float[m, 64] y) {
      [a] a = MatMul(x, w) [b] b = MatMul(x, v) y = Add(a, b) }"""
    rules = (Rule(id="all", weights=("int8.ch",), activations="int8"),)
    done = after(INSERT, parse(text, w=draw(64, 64), v=draw(64, 64)), Recipe(rules=rules))
    assert done.ops()[0] == "DynamicQuantizeLinear"
    assert done.ops().count("DynamicQuantizeLinear") == 1


# fuse-qdq: models that arrive quantized


def arrived(node: str, codes: Any, scale: Any, zero: Any = None, opset: int = 21) -> ir.Model:
    """x [m, 64] times a quantized W; `node` computes y from x and w."""
    proto = ir.to_proto(
        files.load(
            onnx_text(f"w = DequantizeLinear{node.split('|')[0]} y = {node.split('|')[1]}", opset)
        )
    )
    held = {"q": codes, "s": scale} | ({} if zero is None else {"z": zero})
    for name, data in held.items():
        tensor = ir.to_proto(data if isinstance(data, ir.PackedTensor) else ir.tensor(data))
        tensor.name = name
        proto.graph.initializer.append(tensor)
    return files.load(proto)


def onnx_text(body: str, opset: int) -> Any:
    import onnx.parser

    text = f"g (float[m, 64] x) => (float[m, n] y) {{ {body} }}"
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')


def codes(*shape: int, low: int = -128, high: int = 128, dtype: Any = np.int8) -> Any:
    return np.random.default_rng(1).integers(low, high, shape).astype(dtype)


def scales(*shape: int) -> Any:
    return (np.random.default_rng(2).random(shape) * 0.01 + 0.005).astype(np.float32)


def int4(array: Any, kind: ir.DataType = ir.DataType.INT4) -> Any:
    packed = numerics.pack(array, 4)
    return ir.PackedTensor(packed, kind, shape=ir.Shape(array.shape))


ARRIVED = {
    "per-channel": ("(q, s)|MatMul(x, w)", codes(64, 48), scales(48), None, "MatMulNBits"),
    "zero-points": (
        "(q, s, z)|MatMul(x, w)",
        codes(64, 48, low=0, high=256, dtype=np.uint8),
        scales(48),
        codes(48, low=100, high=140, dtype=np.uint8),
        "MatMulNBits",
    ),
    "unsigned-without-zero-point": (
        "(q, s)|MatMul(x, w)",
        codes(64, 48, low=0, high=256, dtype=np.uint8),
        scales(48),
        None,
        "MatMulNBits",
    ),
    "signed-zero-points": (
        "(q, s, z)|MatMul(x, w)",
        codes(64, 48),
        scales(48),
        codes(48, low=-9, high=9),
        "MatMulNBits",
    ),
    "blocks": (
        "<axis=0, block_size=32>(q, s)|MatMul(x, w)",
        codes(64, 48),
        scales(2, 48),
        None,
        "MatMulNBits",
    ),
    "int4": (
        "<axis=0, block_size=32>(q, s)|MatMul(x, w)",
        int4(codes(64, 48, low=-8, high=8)),
        scales(2, 48),
        None,
        "MatMulNBits",
    ),
    "gemm": ("<axis=0>(q, s)|Gemm<transB=1>(x, w)", codes(48, 64), scales(48), None, "MatMulNBits"),
    "per-tensor": ("(q, s)|MatMul(x, w)", codes(64, 48), scales(), None, "DequantizeLinear"),
    "wrong-axis": (
        "<axis=0>(q, s)|MatMul(x, w)",
        codes(64, 48),
        scales(64),
        None,
        "DequantizeLinear",
    ),
    "blocks-of-columns": (
        "<axis=1, block_size=16>(q, s)|MatMul(x, w)",
        codes(64, 48),
        scales(64, 3),
        None,
        "DequantizeLinear",
    ),
    "other-reader": ("(q, s)|Add(x, w)", codes(64, 64), scales(64), None, "DequantizeLinear"),
}


@pytest.mark.parametrize("name", ARRIVED)
def test_a_model_that_arrives_quantized_keeps_its_numbers(tmp_path, name):
    node, q, s, z, op = ARRIVED[name]
    model = arrived(node, q, s, z)
    result = qgraph.optimize(model, "int8-weights", target="ort")
    assert result.model.graph[0].op_type == op
    x = {"x": np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)}
    want = runtime.session(model, optimize="off").run(None, x)[0]
    for node_ in result.model.graph:
        node_.attributes.pop("accuracy_level", None)  # compare the weights, not the rounding of x
    got = runtime.session(result.model, optimize="off").run(None, x)[0]
    assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


STATIC = """xq = QuantizeLinear(x, a, b) xd = DequantizeLinear(xq, a, b)
    w = DequantizeLinear(q, s) h = MatMul(xd, w) hq = QuantizeLinear(h, a, b)
    y = DequantizeLinear(hq, a, b)"""


def test_static_quantization_stays_for_the_runtime_to_fuse(tmp_path):
    proto = onnx_text(STATIC, 21)
    held = {"q": codes(64, 48), "s": scales(48), "a": np.float32(0.02), "b": np.int8(0)}
    for k, v in held.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(np.asarray(v), name=k)))
    result = qgraph.optimize(proto, "auto", target="ort", output=tmp_path / "q.onnx")
    assert "MatMulNBits" not in {n.op_type for n in result.model.graph}
    (entry,) = result.ledger
    assert "its operator's input is quantized too" in entry.reason
    from qgraph.executed import ort

    ran = {n.op for n in ort.executed_graph(tmp_path / "q.onnx").nodes}
    assert "QLinearMatMul" in ran


def test_weights_of_quantization_aware_training_arrive_quantized():
    text = "c = QuantizeLinear(f, s, z) w = DequantizeLinear(c, s, z) y = MatMul(x, w)"
    proto = onnx_text(text, 17)
    held = {"f": draw(64, 48), "s": scales(48), "z": np.zeros(48, np.int8)}
    for k, v in held.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(v, name=k)))
    result = qgraph.optimize(proto, "auto", target="ort")
    assert [n.op_type for n in result.model.graph] == ["MatMulNBits"]
    assert result.report.quantized[0].reason == "arrived quantized; its codes and scales are kept"


def test_codes_that_are_shared_are_lowered_together(parse):
    text = """w = DequantizeLinear(q, s) v = DequantizeLinear(q, s)
        a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)"""
    proto = onnx_text(text, 21)
    for k, v in (("q", codes(64, 64)), ("s", scales(64))):
        proto.graph.initializer.append(ir.to_proto(ir.tensor(v, name=k)))
    result = qgraph.optimize(proto, "auto", target="ort")
    assert [n.op_type for n in result.model.graph] == ["MatMulNBits", "Relu", "MatMulNBits"]
    assert len({n.inputs[1].name for n in result.model.graph if n.op_type == "MatMulNBits"}) == 1


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_targets_whose_form_is_dequantize_linear_leave_it(target):
    model = arrived(*ARRIVED["per-channel"][:4])
    result = qgraph.optimize(model, "auto", target=target, inspect=False)
    assert [n.op_type for n in result.model.graph] == ["DequantizeLinear", "MatMul"]
    (entry,) = result.ledger
    assert "stays as it is" in entry.reason and entry.spec


# cleanup


def test_cleanup_drops_what_is_dead_in_every_graph_and_sorts(parse, after):
    text = """g (bool c, float[m, 4] x) => (float[m, 4] y) {
      u = Relu(x)
      y = If(c) <then_branch = t () => (float[m, 4] a) { d = Abs(x) a = MatMul(x, w) },
                 else_branch = e () => (float[m, 4] b) { b = MatMul(x, v) }>
    }"""
    model = parse(text, v=draw(4, 4), unused=draw(9), w=draw(4, 4))
    done = after("cleanup", model)
    assert done.changed
    assert sorted(done.ops()) == ["If", "MatMul", "MatMul"]
    assert list(done.model.graph.initializers) == ["w", "v"]  # in order of use
    assert not [d for d in verify.verify(done.model) if d.code == "V10"]


def test_cleanup_drops_functions_and_imports_that_nobody_uses(after):
    import onnx.parser

    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1, "g" : 1]>
    g (float[m, 4] x) => (float[m, 4] y) { y = Relu(x) }
    <domain: "f", opset_import: ["" : 17]> Unused (x) => (y) { y = Abs(x) }"""
    done = after("cleanup", files.load(onnx.parser.parse_model(text)))
    assert not done.model.functions and list(done.model.graph.opset_imports) == [""]


def test_every_pass_refuses_options_that_it_does_not_know():
    for name in registry.names("pass"):
        with pytest.raises(errors.RecipeError, match=f"QG305 {name}.nonsense: is no option"):
            registry.get("pass", name)(nonsense=1)


def test_passes_run_outside_a_pipeline_too(parse):
    model = parse(MATMUL, w=draw(64, 48))
    result = registry.get("pass", "canonicalize")()(model)
    assert result.model is model and not result.modified
    assert graph.opset(model) == 17
    assert Context(registry.get("target", "ort"), Recipe.default()).threads == 1
