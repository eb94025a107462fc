"""The native weight search against a plain numpy version of the same search, bit for bit."""

import concurrent.futures
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import native, numerics
from qgraph.spec import QTensor, QuantSpec

MODES = ["asymmetric", "symmetric", "signed"]
ISAS = list(native.load().isas)

# bits → same-sign, opposite-sign, shrinks, zero points; wide symmetric, wide asymmetric, narrow, share of RMS
GRIDS = {
    2: (12, 8, 12, 3, 1.25, 1.05, 0.7, 0.8),
    4: (24, 16, 12, 3, 1.25, 1.05, 0.7, 0.27),
    3: (16, 12, 12, 3, 1.25, 1.05, 0.7, 0.5),
    8: (12, 4, 16, 1, 1.15, 1.05, 0.75, 0.028),
}


def f32(x):
    return np.asarray(x, np.float32)


def total(terms):
    """Sum of each row in float32, in order, 128 at a time: the order that the kernels promise."""
    result = np.zeros(len(terms), np.float32)
    for start in range(0, terms.shape[1], 128):
        result = (
            result
            + np.add.accumulate(terms[:, start : start + 128], axis=1, dtype=np.float32)[:, -1]
        )
    return result


def stored(s, scale_dtype):
    """A scale as it will be stored: never zero, never infinite."""
    m = np.abs(s)
    if scale_dtype == "float16":
        m = np.clip(f32(np.minimum(m, f32(65504)).astype(np.float16)), f32(2.0**-24), f32(65504))
    else:
        m = np.clip(m, np.finfo(np.float32).tiny, np.finfo(np.float32).max)
    return np.where(s < 0, -m, m)


def codes_by_product(w, s, first, last):
    product = w * (f32(1) / s)[:, None]
    return np.rint(np.minimum(np.maximum(product, first[:, None]), last[:, None]))


def error_of(w, i, s, q):
    d = q * s[:, None] - w
    return total(i * (d * d))


def search(w, i, bits, mode, scale_dtype):
    """Groups w [G, g] with importance i [G, g] → codes, scales, zero points, errors."""
    same, opposite, shrinks, n_zeros, wide_symmetric, wide_asymmetric, narrow, share = GRIDS[bits]
    half, top = f32(2 ** (bits - 1)), f32(2**bits - 1)
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rms = np.sqrt(total(i * (w * w)) / total(i))

    def spread(plain, wide, count):
        start, reach = f32(wide) * plain, f32(share) * rms
        end = np.where(reach < f32(narrow) * plain, reach, f32(narrow) * plain)
        return [start + (end - start) * (f32(c) / f32(count - 1)) for c in range(count)]

    zeros = np.zeros(len(w), np.float32)
    if mode == "asymmetric":
        plain = (high - low) / top
        z = np.rint(np.clip(-low / stored(plain, scale_dtype), 0, top))
        candidates = [(plain, z)]
        for step in (0, -1, 1)[:n_zeros]:
            moved = np.clip(z + f32(step), 0, top)
            candidates += [(s, moved) for s in spread(plain, wide_asymmetric, shrinks)]
    else:
        peak = np.maximum(high, -low)
        plain = peak / half
        sign = np.where(high < -low, f32(1), f32(-1)) if mode == "signed" else f32(1)
        candidates = [(peak / (half - 1), zeros), (sign * plain, zeros)]
        candidates += [(sign * s, zeros) for s in spread(plain, wide_symmetric, same)]
        if mode == "signed":
            candidates += [(-sign * s, zeros) for s in spread(plain, wide_symmetric, opposite)]

    def span(z):
        return (-z, top - z) if mode == "asymmetric" else (zeros - half, zeros + half - 1)

    best = None
    for raw, z in candidates:
        s = stored(f32(raw), scale_dtype)
        e = error_of(w, i, s, codes_by_product(w, s, *span(z)))
        if best is None:
            best = [e, s, z]
        else:
            better = e < best[0]
            best = [np.where(better, new, old) for new, old in zip((e, s, z), best, strict=True)]
    error, scale, z = best
    first, last = span(z)
    s = scale
    for _ in range(3):
        q = codes_by_product(w, s, first, last)
        e = error_of(w, i, s, q)
        better = e < error
        error, scale = np.where(better, e, error), np.where(better, s, scale)
        cross, square = total(i * (w * q)), total(i * (q * q))
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where(square > 0, stored(cross / square, scale_dtype), s)
    scale = np.where(low < high, scale, f32(1))
    q = np.rint(np.minimum(np.maximum(w / scale[:, None], first[:, None]), last[:, None]))
    return q + z[:, None], scale, z, error_of(w, i, scale, q)


