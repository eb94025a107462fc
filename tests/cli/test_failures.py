"""Every way to give something wrong: the message, the exit code, and nothing written."""

import json
import os

import numpy as np
import onnx
import pytest

from qgraph import models
from qgraph.cli import app


@pytest.fixture
def refuses(run, tmp_path, snapshot):
    """Run a command line that must fail and must leave the folder as it is."""

    def call(*args, code=1):
        before = snapshot(tmp_path)
        done = run(*args)
        assert done.code == code, done.err
        assert done.out == ""
        assert done.err.startswith("error ")
        assert "\x1b" not in done.err
        assert snapshot(tmp_path) == before
        with_json = run(*args, "--json")
        assert with_json.code == code
        assert with_json.err == done.err
        for each in with_json.json["errors"]:
            assert each.keys() == {"severity", "code", "where", "message", "hint"}
            assert each["message"] in done.err
        assert snapshot(tmp_path) == before
        return done.err

    return call


# Models


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "MODEL"],
        ["optimize", "MODEL", "-o", "q.onnx"],
        ["compare", "MODEL", "zoo:tiny-cnn", "--random", "1"],
        ["compare", "zoo:tiny-cnn", "MODEL", "--random", "1"],
        ["eval", "perplexity", "MODEL", "--tokens", "zoo:tiny-llama", "--context", "8"],
        ["bisect", "MODEL"],
    ],
    ids=" ".join,
)
def test_missing_model(refuses, tmp_path, monkeypatch, cnn, command):
    monkeypatch.chdir(tmp_path)
    err = refuses(*["cnm.onnx" if each == "MODEL" else each for each in command])
    assert "error QG101 cnm.onnx: does not exist" in err
    assert "did you mean cnn.onnx?" in err


def test_a_directory(refuses, tmp_path):
    assert "QG101" in refuses("optimize", tmp_path, "-o", tmp_path / "q.onnx")


