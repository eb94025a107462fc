"""Operators that hold weights."""

import numpy as np
import pytest

ALL = {"permute": "permutation", "scale": "diagonal", "rotate": "orthogonal"}
NOTHING = {"permute": "", "scale": "", "rotate": ""}


def test_matmul_writes_and_reads(found, draw):
    text = "g (float[m, 6] x) => (float[m, 5] y) { h = MatMul(x, A) y = MatMul(h, B) }"
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == ALL
    group = result.of("rotate")[0]
    assert (group.name, group.size, group.block) == ("h", 8, 8)
    assert [m.value.name for m in group.writers] == ["A"]
    assert [m.value.name for m in group.readers] == ["B"]


def test_transposed_weights(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        a = Transpose(A) b = Transpose <perm = [1, 0]> (B) h = MatMul(x, a) y = MatMul(h, b) }"""
    assert found(text, A=draw(8, 6), B=draw(5, 8)).only == ALL


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_bias(found, draw, transposed):
    text = f"""g (float[m, 6] x) => (float[m, 5] y) {{
        h = Gemm <alpha = 0.5, beta = 2.0, transB = {transposed}> (x, A, b)
        y = Gemm <transB = {transposed}> (h, B, c) }}"""
    a, b = draw(6, 8), draw(8, 5)
    result = found(text, A=a.T.copy() if transposed else a, B=b.T.copy() if transposed else b,
                   b=draw(8), c=draw(5))  # fmt: skip
    assert result.only == ALL
    assert [len(g.riders) for g in result.groups] == [1, 1, 1]


def test_gemm_with_one_bias_for_all(found, draw):
    text = "g (float[m, 6] x) => (float[m, 5] y) { h = Gemm(x, A, b) y = MatMul(h, B) }"
    assert found(text, A=draw(6, 8), B=draw(8, 5), b=np.float32([0.7])).only == ALL


def test_gemm_that_transposes_its_input(found, draw):
    text = "g (float[8, 6] x) => (float[8, 5] y) { h = MatMul(x, A) y = Gemm <transA = 1> (h, B) }"
    assert found(text, A=draw(6, 8), B=draw(8, 5)).groups == []


def test_several_readers(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y, float[m, 5] z) {
        h = MatMul(x, A) y = MatMul(h, B) z = MatMul(h, C) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5), C=draw(8, 5))
    assert result.only == ALL
    assert len(result.of("scale")[0].readers) == 2


def test_weights_of_batched_products_share_channels(found, draw):
    text = "g (float[3, m, 6] x) => (float[3, m, 5] y) { h = MatMul(x, A) y = MatMul(h, B) }"
    assert found(text, A=draw(3, 6, 8), B=draw(3, 8, 5)).only == ALL


def test_a_product_along_another_axis_passes(found, draw):
    text = """g (float[2, 7, 6] x) => (float[2, 7, 5] y) {
        h = MatMul(x, A) t = Transpose <perm = [0, 2, 1]> (h) u = MatMul(t, M)
        v = Transpose <perm = [0, 2, 1]> (u) y = MatMul(v, B) }"""
    result = found(text, A=draw(6, 8), M=draw(7, 7), B=draw(8, 5))
    assert {g.kind: g.legal for g in result.groups if g.size == 8} == ALL


def test_a_weight_on_the_left(found, draw):
    text = """g (float[2, 7, 6] x) => (float[2, 7, 5] y) {
        h = MatMul(x, A) u = MatMul(M, h) y = MatMul(u, B) }"""
    assert found(text, A=draw(6, 8), M=draw(7, 7), B=draw(8, 5)).only == ALL


def test_computed_weights_end_it(found, draw):
    text = """g (float[m, 6] x, float[8, 5] w) => (float[m, 5] y) {
        h = MatMul(x, A) y = MatMul(h, w) }"""
    assert found(text, A=draw(6, 8)).groups == []


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_of_any_kernel(found, draw, kernel):
    pad = kernel // 2
    text = f"""g (float[n, 3, 6, 6] x) => (float[n, 5, 6, 6] y) {{
        h = Conv <pads = [{pad}, {pad}, {pad}, {pad}]> (x, A, b)
        y = Conv <pads = [{pad}, {pad}, {pad}, {pad}]> (h, B) }}"""
    result = found(text, A=draw(8, 3, kernel, kernel), B=draw(5, 8, kernel, kernel), b=draw(8))
    assert result.only == ALL


def test_depthwise_conv(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 4, 4] y) {
        h = Conv(x, A) i = Conv <group = 8> (h, D, d) y = Conv(i, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), D=draw(8, 1, 3, 3), d=draw(8), B=draw(5, 8, 1, 1))
    assert result.legal("scale") == ["diagonal", "diagonal"]
    assert result.legal("permute") == ["permutation"]
    assert result.legal("rotate") == [""]
    assert result.reason("rotate") == "Conv: a depthwise convolution mixes no channels"


def test_depthwise_conv_with_two_outputs_per_channel(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 4, 4] y) {
        h = Conv(x, A) i = Conv <group = 4> (h, D) y = Conv(i, B) }"""
    result = found(text, A=draw(4, 3, 1, 1), D=draw(8, 1, 3, 3), B=draw(5, 8, 1, 1))
    assert [(g.legal, g.size) for g in result.of("scale")] == [("diagonal", 4), ("diagonal", 8)]
    assert result.legal("permute") == ["permutation"]


