"""Running a model whose weights change, in one session or stretch by stretch, on the same samples again and again.

A large model is cut at narrow points. Only the weights of one stretch are in memory, the values between stretches are
on disk, and what lies before the first weight that differs from an earlier run is not run again.
"""

from __future__ import annotations

import bisect
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from qgraph import cuts, files, runtime
from qgraph.calibrate import parts, types
from qgraph.data import Array, Feeds
from qgraph.evaluate import sessions

WEIGHTS = 256 << 20
"""Bytes of weights that a stretch may need, unless there is no place to cut it: within an operator, or at values that
numpy does not hold."""
Specs = Mapping[str, str]
"""Specs of the weights that are quantized, by name."""


class Output(NamedTuple):
    """An output as ONNX Runtime declares it; its own description would keep the session open."""

    name: str
    type: str
    shape: list[Any]


class Runner(Protocol):
    """Runs a model as its file is now.

    Attributes:
        keeps: whether keeping a run makes others shorter.
    """

    keeps: bool

    @property
    def declared(self) -> list[Output]:
        """The outputs; known after the first run."""

    def outputs(self, specs: Specs, *, keep: bool = False) -> Iterator[list[Array]]:
        """What the model gives for each sample.

        Args:
            specs: what its weights stand at: all that may differ from another run.
            keep: the next ones will differ from this one in few weights.
        """


