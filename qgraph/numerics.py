"""The one arithmetic of quantization (law 2). Everything that quantizes or dequantizes goes through here.

    x ≈ (q - z) * s          q = saturate(round_half_even(x / s) + z)

as ONNX QuantizeLinear / DequantizeLinear define it. Matrices are [N, K]; scales and zero points have the shape
that `QuantSpec.scale_shape` says and are spread over their blocks by `expand`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.spec import Codes, Floats, QTensor, QuantSpec

FloatArray = npt.NDArray[np.floating[Any]]


def midpoint(spec: QuantSpec) -> int:
    """The code that stands for 0.0 where no zero point is stored."""
    return 0 if spec.qtype.is_signed else 2 ** (spec.qtype.bits - 1)


def expand(per_block: npt.NDArray[Any], spec: QuantSpec, n: int, k: int) -> npt.NDArray[Any]:
    """Spread per-block values over a [n, k] matrix (a broadcastable view where that is enough)."""
    group = spec.group
    if group == 0 or per_block.shape[1] == 1:
        return per_block
    return np.repeat(per_block, group, axis=1)[:, :k]


def quantize(w: FloatArray, scale: Floats, zero_point: Codes | None, spec: QuantSpec) -> Codes:
    """Codes [N, K] of w [N, K] on a given grid: round half to even, saturate."""
    n, k = w.shape
    q = np.rint(w / expand(scale, spec, n, k))
    q += midpoint(spec) if zero_point is None else expand(zero_point.astype(np.float32), spec, n, k)
    np.clip(q, spec.qtype.qmin, spec.qtype.qmax, out=q)
    codes: Codes = q.astype(spec.qtype.container)
    return codes


def dequantize(codes: Codes, scale: Floats, zero_point: Codes | None, spec: QuantSpec) -> Floats:
    """The float32 matrix that codes [N, K] stand for."""
    n, k = codes.shape
    q = codes.astype(np.float32)
    q -= midpoint(spec) if zero_point is None else expand(zero_point.astype(np.float32), spec, n, k)
    q *= expand(scale, spec, n, k)
    return q


def min_max_grid(w: FloatArray, spec: QuantSpec) -> tuple[Floats, Codes | None]:
    """Scale and zero point that just cover each block: the textbook grid that every solver has to beat.

    Symmetric: s = max|w| / qmax'. Asymmetric: s = (max - min) / (2^bits - 1) with 0 inside the range.
    """
    low, high = (_reduce(w, spec, f) for f in (np.minimum, np.maximum))
    qtype = spec.qtype
    if spec.symmetric:
        peak = np.maximum(-low, high)
        scale = to_scale(peak / (2 ** (qtype.bits - 1) - 1), spec)
        return np.where(scale == 0, np.float32(1), scale), None
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = to_scale((high - low) / (qtype.qmax - qtype.qmin), spec)
    scale = np.where(scale == 0, np.float32(1), scale)
    zero_point = np.clip(np.rint(qtype.qmin - low / scale), qtype.qmin, qtype.qmax)
    return scale, zero_point.astype(qtype.container)


def range_grid(low: float, high: float, spec: QuantSpec) -> tuple[float, int]:
    """Scale and zero point of the per-tensor grid that covers [low, high] and 0; `spec.block` is not looked at."""
    scales, zero_points = range_grids(np.array([[low, high]], np.float64), spec)
    return float(scales[0]), int(zero_points[0])


def range_grids(
    ranges: npt.NDArray[np.float64], spec: QuantSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Scales [m] and zero points [m] of per-tensor grids, one for each (low, high) of the ranges [m, 2].

    The arithmetic of `min_max_grid` in float64; the zero point is given where it is not stored either.
    """
    scales, stored = min_max_grid(ranges, replace(spec, block=(1, 0)))
    zero_points = np.full(len(scales), midpoint(spec), np.int64)
    if stored is not None:
        zero_points[:] = stored[:, 0]
    return scales[:, 0].astype(np.float64), zero_points


def to_scale(scale: FloatArray, spec: QuantSpec) -> Floats:
    """Round scales to the type they are stored in, kept as float32. Underflow to 0 becomes the smallest positive."""
    stored = scale.astype(spec.scale_dtype)
    lost = (stored == 0) & (scale != 0)
    if lost.any():
        stored = np.where(
            lost, np.finfo(stored.dtype).tiny * np.sign(scale).astype(stored.dtype), stored
        )
    return stored.astype(np.float32)


def bias_scale(x_scale: float, w_scales: Floats, count: int) -> Floats:
    """Scale of an int32 bias, s_x * s_w: of rank 0 per tensor, [N] per channel."""
    product = (np.float32(x_scale) * w_scales.astype(np.float32)).astype(np.float32)
    return product.reshape(()) if product.size == 1 and count > 1 else product


def bias_codes(bias: FloatArray, scale: Floats) -> npt.NDArray[np.int32]:
    """round(b / s) as int32. Saturates: |b| is then 2^31 steps of the accumulator or more."""
    limits = np.iinfo(np.int32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(codes, limits.min, limits.max).astype(np.int32)


def squared_error(w: FloatArray, q: QTensor, importance: Floats | None = None) -> float:
    """Sum over the matrix of importance[k] * (w - q)², in float64."""
    difference = np.square(w - q.dequantize(), dtype=np.float64)
    return float(difference.sum() if importance is None else (difference * importance).sum())


def sqnr_db(reference: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Signal to quantization noise in dB, 10 log10(Σx² / Σ(x - y)²), in float64; inf where equal."""
    x = np.asarray(reference, np.float64)
    noise = float(np.square(x - np.asarray(other, np.float64)).sum())
    signal = float(np.square(x).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _reduce(w: FloatArray, spec: QuantSpec, ufunc: np.ufunc) -> FloatArray:
    """Reduce each block of w [N, K] to one value; a short last group is allowed."""
    if w.size == 0:
        return np.zeros(spec.scale_shape(*w.shape), w.dtype)
    if spec.is_per_tensor:
        return np.asarray(ufunc.reduce(w, axis=None)).reshape(1, 1)
    starts = [0] if spec.group == 0 else np.arange(0, w.shape[1], spec.group)
    return np.asarray(ufunc.reduceat(w, starts, axis=1))


def pack(codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 2, 4 or 8 bits, flattened in row-major order, `8 // bits` per byte, first code in the low bits.

    The ONNX layout of INT4, UINT4, INT2 and UINT2 tensors; the last byte is padded with zeros.
    """
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    per_byte = 8 // bits
    if flat.size % per_byte:
        flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)])
    # The codes of one byte lie in one little-endian word; each shift brings them closer together.
    words = flat.view(f"<u{per_byte}") & (0x0F0F if bits == 4 else 0x03030303)
    for shift in (4,) if bits == 4 else (6, 12):
        words |= words >> shift
    return words.astype(np.uint8)


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int, *, signed: bool) -> Codes:
    """The inverse of `pack`: the first `count` codes as int8 or uint8 [count]."""
    if bits == 8:
        flat = packed.reshape(-1)[:count]
        return flat.view(np.int8) if signed else flat
    # The steps of `pack`, backwards.
    words = packed.reshape(-1).astype("<u2" if bits == 4 else "<u4")
    for shift, mask in ((4, 0x0F0F),) if bits == 4 else ((12, 0x000F000F), (6, 0x03030303)):
        words |= words << shift
        words &= mask
    codes = words.view(np.uint8)[:count]
    if not signed:
        return codes
    half = np.uint8(2 ** (bits - 1))
    codes ^= half  # in two's complement: flip the sign bit, then take its weight away
    codes -= half
    return codes.view(np.int8)
