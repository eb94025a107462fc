"""Every matrix kernel against numpy, the scalar kernel and the ONNX body: sizes, codes, buffers."""

import ctypes
import mmap

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest

from qgraph import native, native_matmul
from qgraph.ops import bodies, layout

ISAS = list(native.load().isas)
FAST = [isa for isa in ISAS if isa != "scalar"]
INT4, TERNARY = native_matmul.INT4, native_matmul.TERNARY


def rounded(x, bits, block):
    """What the kernels make of activations, step by step in float32."""
    if bits == 0:
        return x.astype(np.float64)
    m, k = x.shape
    block = block or k
    levels = np.float32(127 if bits == 8 else 7)
    out = np.empty((m, k))
    for start in range(0, k, block):
        part = x[:, start : start + block]
        peak = np.abs(part).max(1, keepdims=True)
        peak = np.where(peak < 2.0**-100, np.float32(0), peak)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(part * np.where(peak > 0, levels / peak, np.float32(0)))
        out[:, start : start + block] = codes.astype(np.float64) * (peak / levels)
    return out


class Weights:
    """Random packed weights and the matrix that they stand for."""

    def __init__(
        self, rng, n, k, *, kind=INT4, group=0, asymmetric=False, half=True, extreme=False
    ):
        self.n, self.kind, self.group = n, kind, group
        self.zero_points = None
        if kind == TERNARY:
            values = rng.integers(-1, 2, (n, k)) if not extreme else rng.choice([-1, 1], (n, k))
            self.codes = layout.pack_ternary(values)
            scales = rng.uniform(0.5, 2, n).astype(np.float32)
            self.scales = np.zeros(layout.padded(n, 16), np.float32)
            self.scales[:n] = scales
            self.matrix = values * scales.astype(np.float64)[:, None]
            return
        q = rng.choice([0, 15], (n, k)) if extreme else rng.integers(0, 16, (n, k))
        groups = layout.int4_columns(k, group) // (group or layout.int4_columns(k, 0))
        scales = rng.uniform(-0.1, 0.1, (n, groups)).astype(np.float16 if half else np.float32)
        points = rng.integers(0, 16, (n, groups)).astype(np.uint8)
        self.codes = layout.pack_int4(q, group)
        self.scales = layout.tile_groups(scales, 0)
        if asymmetric:
            self.zero_points = layout.tile_groups(points, 8)
        spread = [np.repeat(v, group or k, axis=1)[:, :k] for v in (scales, points)]
        middle = spread[1] if asymmetric else 8
        self.matrix = (q - np.asarray(middle, np.float64)) * spread[0].astype(np.float64)

    def times(self, x, bits, block, **options):
        return native_matmul.matmul(
            x,
            self.codes,
            self.scales,
            self.zero_points,
            n=self.n,
            format=self.kind,
            group=self.group,
            activation_bits=bits,
            activation_block=block,
            **options,
        )