class Whole:
    """One session for all of the model.

    Args:
        model: of a file in `folder`, whose data it points to.
        samples: feeds.
        folder: for a file.
        threads: of ONNX Runtime.
        config: entries for sessions.
    """

    keeps = False

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Feeds],
        folder: Path,
        threads: int,
        config: Mapping[str, str],
    ) -> None:
        self._model, self._samples = model, samples
        self._path, self._threads, self._config = folder / "whole.onnx", threads, config
        self._declared: list[Output] = []

    @property
    def declared(self) -> list[Output]:
        """See `Runner`."""
        return self._declared

    def outputs(self, specs: Specs, *, keep: bool = False) -> Iterator[list[Array]]:
        """See `Runner`; nothing is kept, for all of it runs each time."""
        ir.save(self._model, self._path)
        path = str(self._path)
        session = sessions.open_session(path, threads=self._threads, config=self._config)
        self._declared = _outputs(session)
        for feeds in self._samples:
            yield session.run(None, feeds)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A part of the model.

    Attributes:
        part: its nodes.
        made: the values that it computes, by name.
        kept: those on disk behind it: what is alive there, and outputs of the model that it computes.
    """

    part: ir.Model
    made: tuple[str, ...]
    kept: tuple[str, ...]

    def store(self, place: Path, number: int, found: Mapping[str, Array]) -> None:
        arrays: dict[str, Any] = {str(i): found[n] for i, n in enumerate(self.kept)}
        with _file(place, number).open("wb") as stream:
            np.savez(stream, **arrays)

    def load(self, place: Path, number: int, names: Sequence[str]) -> dict[str, Array]:
        with np.load(_file(place, number), allow_pickle=False) as held:
            return {n: held[str(i)] for i, n in enumerate(self.kept) if n in names}


@dataclass(frozen=True, slots=True)
class _Run:
    specs: dict[str, str]
    places: tuple[Path, ...]  # for each stretch, the folder of what is behind it


class Stretches:
    """A session for each stretch, one at a time.

    Args:
        model: of a file in `folder`, whose data it points to; nodes compute all of its outputs, which numpy holds.
        samples: feeds.
        folder: for files.
        threads: of ONNX Runtime.
        config: entries for sessions.
    """

    keeps = True

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Feeds],
        folder: Path,
        threads: int,
        config: Mapping[str, str],
    ) -> None:
        self._model, self._samples = model, samples
        self._path, self._threads, self._config = folder / "part.onnx", threads, dict(config)
        self._folder = Path(tempfile.mkdtemp(prefix="values-", dir=folder))
        self._order = cuts.Order(model)
        self._known = types.infer(model)
        self._weights = model.graph.initializers
        self._names = [str(v.name) for v in model.graph.outputs]
        self._places = self._cut()
        self._stretches = [self._stretch(a, b) for a, b in itertools.pairwise(self._places)]
        self._kept: list[_Run] = []
        self._declared: dict[str, Output] = {}

    @property
    def declared(self) -> list[Output]:
        """See `Runner`."""
        return [self._declared[name] for name in self._names]

    def outputs(self, specs: Specs, *, keep: bool = False) -> Iterator[list[Array]]:
        """See `Runner`; the first run and the last one to be kept are."""
        agreed = [self._agreed(specs, run.specs) for run in self._kept]
        first = max(agreed, default=0)
        before = self._kept[agreed.index(first)].places[:first] if first else ()
        rest = range(first, len(self._stretches))
        places = (*before, *(Path(tempfile.mkdtemp(dir=self._folder)) for _ in rest))
        for number in rest:
            self._run(number, places)
        if keep:
            self._kept[1:] = [_Run(dict(specs), places)]
        for number in range(len(self._samples)):
            found: dict[str, Array] = {}
            for stretch, place in zip(self._stretches, places, strict=True):
                found |= stretch.load(place, number, self._names)
            yield [found[name] for name in self._names]
        self._forget()

    def _run(self, number: int, places: Sequence[Path]) -> None:
        """One stretch on all samples, from what is before it."""
        stretch = self._stretches[number]
        # Small weights are exchanged, not overwritten. Those of bodies are no weights that change (canonicalize lifts
        # these), and their names may stand for several.
        for name, v in stretch.part.graph.initializers.items():
            v.const_value = self._weights[name].const_value
        ir.save(stretch.part, self._path)
        session = sessions.open_session(str(self._path), threads=self._threads, config=self._config)
        declared = {o.name: o for o in _outputs(session)}
        needed = [i.name for i in session.get_inputs()]
        for index, feeds in enumerate(self._samples):
            found = dict(feeds)
            if number:
                before = self._stretches[number - 1]
                found |= before.load(places[number - 1], index, before.kept)
            got = session.run(stretch.made, {n: found[n] for n in needed})
            found.update(zip(stretch.made, got, strict=True))
            stretch.store(places[number], index, found)
        # Shapes are not inferred through a part; what the last sample has will do.
        shapes = {n: [None, *np.shape(found[n])[1:]] for n in stretch.made} if self._samples else {}
        self._declared.update(
            {n: o._replace(shape=o.shape or shapes.get(n, [])) for n, o in declared.items()}
        )

    def _agreed(self, specs: Specs, others: Specs) -> int:
        """How many stretches, from the start, have the same weights in both."""
        different = [n for n in {*specs, *others} if specs.get(n) != others.get(n)]
        readers = (node for n in different for node, _ in self._weights[n].uses())
        places = map(self._order.place, readers)
        return min(
            (bisect.bisect_right(self._places, place) - 1 for place in places),
            default=len(self._stretches),
        )

    def _forget(self) -> None:
        """Remove the values of runs that are not kept."""
        held = {place for run in self._kept for place in run.places}
        for path in self._folder.iterdir():
            if path not in held:
                shutil.rmtree(path)

    def _cut(self) -> list[int]:
        """Where stretches begin, and the end."""
        order = self._order
        end = max(order.made(v) for v in self._model.graph.outputs)
        found = [0]
        for place in cuts.stops(order, cuts.weight_bytes(self._model, order), 0, end, WEIGHTS):
            alive = self._alive(place)
            is_new = any(order.made(v) > found[-1] for v in alive)
            if is_new and place < end and all(parts.can_be_kept(v, self._known) for v in alive):
                found.append(place)
        return [*found, end]

    def _alive(self, place: int) -> list[ir.Value]:
        return [v for v in self._order.alive(place) if not v.is_graph_input()]

    def _stretch(self, start: int, end: int) -> _Stretch:
        order, main = self._order, self._model.graph
        outputs = (v for v in main.outputs if start < order.made(v) <= end)
        kept = list(dict.fromkeys([*self._alive(end), *outputs]))
        made = [v for v in kept if order.made(v) > start]
        inputs = [v for v in main.inputs if not v.is_initializer()]
        part = parts.extract(self._model, [*self._alive(start), *inputs], made, self._known)
        return _Stretch(part, tuple(str(v.name) for v in made), tuple(str(v.name) for v in kept))


def _outputs(session: Any) -> list[Output]:
    return [Output(o.name, o.type, o.shape) for o in session.get_outputs()]


def _file(place: Path, number: int) -> Path:
    return place / f"{number:06d}.npz"


def runner(model: ir.Model, samples: Sequence[Feeds], folder: Path, threads: int) -> Runner:
    """What runs a model, by its size.

    Args:
        model: of a file in `folder`, whose data it points to.
        samples: feeds.
        folder: for files.
        threads: of ONNX Runtime.
    """
    config = runtime.mapped_weights(files.weight_bytes(model))
    if not config or not _can_be_cut(model):
        return Whole(model, samples, folder, threads, config)
    return Stretches(model, samples, folder, threads, config)


def _can_be_cut(model: ir.Model) -> bool:
    """Whether each output is computed by a node, and held by numpy."""
    known = types.infer(model)
    return all(v.producer() and parts.can_be_kept(v, known) for v in model.graph.outputs)
