"""A checked source of samples that can be iterated any number of times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from qgraph import errors
from qgraph.data import samples as checks
from qgraph.data import sources
from qgraph.data.samples import Casts, Feeds, InputInfo


@dataclass(frozen=True, slots=True)
class Dataset:
    """Checked samples; made by `load`.

    Every sample is read, checked and cast anew in each iteration, so that a file or folder is
    never wholly in memory. `origin` names the source, `notes` tells what was done to the data
    (casts, fewer samples than asked for).
    """

    origin: str
    inputs: tuple[InputInfo, ...]
    notes: tuple[errors.Diagnostic, ...]
    _read: Callable[[], sources.Located] = field(repr=False)
    _count: int
    _digest: str

    def __iter__(self) -> Iterator[Feeds]:
        """Start at the first sample."""
        casts: Casts = {}
        for place, sample in islice(self._read(), self._count):
            yield checks.fit(sample, self.inputs, place, casts)

    def __len__(self) -> int:
        """Number of samples."""
        return self._count

    def digest(self) -> str:
        """SHA-256 (hex) over names, types, shapes and bytes as the model sees them.

        The same samples give the same digest from any kind of source.
        """
        return self._digest


def load(
    source: sources.Source, model_inputs: Sequence[InputInfo], samples: int | None = None
) -> Dataset:
    """Open a data source and check every sample of it, in one pass that also computes the digest.

    An integer array of another width is cast where every value fits, float64 is cast to float32;
    both are noted, nothing else is cast. Samples may differ in shape. An iterator, which runs only
    once, is kept in memory.

    Args:
        source: see the text of `qgraph.data`.
        model_inputs: what `inputs_of` says.
        samples: use the first so many; needed where the source never ends.

    Raises:
        errors.InputError: QG111 to QG119, with all that is wrong with the first bad sample.
    """
    if samples is not None and samples < 1:
        checks.fail("QG119", "samples", f"{samples} is not a positive number", "ask for at least 1")
    inputs = tuple(model_inputs)
    origin, read = sources.open_source(source, inputs, samples)
    casts: Casts = {}
    sha, count = hashlib.sha256(), 0
    for place, sample in islice(read(), samples):
        _hash(sha, checks.fit(sample, inputs, place, casts))
        count += 1
    if count == 0:
        checks.fail("QG119", origin, "holds no samples", "give at least one; 16 to 256 are usual")
    notes = list(casts.values())
    if samples is not None and count < samples:
        found = f"{samples} samples were asked for, {count} are there; all are used"
        notes.append(errors.Diagnostic("note", "QG119", origin, found))
    return Dataset(origin, inputs, tuple(notes), read, count, sha.hexdigest())


def _hash(sha: Any, feeds: Feeds) -> None:
    for name in sorted(feeds):
        array = feeds[name]
        sha.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        if array.dtype.kind == "O":
            sha.update(repr(array.tolist()).encode())
        else:
            sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    sha.update(b"\n")