def reference(w, group, bits, mode, importance, scale_dtype):
    """The whole matrix through `search`, with short groups padded by weights of zero importance."""
    rows, columns = w.shape
    groups = -(-columns // group)
    pad = groups * group - columns
    i = np.ones(columns, np.float32) if importance is None else importance
    grouped = np.pad(w, ((0, 0), (0, pad))).reshape(-1, group)
    i = np.tile(np.pad(i, (0, pad)), (rows, 1)).reshape(-1, group)
    codes, scales, zeros, errors = search(grouped, i, bits, mode, scale_dtype)
    codes = codes.reshape(rows, -1)[:, :columns]
    per_group = (rows, groups)
    row_error = np.add.accumulate(errors.reshape(per_group).astype(np.float64), axis=1)[:, -1]
    return codes, scales.reshape(per_group), zeros.reshape(per_group), row_error


def run(w, group, bits, mode, importance=None, scale_dtype="float32", isa=None):
    return native.rtn_search(
        w,
        group=group,
        bits=bits,
        symmetric=mode != "asymmetric",
        signed_scale=mode == "signed",
        importance=importance,
        scale_dtype=scale_dtype,
        isa=isa,
    )


def weights(rows, columns, seed=0, heavy=False):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (rows, columns)) if heavy else rng.standard_normal((rows, columns))
    return f32(w * 0.02)


def importances(columns, seed=1):
    return f32(np.exp(np.random.default_rng(seed).standard_normal(columns)))


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_numpy_search(bits, mode, weighted, scale_dtype):
    for rows, columns, group in [(5, 96, 32), (3, 100, 32), (2, 300, 300), (17, 7, 16), (1, 1, 1)]:
        w = weights(rows, columns, seed=columns, heavy=True)
        importance = importances(columns) if weighted else None
        codes, scales, zeros, row_error = run(w, group, bits, mode, importance, scale_dtype)
        want = reference(w, group, bits, mode, importance, scale_dtype)
        np.testing.assert_array_equal(codes, want[0])
        np.testing.assert_array_equal(scales, want[1])
        if zeros is not None:
            np.testing.assert_array_equal(zeros, want[2])
        np.testing.assert_array_equal(row_error, want[3])


def odd_matrices():
    """Shapes and values at the edges of what can be asked."""
    big = weights(33, 515, seed=3, heavy=True)
    yield "ragged", big, 32
    yield "long groups", big, 400
    yield "whole rows", big, 515
    yield "one column", weights(40, 1), 8
    yield "one row", weights(1, 77), 16
    yield "group of one", weights(9, 5), 1
    yield "group longer than the row", weights(4, 20), 64
    yield "no rows", weights(0, 20), 8
    yield "no columns", np.zeros((3, 0), np.float32), 8
    yield "zeros", np.zeros((3, 40), np.float32), 16
    yield "one weight", f32(np.eye(8, 64)), 32
    yield "constant", np.full((2, 64), 0.25, np.float32), 32
    yield "negative", -np.abs(weights(4, 64)), 32
    yield "tiny", weights(4, 64) * f32(1e-38), 32
    yield "float16 underflow", weights(4, 64) * f32(1e-6), 32
    yield "huge", weights(4, 64) * f32(1e22), 32
    yield "largest", np.full((2, 64), np.finfo(np.float32).max, np.float32), 32
    broken = weights(4, 64)
    broken[0, 3], broken[1, 4], broken[2, 5] = np.nan, np.inf, -np.inf
    yield "not finite", broken, 32


