"""A whole decoder, token by token and a prompt at once, in every engine's 4-bit form: python bench/decoder.py

12 layers, hidden 1024, generated weights, keys and values of earlier tokens as inputs. Decode is one token behind 128,
prefill 128 tokens behind none. All linear weights have 4 bits, symmetric; the table of tokens int8. Engines:

    float       ONNX Runtime, float32
    ort b128    ONNX Runtime's MatMulNBits, groups of 128, accuracy_level 4
    ort int8    ONNX Runtime's dynamic int8 (DynamicQuantizeMatMul)
    qgraph g32  MatMulInt4, groups of 32 of weights and of activations
    qgraph g128 MatMulInt4, groups of 128
    rotated     the same, rotated, with Hadamard transforms of 128 columns before the down projections
    openvino    OpenVINO, int4 weights in groups of 128, precision hint f32

All run interleaved in one process; figures are medians over rounds of a rival's time over the engine's. Thread pools of
ONNX Runtime stop spinning when a run ends, or they would take the next engine's cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import decoders  # noqa: E402

import qgraph  # noqa: E402
from qgraph import runtime  # noqa: E402
from qgraph.recipe import ROTATED_PIPELINE  # noqa: E402

Feeds = Mapping[str, npt.NDArray[Any]]
_PURE = ["linear.sensitive_share=0.0"]
# Recipe, target, overrides.
ENGINES: dict[str, tuple[str, str, list[str]]] = {
    "ort b128": ("int4-g128", "ort", [*_PURE, "linear.weights=int4.g128"]),
    "ort int8": ("int8-dynamic", "ort", []),
    "qgraph g32": ("w4a8", "ort-qgraph", ["linear.weights=int4.g32.f16"]),
    "qgraph g128": ("w4a8", "ort-qgraph", ["linear.weights=int4.g128.f16"]),
    "rotated": (
        "w4a8",
        "ort-qgraph",
        [
            "linear.weights=int4.g128.f16",
            f"pipeline={','.join(ROTATED_PIPELINE)}",
            "options.rotate.online=128",
        ],
    ),
    "openvino": ("int4-g128", "openvino", [*_PURE, "linear.weights=int4.g128"]),
}
BARS = (  # engine, rival, phase, at least
    ("qgraph g128", "ort b128", "decode", 1.2),
    ("qgraph g128", "ort b128", "prefill", 1.8),
    ("qgraph g128", "openvino", "decode", 1.0),
    ("qgraph g128", "openvino", "prefill", 1.0),
    ("rotated", "qgraph g128", "decode", 0.95),
    ("rotated", "qgraph g128", "prefill", 0.95),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=decoders.SHAPES, default="quick")
    parser.add_argument("--engines", default=",".join(["float", *ENGINES]))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--past", type=int, default=128, help="tokens before the one decoded")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prefill")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    shape = decoders.SHAPES[given.shape]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qgraph-bench-") as folder:
        paths = prepare(shape, given.engines.split(","), Path(folder))
        phases = {"decode": (1, given.past), "prefill": (given.prompt, 0)}
        for threads in map(int, given.threads.split(",")):
            runs = {name: engine(name, path, threads) for name, path in paths.items()}
            for phase, (length, past) in phases.items():
                times = interleaved(runs, feeds(shape, length, past), given.rounds)
                result[f"{phase}, {threads} threads"] = report(phase, threads, times, length)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def prepare(shape: decoders.Shape, engines: list[str], folder: Path) -> dict[str, Path]:
    """Every engine's model on disk."""
    source = decoders.write(folder / "float.onnx", shape, cache=True)
    paths = {"float": source} if "float" in engines else {}
    for name in engines:
        if name in ENGINES:
            recipe, target, overrides = ENGINES[name]
            output = folder / f"{name.replace(' ', '-')}.onnx"
            print(f"writing {name}", file=sys.stderr, flush=True)
            qgraph.optimize(
                source, recipe, target=target, overrides=overrides, output=output,
                verify="off", inspect=False,
            )  # fmt: skip
            paths[name] = output
    return paths


def engine(name: str, path: Path, threads: int) -> Callable[[Feeds], Any]:
    """A function that runs the model once."""
    if name != "openvino":
        config = {"session.force_spinning_stop": "1"}
        session = runtime.session(path, threads=threads, config=config)
        return lambda feeds: session.run(None, dict(feeds))
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    return lambda feeds: request.infer(dict(feeds), share_inputs=True, share_outputs=True)


def feeds(shape: decoders.Shape, length: int, past: int) -> Feeds:
    """`length` random tokens behind `past` others."""
    rng = np.random.default_rng(0)
    made = {"input_ids": rng.integers(0, shape.vocabulary, (1, length), np.int64)}
    for i in range(shape.layers):
        for part in ("key", "value"):
            dims = (1, shape.key_heads, past, shape.head_dim)
            made[f"past.{i}.{part}"] = rng.standard_normal(dims, np.float32)
    return made


def interleaved(
    runs: Mapping[str, Callable[[Feeds], Any]], given: Feeds, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each engine in each round; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(given)
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def report(
    phase: str, threads: int, times: Mapping[str, list[float]], length: int
) -> dict[str, Any]:
    """Print and return how much faster each engine is than each of its rivals."""
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        over = {
            rival: round(statistics.median(b / a for a, b in zip(seconds, theirs, strict=True)), 2)
            for rival, theirs in times.items()
            if rival != name
        }
        found[name] = {"tokens_per_second": round(length / statistics.median(seconds), 1)} | over
        told = ", ".join(f"{ratio} x {rival}" for rival, ratio in over.items())
        print(f"{phase}, {threads} threads, {name}: {told}", flush=True)
    for ours, rival, when, least in BARS:
        if when == phase and rival in found.get(ours, {}):
            ratio = found[ours][rival]
            verdict = "met" if ratio >= least else "MISSED"
            print(f"  bar: {ours} at least {least} x {rival}: {ratio}, {verdict}", flush=True)
    return found


if __name__ == "__main__":
    main()
