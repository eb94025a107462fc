"""The native library's plain C functions: weight search and packing, called through ctypes.

ctypes releases the interpreter lock during a call and the functions keep no state, so callers may
split the rows of a weight over threads. Results do not depend on the split, nor on the CPU: every
instruction set gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors
from qgraph.runtime import library

ABI_VERSION = 6

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]

_REINSTALL = "pip install --force-reinstall qgraph (or pip install . in a source checkout)"
_ASYMMETRIC, _SYMMETRIC, _SYMMETRIC_SIGNED = 0, 1, 2
_BEST_ISA = -1
_STATUS = {1: "invalid argument", 2: "instruction set not available"}

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qg_abi_version": (_int32, []),
    "qg_cpu_isa": (_int32, []),
    "qg_isa_name": (ctypes.c_char_p, [_int32]),
    "qg_isa_is_supported": (_int32, [_int32]),
    "qg_isa_problem": (ctypes.c_char_p, []),
    "qg_rtn_search": (
        _int32,
        [_int32, _pointer, _int64, _int64, _int64, _int32, _int32, _int32, *[_pointer] * 5],
    ),
    "qg_pack": (_int32, [_pointer, _int64, _int64, _int32, _pointer]),
    "qg_matmul": (_int32, [_pointer]),
    "qg_matmul_scratch": (_int64, [_pointer]),
    "qg_feedback": (_int32, [_pointer] * 7),
    "qg_descent": (_int32, [*[_pointer] * 4, *[_int32] * 3, _pointer]),
    "qg_probe_read": (_int64, [_pointer, _int64, _pointer]),
    "qg_probe_dot": (_int64, [_int32, _int64, _pointer]),
}


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded library.

    Attributes:
        path: the file.
        isa: the instruction set in use: "scalar", "avx2", "avx512vnni", "neon" or "neondot".
        isas: those that this CPU can run, each with its number.
        dll: the functions.
    """

    path: str
    isa: str
    isas: dict[str, int]
    dll: ctypes.CDLL


def load() -> Native:
    """The native library, loaded on first use.

    Raises:
        errors.RuntimeFailure: QG603 if it is not installed, QG604 if it cannot be used, QG605 if the
            environment variable QGRAPH_ISA means nothing.
    """
    with _loading:
        return _load(library.library_path())