ODD = {name: (w, group) for name, w, group in odd_matrices()}


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
@pytest.mark.parametrize("name", ODD)
def test_every_instruction_set_gives_the_same_bits(name, isa):
    w, group = ODD[name]
    some = importances(w.shape[1])
    settings_ = itertools.product(
        [2, 3, 4, 8], MODES, [None, some, 0 * some], ["float32", "float16"]
    )
    for bits, mode, importance, scale_dtype in settings_:
        want = run(w, group, bits, mode, importance, scale_dtype, isa="scalar")
        got = run(w, group, bits, mode, importance, scale_dtype, isa=isa)
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            assert a is None or a.tobytes() == b.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ODD)
def test_results_are_always_in_range(name, isa):
    w, group = ODD[name]
    for bits, mode in itertools.product([2, 3, 4, 8], MODES):
        codes, scales, zeros, row_error = run(w, group, bits, mode, isa=isa)
        low = 0 if mode == "asymmetric" else -(2 ** (bits - 1))
        assert codes.shape == w.shape
        assert scales.shape == (w.shape[0], -(-w.shape[1] // group))
        assert row_error.shape == w.shape[:1]
        assert np.isfinite(scales).all() and (scales != 0).all()
        assert mode == "signed" or (scales > 0).all()
        if codes.size:
            assert codes.min() >= low and codes.max() <= low + 2**bits - 1
        if zeros is not None and zeros.size:
            assert zeros.max() <= 2**bits - 1


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    group=st.integers(1, 320),
    bits=st.sampled_from([2, 4, 8]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_do_not_depend_on_each_other(rows, columns, group, bits, mode, seed):
    w = weights(rows, columns, seed=seed)
    whole = run(w, group, bits, mode)
    cut = seed % (rows + 1)
    parts = [run(part, group, bits, mode) for part in (w[:cut], w[cut:])]
    for a, *both in zip(whole, *parts, strict=True):
        assert a is None or a.tobytes() == np.concatenate(both).tobytes()


def spec_for(bits, mode, group, scale_dtype="float32"):
    prefix, sign = ("uint", "asym") if mode == "asymmetric" else ("int", "sym")
    suffix = ".f16" if scale_dtype == "float16" else ""
    return QuantSpec.parse(f"{prefix}{bits}.g{group}.{sign}{suffix}")


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_what_quantize_linear_gives(bits, mode, scale_dtype):
    w = weights(24, 200, heavy=True)
    spec = spec_for(bits, mode, 32, scale_dtype)
    codes, scales, zeros, row_error = run(w, 32, bits, mode, scale_dtype=scale_dtype)
    np.testing.assert_array_equal(codes, numerics.quantize(w, scales, zeros, spec))
    assert (scales == scales.astype(scale_dtype)).all()
    q = QTensor(spec, codes, scales, zeros)
    q.check()
    np.testing.assert_allclose(row_error.sum(), numerics.squared_error(w, q), rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_worse_than_min_max(bits, mode, scale_dtype, weighted):
    for heavy in (False, True):
        w = weights(64, 160, seed=5, heavy=heavy)
        importance = importances(160) if weighted else None
        spec = spec_for(bits, mode, 32, scale_dtype)
        plain_scale, plain_zero = numerics.min_max_grid(w, spec)
        plain = numerics.quantize(w, plain_scale, plain_zero, spec)
        difference = np.square(
            w - numerics.dequantize(plain, plain_scale, plain_zero, spec), dtype=np.float64
        )
        plain_error = (difference * (1 if importance is None else importance)).sum(1)
        row_error = run(w, 32, bits, mode, importance, scale_dtype)[3]
        assert (row_error <= plain_error * (1 + 1e-5)).all()
        assert row_error.sum() < (0.999 if bits == 8 else 0.95) * plain_error.sum()


@pytest.mark.parametrize(
    ("bits", "mode", "group", "expected"),
    [
        (4, "signed", 32, 0.0065),
        (4, "asymmetric", 32, 0.0059),
        (4, "signed", 128, 0.0093),
        (2, "signed", 32, 0.111),
        (2, "asymmetric", 32, 0.111),
    ],
)
def test_mean_squared_error_on_a_normal_distribution(bits, mode, group, expected):
    w = f32(np.random.default_rng(7).standard_normal((1024, 1024)))
    mse = run(w, group, bits, mode)[3].sum() / w.size
    assert mse == pytest.approx(expected, rel=0.015)


def test_a_group_of_zeros_has_scale_one_and_codes_at_the_zero_point():
    w = weights(2, 64)
    w[0, 32:] = 0
    for mode in MODES:
        codes, scales, zeros, _ = run(w, 32, 4, mode)
        assert scales[0, 1] == 1
        assert (codes[0, 32:] == (0 if zeros is None else zeros[0, 1])).all()


def test_group_zero_is_the_whole_row():
    w = weights(3, 50)
    assert run(w, 0, 8, "symmetric")[1].shape == (3, 1)


def test_threads_may_share_the_function():
    w = weights(256, 512)
    whole = run(w, 32, 4, "signed")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda r: run(w[r : r + 16], 32, 4, "signed"), range(0, 256, 16)))
    for n in (0, 1, 3):
        np.testing.assert_array_equal(whole[n], np.concatenate([p[n] for p in parts]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"group": -1}, "group is -1"),
        ({"scale_dtype": "bfloat16"}, "bfloat16"),
        ({"isa": "avx3"}, "avx3"),
        ({"importance": np.ones(5, np.float32)}, r"expected \[64\]"),
        ({"importance": np.ones(64)}, "importance is float64"),
        ({"w": np.ones((4, 64))}, "w is float64"),
        ({"w": np.ones((64, 4), np.float32).T}, "strided"),
        ({"w": np.ones(64, np.float32)}, "2 dimensions"),
    ],
)
def test_wrong_arguments_are_named(change, text):
    arguments = {"w": weights(4, 64), "group": 32, "bits": 4, "symmetric": True} | change
    with pytest.raises(ValueError, match=text):
        native.rtn_search(arguments.pop("w"), **arguments)
