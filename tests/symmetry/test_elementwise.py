"""Operators that act on every position by itself."""

import numpy as np
import pytest

PERMUTE_ONLY = {"permute": "permutation", "scale": "", "rotate": ""}
POSITIVE = {"permute": "permutation", "scale": "positive", "rotate": ""}
ALL = {"permute": "permutation", "scale": "diagonal", "rotate": "orthogonal"}


def between(found, draw, body, opset=18, domain="", **constants):
    """Groups of x A → body(h) = r → r B."""
    text = f"g (float[m, 6] x) => (float[m, 5] y) {{ h = MatMul(x, A) {body} y = MatMul(r, B) }}"
    return found(text, opset, domain, A=draw(6, 8), B=draw(8, 5), **constants)


@pytest.mark.parametrize("op", ["Identity", "Neg"])
def test_linear(found, draw, op):
    assert between(found, draw, f"r = {op}(h)").only == ALL


@pytest.mark.parametrize("op", ["Relu", "Abs", "LeakyRelu <alpha = 0.1>"])
def test_homogeneous(found, draw, op):
    result = between(found, draw, f"r = {op}(h)")
    assert result.only == POSITIVE
    name = op.split()[0]
    assert result.reason("rotate").startswith(f"{name}: {name} keeps only positive factors")


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "Exp", "Erf", "HardSwish", "Softplus", "Elu"])
def test_nonlinear(found, draw, op):
    result = between(found, draw, f"r = {op}(h)")
    assert result.only == PERMUTE_ONLY
    assert result.reason("scale") == result.reason("rotate") == f"{op}: {op} is not linear"


def test_gelu(found, draw):
    assert between(found, draw, "r = Gelu(h)", opset=20).only == PERMUTE_ONLY


def test_cast_between_floats(found, draw):
    body = "i = Cast <to = 11> (h) r = Cast <to = 1> (i)"
    assert between(found, draw, body).only == ALL


def test_cast_to_integers(found, draw):
    body = "i = Cast <to = 7> (h) r = Cast <to = 1> (i)"
    text = f"g (float[m, 6] x) => (float[m, 5] y) {{ h = MatMul(x, A) {body} y = MatMul(r, B) }}"
    assert found(text, A=draw(6, 8), B=draw(8, 5)).groups == []


def test_bias_rides_along(found, draw):
    result = between(found, draw, "r = Add(h, b)", b=draw(8))
    assert result.only == ALL
    assert [len(g.riders) for g in result.groups] == [1, 1, 1]


def test_one_number_is_expanded(found, draw):
    result = between(found, draw, "r = Sub(h, b)", b=np.float32(0.7))
    assert result.only == ALL


def test_adding_zero_is_nothing(found, draw):
    result = between(found, draw, "r = Add(h, b)", b=np.float32(0))
    assert [len(g.riders) for g in result.groups] == [0, 0, 0]


def test_residual_ties_writers(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) i = MatMul(x, C) r = Add(h, i) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), C=draw(6, 8), B=draw(8, 5))
    assert result.only == ALL
    assert [len(g.writers) for g in result.groups] == [2, 2, 2]


def test_adding_an_input_forbids_everything(found, draw):
    text = """g (float[m, 6] x, float[m, 8] z) => (float[m, 5] y) {
        h = MatMul(x, A) r = Add(h, z) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "", "scale": "", "rotate": ""}
    assert result.reason("scale") == "Add: adds 'z', which is not transformed"


def test_adding_the_same_to_all_channels(found, draw):
    text = """g (float[m, 6] x, float[m, 1] z) => (float[m, 5] y) {
        h = MatMul(x, A) r = Add(h, z) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "permutation", "scale": "", "rotate": "orthogonal"}
    assert result.of("rotate")[0].keeps_mean


def test_where_with_one_condition_per_row(found, draw):
    text = """g (float[m, 6] x, bool[m, 1] k) => (float[m, 5] y) {
        h = MatMul(x, A) i = MatMul(x, C) r = Where(k, h, i) y = MatMul(r, B) }"""
    assert found(text, A=draw(6, 8), C=draw(6, 8), B=draw(8, 5)).only == ALL