CASES = [
    # kind, group, block, bits, asymmetric, half
    (INT4, 32, 32, 8, False, True),
    (INT4, 32, 32, 8, True, True),
    (INT4, 32, 128, 8, False, True),
    (INT4, 16, 64, 8, True, False),
    (INT4, 128, 128, 8, False, True),
    (INT4, 256, 128, 8, True, True),
    (INT4, 64, 0, 4, False, True),
    (INT4, 0, 128, 8, False, False),
    (INT4, 0, 0, 8, True, True),
    (INT4, 32, 0, 0, False, True),
    (INT4, 128, 0, 0, True, False),
    (INT4, 0, 0, 0, False, True),
    (TERNARY, 0, 0, 8, False, False),
    (TERNARY, 0, 0, 0, False, False),
]
SIZES = [
    (1, 16, 32),
    (1, 5, 7),
    (2, 33, 100),
    (3, 1, 1),
    (8, 48, 257),
    (13, 100, 391),
    (23, 70, 264),
    (1, 70, 1030),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_agree_with_numpy_and_with_each_other(size, case):
    kind, group, block, bits, asymmetric, half = case
    m, n, k = size
    rng = np.random.default_rng([m, n, k])
    x = rng.standard_normal((m, k)).astype(np.float32)
    weights = Weights(rng, n, k, kind=kind, group=group, asymmetric=asymmetric, half=half)
    exact = rounded(x, bits, block) @ weights.matrix.T
    size_of_terms = np.abs(rounded(x, bits, block)) @ np.abs(weights.matrix.T)
    first = None
    for isa in ISAS:
        y = weights.times(x, bits, block, isa=isa)
        assert (np.abs(y - exact) <= 2e-6 * size_of_terms + 1e-30).all(), isa
        assert first is None or first.tobytes() == y.tobytes(), isa
        first = y
    assert weights.times(x, bits, block, is_reversed=True).tobytes() == first.tobytes()


@pytest.mark.parametrize("case", CASES[:3] + CASES[-2:], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(case):
    kind, group, block, bits, asymmetric, half = case
    rng = np.random.default_rng(1)
    x = rng.standard_normal((21, 384)).astype(np.float32)
    weights = Weights(rng, 40, 384, kind=kind, group=group, asymmetric=asymmetric, half=half)
    for isa in ISAS:
        whole = weights.times(x, bits, block, isa=isa)
        for m in range(1, 12):
            part = weights.times(x[:m].copy(), bits, block, isa=isa)
            assert part.tobytes() == whole[:m].tobytes()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_extreme_codes_do_not_overflow(case):
    kind, group, block, bits, asymmetric, half = case
    rng = np.random.default_rng(2)
    n, k = 17, 4099
    x = rng.choice([-1, 1], (9, k)).astype(np.float32) * 3
    x[0] = 3
    weights = Weights(
        rng, n, k, kind=kind, group=group, half=half, extreme=True, asymmetric=asymmetric
    )
    exact = rounded(x, bits, block) @ weights.matrix.T
    size_of_terms = np.abs(x).astype(np.float64) @ np.abs(weights.matrix.T)
    for isa in ISAS:
        y = weights.times(x, bits, block, isa=isa)
        assert (np.abs(y - exact) <= 1e-5 * size_of_terms).all()


@pytest.mark.parametrize("kind", [INT4, TERNARY])
@pytest.mark.parametrize("isa", ISAS)
def test_bad_and_tiny_activations_stay_in_their_row(isa, kind):
    rng = np.random.default_rng(3)
    weights = Weights(rng, 20, 64, kind=kind, group=32 if kind == INT4 else 0)
    block = 32 if kind == INT4 else 0
    x = rng.standard_normal((6, 64)).astype(np.float32)
    good = weights.times(x, 8, block, isa=isa)
    x[0, 3], x[1, 40], x[2, 0], x[3], x[4] = np.nan, np.inf, -np.inf, 0, 1e-38
    y = weights.times(x, 8, block, isa=isa)
    assert np.isnan(y[:3]).all()
    assert (y[3:5] == 0).all()
    assert y[5].tobytes() == good[5].tobytes()
    x[0] = np.float32(3e38)
    assert np.isfinite(weights.times(x * np.float32(0.001), 8, block, isa=isa)[0]).all()


@pytest.mark.parametrize("name", ["int4", "ternary"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_body_means_the_same(name, bits):
    rng = np.random.default_rng(4)
    n, k = 21, 83
    x = rng.standard_normal((2, 3, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    kind = INT4 if name == "int4" else TERNARY
    weights = Weights(rng, n, k, kind=kind, group=16 if kind == INT4 else 0, asymmetric=True)
    block = 32 if kind == INT4 and bits == 8 else 0
    attributes = f"K=<K>, N=<N>, activation_bits={bits}, activation_block={block}"
    attributes = attributes.replace("<K>", str(k)).replace("<N>", str(n))
    feeds = {"X": x, "codes": weights.codes, "bias": bias}
    if kind == INT4:
        op, attributes = "MatMulInt4", attributes + ", block_size=16"
        feeds |= {"scales": weights.scales, "zero_points": weights.zero_points}
        inputs = "X, codes, scales, zero_points, bias"
        types = "uint8[a, b, 64] codes, float16[a, c, 16] scales, uint8[d, e, 16] zero_points"
    else:
        op = "MatMulTernary"
        feeds |= {"scale": weights.scales[:n]}
        inputs = "X, codes, scale, bias"
        types = "uint8[a, b, 64] codes, float[n] scale"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]> g (float[p, q, {k}] X, {types}, float[n] bias)'
        f" => (float[p, q, n] Y) {{ Y = ai.qgraph.{op} <{attributes}> ({inputs}) }}"
    )
    model.functions.append(bodies.proto(op, 21))
    onnx.checker.check_model(model)
    (body,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    y = weights.times(x.reshape(6, k), bits, block, isa=ISAS[-1]).reshape(2, 3, n) + bias
    np.testing.assert_allclose(y, body, rtol=1e-4, atol=1e-4)


class Fenced:
    """Bytes that end where the memory of the process ends; reading on is a crash."""

    def __init__(self, nbytes):
        page = mmap.PAGESIZE
        body = max(-(-nbytes // page), 1) * page
        self.map = mmap.mmap(-1, body + page)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.pointer = self.base + body - nbytes
        self.fence = self.base + body
        self.protect(0)

    def protect(self, access):
        libc = ctypes.CDLL(None, use_errno=True)
        where, size = ctypes.c_void_p(self.fence), ctypes.c_size_t(mmap.PAGESIZE)
        assert libc.mprotect(where, size, ctypes.c_int(access)) == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.protect(mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_stay_inside_their_buffers(case, isa):
    kind, group, block, bits, asymmetric, half = case
    rng = np.random.default_rng(5)
    for m, n, k in [(1, 17, 33), (2, 16, 31), (5, 3, 130), (9, 31, 8)]:
        x = rng.standard_normal((m, k)).astype(np.float32)
        weights = Weights(rng, n, k, kind=kind, group=group, asymmetric=asymmetric, half=half)
        bias = np.zeros(n, np.float32)
        arrays = [weights.codes, weights.scales, x, bias]
        arrays += [weights.zero_points] if weights.zero_points is not None else []
        fenced = [Fenced(a.nbytes) for a in arrays]
        for fence, a in zip(fenced, arrays, strict=True):
            ctypes.memmove(fence.pointer, a.ctypes.data, a.nbytes)
        problem = native_matmul.Problem(
            isa=native.load().isas[isa],
            format=kind,
            m=m,
            n=n,
            k=k,
            group=group,
            activation_bits=bits,
            activation_block=block,
            codes=fenced[0].pointer,
            scales=fenced[1].pointer,
            scales_are_float16=weights.scales.dtype == np.float16,
            zero_points=fenced[4].pointer if len(fenced) > 4 else None,
            x=fenced[2].pointer,
            bias=fenced[3].pointer,
        )
        result = Fenced(m * n * 4)
        # The kernels may use what they asked for, to the last byte. Sums want whole words.
        needed = -(-native_matmul.scratch_bytes(problem) // 4) * 4
        scratch = Fenced(needed)
        problem.y, problem.scratch = result.pointer, scratch.pointer
        assert native_matmul.run(problem) == 0
        y = np.frombuffer((ctypes.c_char * (m * n * 4)).from_address(result.pointer), np.float32)
        assert y.tobytes() == weights.times(x, bits, block, isa=isa).tobytes()
        del y
        for fence in [*fenced, result, scratch]:
            with fence:
                pass


@pytest.mark.parametrize(
    "change",
    [
        {"group": 48},
        {"group": 8},
        {"activation_bits": 3},
        {"activation_block": 24},
        {"group": 64, "activation_block": 96},
        {"format": 2},
        {"n": 0},
        {"k": 0},
        {"k": 1 << 20},
        {"isa": 99},
    ],
    ids=str,
)
def test_sizes_that_no_kernel_takes_are_refused(change):
    sizes = {"isa": -1, "n": 16, "k": 64, "group": 32, "activation_bits": 8, "m": 1}
    with pytest.raises(ValueError, match="sizes"):
        native_matmul.scratch_bytes(native_matmul.Problem(**(sizes | change)))


def test_the_probes_run():
    found = native.load()
    data = np.ones(10_000, np.uint8)
    sink = ctypes.c_int32()
    assert found.dll.qg_probe_read(data.ctypes.data, data.nbytes, ctypes.byref(sink)) == 9984
    for number in found.isas.values():
        assert found.dll.qg_probe_dot(number, 10, ctypes.byref(sink)) == 10 * 16 * 64
