"""A float model and its twin, whose weights are replaced one after the other, on the same samples.

What a solver needs to make up for the errors of weights that were solved before: the inputs that it will really see,
and how they and the tensor that its output is added to differ from those of the float model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import graph
from qgraph.calibrate.groups import Group
from qgraph.calibrate.simulate import Simulated
from qgraph.calibrate.walk import Walk
from qgraph.data import Dataset
from qgraph.solver import WeightStats
from qgraph.spec import QTensor
from qgraph.weights import Use, Weight

Doubles = npt.NDArray[np.float64]
Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]

_ROWS = 512  # rows of a product at a time
_HOPS = 3


class Twins:
    """Both models on one walk (see `qgraph.calibrate.walk`).

    Args:
        simulated: the model whose weights are replaced; the float one is the same without roundings.
        dataset: checked samples.
        folder: an empty folder, for the values of both.
        threads: of ONNX Runtime; 0 is one per core.
        alone: there is no twin: the float model counts for both, and only what is collected is rounded.
    """

    def __init__(
        self, simulated: Simulated, dataset: Dataset, folder: Path, threads: int, *, alone: bool
    ) -> None:
        self.alone = alone
        self._origins = simulated.origins
        self._float = Walk(simulated.plain(), dataset, folder, threads)
        self._twin = None if alone else Walk(simulated.model, dataset, folder, threads)

    @property
    def _walks(self) -> list[tuple[str, Walk]]:
        return [("float", self._float), *([("twin", self._twin)] if self._twin else [])]

    @property
    def sides(self) -> int:
        """How many models there are."""
        return len(self._walks)

    @property
    def place(self) -> int:
        """Where the models stand; -1 before all of it."""
        return min(walk.place for _, walk in self._walks)

    def replace(self, weight: Weight, q: Future[Any] | QTensor) -> None:
        """Let the twin compute with a quantized weight from here on."""
        if self._twin is not None:
            self._twin.replace(weight, q)

    def step(self, place: int) -> None:
        """Go to a later place of the model."""
        for _, walk in self._walks:
            walk.step(place)

    def leave(self, folder: Path) -> None:
        """Write where both stand to new folders beside each other, whose names begin with that of `folder`."""
        for name, walk in self._walks:
            walk.leave(folder.with_name(f"{folder.name}-{name}"))

    def enter(self, place: int, folder: Path) -> None:
        """Stand at a place with what others left there."""
        for name, walk in self._walks:
            walk.enter(place, folder.with_name(f"{folder.name}-{name}"))

    def samples(self, names: Sequence[str]) -> Iterator[dict[str, Pair]]:
        """The values of both models, (float, twin), sample by sample."""
        if self._twin is None:
            for values in self._float.values(names):
                yield {n: (v, v) for n, v in values.items()}
            return
        plain = [self._origins.get(n, n) for n in names]
        sides = self._float.values(list(dict.fromkeys(plain))), self._twin.values(names)
        for there, here in zip(*sides, strict=True):
            yield {n: (there[p], here[n]) for n, p in zip(names, plain, strict=True)}


@dataclass
class Means:
    """Means over rows of the inputs of weights that read the same tensors; x of the float model, x̃ of the twin.

    Until `finish` they are sums.

    Attributes:
        alone: x and x̃ are the same, and only `gram` is made.
        rows: how many.
        gram: [K, K] mean of x̃ x̃ᵀ.
        cross: [K, K] mean of x x̃ᵀ.
        offsets: by weight, [N, K] mean of (r - r̃) x̃ᵀ, where r is what the weight's output is added to.
    """

    alone: bool = False
    rows: int = 0
    gram: Doubles | None = None
    cross: Doubles | None = None
    offsets: dict[str, Doubles] = field(default_factory=dict)

    def add(self, pair: Pair, others: Mapping[str, Pair]) -> None:
        """Take in the tensors of one sample, and what outputs of weights are added to."""
        x, seen = (a.reshape(-1, a.shape[-1]) for a in pair)
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            twin_x = seen[part].astype(np.float64)
            self.gram = _plus(self.gram, twin_x.T @ twin_x)
            if self.alone:
                continue
            self.cross = _plus(self.cross, x[part].astype(np.float64).T @ twin_x)
            for name, (r, twin_r) in others.items():
                lost = r.reshape(len(x), -1)[part].astype(np.float64)
                lost -= twin_r.reshape(len(x), -1)[part]
                self.offsets[name] = _plus(self.offsets.get(name), lost.T @ twin_x)
        self.rows += len(x)

    def _arrays(self) -> Iterator[Doubles]:
        yield from (a for a in (self.gram, self.cross, *self.offsets.values()) if a is not None)

    def finish(self) -> Means:
        """Sums become means, in place."""
        for each in self._arrays():
            each /= max(self.rows, 1)
        return self

    def stats(self, name: str) -> WeightStats | None:
        """What is known about the weight of that name, without copies; None where no row was seen."""
        if self.gram is None:
            return None
        return WeightStats(gram=self.gram, cross=self.cross, offset=self.offsets.get(name))

    def take(self, other: Means) -> None:
        """Take in other means, in place; they mean nothing afterwards."""
        rows = self.rows + other.rows
        if not other.rows:
            return
        if not self.rows:
            self.gram, self.cross, self.offsets = other.gram, other.cross, other.offsets
        else:
            for mine in self._arrays():
                mine *= self.rows / rows
            for theirs in other._arrays():
                theirs *= other.rows / rows
            assert self.gram is not None and other.gram is not None
            self.gram += other.gram
            if self.cross is not None and other.cross is not None:
                self.cross += other.cross
            for name, lost in other.offsets.items():
                self.offsets[name] = _plus(self.offsets.get(name), lost)
        self.rows = rows
        other.gram = other.cross = None
        other.offsets = {}


def _plus(total: Doubles | None, more: Doubles) -> Doubles:
    if total is None:
        return more
    total += more
    return total


def collect(twins: Twins, group: Group) -> tuple[Means, Means]:
    """The means over every other sample, and over the rest, for a group of weights."""
    added = {
        w.name: {str(u.node.inputs[0].name): _added_to(u) for u in w.uses if u.node.inputs[0]}
        for w in (() if twins.alone else group.weights)
    }
    names = {*group.inputs, *(n for by_input in added.values() for n in by_input.values() if n)}
    halves = Means(twins.alone), Means(twins.alone)
    for index, values in enumerate(twins.samples(sorted(names))):
        for name in group.inputs:
            if not all(side.size for side in values[name]):
                continue  # of a branch that was not taken; what is rounded in it may stand outside
            rows = values[name][0].size // values[name][0].shape[-1]
            others = {}
            for weight in group.weights:
                other = added.get(weight.name, {}).get(name, "")
                if other and values[other][0].size == rows * weight.shape[0]:
                    others[weight.name] = values[other]
            halves[index % 2].add(values[name], others)
    return halves[0].finish(), halves[1].finish()


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
