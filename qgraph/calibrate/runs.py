"""Run a model on samples and stream its activations into observers."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors
from qgraph.calibrate.batches import Batches
from qgraph.calibrate.sessions import Bench, Instrumented
from qgraph.data import Dataset
from qgraph.observers import Stats, TensorStats, Wanted, tables

MAX_MEMORY = 32 << 20
_AT_ONCE = 64  # samples whose extremes wait to be added up
_NO_ROWS = np.empty((0, 4), np.float32)
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
        bench = Bench(model, Path(folder), threads, dataset.origin)
        kept = _cache_file(cache, bench, dataset, wanted)
        found = _cached(kept)
        if found is not None and kept is not None:
            if on_cached is not None:
                on_cached(kept)
            return found
        copies = bench.copies(wanted)
        stats = {name: TensorStats(w) for name, w in wanted.items()}
        seen = {name: w for name, w in wanted.items() if name not in copies}
        counted = bench.countable(seen)
        inputs = {v.name for v in model.graph.inputs}
        feeds_only = [n for n in seen if n in inputs and n not in counted]
        brought = [n for n in seen if n not in inputs and n not in counted]
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
                max_memory,
            )
            for count in shards:
                done = (index + count / len(dataset)) / len(groups)
                say(f"calibrating, sample {count} of {len(dataset)}", done)
        for name, held in copies.items():
            stats[name].merge(stats[held])
    result = Stats(stats)
    if kept is not None:
        _store(result, kept)
    return result


def _observe(
    bench: Bench,
    dataset: Dataset,
    group: Sequence[str],
    stats: Mapping[str, TensorStats],
    counted: Mapping[str, TensorStats],
    max_memory: int,
) -> Iterator[int]:
    """Run all samples for one group of values, and count others in place; yields how many samples are done."""
    with tables.opened(s.histogram for s in counted.values()) as (keys, totals):
        made = None
        if group or keys:
            made = bench.session(group, dict(zip(counted, keys, strict=True)))
        extremes = _Extremes(made.counted if made else (), counted)
        if stats or made is None:
            for rows in _bring(made, bench.threads, dataset, stats):
                yield extremes.add([rows])
        else:
            # Of the values that are counted in a run, few are alive at once.
            limit = max_memory // 2 if bench.is_batchable() else 0
            batches = Batches(
                lambda feeds, control, number: made.run(feeds, number, control)[0],
                len(counted),
                lambda: int(totals[:, 1].sum()),
                limit,
            )
            for several in batches.results(iter(dataset)):
                yield extremes.add(several)
        extremes.flush()


def _bring(
    made: Instrumented | None, threads: int, dataset: Dataset, stats: Mapping[str, TensorStats]
) -> Iterator[npt.NDArray[np.float32]]:
    """Run sample by sample and update statistics with the values that come out; yields what nodes give."""
    with ThreadPoolExecutor(threads) as pool:
        for number, feeds in enumerate(dataset):
            rows, arrays = made.run(feeds, number) if made else (_NO_ROWS, {})
            arrays.update((n, feeds[n]) for n in stats if n not in arrays)
            # Each tensor has its own statistics, so the order of the threads means nothing.
            axes = (made.new_axes.get(n, 0) if made else 0 for n in stats)
            held = (arrays[n] for n in stats)
            list(pool.map(TensorStats.update, stats.values(), held, axes))
            del arrays, held  # or they would live on while the next sample runs
            yield rows


class _Extremes:
    """Hands the extremes of samples to the statistics, many at once."""

    def __init__(self, names: Sequence[str], stats: Mapping[str, TensorStats]) -> None:
        self._stats = [stats[name] for name in names]
        self._waiting: list[npt.NDArray[np.float32]] = []
        self._count = 0

    def add(self, samples: Sequence[npt.NDArray[np.float32]]) -> int:
        """Take in what nodes gave of samples, [values, 4] each; how many samples there were so far."""
        self._waiting += [rows[:, :2].copy() for rows in samples]
        self._count += len(samples)
        if len(self._waiting) >= _AT_ONCE:
            self.flush()
        return self._count

    def flush(self) -> None:
        """None wait afterwards."""
        if self._waiting:
            for stats, (low, high) in zip(
                self._stats, np.stack(self._waiting, axis=-1), strict=True
            ):
                stats.update_extremes(low, high)
        self._waiting.clear()


def _groups(
    bench: Bench, dataset: Dataset, names: Sequence[str], max_memory: int
) -> list[list[str]]:
    """Values that are brought out together: as many as fit, in graph order, by their sizes in the first sample."""
    if not names:
        return [[]]
    sizes = [4 * size for size in bench.sizes(names, next(iter(dataset)))]
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
    bench: Bench,
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
