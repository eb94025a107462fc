"""`qgraph compare` and `qgraph eval perplexity`."""

import numpy as np
import pytest

from qgraph import models


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    import qgraph

    path = tmp_path_factory.mktemp("quantized") / "cnn.onnx"
    qgraph.optimize("zoo:tiny-cnn", "int8-weights", output=path, verify="off")
    return path


def test_compare(run, cnn, quantized, images):
    done = run("compare", cnn, quantized, "--data", images, "--rounds", 3)
    assert (done.code, done.err) == (0, "")
    for text in (
        "images.npz, 4 samples",
        "logits",
        " dB",
        "KL divergence",
        "same top-1",
        "by turns",
    ):
        assert text in done.out


def test_compare_json(run, cnn, quantized, images):
    found = run("compare", cnn, quantized, "--data", images, "--samples", 2, "--json").json
    keys = {
        "outputs",
        "samples",
        "data_digest",
        "float_bytes",
        "quant_bytes",
        "size_ratio",
        "bits_per_weight",
    }
    assert found.keys() == {*keys, "latency", "data"}
    assert found["samples"] == 2
    assert found["size_ratio"] < 0.5
    assert found["latency"]["rounds"] == 20
    (logits,) = found["outputs"]
    assert logits["error"]["sqnr_db"] > 20


def test_compare_with_itself(run, cnn, images):
    done = run("compare", cnn, cnn, "--data", images, "--rounds", 0)
    assert "exact" in done.out
    assert "latency" not in done.out
    found = run("compare", cnn, cnn, "--data", images, "--rounds", 0, "--json").json
    assert found["outputs"][0]["error"]["sqnr_db"] == "inf"
    assert found["latency"] is None


def test_random_inputs_are_named_as_such(run, cnn, quantized):
    done = run("compare", cnn, quantized, "--random", 2, "--rounds", 0)
    assert "random inputs (2): says little of accuracy" in done.out
    assert run("compare", cnn, quantized, "--random", 2, "--json").json["data"] == "random (2)"


def test_data_from_a_function(run, cnn, quantized, tmp_path):
    (tmp_path / "feeds.py").write_text(
        "import numpy as np\n"
        "def some():\n"
        "    for seed in range(9):\n"
        "        yield {'image': np.random.default_rng(seed).random((1, 1, 8, 8), np.float32)}\n"
    )
    source = f"{tmp_path / 'feeds.py'}:some"
    found = run("compare", cnn, quantized, "--data", source, "--samples", 3, "--json").json
    assert found["samples"] == 3


def test_logits_by_name(run, cnn, quantized, images):
    args = ("--data", images, "--rounds", 0, "--logits")
    assert run("compare", cnn, quantized, *args, "logits").code == 0
    wrong = run("compare", cnn, quantized, *args, "logit")
    assert wrong.code == 1
    assert "did you mean logits?" in wrong.err


def test_perplexity(run):
    args = ("--tokens", "zoo:tiny-llama", "--context", 256, "--limit", 2560)
    done = run("eval", "perplexity", "zoo:tiny-llama", *args)
    assert done.code == 0
    assert "2,550 predictions" in done.out
    assert "in 10 windows of 256 that do not overlap" in done.out
    found = run("eval", "perplexity", "zoo:tiny-llama", *args, "--json").json
    assert found["windows"] == 10
    assert found["perplexity"] == pytest.approx(np.exp(found["nll"]))
    assert 10 < found["perplexity"] < 100


def test_perplexity_against_float(run, tmp_path):
    out = tmp_path / "q.onnx"
    assert run("optimize", "zoo:tiny-llama", "-r", "int8-weights", "-o", out, "-q").code == 0
    np.save(tmp_path / "tokens.npy", models.eval_tokens("tiny-llama")[:1000].astype(np.int32))
    args = ("--float", "zoo:tiny-llama", "--tokens", tmp_path / "tokens.npy", "--context", 100)
    done = run("eval", "perplexity", out, *args)
    assert done.code == 0, done.err
    for text in ("zoo:tiny-llama", "KL divergence", "same top-1", "990 predictions"):
        assert text in done.out
    found = run("eval", "perplexity", out, *args, "--json").json
    assert found.keys() == {
        "model",
        "float_model",
        "context",
        "divergence",
        "float_perplexity",
        "quant_perplexity",
        "nll_change",
    }
    assert 0 < found["divergence"]["kl_mean"]["value"] < 0.01
