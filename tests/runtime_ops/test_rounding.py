"""Native rounding under a Gram matrix: feedback against numpy, descent against what it promises, all kernels alike."""

import concurrent.futures

import numpy as np
import pytest

from qgraph import native, native_rounding, numerics
from qgraph.native_rounding import Rows
from qgraph.spec import QuantSpec

ISAS = list(native.load().isas)
SHAPES = [(5, 70, 32), (33, 130, 16), (1, 1, 1), (40, 33, 40), (3, 200, 64)]
CASES = [(bits, signed) for bits in (2, 3, 4, 8) for signed in (False, True)]


def problem(n, k, seed=0):
    """w [n, k] and a Gram matrix of correlated inputs of unlike size."""
    rng = np.random.default_rng([seed, n, k])
    x = rng.standard_normal((3 * k + 8, k)) @ (rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k))
    x *= np.exp(rng.standard_normal(k))
    gram = x.T @ x / len(x)
    return (rng.standard_normal((n, k)) * 0.02).astype(np.float32), gram


def start(w, group, bits, signed, scale_dtype="float32"):
    """The min-max grid of w as rows, with the codes of plain rounding."""
    spec = QuantSpec.parse(f"{'' if signed else 'u'}int{bits}.g{max(group, 2)}")
    k = w.shape[1]
    if group == 1:  # a spec has no groups of one
        scale, zero = np.abs(w) / 3 + np.float32(1e-6), np.zeros(w.shape, np.float32)
        codes = np.clip(np.rint(w / scale), spec.qtype.qmin, spec.qtype.qmax)
    else:
        scale, points = numerics.min_max_grid(w, spec)
        codes = numerics.quantize(w, scale, points, spec)
        zero = np.zeros_like(scale) if points is None else points.astype(np.float32)
    qtype = spec.qtype
    return Rows(
        np.ascontiguousarray(codes, qtype.container), scale.astype(np.float32), zero,
        min(group, k), bits, qtype.qmin, qtype.qmax, scale_dtype,
    )  # fmt: skip


def lower_factor(gram):
    """F with F_ji = R_ij / R_jj, gram = R Rᵀ, R upper triangular; columns in plain order."""
    r = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return np.ascontiguousarray((r / np.diag(r)).T, np.float32)


def reference(rows, w, order, factor):
    """Feedback as its header says, sums in float32 and in order."""
    n, k = w.shape
    errors = np.zeros((n, k), np.float32)
    codes = np.empty_like(rows.codes)
    for j, column in enumerate(order):
        g = column // rows.group
        s, z = rows.scale[:, g], rows.zero_point[:, g]
        added = np.zeros(n, np.float32)
        for i in range(j):
            # The product of two float32 is exact in float64: one rounding, as in the kernels.
            added = (np.float64(factor[j, i]) * errors[:, i] + added).astype(np.float32)
        x = w[:, column] + added
        code = np.rint(np.minimum(np.maximum(x / s, rows.low - z), rows.high - z))
        errors[:, j] = w[:, column] - code * s
        codes[:, column] = (code + z).astype(codes.dtype)
    return codes


def cost(w, rows, gram):
    e = w.astype(np.float64) - rows.dequantize()
    return np.einsum("nk,nk->n", e @ gram, e)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_feedback_equals_numpy_bit_for_bit(bits, signed, isa):
    # More rows than share what is read of the factor, more columns than stay in the first cache.
    large = [(140, 340, 32)] if (bits, signed) == (4, False) else []
    for n, k, group in SHAPES + large:
        w, gram = problem(n, k)
        rows = start(w, group, bits, signed)
        order = np.argsort(-np.diag(gram)).astype(np.int32)
        factor = lower_factor((gram + 0.01 * np.eye(k))[np.ix_(order, order)])
        want = reference(rows, w, order, factor)
        native_rounding.feedback(rows, w, order, factor, isa=isa)
        np.testing.assert_array_equal(rows.codes, want)


