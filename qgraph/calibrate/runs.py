"""Run a model on samples and stream its activations into observers."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, files, graph, runtime
from qgraph.calibrate import instrument, types
from qgraph.data import Dataset
from qgraph.observers import Stats, TensorStats, Wanted, tables

MAX_MEMORY = 32 << 20
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_COUNTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_NOTHING = np.array([np.inf, -np.inf], np.float32)  # extremes of no values
_AT_ONCE = 64  # samples whose extremes wait to be added up
# Weights are mapped from the file; threads that spin between runs would take the observers' processor.
_CONFIG = {"session.intra_op.allow_spinning": "0"}
Progress = Callable[[str, float], None]


def run(
    model: ir.Model,
    dataset: Dataset,
    wanted: Mapping[str, Wanted],
    *,
    threads: int = 0,
    max_memory: int = MAX_MEMORY,
    progress: Progress | None = None,
    cache: str | os.PathLike[str] | None = None,
    on_cached: Callable[[Path], None] | None = None,
) -> Stats:
    """Statistics of activations over all samples.

    The same numbers come out whatever `threads` and `max_memory` are, bit for bit.

    Args:
        model: left unchanged.
        dataset: checked samples.
        wanted: what to remember, by value name; values of If, Loop and Scan bodies too.
        threads: of ONNX Runtime and of counting; 0 is one per core.
        max_memory: bytes of activations that may be alive at once as outputs. Where the first sample needs more, the
            model runs several times over the data, each time for some of the values; one value is never split.
            With the native library, only values of which more than a histogram is wanted become outputs.
        progress: called with what is being done and the share done, 0..1.
        cache: folder of earlier results, keyed by model, data, `wanted` and the version of ONNX Runtime.
        on_cached: called with the file where an earlier result is used.

    Raises:
        errors.InputError: QG140 for an unknown name, QG142 for a value that is not float.
        errors.UnsupportedError: QG141 for a value in a body that nothing can be brought out of.
        errors.RuntimeFailure: QG601 where ONNX Runtime refuses the model, QG608 where it fails on a sample.
    """
    say = progress or (lambda what, share: None)
    threads = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qgraph-calibrate-") as folder:
        bench = _Bench(model, Path(folder), threads)
        kept = _cache_file(cache, bench, dataset, wanted)
        found = _cached(kept)
        if found is not None and kept is not None:
            if on_cached is not None:
                on_cached(kept)
            return found
        stats = {name: TensorStats(w) for name, w in wanted.items()}
        counted = bench.countable(wanted)
        inputs = {v.name for v in model.graph.inputs}
        feeds_only = [n for n in wanted if n in inputs and n not in counted]
        brought = [n for n in wanted if n not in inputs and n not in counted]
        groups = _groups(bench, dataset, brought, max_memory)
        for index, group in enumerate(groups):
            first = index == 0
            watched = [*group, *(feeds_only if first else ())]
            shards = _observe(
                bench,
                dataset,
                group,
                {n: stats[n] for n in watched},
                {n: stats[n] for n in counted if first},
            )
            for count in shards:
                done = (index + count / len(dataset)) / len(groups)
                say(f"calibrating, sample {count} of {len(dataset)}", done)
    result = Stats(stats)
    if kept is not None:
        _store(result, kept)
    return result


class _Bench:
    """The model on disk once, its weights in one file that every instrumented graph shares and maps."""

    def __init__(self, model: ir.Model, folder: Path, threads: int) -> None:
        self.threads = threads
        self._folder = folder
        self._count = 0
        self._base = files.load(files.save(model, folder / "model.onnx", external_data=True))
        known = types.infer(self._base)
        for each in graph.graphs(self._base):
            for v in (v for node in each for v in node.outputs):
                if v.type is None and v.name in known:
                    v.type = ir.TensorType(known[v.name])

    def digest(self) -> str:
        """SHA-256 of graph and weights."""
        sha = hashlib.sha256()
        for path in sorted(self._folder.glob("model.onnx*")):
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    sha.update(chunk)
        return sha.hexdigest()

    def countable(self, wanted: Mapping[str, Wanted]) -> list[str]:
        """The values that the native library can count where they are produced."""
        if tables.library() is None:
            return []
        found = instrument.find(self._base, wanted)
        return [n for n, w in wanted.items() if w == Wanted() and found[n].dtype in _COUNTED]

    def session(self, names: Sequence[str], keys: Mapping[str, int]) -> _Instrumented:
        """A session whose outputs are the values, and which counts others under their tables' keys."""
        model = graph.clone(self._base)
        seen = instrument.count(model, keys, self.threads)
        tapped = instrument.tap(model, names)
        # Pairs of the main graph travel as one output; those of bodies come in any number.
        inner = [t for t in seen if t.is_lifted]
        outer = [t for t in seen if not t.is_lifted]
        outputs = [t.value for t in inner]
        if outer:
            pairs = graph.value(graph.Names(model)("seen"), ir.DataType.FLOAT, [2 * len(outer)])
            axis = ir.AttrInt64("axis", 0)
            model.graph.append(
                ir.Node("", "Concat", [t.value for t in outer], [axis], outputs=[pairs])
            )
            outputs.insert(0, pairs)
        outputs += [t.value for t in tapped]
        session = self._start(model, outputs, custom_ops=bool(keys))
        _require_floats(session, names)
        return _Instrumented(
            session, [t.name for t in outer], [t.name for t in inner], list(names),
            {t.name: t.new_axes for t in tapped},
        )  # fmt: skip

    def sizes(self, names: Sequence[str]) -> Any:
        """A session whose outputs are how many elements each value has."""
        model = graph.clone(self._base)
        fresh = graph.Names(model)
        outputs = []
        for each in instrument.tap(model, names):
            out = graph.value(fresh(f"{each.name}.size"), ir.DataType.INT64, [])
            model.graph.append(ir.Node("", "Size", [each.value], outputs=[out]))
            outputs.append(out)
        return self._start(model, outputs, custom_ops=False)

    def _start(self, model: ir.Model, outputs: Sequence[ir.Value], *, custom_ops: bool) -> Any:
        # A name may be asked for that is an output already: outputs are only what was asked for, each once.
        model.graph.outputs[:] = outputs
        self._count += 1
        path = self._folder / f"tapped{self._count}.onnx"
        # The weights stay where they are: only their places are written.
        ir.save(model, path)
        return runtime.session(
            path,
            threads=self.threads,
            accuracy_level=1,
            config=_CONFIG,
            custom_ops=custom_ops or None,
            # A value is counted as soon as it is there, and its memory is free after its last use.
            in_file_order=True,
        )


