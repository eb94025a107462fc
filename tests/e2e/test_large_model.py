"""A large model goes through INT4 in little memory: weights stay in files from load to save.

Memory is anonymous memory (with shared memory) of the process and its children: mapped files do not count, for the
system takes their pages back at will. QGRAPH_FULL=1 adds a model of 3 GB, which takes minutes and 4 GB of disk.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import files, graph, numerics, runtime

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import decoders  # noqa: E402
import measure  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc"),
]

MB = 1 << 20
# Python, ONNX Runtime and the graph of a decoder, before any weight is read.
BASE = 200 * MB
FULL_LIMIT = 600 * MB


@dataclass(frozen=True)
class Case:
    """A decoder before and after."""

    shape: decoders.Shape
    source: Path
    output: Path
    cost: measure.Cost


def _optimized(shape: decoders.Shape, folder: Path) -> Case:
    source = decoders.write(folder / "float.onnx", shape)
    output = folder / "quantized.onnx"
    command = [sys.executable, "-m", "qgraph", "optimize", str(source), "-o", str(output)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    cost = measure.run([*command, "--recipe", "int4", "--external-data"], env)
    return Case(shape, source, output, cost)


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    """608 MB of weights, too many for the proofs that small models go through. pytest would keep its own folders."""
    with tempfile.TemporaryDirectory(prefix="qgraph-test-") as folder:
        yield _optimized(decoders.SHAPES["quick"], Path(folder))


def largest(path: Path) -> int:
    tensors = [v.const_value for _, v in graph.initializers(ir.load(path))]
    return max(t.nbytes for t in tensors if t is not None)


def check_file(path: Path) -> None:
    """External data is aligned, in order and without gaps but for alignment; no initializer is dead."""
    model = ir.load(path)
    used = {v for node in graph.nodes(model) for v in node.inputs}
    end = 0
    for _, v in graph.initializers(model):
        assert v in used or v.is_graph_output(), f"{v.name} is dead"
    held = [v.const_value for _, v in graph.initializers(model)]
    external = [t for t in held if isinstance(t, ir.ExternalTensor)]
    for tensor in sorted(external, key=lambda t: t.offset or 0):
        assert tensor.offset is not None
        assert tensor.offset % files.ALIGNMENT == 0
        assert 0 <= tensor.offset - end < files.ALIGNMENT
        end = tensor.offset + tensor.nbytes
    assert {str(t.location) for t in external} == {f"{path.name}.data"}
    assert end == path.with_name(f"{path.name}.data").stat().st_size


def logits(path: Path, shape: decoders.Shape) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (1, 8))
    return np.asarray(runtime.session(path).run(None, {"input_ids": ids})[0])


def test_memory_is_bounded_by_the_largest_weight(case: Case) -> None:
    assert case.cost.peak_anonymous < BASE + largest(case.source), case.cost.output


def test_size(case: Case) -> None:
    before, after = files.file_bytes(case.source), files.file_bytes(case.output)
    assert before > 600 * 10**6
    assert after < 0.19 * before


def test_external_data(case: Case) -> None:
    check_file(case.output)


def test_result_runs(case: Case) -> None:
    found = logits(case.output, case.shape)
    assert found.shape == (1, 8, case.shape.vocabulary)
    assert numerics.sqnr_db(logits(case.source, case.shape), found) > 10


@pytest.mark.skipif(os.environ.get("QGRAPH_FULL") != "1", reason="QGRAPH_FULL=1 asks for 3 GB")
def test_three_gigabytes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="qgraph-test-", dir=tmp_path) as folder:
        full = _optimized(decoders.SHAPES["3gb"], Path(folder))
        assert files.file_bytes(full.source) > 3 * 10**9
        assert full.cost.peak_anonymous < min(FULL_LIMIT, BASE + largest(full.source))
        check_file(full.output)
        assert np.isfinite(logits(full.output, full.shape)).all()
