"""Operators that move positions."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import files, symmetry
from qgraph.symmetry.axes import reshaped

ALL = {"permute": "permutation", "scale": "diagonal", "rotate": "orthogonal"}


def rows(found, draw, body, reads=8, opset=18, **constants):
    text = f"g (float[m, 6] x) => (float[m, 5] y) {{ h = MatMul(x, A) {body} y = MatMul(r, B) }}"
    return found(text, opset, A=draw(6, 8), B=draw(reads, 5), **constants)


def image(found, draw, body, opset=18, reads=8, **constants):
    text = f"""g (float[n, 3, 6, 6] x) => (float[n, 5, k, k] y) {{
        h = Conv(x, A) {body} y = Conv(r, B) }}"""
    return found(text, opset, A=draw(8, 3, 1, 1), B=draw(5, reads, 1, 1), **constants)


def test_transpose_and_back(found, draw):
    body = "i = Transpose <perm = [1, 0]> (h) r = Transpose <perm = [1, 0]> (i)"
    assert rows(found, draw, body).only == ALL


def test_axes_of_size_one(found, draw):
    body = "i = Unsqueeze(h, one) j = Squeeze(i, one) r = Identity(j)"
    assert rows(found, draw, body, one=np.int64([1])).only == ALL


def test_axes_as_attributes(found, draw):
    body = "i = Unsqueeze <axes = [0]> (h) r = Squeeze <axes = [0]> (i)"
    assert rows(found, draw, body, opset=11).only == ALL


def test_split_into_heads_and_joined(found, draw):
    body = "i = Reshape(h, split) r = Reshape(i, join)"
    result = rows(found, draw, body, split=np.int64([0, 2, 4]), join=np.int64([0, 8]))
    assert result.only == ALL
    assert result.of("rotate")[0].block == 8  # nothing between looks at single heads


def test_flatten_repeats_channels(found, draw):
    text = """g (float[n, 3, 2, 2] x) => (float[n, 5] y) {
        h = Conv(x, A) r = Flatten(h) y = MatMul(r, B) }"""
    result = found(text, A=draw(8, 3, 1, 1), B=draw(32, 5))
    assert result.only == ALL
    assert result.of("rotate")[0].size == 8  # each is read at four pixels


def test_a_reshape_of_unknown_sizes(draw):
    text = """g (float[m, 6] x, int64[2] s) => (float[p, 5] y) {
        h = MatMul(x, A) r = Reshape(h, s) y = MatMul(r, B) }"""
    # Which shape fits cannot be guessed, so that this graph is not run.
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}')
    for name, array in (("A", draw(6, 8)), ("B", draw(8, 5))):
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    assert symmetry.groups(files.load(proto)) == []


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        (("b", "s", 8), ("b", "s", 2, 4), (1, 1, 2, 4)),
        (("b", "s", 8), ("t", 8), (1, 8)),
        (("t", 8), (1, "s", 8), (1, 1, 8)),
        (("b", 8, "s"), ("b", 2, 4, "s"), (1, 2, 4, 1)),
        ((4, "s", 8), (4, "s", 8), (1, 1, 8)),
        ((2, 3, 8), (6, 8), (1, 8)),
        ((2, 3, 8), (48,), (48,)),
        ((None, 8), (None, 4, 2), (1, 4, 2)),
        (("a", "b", 8), ("b", "a", 8), (1, 1, 8)),
        (("a", 8, "b", 3), ("a", 8, "c", 3), (1, 8, 1, 1)),
        ((3, 8), (4, 6), (4, 6)),
        ((3, 8), ("x", 6), None),
    ],
)
def test_how_axes_are_matched(before, after, shape):
    place = before.index(8) if 8 in before else len(before) - 1
    labels = np.arange(8).reshape([-1 if a == place else 1 for a in range(len(before))])
    found = reshaped(labels, before, after)
    assert (None if found is None else found.labels.shape) == shape
    assert found is None or set(found.spans) == {1}


def test_channels_keep_their_order_in_a_reshape():
    labels = np.arange(8).reshape(1, 8, 1)
    np.testing.assert_array_equal(
        reshaped(labels, ("b", 8, 3), ("b", 2, 12)).labels.ravel(), np.repeat(np.arange(8), 3)
    )


@pytest.mark.parametrize("name", ["4*b", "unknown", None])
def test_heads_joined_with_the_batch_and_parted_again(name):
    labels = np.arange(8).reshape(1, 4, 1, 2)
    joined = reshaped(labels, ("b", 4, "s", 2), (name, "s", 2))
    assert joined.spans == (2, 1, 1)
    np.testing.assert_array_equal(joined.labels, labels)
    parted = reshaped(joined.labels, joined.dims, ("b", 4, "s", 2))
    assert parted.spans == (1, 1, 1, 1)
    np.testing.assert_array_equal(parted.labels, labels)


def test_heads_parted_from_a_batch_that_knows_nothing_of_them():
    """[4 batch, 8] -> [batch, 32]: every fourth of the row is another row's."""
    found = reshaped(np.arange(8).reshape(1, 8), ("4*b", 8), ("b", 32))
    np.testing.assert_array_equal(found.labels, np.tile(np.arange(8), 4)[None])


def test_a_batch_that_does_not_divide():
    assert reshaped(np.arange(6).reshape(1, 6), ("b", 6), ("c", 4)) is None


