"""`qgraph optimize`: what it writes, what it prints, what it leaves alone."""

import json

import onnx
import onnxruntime
import pytest

REPORT_KEYS = {
    "source",
    "output",
    "recipe",
    "target",
    "float_bytes",
    "output_bytes",
    "ledger",
    "diagnostics",
    "notes",
    "checks",
    "metrics",
    "control",
    "mixed",
    "choice",
    "latency",
    "seconds",
    "versions",
    "resolved_recipe",
    "activations",
    "operators",
    "integer_macs",
    "shifts",
    "command",
    "summary",
}


def test_summary(run, tmp_path):
    out = tmp_path / "q.onnx"
    done = run("optimize", "zoo:tiny-llama", "--recipe", "int4", "-o", out)
    assert done.code == 0, done.err
    assert done.err == ""
    for text in ("weights quantized; ", "MatMulNBits", "dB", "Float, and why", "QG3", "Checked"):
        assert text in done.out
    assert str(out) in done.out
    onnxruntime.InferenceSession(str(out))


def test_summary_without_a_terminal_is_plain(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"))
    assert "\x1b" not in done.out + done.err
    assert all(line == line.rstrip() for line in done.out.splitlines())


def test_json_is_the_report(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "-r", "int8-weights", "--json")
    assert done.code == 0
    assert done.json.keys() == REPORT_KEYS
    assert done.err == ""
    assert done.json["recipe"] == "int8-weights"
    assert any(entry["spec"] == "int8.ch.sym" for entry in done.json["ledger"])


def test_quiet(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "-r", "int8-weights", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_quiet_still_warns(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "-q")
    assert done.out == ""
    assert "warning QG320" in done.err


def test_the_input_is_left_as_it_is(run, external, snapshot):
    before = snapshot(external.parent)
    done = run("optimize", external, "-o", external.with_name("q.onnx"), "-r", "int8-weights")
    assert done.code == 0
    after = snapshot(external.parent)
    assert after.keys() - before.keys() == {"q.onnx"}
    assert all(after[name] == data for name, data in before.items())


def test_external_data(run, cnn, snapshot):
    out = cnn.with_name("q.onnx")
    assert run("optimize", cnn, "-o", out, "--external-data").code == 0
    assert snapshot(cnn.parent).keys() == {"cnn.onnx", "q.onnx", "q.onnx.data"}
    onnxruntime.InferenceSession(str(out))


def test_force_replaces_the_data_file_too(run, cnn, snapshot):
    out = cnn.with_name("q.onnx")
    assert run("optimize", cnn, "-o", out, "--external-data").code == 0
    assert run("optimize", cnn, "-o", out, "--force", "--no-external-data").code == 0
    assert snapshot(cnn.parent).keys() == {"cnn.onnx", "q.onnx"}


def test_set_changes_the_recipe(run, cnn):
    args = ("-r", "int8-weights", "--set", "conv.weights=int8.tensor", "--set", "min_elements=0")
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args, "--json")
    assert {e["spec"] for e in done.json["ledger"] if "Conv" in e["operators"]} == {
        "int8.tensor.sym"
    }


def test_target(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--target", "onnx", "--json")
    assert done.json["target"] == "onnx"


def test_reports(run, cnn, tmp_path):
    markdown, data, page = (tmp_path / f"why.{kind}" for kind in ("md", "json", "html"))
    out = cnn.with_name("q.onnx")
    reports = [arg for path in (markdown, data, page) for arg in ("--report", path)]
    done = run("optimize", cnn, "-o", out, *reports, "-q")
    assert done.code == 0
    assert markdown.read_text().startswith("# qgraph report")
    told = json.loads(data.read_text())
    assert told.keys() == REPORT_KEYS
    assert told["command"] == [
        "qgraph",
        "optimize",
        str(cnn),
        "-o",
        str(out),
        *map(str, reports),
        "-q",
    ]
    assert page.read_text().startswith("<!doctype html>")
    assert all(entry["label"] in page.read_text() for entry in told["ledger"])


def test_floors_that_hold(run, cnn, images):
    args = ("-r", "int8-weights", "--data", images, "--min-sqnr", "10", "--max-kl", "1")
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args)
    assert done.code == 0, done.err
    assert "Accuracy on 4 samples" in done.out


def test_a_missed_floor_writes_the_report_only(run, cnn, images, tmp_path, snapshot):
    args = ("-r", "int8-weights", "--data", images, "--samples", "2", "--min-sqnr", "200")
    why = tmp_path / "why.json"
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args, "--report", why, "--json")
    assert done.code == 3
    assert "error QG701 output 'logits': SQNR is" in done.err
    assert done.codes() == ["QG701", "QG704"]
    assert done.json["control"]["held"] is False
    assert done.json["metrics"]["samples"] == 2
    assert json.loads(why.read_text())["output"] == ""
    assert snapshot(tmp_path).keys() == {"cnn.onnx", "why.json"}