def test_an_unknown_reference_model(refuses):
    err = refuses("inspect", "zoo:tiny-lama")
    assert "did you mean tiny-llama" in err


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated(refuses, cnn, keep):
    data = cnn.read_bytes()
    cnn.write_bytes(data[: int(len(data) * keep)])
    err = refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"))
    assert "error QG102" in err
    assert "is the file complete?" in err


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(100)], ids=len)
def test_no_model(refuses, tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert "QG102" in refuses("optimize", path, "-o", tmp_path / "q.onnx")


def test_external_data_is_missing(refuses, external):
    external.with_name("cnn.onnx.data").unlink()
    err = refuses("optimize", external, "-o", external.with_name("q.onnx"))
    assert "error QG103 external data 'cnn.onnx.data' of cnn.onnx: does not exist" in err


def test_external_data_is_short(refuses, external):
    data = external.with_name("cnn.onnx.data")
    data.write_bytes(data.read_bytes()[:-5000])
    err = refuses("optimize", external, "-o", external.with_name("q.onnx"))
    assert "QG103" in err
    assert "the file is truncated: copy it again" in err


@pytest.mark.parametrize("place", ["../outside.data", "/etc/passwd"])
def test_external_data_escapes(refuses, external, place):
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    external.write_bytes(model.SerializeToString())
    err = refuses("optimize", external, "-o", external.with_name("q.onnx"))
    assert "QG103" in err
    assert "points outside the model's folder" in err


def test_nan_weights(refuses, poisoned):
    err = refuses("optimize", poisoned, "-o", poisoned.with_name("q.onnx"), "-r", "int8-weights")
    assert "error QG401 residual1.conv.weight: has NaN or Inf" in err
    assert 'names = ["residual1.conv.weight"]' in err


# Outputs


def test_no_output_is_named(refuses, cnn):
    err = refuses("optimize", cnn)
    assert "error QG105 --output" in err
    assert "give -o, e.g. -o cnn.q.onnx" in err


def test_the_output_exists(refuses, cnn):
    cnn.with_name("q.onnx").write_text("precious")
    assert "exists already" in refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"))


def test_the_data_file_of_the_output_exists(refuses, cnn):
    cnn.with_name("q.onnx.data").write_text("precious")
    assert "q.onnx.data, which exists" in refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"))


@pytest.mark.parametrize("name", ["cnn.onnx", "./cnn.onnx"])
def test_the_output_is_the_model(refuses, cnn, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    err = refuses("optimize", "cnn.onnx", "-o", name, "--force")
    assert "belongs to the float model, which is never overwritten" in err


def test_the_output_is_the_models_data(refuses, external):
    external.with_name("other.onnx").write_bytes(external.read_bytes())
    err = refuses("optimize", external.with_name("other.onnx"), "-o", external, "--force")
    assert "cnn.onnx.data: belongs to the float model" in err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".", "is a directory"),
        ("nowhere/q.onnx", "there is no folder"),
        ("zoo:tiny-cnn", "cannot be written"),
    ],
)
def test_bad_outputs(refuses, cnn, tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    err = refuses("optimize", cnn, "-o", name)
    assert "error QG105" in err
    assert text in err


def test_an_unwritable_folder(refuses, cnn, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "is read-only" in refuses("optimize", cnn, "-o", folder / "q.onnx")


@pytest.mark.parametrize("name", ["why.pdf", "why", "nowhere/why.md"])
def test_bad_reports(refuses, cnn, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "error QG105" in refuses("optimize", cnn, "-o", "q.onnx", "--report", name)


def test_a_report_that_exists(refuses, cnn, tmp_path):
    (tmp_path / "why.md").write_text("precious")
    args = ("-o", tmp_path / "q.onnx", "--report", tmp_path / "why.md")
    assert "exists already" in refuses("optimize", cnn, *args)


def test_a_dump_folder_that_is_a_file(refuses, cnn, tmp_path):
    err = refuses("optimize", cnn, "-o", tmp_path / "q.onnx", "--dump-dir", cnn)
    assert "error QG105" in err


# Names


@pytest.mark.parametrize(
    ("args", "code", "near"),
    [
        (["--recipe", "in4"], "QG303", "int4"),
        (["--recipe", "nowhere.toml"], "QG308", "nowhere.toml"),
        (["--target", "openvin"], "QG303", "openvino"),
        (["--stop-after", "canonicalise"], "QG303", "canonicalize"),
        (["--print-after", "insert_qdq"], "QG303", "insert-qdq"),
        (["--set", "min_element=1"], "QG305", "min_elements"),
        (["--set", "linear.weigths=int8"], "QG305", "weights"),
        (["--set", "linear.weights=int9"], "QG302", "int8"),
        (["--set", "linear.solver=rnt"], "QG303", "rtn"),
        (["--set", "options.canonicalize.fold_batchnorm=false"], "QG305", "fold_batch_norm"),
        (["--set", "options.canonicalise.fold_batch_norm=false"], "QG305", "canonicalize"),
        (["--set", "seed"], "QG305", "key=value"),
        (["--set", "seed=x"], "QG305", "seed"),
        (["--set", "linear.names=nothing*"], "QG309", "matches no weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_names(refuses, cnn, args, code, near):
    err = refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"), *args)
    assert code in err
    assert near in err


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["passes", "canonicalise"], "did you mean canonicalize"),
        (["solvers", "rnt"], "did you mean rtn"),
        (["targets", "ortt"], "did you mean ort"),
        (["recipes", "int8weights"], "did you mean int8-weights"),
        (["models", "tiny-lama"], "did you mean tiny-llama"),
        (["models", "-o", "x.onnx"], "which model shall be written?"),
        (["inspect", "zoo:tiny-cnn", "--target", "openvin"], "did you mean openvino"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_names_in_lists(refuses, args, near):
    assert near in refuses(*args)


@pytest.mark.parametrize(
    "text",
    ["this is not TOML [", "unknown_key = 1", "[[rules]]\nweights = 'int9'", "extends = 'in4'"],
)
def test_bad_recipe_files(refuses, cnn, tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    args = ("-o", tmp_path / "q.onnx", "--recipe", tmp_path / "mine.toml")
    assert "error QG30" in refuses("optimize", cnn, *args)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["optimize"], "Missing argument 'MODEL'"),
        (["optimize", "m.onnx", "--recpe", "int4"], "No such option: --recpe"),
        (["optimize", "m.onnx", "--samples", "many"], "'--samples'"),
        (["optimize", "m.onnx", "--samples", "0"], "'--samples'"),
        (["optimize", "m.onnx", "--verify", "never"], "'never'"),
        (["optimize", "m.onnx", "more"], "unexpected extra argument"),
        (["eval", "perplexity", "m.onnx"], "--context"),
        (["bisect", "m.onnx", "--check", "everything"], "'everything'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(refuses, args, text):
    err = refuses(*args)
    assert "error QG100 qgraph" in err
    assert text in err
    assert "--help" in err


def test_a_group_without_a_command(run):
    done = run("eval")
    assert done.code == 1
    assert "error QG100 qgraph eval: Missing command" in done.err


# Data


def floored(cnn, data, *more):
    return ("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--data", data, "--min-sqnr", 1, *more)


@pytest.mark.parametrize(
    ("arrays", "code", "text"),
    [
        ({"img": np.zeros((2, 1, 8, 8), np.float32)}, "QG113", "image"),
        ({"image": np.zeros((2, 3, 8, 8), np.float32)}, "QG116", "[1, 3, 8, 8]"),
        ({"image": np.zeros((2, 8, 8), np.float32)}, "QG115", "rank"),
        ({"image": np.zeros((2, 1, 8, 8), np.int32)}, "QG114", "int32"),
        ({"image": np.full((2, 1, 8, 8), np.nan, np.float32)}, "QG118", "nan"),
        ({"image": np.zeros((0, 1, 8, 8), np.float32)}, "QG119", "no samples"),
    ],
    ids=["name", "shape", "rank", "dtype", "nan", "empty"],
)
def test_data_that_does_not_fit(refuses, cnn, tmp_path_factory, arrays, code, text):
    data = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(data, **arrays)
    err = refuses(*floored(cnn, data))
    assert code in err
    assert text in err


def test_data_that_is_not_there(refuses, cnn):
    assert "QG111" in refuses(*floored(cnn, "nowhere.npz"))


def test_data_that_is_no_archive(refuses, cnn, tmp_path):
    (tmp_path / "d.npz").write_bytes(b"no archive")
    assert "QG112" in refuses(*floored(cnn, tmp_path / "d.npz"))


@pytest.mark.parametrize("floor", ["--min-sqnr", "--max-kl"])
def test_a_floor_without_data(refuses, cnn, floor):
    err = refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"), floor, "1")
    assert "QG130" in err
    assert "give --data" in err


def test_samples_without_data(refuses, cnn):
    err = refuses("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--samples", "4")
    assert "QG131" in err


def test_a_comparison_needs_to_be_told_on_what(refuses):
    err = refuses("compare", "zoo:tiny-cnn", "zoo:tiny-cnn")
    assert "QG131" in err
    assert "give --data FILE.npz (real inputs), or --random N" in err


def test_a_comparison_of_different_models(refuses, images):
    err = refuses("compare", "zoo:tiny-cnn", "zoo:tiny-gpt", "--data", images)
    assert "QG120" in err


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "does not exist"), (b"nothing", "is no readable .npy file")],
)
def test_bad_tokens(refuses, tmp_path, content, text):
    path = tmp_path / "tokens.npy"
    if content is not None:
        path.write_bytes(content)
    args = ("eval", "perplexity", "zoo:tiny-llama", "--tokens", path, "--context", "8")
    assert text in refuses(*args)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (np.zeros((2, 3), np.int64), "expected integers of one dimension"),
        (np.zeros(100, np.float32), "expected integers of one dimension"),
        (np.zeros(3, np.int64), "do not fill one window"),
        (np.full(100, 10**6), "is not in the vocabulary"),
    ],
)
def test_tokens_that_do_not_fit(refuses, tmp_path, tokens, text):
    np.save(tmp_path / "tokens.npy", tokens)
    args = ("--tokens", tmp_path / "tokens.npy", "--context", "8")
    err = refuses("eval", "perplexity", "zoo:tiny-llama", *args)
    # ids outside the vocabulary are refused by ONNX Runtime's Gather or by qgraph, whoever sees them first
    assert text in err or "QG602" in err


def test_tokens_of_a_model_without_text(refuses):
    args = ("--tokens", "zoo:tiny-cnn", "--context", "8")
    assert "QG123 zoo:tiny-cnn" in refuses("eval", "perplexity", "zoo:tiny-llama", *args)


@pytest.mark.parametrize(
    "args",
    [
        ["--data", "x.npz", "--tokens", "zoo:tiny-llama"],
        ["--check", "load", "--min-sqnr", "3"],
        ["--tokens", "zoo:tiny-llama", "--min-sqnr", "3"],
    ],
    ids=" ".join,
)
def test_conflicts_of_bisect(refuses, args):
    assert "QG100 qgraph bisect" in refuses("bisect", "zoo:tiny-llama", *args)


# Exit codes other than 1


def test_a_pass_that_breaks_its_promise(refuses, cnn, recipe_with):
    args = ("-o", cnn.with_name("q.onnx"), "--recipe", recipe_with("Breaks"))
    err = refuses("optimize", cnn, *args, code=2)
    assert "error QG201 pass breaks: claims to be bit-exact" in err


def test_a_pass_that_breaks_the_graph(refuses, cnn, recipe_with):
    args = ("-o", cnn.with_name("q.onnx"), "--recipe", recipe_with("Flattens"))
    assert "error V05 after pass flattens" in refuses("optimize", cnn, *args, code=2)


def test_a_missed_floor_of_compare(run, cnn, images):
    done = run("compare", cnn, cnn, "--data", images, "--rounds", 0, "--max-kl", "-1", "--json")
    assert done.code == 3
    assert done.codes() == ["QG702"]
    assert done.json["outputs"][0]["name"] == "logits"
    assert "error QG702 output 'logits'" in done.err


def test_an_internal_error_is_one_line(run, cnn, recipe_with, tmp_path, snapshot):
    before = snapshot(tmp_path)
    args = ("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--recipe", recipe_with("Raises"))
    done = run(*args)
    assert done.code == 70
    assert done.err.splitlines() == [
        "error QG900: internal error, please report it: ZeroDivisionError: division by zero",
        "  help: -v shows where it happened",
    ]
    assert snapshot(tmp_path) == before
    assert run(*args, "--json").codes() == ["QG900"]


def test_tracebacks_only_with_v(run, cnn, recipe_with):
    args = ("optimize", cnn, "-o", cnn.with_name("q.onnx"), "--recipe", recipe_with("Raises"))
    assert "Traceback" in run("-v", *args).err
    assert "Traceback" in run(*args, "-v").err
    assert "Traceback" in run("inspect", "nowhere.onnx", "--verbose").err
    assert "Traceback" not in run("inspect", "nowhere.onnx").err


def test_ctrl_c(run, cnn, monkeypatch, tmp_path, snapshot):
    from qgraph import compiler

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "optimize", interrupted)
    before = snapshot(tmp_path)
    done = run("optimize", cnn, "-o", cnn.with_name("q.onnx"))
    assert (done.code, done.err.strip()) == (130, "interrupted")
    assert snapshot(tmp_path) == before


def test_what_the_runtime_refuses_is_no_internal_error():
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    found, code = app.explain(InvalidArgument("Got invalid dimensions"))
    assert (found[0].code, code) == ("QG602", 1)


def test_every_reference_model_can_be_optimized_and_read_back(run, tmp_path):
    for name in models.names():
        out = tmp_path / f"{name}.onnx"
        done = run("optimize", f"zoo:{name}", "-o", out, "-r", "int8-weights", "--json")
        assert done.code == 0, done.err
        assert json.loads(run("inspect", out, "--json").out)["metadata"]["qgraph"]
