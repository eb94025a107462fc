"""Calibration of models from the wild (QGRAPH_TEST_DATA)."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np
import pytest

from qgraph import calibrate, data, files, graph
from qgraph.observers import NoGrid, Wanted, choose
from qgraph.passes.observe import observed
from qgraph.spec import QuantSpec

DATA = Path(os.environ.get("QGRAPH_TEST_DATA", ""))
pytestmark = pytest.mark.skipif(not DATA.name, reason="QGRAPH_TEST_DATA is not set")
SPEC = QuantSpec.parse("uint8.tensor.asym")


def test_silero_bodies(tmp_path: Path) -> None:
    folder = DATA / "other" / "silero_vad"
    model = files.load(folder / "silero_vad_16k_op15.onnx")
    with wave.open(str(folder / "test.wav")) as sound:
        samples = np.frombuffer(sound.readframes(576 * 8), np.int16).astype(np.float32) / 32768
    feeds = [
        {
            "input": frame[None],
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000, np.int64),
        }
        for frame in samples.reshape(-1, 576)
    ]
    lstm = [n for n in graph.nodes(model) if n.op_type == "LSTM"]
    names = [
        str(v.name) for n in lstm for v in (n.inputs[0], *n.outputs) if v is not None and v.name
    ]
    assert len(lstm) == 2, "one in each branch of an If"
    assert set(names) <= set(observed(model))
    dataset = data.load(feeds, data.inputs_of(model))
    wanted = dict.fromkeys([*names, *observed(model)], Wanted())
    found = calibrate.run(model, dataset, wanted, threads=1)
    seen = {name: found[name].samples for name in names}
    assert sorted(set(seen.values())) == [0, 8], "one branch runs, the other never does"
    used = next(n for n in lstm if seen[str(n.outputs[0].name)])
    hidden = found[str(used.outputs[0].name)]
    assert hidden.count == 8 * 128
    assert -1 < hidden.minimum < 0 < hidden.maximum < 1
    again = calibrate.run(model, dataset, wanted, threads=2, max_memory=10_000)
    found.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_minilm_masked_logits_get_no_grid(tmp_path: Path) -> None:
    model = files.load(DATA / "encoder" / "minilm_l6_v2" / "minilm_l6_v2.onnx")
    rng = np.random.default_rng(0)
    feeds = []
    for length in (12, 31, 64):
        ids = rng.integers(1000, 20_000, (2, length))
        mask = np.ones_like(ids)
        mask[1, length // 2 :] = 0
        feeds.append(
            {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        )
    dataset = data.load(feeds, data.inputs_of(model))
    wanted = dict.fromkeys(observed(model), Wanted())
    found = calibrate.run(model, dataset, wanted, threads=1)
    grids = {name: choose(stats, SPEC) for name, stats in found.items()}
    masked = {n.inputs[0].name for n in graph.nodes(model) if n.op_type == "Softmax"}
    assert len(masked) == 6
    for name, grid in grids.items():
        if name in masked:
            assert isinstance(grid, NoGrid), name
            assert "sentinel" in grid.reason or "infinite" in grid.reason
    refused = [name for name, grid in grids.items() if isinstance(grid, NoGrid)]
    assert len(refused) <= 2 * len(masked) + 4, refused
    found.save(tmp_path / "a")
    calibrate.run(model, dataset, wanted, threads=2).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "threads change nothing"
