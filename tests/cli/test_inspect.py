"""`qgraph inspect`: what is there, what can be quantized, and why the rest cannot."""

import pytest

from qgraph import files, inspection, models
from qgraph.models.odd import ODD

KEYS = {
    "source",
    "file_bytes",
    "weight_bytes",
    "external_files",
    "ir_version",
    "opsets",
    "producer",
    "metadata",
    "inputs",
    "outputs",
    "operators",
    "functions",
    "weights",
    "others",
    "largest",
    "findings",
    "forecasts",
    "symmetries",
}


def test_text(run, cnn):
    done = run("inspect", cnn)
    assert (done.code, done.err) == (0, "")
    for text in ("IR version 10", "ai.onnx 20", "float[batch, 1, 8, 8]", "Conv x7", "8 weights"):
        assert text in done.out


def test_json(run, cnn):
    found = run("inspect", cnn, "--json").json
    assert found.keys() == KEYS
    assert found["operators"]["Conv"] == 7
    assert found["inputs"] == [
        {"name": "image", "dtype": "float", "shape": ["batch", 1, 8, 8], "has_default": False}
    ]
    assert found["file_bytes"] == cnn.stat().st_size
    assert len(found["weights"]) == 8
    assert not any(w["reason"] for w in found["weights"])


def test_every_weight(run, cnn):
    done = run("inspect", cnn, "--weights")
    assert "residual1.conv.weight" in done.out
    assert "64 x 576" in done.out


def test_tied_weights_are_shown(run):
    assert "tied: 2 uses of different kinds" in run("inspect", "zoo:tiny-gpt").out
    tied = [w for w in run("inspect", "zoo:tiny-gpt", "--json").json["weights"] if w["tied"]]
    assert [(w["label"], w["uses"]) for w in tied] == [("wte.weight", 2)]


def test_forecasts(run):
    found = run("inspect", "zoo:tiny-gpt", "-t", "ort", "-t", "onnx", "--recipe", "int4", "--json")
    forecasts = found.json["forecasts"]
    assert [f["target"] for f in forecasts] == ["ort", "onnx"]
    assert all(f["recipe"] == "int4" and f["specs"] for f in forecasts)
    assert all(0 < f["quantized_bytes"] < 1e6 for f in forecasts)


def test_forecasts_of_every_target(run):
    out = run("inspect", "zoo:tiny-cnn", "--target", "all").out
    assert all(f"for target {name}" in out for name in ("onnx", "openvino", "ort"))
    assert "QG314" in out


def test_a_quantized_model(run, tmp_path):
    out = tmp_path / "q.onnx"
    assert run("optimize", "zoo:tiny-llama", "-r", "int4", "-o", out, "-q").code == 0
    found = run("inspect", out, "--json").json
    assert found["metadata"]["qgraph"].startswith("0.")
    assert "com.microsoft::MatMulNBits" in found["operators"]
    assert any(c["reason"] == "is quantized already" for c in found["others"])
    assert "is quantized already" in run("inspect", out).out


def test_external_files(run, external):
    assert run("inspect", external, "--json").json["external_files"] == ["cnn.onnx.data"]
    assert "weights in cnn.onnx.data" in run("inspect", external).out


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_models(name):
    found = inspection.inspect_model(ODD[name]())
    assert found.to_json().keys() == KEYS
    assert all(w.nbytes <= found.weight_bytes for w in found.weights)


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_models_are_printed(run, tmp_path, name):
    path = files.save(ODD[name](), tmp_path / "odd.onnx")
    done = run("inspect", path, "--weights")
    assert done.code == 0, done.err
    assert str(path) in done.out


def test_the_model_is_not_changed(tmp_path):
    model = models.build("tiny-cnn")
    before = files.to_proto(model).SerializeToString(deterministic=True)
    inspection.inspect_model(model, targets=["ort"])
    assert files.to_proto(model).SerializeToString(deterministic=True) == before


def test_symmetries(run, cnn):
    assert run("inspect", cnn, "--json").json["symmetries"] == []
    found = run("inspect", cnn, "--symmetries", "--json").json["symmetries"]
    assert [s["kind"] for s in found] == 4 * ["permute"] + 6 * ["scale"] + 4 * ["rotate"]
    last = found[-1]
    assert (last["legal"], last["channels"], last["block"]) == ("orthogonal", 96, 96)
    assert (last["writers"], last["readers"]) == (["pointwise2.conv.weight"], ["classifier.weight"])
    text = run("inspect", cnn, "--symmetries").out
    for part in ("Scales: 6 of 6 groups", "Rotations: 1 of 4 groups", "Relu '/stem/Relu'"):
        assert part in text
