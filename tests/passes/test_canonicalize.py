"""canonicalize: every way in which exporters hide a weight, and what must be left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import graph, printer, runtime, weights

RANDOM = np.random.default_rng(0)
MATMUL = "g (float[m, 64] x) => (float[m, n] y) {{ {before} y = MatMul(x, w) }}"


def draw(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# what stands before the weight, its constants, the weight it stands for, opset
FOLDED = {
    "identity": ("w = Identity(a)", {"a": draw(64, 48)}, lambda a: a, 17),
    "mul": ("w = Mul(a, b)", {"a": draw(64, 48), "b": draw(48)}, lambda a, b: a * b, 17),
    "mul-scalar-first": (
        "w = Mul(b, a)",
        {"b": np.float32(0.3).reshape(()), "a": draw(64, 48)},
        lambda b, a: b * a,
        17,
    ),
    "div": ("w = Div(a, b)", {"a": draw(64, 48), "b": draw(64, 1)}, lambda a, b: a / b, 17),
    "add": ("w = Add(a, b)", {"a": draw(64, 48), "b": draw(64, 48)}, lambda a, b: a + b, 17),
    "sub": ("w = Sub(a, b)", {"a": draw(64, 48), "b": draw(48)}, lambda a, b: a - b, 17),
    "cast": (
        "w = Cast<to=1>(a)",
        {"a": draw(64, 48).astype(np.float16)},
        lambda a: a.astype(np.float32),
        17,
    ),
    "cast-double": (
        "w = Cast<to=1>(a)",
        {"a": draw(64, 48).astype(np.float64)},
        lambda a: a.astype(np.float32),
        17,
    ),
    "cast-through-half": (
        "h = Cast<to=10>(a) w = Cast<to=1>(h)",
        {"a": draw(64, 48)},
        lambda a: a.astype(np.float16).astype(np.float32),
        17,
    ),
    "reshape": (
        "w = Reshape(a, s)",
        {"a": draw(64 * 48), "s": ints(64, -1)},
        lambda a, s: a.reshape(64, 48),
        17,
    ),
    "reshape-zero": (
        "w = Reshape(a, s)",
        {"a": draw(64, 6, 8), "s": ints(0, 48)},
        lambda a, s: a.reshape(64, 48),
        17,
    ),
    "squeeze": (
        "w = Squeeze(a, s)",
        {"a": draw(64, 1, 48), "s": ints(-2)},
        lambda a, s: a[:, 0],
        17,
    ),
    "squeeze-all": ("w = Squeeze(a)", {"a": draw(64, 1, 48)}, lambda a: a[:, 0], 17),
    "squeeze-11": ("w = Squeeze<axes=[1]>(a)", {"a": draw(64, 1, 48)}, lambda a: a[:, 0], 11),
    "unsqueeze": (
        "u = Unsqueeze(a, s) w = Squeeze(u, s)",
        {"a": draw(64, 48), "s": ints(0)},
        lambda a, s: a,
        17,
    ),
    "flatten": ("w = Flatten<axis=1>(a)", {"a": draw(64, 6, 8)}, lambda a: a.reshape(64, 48), 17),
    "flatten-back": (
        "w = Flatten<axis=-1>(a)",
        {"a": draw(8, 8, 48)},
        lambda a: a.reshape(64, 48),
        17,
    ),
    "concat": (
        "w = Concat<axis=-1>(a, b)",
        {"a": draw(64, 20), "b": draw(64, 28)},
        lambda a, b: np.concatenate([a, b], 1),
        17,
    ),
    "slice": (
        "w = Slice(a, s, e, d)",
        {"a": draw(70, 48), "s": ints(2), "e": ints(66), "d": ints(0)},
        lambda a, **_: a[2:66],
        17,
    ),
    "slice-to-the-end": (
        "w = Slice(a, s, e, d)",
        {"a": draw(70, 48), "s": ints(-64), "e": ints(2**62), "d": ints(-2)},
        lambda a, **_: a[-64:],
        17,
    ),
    "slice-backwards": (
        "w = Slice(a, s, e, d, t)",
        {"a": draw(64, 48), "s": ints(-1), "e": ints(-(2**62)), "d": ints(0), "t": ints(-1)},
        lambda a, **_: a[::-1],
        17,
    ),
    "slice-9": (
        "w = Slice<axes=[0], starts=[2], ends=[66]>(a)",
        {"a": draw(70, 48)},
        lambda a: a[2:66],
        9,
    ),
    "chain": (
        "r = Reshape(a, s) c = Cast<to=1>(r) w = Mul(c, g)",
        {"a": draw(64 * 48).astype(np.float16), "s": ints(64, 48), "g": draw(48)},
        lambda a, s, g: a.reshape(64, 48).astype(np.float32) * g,
        17,
    ),
    "constant-node": (
        "s = Constant<value=float {0.5}>() w = Mul(a, s)",
        {"a": draw(64, 48)},
        lambda a: a * np.float32(0.5),
        17,
    ),
    "transpose-and-more": (
        "t = Transpose<perm=[1,0]>(a) w = Mul(t, b)",
        {"a": draw(48, 64), "b": draw(48)},
        lambda a, b: a.T * b,
        17,
    ),
}


@pytest.mark.parametrize(("before", "constants", "weight", "opset"), FOLDED.values(), ids=FOLDED)
def test_folds_arithmetic_before_a_weight_to_the_last_bit(
    parse, after, before, constants, weight, opset
):
    model = parse(MATMUL.format(before=before), opset=opset, **constants)
    done = after("canonicalize", model)
    assert done.ops() == ["MatMul"] and done.changed
    (found,) = weights.find(done.model)
    assert np.array_equal(graph.array(found.value), weight(**constants))


def test_a_folded_weight_keeps_the_name_of_its_largest_part(parse, after):
    model = parse(
        MATMUL.format(before="w = Mul(fc_weight, gain)"), fc_weight=draw(64, 48), gain=draw(48)
    )
    assert [w.name for w in weights.find(after("canonicalize", model).model)] == [
        "fc_weight.folded"
    ]


@pytest.mark.parametrize(
    "before",
    ["w = Transpose<perm=[1,0]>(a)", "i = Identity(a) w = Transpose(i)"],
)
def test_a_transpose_before_its_operator_stays(parse, after, before):
    done = after("canonicalize", parse(MATMUL.format(before=before), a=draw(48, 64)))
    assert done.ops() == ["Transpose", "MatMul"]
    (found,) = weights.find(done.model)
    assert found.shape == (48, 64) and found.uses[0].through is not None


def test_equal_expressions_are_folded_once(parse, after):
    text = """g (float[m, 64] x) => (float[m, 64] y) {
        a = Mul(w, s) h = MatMul(x, a) b = Mul(w, s) y = MatMul(h, b) }"""
    done = after("canonicalize", parse(text, w=draw(64, 64), s=draw(64)))
    assert done.ops() == ["MatMul", "MatMul"]
    (found,) = weights.find(done.model)
    assert len(found.uses) == 2


def test_float_constants_of_nodes_and_bodies_become_initializers(parse, after):
    text = """g (bool c, float[m, 2] x) => (float[m, 2] y) {
      k = Constant<value=float[2, 2] {1, 2, 3, 4}>()
      h = MatMul(x, k)
      y = If(c) <
        then_branch = t () => (float[m, 2] a) <float[2, 2] v = {1, 0, 0, 2}> { a = MatMul(h, v) },
        else_branch = e () => (float[m, 2] b) { b = Identity(h) }>
    }"""
    done = after("canonicalize", parse(text))
    assert sorted(done.model.graph.initializers) == ["k", "v"]
    assert [len(g.initializers) for g in graph.graphs(done.model)] == [2, 0, 0]


def test_scalars_and_integers_stay_where_they_are(parse, after):
    text = """g (float[m, 64] x) => (float[64, m] y) {
      s = Constant<value=int64[2] {64, -1}>() h = Constant<value_float=0.5>()
      a = Mul(x, h) y = Reshape(a, s) }"""
    done = after("canonicalize", parse(text))
    assert done.ops() == ["Constant", "Constant", "Mul", "Reshape"] and not done.changed


def test_functions_are_inlined_and_share_their_constants(parse, after):
    text = """g (float[m, 2] x) => (float[m, 2] y) { h = f.Dense(x) y = f.Dense(h) }
    <domain: "f", opset_import: ["" : 17]>
    Dense (x) => (y) { w = Constant<value=float[2, 2] {1, 2, 3, 4}>() y = MatMul(x, w) }"""
    done = after("canonicalize", parse(text))
    assert done.ops() == ["MatMul", "MatMul"] and not done.model.functions
    assert len(weights.find(done.model)) == 1
    assert "f" not in done.model.graph.opset_imports


def norm_constants(n: int) -> dict[str, np.ndarray]:
    return {"gamma": draw(n), "beta": draw(n), "mean": draw(n), "var": np.abs(draw(n)) + 0.5}


BN = "BatchNormalization(c, gamma, beta, mean, var)"
CONV = "g (float[b, 4, 6, 6] x) => (float[b, 8, p, q] y) {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        (f"c = Conv(x, w) y = {BN}", {"w": draw(8, 4, 3, 3)}),
        (f"c = Conv(x, w, bias) y = {BN}", {"w": draw(8, 4, 3, 3), "bias": draw(8)}),
        (f"c = Conv<group=2>(x, w) y = {BN}", {"w": draw(8, 2, 3, 3)}),
        (f"c = ConvTranspose(x, w) y = {BN}", {"w": draw(4, 8, 3, 3)}),
        (f"c = Conv(x, w) n = {BN} y = Relu(n)", {"w": draw(8, 4, 3, 3)}),
    ],
    ids=["conv", "bias", "grouped", "transpose", "inside"],
)
def test_batch_norm_goes_into_the_convolution(parse, after, body, extra):
    done = after("canonicalize", parse(CONV.format(body=body), **extra, **norm_constants(8)))
    assert "BatchNormalization" not in done.ops() and done.changed
    assert str(done.model.graph.outputs[0].name) == "y"
    assert [w.name for w in weights.find(done.model)] == ["w"]
    kept = {"w", "bias" if "bias" in extra else "w.bias"}
    assert set(done.constants()) == kept


@pytest.mark.parametrize(
    ("body", "extra", "options"),
    [
        (f"c = Conv(x, w) n = {BN} y = Add(n, c)", {"w": draw(8, 4, 3, 3)}, {}),
        (
            f"c = Conv(x, w) n = {BN} d = Conv(x, w) y = Add(n, d)",
            {"w": draw(8, 4, 3, 3)},
            {},
        ),
        (f"c = ConvTranspose<group=2>(x, w) y = {BN}", {"w": draw(4, 4, 3, 3)}, {}),
        (f"c = Conv(x, w) y = {BN}", {"w": draw(8, 4, 3, 3)}, {"fold_batch_norm": False}),
        (f"v = Abs(w) c = Conv(x, v) y = {BN}", {"w": draw(8, 4, 3, 3)}, {}),
    ],
    ids=["read-twice", "shared", "grouped-transpose", "option", "computed"],
)
def test_batch_norm_stays_where_folding_would_be_wrong(parse, after, body, extra, options):
    model = parse(CONV.format(body=body), **extra, **norm_constants(8))
    assert "BatchNormalization" in after("canonicalize", model, **options).ops()


def test_two_norms_that_share_their_numbers_are_both_folded(parse, after):
    body = f"""c = Conv(x, w) n = {BN} d = Conv(x, v)
        k = BatchNormalization(d, gamma, beta, mean, var) y = Add(n, k)"""
    model = parse(
        CONV.format(body=body), w=draw(8, 4, 3, 3), v=draw(8, 4, 3, 3), **norm_constants(8)
    )
    assert after("canonicalize", model).ops() == ["Conv", "Conv", "Add"]


def test_convolutions_that_share_a_bias_do_not_share_a_fold(parse, after):
    body = f"c = Conv(x, w, bias) n = {BN} d = Conv(x, v, bias) y = Add(n, d)"
    constants = {"w": draw(8, 4, 3, 3), "v": draw(8, 4, 3, 3), "bias": draw(8)}
    done = after("canonicalize", parse(CONV.format(body=body), **constants, **norm_constants(8)))
    assert done.ops() == ["Conv", "Conv", "Add"]
    assert np.array_equal(done.constants()["bias"], constants["bias"])


def test_gemm_factors_go_into_its_constants(parse, after):
    text = "g (float[m, 64] x) => (float[m, 48] y) { y = Gemm<alpha=0.5, beta=2.0>(x, w, c) }"
    done = after("canonicalize", parse(text, w=draw(64, 48), c=draw(48)))
    assert not done.model.graph[0].attributes
    assert set(done.constants()) == {"w", "c"}


def test_gemm_factors_of_shared_or_computed_constants_stay(parse, after):
    text = """g (float[m, 64] x, float[64] c) => (float[m, 64] y) {
      h = Gemm<alpha=0.5, beta=2.0>(x, w, c) y = MatMul(h, w) }"""
    done = after("canonicalize", parse(text, w=draw(64, 64)))
    assert set(done.model.graph[0].attributes) == {"alpha", "beta"} and not done.changed


@pytest.mark.parametrize(
    ("equation", "shape", "turned"),
    [
        ("bk,kn->bn", (64, 48), False),
        ("bk,nk->bn", (48, 64), True),
        ("...k,kn->...n", (64, 48), False),
    ],
)
def test_einsum_with_a_matrix_is_a_matmul(parse, after, equation, shape, turned):
    text = f'g (float[b, 64] x) => (float[b, 48] y) {{ y = Einsum<equation="{equation}">(x, w) }}'
    done = after("canonicalize", parse(text, w=draw(*shape)))
    assert done.ops() == (["Transpose"] if turned else []) + ["MatMul"]


@pytest.mark.parametrize("equation", ["bk,kn->nb", "bk,bn->kn", "bk,kn->b", "bk,kk->bk"])
def test_other_einsums_stay(parse, after, equation):
    shapes = {"bk,bn->kn": (5, 48), "bk,kk->bk": (64, 64)}
    text = f'g (float[5, 64] x) => (float[p] y) {{ y = Einsum<equation="{equation}">(x, w) }}'
    if equation != "bk,kn->b":
        text = text.replace("[p]", "[p, q]")
    done = after("canonicalize", parse(text, w=draw(*shapes.get(equation, (64, 48)))))
    assert done.ops() == ["Einsum"] and not done.changed


GRIDS = {
    "per-tensor": ("axis=1", (), "int8", 0),
    "per-channel": ("axis=1", (48,), "int8", 0),
    "first-axis": ("axis=0", (64,), "uint8", 120),
    "from-the-back": ("axis=-1", (48,), "uint8", 128),
    "blocks": ("axis=0, block_size=32", (2, 48), "int8", 3),
    "blocks-of-columns": ("axis=1, block_size=16", (64, 3), "uint8", 7),
    "int4": ("axis=0, block_size=32", (2, 48), "int4", 0),
}


@pytest.mark.parametrize(("attributes", "shape", "kind", "zero"), GRIDS.values(), ids=GRIDS)
def test_a_quantized_constant_is_stored_as_codes(parse, after, attributes, shape, kind, zero):
    text = f"""g (float[m, 64] x) => (float[m, 48] y) {{
      q = QuantizeLinear<{attributes}>(w, s, z) d = DequantizeLinear<{attributes}>(q, s, z) y = MatMul(x, d) }}"""
    dtype = ir.DataType[kind.upper()].numpy()
    scale = np.abs(draw(*shape) * 0.01).astype(np.float32) + np.float32(0.005)
    constants = {"w": draw(64, 48), "s": scale, "z": np.full(shape, zero, dtype)}
    model = parse(text, opset=21, ir_version=10, **constants)
    done = after("canonicalize", model)
    assert done.ops() == ["DequantizeLinear", "MatMul"] and done.changed
    assert done.constants()["w.codes"].dtype == dtype and "w" not in done.constants()
    x = {"x": np.eye(64, dtype=np.float32)}  # y is the dequantized weight itself
    want, got = (runtime.session(m, optimize="off").run(None, x)[0] for m in (model, done.model))
    assert np.array_equal(want, got)


@pytest.mark.parametrize(
    "text",
    [
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        "s2 = Abs(s) q = QuantizeLinear(w, s2, z) d = DequantizeLinear(q, s2, z) y = MatMul(x, d)",
    ],
    ids=["activation", "computed-scale"],
)
def test_other_quantize_linear_stays(parse, after, text):
    model = parse(
        f"g (float[m, 64] x) => (float[m, 64] y) {{ {text} }}",
        **{k: v for k, v in {"w": draw(64, 64)}.items() if "(w" in text},
        s=np.float32(0.02).reshape(()),
        z=np.int8(0).reshape(()),
    )
    assert "QuantizeLinear" in after("canonicalize", model).ops()


OVERRIDABLE = "g (float[m, 64] x, float[64, 48] w) => (float[m, 48] y) { y = MatMul(x, w) }"


def test_initializers_of_old_files_are_no_inputs(parse, after):
    done = after("canonicalize", parse(OVERRIDABLE, opset=8, ir_version=3, w=draw(64, 48)))
    assert [v.name for v in done.model.graph.inputs] == ["x"] and done.model.ir_version >= 4
    assert graph.is_constant(done.model.graph.initializers["w"])


def test_a_default_of_an_input_stays_unless_asked(parse, after):
    model = parse(OVERRIDABLE, w=draw(64, 48))
    kept = after("canonicalize", model)
    assert [v.name for v in kept.model.graph.inputs] == ["x", "w"] and not kept.changed
    frozen = after("canonicalize", model, freeze_inputs=True)
    assert [v.name for v in frozen.model.graph.inputs] == ["x"] and frozen.changed
    assert [d.code for d in frozen.ctx.diagnostics] == ["QG215"] and not kept.ctx.diagnostics


def test_debug_metadata_goes_and_names_stay(parse, after):
    model = parse(
        "g (float[m, 64] x) => (float[m, 48] y) { [fc] y = MatMul(x, w) }", w=draw(64, 48)
    )
    props = model.graph[0].metadata_props
    props["pkg.torch.onnx.stack_trace"] = "File model.py, line 1"
    props["pkg.torch.onnx.name_scopes"] = "['', 'fc']"
    done = after("canonicalize", model)
    assert done.changed
    assert dict(done.model.graph[0].metadata_props) == {"pkg.torch.onnx.name_scopes": "['', 'fc']"}
    assert done.model.graph[0].name == "fc"


def test_dead_things_go_and_outputs_stay(parse, after):
    text = """g (float[m, 64] x) => (float[m, 48] y, float[64, 48] w) {
      u = Relu(x) y = MatMul(x, w) }"""
    done = after("canonicalize", parse(text, w=draw(64, 48), unused=draw(3)))
    assert done.ops() == ["MatMul"] and sorted(done.model.graph.initializers) == ["w"]
    assert [v.name for v in done.model.graph.outputs] == ["y", "w"]


def test_a_constant_expression_that_is_an_output_stays(parse, after):
    text = """g (float[m, 64] x) => (float[m, 48] y, float[64, 48] w) {
      w = Mul(a, b) y = MatMul(x, w) }"""
    done = after("canonicalize", parse(text, a=draw(64, 48), b=draw(48)))
    assert done.ops() == ["Mul", "MatMul"]


def test_activations_and_norms_are_left_as_they_are(parse, after):
    text = """g (float[m, 64] x) => (float[m, 64] y) {
      two = Constant<value=float {2.0}>() e = Constant<value=float {0.00001}>()
      p = Pow(x, two) m = ReduceMean<axes=[-1]>(p) v = Add(m, e) s = Sqrt(v) d = Div(x, s)
      n = Mul(gain, d) g = Sigmoid(n) y = Mul(n, g) }"""
    model = parse(text, gain=draw(64))
    before = printer.text(model)
    done = after("canonicalize", model)
    assert not done.changed and printer.text(done.model) == before


def test_large_constants_are_not_read_before_they_are_needed(parse, after):
    read = []
    big = draw(512, 512)

    class Counted(ir.LazyTensor):
        def numpy(self) -> np.ndarray:
            read.append(self.name)
            return big

    text = "g (float[m, 512] x) => (float[m, 512] y) { w = Mul(a, b) y = MatMul(x, w) }"
    model = parse(text, a=big, b=draw(512))
    value = model.graph.initializers["a"]
    value.const_value = Counted(
        lambda: ir.tensor(big), dtype=ir.DataType.FLOAT, shape=ir.Shape(big.shape), name="a"
    )
    from qgraph import registry
    from qgraph.pipeline import Context
    from qgraph.recipe import Recipe

    ctx = Context(registry.get("target", "ort"), Recipe.default())
    registry.get("pass", "canonicalize")().run(model, ctx)
    assert [n.op_type for n in model.graph] == ["MatMul"] and not read
