"""Calibration is a sum: shards, their order, threads, and what runs together change no bit of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qgraph import calibrate, data, files, models
from qgraph.models.odd import ODD, feeds
from qgraph.observers import Stats, Wanted
from qgraph.passes.observe import observed

ROOT = Path(__file__).parents[2]
GRAPHS = {**ODD, **{name: lambda n=name: models.build(n) for name in ("tiny-cnn", "tiny-llama")}}

# Digest of the model with calibrated grids, by two range methods.
STATIC = """
import hashlib, sys
import qgraph
from qgraph import models
from qgraph.models.odd import feeds

for name in ("tiny-cnn", "tiny-gpt"):
    model = models.build(name)
    samples = [feeds(model, seed, 1, 6) for seed in range(9)]
    for method in ("mse", "moving-average"):
        result = qgraph.optimize(
            model, "int8-static", data=samples, threads=int(sys.argv[1]), verify="off", inspect=False,
            overrides=["min_elements=0", f"options.observe.method={method}"],
        )
        content = result.to_proto().SerializeToString(deterministic=True)
        print(name, method, hashlib.sha256(content).hexdigest(), len(result.model.graph))
"""


def statistics(model: Any, samples: list[dict[str, Any]], threads: int = 1) -> Stats:
    wanted = dict.fromkeys(observed(model), Wanted())
    dataset = data.load(samples, data.inputs_of(model))
    return Stats(calibrate.run(model, dataset, wanted, threads=threads))


def digest(stats: Stats, path: Path) -> str:
    stats.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", GRAPHS)
def test_shards_in_any_order_are_the_whole(name: str, tmp_path: Path) -> None:
    model = files.load(GRAPHS[name]())
    # Enough of one shape that some run together.
    samples = [feeds(model, seed, 1, 5 + seed // 20) for seed in range(22)]
    if not observed(model):
        pytest.skip("nothing in it is observed")
    shards = [statistics(model, part) for part in (samples[:9], samples[9:12], samples[12:])]
    merged = []
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Stats()
        for index in order:
            total.merge(shards[index])
        merged.append(total)
    wholes = [statistics(model, samples), statistics(model, samples[::-1], threads=2)]
    found = [digest(stats, tmp_path / "stats") for stats in (*merged, *wholes)]
    assert len(set(found)) == 1
    fewer = digest(statistics(model, samples[1:]), tmp_path / "stats")
    assert fewer != found[0], "a missing sample shows"


def test_a_static_model_has_the_same_bytes_in_another_process() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", STATIC, threads],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(ROOT),
                "OPENBLAS_NUM_THREADS": threads,
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed, threads in (("0", "1"), ("4711", "2"))
    ]
    assert len(said[0].splitlines()) == 4
    assert said[0] == said[1]
