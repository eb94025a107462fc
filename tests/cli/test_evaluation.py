"""`qgraph eval accuracy`, `embeddings`, `tensors` and their reports; `compare --report`."""

import json

import numpy as np
import pytest

from qgraph import models


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    import qgraph

    path = tmp_path_factory.mktemp("quantized") / "cnn.onnx"
    qgraph.optimize("zoo:tiny-cnn", "int8-weights", output=path, verify="off")
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Sixteen digits and what they show."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = models.eval_data()
    np.savez(folder / "digits.npz", image=images[:16])
    np.save(folder / "labels.npy", labels[:16])
    return folder / "digits.npz", folder / "labels.npy"


def test_accuracy(run, quantized, digits):
    args = ("eval", "accuracy", quantized, "--data", digits[0], "--labels", digits[1])
    found = run(*args, "--json").json
    assert found["accuracy"]["value"] > 0.9
    assert found["samples"] == 16
    done = run(*args, "--float", "zoo:tiny-cnn")
    assert (done.code, done.err) == (0, "")
    for text in (
        "accuracy of the float model",
        "change",
        "same top-1",
        "largest class is the label",
    ):
        assert text in done.out
    both = run(*args, "--float", "zoo:tiny-cnn", "--json").json
    assert both["quant_accuracy"] == found["accuracy"]
    assert both["change"]["value"] == pytest.approx(
        both["quant_accuracy"]["value"] - both["float_accuracy"]["value"]
    )


def test_wrong_labels_lower_the_accuracy(run, digits, tmp_path):
    wrong = np.load(digits[1])
    wrong[:8] = (wrong[:8] + 1) % 10
    np.save(tmp_path / "wrong.npy", wrong)
    args = ("--data", digits[0], "--labels", tmp_path / "wrong.npy", "--json")
    assert run("eval", "accuracy", "zoo:tiny-cnn", *args).json["accuracy"]["value"] <= 0.5


def test_labels_that_do_not_fit(run, digits, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros(3, np.int64))
    args = ("eval", "accuracy", "zoo:tiny-cnn", "--data", digits[0], "--labels")
    for path, text in ((tmp_path / "few.npy", "QG125"), (tmp_path / "none.npy", "does not exist")):
        done = run(*args, path)
        assert done.code == 1
        assert text in done.err


def test_embeddings(run, quantized, digits, tmp_path):
    args = ("eval", "embeddings", quantized, "--float", "zoo:tiny-cnn", "--data", digits[0])
    found = run(*args, "--json").json
    assert found["vectors"] == 16
    assert 0.99 < found["cosine"]["value"] < 1
    assert found["spearman"] > 0.99
    np.save(tmp_path / "scores.npy", np.arange(8.0))
    done = run(*args, "--scores", tmp_path / "scores.npy")
    assert done.code == 0, done.err
    assert "rank correlation with scores" in done.out


def test_tensors(run, quantized, digits):
    args = ("eval", "tensors", quantized, "--float", "zoo:tiny-cnn", "--data", digits[0])
    done = run(*args, "--samples", 8, "--worst", 2)
    assert (done.code, done.err) == (0, "")
    for text in (
        "Which layer hurts",
        "Isolated",
        "Accumulated",
        "more (--worst N",
        "hold something else",
    ):
        assert text in done.out
    found = run(*args, "--samples", 8, "--json").json
    assert {"name", "operator", "isolated", "accumulated"} == found["tensors"][0].keys()
    assert found["moved"]


def test_a_text_and_its_tokenizer(run, tmp_path):
    from importlib import resources

    pytest.importorskip("tokenizers")
    tokenizer = resources.files("qgraph.models") / "tokenizer.json"
    (tmp_path / "text.txt").write_text(
        "Once upon a time there was a little girl.\nShe was happy.\n" * 8
    )
    args = ("eval", "perplexity", "zoo:tiny-llama", "--context", 16)
    text = ("--text", tmp_path / "text.txt", "--tokenizer", tokenizer)
    found = run(*args, *text, "--json").json
    import tokenizers

    ids = (
        tokenizers.Tokenizer.from_file(str(tokenizer))
        .encode((tmp_path / "text.txt").read_text())
        .ids
    )
    np.save(tmp_path / "ids.npy", np.array(ids))
    same = run(*args, "--tokens", tmp_path / "ids.npy", "--json").json
    assert found["windows"] == len(ids) // 16
    assert found == same


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "what shall be predicted"),
        (["--tokens", "zoo:tiny-llama", "--text", "a.txt"], "what shall be predicted"),
        (["--text", "a.txt"], "needs a tokenizer"),
        (["--tokens", "zoo:tiny-llama", "--tokenizer", "t.json"], "is for --text"),
        (["--text", "a.txt", "--tokenizer", "none.json"], "none.json: does not exist"),
    ],
)
def test_tokens_or_a_text(run, args, text):
    done = run("eval", "perplexity", "zoo:tiny-llama", "--context", 8, *args)
    assert done.code == 1
    assert text in done.err


COMMANDS = {
    "comparison": ("compare", "FLOAT", "QUANT", "--rounds", 2),
    "accuracy": ("eval", "accuracy", "QUANT", "--float", "FLOAT", "--labels", "LABELS"),
    "embeddings": ("eval", "embeddings", "QUANT", "--float", "FLOAT"),
    "tensors": ("eval", "tensors", "QUANT", "--float", "FLOAT", "--samples", 8),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_reports(run, quantized, digits, tmp_path, kind):
    names = {"FLOAT": "zoo:tiny-cnn", "QUANT": quantized, "LABELS": digits[1]}
    args = [names.get(each, each) for each in COMMANDS[kind]]
    paths = [tmp_path / f"found.{suffix}" for suffix in ("html", "json", "md")]
    reports = [arg for path in paths for arg in ("--report", path)]
    done = run(*args, "--data", digits[0], *reports)
    assert done.code == 0, done.err
    page, data, markdown = (path.read_text() for path in paths)
    told = json.loads(data)
    assert told["kind"] == kind
    assert told["command"] == [
        "qgraph",
        *map(str, args),
        "--data",
        str(digits[0]),
        *map(str, reports),
    ]
    assert markdown.startswith(f"# qgraph eval {kind}: {quantized} against zoo:tiny-cnn")
    assert page.startswith("<!doctype html>")
    for sentence in told["how"]:
        assert sentence in markdown
    again = run(*args, "--data", digits[0], *reports)
    assert again.code == 1  # they are there already
    assert "QG105" in again.err


def test_a_report_of_an_unknown_kind_is_refused_before_any_work(run, digits):
    done = run(
        "eval",
        "tensors",
        "none.onnx",
        "--float",
        "none.onnx",
        "--data",
        digits[0],
        "--report",
        "a.pdf",
    )
    assert done.code == 1
    assert "a.pdf: is no kind of report" in done.err
