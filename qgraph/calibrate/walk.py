"""Running a model stretch by stretch on all samples, so that each of its nodes runs once.

A walk stands at a place of the model (see `qgraph.cuts`). The values that are alive there are on disk, a file for each
sample; what lies before is not needed again. A step to a later place runs the nodes in between, with the weights that
they then have, and only these weights are read.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import cuts, files, graph, mapped, runtime, spool
from qgraph.calibrate import instrument, parts, types
from qgraph.data import Dataset
from qgraph.spec import QTensor
from qgraph.weights import Weight

Array = npt.NDArray[Any]

WEIGHTS = 256 << 20
"""Bytes of weights that a stretch may need, unless one operator alone needs more."""
# Threads that spin between runs would take the solvers' processor; roundings are run as they are written.
_CONFIG = {"session.intra_op.allow_spinning": "0", "session.disable_quant_qdq": "1"}


class Walk:
    """A model, and the values of all samples at the place that it has reached.

    Attributes:
        order: of the model.
        place: where it stands; -1 before all of it.

    Args:
        model: not changed, and nobody else may change it meanwhile.
        dataset: checked samples.
        folder: for files; theirs alone.
        threads: of ONNX Runtime; 0 is one per core.
    """

    def __init__(self, model: ir.Model, dataset: Dataset, folder: Path, threads: int) -> None:
        self.order = cuts.Order(model)
        self._model, self._dataset, self._folder = model, dataset, folder
        self._threads = threads or os.cpu_count() or 1
        self._inputs = {str(v.name): v for v in model.graph.inputs if not v.is_initializer()}
        self._values = {str(v.name): v for n in model.graph for v in n.outputs if v.name}
        self._values |= self._inputs
        self._types = types.infer(model)
        self._read = cuts.weight_bytes(model, self.order)
        self._held: dict[str, int] = {}  # value on disk → its number in the files
        self.place = -1
        self._files = Path(tempfile.mkdtemp(dir=folder))
        self._solved: dict[str, tuple[Weight, Future[Any] | QTensor]] = {}

    def replace(self, weight: Weight, q: Future[Any] | QTensor) -> None:
        """Compute with a quantized weight from here on."""
        self._solved[weight.name] = weight, q

    def step(self, place: int) -> None:
        """Go to a later place, or as far before it as the values that are alive can be kept."""
        stops = cuts.stops(self.order, self._read, max(self.place, 0), place, WEIGHTS)
        for stop in itertools.chain(stops, (place,)):
            self._go(stop)

    def _go(self, place: int) -> None:
        alive = [v for v in self.order.alive(place) if v.name not in self._inputs]
        if place <= self.place or not all(parts.can_be_kept(v, self._types) for v in alive):
            return
        names = [str(v.name) for v in alive]
        made = Path(tempfile.mkdtemp(dir=self._folder))
        for number, found in enumerate(self.values(names)):
            arrays: dict[str, Any] = {str(i): found[n] for i, n in enumerate(names)}
            with (made / f"{number:06d}.npz").open("wb") as stream:
                np.savez(stream, **arrays)
        shutil.rmtree(self._files)
        self._arrive(place, made)

    def _arrive(self, place: int, folder: Path) -> None:
        alive = [v for v in self.order.alive(place) if v.name not in self._inputs]
        self._held = {str(v.name): index for index, v in enumerate(alive)}
        self.place, self._files = place, folder

    def leave(self, folder: Path) -> None:
        """Write the values to a folder that is not there yet: whole or not at all."""
        made = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder.parent))
        for path in self._files.iterdir():
            shutil.copyfile(path, made / path.name)
        made.rename(folder)

    def enter(self, place: int, folder: Path) -> None:
        """Stand at a place with the values that another walk left."""
        shutil.rmtree(self._files)
        made = Path(tempfile.mkdtemp(dir=self._folder))
        for path in folder.iterdir():
            shutil.copyfile(path, made / path.name)
        self._arrive(place, made)

    def values(self, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Values of each sample, by name: those that are here, and others that are computed from them."""
        missing = [n for n in names if n not in self._held and n not in self._inputs]
        session, needed = self._session(missing) if missing else (None, [])
        wanted = {*names, *needed}
        kept = [n for n in self._held if n in wanted]
        for number, feeds in enumerate(self._samples(wanted)):
            found = {n: feeds[n] for n in wanted if n in self._inputs}
            if kept:
                with np.load(self._files / f"{number:06d}.npz", allow_pickle=False) as held:
                    found.update((n, held[str(self._held[n])]) for n in kept)
            if session is not None:
                outputs = session.run(None, {n: found[n] for n in needed})
                found.update(zip(missing, outputs, strict=True))
            yield {n: found[n] for n in names}

    def _samples(self, wanted: set[str]) -> Iterator[Mapping[str, Any]]:
        if wanted & self._inputs.keys():
            yield from self._dataset
        else:
            yield from ({} for _ in range(len(self._dataset)))

    def _session(self, names: Sequence[str]) -> tuple[Any, list[str]]:
        """A session from what is here to `names`, and the names of its inputs."""
        model = self._model
        found = self._values
        outputs = [found.get(n) for n in names]
        if None in outputs:  # in a body
            model = graph.clone(model)
            outputs = [t.value for t in instrument.tap(model, names)]
            found = {str(v.name): v for n in model.graph for v in n.outputs if v.name}
            found |= {str(v.name): v for v in model.graph.inputs}
        starts = [found[n] for n in [*self._held, *self._inputs]]
        ends = [v for v in outputs if v is not None]
        made = parts.extract(model, starts, ends, self._types)
        for each in graph.graphs(made):
            for name, v in each.initializers.items():
                if name in self._solved:
                    v.const_value = _tensor(*self._solved[name])
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = files.save(made, Path(folder) / "part.onnx", external_data=True)
            mapped.release(self._model)
            session = runtime.session(path, threads=self._threads, accuracy_level=1, config=_CONFIG)
        return session, [str(v.name) for v in made.graph.inputs]


def _tensor(weight: Weight, q: Future[Any] | QTensor) -> ir.LazyTensor:
    """What the codes stand for, in the type and shape of the weight's tensor; computed when it is read."""
    held = weight.value.const_value
    assert held is not None

    def make() -> Array:
        solved = q.result() if isinstance(q, Future) else q
        whole = weight.matrix.back(solved.dequantize(), weight.dims)
        spool.drop(solved)
        return np.asarray(whole, held.dtype.numpy())

    return graph.lazy(make, held.dtype, weight.dims, weight.name)
