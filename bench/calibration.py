"""Calibration: time and memory of qgraph and of ONNX Runtime's calibrators, on the same tensors and samples.

    python bench/calibration.py [--models minilm,mobilenetv2] [--samples N] [--at-once N] [--rounds 1] [--json FILE]

Each run is a process of its own. Methods run by turns, ratios are of medians. `plain` runs the float model on the
samples and drops its outputs: peak memory is told as a multiple of its peak. `/8` is qgraph on an eighth of the
samples: what it needs less is what memory grows with data. The peer keeps the outputs of all samples of one
collect_data call, so it gets 16 at a time; one at a time where they differ in shape, for it cannot stack those.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import numpy as np  # noqa: E402

FILES = {
    "minilm": "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
    "mobilenetv2": "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx",
}
SAMPLES = {"minilm": 512, "mobilenetv2": 256}
AT_ONCE = {"minilm": 1, "mobilenetv2": 16}
METHODS = (
    "plain",
    "qgraph entropy",
    "qgraph mse",
    "qgraph mse /8",
    "ort entropy",
    "ort percentile",
)


def sentences(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """STS-B training sentences, each at its own length."""
    import tokenizers

    folder = data / "encoder" / "minilm_l6_v2"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    with (data / "text" / "stsb" / "stsb-en-train.csv").open() as stream:
        texts = [text for row in csv.reader(stream) for text in row[:2]]
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
    return sentences(data, count) if name == "minilm" else images(data, count)


def plain(name: str, path: str, count: int) -> None:
    """Run the model."""
    from qgraph import runtime

    session = runtime.session(path)
    for each in feeds(name, count):
        session.run(None, each)


def by_qgraph(name: str, path: str, count: int, method: str) -> None:
    """Observe, and choose a grid for every tensor."""
    from qgraph import calibrate, data, files
    from qgraph.observers import Wanted, choose
    from qgraph.passes.observe import observed
    from qgraph.spec import QuantSpec

    model = files.load(path)
    dataset = data.load(lambda: feeds(name, count), data.inputs_of(model))
    stats = calibrate.run(model, dataset, dict.fromkeys(observed(model), Wanted()))
    spec = QuantSpec.parse("uint8.tensor.asym")
    print(len([choose(stats[tensor], spec, method) for tensor in stats]))


def by_ort(name: str, path: str, count: int, method: str, at_once: int) -> None:
    """The peer's calibrator."""
    from onnxruntime.quantization import calibrate as peer

    from qgraph.passes.observe import CARRIERS, WEIGHTED

    kind = {
        "entropy": peer.CalibrationMethod.Entropy,
        "percentile": peer.CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory() as folder:
        calibrator = peer.create_calibrator(
            path, sorted(WEIGHTED | CARRIERS), str(Path(folder) / "augmented.onnx"), kind[method]
        )
        source = feeds(name, count)
        while batch := [each for _, each in zip(range(at_once), source, strict=False)]:
            calibrator.collect_data(_Reader(batch))
        print(len(calibrator.compute_data().data))


class _Reader:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        """The peer's interface."""
        return next(self._left, None)


def one(method: str, name: str, path: str, count: int, at_once: int) -> None:
    """What a child process does."""
    who, *how = method.split()
    if who == "plain":
        plain(name, path, count)
    elif who == "qgraph":
        by_qgraph(name, path, count // 8 if "/8" in how else count, how[0])
    else:
        by_ort(name, path, count, how[0], at_once)


def prepare(name: str, folder: str) -> str:
    """The model with the types and shapes that the peer needs."""
    import onnx

    model = onnx.load(Path(os.environ["QGRAPH_TEST_DATA"]) / FILES[name])
    path = str(Path(folder) / f"{name}.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def main() -> None:
    """Run all methods by turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(FILES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, help="default: 512 sentences, 256 images")
    parser.add_argument("--rounds", type=int, default=1)
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
    """Print and return the medians."""
    base = costs.get("plain") or next(iter(costs.values()))
    rows = {}
    print(
        f"{name}, {count} samples: seconds, peak RSS MiB, peak anonymous MiB, of plain: time, RSS, anonymous"
    )
    for method, found in costs.items():
        seconds, rss, anonymous = (
            [getattr(c, field) for c in found]
            for field in ("seconds", "peak_rss", "peak_anonymous")
        )
        row = {
            "seconds": statistics.median(seconds),
            "rss": statistics.median(rss) / 2**20,
            "anonymous": statistics.median(anonymous) / 2**20,
            "time_ratio": measure.ratio(seconds, [c.seconds for c in base]),
            "rss_ratio": measure.ratio(rss, [c.peak_rss for c in base]),
            "anonymous_ratio": measure.ratio(anonymous, [c.peak_anonymous for c in base]),
            "tensors": found[0].output.strip().splitlines()[-1:],
        }
        rows[method] = row
        shown = [f"{row[k]:9.2f}" for k in list(row)[:6]]
        print(f"  {method:16}", *shown, *row["tensors"], flush=True)
    return rows


if __name__ == "__main__":
    main()
