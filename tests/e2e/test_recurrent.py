"""Silero VAD: the LSTM in the branches of its If runs in integers, read from the runtime's own graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qgraph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import accuracy_models
import baselines
import real_data

Array = np.ndarray[Any, Any]
# mean |dprob| against float over the whole recording. Measured: auto .0004, int8-static .0241; the best static
# result of another tool is .028.
RECIPES = {"auto": 0.002, "int8-static": 0.028}


@pytest.fixture
def silero() -> Path:
    try:
        return real_data.data(accuracy_models.MODELS["silero"].path)
    except real_data.MissingData as e:
        pytest.skip(str(e))


def walk(graph: onnx.GraphProto, holders: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """(node, the types of the nodes whose bodies it stands in, the graph)."""
    for node in graph.node:
        yield node, holders, graph
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g, (*holders, node.op_type))


@pytest.mark.parametrize("recipe", RECIPES)
def test_silero(recipe, silero, tmp_path):
    samples = list(accuracy_models.MODELS["silero"].samples()) if "static" in recipe else None
    output = tmp_path / "q.onnx"
    result = qgraph.optimize(silero, recipe, data=samples, output=output)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    onnxruntime.InferenceSession(str(output), options)
    executed = list(walk(onnx.load(tmp_path / "executed.onnx").graph))
    recurrent = [(n, holders) for n, holders, _ in executed if "LSTM" in n.op_type]
    assert [n.op_type for n, _ in recurrent] == ["DynamicQuantizeLSTM"] * 2
    assert all(holders and set(holders) == {"If"} for _, holders in recurrent)
    # No weight is expanded at a run: DequantizeLinear is left for activations alone.
    for node, _, graph in executed:
        if node.op_type == "DequantizeLinear":
            assert node.input[0] not in {i.name for i in graph.initializer}
    stored = onnx.load(output)
    assert {o.domain for o in stored.opset_import} >= {"", "com.microsoft"}
    codes = {t.name: list(t.dims) for t in stored.graph.initializer if "rnn" in t.name}
    assert sorted(d for n, d in codes.items() if n.endswith(".codes")) == [[1, 128, 512]] * 2
    entries = [e for e in result.report.ledger if "LSTM" in e.operators]
    assert [e.runs for e in entries] == [["DynamicQuantizeLSTM"] * 2] * 2
    if samples:
        # 512 gates of 128 inputs and 128 states in the branch that is taken, nothing in the other.
        macs = [o.macs for o in result.report.operators if o.op == "LSTM"]
        assert sorted(macs) == [0, 512 * 256]
        assert result.report.integer_macs == 1.0
    task = accuracy_models.MODELS["silero"].task
    assert baselines.TASKS[task](str(output), float_model=silero)["mean_abs"] <= RECIPES[recipe]
