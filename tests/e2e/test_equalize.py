"""One scale per weight tensor on a real depthwise net: it collapses, and does not once channels are evened out.

QGRAPH_FULL=1 tells what evening out and what the bias corrections do of that.
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import qgraph
from qgraph import numerics
from qgraph.recipe import PRESETS

sys.path.insert(0, str(Path(__file__).parent))
import real_data

FULL = os.environ.get("QGRAPH_FULL") == "1"
TENSOR = PRESETS["int8-tensor"]


def without(*passes):
    """The recipe for one scale per tensor with these passes taken out."""
    return TENSOR.model_copy(
        update={
            "pipeline": tuple(p for p in TENSOR.pipeline if p not in passes),
            "options": {k: v for k, v in TENSOR.options.items() if k not in passes},
        }
    )


def test_mobilenet_with_one_scale_per_weight(tmp_path):
    """Measured, agreement and SQNR: as is .845 and 8.0 dB; without equalize .830 and 6.0, correct-bias .860 and 7.9,
    either .250 and -0.1."""
    try:
        path = real_data.data("vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx")
        batches = [x for x, _ in islice(real_data.cifar(128, 320), 64)]
    except real_data.MissingData as e:
        pytest.skip(str(e))
    images = np.concatenate(batches)[:232]
    samples = [{"input": x[None]} for x in images[:32]]
    model = onnxruntime.InferenceSession(str(path))
    expected = model.run(None, {"input": images[32:]})[0]
    agreement, sqnr = {}, {}
    one = (("equalize",), ("correct-bias",)) if FULL else ()
    for out in ((), ("equalize", "correct-bias"), *one):
        output = tmp_path / f"{len(out)}{''.join(out)}.onnx"
        result = qgraph.optimize(path, without(*out), data=samples, output=output)
        assert result.report.integer_macs is not None and result.report.integer_macs >= 0.95
        session = onnxruntime.InferenceSession(str(output))
        got = session.run(None, {"input": images[32:]})[0]
        agreement[out] = float(np.mean(got.argmax(axis=1) == expected.argmax(axis=1)))
        sqnr[out] = numerics.sqnr_db(expected, got)
    assert agreement["equalize", "correct-bias"] < 0.5
    assert agreement[()] > 0.78
    assert sqnr[()] > sqnr["equalize", "correct-bias"] + 6
    if FULL:
        assert agreement["correct-bias",] > 0.78
        assert sqnr[()] > sqnr["equalize",] + 1
        assert sqnr["correct-bias",] > sqnr["equalize", "correct-bias"] + 6
