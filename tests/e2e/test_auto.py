"""Recipe auto with data, and accuracy floors, on trained models: integer where that is faster, accurate, and told."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph import evaluate

sys.path.insert(0, str(Path(__file__).parent))
import real_data


def found(name):
    try:
        return real_data.data(name)
    except real_data.MissingData as e:
        pytest.skip(str(e))


def images(count):
    (x, _), *_ = real_data.cifar(None, count)
    return [{"x": x[i : i + 1]} for i in range(count)]


def test_a_convolutional_net_comes_out_static_and_faster(tmp_path):
    path = found("vision/cifar_resnet/resnet20.onnx")
    result = qgraph.optimize(path, "auto", data=images(24), output=tmp_path / "q.onnx")
    report = result.report
    assert report.integer_macs is not None and report.integer_macs >= 0.9
    assert report.latency["ratio"] < 0.9
    assert report.choice["uniform"]["static"]["ratio"] < report.choice["uniform"]["table"]["ratio"]
    reasons = [e.reason for e in result.ledger if e.activation]
    assert all("measured: integer kernels on calibrated grids" in r for r in reasons)
    assert all("time of the whole model" in r or "against float" in r for r in reasons)


def test_a_floor_takes_back_a_part_of_a_net(tmp_path):
    path = found("vision/cifar_resnet/resnet20.onnx")
    samples = images(24)
    plain = qgraph.optimize(path, "int8-static", data=samples, min_sqnr=1)
    floor = round(plain.metrics["outputs"][0]["error"]["sqnr_db"] + 3, 1)
    held = qgraph.optimize(path, "int8-static", data=samples, min_sqnr=floor)
    assert held.metrics["outputs"][0]["error"]["sqnr_db"] >= floor
    returned = held.report.control["returned"]
    assert 0 < len(returned) <= 15
    assert held.report.integer_macs is not None and held.report.integer_macs > 0.2
    assert held.report.control["measurements"]["whole"] <= 7


def test_masked_logits_stay_accurate():
    path = found("lm/stories260K/stories260K.onnx")
    stories = real_data.story_tokens("lm/stories260K/tok512.bin", 6)
    samples = [{"input_ids": s[:96][None].astype(np.int64)} for s in stories]
    result = qgraph.optimize(path, "auto", data=samples)
    compared = evaluate.compare(path, result.model, samples, rounds=0).outputs[0]
    assert compared.error.sqnr_db > 20
    assert compared.divergence.agreement.value > 0.93
    assert {c["kind"] for c in result.report.choice["classes"]} >= {"linear"}
