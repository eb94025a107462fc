"""The C functions touch the memory they were given and nothing else."""

import ctypes
import mmap

import numpy as np
import pytest

from qgraph import native

NATIVE = native.load()
SENTINEL = 0xA5
MARGIN = 64


class Guarded:
    """An array between two margins of a known byte."""

    def __init__(self, shape, dtype):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.raw = np.full(nbytes + 2 * MARGIN, SENTINEL, np.uint8)
        self.array = self.raw[MARGIN : MARGIN + nbytes].view(dtype).reshape(shape)

    @property
    def pointer(self):
        return self.raw.ctypes.data + MARGIN

    def is_intact(self):
        return (self.raw[:MARGIN] == SENTINEL).all() and (self.raw[-MARGIN:] == SENTINEL).all()


class Fenced:
    """A read-only float array that ends where the readable memory ends."""

    def __init__(self, values):
        page = mmap.PAGESIZE
        body = -(-values.nbytes // page) * page
        self.map = mmap.mmap(-1, body + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.pointer = base + body - values.nbytes
        ctypes.memmove(self.pointer, values.ctypes.data, values.nbytes)
        libc = ctypes.CDLL(None, use_errno=True)
        self.protect = lambda access: libc.mprotect(
            ctypes.c_void_p(base + body), ctypes.c_size_t(page), ctypes.c_int(access)
        )
        assert self.protect(0) == 0

    def open(self):
        assert self.protect(mmap.PROT_READ | mmap.PROT_WRITE) == 0


SIZES = [(1, 1, 1), (1, 3, 2), (17, 5, 4), (3, 33, 32), (5, 131, 64), (2, 400, 300), (33, 16, 16)]


@pytest.mark.parametrize("isa", NATIVE.isas)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_search_stays_inside_its_buffers(size, mode, isa):
    rows, columns, group = size
    groups = -(-columns // group)
    rng = np.random.default_rng(0)
    w = Fenced(rng.standard_normal((rows, columns)).astype(np.float32))
    importance = Fenced(np.ones(columns, np.float32))
    codes = Guarded((rows, columns), np.uint8)
    scales = Guarded((rows, groups), np.float32)
    zeros = Guarded((rows, groups), np.uint8)
    row_error = Guarded(rows, np.float64)
    for bits in (2, 3, 4, 8):
        status = NATIVE.dll.qg_rtn_search(
            NATIVE.isas[isa],
            w.pointer,
            rows,
            columns,
            group,
            bits,
            mode,
            0,
            importance.pointer,
            codes.pointer,
            scales.pointer,
            zeros.pointer,
            row_error.pointer,
        )
        assert status == 0
    written = [codes, scales, row_error] + ([zeros] if mode == 0 else [])
    assert all(buffer.is_intact() for buffer in written)
    assert (zeros.raw == SENTINEL).all() or mode == 0
    w.open()
    importance.open()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [*range(1, 20), 63, 64, 65, 1000])
def test_pack_stays_inside_its_buffers(columns, bits):
    stride = -(-columns * bits // 8)
    codes = np.random.default_rng(columns).integers(0, 2**bits, (3, columns), np.uint8)
    packed = Guarded((3, stride), np.uint8)
    assert NATIVE.dll.qg_pack(codes.ctypes.data, 3, columns, bits, packed.pointer) == 0
    assert packed.is_intact()
    shifts = bits * np.arange(8 // bits)
    unpacked = (packed.array[..., None] >> shifts) & (2**bits - 1)
    unpacked = unpacked.reshape(3, -1)
    np.testing.assert_array_equal(unpacked[:, :columns], codes)
    assert (unpacked[:, columns:] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"cols": -1},
        {"group": 0},
        {"bits": 5},
        {"mode": 3},
        {"w": None},
        {"codes": None},
        {"scales": None},
        {"zero_points": None},
        {"row_error": None},
    ],
)
def test_search_refuses_what_it_cannot_do(change):
    buffer = np.zeros(64, np.float64).ctypes.data
    names = "isa w rows cols group bits mode float16 importance codes scales zero_points row_error"
    values = [-1, buffer, 1, 4, 4, 4, 0, 0, None, *[buffer] * 4]
    arguments = dict(zip(names.split(), values, strict=True))
    assert NATIVE.dll.qg_rtn_search(*(arguments | change).values()) == 1
    assert NATIVE.dll.qg_rtn_search(*(arguments | {"isa": 99}).values()) == 2
