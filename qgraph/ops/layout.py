"""How packed weights lie in memory: tiles of 16 rows, so that one 64-byte load feeds 16 outputs.

A weight W[N, K] is padded to whole tiles of rows and to whole steps (groups, where there are any) of columns.

    INT4     codes uint8 [N/16, K/8, 64]     byte 4r + j of tile t, step s holds W[16t + r, 8s + j] in its low nibble
                                             and W[16t + r, 8s + 4 + j] in its high nibble; code 0..15
    INT3     codes uint8 [N/16, K/16, 96]    bytes 0..63 hold the low two bits as for ternary, byte 64 + i the high bits
                                             of bytes i and i + 32 of these: field f in bit f and in bit 4 + f
    ternary  codes uint8 [N/16, K/16, 64]    byte 4r + j holds W[16t + r, 16s + 4f + j] + 1 in bits 2f, 2f + 1
    scales, zero points [N/16, K/g, 16]      of the 16 rows of a tile, one group after the other

Padding never reaches a result: padded rows are cut off, and padded columns meet activations of zero.
runtime_ops/kernels reads the same bytes; the bodies in `qgraph.ops.bodies` unpack them in ONNX.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ROWS = 16
INT4_STEP = 8
TERNARY_STEP = 16
INT3_STEP = 16
INT4_MIDDLE, INT3_MIDDLE = 8, 4
GROUPS = (16, 32, 64, 128, 256)

Bytes = npt.NDArray[np.uint8]


def padded(size: int, multiple: int) -> int:
    """The next multiple.

    >>> padded(100, 16)
    112
    """
    return -(-size // multiple) * multiple


def int4_columns(k: int, group: int) -> int:
    """Columns that K is padded to; group 0 is the whole row."""
    return padded(k, group or INT4_STEP)


def pack_int4(codes: npt.NDArray[Any], group: int) -> Bytes:
    """Codes [N, K] in 0..15 → [N/16, K/8, 64]. Padding has the code 8."""
    n, k = codes.shape
    rows, columns = padded(n, ROWS), int4_columns(k, group)
    full = np.full((rows, columns), INT4_MIDDLE, np.uint8)
    full[:n, :k] = codes
    halves = full.reshape(rows // ROWS, ROWS, columns // INT4_STEP, 2, 4)
    packed = halves[:, :, :, 0] | halves[:, :, :, 1] << np.uint8(4)
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(rows // ROWS, -1, 64)


def unpack_int4(packed: Bytes, n: int, k: int) -> Bytes:
    """The inverse of `pack_int4`: codes [N, K]."""
    tiles, steps, _ = packed.shape
    halves = np.stack([packed & 15, packed >> 4], axis=2).reshape(tiles, steps, 2, ROWS, 4)
    return halves.transpose(0, 3, 1, 2, 4).reshape(tiles * ROWS, steps * INT4_STEP)[:n, :k]


def pack_int3(codes: npt.NDArray[Any], group: int) -> Bytes:
    """Codes [N, K] in 0..7 → [N/16, K/16, 96]. Padding has the code 4."""
    n, k = codes.shape
    rows, columns = padded(n, ROWS), padded(int4_columns(k, group), INT3_STEP)
    full = np.full((rows, columns), INT3_MIDDLE, np.uint8)
    full[:n, :k] = codes
    tiled = full.reshape(rows // ROWS, ROWS, columns // INT3_STEP, 4, 4).transpose(0, 2, 3, 1, 4)
    fields = tiled.reshape(rows // ROWS, columns // INT3_STEP, 4, 64)
    packed = np.zeros((rows // ROWS, columns // INT3_STEP, 96), np.uint8)
    for f in range(4):
        packed[:, :, :64] |= (fields[:, :, f] & 3) << np.uint8(2 * f)
        high = fields[:, :, f] >> 2
        packed[:, :, 64:] |= high[:, :, :32] << np.uint8(f) | high[:, :, 32:] << np.uint8(4 + f)
    return packed


def unpack_int3(packed: Bytes, n: int, k: int) -> Bytes:
    """The inverse of `pack_int3`: codes [N, K]."""
    tiles, steps, _ = packed.shape
    low, high = packed[:, :, :64], packed[:, :, 64:]
    both = np.concatenate([high & 15, high >> 4], axis=2)
    fields = [low >> np.uint8(2 * f) & 3 | (both >> np.uint8(f) & 1) << 2 for f in range(4)]
    tiled = np.stack(fields, axis=2).reshape(tiles, steps, 4, ROWS, 4).transpose(0, 3, 1, 2, 4)
    return tiled.reshape(tiles * ROWS, steps * INT3_STEP)[:n, :k]


def pack_ternary(weights: npt.NDArray[Any]) -> Bytes:
    """Values [N, K] of {-1, 0, 1} → [N/16, K/16, 64]. Padding has the code 1, a weight of zero."""
    n, k = weights.shape
    rows, columns = padded(n, ROWS), padded(k, TERNARY_STEP)
    full = np.ones((rows, columns), np.uint8)
    full[:n, :k] = weights + 1
    fields = full.reshape(rows // ROWS, ROWS, columns // TERNARY_STEP, 4, 4)
    packed = fields[:, :, :, 0].copy()
    for f in range(1, 4):
        packed |= fields[:, :, :, f] << np.uint8(2 * f)
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(rows // ROWS, -1, 64)


def unpack_ternary(packed: Bytes, n: int, k: int) -> npt.NDArray[np.int8]:
    """The inverse of `pack_ternary`: values [N, K]."""
    tiles, steps, _ = packed.shape
    fields = np.stack([packed >> np.uint8(2 * f) & 3 for f in range(4)], axis=2)
    codes = fields.reshape(tiles, steps, 4, ROWS, 4).transpose(0, 3, 1, 2, 4)
    found: npt.NDArray[np.int8] = codes.reshape(tiles * ROWS, -1)[:n, :k].astype(np.int8) - np.int8(
        1
    )
    return found


def tile_groups(values: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
    """Per-group values [N, G] → [N/16, G, 16]; rows of padding have `fill`."""
    n, groups = values.shape
    full = np.full((padded(n, ROWS), groups), fill, values.dtype)
    full[:n] = values
    return np.ascontiguousarray(full.reshape(-1, ROWS, groups).transpose(0, 2, 1))


def untile_groups(tiled: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """The inverse of `tile_groups`."""
    return tiled.transpose(0, 2, 1).reshape(-1, tiled.shape[1])[:n]
