"""A source that has been opened: where it is, how many samples it has, how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from qgraph import errors

Located: TypeAlias = Iterator[tuple[str, Mapping[str, Any]]]
Progress: TypeAlias = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """What `load` needs of a source.

    `count` and `identity` are known where files and a specification decide every sample: then nothing but the first
    sample is made to check the source. Else every sample is read once.
    """

    origin: str
    read: Callable[[], Located]
    count: int | None = None
    identity: bytes | None = None
    notes: tuple[errors.Diagnostic, ...] = ()


def joined(samples: Located, at_once: int) -> Located:
    """Samples of one each, as samples of `at_once` along axis 0; what does not fill the last one is left out."""
    if at_once == 1:
        yield from samples
        return
    held: list[Mapping[str, Any]] = []
    for place, sample in samples:
        held.append(sample)
        if len(held) == at_once:
            yield place, {name: np.concatenate([each[name] for each in held]) for name in held[0]}
            held = []
