"""How close the native operators come to the machine and to other engines: python bench/kernels.py --json out.json

All engines run interleaved in one process, each as a graph of several nodes with weights of their own, so that a
product with one row reads cold memory. Numbers are medians of ratios: to what the machine can do (reads of one stream
per thread, and int8 dot products, probed in every round) and to ONNX Runtime's MatMulNBits of the same block.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime

from qgraph import native, ops, runtime

COLD_BYTES = 320 << 20
RNG = np.random.default_rng(0)


@dataclass
class Engine:
    """One kernel: how to write its node, and which engine it is measured against."""

    name: str
    domain: str
    op: str
    weights: object  # (k, n) -> list of constants after X
    attributes: dict
    bits: float
    rival: str = ""
    sizes: bool = True
    session: object = None
    feeds: dict = field(default_factory=dict)
    copies: int = 1

    def build(self, m, k, n, threads, copies):
        """A session of `copies` independent nodes, each with an input of its own."""
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, self.domain: 1}, name="bench")
        model = ir.Model(graph, ir_version=10)
        for i in range(copies):
            x = ir.Value(
                name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([m, k])
            )
            y = ir.Value(
                name=f"y{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([m, n])
            )
            graph.inputs.append(x)
            graph.outputs.append(y)
            inputs = [x]
            for j, array in enumerate(self.weights(k, n)):
                tensor = ir.tensor(array, name=f"w{i}_{j}")
                value = ir.Value(
                    name=tensor.name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(array.shape),
                    const_value=tensor,
                )
                graph.register_initializer(value)
                inputs.append(value)
            sizes = {"N": n, "K": k} if self.sizes else {}
            attributes = [
                ir.convenience.convert_attribute(a, v) for a, v in (sizes | self.attributes).items()
            ]
            graph.append(
                ir.Node(self.domain, self.op, inputs, attributes, outputs=[y], name=f"n{i}")
            )
        if self.domain == ops.DOMAIN:
            ops.require(model, self.op)
        self.session = runtime.session(model, threads=threads)
        self.feeds = {
            f"x{i}": RNG.standard_normal((m, k)).astype(np.float32) for i in range(copies)
        }
        self.copies = copies

    def seconds(self):
        """Time of one node."""
        start = time.perf_counter()
        self.session.run(None, self.feeds)
        return (time.perf_counter() - start) / self.copies


def random_bytes(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def int4(group, block, bits=8):
    def weights(k, n):
        groups = k // group
        return [
            random_bytes(n // 16, k // 8, 64),
            RNG.uniform(0.01, 0.02, (n // 16, groups, 16)).astype(np.float16),
            np.full((1, 1, 1), 8, np.uint8),
            np.zeros(1, np.float32),
        ]

    attributes = {"block_size": group, "activation_bits": bits, "activation_block": block}
    return weights, attributes


def ternary_weights(k, n):
    # Any two bits but 3: clear the high bit where the low one is set.
    codes = random_bytes(n // 16, k // 16, 64)
    codes &= ~((codes & 0x55) << 1)
    return [codes, np.ones(1, np.float32), np.zeros(1, np.float32)]


def nbits(bits, block):
    def weights(k, n):
        scales = RNG.uniform(0.01, 0.02, (n, k // block)).astype(np.float32)
        return [random_bytes(n, k // block, block * bits // 8), scales]

    return weights


def dynamic_weights(k, n):
    return [random_bytes(k, n).view(np.int8), np.full(n, 0.01, np.float32)]


def engines():
    made = []
    for name, group, block, bits, rival in (
        ("int4 g32", 32, 32, 8, "ort nb4 b32"),
        ("int4 g32 a128", 32, 128, 8, "ort nb4 b32"),
        ("int4 g128", 128, 128, 8, "ort nb4 b128"),
        ("int4 g32 float", 32, 0, 0, "ort nb4 b32 float"),
    ):
        weights, attributes = int4(group, block, bits)
        made.append(
            Engine(name, ops.DOMAIN, "MatMulInt4", weights, attributes, 4 + 16 / group, rival)
        )
    attributes = {"activation_bits": 8, "activation_block": 0}
    made.append(
        Engine(
            "ternary", ops.DOMAIN, "MatMulTernary", ternary_weights, attributes, 2, "ort nb2 b64"
        )
    )
    for name, bits, block, level in (
        ("ort nb4 b32", 4, 32, 4),
        ("ort nb4 b128", 4, 128, 4),
        ("ort nb2 b64", 2, 64, 4),
        ("ort nb4 b32 float", 4, 32, 1),
    ):
        attributes = {"bits": bits, "block_size": block, "accuracy_level": level}
        made.append(
            Engine(
                name,
                "com.microsoft",
                "MatMulNBits",
                nbits(bits, block),
                attributes,
                bits + 32 / block,
            )
        )
    made.append(
        Engine(
            "ort dynamic int8",
            "com.microsoft",
            "DynamicQuantizeMatMul",
            dynamic_weights,
            {},
            8,
            sizes=False,
        )
    )
    return made


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


def measure(chosen, m, k, n, threads, rounds):
    """Engine → ratios, as medians over rounds."""
    probe = Probe(threads)
    for engine in chosen:
        nbytes = k * n * engine.bits / 8
        engine.build(m, k, n, threads, max(1, round(COLD_BYTES / nbytes)) if m <= 16 else 1)
        engine.seconds()
    ratios = {e.name: {"of_machine": [], "over_rival": [], "over_dynamic": []} for e in chosen}
    for _ in range(rounds):
        read, dot = probe.bytes_per_second(), probe.products_per_second()
        took = {e.name: e.seconds() for e in chosen}
        for e in chosen:
            memory = k * n * e.bits / 8 / read if m <= 16 else 0.0
            limit = max(memory, m * k * n / dot)
            ratios[e.name]["of_machine"].append(limit / took[e.name])
            if e.rival in took:
                ratios[e.name]["over_rival"].append(took[e.rival] / took[e.name])
            if "ort dynamic int8" in took:
                ratios[e.name]["over_dynamic"].append(took["ort dynamic int8"] / took[e.name])
    for e in chosen:
        e.session, e.feeds = None, {}
    return {
        name: {key: round(statistics.median(values), 3) for key, values in found.items() if values}
        for name, found in ratios.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the ratios to this file")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--shapes", default="4096x4096,4096x11008", help="KxN, ...")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument(
        "--engines", default="", help="parts of names, comma-separated; rivals come along"
    )
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    wanted = [w.strip() for w in given.engines.split(",") if w.strip()]
    chosen = [e for e in engines() if not wanted or any(w in e.name for w in wanted)]
    rivals = {e.rival for e in chosen} - {e.name for e in chosen}
    chosen += [e for e in engines() if e.name in rivals]
    results = []
    for shape in given.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for threads in map(int, given.threads.split(",")):
            for m in map(int, given.rows.split(",")):
                found = measure(chosen, m, k, n, threads, given.rounds)
                results.append({"k": k, "n": n, "threads": threads, "m": m, "engines": found})
                for name, values in found.items():
                    text = " ".join(f"{key} {value:.2f}" for key, value in values.items())
                    print(f"K={k} N={n} threads={threads} M={m} {name}: {text}")
                sys.stdout.flush()
    if given.json:
        about = {"isa": native.load().isa, "onnxruntime": onnxruntime.__version__}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
