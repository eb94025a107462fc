"""A float model and its twin, whose weights are replaced one after the other, on the same samples.

What a solver needs to make up for the errors of weights that were solved before: the inputs that it will really see,
and how they and the tensor that its output is added to differ from those of the float model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, runtime
from qgraph.calibrate import instrument
from qgraph.data import Dataset
from qgraph.solver import WeightStats
from qgraph.weights import Use, Weight

Doubles = npt.NDArray[np.float64]
Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]

_ROWS = 512  # rows of a product at a time
_HOPS = 3
_CONFIG = {"session.intra_op.allow_spinning": "0"}


class Twins:
    """Both models on disk; the weights of the twin are overwritten in its file as they are solved.

    Args:
        model: a float model; left unchanged.
        dataset: checked samples.
        folder: an empty folder, for both.
        threads: of ONNX Runtime; 0 is one per core.
    """

    def __init__(self, model: ir.Model, dataset: Dataset, folder: Path, threads: int) -> None:
        self._dataset, self._folder = dataset, folder
        self._threads = threads or os.cpu_count() or 1
        self._inputs = {str(v.name) for v in model.graph.inputs}
        self._models = [
            files.load(files.save(model, folder / name, external_data=True))
            for name in ("float.onnx", "twin.onnx")
        ]

    def replace(self, name: str, array: npt.NDArray[Any]) -> None:
        """Give the twin's initializer of that name other values of the same type and shape."""
        value = next(v for v in _initializers(self._models[1]) if v.name == name)
        held = value.const_value
        assert held is not None
        stored = np.ascontiguousarray(array, held.dtype.numpy())
        if not isinstance(held, ir.ExternalTensor):
            value.const_value = ir.tensor(stored, name=name)
            return
        assert held.length in (None, stored.nbytes)
        held.release()
        with open(held.path, "r+b") as stream:
            stream.seek(held.offset or 0)
            stream.write(stored.tobytes())

    def samples(self, names: Sequence[str]) -> Iterator[dict[str, Pair]]:
        """The values of both models, (float, twin), sample by sample."""
        tapped = [n for n in names if n not in self._inputs]
        sessions = [self._session(m, tapped) for m in self._models] if tapped else []
        for feeds in self._dataset:
            outputs = [s.run(None, feeds) for s in sessions]
            found = dict(zip(tapped, zip(*outputs, strict=True), strict=True))
            yield {n: found[n] if n in found else (feeds[n], feeds[n]) for n in names}

    def _session(self, base: ir.Model, names: Sequence[str]) -> Any:
        model = graph.clone(base)
        model.graph.outputs[:] = [t.value for t in instrument.tap(model, names)]
        graph.remove_dead(model)  # what comes later is not computed
        path = self._folder / "tapped.onnx"
        ir.save(model, path)
        return runtime.session(path, threads=self._threads, accuracy_level=1, config=_CONFIG)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for each in graph.graphs(model):
        yield from each.initializers.values()


@dataclass
class Means:
    """Sums over rows of the inputs of weights that read the same tensors; x of the float model, x̃ of the twin.

    Attributes:
        rows: how many.
        gram: [K, K] sum of x̃ x̃ᵀ.
        cross: [K, K] sum of x x̃ᵀ.
        offsets: by weight, [N, K] sum of (r - r̃) x̃ᵀ, where r is what the weight's output is added to.
    """

    rows: int = 0
    gram: Doubles | None = None
    cross: Doubles | None = None
    offsets: dict[str, Doubles] = field(default_factory=dict)

    def add(self, pair: Pair, others: Mapping[str, Pair]) -> None:
        """Take in the tensors of one sample, and what outputs of weights are added to."""
        x, seen = (a.reshape(-1, a.shape[-1]) for a in pair)
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            float_x, twin_x = x[part].astype(np.float64), seen[part].astype(np.float64)
            self.gram = _plus(self.gram, twin_x.T @ twin_x)
            self.cross = _plus(self.cross, float_x.T @ twin_x)
            for name, (r, twin_r) in others.items():
                lost = r.reshape(len(x), -1)[part].astype(np.float64)
                lost -= twin_r.reshape(len(x), -1)[part]
                held = _plus(self.offsets.get(name), lost.T @ twin_x)
                self.offsets[name] = held
        self.rows += len(x)

    def stats(self, name: str) -> WeightStats | None:
        """What is known about the weight of that name; None where no row was seen."""
        if self.gram is None or self.cross is None:
            return None
        lost = self.offsets.get(name)
        return WeightStats(
            gram=self.gram / self.rows,
            cross=self.cross / self.rows,
            offset=None if lost is None else lost / self.rows,
        )

    def __add__(self, other: Means) -> Means:
        """What both saw."""
        if self.gram is None or self.cross is None:
            return other
        if other.gram is None or other.cross is None:
            return self
        offsets = {n: held + other.offsets[n] for n, held in self.offsets.items()}
        rows = self.rows + other.rows
        return Means(rows, self.gram + other.gram, self.cross + other.cross, offsets)


def _plus(total: Doubles | None, more: Doubles) -> Doubles:
    return more if total is None else total + more


def collect(twins: Twins, group: Sequence[Weight], inputs: tuple[str, ...]) -> tuple[Means, Means]:
    """The means over every other sample, and over the rest, for weights that all read `inputs`."""
    added = {
        w.name: {str(u.node.inputs[0].name): _added_to(u) for u in w.uses if u.node.inputs[0]}
        for w in group
    }
    names = {*inputs, *(n for by_input in added.values() for n in by_input.values() if n)}
    halves = Means(), Means()
    for index, values in enumerate(twins.samples(sorted(names))):
        for name in inputs:
            if not values[name][0].size:
                continue  # of a branch that was not taken
            rows = values[name][0].size // values[name][0].shape[-1]
            others = {}
            for weight in group:
                other = added[weight.name].get(name, "")
                if other and values[other][0].size == rows * weight.shape[0]:
                    others[weight.name] = values[other]
            halves[index % 2].add(values[name], others)
    return halves


def _added_to(use: Use) -> str:
    """The tensor that the operator's output is added to, behind a bias: a residual stream; "" where there is none."""
    value = use.node.outputs[0]
    for _ in range(_HOPS):
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or value.is_graph_output() or use.in_body:
            return ""
        node = readers[0]
        if node.op_type != "Add" or node.domain or node.graph is not use.node.graph:
            return ""
        other = node.inputs[0] if node.inputs[1] is value else node.inputs[1]
        if other is None or other is value:
            return ""
        if not graph.is_constant(other):
            return str(other.name or "")
        value = node.outputs[0]
    return ""
