"""Static INT8 on trained nets: close to float, and in integer kernels, as read from the runtime's own graph.

QGRAPH_FULL=1 adds nets that are larger and of no other kind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qgraph

sys.path.insert(0, str(Path(__file__).parent))
import real_data

Array = np.ndarray[Any, Any]


def tf_pixels(crop: Array) -> Array:
    """MobileNetV2's own preprocessing: -1..1, channels first."""
    return np.ascontiguousarray(((crop.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def images(prepare: Any) -> Iterator[Array]:
    for x, _ in real_data.imagenet(prepare, 0, 40):
        yield x


def cifar(size: int | None) -> Iterator[Array]:
    for x, _ in real_data.cifar(size, 200):
        yield from np.split(x, len(x) // 5)


# Model, its input, samples, and what its output must keep in dB. The probe net loses most: ONNX Runtime's own
# quantizer, without equalization as here, keeps 7.3 dB of it.
NETS: dict[str, tuple[str, str, Any, float]] = {
    "mobilenetv2": ("mobilenetv2_tf/mobilenetv2_1.0_224_tf", "input", lambda: images(tf_pixels), 12.0),
    "squeezenet": ("squeezenet1.1/squeezenet1.1", "data", lambda: images(real_data.normalized), 30.0),
    "resnet56": ("cifar_resnet/resnet56", "x", lambda: cifar(None), 27.0),
    "resnet20": ("cifar_resnet/resnet20", "x", lambda: cifar(None), 27.0),
    "probe": ("mobilenetv2_cifar_probe/mobilenetv2_cifar_probe", "input", lambda: cifar(128), 7.3),
    "mnist": ("mnist/mnist", "Input3", lambda: (x for x, _ in real_data.digits(40)), 35.0),
}  # fmt: skip
LARGER = ("squeezenet", "resnet56")
CHOSEN = [n for n in NETS if os.environ.get("QGRAPH_FULL") == "1" or n not in LARGER]


@pytest.fixture(params=CHOSEN)
def net(request: pytest.FixtureRequest) -> tuple[Path, list[dict[str, Array]], float]:
    file, name, feeds, floor = NETS[request.param]
    try:
        path = real_data.data(f"vision/{file}.onnx")
        samples = [{name: x} for x in islice(feeds(), 40)]
    except real_data.MissingData as e:
        pytest.skip(str(e))
    if request.param == "mnist":
        samples = [
            {name: x[i : i + 1]} for each in samples for x in each.values() for i in range(len(x))
        ]
    return path, samples[:40], floor


def test_onnxruntime_computes_in_integers(net, tmp_path):
    path, samples, floor = net
    result = qgraph.optimize(path, "int8-static", data=samples, output=tmp_path / "q.onnx")
    assert result.report.integer_macs is not None and result.report.integer_macs >= 0.95
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), options)
    executed = onnx.load(tmp_path / "executed.onnx")
    kinds = ("Conv", "Gemm", "MatMul")
    products = [n.op_type for n in executed.graph.node if any(k in n.op_type for k in kinds)]
    assert set(products) <= {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
    assert len(products) == len(result.report.operators)
    float_session = onnxruntime.InferenceSession(str(path))
    want, got = (
        np.concatenate([np.ravel(s.run(None, f)[0]) for f in samples[:20]])
        for s in (float_session, session)
    )
    assert qgraph.numerics.sqnr_db(want, got) >= floor


def kernels_of(compiled: Any) -> Iterator[tuple[int, str, str]]:
    """(multiplications, type of the activations, type of the weights) of what OpenVINO says that it executes."""
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {k: str(getattr(v, "value", v)) for k, v in op.get_rt_info().items()}
        if info["layerType"] not in ("Convolution", "FullyConnected", "MatMul"):
            continue
        x, w = (i.get_source_output() for i in op.inputs()[:2])
        inner = int(
            np.prod(
                x.get_shape()[1:2] if info["layerType"] == "Convolution" else x.get_shape()[-1:]
            )
        )
        if info["layerType"] == "Convolution":
            # Weights are [out, in, kh, kw], or [group, out, in, kh, kw].
            shape = list(w.get_shape())
            inner = int(np.prod(shape[len(shape) - (len(x.get_shape()) - 1) :]))
        types = [str(v.get_element_type().get_type_name()) for v in (x, w)]
        assert info["runtimePrecision"] in types
        yield int(np.prod(op.output(0).get_shape())) * inner, *types


def test_openvino_computes_in_integers(net, tmp_path):
    openvino = pytest.importorskip("openvino")
    path, samples, floor = net
    result = qgraph.optimize(
        path, "int8-static", data=samples, output=tmp_path / "q.onnx", target="openvino"
    )
    assert result.report.integer_macs is not None and result.report.integer_macs >= 0.95
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = core.read_model(str(tmp_path / "q.onnx"))
    ((name, first),) = samples[0].items()
    model.reshape({name: list(first.shape)})
    compiled = core.compile_model(model, "CPU", settings)
    kernels = list(kernels_of(compiled))
    total = sum(macs for macs, *_ in kernels)
    integer = sum(macs for macs, x, w in kernels if x in ("u8", "i8") and w == "i8")
    assert len(kernels) == len(result.report.operators)
    # What OpenVINO runs is no fewer multiplications than the model has: a kernel that was overlooked would show here.
    assert total == sum(o.macs for o in result.report.operators)
    assert integer >= 0.95 * total
    assert integer / total == pytest.approx(result.report.integer_macs)
    float_session = onnxruntime.InferenceSession(str(path))
    want = np.concatenate([np.ravel(float_session.run(None, f)[0]) for f in samples[:20]])
    got = np.concatenate([np.ravel(compiled(f)[0]) for f in samples[:20]])
    assert qgraph.numerics.sqnr_db(want, got) >= floor