def rtn_search(
    w: Floats,
    *,
    group: int,
    bits: int,
    symmetric: bool,
    importance: Floats | None = None,
    scale_dtype: str = "float32",
    signed_scale: bool = True,
    isa: str | None = None,
) -> tuple[Codes, Floats, npt.NDArray[np.uint8] | None, npt.NDArray[np.float64]]:
    """Quantize a matrix to nearest with a scale search: w ≈ (codes - zero_point) * scale.

    Minimizes Σ importance[k] * (w - quantized)² in each group, never doing worse than the plain
    min-max grid. Codes equal numerics.quantize of w with the scales and zero points returned.

    Args:
        w: [N, K] float32, C-contiguous, finite.
        group: columns that share a scale; 0 is the whole row. The last group may be short.
        bits: 2, 3, 4, 7 or 8.
        symmetric: codes -2^(bits-1)..2^(bits-1)-1 without zero point, else 0..2^bits-1 with one.
        importance: [K] float32, not negative; all ones by default.
        scale_dtype: "float32", or "float16" for scales that are exact in float16.
        signed_scale: symmetric scales may be negative, so that the lowest code serves the largest
            weight whichever its sign.
        isa: use the kernel of this instruction set.

    Returns:
        codes [N, K] int8 (symmetric) or uint8, scales [N, ceil(K / group)] float32, zero points like
        the scales (uint8, or None if symmetric), and the error of each row [N] float64.
    """
    _require(w, "w", np.float32, 2)
    w = np.require(w, requirements="A")  # weights of a mapped file may lie at any byte
    rows, columns = w.shape
    if bits not in (2, 3, 4, 7, 8):
        raise ValueError(f"bits is {bits}, expected 2, 3, 4, 7 or 8")
    if group < 0:
        raise ValueError(f"group is {group}, expected 0 (the whole row) or more")
    if scale_dtype not in ("float32", "float16"):
        raise ValueError(f"scale_dtype is {scale_dtype!r}, expected float32 or float16")
    if importance is not None:
        _require(importance, "importance", np.float32, 1)
        if importance.shape != (columns,):
            raise ValueError(f"importance is {list(importance.shape)}, expected [{columns}]")
    group = group or max(columns, 1)
    groups = -(-columns // group)
    codes: Codes
    codes = np.empty(w.shape, np.int8) if symmetric else np.empty(w.shape, np.uint8)
    scales = np.empty((rows, groups), np.float32)
    zero_points = None if symmetric else np.empty((rows, groups), np.uint8)
    row_error = np.empty(rows, np.float64)
    native = load()
    if isa is not None and isa not in native.isas:
        raise ValueError(f"isa is {isa!r}; {errors.nearest(isa, native.isas)}")
    status = native.dll.qg_rtn_search(
        _BEST_ISA if isa is None else native.isas[isa],
        w.ctypes.data,
        rows,
        columns,
        group,
        bits,
        _ASYMMETRIC if not symmetric else _SYMMETRIC_SIGNED if signed_scale else _SYMMETRIC,
        scale_dtype == "float16",
        None if importance is None else importance.ctypes.data,
        codes.ctypes.data,
        scales.ctypes.data,
        None if zero_points is None else zero_points.ctypes.data,
        row_error.ctypes.data,
    )
    _check("qg_rtn_search", status)
    return codes, scales, zero_points, row_error


def pack(codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
    """Codes [..., K] of 2, 4 or 8 bits → bytes [..., ceil(K * bits / 8)], first code in the low bits.

    Each row of the last axis starts a new byte; ravel the codes first for the layout of an ONNX tensor
    whose last axis does not fill its bytes. Signed codes are stored in two's complement.

    >>> pack(np.array([[1, 2, 3]], np.uint8), 4).tolist()
    [[33, 3]]
    """
    if codes.dtype not in (np.int8, np.uint8) or codes.ndim < 1 or not codes.flags.c_contiguous:
        raise ValueError(
            f"codes are {_describe(codes)}, expected contiguous int8 or uint8 [..., K]"
        )
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}, expected 2, 4 or 8")
    columns = codes.shape[-1]
    rows = codes.size // columns if columns else 0
    packed = np.empty((*codes.shape[:-1], -(-columns * bits // 8)), np.uint8)
    status = load().dll.qg_pack(codes.ctypes.data, rows, columns, bits, packed.ctypes.data)
    _check("qg_pack", status)
    return packed


_loading = threading.Lock()


@functools.cache
def _load(path: str) -> Native:
    try:
        dll = ctypes.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(dll, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as e:
        message = f"the native library cannot be loaded: {e}"
        raise library.failure("QG604", path, message, _REINSTALL) from e
    found = dll.qg_abi_version()
    if found != ABI_VERSION:
        message = f"the native library has interface {found}, this qgraph needs {ABI_VERSION}"
        raise library.failure("QG604", path, message, _REINSTALL)
    problem = dll.qg_isa_problem()
    if problem is not None:
        raise library.failure(
            "QG605", "", problem.decode(), "unset it to use the best that the CPU has"
        )
    names = {}
    number = 0
    while (name := dll.qg_isa_name(number)) is not None:
        names[number] = name.decode()
        number += 1
    return Native(
        path=path,
        isa=names[dll.qg_cpu_isa()],
        isas={name: i for i, name in names.items() if dll.qg_isa_is_supported(i)},
        dll=dll,
    )


def _require(array: npt.NDArray[Any], name: str, dtype: type[np.generic], ndim: int) -> None:
    if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        expected = f"C-contiguous {np.dtype(dtype).name} with {ndim} dimensions"
        raise ValueError(f"{name} is {_describe(array)}, expected {expected}")


def _describe(array: npt.NDArray[Any]) -> str:
    layout = "" if array.flags.c_contiguous else "strided "
    return f"{layout}{array.dtype}{list(array.shape)}"


def _check(function: str, status: int) -> None:
    if status:
        raise AssertionError(
            f"{function}: {_STATUS.get(status, status)}"
        )  # arguments are checked above
