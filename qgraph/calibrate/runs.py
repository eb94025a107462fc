"""Run a model on samples and stream its activations into observers."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph import errors, files, graph, runtime
from qgraph.calibrate import instrument, types
from qgraph.data import Dataset
from qgraph.observers import Stats, TensorStats, Wanted

MAX_MEMORY = 32 << 20
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
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
        feeds_only = [n for n in wanted if n in {v.name for v in model.graph.inputs}]
        groups = _groups(bench, dataset, [n for n in wanted if n not in feeds_only], max_memory)
        for index, group in enumerate(groups):
            watched = [*group, *(feeds_only if index == 0 else ())]
            shards = _observe(bench, dataset, group, {n: stats[n] for n in watched})
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

    def session(self, names: Sequence[str], *, sizes: bool = False) -> tuple[Any, dict[str, int]]:
        """A session whose outputs are the values (or only how many elements each has), and the axes each gained."""
        model = graph.clone(self._base)
        tapped = instrument.tap(model, names)
        fresh = graph.Names(model)
        outputs = []
        for each in tapped:
            out = each.value
            if sizes:
                out = graph.value(fresh(f"{each.name}.size"), ir.DataType.INT64, [])
                model.graph.append(ir.Node("", "Size", [each.value], outputs=[out]))
            outputs.append(out)
        # A name may be asked for that is an output already: outputs are only what was asked for, each once.
        model.graph.outputs[:] = outputs
        self._count += 1
        path = self._folder / f"tapped{self._count}.onnx"
        # The weights stay where they are: only their places are written.
        ir.save(model, path)
        session = runtime.session(path, threads=self.threads, accuracy_level=1, config=_CONFIG)
        if not sizes:
            _require_floats(session, names)
        return session, {t.name: t.new_axes for t in tapped}


def _require_floats(session: Any, names: Sequence[str]) -> None:
    wrong = [
        errors.Diagnostic("error", "QG142", name, f"is {out.type}", "observe float values only")
        for name, out in zip(names, session.get_outputs(), strict=True)
        if out.type not in _FLOATS
    ]
    if wrong:
        raise errors.InputError(*wrong)


def _observe(
    bench: _Bench, dataset: Dataset, group: Sequence[str], stats: Mapping[str, TensorStats]
) -> Iterator[int]:
    """Run all samples for one group of values; yields how many are done."""
    session, new_axes = bench.session(group) if group else (None, {})
    with ThreadPoolExecutor(bench.threads) as pool:
        for count, feeds in enumerate(dataset, start=1):
            arrays = dict(
                zip(group, _run(session, feeds, dataset, count) if group else (), strict=True)
            )
            arrays.update((n, feeds[n]) for n in stats if n not in arrays)
            # Each tensor has its own statistics, so the order of the threads means nothing.
            axes = (new_axes.get(n, 0) for n in stats)
            held = (arrays[n] for n in stats)
            list(pool.map(TensorStats.update, stats.values(), held, axes))
            del arrays, held  # or they would live on while the next sample runs
            yield count


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
    session, _ = bench.session(names, sizes=True)
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
