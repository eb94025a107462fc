"""Every reference model builds, is valid, runs, and reaches what was recorded for it."""

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qgraph import models
from qgraph.models.odd import feeds

WINDOW = 256
NAMES = models.names()
DECODERS = ["tiny-bitnet", "tiny-gpt", "tiny-llama"]


@cache
def serialized(name: str) -> bytes:
    return ir.to_proto(models.build(name)).SerializeToString()


@cache
def session(name: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(serialized(name), options, providers=["CPUExecutionProvider"])


def logits(name: str, ids: np.ndarray) -> np.ndarray:
    return session(name).run(None, {"input_ids": ids})[0]


def perplexity(name: str) -> float:
    """exp(mean nll) over windows of 256 tokens that do not overlap, 255 predictions in each."""
    tokens = models.eval_tokens(name)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    total = 0.0
    for part in np.array_split(windows, 8):
        scores = logits(name, part)[:, :-1].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= np.take_along_axis(scores, part[:, 1:, None], -1).sum()
    return float(np.exp(total / (len(windows) * (WINDOW - 1))))


@pytest.mark.parametrize("name", NAMES)
def test_builds_the_same_valid_bytes_each_time(name):
    proto = onnx.load_from_string(serialized(name))
    onnx.checker.check_model(proto, full_check=True)
    again = ir.to_proto(models.build(name)).SerializeToString()
    assert again == serialized(name)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there_and_unique(name):
    graph = models.build(name).graph
    nodes = [node.name for node in graph]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert all(value.uses() for value in graph.initializers.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 11])
@pytest.mark.parametrize("name", NAMES)
def test_runs_at_any_batch_and_length(name, batch, seq):
    sample = feeds(models.build(name), batch=batch, seq=seq)
    for declared, value in zip(
        session(name).get_outputs(), session(name).run(None, sample), strict=True
    ):
        assert value.shape[0] == batch
        assert len(declared.shape) == value.ndim
        assert np.isfinite(value).all()


@pytest.mark.parametrize("name", DECODERS)
def test_reaches_the_recorded_perplexity(name):
    assert perplexity(name) == pytest.approx(models.info(name).reached, rel=0.01)


def test_reaches_the_recorded_accuracy():
    pytest.importorskip("sklearn")
    images, labels = models.eval_data()
    scores = session("tiny-cnn").run(None, {"image": images})[0]
    accuracy = np.mean(scores.argmax(1) == labels)
    assert accuracy == pytest.approx(models.info("tiny-cnn").reached, abs=0.005)
    assert accuracy > 0.97


@pytest.mark.parametrize("name", DECODERS)
def test_attention_never_looks_ahead(name):
    ids = models.eval_tokens(name)[None, :40]
    changed = ids.copy()
    changed[0, 25:] = 7
    same = np.abs(logits(name, ids) - logits(name, changed))[0].max(-1)
    assert same[:25].max() < 1e-4
    assert same[25:].min() > 1e-3


def test_positions_go_beyond_the_training_length():
    ids = models.eval_tokens("tiny-llama")[None, :512]
    assert np.isfinite(logits("tiny-llama", ids)).all()


@pytest.mark.parametrize("chunks", [[9, 1, 1, 1], [1, 1, 1], [6, 5]])
def test_cached_decoding_equals_the_whole_sequence(chunks):
    ids = models.eval_tokens("tiny-llama-kv")[: 2 * sum(chunks)].reshape(2, -1)
    expected = logits("tiny-llama", ids)
    run = session("tiny-llama-kv")
    inputs = [i.name for i in run.get_inputs()][1:]
    assert inputs[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    outputs = [o.name for o in run.get_outputs()]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    cache = [np.zeros((2, 4, 0, 16), np.float32) for _ in inputs]
    parts, start = [], 0
    for length in chunks:
        part = ids[:, start : start + length]
        start += length
        scores, *cache = run.run(None, {"input_ids": part, **dict(zip(inputs, cache, strict=True))})
        assert cache[0].shape == (2, 4, start, 16)
        parts.append(scores)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-4)


def test_bitnet_weights_are_exactly_ternary():
    graph = models.build("tiny-bitnet").graph
    linear = [v for v in graph.initializers.values() if str(v.name).endswith("_proj.weight")]
    assert len(linear) == 5 * 7
    for value in linear:
        w = value.const_value.numpy()
        assert w.dtype == np.float32
        scale = np.abs(w).max()
        assert set(np.unique(w)) == {-scale, np.float32(0), scale}


def test_weights_are_stored_k_by_n():
    graph = models.build("tiny-llama").graph
    assert list(graph.initializers["layers.0.gate_proj.weight"].shape) == [128, 384]
    assert list(graph.initializers["lm_head.weight"].shape) == [128, 1024]


def test_tied_embeddings_are_one_initializer():
    graph = models.build("tiny-gpt").graph
    readers = sorted(use.node.op_type for use in graph.initializers["wte.weight"].uses())
    assert readers == ["Gather", "Transpose"]