def test_depthwise_conv_of_an_input(found, draw):
    text = """g (float[n, 8, 6, 6] x) => (float[n, 5, 4, 4] y) {
        i = Conv <group = 8> (x, D) y = Conv(i, B) }"""
    result = found(text, D=draw(8, 1, 3, 3), B=draw(5, 8, 1, 1))
    assert result.legal("scale") == ["diagonal"]
    assert not any(result.legal("permute") + result.legal("rotate"))


def test_grouped_conv_mixes_within_groups(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 4, 4] y) {
        h = Conv(x, A) i = Conv <group = 2> (h, G) y = Conv(i, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), G=draw(6, 4, 3, 3), B=draw(5, 6, 1, 1))
    assert [g.blocks.shape for g in result.of("rotate")] == [(2, 4), (2, 3)]
    assert result.legal("rotate") == ["orthogonal", "orthogonal"]
    assert [g.blocks.shape for g in result.of("scale")] == [(1, 8), (1, 6)]
    assert result.legal("permute") == ["permutation", "permutation"]


def test_conv_transpose(found, draw):
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 12, 12] y) {
        h = ConvTranspose <strides = [2, 2]> (x, A, b) y = Conv(h, B) }"""
    assert found(text, A=draw(3, 8, 2, 2), b=draw(8), B=draw(5, 8, 1, 1)).only == ALL
    text = """g (float[n, 3, 6, 6] x) => (float[n, 5, 12, 12] y) {
        h = Conv(x, A) y = ConvTranspose <strides = [2, 2]> (h, B) }"""
    assert found(text, A=draw(8, 3, 1, 1), B=draw(8, 5, 2, 2)).only == ALL


def test_embedding(found, draw):
    text = "g (int64[m] x) => (float[m, 5] y) { h = Gather(T, x) y = MatMul(h, B) }"
    result = found(text, T=draw(96, 8), B=draw(8, 5))
    assert result.only == ALL
    assert [m.value.name for m in result.of("rotate")[0].writers] == ["T"]


def test_positions_cut_from_a_table(found, draw):
    text = """g (int64[7] x) => (float[7, 5] y) {
        t = Gather(T, x) p = Slice(P, s, e, a) h = Add(t, p) y = MatMul(h, B) }"""
    result = found(text, T=draw(96, 8), P=draw(20, 8), B=draw(8, 5), s=np.int64([0]),
                   e=np.int64([7]), a=np.int64([0]))  # fmt: skip
    assert result.only == ALL
    assert sorted(m.value.name for m in result.of("permute")[0].writers) == ["P", "T"]


def test_tied_table_and_head(found, draw):
    text = """g (int64[m] x) => (float[m, 96] y) {
        h = Gather(T, x) t = Transpose(T) y = MatMul(h, t) }"""
    result = found(text, T=draw(96, 8))
    assert result.only == ALL


def test_a_weight_used_twice_is_transformed_once(found, draw):
    text = """g (float[m, 8] x) => (float[m, 5] y) {
        h = MatMul(x, A) i = Relu(h) j = MatMul(i, A) k = Relu(j) y = MatMul(k, B) }"""
    result = found(text, A=draw(8, 8), B=draw(8, 5))
    # Its input and output channels are two sets; the first input stays, so only the output of the second use is free.
    assert [g.legal for g in result.of("permute")] == ["permutation"]
    assert [len(g.writers) for g in result.of("permute")] == [2]


def test_channels_picked_by_constant_indices(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) i = Gather <axis = 1> (h, p) y = MatMul(i, B) }"""
    result = found(text, A=draw(6, 8), B=draw(3, 5), p=np.int64([5, 0, 2]))
    assert {g.kind: (g.legal, g.size) for g in result.groups} == {
        "permute": ("permutation", 3),
        "scale": ("diagonal", 3),
        "rotate": ("orthogonal", 3),
    }


def test_channels_picked_by_computed_indices(found, draw):
    text = """g (float[m, 6] x, int64[3] p) => (float[m, 3] y) {
        h = MatMul(x, A) i = Gather <axis = 1> (h, p) j = MatMul(h, B) y = Add(i, j) }"""
    result = found(text, A=draw(6, 96), B=draw(96, 3))
    assert result.only == NOTHING
    assert result.reason("scale") == "Gather: takes channels by an index that is not known"


def test_rows_picked_by_computed_indices(found, draw):
    text = """g (float[96, 6] x, int64[k] p) => (float[k, 5] y) {
        h = MatMul(x, A) i = Gather(h, p) y = MatMul(i, B) }"""
    assert found(text, A=draw(6, 8), B=draw(8, 5)).only == ALL
