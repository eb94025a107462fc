"""Speed of the result: float against qgraph's recipes, interleaved in one process.

    python bench/latency.py [--models tiny-llama,minilm] [--threads 1] [--rounds 30] [--json FILE]

Every model runs on one sequence of 128 tokens (prefill) and of 1 token (as a decoder with a cache does, but without the
cache). Figures are float time over quantized time: the median over rounds, with quartiles. The generated decoder has
random weights, so only its speed means something. MiniLM and stories260K lie below QGRAPH_TEST_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import decoders  # noqa: E402

import qgraph  # noqa: E402
from qgraph import evaluate, files  # noqa: E402

LENGTHS = (128, 1)
VARIANTS = {
    "auto": ("auto", "ort"),
    "int4": ("int4", "ort"),
    "int4-g128": ("int4-g128", "ort"),
    "int8-dynamic": ("int8-dynamic", "ort"),
    "int4 ort-qgraph": ("int4", "ort-qgraph"),
}
MODELS = {
    "tiny-llama": "zoo:tiny-llama",
    "minilm": "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
    "stories260K": "lm/stories260K/stories260K.onnx",
    "decoder 12 x 512": "",
}


def locate(name: str, folder: Path) -> Path:
    """The float model as a file."""
    source = MODELS[name]
    if not source:
        return decoders.write(folder / "float.onnx", decoders.SHAPES["tiny"])
    if source.startswith("zoo:"):
        return files.save(files.load(source), folder / "float.onnx", force=True)
    return Path(os.environ["QGRAPH_TEST_DATA"], source)


def feeds(model: ir.Model, length: int) -> dict[str, npt.NDArray[Any]]:
    """One sequence of random tokens, nothing masked."""
    rng = np.random.default_rng(0)
    found = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if "ids" in name and "type" not in name:
            found[name] = rng.integers(1, 500, (1, length))
        else:
            found[name] = np.full((1, length), int("mask" in name), np.int64)
    return found


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """All variants of one model."""
    with tempfile.TemporaryDirectory(prefix="qgraph-bench-") as folder:
        source = locate(name, Path(folder))
        result: dict[str, Any] = {"float": {"file_bytes": files.file_bytes(source)}}
        for variant, (recipe, target) in VARIANTS.items():
            output = Path(folder, "quantized.onnx")
            qgraph.optimize(source, recipe, target=target, output=output, force=True)
            row: dict[str, Any] = {"file_bytes": files.file_bytes(output)}
            for length in LENGTHS:
                inputs = feeds(ir.load(source), length)
                found = evaluate.latency_ratio(source, output, inputs, rounds, threads=threads)
                row[f"M={length}"] = {
                    "speedup": round(1 / found.ratio, 3),
                    "quartiles": [
                        round(1 / found.upper_quartile, 3),
                        round(1 / found.lower_quartile, 3),
                    ],
                    "float_ms": round(found.seconds_a * 1e3, 3),
                    "quantized_ms": round(found.seconds_b * 1e3, 3),
                }
            result[variant] = row
            figures = ", ".join(f"M={m} {row[f'M={m}']['speedup']:.2f} x" for m in LENGTHS)
            size = row["file_bytes"] / result["float"]["file_bytes"]
            print(
                f"{name:18s} {variant:16s} {figures}, size {size:.2f}", file=sys.stderr, flush=True
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    result: dict[str, Any] = {"threads": given.threads}
    for name in given.models.split(","):
        result[name] = measure(name, given.threads, given.rounds)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