@pytest.mark.parametrize("opset", [13, 18])
def test_split_makes_groups(found, draw, opset):
    count = ", num_outputs = 2" if opset == 18 else ""
    text = f"""g (float[m, 6] x) => (float[m, 5] y) {{
        h = MatMul(x, A) a, b = Split <axis = -1{count}> (h) c = Sigmoid(a)
        p = MatMul(b, B) q = MatMul(c, C) y = Add(p, q) }}"""
    result = found(text, opset, A=draw(6, 8), B=draw(4, 5), C=draw(4, 5))
    assert [(g.legal, g.size) for g in result.of("scale")] == [("", 4), ("diagonal", 4)]
    assert [(g.legal, g.size) for g in result.of("rotate")] == [("", 4), ("orthogonal", 4)]


def test_slices_make_groups(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        h = MatMul(x, A) a = Slice(h, zero, three, one) b = Slice(h, three, end, one)
        p = MatMul(a, B) q = MatMul(b, C) y = Add(p, q) }"""
    result = found(text, A=draw(6, 8), B=draw(3, 5), C=draw(5, 5), zero=np.int64([0]),
                   three=np.int64([3]), end=np.int64([2**62]), one=np.int64([1]))  # fmt: skip
    assert [(g.legal, g.size) for g in result.of("rotate")] == [
        ("orthogonal", 3),
        ("orthogonal", 5),
    ]


def test_a_slice_with_computed_bounds(found, draw):
    text = """g (float[m, 6] x, int64[1] s) => (float[m, 5] y) {
        h = MatMul(x, A) z = Slice(h, s, end, zero) y = MatMul(z, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5), zero=np.int64([0]), end=np.int64([2**62]))
    assert result.only == ALL  # rows are cut, not channels


def test_a_reversed_slice(found, draw):
    body = "r = Slice(h, last, end, one, back)"
    constants = {"last": [-1], "end": [-(2**62)], "one": [1], "back": [-1]}
    result = rows(found, draw, body, **{k: np.int64(v) for k, v in constants.items()})
    assert result.only == ALL


def test_concat_of_channels(found, draw):
    text = """g (float[m, 6] x) => (float[m, 5] y) {
        a = MatMul(x, A) b = MatMul(x, C) r = Concat <axis = -1> (a, b) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), C=draw(6, 4), B=draw(12, 5))
    assert [(g.legal, g.size) for g in result.of("rotate")] == [
        ("orthogonal", 8),
        ("orthogonal", 4),
    ]
    assert all(len(g.readers) == 1 for g in result.groups)


def test_concat_with_an_input(found, draw):
    text = """g (float[m, 6] x, float[m, 2] z) => (float[m, 5] y) {
        a = MatMul(x, A) r = Concat <axis = 1> (z, a) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(10, 5))
    assert result.only == ALL


def test_concat_of_rows_with_an_input(found, draw):
    text = """g (float[m, 6] x, float[k, 8] past) => (float[p, 5] y) {
        a = MatMul(x, A) r = Concat <axis = 0> (past, a) y = MatMul(r, B) }"""
    result = found(text, A=draw(6, 8), B=draw(8, 5))
    assert result.only == {"permute": "", "scale": "", "rotate": ""}
    assert "'past', which is not transformed" in result.reason("scale")


def test_tile_and_expand(found, draw):
    body = "i = Unsqueeze(h, one) e = Expand(i, shape) r = ReduceMean <keepdims = 0> (e, one)"
    assert rows(found, draw, body, one=np.int64([1]), shape=np.int64([1, 3, 1])).only == ALL
    body = "r = Tile(h, times)"
    result = rows(found, draw, body, reads=16, times=np.int64([1, 2]))
    assert result.only == ALL
    assert result.of("rotate")[0].size == 8


def test_padding_with_zeros_of_pixels(found, draw):
    body = "r = Pad(h, pads)"
    assert image(found, draw, body, pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1])).only == ALL


def test_padding_with_another_number(found, draw):
    body = "r = Pad(h, pads, v)"
    result = image(found, draw, body, pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1]), v=np.float32(2))
    assert result.only == {"permute": "permutation", "scale": "", "rotate": "orthogonal"}
    assert result.of("rotate")[0].keeps_mean


def test_padding_of_channels(found, draw):
    body = "r = Pad(h, pads)"
    result = image(found, draw, body, reads=12, pads=np.int64([0, 2, 0, 0, 0, 2, 0, 0]))
    assert result.only == ALL
    assert result.of("rotate")[0].size == 8


@pytest.mark.parametrize("op", ["MaxPool <kernel_shape = [2, 2]>", "GlobalMaxPool"])
def test_max_pools(found, draw, op):
    result = image(found, draw, f"r = {op} (h)")
    assert result.only == {"permute": "permutation", "scale": "positive", "rotate": ""}


@pytest.mark.parametrize("op", ["AveragePool <kernel_shape = [2, 2]>", "GlobalAveragePool"])
def test_average_pools(found, draw, op):
    assert image(found, draw, f"r = {op} (h)").only == ALL


def test_resize(found, draw):
    body = 'r = Resize <mode = "linear"> (h, , scales)'
    assert image(found, draw, body, scales=np.float32([1, 1, 2, 2])).only == ALL