def test_where_by_channel(found, draw):
    text = """g (float[m, 6] x, bool[m, 8] k) => (float[m, 5] y) {
        h = MatMul(x, A) i = MatMul(x, C) r = Where(k, h, i) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), C=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "", "scale": "diagonal", "rotate": ""}
    assert result.reason("rotate") == "Where: its condition may differ between channels"


def test_clip_at_zero_is_relu(found, draw):
    result = between(found, draw, "r = Clip(h, z)", z=np.float32(0))
    assert result.only == POSITIVE
    assert result.of("scale")[0].bounds == ()


def test_clip_gets_a_bound_per_channel(found, draw):
    body = "r = Clip(h, z, t)"
    result = between(found, draw, body, z=np.float32(0), t=np.float32(1.5))
    assert result.only == POSITIVE
    assert len(result.of("scale")[0].bounds) == 1


def test_clip_of_old_opsets(found, draw):
    assert between(found, draw, "r = Clip <min = -0.5, max = 0.5> (h)", opset=9).only == POSITIVE


def test_clip_with_computed_bounds(found, draw):
    text = """g (float[m, 6] x, float t) => (float[m, 5] y) {
        h = MatMul(x, A) r = Clip(h, , t) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == PERMUTE_ONLY
    assert result.reason("scale") == "Clip: its bounds are no constants"


def test_max_of_two(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) i = MatMul(x, C) r = Max(h, i) y = MatMul(r, B) }"""
    assert found(text, A=draw(6, 8), C=draw(6, 8), B=draw(8, 5)).only == POSITIVE


def test_max_with_a_number(found, draw):
    assert between(found, draw, "r = Max(h, t)", t=np.float32(0)).only == POSITIVE
    assert between(found, draw, "r = Min(h, t)", t=np.float32(1)).only == PERMUTE_ONLY


def test_max_with_a_number_per_channel(found, draw):
    assert between(found, draw, "r = Max(h, t)", t=draw(8)).only == POSITIVE


def test_prelu(found, draw):
    result = between(found, draw, "r = PRelu(h, t)", t=np.linspace(0.1, 0.9, 8, dtype=np.float32))
    assert result.only == POSITIVE


def test_multiplying_by_one_number(found, draw):
    assert between(found, draw, "r = Mul(h, t)", t=np.float32(0.3)).only == ALL
    assert between(found, draw, "r = Div(h, t)", t=np.float32(0.3)).only == ALL


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_a_constant_vector_ends_one_scale_and_begins_another(found, draw, op):
    result = between(found, draw, f"r = {op}(h, t)", t=draw(8))
    assert result.legal("scale") == ["diagonal", "diagonal"]
    assert result.legal("permute") == ["permutation"]


def test_a_gain_moves_into_its_readers_before_a_rotation(found, draw):
    result = between(found, draw, "r = Mul(h, t)", t=draw(8))
    (group,) = result.of("rotate")
    assert group.legal == "orthogonal" and len(group.gains) == 1


def test_a_gain_of_zero_cannot_move(found, draw):
    gain = draw(8)
    gain[3] = 0
    result = between(found, draw, "r = Mul(h, t)", t=gain)
    assert result.reason("rotate") == "Mul: its gain is zero or infinite in some channel"


def test_a_gain_before_a_nonlinearity_cannot_move(found, draw):
    result = between(found, draw, "i = Mul(h, t) r = Tanh(i)", t=draw(8))
    assert result.legal("rotate") == [""]


def test_gate_and_up(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) s = Sigmoid(h) g = Mul(h, s) u = MatMul(x, C) r = Mul(g, u)
        y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), C=draw(6, 8), B=draw(8, 5))
    (scale,) = [g for g in result.of("scale") if g.legal]
    assert [m.value.name for m in scale.writers] == ["C"]
    (permute,) = result.of("permute")
    assert sorted(m.value.name for m in permute.writers) == ["A", "C"]
    assert result.legal("rotate") == [""]


def test_a_factor_per_row_passes_everything(found, draw):
    text = """g (float[m, 6] x, float[m, 1] z) => (float[m, 5] y) {
        h = MatMul(x, A) i = Mul(z, h) r = Div(i, z) y = MatMul(r, B) }"""
    assert found(text, A=draw(6, 8), B=draw(8, 5)).only == ALL


def test_a_factor_per_channel_of_an_input(found, draw):
    text = """g (float[m, 6] x, float[m, 8] z) => (float[m, 5] y) {
        h = MatMul(x, A) r = Mul(h, z) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "", "scale": "diagonal", "rotate": ""}
    assert result.reason("rotate") == "Mul: multiplies by 'z', which differs between channels"


