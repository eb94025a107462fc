"""What the operator Hadamard costs beside copying its tensor once: python bench/hadamard.py

128 MB of float32 that come from memory; both read and write buffers that are there already. Figures are medians over
rounds of the operator's time over the copy's, both with the same number of threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qgraph import ops, runtime
from qgraph.models.builder import FLOAT, Builder
from qgraph.ops import hadamard

NBYTES = 128 << 20
# (columns, columns that are rotated together); sizes that are no powers of two have Paley factors.
CASES = ((4096, 32), (4096, 128), (4096, 4096), (2816, 2816), (5632, 5632), (1536, 768))
BAR = 2.0


def model(rows: int, columns: int, block: int) -> ir.Model:
    """One Hadamard over blocks of the last axis."""
    b = Builder("hadamard")
    x = b.input("x", FLOAT, [rows, columns])
    factor = b.initializer("factor", hadamard.factor(hadamard.split(block)[0]))
    y = b.ops(1, "Hadamard", x, factor, domain=ops.DOMAIN, block_size=block)[0]
    b.output("y", y, FLOAT, [rows, columns])
    made = b.model()
    ops.require(made, "Hadamard")
    return made


def compare(columns: int, block: int, threads: int, rounds: int) -> float:
    """The operator's time over the copy's."""
    rows = NBYTES // 4 // columns
    session = runtime.session(model(rows, columns, block), threads=threads)
    x = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    y, copied = np.ones_like(x), np.ones_like(x)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    cuts = [rows * i // threads for i in range(threads + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    ratios = []
    with ThreadPoolExecutor(threads) as pool:
        for index in range(rounds + 1):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            middle = time.perf_counter()
            list(pool.map(lambda part: np.copyto(copied[part], x[part]), parts))
            if index:
                ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    result = {}
    for threads in map(int, given.threads.split(",")):
        for columns, block in CASES:
            ratio = compare(columns, block, threads, given.rounds)
            result[f"{columns} columns, blocks of {block}, {threads} threads"] = round(ratio, 2)
            verdict = "met" if ratio <= BAR else "MISSED"
            print(
                f"{columns} columns, blocks of {block}, {threads} threads: {ratio:.2f} x a copy "
                f"(at most {BAR}: {verdict})",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
