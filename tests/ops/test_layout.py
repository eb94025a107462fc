"""The packed layouts, byte by byte."""

import numpy as np
import pytest

from qgraph.ops import layout

SIZES = [(1, 1), (16, 8), (17, 9), (5, 100), (40, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [0, 16, 32])
def test_int4_bytes_are_where_the_layout_says(size, group):
    n, k = size
    codes = np.random.default_rng(0).integers(0, 16, size)
    packed = layout.pack_int4(codes, group)
    assert packed.shape == (-(-n // 16), layout.int4_columns(k, group) // 8, 64)
    for row in range(n):
        for column in range(k):
            step, place = divmod(column, 8)
            byte = int(packed[row // 16, step, 4 * (row % 16) + place % 4])
            assert (byte >> 4 if place >= 4 else byte & 15) == codes[row, column]
    np.testing.assert_array_equal(layout.unpack_int4(packed, n, k), codes)
    padding = layout.unpack_int4(packed, packed.shape[0] * 16, packed.shape[1] * 8)
    assert (padding[n:] == 8).all()
    assert (padding[:, k:] == 8).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [0, 16, 32])
def test_int3_bytes_are_where_the_layout_says(size, group):
    n, k = size
    codes = np.random.default_rng(0).integers(0, 8, size)
    packed = layout.pack_int3(codes, group)
    columns = layout.padded(layout.int4_columns(k, group), 16)
    assert packed.shape == (-(-n // 16), columns // 16, 96)
    for row in range(n):
        for column in range(k):
            step, place = divmod(column, 16)
            tile, lane, f = packed[row // 16, step], 4 * (row % 16) + place % 4, place // 4
            low = int(tile[lane]) >> 2 * f & 3
            high = int(tile[64 + lane % 32]) >> (f + 4 * (lane >= 32)) & 1
            assert low + 4 * high == codes[row, column]
    np.testing.assert_array_equal(layout.unpack_int3(packed, n, k), codes)
    padding = layout.unpack_int3(packed, packed.shape[0] * 16, packed.shape[1] * 16)
    assert (padding[n:] == 4).all()
    assert (padding[:, k:] == 4).all()


@pytest.mark.parametrize("size", SIZES)
def test_ternary_bytes_are_where_the_layout_says(size):
    n, k = size
    values = np.random.default_rng(0).integers(-1, 2, size)
    packed = layout.pack_ternary(values)
    assert packed.shape == (-(-n // 16), -(-k // 16), 64)
    for row in range(n):
        for column in range(k):
            step, place = divmod(column, 16)
            byte = int(packed[row // 16, step, 4 * (row % 16) + place % 4])
            assert (byte >> 2 * (place // 4) & 3) - 1 == values[row, column]
    np.testing.assert_array_equal(layout.unpack_ternary(packed, n, k), values)


def test_group_values_come_in_tiles():
    values = np.arange(20 * 3, dtype=np.float16).reshape(20, 3)
    tiled = layout.tile_groups(values, 0)
    assert tiled.shape == (2, 3, 16)
    assert tiled[1, 2, 3] == values[19, 2]
    assert (tiled[1, :, 4:] == 0).all()
    np.testing.assert_array_equal(layout.untile_groups(tiled, 20), values)
