"""Rounding under a Gram matrix in the native library: feedback (GPTQ) and coordinate descent, rows at a time.

The functions change the grid that they are given, release the interpreter lock and keep no state, so rows may be
split over threads. Results do not depend on the split, nor on the instruction set.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors, native
from qgraph.spec import Codes, Floats

FEEDBACK_ROWS = 128

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Rounding(ctypes.Structure):
    """QgRounding of runtime_ops/qgraph_ops.h."""

    _fields_ = [
        *((name, _int32) for name in ("isa", "bits", "codes_are_signed", "scale_is_float16")),
        *((name, _int64) for name in ("rows", "cols", "group")),
        *((name, _pointer) for name in ("codes", "scales", "zero_points")),
        *((name, ctypes.c_float) for name in ("low", "high")),
    ]


@dataclass(slots=True)
class Rows:
    """Rows of a quantized matrix, changed in place: w ≈ (codes - zero_point) * scale.

    Attributes:
        codes: [N, K] int8 or uint8.
        scale: [N, G] float32, one for each `group` columns.
        zero_point: [N, G] float32 whole numbers; zeros where codes are symmetric around 0.
        group: columns that share a scale; the last group may be short.
        bits: 2, 3, 4, 7 or 8.
        low, high: smallest and largest code.
        scale_dtype: "float32" or "float16".
    """

    codes: Codes
    scale: Floats
    zero_point: Floats
    group: int
    bits: int
    low: int
    high: int
    scale_dtype: str = "float32"

    def part(self, rows: slice | npt.NDArray[np.intp]) -> Rows:
        """Some rows: a view where they are a slice."""
        return Rows(
            self.codes[rows], self.scale[rows], self.zero_point[rows],
            self.group, self.bits, self.low, self.high, self.scale_dtype,
        )  # fmt: skip

    def copy(self) -> Rows:
        """The same rows in memory of their own."""
        return Rows(
            self.codes.copy(), self.scale.copy(), self.zero_point.copy(),
            self.group, self.bits, self.low, self.high, self.scale_dtype,
        )  # fmt: skip

    def dequantize(self) -> Floats:
        """The float32 matrix [N, K]; the arithmetic of `numerics.dequantize`."""
        k = self.codes.shape[1]
        q = self.codes.astype(np.float32)
        q -= np.repeat(self.zero_point, self.group, axis=1)[:, :k]
        q *= np.repeat(self.scale, self.group, axis=1)[:, :k]
        return q


def feedback(
    rows: Rows,
    w: Floats,
    order: npt.NDArray[np.int32],
    factor: Floats,
    energies: Floats | None = None,
    isa: str | None = None,
) -> npt.NDArray[np.float64]:
    """Give `rows` codes for w on the grid that it has, each column making up for the errors before it.

    Args:
        rows: scales and zero points are read, codes are written.
        w: [N, K] float32, C-contiguous.
        order: [K] the columns as they are rounded.
        factor: [K, K] float32 in that order; row j says what the errors before j add to column j.
        energies: [K] float32 in that order, R_jj² of the Gram matrix R Rᵀ.
        isa: use the kernel of this instruction set.

    Returns:
        [N] what each row costs, e R Rᵀ eᵀ; empty without energies.
    """
    n, k = rows.codes.shape
    _expect(w, "w", np.float32, (n, k))
    _expect(order, "order", np.int32, (k,))
    _expect(factor, "factor", np.float32, (k, k))
    cost = np.zeros(0 if energies is None else n, np.float64)
    if energies is not None:
        _expect(energies, "energies", np.float32, (k,))
    scratch = np.empty((k, FEEDBACK_ROWS), np.float32)
    status = native.load().dll.qg_feedback(
        ctypes.byref(_problem(rows, isa)),
        _at(w),
        _at(order),
        _at(factor),
        None if energies is None else _at(energies),
        None if energies is None else _at(cost),
        _at(scratch),
    )
    _check("qg_feedback", status)
    return cost


def descend(
    rows: Rows,
    gram: Floats,
    group_sums: Floats,
    gradient: Floats,
    *,
    fits_scales: bool,
    fits_zero_points: bool,
    sweeps: int,
    isa: str | None = None,
) -> None:
    """Improve codes and, if asked, scales and zero points, one at a time, until nothing changes.

    Args:
        rows: changed in place.
        gram: [K, K] float32, symmetric.
        group_sums: [G, K] float32, the sum of the rows of `gram` that each group has.
        gradient: [N, K] float32, (w - quantized) @ gram; changed to that of the result.
        fits_scales: refit scales by least squares.
        fits_zero_points: move zero points by whole steps.
        sweeps: at most so many rounds.
        isa: use the kernel of this instruction set.
    """
    n, k = rows.codes.shape
    _expect(gram, "gram", np.float32, (k, k))
    _expect(group_sums, "group_sums", np.float32, (rows.scale.shape[1], k))
    _expect(gradient, "gradient", np.float32, (n, k))
    if sweeps < 0:
        raise ValueError(f"sweeps is {sweeps}, expected 0 or more")
    scratch = np.empty(k, np.float32)
    status = native.load().dll.qg_descent(
        ctypes.byref(_problem(rows, isa)),
        _at(gram),
        _at(group_sums),
        _at(gradient),
        fits_scales,
        fits_zero_points,
        sweeps,
        _at(scratch),
    )
    _check("qg_descent", status)


def _problem(rows: Rows, isa: str | None) -> _Rounding:
    n, k = rows.codes.shape
    groups = -(-k // rows.group) if rows.group > 0 else 0
    if rows.codes.dtype not in (np.int8, np.uint8) or not rows.codes.flags.c_contiguous:
        raise ValueError(f"codes are {rows.codes.dtype}, expected contiguous int8 or uint8")
    _expect(rows.scale, "scale", np.float32, (n, groups))
    _expect(rows.zero_point, "zero_point", np.float32, (n, groups))
    known = native.load().isas
    if isa is not None and isa not in known:
        raise ValueError(f"isa is {isa!r}; {errors.nearest(isa, known)}")
    return _Rounding(
        isa=-1 if isa is None else known[isa],
        bits=rows.bits,
        codes_are_signed=rows.codes.dtype == np.int8,
        scale_is_float16=rows.scale_dtype == "float16",
        rows=n,
        cols=k,
        group=rows.group,
        codes=_at(rows.codes),
        scales=_at(rows.scale),
        zero_points=_at(rows.zero_point),
        low=rows.low,
        high=rows.high,
    )


def _expect(
    array: npt.NDArray[Any], name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        found = f"{'' if array.flags.c_contiguous else 'strided '}{array.dtype}{list(array.shape)}"
        expected = f"C-contiguous {np.dtype(dtype).name}{list(shape)}"
        raise ValueError(f"{name} is {found}, expected {expected}")


def _at(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _check(function: str, status: int) -> None:
    if status:
        raise ValueError(f"{function} refuses the grid: bits, range of codes or order of columns")
