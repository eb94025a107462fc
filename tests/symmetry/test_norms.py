"""Norms and reductions, as operators and in pieces."""

import numpy as np
import pytest

TWO, EPS, LAST = np.float32(2), np.float32(1e-5), np.int64([-1])
RMS = "q = Pow(h, two) m = ReduceMean <keepdims = 1> (q, last) e = Add(m, eps) s = Sqrt(e)"
LAYER = """mu = ReduceMean <keepdims = 1> (h, last) c = Sub(h, mu) q = Pow(c, two)
    m = ReduceMean <keepdims = 1> (q, last) e = Add(m, eps) s = Sqrt(e) n = Div(c, s)"""


def inside(found, draw, body, opset=18, domain="", **constants):
    text = f"""g (int64[m] x) => (float[m, 5] y) {{
        h = Gather(T, x) {body} y = MatMul(r, B) }}"""
    return found(text, opset, domain, T=draw(96, 8), B=draw(8, 5), **constants)


def pieces(found, draw, body, **constants):
    return inside(found, draw, body, two=TWO, eps=EPS, last=LAST, **constants)


def expect(result, *, mean, scales=("diagonal",), gains=1):
    """A norm: rotations and permutations pass it, the scale ends at it and another begins at its gain."""
    (permute,) = result.of("permute")
    (rotate,) = result.of("rotate")
    assert permute.legal == "permutation"
    assert (rotate.legal, rotate.keeps_mean, len(rotate.gains)) == ("orthogonal", mean, gains)
    assert [s for s in result.legal("scale") if s] == list(scales)


@pytest.mark.parametrize("end", ["n = Div(h, s)", "i = Reciprocal(s) n = Mul(h, i)"])
def test_rms_norm_in_pieces(found, draw, end):
    expect(pieces(found, draw, f"{RMS} {end} r = Mul(g, n)", g=draw(8)), mean=False)


def test_rms_norm_by_squares(found, draw):
    body = f"{RMS.replace('Pow(h, two)', 'Mul(h, h)')} n = Div(h, s) r = Mul(n, g)"
    expect(pieces(found, draw, body, g=draw(8)), mean=False)


def test_rms_norm_without_gain(found, draw):
    expect(pieces(found, draw, f"{RMS} r = Div(h, s)"), mean=False, scales=(), gains=0)


def test_rms_norm_with_gain_of_ones(found, draw):
    body = f"{RMS} n = Div(h, s) r = Mul(n, g)"
    expect(pieces(found, draw, body, g=np.full(8, 1.5, np.float32)), mean=False, gains=0)


def test_rms_norm_operator(found, draw):
    body = "r = RMSNormalization <axis = -1> (h, g)"
    expect(inside(found, draw, body, opset=23, g=draw(8)), mean=False)


def test_simplified_layer_norm(found, draw):
    body = "r = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (h, g)"
    expect(inside(found, draw, body, g=draw(8)), mean=False)


def test_layer_norm(found, draw):
    body = "r = LayerNormalization <axis = -1> (h, g, b)"
    result = inside(found, draw, body, g=draw(8), b=draw(8))
    expect(result, mean=True)
    assert result.reason("rotate") == "LayerNormalization: subtracts the mean of the channels"


def test_layer_norm_in_pieces(found, draw):
    body = f"{LAYER} o = Mul(n, g) r = Add(o, b)"
    expect(pieces(found, draw, body, g=draw(8), b=draw(8)), mean=True)


def test_layer_norm_over_other_axes(found, draw):
    text = """g (float[2, 7, 6] x) => (float[2, 7, 5] y) {
        h = MatMul(x, A) n = LayerNormalization <axis = 1> (h, g) y = MatMul(n, B) }"""
    result = found(text, A=draw(6, 8), g=draw(7, 8), B=draw(8, 5))
    assert not any(g.legal for g in result.groups)


def test_skip_layer_norm_gives_the_sum_too(found, draw):
    body = """i = MatMul(h, A)
        n, d, v, t = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (h, i, g, b, c)
        j = MatMul(n, C) r = Add(t, j)"""
    result = inside(found, draw, body, domain="com.microsoft", A=draw(8, 8), C=draw(8, 8),
                    g=draw(8), b=draw(8), c=draw(8))  # fmt: skip
    expect(result, mean=True)