def test_a_floor_that_is_missed_gives_bits_back(run, cnn, images):
    args = ("-r", "int8-weights", "--data", images, "--min-sqnr", "45")
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args)
    assert done.code == 0, done.err
    assert "Given back so that the floors hold" in done.out
    only_checked = run("optimize", cnn, "-o", cnn.with_name("r.onnx"), *args, "--max-time", "0")
    assert only_checked.code == 3
    agreed = ("-r", "int8-weights", "--data", images, "--min-agreement", "0.5", "--json")
    done = run("optimize", cnn, "-o", cnn.with_name("s.onnx"), *agreed)
    assert done.code == 0, done.err
    assert done.json["control"] == {}


def test_data_that_nothing_uses_is_no_secret(run, cnn, images):
    args = ("-r", "int8-weights", "--data", images)
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args)
    assert done.code == 0
    assert "warning QG132 --data: is used for timing alone" in done.err


def test_auto_measures_where_it_has_data(run, cnn, images):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--data", images)
    assert done.code == 0, done.err
    assert "QG132" not in done.err
    assert "timed by turns in ONNX Runtime" in done.out
    done = run("optimize", cnn, "-o", cnn.with_name("r.onnx"), "--data", images, "--json")
    assert {c["kind"] for c in done.json["choice"]["classes"]} == {"conv", "linear"}
    assert done.json["latency"]["clock"] in ("processor", "wall")


@pytest.mark.parametrize("mode", ["each", "ends", "off"])
def test_verify_modes(run, cnn, mode):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--verify", mode, "--json")
    proofs = [line for line in done.json["checks"] if "proven" in line]
    assert bool(proofs) == (mode == "each")


def test_no_inspect(run, cnn):
    out = cnn.with_name("q.onnx")
    done = run("optimize", cnn, "-o", out, "-r", "int8-weights", "--no-inspect", "--json")
    assert not any(entry["runs"] for entry in done.json["ledger"])


def test_stop_after(run, cnn):
    out = cnn.with_name("c.onnx")
    done = run("optimize", cnn, "-o", out, "--stop-after", "canonicalize")
    assert done.code == 0
    assert "stopped after canonicalize" in done.out
    assert "QG32" not in done.out
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(out).graph.node}


def test_print_after_goes_to_stderr(run, cnn):
    args = ("--print-after", "canonicalize", "--json")
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args)
    assert "-- after canonicalize --\nmodel ir" in done.err
    assert done.json["recipe"] == "auto"


def test_dump_dir(run, cnn, tmp_path):
    folder = tmp_path / "steps"
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--dump-dir", folder, "-q")
    assert done.code == 0
    names = sorted(p.name for p in folder.iterdir())
    assert names[:2] == ["01-canonicalize.onnx", "01-canonicalize.txt"]
    assert len(names) == 12


def test_the_summary_says_what_was_proven(run, cnn):
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"))
    assert "canonicalize: proven float-equal" in done.out
