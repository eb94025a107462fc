"""Some rows of some activations, as they are: for choices that sums and histograms cannot make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, runtime
from qgraph.data import Dataset

SAMPLES = 8


def take(
    model: ir.Model,
    dataset: Dataset,
    axes: Mapping[str, int],
    limit: int,
    rng: np.random.Generator,
    *,
    threads: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """At most `limit` rows of each activation of the main graph, drawn from the first samples.

    Args:
        model: left unchanged.
        dataset: checked samples; the first 8 are run.
        axes: the channel axis, by name; all others are rows.
        limit: of rows per activation.
        rng: draws the rows.
        threads: of ONNX Runtime; 0 is its own choice.

    Returns:
        Rows [at most limit, channels] by name.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refuses the model or fails on a sample.
    """
    if not axes:
        return {}
    work = graph.clone(model)
    held = {str(v.name): v for n in work.graph for v in n.outputs}
    held |= {str(v.name): v for v in work.graph.inputs}
    work.graph.outputs[:] = [held[name] for name in axes]
    found: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in axes}
    each = -(-limit // min(SAMPLES, len(dataset)))
    with tempfile.TemporaryDirectory(prefix="qgraph-rows-") as folder:
        path = files.save(work, Path(folder) / "rows.onnx")
        session = runtime.session(path, threads=threads or None)
        for sample in islice(dataset, SAMPLES):
            got: Sequence[Any] = session.run(list(axes), dict(sample))
            for (name, axis), array in zip(axes.items(), got, strict=True):
                rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
                drawn = rng.permutation(len(rows))[:each]
                found[name].append(rows[np.sort(drawn)].astype(np.float64))
    return {name: np.concatenate(parts)[:limit] for name, parts in found.items()}