def test_skip_rms_norm(found, draw):
    body = """i = MatMul(h, A)
        n, d, v, t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (h, i, g)
        j = MatMul(n, C) r = Add(t, j)"""
    result = inside(found, draw, body, domain="com.microsoft", A=draw(8, 8), C=draw(8, 8),
                    g=draw(8))  # fmt: skip
    expect(result, mean=False)


def test_two_norms_in_a_row(found, draw):
    """The first gain cannot move past the second norm, as in a post-norm encoder."""
    body = """i = LayerNormalization <axis = -1> (h, g, b) j = MatMul(i, A) k = Add(i, j)
        r = LayerNormalization <axis = -1> (k, f, b)"""
    result = inside(found, draw, body, A=draw(8, 8), g=draw(8), b=draw(8), f=draw(8))
    (rotate,) = result.of("rotate")
    assert rotate.legal == ""
    assert "cannot move into its readers: normalises over the channels" in rotate.reason


def test_norm_of_every_head(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) i = Reshape(h, split) n = RMSNormalization <axis = -1> (i, g)
        j = Reshape(n, join) y = MatMul(j, B) }"""
    result = found(text, 23, A=draw(6, 8), B=draw(8, 5), g=draw(4), split=np.int64([0, 2, 4]),
                   join=np.int64([0, 8]))  # fmt: skip
    (rotate,) = result.of("rotate")
    # The gain is one for both heads, so they rotate alike: once the gain is gone each could have its own.
    assert rotate.legal == "orthogonal"
    assert "diagonal" in result.legal("scale")


def test_l2_norm(found, draw):
    body = "s = ReduceL2 <keepdims = 1> (h, last) r = Div(h, s)"
    expect(pieces(found, draw, body), mean=False, scales=(), gains=0)
    expect(inside(found, draw, "r = LpNormalization <axis = -1, p = 2> (h)"), mean=False, scales=(),
           gains=0)  # fmt: skip


def test_l1_norm(found, draw):
    result = inside(found, draw, "r = LpNormalization <axis = -1, p = 1> (h)")
    assert result.reason("rotate") == "LpNormalization: is no L2 norm"


def test_the_largest_channel(found, draw):
    result = pieces(found, draw, "s = ReduceMax <keepdims = 1> (h, last) r = Sub(h, s)")
    assert result.legal("permute") == ["permutation"]
    assert result.reason("rotate") == "ReduceMax: ReduceMax runs over the channels"


def test_means_over_other_axes_pass(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5] y) {
        h = Conv(x, A) p = ReduceMean <keepdims = 0> (h, axes) y = MatMul(p, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), B=draw(8, 5), axes=np.int64([2, 3]))
    assert result.only == {"permute": "permutation", "scale": "diagonal", "rotate": "orthogonal"}


def test_means_of_squares_over_other_axes(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5] y) {
        h = Conv(x, A) q = Pow(h, two) p = ReduceMean <keepdims = 0> (q, axes) y = MatMul(p, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), B=draw(8, 5), axes=np.int64([2, 3]), two=TWO)
    assert result.only == {"permute": "permutation", "scale": "", "rotate": ""}


def test_squares_that_reach_another_operator(found, draw):
    result = pieces(found, draw, "q = Pow(h, two) r = Add(q, h)")
    assert result.legal("rotate") == [""]
    assert result.reason("rotate") == "Add: takes squares of channels"


def test_batch_norm_that_was_not_folded(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 6, 6] y) {
        h = Conv(x, A) i = BatchNormalization(h, g, b, mu, v) r = Relu(i) y = Conv(r, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), B=draw(5, 8, 1, 1), g=draw(8), b=draw(8), mu=draw(8),
                   v=np.abs(draw(8)) + np.float32(0.1))  # fmt: skip
    assert result.legal("scale") == ["diagonal", "positive"]
    assert result.legal("permute") == ["permutation"]
    assert result.legal("rotate") == [""]
