"""The oldest supported ONNX Runtime, with and without the native library."""

import json
import os
import subprocess

import numpy as np
import onnx
import pytest

from qgraph.runtime import library

OLD_PYTHON = os.environ.get("QGRAPH_OLD_ORT_PYTHON")
SCRIPT = """
import sys, json, numpy as np, onnxruntime as ort
options = ort.SessionOptions(); options.log_severity_level = 3
if sys.argv[2]: options.register_custom_ops_library(sys.argv[2])
for name in json.loads(sys.argv[3]):
    at = sys.argv[1] + "/" + name
    session = ort.InferenceSession(at + ".onnx", options, providers=["CPUExecutionProvider"])
    np.save(at + ".y.npy", session.run(None, dict(np.load(at + ".npz")))[0])
"""


@pytest.fixture
def oldest_runtime(tmp_path):
    """run(cases, custom_ops): the first output of each (model, feeds)."""
    if OLD_PYTHON is None:
        pytest.skip("QGRAPH_OLD_ORT_PYTHON names no interpreter")

    def run(cases, custom_ops):
        for index, (model, feeds) in enumerate(cases):
            onnx.save(model, tmp_path / f"{index}.onnx")
            np.savez(tmp_path / f"{index}.npz", **feeds)
        names = json.dumps([str(i) for i in range(len(cases))])
        path = library.library_path() if custom_ops else ""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [OLD_PYTHON, "-c", SCRIPT, str(tmp_path), path, names]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return [np.load(tmp_path / f"{i}.y.npy") for i in range(len(cases))]

    return run