def test_a_denominator_stays(found, draw):
    text = """g (float[m, 6] x, float[m, 8] z) => (float[m, 5] y) {
        h = MatMul(x, A) e = Exp(h) r = Div(z, e) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert all(not g.legal for g in result.groups)


def test_softmax_over_channels(found, draw):
    assert between(found, draw, "r = Softmax <axis = -1> (h)").only == PERMUTE_ONLY


def test_an_unknown_operator(found, draw):
    result = between(found, draw, "i = MatMul(h, C) j = CumSum(h, a) r = Add(i, j)",
                     C=draw(8, 8), a=np.int64(1))  # fmt: skip
    assert not any(g.legal for g in result.of("permute"))
    assert result.of("permute")[0].reason == "CumSum is not known to keep channels apart"


def test_outputs_of_the_model_stay(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y, float[m, 8] h) {
        h = MatMul(x, A) y = MatMul(h, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "", "scale": "", "rotate": ""}
    assert result.reason("permute") == "MatMul: 'h' is an output of the model"


def experts(found, draw, op):
    """x A scaled by (or added to) one channel of x R: a router's share."""
    text = f"""g (float[m, 6] x) => (float[m, 5] y) {{
        h = MatMul(x, A) r = MatMul(x, R) s = Softmax(r) one = Slice(s, zero, end, last)
        p = {op}(h, one) y = MatMul(p, B) }}"""
    return found(text, A=draw(6, 8), R=draw(6, 3), B=draw(8, 5), zero=np.int64([0]),
                 end=np.int64([1]), last=np.int64([-1]))  # fmt: skip


def test_one_channel_times_all(found, draw):
    result = experts(found, draw, "Mul")
    for kind, legal in (
        ("permute", "permutation"),
        ("scale", "diagonal"),
        ("rotate", "orthogonal"),
    ):
        (group,) = [g for g in result.of(kind) if g.size == 8]
        assert (group.legal, group.block) == (legal, 8)


def test_one_channel_added_to_all(found, draw):
    result = experts(found, draw, "Add")
    (rotate,) = [g for g in result.of("rotate") if g.size == 8]
    assert rotate.legal == "orthogonal" and rotate.keeps_mean
    (scale,) = [g for g in result.of("scale") if g.size == 8]
    assert (scale.legal, scale.reason) == ("", "adds another activation, the same to all channels")
    (permute,) = [g for g in result.of("permute") if g.size == 8]
    assert permute.legal == "permutation"


def test_a_class_token_is_transformed(found, draw):
    """A constant that is copied to every row of the batch and put in front."""
    text = """g (float[b, 7, 6] x) => (float[b, 8, 5] y) {
        h = MatMul(x, A) n = Shape <start = 0, end = 1> (x) s = Concat <axis = 0> (n, rest)
        t = Expand(token, s) c = Concat <axis = 1> (t, h) y = MatMul(c, B) }"""
    constants = {"A": draw(6, 8), "B": draw(8, 5), "token": draw(1, 1, 8), "rest": [1, 8]}
    result = found(text, **constants)
    assert result.only == {"permute": "permutation", "scale": "diagonal", "rotate": "orthogonal"}
    # Where something else takes the copies, they have to stay as they are.
    text = text.replace("y = ", "z = Sigmoid(t) y = ").replace(
        "(float[b, 8, 5] y)", "(float[b, 8, 5] y, float[b, 1, 8] z)"
    )
    result = found(text, **constants)
    assert result.legal("rotate") == [""]
    assert result.reason("rotate") == "Concat: adds 't', which is not transformed"
