"""Calibration: time and memory of qgraph and of ONNX Runtime's calibrators, on the same tensors and samples.

    python bench/calibration.py [--models minilm,mobilenetv2] [--samples N] [--at-once N] [--rounds 3] [--json FILE]

Each run is a process of its own, methods run by turns, and ratios are medians of the rounds' ratios. `plain` runs the
float model on the samples and drops its outputs: peak memory is told as a multiple of its peak. `/8` is qgraph on an
eighth of the samples: what it needs less is what memory grows with data. "Calibration" is from the model's file to the
ranges, without starting Python and importing; "CPU" is what all threads of the whole process used, which other work on
the machine disturbs less than the clock.

All get the model as quant_pre_process leaves it. The peer keeps the outputs of all samples of one collect_data call, so
it gets 16 at a time; one at a time where they differ in shape, for it cannot stack those. `minilm` is the first 512
sentences of STS-B, `minilm-drawn` 512 drawn from all of it.
Models and data lie below QGRAPH_TEST_DATA.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import numpy as np  # noqa: E402

FILES = {
    "minilm": "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
    "minilm-drawn": "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
    "mobilenetv2": "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx",
}
SAMPLES = {"minilm": 512, "minilm-drawn": 512, "mobilenetv2": 256}
AT_ONCE = {"minilm": 1, "minilm-drawn": 1, "mobilenetv2": 16}
METHODS = (
    "plain",
    "qgraph entropy",
    "qgraph percentile",
    "qgraph mse",
    "qgraph mse /8",
    "ort entropy",
    "ort percentile",
)


def sentences(data: Path, count: int, *, drawn: bool = False) -> Iterator[dict[str, Any]]:
    """STS-B training sentences, each at its own length."""
    import tokenizers

    folder = data / "encoder" / "minilm_l6_v2"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    with (data / "text" / "stsb" / "stsb-en-train.csv").open() as stream:
        texts = [text for row in csv.reader(stream) for text in row[:2]]
    if drawn:
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    for text in texts[:count]:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        yield {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }


def images(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """ImageNet sample images: centre crop, scaled to -1..1, as the model wants them."""
    import onnx_ir as ir
    from PIL import Image

    first = ir.load(data / FILES["mobilenetv2"]).graph.inputs[0]
    assert first.shape is not None
    is_channels_last = first.shape[-1] == 3
    for path in sorted((data / "images" / "imagenet_sample").glob("*.JPEG"))[:count]:
        image = Image.open(path).convert("RGB")
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        x = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)[None]
        x = (x - 127.5) / 127.5
        yield {
            str(first.name): x
            if is_channels_last
            else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        }


def feeds(name: str, count: int) -> Iterator[dict[str, Any]]:
    """The first samples of a model."""
    data = Path(os.environ["QGRAPH_TEST_DATA"])
    if name == "mobilenetv2":
        return images(data, count)
    return sentences(data, count, drawn=name == "minilm-drawn")


def plain(name: str, path: str, count: int) -> tuple[float, int]:
    """Run the model."""
    from qgraph import runtime

    start = time.perf_counter()
    session = runtime.session(path)
    for each in feeds(name, count):
        session.run(None, each)
    return time.perf_counter() - start, 0


def by_qgraph(name: str, path: str, count: int, method: str) -> tuple[float, int]:
    """Observe, and choose a grid for every tensor; seconds and how many tensors."""
    import onnxruntime  # noqa: F401  (imported before the clock starts, as for the others)

    from qgraph import calibrate, data, files
    from qgraph.observers import Wanted, choose
    from qgraph.passes.observe import observed
    from qgraph.spec import QuantSpec

    start = time.perf_counter()
    model = files.load(path)
    dataset = data.load(lambda: feeds(name, count), data.inputs_of(model))
    stats = calibrate.run(model, dataset, dict.fromkeys(observed(model), Wanted()))
    spec = QuantSpec.parse("uint8.tensor.asym")
    grids = [choose(stats[tensor], spec, method) for tensor in stats]
    return time.perf_counter() - start, len(grids)


def by_ort(name: str, path: str, count: int, method: str, at_once: int) -> tuple[float, int]:
    """The peer's calibrator; seconds and how many tensors."""
    from onnxruntime.quantization import calibrate as peer

    kind = {
        "entropy": peer.CalibrationMethod.Entropy,
        "percentile": peer.CalibrationMethod.Percentile,
    }
    operators = Path(f"{path}.operators").read_text().split()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibrator = peer.create_calibrator(
            path, operators, str(Path(folder) / "augmented.onnx"), kind[method]
        )
        source = feeds(name, count)
        while batch := [each for _, each in zip(range(at_once), source, strict=False)]:
            calibrator.collect_data(_Reader(batch))
        found = len(calibrator.compute_data().data)
    return time.perf_counter() - start, found


