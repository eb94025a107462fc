"""Static INT8 on language models: masks of -1e9 and shared weights do no harm, in ONNX Runtime and in OpenVINO.

ONNX Runtime's own static quantizer with its defaults puts a grid on masked logits: MiniLM falls to Spearman .613 and
stories260K to perplexity 54.5.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgraph
from qgraph import graph

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import baselines
import openvino_session
import real_data

pytestmark = pytest.mark.slow
Feeds = list[dict[str, Any]]


def stories() -> Feeds:
    """Other stories than those that are measured."""
    encoder = real_data.SentencePieces(real_data.data("lm/stories260K/tok512.bin"))
    file = real_data.data("text/tinystories/tinystories_0_699.json")
    return [
        {"input_ids": encoder.encode(text)[None, :256]}
        for text in json.loads(file.read_text("utf-8"))[:16]
    ]


def sentences() -> Feeds:
    """Of the training part, in padded batches."""
    pytest.importorskip("tokenizers")
    file = real_data.data("text/stsb/stsb-en-train.csv")
    with file.open(newline="", encoding="utf-8") as opened:
        texts = [row[0] for row in csv.reader(opened)][:64]
    return [dict(feeds) for _, feeds in real_data.sentence_batches(texts, 8)]


def reactions() -> Feeds:
    """The last ones; the first are measured."""
    tokens = [t for t, _ in real_data.reaction_tokens()][-24:]
    return [{"input_ids": t[None], "attention_mask": np.ones_like(t)[None]} for t in tokens]


def made(model: str, samples: Callable[[], Feeds], target: str, path: Path) -> tuple[Any, Any, Any]:
    """The result, and what opens the quantized and the float model in the target's runtime."""
    if target == "openvino":
        pytest.importorskip("openvino")
    try:
        source = real_data.data(model)
        data = samples()
    except real_data.MissingData as e:
        pytest.skip(str(e))
    output = path / "q.onnx"
    result = qgraph.optimize(
        source, "int8-static", target=target, data=data, output=output, verify="ends"
    )
    # No grid has to reach a mask.
    assert result.report.activations
    assert all(max(-a.low, a.high) < 1e4 for a in result.report.activations)
    if target == "openvino":
        return result, *(partial(openvino_session.OpenVINOSession, p) for p in (output, source))
    return result, output, source


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_sentences_stay_what_they_are(target, tmp_path):
    result, quantized, source = made(
        "encoder/minilm_l6_v2/minilm_l6_v2.onnx", sentences, target, tmp_path
    )
    assert result.report.integer_macs > 0.98
    found = baselines.minilm(quantized, limit=200, float_model=source)
    reference = baselines.minilm(source, limit=200)
    assert found["spearman"] > reference["spearman"] - 0.01
    assert found["cosine_mean"] > 0.99


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_reactions_with_shared_weights(target, tmp_path):
    result, quantized, source = made(
        "lm/rxnmapper_albert/rxnmapper_albert.onnx", reactions, target, tmp_path
    )
    codes = [v for _, v in graph.initializers(result.model) if str(v.name).endswith(".codes")]
    assert len(codes) == len(result.report.quantized) == 11
    assert sorted(len(v.uses()) for v in codes)[-6:] == [12] * 6, (
        "twelve layers of one set of weights"
    )
    found = baselines.rxnmapper(quantized, limit=20, float_model=source)
    assert found["agreement"] > 0.99
    assert found["kl_mean"] < 0.002


def test_stories_go_on(tmp_path):
    result, quantized, source = made("lm/stories260K/stories260K.onnx", stories, "ort", tmp_path)
    assert {e.code for e in result.ledger if "mask" in e.weight} == {"QG311"}
    found = baselines.stories(quantized, limit=20, float_model=source)
    assert found["kl_mean"] < 0.0136, "what SmoothQuant reaches elsewhere"
    assert found["perplexity"] < 1.01 * baselines.stories(source, limit=20)["perplexity"]
