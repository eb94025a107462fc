"""What OpenVINO executes, read from a real child process."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from qgraph import errors
from qgraph.executed import openvino

needs_openvino = pytest.mark.skipif(not openvino.is_available(), reason="openvino is not installed")

RNG = np.random.default_rng(0)
UINT4 = RNG.integers(0, 16, (64, 32)).astype(ml_dtypes.uint4)
ZERO = RNG.integers(0, 16, (2, 32)).astype(ml_dtypes.uint4)
SCALE = np.full((2, 32), 0.01, np.float32)
BLOCKED = """g (float[m, 64] x) => (float[m, 32] y) {
    wf = DequantizeLinear <axis = 0, block_size = 32> (W, s, z)
    h = MatMul(x, wf)
    y = Relu(h) }"""


@needs_openvino
def test_compressed_weights_are_visible(write) -> None:
    seen = openvino.executed_graph(write(BLOCKED, W=UINT4, s=SCALE, z=ZERO))
    assert seen.runtime == "openvino"
    node = seen.producer("y")
    assert node is not None
    assert node.op == "FullyConnected"
    assert node is seen.producer("h")
    assert node.input_dtypes[:2] == ("float32", "uint4")
    assert {c.dtype for c in node.constants} == {"uint4", "float32"}
    assert (64, 32) in {c.shape for c in node.constants}


@needs_openvino
def test_a_refusal_carries_the_text_of_openvino(write) -> None:
    path = write("g (float[m, 64] x) => (float[m, 32] y) { y = com.microsoft.QGemm(x, x) }")
    with pytest.raises(errors.RuntimeFailure, match="QGemm") as caught:
        openvino.executed_graph(path)
    diagnostic = caught.value.diagnostics[0]
    assert diagnostic.code == "QG621"
    assert "Exception from" not in diagnostic.message


@needs_openvino
def test_the_module_prints_json(write) -> None:
    path = write(BLOCKED, W=UINT4, s=SCALE, z=ZERO)
    command = [sys.executable, "-m", "qgraph.executed.openvino", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=openvino._environment()
    )
    assert "FullyConnected" in [n["op"] for n in json.loads(done.stdout)["nodes"]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Make the child process behave as told, with openvino installed or not."""
    monkeypatch.setattr(openvino, "is_available", lambda: True)

    def behave(returncode: int = 0, stdout: str = "", stderr: str = "") -> None:
        done = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
        monkeypatch.setattr(openvino.subprocess, "run", lambda *a, **k: done)

    return behave


def _code(path: str = "m.onnx") -> tuple[str, str]:
    with pytest.raises(errors.RuntimeFailure) as caught:
        openvino.executed_graph(path, timeout=1)
    return caught.value.diagnostics[0].code, caught.value.diagnostics[0].message


def test_a_crash_is_named(pretend) -> None:
    pretend(returncode=-11, stderr="last words")
    code, message = _code()
    assert code == "QG623"
    assert "SIGSEGV" in message
    assert "last words" in message


def test_a_failed_process_is_explained(pretend) -> None:
    pretend(returncode=1, stderr="ImportError: broken")
    assert _code() == ("QG623", "the OpenVINO process failed (1)\nImportError: broken")


def test_a_compile_error_has_its_own_code(pretend) -> None:
    pretend(stdout=json.dumps({"error": "no kernel", "stage": "compile"}))
    assert _code() == ("QG622", "OpenVINO does not compile the model: no kernel")


def test_a_hang_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(openvino, "is_available", lambda: True)
    monkeypatch.setattr(openvino.subprocess, "run", hang)
    assert _code()[0] == "QG624"


def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_available", lambda: False)
    assert _code()[0] == "QG620"