class _Reader:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        """The peer's interface."""
        return next(self._left, None)


def one(method: str, name: str, path: str, count: int, at_once: int) -> None:
    """What a child process does; it says how long calibration took, and of how many tensors."""
    who, *how = method.split()
    if who == "plain":
        found = plain(name, path, count)
    elif who == "qgraph":
        found = by_qgraph(name, path, count // 8 if "/8" in how else count, how[0])
    else:
        found = by_ort(name, path, count, how[0], at_once)
    print(*found)


def prepare(name: str, folder: str) -> str:
    """The model as the peer wants it, and beside it the operators whose tensors are calibrated."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from qgraph.passes.observe import CARRIERS, WEIGHTED

    path = Path(folder) / f"{name}.onnx"
    source = Path(os.environ["QGRAPH_TEST_DATA"]) / FILES[name]
    # Symbolic shape inference gives up on MiniLM; the calibrators do not need it.
    quant_pre_process(source, path, skip_symbolic_shape=name.startswith("minilm"))
    Path(f"{path}.operators").write_text(" ".join(sorted(WEIGHTED | CARRIERS)))
    return str(path)


def main() -> None:
    """Run all methods by turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(FILES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, help="default: 512 sentences, 256 images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--at-once", type=int, help="samples that the peer gets at a time")
    parser.add_argument("--one", nargs=5)
    options = parser.parse_args()
    if options.one:
        method, name, path, count, at_once = options.one
        one(method, name, path, int(count), int(at_once))
        return
    result: dict[str, Any] = {}
    for name in options.models.split(","):
        count = options.samples or SAMPLES[name]
        at_once = options.at_once or AT_ONCE[name]
        costs: dict[str, list[measure.Cost]] = {m: [] for m in options.methods.split(",")}
        with tempfile.TemporaryDirectory() as folder:
            path = prepare(name, folder)
            for _ in range(options.rounds):
                for method, found in costs.items():
                    command = [sys.executable, __file__, "--one", method, name, path]
                    command += [str(count), str(at_once)]
                    found.append(measure.run(command))
        result[name] = table(name, count, costs)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2))


def table(name: str, count: int, costs: dict[str, list[measure.Cost]]) -> dict[str, Any]:
    """Print and return medians, and ratios to plain and to the peer's faster calibrator."""
    base = costs.get("plain") or next(iter(costs.values()))
    peers = [costs[m] for m in costs if m.startswith("ort")]
    rows = {}
    titles = "calibration s, whole s, CPU s, RSS MiB, anonymous MiB | to plain: CPU, RSS, anonymous"
    print(f"{name}, {count} samples: {titles} | times the peers' calibration, whole, CPU")
    for method, found in costs.items():
        said = [c.output.strip().splitlines()[-1].split() for c in found]
        of = {
            "calibration": [float(s) for s, _ in said],
            "whole": [c.seconds for c in found],
            "cpu": [c.cpu_seconds for c in found],
            "rss": [c.peak_rss / 2**20 for c in found],
            "anonymous": [c.peak_anonymous / 2**20 for c in found],
        }
        row: dict[str, Any] = {key: statistics.median(values) for key, values in of.items()}
        row["tensors"] = int(said[0][1])
        plain_of = {
            "cpu": [c.cpu_seconds for c in base],
            "rss": [c.peak_rss / 2**20 for c in base],
            "anonymous": [c.peak_anonymous / 2**20 for c in base],
        }
        row["to_plain"] = {k: _ratio(of[k], plain_of[k]) for k in plain_of}
        row["faster_than"] = []
        for peer in peers:
            theirs = {
                "calibration": [float(c.output.strip().splitlines()[-1].split()[0]) for c in peer],
                "whole": [c.seconds for c in peer],
                "cpu": [c.cpu_seconds for c in peer],
            }
            row["faster_than"].append({k: _ratio(theirs[k], of[k]) for k in theirs})
        rows[method] = row
        shown = " ".join(f"{row[k]:8.2f}" for k in of)
        shown += " |" + "".join(f" {v:5.2f}" for v in row["to_plain"].values())
        for each in row["faster_than"]:
            shown += " |" + "".join(f" {v:5.2f}" for v in each.values())
        print(f"  {method:18} {shown} | {row['tensors']} tensors", flush=True)
    return rows


def _ratio(a: list[float], b: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
