"""INT4 weight-only quantization of a decoder: time, memory and weight error of qgraph and of ONNX Runtime's quantizer.

    python bench/quantize.py [--scale 1b] [--rounds 3] [--json FILE]

Each run is a process of its own that loads a float model (weights in external data, in the page cache), quantizes it
in groups of 32 and saves it. Methods run by turns; ratios are of medians. Weight error is measured afterwards, on the
files: the mean over all elements of all MatMul weights of (w - quantized)².
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402

Method = Callable[[str, str], None]


def _qgraph(*overrides: str, **options: Any) -> Method:
    def quantize(source: str, output: str) -> None:
        import qgraph

        qgraph.optimize(source, "int4", target="ort", output=output, overrides=overrides, **options)

    return quantize


def _ort(algorithm: str = "DEFAULT", *, symmetric: bool = False) -> Method:
    def quantize(source: str, output: str) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = None if algorithm == "DEFAULT" else nbits.KQuantWeightOnlyQuantConfig()
        quantizer = nbits.MatMulNBitsQuantizer(
            source,
            bits=4,
            block_size=32,
            is_symmetric=symmetric,
            accuracy_level=4,
            algo_config=config,
        )
        quantizer.process()
        quantizer.model.save_model_to_file(output, use_external_data_format=True)

    return quantize


# The peer quantizes MatMul only, every one to 4 bits; "pure" asks the same of qgraph.
_PURE = ("linear.sensitive_share=0.0", "embedding.weights=float")
METHODS: dict[str, Method] = {
    "qgraph-int4": _qgraph(),
    "qgraph-asym": _qgraph(*_PURE, "linear.weights=uint4.g32.asym"),
    "qgraph-sym": _qgraph(*_PURE, "linear.weights=int4.g32"),
    "qgraph-asym-unchecked": _qgraph(
        *_PURE, "linear.weights=uint4.g32.asym", verify="off", inspect=False
    ),
    "ort-asym": _ort(),
    "ort-sym": _ort(symmetric=True),
    "ort-k_quant": _ort("k_quant"),
}
SLOW = ("ort-k_quant",)  # only on request: minutes for each 100 M parameters
PAIRS = (
    ("ort-asym", "qgraph-asym"),
    ("ort-sym", "qgraph-sym"),
    ("ort-asym", "qgraph-int4"),
    ("ort-asym", "qgraph-asym-unchecked"),
    ("ort-k_quant", "qgraph-asym"),
)


def compare(source: Path, folder: Path, methods: list[str], rounds: int) -> dict[str, Any]:
    """Run the methods by turns, then read the files that they wrote."""
    import weight_error

    costs: dict[str, list[measure.Cost]] = {m: [] for m in methods}
    found: dict[str, Any] = {}
    for turn in range(rounds):
        for method in methods:
            output = folder / f"{method}.onnx"
            _warm(source)
            command = [sys.executable, __file__, "--worker", method, str(source), str(output)]
            costs[method].append(measure.run(command))
            print(f"round {turn + 1} {method}: {_line(costs[method][-1])}", file=sys.stderr)
            if turn == 0:
                found[method] = weight_error.total(weight_error.of(source, output))
                found[method]["file_bytes"] = sum(
                    f.stat().st_size for f in folder.glob(f"{method}.onnx*")
                )
            for file in folder.glob(f"{method}.onnx*"):
                file.unlink()
    for method, runs in costs.items():
        found[method] |= {
            "seconds": [round(c.seconds, 3) for c in runs],
            "seconds_median": statistics.median(c.seconds for c in runs),
            "peak_rss": max(c.peak_rss for c in runs),
            "peak_anonymous": max(c.peak_anonymous for c in runs),
        }
    return {"methods": found, "ratios": _ratios(found)}


def _warm(source: Path) -> None:
    """Read the model's data once, so that no method waits for the disk."""
    with open(f"{source}.data", "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def _line(cost: measure.Cost) -> str:
    return (
        f"{cost.seconds:.1f} s, peak RSS {cost.peak_rss / 1e6:.0f} MB, "
        f"anonymous {cost.peak_anonymous / 1e6:.0f} MB"
    )


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    """How many times as much the peer takes, or errs."""
    ratios = {}
    for peer, ours in PAIRS:
        if peer in found and ours in found:
            a, b = found[peer], found[ours]
            keys = ("seconds_median", "peak_rss", "peak_anonymous", "mse", "file_bytes")
            ratios[f"{peer} / {ours}"] = {k: round(a[k] / b[k], 3) for k in keys}
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", default="1b", help="of bench/decoders.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m not in SLOW))
    parser.add_argument(
        "--folder", type=Path, help="for the models; needs two to three times the float size"
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "SOURCE", "OUTPUT"))
    given = parser.parse_args()
    if given.worker:
        method, source, output = given.worker
        METHODS[method](source, output)
        return
    import decoders

    with tempfile.TemporaryDirectory(dir=given.folder, prefix="qgraph-bench-") as name:
        folder = Path(name)
        shape = decoders.SHAPES[given.scale]
        source = decoders.write(folder / "float.onnx", shape)
        result = compare(source, folder, given.methods.split(","), given.rounds)
    result |= {"scale": given.scale, "parameters": shape.parameters, "cores": os.cpu_count()}
    text = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
