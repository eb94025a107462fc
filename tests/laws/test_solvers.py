"""Every registered solver on every kind of matrix: well formed, no worse than the textbook grid, the same each time.

By default each type meets every shape and every kind of matrix, but a third of their pairs; its neighbours meet the
others. QGRAPH_FULL=1 tries all.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgraph import errors, numerics, registry
from qgraph.passes.solvers import clip, hqq, rtn, weighted
from qgraph.solver import WeightStats
from qgraph.spec import QTYPES, QTensor, QuantSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from covering import FULL

SOLVERS = registry.names("solver")
SHAPES = [(1, 1), (1, 64), (64, 1), (5, 37), (48, 64), (3, 129), (2, 300)]
GRAINS = ["tensor", "ch", "g16", "g32"]
SPECS = [f"{t}.{g}.{s}" for t, g, s in itertools.product(QTYPES, GRAINS, ("sym", "asym"))]
HALF = ["int4.g32.f16", "uint4.g32.asym.f16", "int8.ch.f16", "uint2.g16.asym.f16"]
TEXTS = SPECS + HALF


def normal(n: int, k: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([n, k]).standard_normal((n, k)).astype(np.float32)


def zero_rows(n: int, k: int) -> np.ndarray[Any, Any]:
    w = normal(n, k)
    w[::2] = 0
    return w


def constant_rows(n: int, k: int) -> np.ndarray[Any, Any]:
    return np.repeat(normal(n, 1), k, axis=1)


def outlier(n: int, k: int) -> np.ndarray[Any, Any]:
    w = normal(n, k)
    w[n // 2, k // 2] = 1e4
    return w


def spread(n: int, k: int) -> np.ndarray[Any, Any]:
    """Rows from 1e-30 to 1e30."""
    return (normal(n, k) * np.logspace(-30, 30, n)[:, None]).astype(np.float32)


def ternary(n: int, k: int) -> np.ndarray[Any, Any]:
    codes = np.random.default_rng([n, k]).integers(-1, 2, (n, k))
    return (codes * np.abs(normal(n, 1) + 0.1)).astype(np.float32)


FILLS = {
    "normal": normal,
    "zeros": lambda n, k: np.zeros((n, k), np.float32),
    "zero-rows": zero_rows,
    "constant-rows": constant_rows,
    "outlier": outlier,
    "positive": lambda n, k: np.abs(normal(n, k)) + 1,
    "negative": lambda n, k: -np.abs(normal(n, k)) - 1,
    "tiny": lambda n, k: normal(n, k) * np.float32(1e-30),
    "subnormal": lambda n, k: normal(n, k) * np.float32(1e-40),
    "huge": lambda n, k: normal(n, k) * np.float32(1e30),
    "spread": spread,
    "ternary": ternary,
    "transposed": lambda n, k: np.asfortranarray(normal(n, k)),
    "half": lambda n, k: normal(n, k).astype(np.float16),
    "double": lambda n, k: normal(n, k).astype(np.float64),
}


def solve(
    name: str, w: Any, text: str, stats: WeightStats | None = None, **options: Any
) -> QTensor | None:
    """The solver's answer, or None where it refuses such a matrix with a reason."""
    w = w.view()
    w.flags.writeable = False
    before = w.copy()
    solver = registry.get("solver", name)(**options)
    try:
        q: QTensor = solver.solve(w, QuantSpec.parse(text), stats, np.random.default_rng(0))
    except errors.RecipeError as e:
        if not e.diagnostics[0].hint:
            raise
        return None
    assert np.array_equal(w, before)
    return q


def same(a: QTensor, b: QTensor) -> bool:
    points = (a.zero_point is None) == (b.zero_point is None) and (
        a.zero_point is None or np.array_equal(a.zero_point, b.zero_point)
    )
    return points and np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale)


def test_at_least_round_to_nearest_is_there():
    assert "rtn" in SOLVERS


