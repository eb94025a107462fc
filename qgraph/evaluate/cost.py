"""What a model costs: bytes and time. Times are only ever compared inside one process."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qgraph import files, graph, weights
from qgraph.evaluate import sessions, statistics

SHORTEST = 0.002  # seconds; faster runs are repeated, so that the clock and the call do not count


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of b against a: the median over rounds of seconds_b / seconds_a, and its quartiles.

    Below 1 b is faster. The seconds per run are medians too; compare them with nothing measured
    elsewhere.
    """

    ratio: float
    lower_quartile: float
    upper_quartile: float
    seconds_a: float
    seconds_b: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(statistics.plain(self))


def latency_ratio(
    a: files.Source,
    b: files.Source,
    feeds: Mapping[str, npt.NDArray[Any]],
    rounds: int = 30,
    *,
    threads: int = 1,
) -> Latency:
    """Run a, b, a, b, … on the same feeds; noise of the machine then hits both alike."""
    return interleave(
        sessions.open_session(a, threads=threads),
        sessions.open_session(b, threads=threads),
        feeds,
        rounds,
    )


def interleave(a: Any, b: Any, feeds: Mapping[str, npt.NDArray[Any]], rounds: int) -> Latency:
    """`latency_ratio` of two sessions."""
    if rounds < 1:
        raise ValueError(f"rounds: {rounds} is not a positive number")
    repeats = [_repeats(session, feeds) for session in (a, b)]
    seconds = np.empty((rounds, 2))
    for line in seconds:
        line[:] = [_seconds(s, feeds, n) for s, n in zip((a, b), repeats, strict=True)]
    low, ratio, high = np.quantile(seconds[:, 1] / seconds[:, 0], [0.25, 0.5, 0.75])
    medians = np.median(seconds, axis=0)
    return Latency(
        float(ratio), float(low), float(high), float(medians[0]), float(medians[1]), rounds
    )


def _repeats(session: Any, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    session.run(None, feeds)  # the first run allocates
    once = min(_seconds(session, feeds, 1) for _ in range(3))
    return max(1, int(np.ceil(SHORTEST / once)))


def _seconds(session: Any, feeds: Mapping[str, npt.NDArray[Any]], repeats: int) -> float:
    """Seconds per run, over a few runs in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        session.run(None, feeds)
    return (time.perf_counter() - start) / repeats


def bits_per_weight(float_model: files.Source, quant_model: files.Source) -> float | None:
    """Stored bits of the quantized model for each element of the float model's quantizable weights.

    Counts every constant of the quantized model (codes, scales, zero points, padding, repacked tables) but those that
    the float model holds under the same name and size and that are no such weight: gains, biases, shapes.
    None where the float model has no quantizable weights.
    """
    before, after = files.load(float_model), files.load(quant_model)
    found = weights.find(before)
    elements = sum(math.prod(w.dims) for w in found)
    names = {w.name for w in found}
    kept = {name: size for name, size in _constants(before) if name not in names}
    stored = sum(size for name, size in _constants(after) if kept.get(name) != size)
    return 8 * stored / elements if elements else None


def _constants(model: ir.Model) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every initializer and every Constant node."""
    for _, value in graph.initializers(model):
        assert value.const_value is not None
        yield str(value.name), int(value.const_value.nbytes)
    for node in graph.nodes(model):
        for value in node.outputs:
            tensor = graph.node_constant(value)
            if tensor is not None:
                yield str(value.name), int(tensor.nbytes)


def model_bytes(model: files.Source) -> int:
    """Bytes of a model as stored, external data files included."""
    if isinstance(model, str) and model.startswith("zoo:"):
        model = files.load(model)
    if isinstance(model, str | os.PathLike):
        return files.file_bytes(model)
    if isinstance(model, onnx.ModelProto):
        model = ir.from_proto(model)
    proto = ir.to_proto(model)
    tensors = (value.const_value for _, value in graph.initializers(model))
    outside = sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))
    return int(proto.ByteSize()) + outside
