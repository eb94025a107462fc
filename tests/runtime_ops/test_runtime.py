"""Sessions, library look-up, capabilities and the doctor."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph import errors, runtime
from qgraph.runtime import checks, sessions

NEG = """<ir_version: 10, opset_import: ["": 21]>
neg (float[2] x) => (float[2] y) { y = Neg(x) }"""
FEED = {"x": np.array([1, -2], np.float32)}
# Carries the body of its operator: runs with or without a native kernel.
CARRIED = """<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>
carried (float[2] x) => (float[2] y) { y = ai.qgraph.Twice(x) }
<domain: "ai.qgraph", opset_import: ["": 21]>
Twice (a) => (b) { b = Add(a, a) }"""


def parse(text):
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("form", ["path", "str", "bytes", "proto", "ir"])
def test_every_form_of_model_runs(form, tmp_path):
    proto = parse(NEG)
    path = tmp_path / "neg.onnx"
    onnx.save(proto, path)
    model = {
        "path": path,
        "str": str(path),
        "bytes": proto.SerializeToString(),
        "proto": proto,
        "ir": ir.from_proto(proto),
    }[form]
    (y,) = runtime.session(model, threads=1).run(None, FEED)
    np.testing.assert_array_equal(y, -FEED["x"])


@pytest.mark.parametrize("custom_ops", [None, True, False])
def test_a_model_that_carries_its_operators_runs(custom_ops):
    (y,) = runtime.session(parse(CARRIED), threads=1, custom_ops=custom_ops).run(None, FEED)
    np.testing.assert_array_equal(y, 2 * FEED["x"])


def test_the_library_is_registered_when_the_model_imports_its_domain(monkeypatch):
    monkeypatch.setenv("QGRAPH_OPS_LIBRARY", "/nothing.so")
    runtime.session(parse(NEG), threads=1)
    runtime.session(parse(CARRIED), threads=1, custom_ops=False)
    with pytest.raises(errors.RuntimeFailure, match="QG603"):
        runtime.session(parse(CARRIED), threads=1)


def test_imported_domains_are_read_without_the_graph(tmp_path):
    proto = parse(CARRIED)
    proto.graph.initializer.append(ir.to_proto(ir.tensor(np.zeros(10_000, np.float32), name="w")))
    data = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    assert sessions._imported_domains(data) == {"", "ai.qgraph"}
    assert sessions._imported_domains(str(path)) == sessions._imported_domains(data)
    for broken in (b"", b"\xff" * 40, data[:-3], b"text that is no model"):
        assert sessions._imported_domains(broken) <= {"", "ai.qgraph"}
    assert sessions._imported_domains(str(tmp_path / "missing")) == set()


def test_options_reach_onnxruntime(tmp_path):
    written = tmp_path / "executed.onnx"
    session = runtime.session(
        parse(NEG),
        threads=1,
        optimize="basic",
        accuracy_level=1,
        optimized_model_path=written,
        config={"session.disable_quant_qdq": "1"},
    )
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"
    assert written.is_file()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="did you mean extended"):
        runtime.session(parse(NEG), optimize="extende")
    with pytest.raises(
        errors.RuntimeFailure, match="QG607.*CPUExecutionProvidr(.|\n)*did you mean"
    ):
        runtime.session(parse(NEG), providers=["CPUExecutionProvidr"])


def test_what_onnxruntime_refuses_is_a_runtime_failure(tmp_path):
    with pytest.raises(errors.RuntimeFailure, match="QG601.*missing.onnx"):
        runtime.session(tmp_path / "missing.onnx")
    with pytest.raises(errors.RuntimeFailure, match="QG601"):
        runtime.session(b"text that is no model")
    unknown = parse(NEG.replace("Neg(x)", "Nagate(x)"))
    with pytest.raises(errors.RuntimeFailure, match="Nagate"):
        runtime.session(unknown)
    future = parse(NEG.replace('"": 21', '"": 99'))
    with pytest.raises(errors.RuntimeFailure, match="help: pip install -U onnxruntime"):
        runtime.session(future)


def test_extension_operators_ask_for_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    model = parse(NEG.replace('"": 21', '"": 21, "ai.onnx.contrib": 1'))
    with pytest.raises(
        errors.RuntimeFailure, match=r"QG606(.|\n)*pip install .qgraph\[extensions\]"
    ):
        runtime.session(model)


def test_importing_runtime_does_not_import_onnxruntime():
    code = "import sys, qgraph.runtime, qgraph.native; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_capabilities_agree_with_what_runs():
    found = runtime.capabilities()
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["max_opset"] >= 23
    assert found["max_ir_version"] >= 10
    assert found["dequantize"]["int4"] == 21
    assert found["quantize"]["uint8"] == 10
    assert found["contrib"]["MatMulNBits"]
    assert found["isa"] is not None
    for opset, runs in ((found["max_opset"], True), (found["max_opset"] + 1, False)):
        model = parse(NEG.replace('"": 21', f'"": {opset}'))
        if runs:
            runtime.session(model, threads=1)
        else:
            with pytest.raises(errors.RuntimeFailure):
                runtime.session(model, threads=1)


def test_a_sound_installation_passes_every_check():
    found = runtime.doctor()
    assert [c for c in found if not c.ok and c.name != "huge pages"] == []
    names = [c.name for c in found]
    assert len(set(names)) == len(names)
    assert {"Python", "onnxruntime", "native library", "instruction set", "threads"} <= set(names)


def test_the_doctor_reports_a_missing_library(monkeypatch):
    monkeypatch.setenv("QGRAPH_OPS_LIBRARY", "/nothing.so")
    (check,) = [c for c in runtime.doctor() if c.name == "native library"]
    assert not check.ok
    assert check.hint


def test_the_doctor_reports_old_and_missing_packages(monkeypatch):
    monkeypatch.setattr(checks, "_REQUIRED", {"numpy": "99.0", "no-such-package": "1.0"})
    found = {c.name: c for c in runtime.doctor()}
    assert not found["numpy"].ok
    assert "numpy>=99.0" in found["numpy"].hint
    assert found["no-such-package"].detail == "not installed"


def test_the_doctor_knows_the_requirements_of_the_project():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, minimum in checks._REQUIRED.items():
        assert f'"{name}>={minimum}"' in pyproject