def matrices(text: str) -> list[tuple[tuple[int, int], str]]:
    """The shapes and fills that a type is tried on."""
    turn = TEXTS.index(text)
    return [
        (shape, label)
        for (i, shape), (j, label) in itertools.product(enumerate(SHAPES), enumerate(FILLS))
        if FULL or (turn + i + j) % 3 == 0
    ]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_well_formed_and_no_worse_than_min_max(name, text):
    spec = QuantSpec.parse(text)
    for shape, label in matrices(text):
        w = FILLS[label](*shape)
        q = solve(name, w, text)
        if q is None:
            assert name != "rtn"
            continue
        q.check()
        assert (q.spec.qtype, q.spec.block, q.spec.symmetric) == (
            spec.qtype,
            spec.block,
            spec.symmetric,
        )
        assert q.shape == shape
        got = q.dequantize()
        assert np.isfinite(got).all(), label
        assert not got[~w.any(axis=1)].any(), f"{label}: rows of zeros stay zero"
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scale, zero_point = numerics.min_max_grid(w.astype(np.float32), spec)
            codes = numerics.quantize(w.astype(np.float32), scale, zero_point, spec)
            plain = QTensor(spec, codes, scale, zero_point)
            bound = numerics.squared_error(w, plain)
        if np.isfinite(bound):
            # What cannot be told from rounding is allowed: 1e-6 of the weights' own energy.
            slack = 1e-6 * float(np.square(w, dtype=np.float64).sum()) + 1e-76
            assert numerics.squared_error(w, q) <= bound * (1 + 1e-5) + slack, f"{label} {shape}"
        if label not in (
            "subnormal",
            "tiny",
            "huge",
            "spread",
        ):  # float32 cannot hold their squares
            assert q.error == pytest.approx(numerics.squared_error(w, q), rel=1e-3, abs=1e-9)


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are split into several tasks, as large ones are."""
    for module in (clip, hqq, rtn, weighted):
        monkeypatch.setattr(module, "_CHUNK", 1 << 13)


@pytest.mark.usefixtures("many_tasks")
@pytest.mark.parametrize("text", ["int4.g32", "uint4.g32", "int8.ch", "uint8.tensor", "int2.ch"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_each_time_and_on_any_number_of_threads(name, text):
    kind = registry.get("solver", name)
    counts: list[dict[str, Any]] = [{}, {}]
    if "threads" in kind.Options.model_fields:
        counts += [{"threads": n} for n in (1, 2, 5)]
    for w in (normal(700, 90), ternary(700, 90)):
        first, *others = (solve(name, w, text, **options) for options in counts)
        for other in others:
            assert (first is None) == (other is None)
            assert first is None or (same(first, other) and first.error == other.error)


@pytest.mark.parametrize("text", ["int4.g32", "uint4.g32", "int8.ch"])
def test_layout_and_type_of_the_matrix_do_not_matter(text):
    half = normal(48, 64).astype(np.float16)
    wanted = solve("rtn", half.astype(np.float32), text)
    assert wanted is not None
    big = np.zeros((96, 128), np.float16)
    big[::2, ::2] = half
    for w in (half, np.asfortranarray(half), half.astype(np.float64), big[::2, ::2]):
        found = solve("rtn", w, text)
        assert found is not None and same(found, wanted)


def test_importance_decides_where_the_error_goes():
    w = normal(48, 64)
    importance = np.where(np.arange(64) < 32, 100.0, 0.01).astype(np.float32)
    plain = solve("rtn", w, "int4.ch")
    weighted = solve("rtn", w, "int4.ch", WeightStats(importance=importance))
    assert plain is not None and weighted is not None
    worse, better = (numerics.squared_error(w, q, importance) for q in (plain, weighted))
    assert better < worse
    assert weighted.error == pytest.approx(better, rel=1e-4)


def test_half_scales_are_half_values():
    q = solve("rtn", normal(48, 64), "int4.g32.f16")
    assert q is not None
    assert np.array_equal(q.scale, q.scale.astype(np.float16).astype(np.float32))


def test_ternary_weights_are_exact():
    w = ternary(48, 64)
    q = solve("ternary", w, "int2.ch")
    assert q is not None and q.error == 0
    assert np.array_equal(q.dequantize(), w)
    assert solve("ternary", normal(48, 64), "int2.ch") is None


@pytest.mark.parametrize("label", ["normal", "outlier", "zero-rows", "positive"])
def test_least_squares_ternary_is_the_best_there_is(label):
    w = FILLS[label](12, 7)
    importance = np.random.default_rng(0).uniform(0.1, 3, 7).astype(np.float32)
    for stats in (None, WeightStats(importance=importance)):
        found, plain, exact = (
            solve("ternary", w, "int2.ch", stats, fit=fit)
            for fit in ("least-squares", "absmean", "exact")
        )
        assert found is not None and plain is not None and exact is None
        found.check()
        weights = np.ones(7) if stats is None else importance
        for q in (found, plain):
            assert set(np.unique(q.codes)) <= {-1, 0, 1}
            assert q.error == pytest.approx(numerics.squared_error(w, q, weights), rel=1e-5)
        # Every choice of codes, each with its best scale.
        for row, codes in zip(w.astype(np.float64), found.dequantize(), strict=True):
            best = np.inf
            for tried in itertools.product((-1, 0, 1), repeat=7):
                q = np.array(tried)
                square = (weights * q * q).sum()
                s = (weights * q * row).sum() / square if square else 0.0
                best = min(best, (weights * np.square(row - s * q)).sum())
            off = (weights * np.square(row - codes)).sum()
            assert off <= best * (1 + 1e-5) + 1e-12
        assert found.error <= plain.error * (1 + 1e-6)


def test_ternary_weights_stay_exact_whatever_the_fit():
    w = ternary(48, 64)
    for fit in ("absmean", "least-squares"):
        q = solve("ternary", w, "int2.ch", fit=fit)
        assert q is not None and q.error == 0


@pytest.mark.parametrize("text", ["uint4.g32.asym", "uint2.g16.asym", "uint4.ch.asym"])
@pytest.mark.parametrize("label", ["normal", "outlier", "positive", "tiny"])
def test_hqq_lowers_its_norm_in_every_block(text, label):
    from qgraph.passes.solvers.hqq import Hqq

    w = np.random.default_rng(1).standard_t(3, (40, 90)).astype(np.float32)
    if label != "normal":
        w = FILLS[label](40, 90)
    found, plain = (solve(name, w, text) for name in ("hqq", "rtn"))
    assert found is not None and plain is not None
    found.check()
    ours, theirs = (Hqq().norms(w, q) for q in (found, plain))
    assert (ours <= theirs * (1 + 1e-9)).all()
    if label == "normal":
        assert ours.sum() < 0.999 * theirs.sum()


def test_hqq_refuses_grids_without_zero_points():
    with pytest.raises(errors.RecipeError, match="QG402"):
        registry.get("solver", "hqq")().solve(
            normal(4, 64), QuantSpec.parse("int4.g32"), None, np.random.default_rng(0)
        )


def correlated(k: int, rows: int, seed: int) -> np.ndarray[Any, Any]:
    """The Gram matrix of inputs that lean on each other, some large, some dead."""
    rng = np.random.default_rng([seed, k])
    x = rng.standard_normal((rows, k)) @ (rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k))
    x = x * np.exp(rng.standard_normal(k)) + rng.standard_normal(k)
    x[:, rng.random(k) < 0.05] = 0
    gram: np.ndarray[Any, Any] = x.T @ x / max(rows, 1)
    return gram


def gram_cost(w: Any, q: QTensor, gram: Any) -> np.ndarray[Any, Any]:
    e = np.asarray(w, np.float64) - q.dequantize()
    found: np.ndarray[Any, Any] = np.einsum("nk,nk->n", e @ gram, e)
    return found


def block_cost(w: Any, q: QTensor, gram: Any, group: int) -> np.ndarray[Any, Any]:
    """What each row and group costs by itself."""
    e = np.asarray(w, np.float64) - q.dequantize()
    columns = [slice(i, i + group) for i in range(0, w.shape[1], group)]
    parts = [np.einsum("nk,nk->n", e[:, c] @ gram[c, c], e[:, c]) for c in columns]
    return np.stack(parts, axis=1)


BLOCK_SOLVERS = [n for n in SOLVERS if registry.get("solver", n).statistics == "blocks"]


@pytest.mark.parametrize("sign", ["sym", "asym"])
@pytest.mark.parametrize("grain", ["tensor", "ch", "g16", "g32", "g128"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", BLOCK_SOLVERS)
def test_no_group_is_worse_than_plain_rounding_under_its_block(name, bits, grain, sign):
    text = f"{'' if sign == 'sym' else 'u'}int{bits}.{grain}.{sign}"
    for (n, k), label in itertools.product([(48, 64), (5, 37), (3, 300)], ("normal", "outlier")):
        w, gram = FILLS[label](n, k), correlated(k, 2 * k, n)
        plain, found = (solve(each, w, text, WeightStats(gram=gram)) for each in ("rtn", name))
        assert plain is not None and found is not None
        found.check()
        group = QuantSpec.parse(text).group or k
        cost, bound = block_cost(w, found, gram, group), block_cost(w, plain, gram, group)
        assert found.error == pytest.approx(cost.sum(), rel=1e-6)
        if grain == "tensor":
            cost, bound = cost.sum(), bound.sum()
        assert (cost <= bound * (1 + 1e-6) + 1e-9 * np.trace(gram)).all()
        if bits == 4 and grain != "tensor" and label == "normal" and k < 300:
            assert cost.sum() < 0.97 * bound.sum()


GRAM_SOLVERS = [n for n in SOLVERS if registry.get("solver", n).statistics == "gram"]


@pytest.mark.parametrize("sign", ["sym", "asym"])
@pytest.mark.parametrize("grain", ["tensor", "ch", "g16", "g32", "g64", "g128"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", GRAM_SOLVERS)
def test_no_row_is_worse_than_plain_rounding_under_the_gram_matrix(name, bits, grain, sign):
    text = f"{'' if sign == 'sym' else 'u'}int{bits}.{grain}.{sign}"
    ratios = []
    for (n, k), label in itertools.product([(48, 64), (5, 37), (3, 300)], ("normal", "outlier")):
        w = FILLS[label](n, k)
        # As many rows as columns and more, and far fewer: a Gram matrix without full rank.
        for rows in (2 * k, k // 4):
            gram = correlated(k, rows, n)
            stats = WeightStats(importance=np.diag(gram).astype(np.float32), gram=gram)
            plain, found = (solve(each, w, text, stats) for each in ("rtn", name))
            assert plain is not None and found is not None
            found.check()
            cost, bound = gram_cost(w, found, gram), gram_cost(w, plain, gram)
            slack = 1e-9 * gram_cost(w, plain, np.eye(k)) * np.trace(gram)
            assert (cost <= bound * (1 + 1e-6) + slack).all()
            assert found.error == pytest.approx(cost.sum(), rel=1e-6)
            if label == "normal":
                ratios.append(cost.sum() / bound.sum())
    assert np.mean(ratios) < 0.95


@pytest.mark.parametrize("rows", [300, 4000])
def test_wide_matrices_hold_the_law_without_measuring_every_row(rows):
    w, gram = outlier(40, 1300), correlated(1300, rows, 0)
    stats = WeightStats(importance=np.diag(gram).astype(np.float32), gram=gram)
    plain, found = (solve(name, w, "uint4.g128", stats) for name in ("rtn", "gptq"))
    assert plain is not None and found is not None
    cost, bound = gram_cost(w, found, gram), gram_cost(w, plain, gram)
    assert (cost <= bound * (1 + 1e-3)).all() and cost.sum() < 0.9 * bound.sum()
    assert found.error == pytest.approx(cost.sum(), rel=1e-3)


@pytest.mark.usefixtures("many_tasks")
@pytest.mark.parametrize("name", GRAM_SOLVERS + BLOCK_SOLVERS)
def test_gram_solvers_do_not_depend_on_threads_or_on_what_was_solved_before(name):
    w, gram = normal(700, 96), correlated(96, 300, 0)
    other = WeightStats(gram=correlated(96, 300, 1))
    stats, spec = WeightStats(gram=gram), QuantSpec.parse("uint4.g32")
    rng = np.random.default_rng(0)
    solver = registry.get("solver", name)(threads=3)
    solver.solve(w, spec, other, rng)
    first = solver.solve(w, spec, stats, rng)
    again = registry.get("solver", name)(threads=1).solve(w, spec, stats, rng)
    assert same(first, again) and first.error == again.error


def test_descent_is_better_than_feedback_and_feedback_than_plain_rounding():
    w, gram = normal(96, 256), correlated(256, 1024, 3)
    stats = WeightStats(importance=np.diag(gram).astype(np.float32), gram=gram)
    for text in ("uint4.g32", "int4.g128", "uint2.g64"):
        found = [solve(name, w, text, stats) for name in ("round-descent", "gptq", "rtn")]
        best, middle, worst = (gram_cost(w, q, gram).sum() for q in found if q is not None)
        assert best < 0.97 * middle and middle < 0.8 * worst, text


def test_dead_inputs_and_a_gram_matrix_of_zeros_are_no_obstacle():
    w = normal(8, 64)
    for gram in (np.zeros((64, 64)), np.diag(np.eye(64)[3])):
        q = solve("round-descent", w, "uint4.g32", WeightStats(gram=gram))
        assert q is not None
        q.check()


def test_a_broken_gram_matrix_is_refused():
    for gram, text in ((np.full((64, 64), np.nan), "NaN"), (np.eye(63), r"expected \[64, 64\]")):
        with pytest.raises(ValueError, match=text):
            solve("gptq", normal(8, 64), "uint4.g32", WeightStats(gram=gram))
