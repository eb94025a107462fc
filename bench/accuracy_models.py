"""The labelled models of bench/accuracy.py: where they lie, what measures them, what calibrates them.

Calibration samples are disjoint from those that are measured. Each is one feeds dict, as `qgraph.data` takes it.
"""

from __future__ import annotations

import csv
import os
import sys
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))
import real_data

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        path: below QGRAPH_TEST_DATA.
        task: name in tests/e2e/baselines.py.
        limit: how many samples are measured, None for all.
        figure: the metric that tools are ranked by.
        samples: yields what to calibrate on.
        better: +1 where more of the figure is better, -1 where less is.
        kind: "conv", "transformer" or "recurrent", for tools that want to be told.
        scale: what one point of the figure is.
    """

    path: str
    task: str
    limit: int | None
    figure: str
    samples: Callable[[], Iterator[Feeds]]
    better: int = 1
    kind: str = "conv"
    scale: float = 0.01

    @property
    def file(self) -> Path:
        return Path(os.environ["QGRAPH_TEST_DATA"], self.path)


def _cifar(size: int | None, name: str) -> Callable[[], Iterator[Feeds]]:
    def samples() -> Iterator[Feeds]:
        from PIL import Image

        with np.load(real_data.data("images/cifar10/cifar10_train_calib.npz")) as file:
            images = file["x"][np.random.default_rng(0).permutation(len(file["x"]))[:128]]
        for image in images:
            if size is not None:
                resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
                image = np.asarray(resized)
            yield {name: real_data.normalized(image[None])}

    return samples


def _imagenet(name: str, prepare: Callable[[Any], Any]) -> Callable[[], Iterator[Feeds]]:
    def samples() -> Iterator[Feeds]:
        for index, (image, _) in enumerate(real_data.imagenet(prepare, 0, 500)):
            if index >= 500 - 64:
                yield {name: np.asarray(image, np.float32)}

    return samples


def _centred(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return ((images.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)


def _faces() -> Iterator[Feeds]:
    """Everyday photographs; the detector's own are measured."""
    from PIL import Image

    folder = real_data.data("images/imagenet_sample")
    for path in sorted(folder.glob("*.JPEG"))[::16]:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((320, 240), Image.Resampling.BICUBIC)
        yield {"input": ((np.asarray(small, np.float32) - 127) / 128).transpose(2, 0, 1)[None]}


def _digits() -> Iterator[Feeds]:
    for index, (image, _) in enumerate(real_data.digits(None)):
        if index >= 9800:
            yield {"Input3": image}


def _sentences() -> Iterator[Feeds]:
    """128 sentences of STS-B's training part in padded batches."""
    with real_data.data("text/stsb/stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        sentences = [row[0] for row in csv.reader(file)][:128]
    for _, feeds in real_data.sentence_batches(sentences, 8):
        yield dict(feeds)


def _speech() -> Iterator[Feeds]:
    """Every third frame of seconds 30 to 45, with the state that the float model carries."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(MODELS["silero"].file))
    with wave.open(str(real_data.data("other/silero_vad/test.wav"))) as file:
        file.setpos(480_000)
        samples = np.frombuffer(file.readframes(240_000), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(64, np.float32), samples])
    state = np.zeros((2, 1, 128), np.float32)
    for index, start in enumerate(range(0, len(samples) - 511, 512)):
        feeds = {
            "input": padded[None, start : start + 576],
            "state": state,
            "sr": np.asarray(16000, np.int64),
        }
        if index % 3 == 0:
            yield feeds
        state = session.run(["stateN"], feeds)[0]


def _files() -> Iterator[Feeds]:
    """Windows of text files of other tests: none of the reference examples."""
    rng = np.random.default_rng(0)
    texts = [real_data.data("text/tinystories/tinystories_0_699.json").read_bytes()]
    texts += [p.read_bytes() for p in sorted(real_data.data("text").rglob("*.csv"))]
    texts += [p.read_bytes() for p in sorted(real_data.data("vision").rglob("*.onnx"))[:4]]
    texts += [p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))]
    for index in range(64):
        content = texts[index % len(texts)]
        start = int(rng.integers(0, max(1, len(content) - 2048)))
        part = content[start : start + int(rng.integers(200, 20000))]
        features = np.full((1, 2048), 256, np.int32)
        head, tail = part[:4096].lstrip()[:1024], part[-4096:].rstrip()[-1024:]
        features[0, : len(head)] = np.frombuffer(head, np.uint8)
        features[0, 2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
        yield {"bytes": features}


def _input_name(path: str) -> str:
    import onnx

    graph = onnx.load(
        str(Path(os.environ.get("QGRAPH_TEST_DATA", "."), path)), load_external_data=False
    ).graph
    constants = {i.name for i in graph.initializer}
    return next(i.name for i in graph.input if i.name not in constants)


def _lazy(path: str, make: Callable[[str], Callable[[], Iterator[Feeds]]]) -> Any:
    return lambda: make(_input_name(path))()


_RESNET = "vision/cifar_resnet/resnet{}.onnx"
_PROBE = "vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx"
_SQUEEZE = "vision/squeezenet1.1/squeezenet1.1.onnx"
_MOBILE = "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx"

MODELS: dict[str, Model] = {
    "mnist": Model("vision/mnist/mnist.onnx", "mnist", 9800, "agreement", _digits),
    "resnet20": Model(
        _RESNET.format(20),
        "resnet",
        None,
        "agreement",
        _lazy(_RESNET.format(20), lambda n: _cifar(None, n)),
    ),
    "resnet56": Model(
        _RESNET.format(56),
        "resnet",
        None,
        "agreement",
        _lazy(_RESNET.format(56), lambda n: _cifar(None, n)),
    ),
    "mobilenetv2-cifar": Model(
        _PROBE, "cifar_probe", 1000, "agreement", _lazy(_PROBE, lambda n: _cifar(128, n))
    ),
    "squeezenet": Model(
        _SQUEEZE,
        "squeezenet",
        250,
        "agreement",
        _lazy(_SQUEEZE, lambda n: _imagenet(n, real_data.normalized)),
    ),
    "mobilenetv2-tf": Model(
        _MOBILE, "mobilenet", 250, "agreement", _lazy(_MOBILE, lambda n: _imagenet(n, _centred))
    ),
    "minilm": Model(
        "encoder/minilm_l6_v2/minilm_l6_v2.onnx",
        "minilm",
        None,
        "cosine_mean",  # agreement with the float model; Spearman is shown too, and noise may raise it
        _sentences,
        kind="transformer",
    ),
    "magika": Model(
        "other/magika/standard_v3_3.onnx", "magika", None, "agreement", _files, kind="transformer"
    ),
    "ultraface": Model("vision/ultraface/version-RFB-320.onnx", "ultraface", None, "f1", _faces),
    "silero": Model(
        "other/silero_vad/silero_vad_16k_op15.onnx",
        "silero",
        None,
        "mean_abs",
        _speech,
        better=-1,
        kind="recurrent",
    ),
}