def test_feedback_says_what_each_row_costs():
    w, gram = problem(40, 130)
    order = np.argsort(-np.diag(gram)).astype(np.int32)
    factor = lower_factor(gram[np.ix_(order, order)])
    r = np.linalg.cholesky(gram[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    energies = np.square(np.diag(r)).astype(np.float32)
    found = []
    for isa in ISAS:
        rows = start(w, 32, 4, signed=False)
        found.append(native_rounding.feedback(rows, w, order, factor, energies, isa=isa))
        np.testing.assert_allclose(found[-1], cost(w, rows, gram), rtol=1e-4)
    assert all(f.tobytes() == found[0].tobytes() for f in found)
    rows = start(w, 32, 4, signed=False)
    assert native_rounding.feedback(rows, w, order, factor).size == 0


def test_feedback_beats_plain_rounding_by_far():
    w, gram = problem(64, 256)
    rows = start(w, 32, 4, signed=False)
    plain = cost(w, rows, gram).sum()
    order = np.arange(256, dtype=np.int32)
    native_rounding.feedback(rows, w, order, lower_factor(gram + 1e-6 * np.eye(256)))
    assert cost(w, rows, gram).sum() < 0.6 * plain


def descend(rows, w, gram, *, isa=None, sweeps=50, fits=True, fits_zero=True):
    starts = np.arange(0, len(gram), rows.group)
    sums = np.add.reduceat(gram, starts, axis=0).astype(np.float32)
    gradient = ((w.astype(np.float64) - rows.dequantize()) @ gram).astype(np.float32)
    native_rounding.descend(
        rows, gram.astype(np.float32), sums, gradient,
        fits_scales=fits, fits_zero_points=fits_zero, sweeps=sweeps, isa=isa,
    )  # fmt: skip
    return gradient


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_descent_is_the_same_on_every_instruction_set_and_never_climbs(bits, signed):
    for n, k, group in SHAPES:
        w, gram = problem(n, k)
        found = []
        for isa in ISAS:
            rows = start(w, group, bits, signed)
            before = cost(w, rows, gram)
            gradient = descend(rows, w, gram, isa=isa, fits_zero=not signed)
            found.append((rows.codes, rows.scale, rows.zero_point, gradient))
            after = cost(w, rows, gram)
            assert (after <= before * (1 + 1e-5)).all()
            assert rows.codes.min() >= rows.low and rows.codes.max() <= rows.high
            assert (rows.scale != 0).all() and np.isfinite(rows.scale).all()
            exact = (w.astype(np.float64) - rows.dequantize()) @ gram
            assert np.abs(gradient - exact).max() <= 1e-4 * np.abs(w @ gram).max()
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert a.tobytes() == b.tobytes()


def test_descent_ends_where_no_single_code_can_be_better():
    w, gram = problem(12, 90)
    rows = start(w, 32, 4, signed=False)
    descend(rows, w, gram, sweeps=200, fits=False, fits_zero=False)
    best = cost(w, rows, gram)
    for j in range(90):
        for step in (-1, 1):
            moved = rows.copy()
            column = moved.codes[:, j].astype(int) + step
            moved.codes[:, j] = np.clip(column, rows.low, rows.high)
            assert (cost(w, moved, gram) >= best * (1 - 1e-5)).all()


def test_scales_are_least_squares_for_their_codes():
    w, gram = problem(6, 64)
    rows = start(w, 64, 8, signed=True)
    descend(rows, w, gram, sweeps=200)
    q = rows.codes.astype(np.float64)
    want = np.einsum("nk,nk->n", w @ gram, q) / np.einsum("nk,nk->n", q @ gram, q)
    np.testing.assert_allclose(rows.scale[:, 0], want, rtol=1e-5)


def test_half_scales_stay_half_values():
    w, gram = problem(6, 96)
    rows = start(w, 32, 4, signed=True, scale_dtype="float16")
    rows.scale[:] = rows.scale.astype(np.float16)
    before = cost(w, rows, gram)
    descend(rows, w, gram)
    assert (cost(w, rows, gram) < before).all()
    np.testing.assert_array_equal(rows.scale, rows.scale.astype(np.float16).astype(np.float32))


def test_a_narrower_range_of_codes_is_kept():
    w, gram = problem(6, 96)
    rows = start(w, 32, 2, signed=True)
    rows.codes[:] = np.clip(rows.codes, -1, 1)
    rows.low = -1
    descend(rows, w, gram)
    assert rows.codes.min() == -1 and rows.codes.max() == 1


def test_threads_may_share_the_functions():
    w, gram = problem(256, 64)
    order = np.arange(64, dtype=np.int32)
    factor = lower_factor(gram + 0.01 * np.eye(64))
    whole, parts = (start(w, 32, 4, signed=False) for _ in range(2))
    native_rounding.feedback(whole, w, order, factor)
    descend(whole, w, gram)

    def solve(first):
        part = slice(first, first + 32)
        native_rounding.feedback(parts.part(part), w[part], order, factor)
        descend(parts.part(part), w[part], gram)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(solve, range(0, 256, 32)))
    assert whole.codes.tobytes() == parts.codes.tobytes()
    assert whole.scale.tobytes() == parts.scale.tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w": np.ones((4, 64))}, "w is float64"),
        ({"order": np.arange(63, dtype=np.int32)}, r"expected C-contiguous int32\[64\]"),
        ({"order": np.full(64, 64, np.int32)}, "order of columns"),
        ({"factor": np.ones((64, 64), np.float32).T[:, ::-1]}, "strided"),
        ({"isa": "avx3"}, "avx3"),
    ],
)
def test_wrong_arguments_are_named(change, text):
    w, gram = problem(4, 64)
    rows = start(w, 32, 4, signed=False)
    arguments = {"w": w, "order": np.arange(64, dtype=np.int32), "factor": lower_factor(gram)}
    with pytest.raises(ValueError, match=text):
        native_rounding.feedback(rows, **(arguments | change))


def test_a_grid_that_does_not_fit_is_refused():
    w, gram = problem(4, 64)
    for change in ({"low": -9}, {"high": 16}, {"bits": 3}):
        rows = start(w, 32, 4, signed=False)
        for name, value in change.items():
            setattr(rows, name, value)
        with pytest.raises(ValueError, match="refuses the grid"):
            descend(rows, w, gram)
