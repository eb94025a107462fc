"""A checked source of samples that can be iterated any number of times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from qgraph import errors
from qgraph.data import samples as checks
from qgraph.data import sources
from qgraph.data.infos import Casts, Feeds, InputInfo, fail
from qgraph.data.opened import Located, Progress


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
    _read: Callable[[], Located] = field(repr=False)
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

    def first(self, count: int) -> Dataset:
        """The same data, cut after `count` samples."""
        if count >= self._count:
            return self
        digest = hashlib.sha256(f"{self._digest} {count}".encode()).hexdigest()
        return replace(self, _count=count, _digest=digest)

    def digest(self) -> str:
        """SHA-256 (hex) of the samples.

        Over names, types, shapes and bytes as the model sees them, so that the same samples give the same digest from
        any source of arrays. For images and text over the files' bytes and all that decides what is made of them.
        """
        return self._digest


def load(
    source: sources.Source,
    model_inputs: Sequence[InputInfo],
    samples: int | None = None,
    *,
    preprocess: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Open a data source and check it.

    Arrays and functions: every sample is read, in one pass that also computes the digest. Images and text: every
    file is checked by its header, and the first sample is made; the others are checked as they are used.

    An integer array of another width is cast where every value fits, float64 is cast to float32;
    both are noted, nothing else is cast. Samples may differ in shape. An iterator, which runs only
    once, is kept in memory. A state that is left out is zeros, or empty (see `qgraph.data.states`).

    Args:
        source: see the text of `qgraph.data`.
        model_inputs: what `inputs_of` says.
        samples: use so many: the first ones, of images and text as their `choose` says; needed
            where the source never ends.
        preprocess: for a path to images or text, `key=value,...` of `Images` or `Text`.
        progress: called with what is being read and the share done, 0..1, or -1 where it is not known.

    Raises:
        errors.InputError: QG111 to QG119 and QG150 to QG153, with all that is wrong with the first
            bad sample.
    """
    if samples is not None and samples < 1:
        fail("QG119", "samples", f"{samples} is not a positive number", "ask for at least 1")
    inputs = tuple(model_inputs)
    report = progress or (lambda what, share: None)
    opened = sources.open_source(source, inputs, samples, preprocess, report)
    casts: Casts = {}
    sha, count = hashlib.sha256(opened.identity or b""), 0
    limit = samples if opened.identity is None else 1
    for count, (place, sample) in enumerate(islice(opened.read(), limit), 1):
        feeds = checks.fit(sample, inputs, place, casts)
        if opened.identity is None:
            _hash(sha, feeds)
        if count % 16 == 0:
            report(f"reading {opened.origin}", -1)
    if opened.count is not None:
        count = opened.count
    if count == 0:
        fail("QG119", opened.origin, "holds no samples", "give at least one; 16 to 256 are usual")
    notes = [*opened.notes, *casts.values()]
    if samples is not None and count < samples:
        found = f"{samples} samples were asked for, {count} are there; all are used"
        notes.append(errors.Diagnostic("note", "QG119", opened.origin, found))
    return Dataset(opened.origin, inputs, tuple(notes), opened.read, count, sha.hexdigest())


def _hash(sha: Any, feeds: Feeds) -> None:
    for name in sorted(feeds):
        array = feeds[name]
        sha.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        if array.dtype.kind == "O":
            sha.update(repr(array.tolist()).encode())
        else:
            sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    sha.update(b"\n")
