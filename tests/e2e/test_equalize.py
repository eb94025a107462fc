"""One scale per weight tensor on a real depthwise net: it collapses, and does not once channels are evened out."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import qgraph

sys.path.insert(0, str(Path(__file__).parent))
import real_data


def test_mobilenet_with_one_scale_per_weight(tmp_path):
    try:
        path = real_data.data("vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx")
        batches = [x for x, _ in islice(real_data.cifar(128, 320), 64)]
    except real_data.MissingData as e:
        pytest.skip(str(e))
    images = np.concatenate(batches)[:232]
    samples = [{"input": x[None]} for x in images[:32]]
    plain = ("conv.weights=int8.tensor", "linear.weights=int8.tensor")
    model = onnxruntime.InferenceSession(str(path))
    expected = model.run(None, {"input": images[32:]})[0].argmax(axis=1)
    agreement = {}
    for recipe, overrides in (("int8-static", plain), ("int8-tensor", ())):
        output = tmp_path / f"{recipe}.onnx"
        result = qgraph.optimize(path, recipe, data=samples, overrides=overrides, output=output)
        assert result.report.integer_macs is not None and result.report.integer_macs >= 0.95
        session = onnxruntime.InferenceSession(str(output))
        got = session.run(None, {"input": images[32:]})[0].argmax(axis=1)
        agreement[recipe] = float(np.mean(got == expected))
    assert agreement["int8-static"] < 0.5
    assert agreement["int8-tensor"] > 0.78
