"""ggml's matrix product as an engine of bench/kernels.py, where `pip install llama-cpp-python` has built it.

The package brings ggml as shared libraries; their C interface is called through ctypes. Weights lie in the buffer type
that llama.cpp itself chooses: repacked for this CPU where ggml has a layout for the type, else plain. (q4_K is there in
both, since many rows are faster plain.)
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from engines import RNG, Engine

GRAPH_BYTES = 64 << 20
# Names of ggml's types → their numbers in ggml.h, bits per weight, and whether ggml repacks them.
TYPES = {
    "q4_0": (2, 4.5, True),
    "q4_K": (12, 4.5, True),
    "q4_K plain": (12, 4.5, False),
    "tq2_0": (35, 2.0625, False),
}


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class _Ggml:
    """The few functions that are needed, with pointers as results."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "lib"
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        # C++ linkage in these releases; its name follows from the declaration in repack.h.
        self.repack_type = self._function(self._cpu, "_Z35ggml_backend_cpu_repack_buffer_typev")
        self.plain_type = self._function(self._cpu, "ggml_backend_cpu_buffer_type")
        self.backend = self._function(self._cpu, "ggml_backend_cpu_init")()

    @staticmethod
    def _function(library: ctypes.CDLL, name: str) -> Any:
        found = getattr(library, name)
        found.restype = ctypes.c_void_p
        return found

    def context(self) -> int:
        """A context for tensors whose data lies elsewhere."""
        init = self._function(self._base, "ggml_init")
        return int(init(_InitParams(GRAPH_BYTES, None, True)))

    def tensor(self, context: int, kind: int, columns: int, rows: int) -> int:
        make = self._function(self._base, "ggml_new_tensor_2d")
        c64 = ctypes.c_int64
        return int(make(ctypes.c_void_p(context), kind, c64(columns), c64(rows)))

    def product(self, context: int, w: int, x: int) -> int:
        multiply = self._function(self._base, "ggml_mul_mat")
        return int(multiply(*map(ctypes.c_void_p, (context, w, x))))

    def place(self, context: int, buffer_type: int) -> int:
        """Allocate all tensors of a context; the buffer they lie in."""
        allocate = self._function(self._base, "ggml_backend_alloc_ctx_tensors_from_buft")
        buffer = allocate(ctypes.c_void_p(context), ctypes.c_void_p(buffer_type))
        if not buffer:
            raise MemoryError("ggml has no room for the tensors")
        return int(buffer)

    def fill(self, tensor: int, data: np.ndarray) -> None:
        held = np.ascontiguousarray(data)
        pointer = held.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(held.nbytes)
        self._base.ggml_backend_tensor_set(
            ctypes.c_void_p(tensor), pointer, ctypes.c_size_t(0), size
        )

    def quantized(self, kind: int, weights: np.ndarray) -> np.ndarray:
        n, k = weights.shape
        out = np.empty(weights.nbytes, np.uint8)
        quantize = self._base.ggml_quantize_chunk
        quantize.restype = ctypes.c_size_t
        c64 = ctypes.c_int64
        used = quantize(
            kind, weights.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
            c64(0), c64(n), c64(k), None,
        )  # fmt: skip
        return out[:used]

    def graph(self, context: int, results: list[int]) -> int:
        made = self._function(self._base, "ggml_new_graph")(ctypes.c_void_p(context))
        for result in results:
            self._base.ggml_build_forward_expand(ctypes.c_void_p(made), ctypes.c_void_p(result))
        return int(made)

    def threads(self, count: int) -> None:
        self._cpu.ggml_backend_cpu_set_n_threads(ctypes.c_void_p(self.backend), count)

    def compute(self, graph: int) -> None:
        status = self._base.ggml_backend_graph_compute(
            ctypes.c_void_p(self.backend), ctypes.c_void_p(graph)
        )
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute gave {status}")

    def free(self, context: int, buffer: int) -> None:
        self._base.ggml_backend_buffer_free(ctypes.c_void_p(buffer))
        self._base.ggml_free(ctypes.c_void_p(context))


class _Products:
    """Independent products in one graph; `free` gives their memory back."""

    def __init__(
        self, ggml: _Ggml, type_name: str, m: int, k: int, n: int, threads: int, copies: int
    ) -> None:
        kind, _, repacked = TYPES[type_name]
        self._ggml, self._threads = ggml, threads
        held, others = ggml.context(), ggml.context()
        weights = [ggml.tensor(held, kind, k, n) for _ in range(copies)]
        buffer = ggml.place(held, ggml.repack_type() if repacked else ggml.plain_type())
        self._placed = [(held, buffer)]
        codes = ggml.quantized(kind, RNG.standard_normal((n, k), np.float32))
        for w in weights:
            ggml.fill(w, codes)
        inputs = [ggml.tensor(others, 0, k, m) for _ in range(copies)]
        results = [ggml.product(others, w, x) for w, x in zip(weights, inputs, strict=True)]
        self._graph = ggml.graph(others, results)
        self._placed.append((others, ggml.place(others, ggml.plain_type())))
        for x in inputs:
            ggml.fill(x, RNG.standard_normal((m, k), np.float32))

    def free(self) -> None:
        for context, buffer in self._placed:
            self._ggml.free(context, buffer)

    def run(self, _names: None, _feeds: object) -> None:
        self._ggml.threads(self._threads)
        self._ggml.compute(self._graph)


class Ggml(Engine):
    """ggml's product with weights of one of its types."""

    def build(self, m, k, n, threads, copies):
        """A graph of independent products."""
        self.close()
        self.session = _Products(
            _library(), self.name.removeprefix("ggml "), m, k, n, threads, copies
        )
        self.copies = copies

    def close(self):
        """Give the memory back."""
        if self.session is not None:
            self.session.free()
        super().close()


@functools.cache
def _library() -> _Ggml:
    return _Ggml()


def engines() -> list[Engine]:
    """One engine per type, or none where the package is missing."""
    if not available():
        return []
    return [Ggml(f"ggml {name}", "", "", None, {}, bits) for name, (_, bits, _) in TYPES.items()]
