"""What the solvers with a Gram matrix share: the cost e H eᵀ of an error e, its factors, and the choice row by row.

H is the mean of x xᵀ over the calibration data plus a share of its mean diagonal (damping), so that directions that
the data never showed cost something too. Without a Gram matrix H is diagonal: the importance, or ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import native_rounding, numerics
from qgraph.native_rounding import Rows
from qgraph.solver import WeightStats
from qgraph.spec import Floats, QTensor, QuantSpec

Doubles = npt.NDArray[np.float64]
Way = Callable[[Floats, Rows], "tuple[Rows, Doubles | None]"]
_CHUNK = 1 << 21  # elements of a task
_RETRIES = 6
_BLOCK = 256  # rows of the Cholesky factor made at once
_COLUMNS = 256  # columns of a product that may already decide
_BAND = 128
_ROUGH = 1e-3  # damping from which on float32 is enough for the factor
_EXACT = 1024  # up to so many columns the cost is not taken from float32 sums
_JUDGED = 512  # rows that judge how much of a change is noise
_MARGIN = 1e-3  # relative error that such a sum may have
DAMPING = 0.01  # share of the mean diagonal that is added by default


class Curvature:
    """H and what is made of it, for all weights that read one tensor.

    Attributes:
        gram: [K, K] float64, the mean of x xᵀ.
        damping: share of the mean diagonal that was added, after retries.
        added: what was added to the diagonal.
    """

    def __init__(self, gram: Doubles, damping: float) -> None:
        if not np.isfinite(gram).all():
            raise ValueError("the Gram matrix has NaN or Inf")
        self.gram = gram
        self.damping = damping
        self.added = 0.0
        self.factor, self.roots = self._factored()

    def _factored(self) -> tuple[Floats, Floats]:
        """Row j of Rᵀ over R_jj, as `native_rounding.feedback` wants it, and R_jj [K]: H = R Rᵀ in rounding order."""
        k = len(self.gram)
        # What carries nothing still needs a code: a unit of cost, the same for all.
        mean = float(np.trace(self.gram)) / max(k, 1) or 1.0
        backwards = self.order[::-1].astype(np.int64)  # numpy is four times as slow with int32
        for _ in range(_RETRIES):
            self.added = self.damping * mean
            # Its rounding errors are 1e-6 of the diagonal; where the damping is not far above, float64 has to do.
            for dtype in (np.float32, np.float64) if self.damping > _ROUGH else (np.float64,):
                upper = _reordered(self.gram, backwards, self.added, 1 / mean, dtype)
                try:
                    _factor_in_place(upper)
                except np.linalg.LinAlgError:
                    continue
                diagonal = np.diag(upper)[::-1]
                factor = np.divide(upper[::-1, ::-1], diagonal[:, None], dtype=dtype)
                roots = diagonal.astype(np.float64) * math.sqrt(mean)
                return factor.astype(np.float32, copy=False), roots.astype(np.float32)
            self.damping = max(10 * self.damping, 1e-6)
        raise AssertionError(f"no Cholesky factor with {self.damping} of the mean diagonal added")

    @cached_property
    def order(self) -> npt.NDArray[np.int32]:
        """Columns with the most energy first: their errors are made up for by most others (act-order)."""
        return np.argsort(-np.diag(self.gram), kind="stable").astype(np.int32)

    def times(self, a: Doubles) -> Doubles:
        """A H for some rows A [m, K]; H itself is not stored in float64."""
        found: Doubles = a @ self.gram
        found += self.added * a
        return found

    @cached_property
    def energies(self) -> Floats:
        """[K] float32, R_jj²."""
        return np.square(self.roots)

    def over(self, a: Doubles) -> Doubles:
        """A H⁻¹ for some rows A [m, K], by substitution with the Cholesky factor: no inverse is made."""
        backwards, upper, k = self.order[::-1].astype(np.int64), self._upper, len(self._upper)
        x = a[:, backwards]
        blocks = [slice(start, min(start + _BLOCK, k)) for start in range(0, k, _BLOCK)]
        inverses = [np.linalg.inv(upper[here, here]) for here in blocks]
        for here, inverse in zip(blocks, inverses, strict=True):
            x[:, here] -= x[:, : here.start] @ upper[: here.start, here]
            x[:, here] = x[:, here] @ inverse
        for here, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
            x[:, here] -= x[:, here.stop :] @ upper[here, here.stop :].T
            x[:, here] = x[:, here] @ inverse.T
        found = np.empty_like(x)
        found[:, backwards] = x
        return found

    @cached_property
    def _upper(self) -> Doubles:
        """U in float64, UᵀU = H in reverse rounding order."""
        backwards = self.order[::-1].astype(np.int64)
        upper = np.asarray(
            _reordered(self.gram, backwards, self.added, 1.0, np.float64), np.float64
        )
        _factor_in_place(upper)
        return upper

    def target(
        self, w: npt.NDArray[np.floating[Any]], stats: WeightStats | None
    ) -> npt.NDArray[np.floating[Any]]:
        """The weights w* [N, K] that the rounded ones should be near: w where inputs are those of the float model."""
        if stats is None or stats.cross is None:
            return w
        found = np.empty(w.shape, np.float32)
        difference = stats.cross - self.gram
        for rows in _rows(w):
            found[rows] = w[rows] + self.over(_missing(w, difference, stats, rows))
        return found

    @cached_property
    def single(self) -> Floats:
        """H in float32."""
        single = self.gram.astype(np.float32)
        single.flat[:: len(single) + 1] = np.diag(self.gram) + self.added
        return single

    def group_sums(self, group: int) -> Floats:
        """[G, K] float32: the sum of the rows of H in each group."""
        columns = np.arange(len(self.gram))
        sums = np.add.reduceat(self.gram, columns[::group], axis=0)
        sums[columns // group, columns] += self.added
        return sums.astype(np.float32)

    def compare(self, w: Floats, rows: Rows, found: Doubles) -> Doubles:
        """What each row costs [N] where that is no more than `found`, else inf.

        The cost is a sum over the columns of R: often a few, those of most energy, are more than `found`.
        """
        e = w - rows.dequantize()
        added = self.added * np.einsum("nk,nk->n", e, e, dtype=np.float64)
        left = np.arange(len(e))
        partial = np.zeros(len(e))
        moved = np.empty_like(e)
        for start in range(0, e.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            moved[left, part] = e[left][:, self.order[part].astype(np.int64)]
            some = moved[left, : part.stop] @ self.factor[part, : part.stop].T * self.roots[part]
            partial[left] += np.einsum("nk,nk->n", some, some, dtype=np.float64)
            left = left[partial[left] - added[left] <= found[left] * (1 + _MARGIN)]
        cost = np.full(len(e), np.inf)
        cost[left] = self.cost(w[left], rows.part(left))
        return cost

    def cost(self, w: Floats, rows: Rows) -> Doubles:
        """What each row costs without damping: [N] float64."""
        e = w.astype(np.float64) - rows.dequantize()
        found: Doubles = np.maximum(np.einsum("nk,nk->n", e @ self.gram, e), 0)
        return found


def shrinkage(
    w: npt.NDArray[np.floating[Any]], halves: tuple[WeightStats, WeightStats], damping: float
) -> float:
    """How much of w* - w is worth having, 0..1.

    The least-squares factor, on one half of the samples, for the difference that the other half asks for. Of many rows
    a part says it as well.

    Args:
        w: [N, K] weights.
        halves: what is known from each half of the samples.
        damping: as in Curvature.
    """
    if len(w) > _JUDGED:
        chosen = np.linspace(0, len(w) - 1, _JUDGED).astype(np.int64)
        w = w[chosen]
        first, second = (
            replace(h, offset=None if h.offset is None else h.offset[chosen]) for h in halves
        )
        halves = first, second
    along = square = 0.0
    for here, there in (halves, halves[::-1]):
        assert here.gram is not None and there.gram is not None and there.cross is not None
        found = Curvature(np.asarray(here.gram, np.float64), damping).target(w, here)
        difference = there.cross - there.gram
        for rows in _rows(w):
            change = found[rows].astype(np.float64) - w[rows]
            missing = _missing(w, difference, there, rows)
            along += float(np.einsum("nk,nk->", missing, change))
            square += float(np.einsum("nk,nk->", change @ there.gram, change))
    return min(max(along / square, 0.0), 1.0) if square > 0 else 0.0


def _rows(w: npt.NDArray[np.floating[Any]]) -> Iterator[slice]:
    """Some rows at a time: in float64, products with all of them would take several times as much as the weights."""
    size = max(1, _CHUNK // max(w.shape[1], 1))
    yield from (slice(start, start + size) for start in range(0, len(w), size))


def _missing(
    w: npt.NDArray[np.floating[Any]], difference: Doubles, stats: WeightStats, rows: slice
) -> Doubles:
    """The sum w (G - H) + C for some rows, float64."""
    missing: Doubles = w[rows].astype(np.float64) @ difference
    if stats.offset is not None:
        missing += stats.offset[rows]
    return missing


def _reordered(
    gram: Doubles, order: npt.NDArray[np.int64], added: float, scale: float, dtype: Any
) -> npt.NDArray[np.floating[Any]]:
    """(gram + added on the diagonal) * scale with rows and columns in that order; below the diagonal only zeros."""
    k = len(gram)
    found: npt.NDArray[np.floating[Any]] = np.zeros((k, k), dtype)
    for start in range(0, k, _BAND):
        rows = gram[order[start : start + _BAND]] * scale
        rows.astype(dtype).take(order[start:], 1, out=found[start : start + _BAND, start:])
    found.flat[:: k + 1] += added * scale
    return found


def _factor_in_place(a: npt.NDArray[np.floating[Any]]) -> None:
    """The Cholesky factor U, UᵀU = a, in place of the upper triangle of a [K, K]; below it stay its zeros.

    Block by block, for products of matrices are several times as fast as LAPACK's potrf; blocks of the diagonal in
    float64.

    Raises:
        numpy.linalg.LinAlgError: a is not positive definite.
    """
    n = len(a)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        here = a[start:end, start:end].astype(np.float64)
        diagonal = np.linalg.cholesky(np.triu(here) + np.triu(here, 1).T)
        a[start:end, start:end] = diagonal.T
        if end == n:
            return
        a[start:end, end:] = panel = np.linalg.inv(diagonal).astype(a.dtype) @ a[start:end, end:]
        for row in range(end, n, _BLOCK):
            to = min(row + _BLOCK, n)
            a[row:to, row:] -= panel[:, row - end : to - end].T @ panel[:, row - end :]
            a[row:to, row:to] = np.triu(a[row:to, row:to])


class Prepared:
    """The curvature of the last tensor: weights that share an input come one after the other."""

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._key: Any = None
        self._held: Curvature | None = None

    def of(self, stats: WeightStats | None, k: int) -> Curvature:
        """The curvature for a weight with K columns."""
        key = None if stats is None else stats.gram
        if self._held is None or key is None or key is not self._key:
            self._key, self._held = key, Curvature(_gram(stats, k), self._damping)
        return self._held


def _gram(stats: WeightStats | None, k: int) -> Doubles:
    if stats is None or (stats.gram is None and stats.importance is None):
        return np.eye(k)
    if stats.gram is None:
        assert stats.importance is not None
        return np.diag(stats.importance.astype(np.float64))
    if stats.gram.shape != (k, k):
        raise ValueError(f"gram is {list(stats.gram.shape)}, expected {[k, k]}")
    return np.asarray(stats.gram, np.float64)


def importance(curvature: Curvature) -> Floats:
    """[K] the diagonal of the Gram matrix over a power of two, so that float32 holds its products."""
    diagonal = np.diag(curvature.gram)
    mean = float(diagonal.mean()) if diagonal.size else 0.0
    exponent = math.frexp(mean)[1]
    return np.ldexp(diagonal, -exponent).astype(np.float32)


def unpack(q: QTensor) -> Rows:
    """A solved matrix as rows that native code can change: signed codes where symmetric, else unsigned."""
    q = q.stored_as(signed=q.spec.symmetric)
    n, k = q.shape
    groups = q.spec.scale_shape(n, k)[1]
    scale = np.array(np.broadcast_to(q.scale, (n, groups)), np.float32)
    zero = np.zeros((n, groups), np.float32)
    if q.zero_point is not None:
        zero[:] = q.zero_point
    qtype = q.spec.qtype
    codes: Any = np.array(q.codes)
    return Rows(
        codes, scale, zero, q.spec.group or max(k, 1), qtype.bits, qtype.qmin, qtype.qmax,
        q.spec.scale_dtype,
    )  # fmt: skip


def pack(rows: Rows, asked: QuantSpec, error: float) -> QTensor:
    """The inverse of `unpack`, in the type that was asked for."""
    spec = replace(asked, qtype=asked.storage(signed=asked.symmetric).qtype)
    n, k = rows.codes.shape
    shape = spec.scale_shape(n, k)
    scale = np.ascontiguousarray(rows.scale[: shape[0]])
    zero: Any = None
    if not spec.symmetric:
        zero = np.ascontiguousarray(rows.zero_point[: shape[0]]).astype(spec.qtype.container)
    return QTensor(spec, rows.codes, scale, zero, error).stored_as(signed=asked.qtype.is_signed)


@dataclass(frozen=True)
class Task:
    """One matrix to solve: everything that a row needs, for any number of threads."""

    w: npt.NDArray[np.floating[Any]]
    spec: QuantSpec
    curvature: Curvature
    threads: int

    def improve(self, starts: Sequence[QTensor], ways: Iterable[Way]) -> QTensor:
        """The best of the starts and what each way makes of what came before it, row by row.

        Args:
            starts: never done worse than any of them.
            ways: (w, rows) → other rows and what they cost, if known; each gets the best rows so far.

        Returns:
            What was found; `error` is the sum of e H eᵀ without damping.
        """
        rows, *others = (unpack(start) for start in starts)
        steps = tuple(ways)
        n, k = rows.codes.shape
        # A per-tensor scale is one for all rows: rows may then differ in their codes alone.
        size = max(native_rounding.FEEDBACK_ROWS, _CHUNK // max(k, 1))
        size -= size % native_rounding.FEEDBACK_ROWS

        def solve(first: int) -> float:
            part = slice(first, min(first + size, n))
            w = np.ascontiguousarray(self.w[part], np.float32)
            best = rows.part(part)
            cost: Doubles | None = None
            for way in (*(_given(other.part(part)) for other in others), *steps):
                other, found = way(w, best)
                if found is None:
                    found = self.curvature.cost(w, other)
                    cost = self.curvature.cost(w, best) if cost is None else cost
                elif cost is None:
                    cost = self.curvature.compare(w, best, found)
                better = found < cost
                best.codes[better] = other.codes[better]
                best.scale[better] = other.scale[better]
                best.zero_point[better] = other.zero_point[better]
                cost = np.where(better, found, cost)
            return float((self.curvature.cost(w, best) if cost is None else cost).sum())

        with ThreadPoolExecutor(self.threads or os.cpu_count() or 1) as pool:
            error = math.fsum(pool.map(solve, range(0, n, size)))
        return pack(rows, self.spec, error)

    def feedback(self, w: Floats, rows: Rows) -> tuple[Rows, Doubles | None]:
        """Round again on the grid that the rows have, with feedback."""
        other, h = rows.copy(), self.curvature
        cost = native_rounding.feedback(other, w, h.order, h.factor, h.energies)
        if w.shape[1] <= _EXACT:
            return other, None
        e = w - other.dequantize()
        added = h.added * np.einsum("nk,nk->n", e, e, dtype=np.float64)
        # With less data than columns most of the cost is what damping added: a difference of like numbers.
        return other, None if 2 * added.sum() > cost.sum() else cost - added

    def descend(self, sweeps: int) -> Way:
        """Coordinate descent from the rows as they are."""
        sums = self.curvature.group_sums(self.spec.group or max(self.w.shape[1], 1))

        def way(w: Floats, rows: Rows) -> tuple[Rows, Doubles | None]:
            other = rows.copy()
            e = w.astype(np.float64) - other.dequantize()
            native_rounding.descend(
                other,
                self.curvature.single,
                sums,
                self.curvature.times(e).astype(np.float32),
                fits_scales=not self.spec.is_per_tensor,
                fits_zero_points=not (self.spec.symmetric or self.spec.is_per_tensor),
                sweeps=sweeps,
            )
            return other, None

        return way


def _given(rows: Rows) -> Way:
    """The way that leads to these rows, whatever they cost."""
    return lambda w, best: (rows, None)


def plain_error(w: npt.NDArray[np.floating[Any]], q: QTensor) -> float:
    """Σ (w - q)² without weights, in float64, some rows at a time."""
    n, k = w.shape
    size = max(1, _CHUNK // max(k, 1))
    whole = q.dequantize() if q.spec.is_per_tensor else None
    total = 0.0
    for first in range(0, n, size):
        part = slice(first, first + size)
        if whole is None:
            points = None if q.zero_point is None else q.zero_point[part]
            some = numerics.dequantize(q.codes[part], q.scale[part], points, q.spec)
        else:
            some = whole[part]
        total += float(np.square(w[part].astype(np.float64) - some).sum())
    return total