@dataclass(frozen=True, slots=True)
class _Instrumented:
    """A session and what its outputs mean.

    Attributes:
        outer: values of the main graph whose extremes are the first output [2 * outer], if there are any.
        inner: values of bodies whose extremes are an output each.
        names: values that are an output each.
        new_axes: how many axes each of `names` gained.
    """

    session: Any
    outer: Sequence[str]
    inner: Sequence[str]
    names: Sequence[str]
    new_axes: Mapping[str, int]

    def extremes(self, outputs: Sequence[Any]) -> npt.NDArray[np.float32]:
        """[outer + inner, 2] of one sample; inf, -inf where a body did not run."""
        first = outputs[0].reshape(-1, 2) if self.outer else np.empty((0, 2), np.float32)
        rest = [np.append(o, _NOTHING) for o in self._inner(outputs)]
        return np.concatenate(
            [first, *([[o[0::2].min(), o[1::2].max()]] for o in rest)], dtype=np.float32
        )

    def _inner(self, outputs: Sequence[Any]) -> Sequence[Any]:
        start = bool(self.outer)
        return outputs[start : start + len(self.inner)]

    def values(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """What was brought out, by name."""
        return dict(zip(self.names, outputs[len(outputs) - len(self.names) :], strict=True))


def _require_floats(session: Any, names: Sequence[str]) -> None:
    outputs = session.get_outputs()
    wrong = [
        errors.Diagnostic("error", "QG142", name, f"is {out.type}", "observe float values only")
        for name, out in zip(names, outputs[len(outputs) - len(names) :], strict=True)
        if out.type not in _FLOATS
    ]
    if wrong:
        raise errors.InputError(*wrong)


def _observe(
    bench: _Bench,
    dataset: Dataset,
    group: Sequence[str],
    stats: Mapping[str, TensorStats],
    counted: Mapping[str, TensorStats],
) -> Iterator[int]:
    """Run all samples for one group of values, and count others in place; yields how many samples are done."""
    with (
        tables.opened(s.histogram for s in counted.values()) as keys,
        ThreadPoolExecutor(bench.threads) as pool,
    ):
        keyed = dict(zip(counted, keys, strict=True))
        made = bench.session(group, keyed) if group or keyed else None
        waiting: list[npt.NDArray[np.float32]] = []
        for count, feeds in enumerate(dataset, start=1):
            outputs = _run(made.session, feeds, dataset, count) if made else ()
            arrays = made.values(outputs) if made else {}
            arrays.update((n, feeds[n]) for n in stats if n not in arrays)
            # Each tensor has its own statistics, so the order of the threads means nothing.
            axes = (made.new_axes.get(n, 0) if made else 0 for n in stats)
            held = (arrays[n] for n in stats)
            list(pool.map(TensorStats.update, stats.values(), held, axes))
            if made and keyed:
                waiting.append(made.extremes(outputs))
            del outputs, arrays, held  # or they would live on while the next sample runs
            if len(waiting) == _AT_ONCE:
                _add_extremes(made, waiting, counted)
            yield count
        _add_extremes(made, waiting, counted)


def _add_extremes(
    made: _Instrumented | None,
    waiting: list[npt.NDArray[np.float32]],
    counted: Mapping[str, TensorStats],
) -> None:
    """Hand the extremes of some samples to the statistics; none wait afterwards."""
    if made is None or not waiting:
        return
    low_high = np.stack(waiting, axis=-1)
    for name, (low, high) in zip((*made.outer, *made.inner), low_high, strict=True):
        counted[name].update_extremes(low, high)
    waiting.clear()


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    # Samples differ in shape: an arena that kept the largest of each would grow with their number.
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _run(session: Any, feeds: Any, dataset: Dataset, count: int) -> Sequence[Any]:
    try:
        outputs: Sequence[Any] = session.run(None, feeds, _run_options())
    except Exception as e:
        raise errors.RuntimeFailure(
            errors.Diagnostic(
                "error", "QG608", f"{dataset.origin} sample {count - 1}",
                f"ONNX Runtime cannot run the model on it: {e}",
                "does the float model run on this sample?",
            )
        ) from e  # fmt: skip
    return outputs


def _groups(
    bench: _Bench, dataset: Dataset, names: Sequence[str], max_memory: int
) -> list[list[str]]:
    """Values that are brought out together: as many as fit, in graph order, by their sizes in the first sample."""
    if not names:
        return [[]]
    session = bench.sizes(names)
    sizes = [4 * int(s) for s in _run(session, next(iter(dataset)), dataset, 1)]
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in zip(names, sizes, strict=True):
        if groups[-1] and held + size > max_memory:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _cache_file(
    cache: str | os.PathLike[str] | None,
    bench: _Bench,
    dataset: Dataset,
    wanted: Mapping[str, Wanted],
) -> Path | None:
    if cache is None:
        return None
    import onnxruntime

    sha = hashlib.sha256()
    for part in (
        bench.digest(),
        dataset.digest(),
        repr(sorted(wanted.items(), key=lambda i: i[0])),
        onnxruntime.__version__,
    ):
        sha.update(f"{part}\0".encode())
    return Path(cache) / f"{sha.hexdigest()[:32]}.npz"


def _cached(path: Path | None) -> Stats | None:
    if path is None or not path.is_file():
        return None
    try:
        return Stats.load(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG143",
                str(path),
                f"cannot be read as a calibration result: {e}",
                "delete it",
            )
        ) from e


def _store(stats: Stats, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".qgraph-", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        stats.save(whole)
        os.replace(whole, path)
