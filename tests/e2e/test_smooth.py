"""Models with injected outliers: static INT8 loses them, and with smoothing they are what they were.

Outliers of norms by themselves run with QGRAPH_FULL=1; by default tests/stress has them in static INT8.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import qgraph
from qgraph import evaluate

sys.path.insert(0, str(Path(__file__).parent))
import real_data

FULL = os.environ.get("QGRAPH_FULL") == "1"


@pytest.mark.parametrize("name", ["stories_vo30", *(["stories_norm30"] if FULL else [])])
def test_outliers_are_smoothed(name, tmp_path):
    tokenizer = "lm/stories260K/tok512.bin"
    try:
        path = real_data.data(f"stress/{name}.onnx")
        reference = real_data.data("lm/stories260K/stories260K.onnx")
        encoder = real_data.SentencePieces(real_data.data(tokenizer))
        stories = json.loads(real_data.data("text/tinystories/tinystories_0_699.json").read_text())
        texts = real_data.story_tokens(tokenizer, 10)
    except real_data.MissingData as e:
        pytest.skip(str(e))
    data = [{"input_ids": encoder.encode(s)[None, :512]} for s in stories[:32]]
    found = {}
    for recipe in ("int8-static", "int8-smooth"):
        output = tmp_path / f"{recipe}.onnx"
        qgraph.optimize(path, recipe, data=data, output=output)
        found[recipe] = evaluate.divergence(reference, output, texts, real_data.CONTEXT)
    smoothed = found["int8-smooth"].divergence.kl_mean.value
    assert smoothed < 0.02
    assert found["int8-static"].divergence.kl_mean.value > 4 * smoothed
    assert found["int8-smooth"].divergence.agreement.value > 0.93
