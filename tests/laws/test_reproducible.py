"""Law 7: the same bytes in another process, with another hash seed and another number of threads, and in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qgraph
from qgraph import models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def in_a_process(hash_seed: str, threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "digests.py", str(threads)],
        env={
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": path,
            "OPENBLAS_NUM_THREADS": str(threads),
        },
        check=True,
        capture_output=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_bytes_do_not_depend_on_hash_seed_process_or_threads():
    first, second = in_a_process("0", 1), in_a_process("4711", 3)
    assert len(first) > 200
    assert [k for k in first if first[k] != second[k]] == []


@pytest.mark.parametrize("external", [False, True])
def test_files_are_the_same_twice(tmp_path, external):
    content = []
    for run in ("a", "b"):
        folder = tmp_path / run
        folder.mkdir()
        result = qgraph.optimize(
            "zoo:tiny-llama",
            "int4",
            output=folder / "q.onnx",
            external_data=external,
            inspect=False,
        )
        assert result.path == folder / "q.onnx"
        content.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    assert content[0] == content[1]
    assert len(content[0]) == (2 if external else 1)


def test_the_seed_is_in_the_model_and_the_recipe_where_it_is_not_a_preset():
    model: Any = models.build("tiny-cnn")
    plain = qgraph.optimize(model, "int4", verify="off", inspect=False).model.metadata_props
    assert "int4" in plain["qgraph"] and "seed=0" in plain["qgraph"]
    assert "qgraph.recipe" not in plain
    changed = qgraph.optimize(
        model, "int4", overrides=["min_elements=9"], verify="off", inspect=False
    ).model.metadata_props
    assert json.loads(changed["qgraph.recipe"])["min_elements"] == 9
