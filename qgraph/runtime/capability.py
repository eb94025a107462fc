"""What the installed ONNX Runtime can do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from qgraph import errors

_CONTRIB = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention", "QMoE")
_SCALE_TYPES = {"float", "float16", "bfloat16"}


def capabilities() -> dict[str, Any]:
    """What the installed ONNX Runtime can do, read from its registries and by loading tiny models.

    Returns:
        onnxruntime (version), providers, max_opset and max_ir_version (the highest that load),
        quantize and dequantize (types with a CPU kernel, by the first opset that has them), contrib
        (which of its own quantized operators exist), isa (of our native library, None without it) and
        has_vnni.
    """
    import onnxruntime

    from qgraph import native, schemas

    try:
        isa: str | None = native.load().isa
    except errors.RuntimeFailure:
        isa = None
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "max_opset": _highest(lambda opset: schemas.is_loadable(10, opset), 21),
        "max_ir_version": _highest(lambda version: schemas.is_loadable(version, 21), 10),
        "quantize": _type_opsets("QuantizeLinear"),
        "dequantize": _type_opsets("DequantizeLinear"),
        "contrib": {name: ("com.microsoft", name) in _cpu_kernels() for name in _CONTRIB},
        "isa": isa,
        "has_vnni": isa == "avx512vnni",
    }


@functools.cache
def _cpu_kernels() -> dict[tuple[str, str], list[Any]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels: dict[tuple[str, str], list[Any]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            kernels.setdefault((kernel.domain, kernel.op_name), []).append(kernel)
    return kernels


def _type_opsets(op: str) -> dict[str, int]:
    """Quantized types that an operator's kernels take or make → the first opset that has them."""
    first: dict[str, int] = {}
    for kernel in _cpu_kernels()["", op]:
        for type_name in sorted({t for types in kernel.type_constraints.values() for t in types}):
            name = type_name.removeprefix("tensor(").removesuffix(")")
            if name not in _SCALE_TYPES:
                first[name] = min(first.get(name, kernel.version_range[0]), kernel.version_range[0])
    return dict(sorted(first.items()))


def _highest(is_loadable: Callable[[int], bool], start: int) -> int:
    """The last number from `start` up that loads."""
    number = start
    while is_loadable(number + 1) and number < start + 50:
        number += 1
    return number
