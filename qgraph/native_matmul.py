"""The native matrix kernels through ctypes, one call at a time: for tests and benchmarks, not for inference.

Models reach the same code through ONNX Runtime (`runtime_ops/matmul_op.cc`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import native

INT4, TERNARY = 0, 1
ALIGNMENT = 64

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Problem(ctypes.Structure):
    """QgMatMul of runtime_ops/qgraph_ops.h."""

    _fields_ = [
        ("isa", _int32),
        ("format", _int32),
        *((name, _int64) for name in ("m", "n", "k", "group", "activation_bits")),
        ("activation_block", _int64),
        ("codes", _pointer),
        ("scales", _pointer),
        ("scales_are_float16", _int32),
        ("task_order", _int32),
        *((name, _pointer) for name in ("zero_points", "x", "bias", "y", "scratch")),
    ]


def scratch_bytes(problem: Problem) -> int:
    """Scratch memory that a problem needs.

    Raises:
        ValueError: its sizes are not valid, or this CPU lacks the instruction set.
    """
    needed = int(native.load().dll.qg_matmul_scratch(ctypes.byref(problem)))
    if needed < 0:
        raise ValueError("the kernels do not take these sizes")
    return needed


def run(problem: Problem) -> int:
    """Compute; returns the status."""
    return int(native.load().dll.qg_matmul(ctypes.byref(problem)))


def matmul(
    x: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[Any],
    zero_points: npt.NDArray[np.uint8] | None = None,
    bias: npt.NDArray[np.float32] | None = None,
    *,
    n: int,
    format: int = INT4,
    group: int = 0,
    activation_bits: int = 8,
    activation_block: int = 0,
    isa: str | None = None,
    is_reversed: bool = False,
) -> npt.NDArray[np.float32]:
    """X [m, k] times packed weights: [m, n]. Scales of ternary weights are [tiles * 16].

    Raises:
        ValueError: the kernels do not take these sizes.
    """
    m, k = x.shape
    y = np.empty((m, n), np.float32)
    isas = native.load().isas
    problem = Problem(
        isa=-1 if isa is None else isas[isa],
        format=format,
        m=m,
        n=n,
        k=k,
        group=group,
        activation_bits=activation_bits,
        activation_block=activation_block,
        codes=codes.ctypes.data,
        scales=scales.ctypes.data,
        scales_are_float16=scales.dtype == np.float16,
        task_order=is_reversed,
        zero_points=None if zero_points is None else zero_points.ctypes.data,
        x=x.ctypes.data,
        bias=None if bias is None else bias.ctypes.data,
        y=y.ctypes.data,
    )
    scratch = np.empty(scratch_bytes(problem) + ALIGNMENT, np.uint8)
    problem.scratch = scratch.ctypes.data + -scratch.ctypes.data % ALIGNMENT
    if run(problem):
        raise ValueError("the kernels do not take these sizes")
    return y
