"""What the machine can do at a moment: read memory in one stream per thread, and multiply int8 from registers."""

from __future__ import annotations

import ctypes
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qgraph import native


class Probe:
    """What the machine can do at this moment."""

    def __init__(self, threads):
        self.dll = native.load().dll
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.nbytes = 96 << 20
        self.parts = []
        for _ in range(threads):
            # Private: shared memory would get small pages, and the probe would be too slow.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, self.nbytes + (2 << 20), flags=flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            array = np.frombuffer(memory, np.uint8)
            array[:] = 1
            self.parts.append(array[-array.ctypes.data % (2 << 20) :][: self.nbytes])

    def _all(self, call):
        start = time.perf_counter()
        done = sum(self.pool.map(call, range(self.threads)))
        return done / (time.perf_counter() - start)

    def bytes_per_second(self):
        sinks = [ctypes.c_int32() for _ in range(self.threads)]
        return self._all(
            lambda i: self.dll.qg_probe_read(
                self.parts[i].ctypes.data, self.nbytes, ctypes.byref(sinks[i])
            )
        )

    def products_per_second(self):
        sinks = [ctypes.c_int32() for _ in range(self.threads)]
        return self._all(lambda i: self.dll.qg_probe_dot(-1, 500_000, ctypes.byref(sinks[i])))
