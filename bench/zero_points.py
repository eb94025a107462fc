"""What float zero points cost: ONNX Runtime's MatMulNBits with zero points as HQQ stores them, against integer ones.

    python bench/zero_points.py [--rounds 15] [--json FILE]

4 bits, groups of 32, accuracy_level 4 (whether set or not, float zero points are not served by the int8 kernel). Prints
how many times slower a product is with float zero points, and against the float MatMul.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qgraph import evaluate
from qgraph.models.builder import FLOAT, Builder

BLOCK = 32
SHAPES = ((1024, 1024), (2048, 5632))
LENGTHS = (1, 16, 128)


def model(k: int, n: int, zero_points: str) -> ir.Model:
    """One product; `zero_points` is "integer", "float", or "none" for a float weight."""
    rng = np.random.default_rng(0)
    b = Builder("product")
    x = b.input("x", FLOAT, ["m", k])
    if zero_points == "none":
        y = b.op("MatMul", x, b.initializer("w", rng.standard_normal((k, n), np.float32)))
    else:
        blocks = k // BLOCK
        points = rng.integers(0, 256, (n, blocks // 2), np.uint8)
        if zero_points == "float":
            both = np.stack([points & 15, points >> 4], axis=-1)
            points = both.reshape(n, blocks).astype(np.float32)
        y = b.ops(
            1,
            "MatMulNBits",
            x,
            b.initializer("b", rng.integers(0, 256, (n, blocks, BLOCK // 2), np.uint8)),
            b.initializer("s", rng.random((n, blocks), np.float32)),
            b.initializer("z", points),
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )[0]
    b.output("y", y, FLOAT, ["m", n])
    made = b.model()
    made.graph.opset_imports["com.microsoft"] = 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    result: dict[str, Any] = {}
    for k, n in SHAPES:
        by_floats, by_integers, plain = (model(k, n, z) for z in ("float", "integer", "none"))
        for m in LENGTHS:
            feeds = {"x": np.random.default_rng(1).standard_normal((m, k), np.float32)}
            found = {}
            for name, reference in (("integer zero points", by_integers), ("float weights", plain)):
                ratio = evaluate.latency_ratio(
                    reference, by_floats, feeds, given.rounds, threads=given.threads
                )
                found[name] = {
                    "times_slower": round(ratio.ratio, 2),
                    "quartiles": [round(ratio.lower_quartile, 2), round(ratio.upper_quartile, 2)],
                }
            result[f"K={k} N={n} M={m}"] = found
            print(f"K={k} N={n} M={m}: float zero points are", end=" ")
            print(
                ", ".join(f"{v['times_slower']} x slower than {name}" for name, v in found.items())
            )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
